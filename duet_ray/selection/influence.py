"""DUET-IF: rows are drawn by their influence on the domain's own validation loss (DUET, section 3.2 and App. A.4).

Per domain: fine-tune the base on the training rows, take the gradient v of the mean validation loss, solve
H⁻¹v once, and score every training row by one dot product with its gradient g:

    score = vᵀ H⁻¹ g

Eq. 6 of the paper has a minus sign: it is the change of the validation loss when the row is weighted up, so lower is
better there. Here higher is more helpful. Influence finds rows that do harm (nonsense, wrong answers) well; it says
nothing of how useful a clean row is for the task that no one can see.

Solvers: `ekfac` takes two passes over `selection.n_hessian_rows` rows, and square matrices of every layer's widths;
`cg` a pass an iteration, for the matrix with no approximation; `lissa`, the published method's choice, a mini-batch a
term, and is slow to converge. With a scale far above the largest eigenvalue `lissa` orders rows as H = I does.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file

from duet_ray.config import SelectionConfig
from duet_ray.errors import SelectionError
from duet_ray.selection.base import Findings, RowWeights, SelectionContext
from duet_ray.selection.fitting import (
    FIT,
    FIT_ROWS,
    HESSIAN_ROWS,
    LABELS,
    LISSA,
    POWER,
    domain_seed,
    rows_of,
    scoring_model,
    subset,
)
from duet_ray.selection.gradients import AdaptedModel, RowList, Rows, RowView, Vector, ghost_products, mean_gradient
from duet_ray.selection.hessian import (
    Ekfac,
    GaussNewton,
    Hessian,
    conjugate_gradient,
    dot,
    eager_attention,
    mean_eigenvalue,
)
from duet_ray.selection.lissa import POWER_ITERATIONS, Product, largest_eigenvalue, neumann_series, random_vector
from duet_ray.selection.weighting import from_scores

ADAPTER, DIRECTION = "adapter", "direction.safetensors"

ROWS_PER_TERM = 32
"""The mini-batch of a term of LiSSA: a number of its own, so that scores do not depend on `selection.batch_size`."""

SCALE_MARGIN = 1.5
"""`selection.lissa_scale: null` is so many times the largest eigenvalue."""

LARGE_RESIDUAL, LARGE_SCALE = 0.1, 100.0
"""Above these (the latter relative to the largest eigenvalue) LiSSA's result comes with a note."""


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
        """(H + λI)⁻¹ gradient, λ = `selection.damping` × the mean eigenvalue of F, the Gauss–Newton matrix.

        λ is relative to F even where H is the exact Hessian, whose mean eigenvalue may be negative.
        """
        ids = subset(self.context, self.domain, self.settings.n_hessian_rows, HESSIAN_ROWS)
        rows = RowList(rows_of(self.domain, ids))
        labels = domain_seed(self.context, self.domain, LABELS)
        self.details["hessian_rows"] = float(len(rows))
        if self.settings.solver == "ekfac":
            factors = Ekfac.fit(adapted, rows, labels, self.context.progress("hessian", 2 * len(rows)))
            return factors.solve(gradient, self.absolute_damping(factors.mean_eigenvalue))
        damping = self.absolute_damping(mean_eigenvalue(adapted, rows, labels))
        kind = GaussNewton if self.settings.curvature == "gauss_newton" else Hessian

        def damped(rows: Rows) -> Product:
            curvature = kind(adapted, rows)
            return lambda v: [h + damping * x for h, x in zip(curvature.product(v), v, strict=True)]

        with eager_attention(adapted.model):
            if self.settings.solver == "cg":
                return self.by_conjugate_gradient(damped(rows), gradient)
            return self.by_lissa(damped, rows, gradient)

    def by_conjugate_gradient(self, product: Product, gradient: Vector) -> Vector:
        limit, tolerance = self.settings.cg_iterations, self.settings.cg_tolerance
        solution = conjugate_gradient(
            product,
            gradient,
            max_iterations=limit,
            tolerance=tolerance,
            on_iteration=self.context.progress("hessian", limit),
        )
        if not math.isfinite(solution.residual):
            raise self.not_finite(f"conjugate gradients broke down after {solution.n_iterations} iterations")
        self.details |= {"cg_residual": solution.residual, "cg_iterations": float(solution.n_iterations)}
        reached = f"a residual of {solution.residual:.2g} after {solution.n_iterations} iterations"
        if solution.negative_curvature is not None:
            self.details["negative_curvature"] = solution.negative_curvature
            if solution.n_iterations == 0:
                raise SelectionError(
                    f"conjugate gradients cannot start: {self.indefinite(solution.negative_curvature)}"
                )
            self.notes.append(
                f"conjugate gradients stopped at {reached}: {self.indefinite(solution.negative_curvature)}"
            )
        elif solution.residual > tolerance:
            self.notes.append(
                f"conjugate gradients stopped at {reached} (selection.cg_tolerance = {tolerance:g}): "
                "raise selection.cg_iterations or selection.damping for more"
            )
        return solution.x

    def by_lissa(self, damped: Callable[[Rows], Product], rows: RowList, gradient: Vector) -> Vector:
        """The series by mini-batches, then what is left of `gradient` by one product over all rows."""
        product, depth = damped(rows), self.settings.lissa_depth
        largest = largest_eigenvalue(
            product,
            random_vector(gradient, domain_seed(self.context, self.domain, POWER)),
            self.context.progress("largest eigenvalue", POWER_ITERATIONS),
        )
        if not math.isfinite(largest):
            raise self.not_finite("the largest eigenvalue cannot be estimated")
        if largest <= 0:
            raise SelectionError(f"LiSSA has nothing to converge to: {self.indefinite(largest)}")
        scale = self.settings.lissa_scale or SCALE_MARGIN * largest
        seed = domain_seed(self.context, self.domain, LISSA)

        def term(x: Vector, index: int) -> Vector:
            if len(rows) <= ROWS_PER_TERM:
                return product(x)
            ids = np.random.default_rng([seed, index]).choice(len(rows), ROWS_PER_TERM, replace=False)
            return damped(RowView(rows, np.sort(ids)))(x)

        series = neumann_series(
            product, term, gradient, depth=depth, scale=scale, on_term=self.context.progress("hessian", depth)
        )
        self.details |= {
            "lissa_terms": float(series.n_terms),
            "lissa_scale": scale,
            "lissa_residual": series.residual,
            "largest_eigenvalue": largest,
        }
        if series.curvature <= 0:
            self.details["negative_curvature"] = series.curvature
        reached = f"a residual of {series.residual:.2g} after {series.n_terms} terms"
        if series.diverged:
            reason = f"LiSSA diverged, with {reached} and a scale of {scale:.4g}"
            if series.curvature <= 0:
                raise SelectionError(f"{reason}: {self.indefinite(series.curvature)}")
            raise SelectionError(
                f"{reason}, where the largest eigenvalue is about {np.fmax(largest, series.curvature):.4g}: the scale "
                f"must exceed half of it, on every mini-batch of {min(len(rows), ROWS_PER_TERM)} rows; set "
                "selection.lissa_scale: null or a larger one, raise selection.damping, or use selection.solver: cg"
            )
        if series.curvature <= 0:
            self.notes.append(f"LiSSA stopped at {reached}: {self.indefinite(series.curvature)}")
        elif scale > LARGE_SCALE * largest:
            self.notes.append(
                f"selection.lissa_scale = {scale:g} is {scale / largest:.0f} times the largest eigenvalue: LiSSA "
                f"stopped at {reached}, and the scores are little but dot products of gradients; set it to null"
            )
        elif series.residual > LARGE_RESIDUAL:
            self.notes.append(
                f"LiSSA stopped at {reached}, not converged: raise selection.lissa_depth or selection.damping, "
                "or use selection.solver: cg"
            )
        return series.x

    def indefinite(self, curvature: float) -> str:
        """What is wrong with a matrix that has a direction of this curvature, damping included; and the remedy."""
        damping = self.details["damping"]
        if self.settings.curvature == "gauss_newton":
            return (
                f"the damped Gauss–Newton matrix has a curvature of {curvature:.2g} by rounding; raise "
                "selection.damping or set model.dtype: float32"
            )
        return (
            f"the Hessian has negative curvature ({curvature - damping:.2g}, the damping is {damping:.2g}); "
            "set selection.curvature: gauss_newton or raise selection.damping "
            f"(above {self.settings.damping * (damping - curvature) / damping:.2g} at least)"
        )

    def not_finite(self, what: str) -> SelectionError:
        return SelectionError(
            f"{what}: a product with the Hessian is not finite; lower training.learning_rate, "
            "set model.dtype: float32, or use selection.solver: ekfac"
        )

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
