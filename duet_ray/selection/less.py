"""LESS: rows whose Adam step points where the validation rows' gradients point (Xia et al. 2024).

    score = Σ_i η_i / Σ_j η_j · mean over validation rows of cos(Γ_i, g'_i)
    Γ_i = (β₁ m_i + (1 − β₁) g_i) / √(β₂ v_i + (1 − β₂) g_i² + 1e-8)

with i the checkpoints of the warm-up, η_i the mean learning rate of the epoch that ends there, m_i and v_i Adam's
moments at that point, g_i the gradient of the row's mean NLL per completion token and g'_i that of a validation row.
As in the authors' code, and unlike Adam, the moments are not bias-corrected and the 1e-8 is under the root: where
gradients are far below 1e-4, Γ is nearly a step of plain momentum. There the maximum is taken over the subtasks of a
known task; here the task is unseen and the validation rows are the domain's own, which is one subtask.

The validation side is one vector, V = mean of g' / |g'|, so that a score is Γ·V / |Γ| and no projection is needed to
keep it small: `projection: null` is exact. `projection: d` is the paper's form (d = 8,192): both sides are projected
and then normalised, which adds noise and saves nothing here.

Γ is not linear in g, so that rows' gradients must be formed: one linear at a time, for the rows of one batch, and
dropped as soon as they are added to the batch's sums. A row without completion tokens teaches nothing and scores 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from duet_ray.errors import SelectionError
from duet_ray.likelihood import Batch
from duet_ray.selection.base import Findings, RowWeights, SelectionContext
from duet_ray.selection.checkpoints import (
    SavedCheckpoint,
    save_directions,
    saved_checkpoints,
    sum_over_checkpoints,
    warm_up,
    warming_model,
)
from duet_ray.selection.fitting import PROJECTION, domain_seed
from duet_ray.selection.gradients import AdaptedModel, Rows, RowView, Vector, backward_pairs
from duet_ray.selection.projection import CountSketch
from duet_ray.selection.weighting import from_scores

BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8
"""The trainer's Adam's, and the authors' ε."""

OnBlock = Callable[[int, torch.Tensor], None]
"""Called with (index of the linear, `(b, n)` float32: what one linear adds to every row's vector)."""


class Less:
    """Cosines of Adam's update and validation gradients at the checkpoints of a warm-up."""

    name = "less"

    def prepare(self, domain: Any, context: SelectionContext, folder: Path) -> Findings:
        def direction(adapted: AdaptedModel) -> list[torch.Tensor]:
            return mean_direction(adapted, domain.validation, sketch_of(adapted, domain, context))

        with warming_model(context) as scoring:
            details = warm_up(scoring, domain, context, folder, with_moments=True)
            save_directions(scoring, context, folder, direction)
        return Findings(details={**details, "validation_rows": float(len(domain.validation))})

    def measure(self, domain: Any, rows: np.ndarray, context: SelectionContext, folder: Path) -> np.ndarray:
        def score(at: SavedCheckpoint, adapted: AdaptedModel, on_rows: Callable[[int], None]) -> np.ndarray:
            update, sketch = AdamUpdate.of(at.moments(adapted)), sketch_of(adapted, domain, context)
            view = RowView(domain.train, rows)
            return update_cosines(adapted, view, update, at.direction(adapted), sketch, on_rows)

        total_rate = sum(c.learning_rate for c in saved_checkpoints(folder))
        scores = sum_over_checkpoints(context, folder, len(rows), score) / total_rate
        if bad := int((~np.isfinite(scores)).sum()):
            raise SelectionError(
                f"the gradients of {bad} of {len(rows)} rows are not finite; lower training.learning_rate, "
                "set model.dtype: float32, or use selection.method: uniform"
            )
        return scores

    def weigh(self, domain: Any, measured: np.ndarray, context: SelectionContext, folder: Path) -> RowWeights:
        return from_scores(measured, context.settings, domain.name)


def sketch_of(adapted: AdaptedModel, domain: Any, context: SelectionContext) -> CountSketch | None:
    """The domain's projection, one for all checkpoints and both sides; None for exact products."""
    size = context.settings.projection
    if size is None:
        return None
    return CountSketch.draw(adapted.weights, size, domain_seed(context, domain, PROJECTION))


@dataclass(frozen=True)
class AdamUpdate:
    """g → Γ, at one checkpoint."""

    means: Vector
    """Per linear, `(n,)`: β₁ m."""
    squares: Vector
    """Per linear, `(n,)`: β₂ v + ε."""

    @classmethod
    def of(cls, moments: tuple[Vector, Vector]) -> "AdamUpdate":
        """From Adam's (m, v), which it takes over."""
        m, v = moments
        return cls([x.mul_(BETA_1).flatten() for x in m], [x.mul_(BETA_2).add_(EPSILON).flatten() for x in v])

    def apply_(self, index: int, gradients: torch.Tensor) -> torch.Tensor:
        """Γ of `(b, n)` gradients for one linear, in their place."""
        roots = torch.addcmul(self.squares[index], gradients, gradients, value=1 - BETA_2).rsqrt_()
        return gradients.mul_(1 - BETA_1).add_(self.means[index]).mul_(roots)


def row_gradients(adapted: AdaptedModel, batch: Batch, on_block: OnBlock) -> None:
    """The gradients of every row's mean NLL per completion token, handed over linear by linear.

    Whoever is handed a block may write to it.

    Raises:
        SelectionError: a linear is used more than once, so that it has its gradient in parts.
    """
    owner, n_loss_tokens = batch.loss_mask[:, 1:].nonzero()[:, 0], batch.loss_mask.sum(dim=1)
    seen: set[int] = set()

    def mean_nll(batch: Batch) -> torch.Tensor:
        return adapted.token_nll(batch) / n_loss_tokens[owner]

    def on_pair(index: int, x: torch.Tensor, delta: torch.Tensor) -> None:
        if index in seen:
            raise SelectionError(
                f"{adapted.names[index]} is used more than once in a forward pass, which less cannot score by; "
                "leave it out of selection.target_modules, or use selection.method: tracin"
            )
        seen.add(index)
        on_block(index, (delta.float().transpose(1, 2) @ x.float()).flatten(1))

    backward_pairs(adapted, batch, mean_nll, on_pair)


def mean_direction(adapted: AdaptedModel, rows: Rows, sketch: CountSketch | None) -> list[torch.Tensor]:
    """The mean of the rows' gradients, each normalised: one tensor per linear, or a single one of `(sketch.size,)`.

    A row whose gradient is zero has no direction and is left out.

    Raises:
        SelectionError: that is so for every row.
    """
    shapes = [w.shape for w in adapted.weights] if sketch is None else [torch.Size([sketch.size])]
    total, n_directions = [torch.zeros(shape, device=adapted.device) for shape in shapes], 0
    for _, batch in adapted.batches(rows):
        if sketch is None:
            scales = _inverse_norms(_square_norms(adapted, batch))
            # A second pass instead of the first one's gradients of all linears, which would be kept until the norms
            # are known.
            row_gradients(adapted, batch, _adder(total, scales))
        else:
            projected = _sketches(adapted, batch, sketch)
            scales = _inverse_norms(projected.double().square().sum(dim=1))
            total[0].add_(scales @ projected)
        n_directions += int((scales != 0).sum())
    if n_directions == 0:
        raise SelectionError(f"none of the {len(rows)} rows has a completion token whose loss has a gradient")
    return [t / n_directions for t in total]


def update_cosines(
    adapted: AdaptedModel,
    rows: Rows,
    update: AdamUpdate,
    direction: Sequence[torch.Tensor],
    sketch: CountSketch | None,
    on_rows: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Every row's Γ / |Γ|, dot `direction`.

    Args:
        direction: from `mean_direction`, with the same `sketch`.
        on_rows: called after each batch with the number of rows done.

    Returns:
        `(n_rows,)` float64; 0 for a row without completion tokens.
    """
    cosines, done = np.zeros(len(rows)), 0
    for ids, batch in adapted.batches(rows):
        if sketch is None:
            products, squares = _products(adapted, batch, update, direction)
        else:
            projected = _sketches(adapted, batch, sketch, update)
            products, squares = projected @ direction[0], projected.double().square().sum(dim=1)
        taught = batch.loss_mask.any(dim=1)
        cosines[ids] = (products * _inverse_norms(squares) * taught).cpu().numpy()
        done += len(ids)
        if on_rows is not None:
            on_rows(done)
    return cosines


def _products(
    adapted: AdaptedModel, batch: Batch, update: AdamUpdate, direction: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Γ·direction and |Γ|² of every row: `(b,)` float64 each."""
    products, squares = _zeros(batch), _zeros(batch)

    def add(index: int, block: torch.Tensor) -> None:
        block = update.apply_(index, block)
        products.add_(block @ direction[index].flatten())
        squares.add_(block.square_().sum(dim=1))

    row_gradients(adapted, batch, add)
    return products, squares


def _sketches(
    adapted: AdaptedModel, batch: Batch, sketch: CountSketch, update: AdamUpdate | None = None
) -> torch.Tensor:
    """`(b, sketch.size)`: every row's projected gradient, or update."""
    sums = sketch.zeros(len(batch.input_ids))

    def add(index: int, block: torch.Tensor) -> None:
        sketch.add(sums, index, block if update is None else update.apply_(index, block))

    row_gradients(adapted, batch, add)
    return sketch.finish(sums)


def _square_norms(adapted: AdaptedModel, batch: Batch) -> torch.Tensor:
    """|g|² of every row: `(b,)` float64."""
    squares = _zeros(batch)

    def add(_: int, block: torch.Tensor) -> None:
        squares.add_(block.square_().sum(dim=1))

    row_gradients(adapted, batch, add)
    return squares


def _adder(total: Vector, scales: torch.Tensor) -> OnBlock:
    """Adds every row's gradient, times its scale, to `total`."""

    def add(index: int, block: torch.Tensor) -> None:
        total[index].add_((scales @ block).view_as(total[index]))

    return add


def _zeros(batch: Batch) -> torch.Tensor:
    return torch.zeros(len(batch.input_ids), dtype=torch.float64, device=batch.input_ids.device)


def _inverse_norms(squares: torch.Tensor) -> torch.Tensor:
    """1 / √squares as float32; 0 for 0, and NaN where a square is not finite."""
    return torch.where(squares == 0, 0.0, squares.sqrt() / squares).float()
