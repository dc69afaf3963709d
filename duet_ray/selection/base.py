"""The contract of a selection method: one domain → one weight for every training row.

A method works in three steps, so that a fleet can share the work of a large domain and a killed worker costs one shard:

1. `prepare`, once a domain: fine-tune, solve, sketch; whatever the rows have in common, left as files in a folder.
2. `measure`, once a shard: an array with one entry (a score, an embedding, some indicators) for each of its rows.
3. `weigh`, once a domain: all measured rows → probabilities, or a nested order of rows.

Scores are computed once per (domain, model, method, settings), stored, and reused by every trial of every study; so a
method may take its time, but its result may depend on nothing but its inputs: not on the number of workers either, for
which the borders of shards depend on the domain alone (`scoring`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from duet_ray.config import SelectionConfig, TrainingConfig
from duet_ray.records import TokenRow


@dataclass(frozen=True, kw_only=True)
class RowWeights:
    """A method's verdict on one domain: either probabilities, or a nested order of rows."""

    scores: np.ndarray | None = None
    """`(n_rows,)` float64 raw scores, higher = more helpful; None where the method has none (uniform)."""
    probabilities: np.ndarray | None = None
    """`(n_rows,)` float64, sum 1: rows are drawn by these. 0 where a row is never drawn."""
    order: np.ndarray | None = None
    """`(n_rows,)` int64 permutation, best first: the quota is taken from its front. Exactly one of the two is set."""
    notes: tuple[str, ...] = ()
    """Things the user should know, e.g. "all scores are equal: uniform weights"."""
    details: dict[str, float] = field(default_factory=dict)
    """Numbers of the method: damping, residual, seconds."""

    def __post_init__(self) -> None:
        assert (self.probabilities is None) != (self.order is None)

    @property
    def n_rows(self) -> int:
        return len(self.order if self.probabilities is None else self.probabilities)  # type: ignore[arg-type]

    @property
    def effective_sample_size(self) -> float:
        """(Σp)² / Σp²: how many rows the weights are worth, from 1 to n_rows (n_rows for an order)."""
        if self.probabilities is None:
            return float(self.n_rows)
        return float(self.probabilities.sum() ** 2 / np.square(self.probabilities).sum())


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What `prepare` has to say beside its files: kept with the weights, and shown."""

    details: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SelectionContext:
    """What a method may use beside the rows."""

    settings: SelectionConfig
    training: TrainingConfig
    seed: int
    load_base: Callable[[], tuple[Any, Any]]
    """Returns the (model, tokenizer) to fine-tune and score with: the worker's base model, untouched, or the surrogate.
    """
    on_progress: Callable[[str, int, int], None] | None = None
    """Called with (stage, done, in all)."""
    n_drawn: int | None = None
    """The most rows of this domain that a mixture may hold, times `selection.pool`: an order may be arbitrary beyond
    them. None: all."""
    embedding_model: str | None = None
    """Resolved folder or hub id of a sentence-embedding model; None: the base model's mean hidden state."""
    examples: Sequence[TokenRow] = ()
    """A few tokenised examples of the task itself, where the user has some."""

    def progress(self, stage: str, total: int) -> Callable[[int], None]:
        """A function that is told how many of `total` are done."""
        report = self.on_progress
        return (lambda _: None) if report is None else (lambda done: report(stage, done, total))


class Selector(Protocol):
    """One selection method. Domains are `duet_ray.domains.Domain`s with at least two training rows."""

    name: str

    def prepare(self, domain: Any, context: SelectionContext, folder: Path) -> Findings:
        """Do once what all rows share, and leave it in `folder` (an empty one; no pickle).

        Raises:
            SelectionError: the domain cannot be scored; names the domain and a remedy.
        """
        ...

    def measure(self, domain: Any, rows: np.ndarray, context: SelectionContext, folder: Path) -> np.ndarray:
        """Measure some training rows.

        Args:
            rows: `(n,)` int64 row ids in ascending order.
            folder: what `prepare` left; read-only.

        Returns:
            `(n,)` or `(n, width)` floats, one entry a row, in the order of `rows`.
        """
        ...

    def weigh(self, domain: Any, measured: np.ndarray, context: SelectionContext, folder: Path) -> RowWeights:
        """Turn what was measured on all training rows, in order, into weights.

        Raises:
            SelectionError: as above.
        """
        ...
