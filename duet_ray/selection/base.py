"""The contract of a selection method: one domain → one weight for every training row.

Scores are computed once per (domain, model, method, settings), stored, and reused by every trial of every study; so a
method may take its time, but its result may depend on nothing but its inputs.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from duet_ray.config import SelectionConfig, TrainingConfig


@dataclass(frozen=True, kw_only=True)
class RowWeights:
    """A method's verdict on one domain: either probabilities, or a nested order of rows."""

    scores: np.ndarray | None = None
    """`(n_rows,)` float64 raw scores, higher = more helpful; None where the method has none (uniform)."""
    probabilities: np.ndarray | None = None
    """`(n_rows,)` float64, sum 1: rows are drawn by these."""
    order: np.ndarray | None = None
    """`(n_rows,)` int64 permutation, best first: the quota is taken from its front. Exactly one of the two is set."""
    notes: tuple[str, ...] = ()
    """Things the user should know, e.g. "all scores are equal: uniform weights"."""
    details: dict[str, float] = field(default_factory=dict)
    """Numbers of the method: damping, residual, seconds."""

    def __post_init__(self) -> None:
        assert (self.probabilities is None) != (self.order is None)

    @property
    def effective_sample_size(self) -> float:
        """(Σp)² / Σp²: how many rows the weights are worth, from 1 to n_rows (n_rows for an order)."""
        if self.probabilities is None:
            return float(len(self.order))  # type: ignore[arg-type]
        return float(self.probabilities.sum() ** 2 / np.square(self.probabilities).sum())


@dataclass(frozen=True, kw_only=True)
class SelectionContext:
    """What a method may use beside the rows."""

    settings: SelectionConfig
    training: TrainingConfig
    seed: int
    load_base: Callable[[], tuple[Any, Any]]
    """Returns the (model, tokenizer) to fine-tune and score with: the worker's base model, untouched."""
    on_progress: Callable[[str, int, int], None] | None = None
    """Called with (stage, done, in all)."""


class Selector(Protocol):
    """One selection method."""

    name: str
    needs_model: bool
    """Whether it must run where a model is (a worker), or may run in the driver."""

    def select(self, domain: Any, context: SelectionContext) -> RowWeights:
        """Weigh the training rows of one `duet_ray.domains.Domain`.

        Raises:
            SelectionError: the domain cannot be scored; names the domain and a remedy.
        """
        ...
