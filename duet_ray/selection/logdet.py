"""Diverse rows first: greedy maximisation of log det(I + K_S) over row embeddings (Wang et al. 2024, "Diversity
measurement and subset selection for instruction tuning datasets").

K is the linear kernel s·eᵢᵀeⱼ of centred unit vectors. det(K_S) alone is zero once S has more rows than the embedding
has dimensions; with I added every row has a gain above zero, so that the order goes on beyond. The greedy is the
pivoted Cholesky decomposition of I + K (Chen et al. 2018), but its factor would hold N × picks numbers. By the matrix
determinant lemma the same gains lie in feature space,

    gain(i | S) = log(1 + s · eᵢᵀ A⁻¹ eᵢ),    A = I + s · Σ_{j ∈ S} eⱼeⱼᵀ,

where a row taken lowers all others' eᵢᵀA⁻¹eᵢ by (eᵢᵀu)², u = √s · A⁻¹e / √(1 + s · eᵀA⁻¹e) (Sherman & Morrison): O(d)
a row, and O(N + d²) memory beside the embeddings.

What is far from everything else is diverse, nonsense included: this method does not tell good rows from bad ones.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from duet_ray.selection.base import Findings, RowWeights, SelectionContext
from duet_ray.selection.embeddings import centred, embed, notes_on
from duet_ray.selection.greedy import greedy_order, n_greedy

SCALE = 10.0
"""s. The larger, the less a second row like the first one gains: log(1 + s) for a new direction, log 2 for an old one.
From 10 on, subsets of real texts no longer changed much."""


class LogDet:
    """Greedy log-determinant selection."""

    name = "logdet"

    def prepare(self, domain: Any, context: SelectionContext, folder: Path) -> Findings:
        return Findings()

    def measure(self, domain: Any, rows: np.ndarray, context: SelectionContext, folder: Path) -> np.ndarray:
        return embed(domain, rows, context)

    def weigh(self, domain: Any, measured: np.ndarray, context: SelectionContext, folder: Path) -> RowWeights:
        features, n_picks = centred(measured), n_greedy(context, len(measured))
        order, total = logdet_order(features, n_picks, on_pick=context.progress("order", n_picks))
        details = {"logdet": total, "greedy_rows": float(n_picks), "embedding_width": float(measured.shape[1])}
        return RowWeights(order=order, notes=notes_on(features), details=details)


def logdet_order(
    features: np.ndarray, n_picks: int, *, scale: float = SCALE, on_pick: Callable[[int], None] | None = None
) -> tuple[np.ndarray, float]:
    """The rows, those that add most to log det(I + scale · E Eᵀ) first.

    Args:
        features: E, `(n_rows, d)` float32, of length 1 or 0.
        n_picks: the exact greedy goes so far; the rows after that stand in order of their last gains.

    Returns:
        (`(n_rows,)` int64 permutation, log det of the first `n_picks`). Of equal rows the lowest id comes first.
    """
    objective = _LogDeterminant(features, scale)
    order, _ = greedy_order(features, objective, n_picks, on_pick=on_pick)
    return order, objective.total


class _LogDeterminant:
    """Gains as eᵢᵀA⁻¹eᵢ, which rank rows as their logarithms do."""

    def __init__(self, features: np.ndarray, scale: float) -> None:
        self.features = features
        self.scale = scale
        self.inverse = np.eye(features.shape[1])
        self.total = 0.0

    def start(self) -> np.ndarray:
        return np.einsum("ij,ij->i", self.features, self.features, dtype=np.float64)

    def take(self, row: int) -> np.ndarray:
        e = self.features[row].astype(np.float64)
        u = self.inverse @ e
        determinant = 1 + self.scale * float(e @ u)
        u *= np.sqrt(self.scale / determinant)
        self.inverse -= np.outer(u, u)
        self.total += float(np.log(determinant))
        return u.astype(np.float32)

    def lower(self, gains: np.ndarray, products: np.ndarray, rows: np.ndarray, taken: np.ndarray) -> np.ndarray:
        return gains - np.einsum("ij,ij->i", products, products)
