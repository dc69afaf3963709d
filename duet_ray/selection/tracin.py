"""TracIn: what the steps on a row did to the validation loss, summed over checkpoints (Pruthi et al. 2020, TracInCP).

    score = Σ_i η_i ⟨g_i, v_i⟩

with i the checkpoints of the warm-up, η_i the mean learning rate of the epoch that ends there, g_i the gradient of the
row's loss and v_i that of the mean validation loss. As for `influence`, which has H⁻¹v in place of v, a row's loss is
the sum of NLL over its completion tokens: what it adds to the training loss when it is drawn. So a longer row has a
score of larger size, and neither gradient is normalised.

The product is linear in g: the ghost dot product gives it without any row's gradient. For the same reason a random
projection P takes nothing off the work here: ⟨Pg, Pv⟩ = ⟨g, PᵀPv⟩, so `selection.projection` replaces v by PᵀPv, once.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from duet_ray.selection.base import Findings, RowWeights, SelectionContext
from duet_ray.selection.checkpoints import (
    SavedCheckpoint,
    save_directions,
    sum_over_checkpoints,
    warm_up,
    warming_model,
)
from duet_ray.selection.fitting import PROJECTION, domain_seed
from duet_ray.selection.gradients import AdaptedModel, RowView, Vector, ghost_products, mean_gradient
from duet_ray.selection.projection import CountSketch
from duet_ray.selection.weighting import from_scores


class TracIn:
    """Gradient dot products at the checkpoints of a warm-up."""

    name = "tracin"

    def prepare(self, domain: Any, context: SelectionContext, folder: Path) -> Findings:
        seed, size = domain_seed(context, domain, PROJECTION), context.settings.projection

        def direction(adapted: AdaptedModel) -> Vector:
            _, gradient = mean_gradient(adapted, domain.validation)
            if size is None:
                return gradient
            sketch = CountSketch.draw(adapted.weights, size, seed)
            return sketch.back(sketch.project(gradient), gradient)

        with warming_model(context) as scoring:
            details = warm_up(scoring, domain, context, folder, with_moments=False)
            save_directions(scoring, context, folder, direction)
        return Findings(details={**details, "validation_rows": float(len(domain.validation))})

    def measure(self, domain: Any, rows: np.ndarray, context: SelectionContext, folder: Path) -> np.ndarray:
        def score(at: SavedCheckpoint, adapted: AdaptedModel, on_rows: Callable[[int], None]) -> np.ndarray:
            return ghost_products(adapted, RowView(domain.train, rows), at.direction(adapted), on_rows)

        return sum_over_checkpoints(context, folder, len(rows), score)

    def weigh(self, domain: Any, measured: np.ndarray, context: SelectionContext, folder: Path) -> RowWeights:
        return from_scores(measured, context.settings, domain.name)
