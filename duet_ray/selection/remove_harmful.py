"""DUET-RH: drop the rows with the lowest influence, then draw uniformly from the rest (DUET, section 6 and App. A.5).

The rows dropped are `selection.harmful_fraction` of the domain, so a study knows how many it can draw before anything
is scored. The scores are those of `influence`, and are stored once for both.
"""

from pathlib import Path
from typing import Any

import numpy as np

from duet_ray.selection.base import Findings, RowWeights, SelectionContext
from duet_ray.selection.influence import Influence
from duet_ray.selection.weighting import from_scores


class RemoveHarmful:
    """Influence decides which rows are out; among the others all are alike."""

    name = "remove_harmful"

    def prepare(self, domain: Any, context: SelectionContext, folder: Path) -> Findings:
        return Influence().prepare(domain, context, folder)

    def measure(self, domain: Any, rows: np.ndarray, context: SelectionContext, folder: Path) -> np.ndarray:
        return Influence().measure(domain, rows, context, folder)

    def weigh(self, domain: Any, measured: np.ndarray, context: SelectionContext, folder: Path) -> RowWeights:
        return from_scores(measured, context.settings, domain.name)
