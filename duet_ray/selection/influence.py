"""DUET-IF: rows are drawn by their influence on the domain's own validation loss (DUET, section 3.2 and App. A.4).

Per domain: fine-tune the base on the training rows, take the gradient v of the mean validation loss, solve
H⁻¹v once, and score every training row by one dot product with its gradient g:

    score = vᵀ H⁻¹ g

Eq. 6 of the paper has a minus sign: it is the change of the validation loss when the row is weighted up, so lower is
better there. Here higher is more helpful. Influence finds rows that do harm (nonsense, wrong answers) well; it says
nothing of how useful a clean row is for the task that no one can see.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file

from duet_ray.config import SelectionConfig
from duet_ray.errors import SelectionError
from duet_ray.selection.base import Findings, RowWeights, SelectionContext
from duet_ray.selection.fitting import FIT, FIT_ROWS, HESSIAN_ROWS, LABELS, domain_seed, rows_of, scoring_model, subset
from duet_ray.selection.gradients import AdaptedModel, RowList, RowView, Vector, ghost_products, mean_gradient
from duet_ray.selection.hessian import Ekfac, GaussNewton, conjugate_gradient, dot, eager_attention, mean_eigenvalue
from duet_ray.selection.weighting import from_scores

ADAPTER, DIRECTION = "adapter", "direction.safetensors"


class Influence:
    """Influence functions over LoRA adapters, with EK-FAC, conjugate gradients or LiSSA."""

    name = "influence"

    def prepare(self, domain: Any, context: SelectionContext, folder: Path) -> Findings:
        return _Preparation(domain, context).run(folder)

    def measure(self, domain: Any, rows: np.ndarray, context: SelectionContext, folder: Path) -> np.ndarray:
        with scoring_model(context) as scoring:
            scoring.trainer.load(folder / ADAPTER)
            adapted = scoring.adapted
            direction = _load_vector(folder / DIRECTION, adapted)
            return ghost_products(adapted, RowView(domain.train, rows), direction, context.progress("score", len(rows)))

    def weigh(self, domain: Any, measured: np.ndarray, context: SelectionContext, folder: Path) -> RowWeights:
        return from_scores(measured, context.settings, domain.name)


class _Preparation:
    """One domain's way from the base model to the vector that every row is compared with."""

    def __init__(self, domain: Any, context: SelectionContext) -> None:
        self.domain = domain
        self.context = context
        self.settings: SelectionConfig = context.settings
        self.details: dict[str, float] = {}
        self.notes: list[str] = []

    def run(self, folder: Path) -> Findings:
        with scoring_model(self.context) as scoring:
            ids = subset(self.context, self.domain, self.settings.n_fit_rows, FIT_ROWS)
            report = scoring.trainer.train(
                rows_of(self.domain, ids),
                seed=domain_seed(self.context, self.domain, FIT),
                on_step=lambda done, total: self.context.progress("fit", total)(done),
            )
            self.details |= {"fit_rows": float(report.n_rows), "fit_loss": report.last_loss}
            scoring.trainer.save(folder / ADAPTER)
            adapted = scoring.adapted
            direction = self.inverse_hessian(adapted, self.validation_gradient(adapted))
            save_file(
                {name: v.contiguous() for name, v in zip(adapted.names, direction, strict=True)}, folder / DIRECTION
            )
        return Findings(details=self.details, notes=tuple(self.notes))

    def validation_gradient(self, adapted: AdaptedModel) -> Vector:
        try:
            loss, gradient = mean_gradient(adapted, self.domain.validation)
        except SelectionError as error:
            raise SelectionError(
                f"the validation loss has no gradient: {error}; raise training.max_tokens, "
                "or use selection.method: uniform"
            ) from error
        size = math.sqrt(dot(gradient, gradient)) if math.isfinite(loss) else math.nan
        if not math.isfinite(size):
            raise SelectionError(
                f"the gradient of the validation loss is not finite (loss {loss:g}); "
                "lower training.learning_rate, set model.dtype: float32, or use selection.method: uniform"
            )
        self.details |= {"validation_rows": float(len(self.domain.validation)), "validation_loss": loss}
        return gradient

    def inverse_hessian(self, adapted: AdaptedModel, gradient: Vector) -> Vector:
        """(F + λI)⁻¹ gradient, λ = `selection.damping` × the mean eigenvalue of F."""
        ids = subset(self.context, self.domain, self.settings.n_hessian_rows, HESSIAN_ROWS)
        rows = RowList(rows_of(self.domain, ids))
        labels = domain_seed(self.context, self.domain, LABELS)
        self.details["hessian_rows"] = float(len(rows))
        if self.settings.solver == "cg":
            return self.by_conjugate_gradient(adapted, rows, gradient, labels)
        factors = Ekfac.fit(adapted, rows, labels)
        return factors.solve(gradient, self.absolute_damping(factors.mean_eigenvalue))

    def by_conjugate_gradient(self, adapted: AdaptedModel, rows: RowList, gradient: Vector, labels: int) -> Vector:
        damping = self.absolute_damping(mean_eigenvalue(adapted, rows, labels))
        curvature = GaussNewton(adapted, rows)

        def damped(vector: Vector) -> Vector:
            return [h + damping * v for h, v in zip(curvature.product(vector), vector, strict=True)]

        limit, tolerance = self.settings.cg_iterations, self.settings.cg_tolerance
        with eager_attention(adapted.model):
            solution = conjugate_gradient(
                damped,
                gradient,
                max_iterations=limit,
                tolerance=tolerance,
                on_iteration=self.context.progress("hessian", limit),
            )
        if not math.isfinite(solution.residual):
            raise SelectionError(
                f"conjugate gradients broke down after {solution.n_iterations} iterations: "
                "a product with the Hessian is not finite; lower training.learning_rate, set model.dtype: float32, "
                "or use selection.solver: ekfac"
            )
        self.details |= {"cg_residual": solution.residual, "cg_iterations": float(solution.n_iterations)}
        if solution.residual > tolerance:
            self.notes.append(
                f"conjugate gradients stopped at a residual of {solution.residual:.2g} after {solution.n_iterations} "
                f"iterations (selection.cg_tolerance = {tolerance:g}): raise selection.cg_iterations or "
                "selection.damping for more"
            )
        return solution.x

    def absolute_damping(self, mean: float) -> float:
        if not (math.isfinite(mean) and mean > 0):
            raise SelectionError(
                f"the Hessian's mean eigenvalue is {mean:g}, so nothing can be scored; "
                "train longer (selection.epochs) or with a smaller training.learning_rate, "
                "or use selection.method: uniform"
            )
        damping = self.settings.damping * mean
        self.details |= {"mean_eigenvalue": mean, "damping": damping}
        return damping


def _load_vector(file: Path, adapted: AdaptedModel) -> Vector:
    tensors = load_file(file, device=str(adapted.device))
    return [tensors[name] for name in adapted.names]
