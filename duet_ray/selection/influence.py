"""DUET-IF: rows are drawn by their influence on the domain's own validation loss (DUET, section 3.2 and App. A.4).

Per domain: fine-tune the base on the training rows, take the gradient v of the mean validation loss, solve
H⁻¹v once, and score every training row by one dot product with its gradient g:

    score = vᵀ H⁻¹ g

Eq. 6 of the paper has a minus sign: it is the change of the validation loss when the row is weighted up, so lower is
better there. Here higher is more helpful. Influence finds rows that do harm (nonsense, wrong answers) well; it says
nothing of how useful a clean row is for the task that no one can see.

It comes after fine-tuning and never before: LoRA's B starts at zero, and with it every gradient of A is zero.
"""

import hashlib
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from duet_ray.config import SelectionConfig
from duet_ray.errors import SampleFailed, SelectionError
from duet_ray.seeds import child_seed
from duet_ray.selection.base import RowWeights, SelectionContext
from duet_ray.selection.gradients import AdaptedModel, RowList, Vector, ghost_products, mean_gradient
from duet_ray.selection.hessian import Ekfac, GaussNewton, conjugate_gradient, dot, eager_attention, mean_eigenvalue
from duet_ray.selection.weighting import weigh
from duet_ray.training import Trainer, TrainReport, make_trainer

_FIT, _FIT_ROWS, _HESSIAN_ROWS, _LABELS = range(4)
"""Uses of the "select" purpose: each has a stream of its own."""


class Influence:
    """Influence functions over LoRA adapters, with EK-FAC or conjugate gradients."""

    name = "influence"
    needs_model = True

    def select(self, domain: Any, context: SelectionContext) -> RowWeights:
        n_rows = len(domain.train)
        if n_rows == 0:
            raise SelectionError(f"domain {domain.name}: there are no training rows to score; check its source")
        if n_rows == 1:
            note = "there is one training row only: nothing to choose between"
            return RowWeights(probabilities=np.ones(1), notes=(note,))
        if len(domain.validation) == 0:
            raise SelectionError(
                f"domain {domain.name}: influence needs validation rows, and none of its {n_rows} rows is held out; "
                "raise data.validation_fraction, add rows, or use selection.method: uniform"
            )
        try:
            return _Scoring(domain, context).weights()
        except SampleFailed as error:
            raise SelectionError(f"domain {domain.name}: the model to score with did not train: {error}") from error


class _Scoring:
    """One domain's way from the base model to weights."""

    def __init__(self, domain: Any, context: SelectionContext) -> None:
        self.domain = domain
        self.context = context
        self.settings: SelectionConfig = context.settings
        self.details: dict[str, float] = {}
        self.notes: list[str] = []

    def weights(self) -> RowWeights:
        started = time.perf_counter()
        model, tokenizer = self.context.load_base()
        own = {name: value for name in ("epochs", "target_modules") if (value := getattr(self.settings, name))}
        trainer = make_trainer(self.context.training.model_copy(update=own), model, tokenizer)
        try:
            self.fit(trainer)
            pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
            adapted = AdaptedModel.of(trainer.model, pad_id=pad_id or 0, batch_size=self.settings.batch_size)
            direction = self.inverse_hessian(adapted, self.validation_gradient(adapted))
            scores = ghost_products(
                adapted, self.domain.train, direction, self.progress("score", len(self.domain.train))
            )
        finally:
            trainer.reset()
        probabilities, notes = weigh(scores, self.settings.weighting, self.domain.name)
        self.details["seconds"] = time.perf_counter() - started
        return RowWeights(scores=scores, probabilities=probabilities, notes=(*self.notes, *notes), details=self.details)

    def fit(self, trainer: Trainer) -> TrainReport:
        """Fine-tune on the domain, or on `n_fit_rows` of it."""
        ids = self.subset(self.settings.n_fit_rows, _FIT_ROWS)
        report = trainer.train(self.domain.train.rows(ids), seed=self.seed(_FIT), on_step=self.stage("fit"))
        self.details |= {"fit_rows": float(report.n_rows), "fit_loss": report.last_loss}
        return report

    def validation_gradient(self, adapted: AdaptedModel) -> Vector:
        try:
            loss, gradient = mean_gradient(adapted, self.domain.validation)
        except SelectionError as error:
            raise SelectionError(
                f"domain {self.domain.name}: the validation loss has no gradient: {error}; raise training.max_tokens, "
                "or use selection.method: uniform"
            ) from error
        size = math.sqrt(dot(gradient, gradient)) if math.isfinite(loss) else math.nan
        if not math.isfinite(size):
            raise SelectionError(
                f"domain {self.domain.name}: the gradient of the validation loss is not finite (loss {loss:g}); "
                "lower training.learning_rate, set model.dtype: float32, or use selection.method: uniform"
            )
        self.details |= {"validation_rows": float(len(self.domain.validation)), "validation_loss": loss}
        return gradient

    def inverse_hessian(self, adapted: AdaptedModel, gradient: Vector) -> Vector:
        """(F + λI)⁻¹ gradient, λ = `selection.damping` × the mean eigenvalue of F."""
        rows = RowList(self.domain.train.rows(self.subset(self.settings.n_hessian_rows, _HESSIAN_ROWS)))
        self.details["hessian_rows"] = float(len(rows))
        if self.settings.solver == "cg":
            return self.by_conjugate_gradient(adapted, rows, gradient)
        factors = Ekfac.fit(adapted, rows, self.seed(_LABELS))
        return factors.solve(gradient, self.absolute_damping(factors.mean_eigenvalue))

    def by_conjugate_gradient(self, adapted: AdaptedModel, rows: RowList, gradient: Vector) -> Vector:
        damping = self.absolute_damping(mean_eigenvalue(adapted, rows, self.seed(_LABELS)))
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
                on_iteration=self.progress("hessian", limit),
            )
        if not math.isfinite(solution.residual):
            raise SelectionError(
                f"domain {self.domain.name}: conjugate gradients broke down after {solution.n_iterations} iterations: "
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
                f"domain {self.domain.name}: the Hessian's mean eigenvalue is {mean:g}, so nothing can be scored; "
                "train longer (selection.epochs) or with a smaller training.learning_rate, "
                "or use selection.method: uniform"
            )
        damping = self.settings.damping * mean
        self.details |= {"mean_eigenvalue": mean, "damping": damping}
        return damping

    def subset(self, n: int | None, use: int) -> list[int]:
        """Ids of `n` seeded training rows in ascending order, or of all."""
        total = len(self.domain.train)
        if n is None or n >= total:
            return list(range(total))
        draws = np.random.default_rng(self.seed(use))
        return np.sort(draws.choice(total, size=n, replace=False)).tolist()

    def seed(self, use: int) -> int:
        """A seed per use and domain, by the domain's content: its place in a study does not change its scores."""
        content = int.from_bytes(hashlib.sha256(self.domain.fingerprint.encode()).digest()[:8], "big")
        return child_seed(self.context.seed, "select", content, use)

    def stage(self, name: str) -> Callable[[int, int], None] | None:
        report = self.context.on_progress
        return None if report is None else lambda done, total: report(name, done, total)

    def progress(self, name: str, total: int) -> Callable[[int], None] | None:
        report = self.context.on_progress
        return None if report is None else lambda done: report(name, done, total)
