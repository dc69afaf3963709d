"""The rows with the highest influence, without sampling (the paper's "IF only" inside a domain).

Gives an order: a mixture takes its quota from the front, so the k samples of a trial differ by their training seed
alone, unless `selection.pool` is above 1. The scores are those of `influence`, and are stored once for both.
"""

from pathlib import Path
from typing import Any

import numpy as np

from duet_ray.selection.base import Findings, RowWeights, SelectionContext
from duet_ray.selection.influence import Influence
from duet_ray.selection.weighting import from_scores


class TopN:
    """Influence decides the order."""

    name = "top_n"

    def prepare(self, domain: Any, context: SelectionContext, folder: Path) -> Findings:
        return Influence().prepare(domain, context, folder)

    def measure(self, domain: Any, rows: np.ndarray, context: SelectionContext, folder: Path) -> np.ndarray:
        return Influence().measure(domain, rows, context, folder)

    def weigh(self, domain: Any, measured: np.ndarray, context: SelectionContext, folder: Path) -> RowWeights:
        return from_scores(measured, context.settings, domain.name)
