"""Rows that cover the domain: k-center greedy over row embeddings (Gonzalez 1985; Sener & Savarese 2018, "Active
learning for convolutional neural networks: a core-set approach").

Begin with the row nearest to the mean, then always take the row that is farthest from all rows taken. However many
are taken, the largest distance of any row to its nearest taken one is at most twice the smallest that so many rows
can reach. Distances are between centred unit vectors, so a squared one is 2 − 2 · cosine.

As with any cover, lone rows are taken early, nonsense included: this method does not tell good rows from bad ones.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from duet_ray.selection.base import Findings, RowWeights, SelectionContext
from duet_ray.selection.embeddings import centred, embed, notes_on
from duet_ray.selection.greedy import TIE, greedy_order, n_greedy


class Coreset:
    """k-center greedy selection."""

    name = "coreset"

    def prepare(self, domain: Any, context: SelectionContext, folder: Path) -> Findings:
        return Findings()

    def measure(self, domain: Any, rows: np.ndarray, context: SelectionContext, folder: Path) -> np.ndarray:
        return embed(domain, rows, context)

    def weigh(self, domain: Any, measured: np.ndarray, context: SelectionContext, folder: Path) -> RowWeights:
        features, n_picks = centred(measured), n_greedy(context, len(measured))
        order, radius = k_center_order(features, n_picks, on_pick=context.progress("order", n_picks))
        details = {"radius": radius, "greedy_rows": float(n_picks), "embedding_width": float(measured.shape[1])}
        return RowWeights(order=order, notes=notes_on(features), details=details)


def k_center_order(
    features: np.ndarray, n_picks: int, *, on_pick: Callable[[int], None] | None = None
) -> tuple[np.ndarray, float]:
    """The rows, farthest from all rows before it first.

    Args:
        features: `(n_rows, d)` float32, of length about 1.
        n_picks: the exact greedy goes so far; the rows after that stand in order of their distance to these.

    Returns:
        (`(n_rows,)` int64 permutation, the largest distance of any row to its nearest of the first `n_picks`). Of
        equal rows the lowest id comes first.
    """
    objective = _Distances(features)
    to_mean = objective.norms - 2 * (features @ features.mean(axis=0, dtype=np.float64).astype(np.float32))
    first = int(np.argmax(to_mean <= to_mean.min() + TIE))
    order, distances = greedy_order(features, objective, n_picks, first=first, on_pick=on_pick)
    return order, float(np.sqrt(max(0.0, distances.max())))


class _Distances:
    """Gains as squared distances to the nearest row taken."""

    def __init__(self, features: np.ndarray) -> None:
        self.features = features
        self.norms = np.einsum("ij,ij->i", features, features, dtype=np.float64)

    def start(self) -> np.ndarray:
        return np.full(len(self.features), np.inf)

    def take(self, row: int) -> np.ndarray:
        return np.asarray(self.features[row])

    def lower(self, gains: np.ndarray, products: np.ndarray, rows: np.ndarray, taken: np.ndarray) -> np.ndarray:
        nearest = self.norms[rows] + (self.norms[taken] - 2 * products).min(axis=1)
        return np.minimum(gains, np.maximum(nearest, 0))
