"""The acquisition functions: what a trial at a point is worth, given the model.

`lcb`       the lower confidence bound μ(r) − β σ(r), minimised: the paper's
`ei`        expected improvement over the best posterior mean among what was observed
`kg`        knowledge gradient: by how much the recommended ratio is expected to become better
`thompson`  the minimum of one joint draw from the posterior
`qlognei`   BoTorch's noisy expected improvement in logarithms, also with requirements; its hypervolume form for fronts

All but the last are of this module, in closed form or nearly so. A pending point counts as if its loss had come out as
predicted: μ stays, σ shrinks around it (GP-BUCB: Desautels, Krause & Burdick 2014, Sec. 4).

BoTorch's own way with pending points, the Monte Carlo `qUpperConfidenceBound`, is not used: its value is that of the
best of candidate and pending *together*, so with good ratios pending all candidates are worth nearly the same and the
sampling error (1e-4) decides. With four pending it proposed a ratio that it expected to be 17 σ worse.

The models are of losses; Ax negates them (`posterior_transform`), so that larger is better here.
"""

import math
from typing import Any, Literal

import numpy as np
import torch
from botorch.acquisition.acquisition import AcquisitionFunction
from botorch.acquisition.analytic import LogExpectedImprovement, UpperConfidenceBound
from botorch.acquisition.input_constructors import acqf_input_constructor
from botorch.acquisition.objective import PosteriorTransform
from botorch.models import SingleTaskGP
from botorch.models.model import Model
from botorch.posteriors import GPyTorchPosterior
from botorch.utils.transforms import t_batch_mode_transform
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood

from duet_ray.search.schedule import theory_beta

_QUADRATURE = 20
"""Nodes of Gauss–Hermite for the knowledge gradient's expectation."""
_RIVALS = 30
"""Observed points, the best by posterior mean, among which it looks for the next best: others hardly ever become it."""
_TIE = 1e-6
"""Weight of the predicted loss beside the knowledge gradient, on standardised losses."""


class LowerConfidenceBound(UpperConfidenceBound):
    """The paper's acquisition: minimise μ_t(r) − β σ_t(r), that is, maximise −μ + β σ of the negated loss.

    BoTorch multiplies σ by √beta, so the factor β of the paper is `beta = β²` there.
    """

    def __init__(
        self,
        model: SingleTaskGP,
        *,
        factor: float,
        posterior_transform: PosteriorTransform | None = None,
        pending: torch.Tensor | None = None,
    ) -> None:
        """
        Args:
            factor: β, the factor on σ.
            posterior_transform: Ax's negation of the loss.
            pending: `(n_pending, n_features)`.
        """
        super().__init__(model=believing(model, pending), beta=factor**2, posterior_transform=posterior_transform)


class ExpectedImprovement(LogExpectedImprovement):
    """The logarithm of the expected improvement over the best posterior mean at an observed point.

    With noise the luckiest observation is no bar to improve on; the "plug-in" of the posterior mean is (Picheny,
    Wagner & Ginsbourger 2013, Sec. 4.1).
    """

    def __init__(
        self,
        model: SingleTaskGP,
        *,
        observed: torch.Tensor,
        posterior_transform: PosteriorTransform | None = None,
        pending: torch.Tensor | None = None,
    ) -> None:
        """
        Args:
            observed: `(n_observed, n_features)`, whole trials.
        """
        believes = believing(model, pending)
        with torch.no_grad():
            best = _posterior(believes, observed, posterior_transform).mean.max()
        super().__init__(model=believes, best_f=best, posterior_transform=posterior_transform)


class KnowledgeGradient(AcquisitionFunction):
    """By how much an observation at x is expected to raise the best posterior mean over the best observed points and x.

    That is the gain of what this project recommends, the posterior's best among trained ratios (Frazier, Powell &
    Dayanik 2009, with the discrete set of Scott, Frazier & Powell 2011). For one observation the new means are linear
    in a standard normal, μ(a) + z · cov(a, x) / √(σ²(x) + noise), and the expectation of their maximum is taken by
    Gauss–Hermite quadrature.

    Where no observation is expected to change the recommendation, all gains are 0 but for rounding. A trace of the
    predicted loss then decides, so that the best predicted point is proposed and not any.
    """

    def __init__(
        self,
        model: SingleTaskGP,
        *,
        observed: torch.Tensor,
        posterior_transform: PosteriorTransform | None = None,
        pending: torch.Tensor | None = None,
    ) -> None:
        """
        Args:
            observed: `(n_observed, n_features)`, whole trials; what is pending among them.
            pending: `(n_pending, n_features)`, at their own fidelity.
        """
        super().__init__(model=believing(model, pending))
        self.posterior_transform = posterior_transform
        nodes, weights = np.polynomial.hermite_e.hermegauss(_QUADRATURE)
        self.nodes = torch.tensor(nodes, dtype=observed.dtype)
        self.weights = torch.tensor(weights / math.sqrt(2 * math.pi), dtype=observed.dtype)
        self.noise = float(_noise_of(model).mean())
        with torch.no_grad():
            means = _posterior(self.model, observed, posterior_transform).mean.reshape(-1)
        best = means.argsort(descending=True, stable=True)[:_RIVALS]
        self.observed, self.best = observed[best], means.max()

    @t_batch_mode_transform(expected_q=1)  # type: ignore[arg-type]
    def forward(self, X: torch.Tensor) -> torch.Tensor:
        """`(b, 1, n_features)` → `(b,)`."""
        known = self.observed.expand(*X.shape[:-2], *self.observed.shape)
        posterior = _posterior(self.model, torch.cat([X, known], dim=-2), self.posterior_transform)
        means = posterior.mean.squeeze(-1)
        covariance = posterior.distribution.covariance_matrix[..., 0, :]
        slopes = covariance / (covariance[..., :1].clamp_min(0) + self.noise).sqrt()
        raised = (means.unsqueeze(-1) + slopes.unsqueeze(-1) * self.nodes).amax(dim=-2)
        gain = (raised * self.weights).sum(dim=-1) - self.best
        return gain + _TIE * (means[..., 0] - self.best)


class ThompsonDraw(AcquisitionFunction):
    """One joint draw from the posterior (Thompson 1933); its best point is proposed.

    The value of a point depends on the other points that are drawn along, so there is `draw` and no `forward`.
    """

    def __init__(
        self,
        model: SingleTaskGP,
        *,
        posterior_transform: PosteriorTransform | None = None,
        pending: torch.Tensor | None = None,
    ) -> None:
        super().__init__(model=believing(model, pending))
        self.posterior_transform = posterior_transform

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("points are drawn together: see `draw`")

    def draw(self, points: torch.Tensor) -> torch.Tensor:
        """`(n_points, n_features)` → `(n_points,)`; from torch's global generator, which the caller has seeded."""
        posterior = _posterior(self.model, points, self.posterior_transform)
        return posterior.rsample(torch.Size([1])).reshape(-1)


def believing(model: SingleTaskGP, pending: torch.Tensor | None) -> Model:
    """The model after seeing at each pending point exactly what it predicts there."""
    if pending is None or not len(pending):
        return model
    with torch.no_grad():
        predicted = model.posterior(pending).mean
    noise: dict[str, torch.Tensor] = {}
    if isinstance(model.likelihood, FixedNoiseGaussianLikelihood):
        noise["noise"] = model.likelihood.noise.mean().expand_as(predicted)
    return model.condition_on_observations(X=pending, Y=predicted, **noise)


def _posterior(model: Model, points: torch.Tensor, transform: PosteriorTransform | None) -> GPyTorchPosterior:
    posterior = model.posterior(points, posterior_transform=transform)
    assert isinstance(posterior, GPyTorchPosterior)
    return posterior


def _noise_of(model: SingleTaskGP) -> torch.Tensor:
    """The noise variance of the observations, `(n,)` or `(1,)`."""
    return model.likelihood.noise.detach().reshape(-1)


@acqf_input_constructor(LowerConfidenceBound)
def _lower_confidence_bound_inputs(
    model: SingleTaskGP,
    factor: float | Literal["theory"],
    rkhs_norm: float,
    delta: float,
    n_trials: int,
    posterior_transform: PosteriorTransform | None = None,
    X_pending: torch.Tensor | None = None,
    **unused: Any,
) -> dict[str, Any]:
    """What of Ax's offer the class takes; BoTorch looks it up when Ax builds the acquisition.

    Args:
        factor: `theory`: that of the bound's schedule.
    """
    if factor == "theory":
        with torch.no_grad():
            kernel = model.covar_module(model.train_inputs[0]).to_dense().numpy()
        noise = _noise_of(model).expand(len(kernel)).numpy()
        factor = theory_beta(
            kernel, math.sqrt(float(noise.min())), rkhs_norm, delta, n_trials=n_trials, model_noise=noise
        )
    return {"model": model, "factor": factor, "posterior_transform": posterior_transform, "pending": X_pending}


@acqf_input_constructor(ExpectedImprovement, KnowledgeGradient)
def _improving_inputs(
    model: SingleTaskGP,
    whole: torch.Tensor,
    posterior_transform: PosteriorTransform | None = None,
    X_pending: torch.Tensor | None = None,
    **unused: Any,
) -> dict[str, Any]:
    """
    Args:
        whole: `(n_observed, n_features)` what was observed (for the knowledge gradient also what is pending), at the
            fidelity of whole trials.
    """
    return {"model": model, "observed": whole, "posterior_transform": posterior_transform, "pending": X_pending}


@acqf_input_constructor(ThompsonDraw)
def _thompson_inputs(
    model: SingleTaskGP,
    posterior_transform: PosteriorTransform | None = None,
    X_pending: torch.Tensor | None = None,
    **unused: Any,
) -> dict[str, Any]:
    return {"model": model, "posterior_transform": posterior_transform, "pending": X_pending}
