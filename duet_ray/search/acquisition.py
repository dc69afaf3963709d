"""Optimising an acquisition function on the exact simplex, on the lattice of whole rows.

Ax's stock optimiser starts from random points of the polytope, and returns floats that no mixture of whole rows
realises. This subclass of Ax's `Acquisition` starts where optima of mixtures lie (vertices, faces, the interior,
around what was observed), follows the gradient under the equality constraint, then projects onto the lattice and
**scores again**: the value compared is the value of the ratio that will be trained. A lattice small enough to be
listed is searched completely instead.

Nothing depends on the order of the domains except the random draws, so the optimum is symmetric in them.

`LowerConfidenceBound` is the paper's acquisition, in closed form, with pending ratios.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from ax.core.search_space import SearchSpaceDigest
from ax.generators.torch.botorch_modular.acquisition import Acquisition
from botorch.acquisition.analytic import UpperConfidenceBound
from botorch.acquisition.input_constructors import acqf_input_constructor
from botorch.acquisition.objective import PosteriorTransform
from botorch.exceptions.warnings import OptimizationWarning
from botorch.models import SingleTaskGP
from botorch.models.model import Model
from botorch.optim.optimize import optimize_acqf
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood

from duet_ray.search.simplex import SimplexSpace

Constraints = list[tuple[torch.Tensor, torch.Tensor, float]]

_N_STARTS = 8
"""Gradient searches per proposal."""
_JOINT_VARIABLES = 100
"""Searches run jointly, up to so many variables: a step of SLSQP costs the cube of them."""
_N_DRAWS = 256
"""Draws from each of Dirichlet(1), which fills the interior, Dirichlet(0.2), which keeps to the edges, and faces."""
_JITTERS = (0.1, 0.03, 0.01)
"""Standard deviations, in shares, of the noise around observed and pending ratios."""
_CHUNK = 512
"""Points scored at once: bounds the memory of the posterior."""


@dataclass(frozen=True, kw_only=True)
class SimplexOptions:
    """What the optimiser must know beyond Ax's search space; handed over as `acquisition_options["simplex"]`."""

    space: SimplexSpace
    free: tuple[int, ...]
    """The domains that the bounds do not fix: the features of Ax's search space, in its order."""
    seed: int
    avoid: frozenset[tuple[int, ...]]
    """Rows of ratios that are proposed only if there is no other."""


class LowerConfidenceBound(UpperConfidenceBound):
    """The paper's acquisition: minimise μ_t(r) − β σ_t(r), that is, maximise −μ + β σ of the negated loss.

    BoTorch multiplies σ by √beta, so the factor β of the paper is `beta = β²` there. A pending ratio counts as if its
    loss had come out as predicted: μ stays, σ shrinks around it (GP-BUCB: Desautels, Krause & Burdick 2014, Sec. 4).

    BoTorch's own way with pending points, the Monte Carlo `qUpperConfidenceBound`, is not used: its value is that of
    the best of candidate and pending *together*, so with good ratios pending all candidates are worth nearly the same
    and the sampling error (1e-4) decides. With four pending it proposed a ratio that it expected to be 17 σ worse.
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
            pending: `(n_pending, n_free)` shares.
        """
        believing = model if pending is None else _believing(model, pending)
        super().__init__(model=believing, beta=factor**2, posterior_transform=posterior_transform)


@acqf_input_constructor(LowerConfidenceBound)
def _lower_confidence_bound_inputs(
    model: SingleTaskGP,
    factor: float,
    posterior_transform: PosteriorTransform | None = None,
    X_pending: torch.Tensor | None = None,
    **unused: Any,
) -> dict[str, Any]:
    """What of Ax's offer the class takes; BoTorch looks it up when Ax builds the acquisition."""
    return {"model": model, "factor": factor, "posterior_transform": posterior_transform, "pending": X_pending}


def _believing(model: SingleTaskGP, pending: torch.Tensor) -> Model:
    """The model after seeing at each pending point exactly what it predicts there."""
    with torch.no_grad():
        predicted = model.posterior(pending).mean
    noise: dict[str, torch.Tensor] = {}
    if isinstance(model.likelihood, FixedNoiseGaussianLikelihood):
        noise["noise"] = model.likelihood.noise.mean().expand_as(predicted)
    return model.condition_on_observations(X=pending, Y=predicted, **noise)


class SimplexAcquisition(Acquisition):
    """Ax's acquisition with the optimiser of this module."""

    def optimize(
        self,
        n: int,
        search_space_digest: SearchSpaceDigest,
        inequality_constraints: Constraints | None = None,
        equality_constraints: Constraints | None = None,
        fixed_features: dict[int, float] | None = None,
        *unused: Any,
        **unused_options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Find the lattice point with the largest acquisition value.

        Returns:
            the point, `(1, n_free)` shares; its acquisition value, `(1,)`; its weight, always 1.
        """
        assert n == 1, "one ratio at a time"
        assert not inequality_constraints, "the bounds and the sum are all the constraints there are"
        assert not fixed_features, "fixed domains are no features"
        options: SimplexOptions = self.options["simplex"]
        rows = options.space.all_rows()
        if rows is None:
            rows = self._starts(options)
            best = np.argsort(-self._score(rows, options), kind="stable")[:_N_STARTS]
            bounds = torch.tensor(search_space_digest.bounds, dtype=self.dtype).T
            climbed = self._climb(self._points(rows[best], options), bounds, equality_constraints)
            rows = np.unique(np.vstack([rows, options.space.project_rows(self._shares(climbed, options))]), axis=0)
        values = self._score(rows, options)
        chosen = _best_allowed(rows, values, options.avoid)
        return (
            self._points(rows[[chosen]], options),
            torch.tensor(values[[chosen]], dtype=self.dtype),
            torch.ones(1, dtype=self.dtype),
        )

    def _starts(self, options: SimplexOptions) -> np.ndarray:
        """Distinct lattice points `(n_points, n_domains)`, as rows, among which an optimum's basin should be."""
        n_free, random = len(options.free), np.random.default_rng(options.seed)
        fixed = np.array(options.space.tightest()[0]) / options.space.n_rows
        drawn = np.vstack(
            [
                random.dirichlet(np.full(n_free, 1.0), _N_DRAWS),
                random.dirichlet(np.full(n_free, 0.2), _N_DRAWS),
                _on_faces(n_free, random),
                np.eye(n_free),
                np.full((1, n_free), 1 / n_free),
            ]
        )
        inside = np.tile(fixed, (len(drawn), 1))
        inside[:, options.free] += (1 - fixed.sum()) * drawn
        known = [self._shares(x, options) for x in (self.X_observed, self.X_pending) if x is not None]
        around = [k + random.normal(0, scale, k.shape) for k in known for scale in _JITTERS]
        return np.unique(options.space.project_rows(np.vstack([inside, *known, *around])), axis=0)

    def _climb(self, starts: torch.Tensor, bounds: torch.Tensor, equality: Constraints | None) -> torch.Tensor:
        """Follow the gradient from each of `starts`, `(n_starts, n_free)`; returns as many points."""
        with warnings.catch_warnings():
            # A line search that ends early returns its best point, which is all that is needed: it is scored again.
            warnings.simplefilter("ignore", OptimizationWarning)
            points, _ = optimize_acqf(
                acq_function=self.acqf,
                bounds=bounds,
                q=1,
                num_restarts=len(starts),
                batch_initial_conditions=starts.unsqueeze(1),
                equality_constraints=equality,
                options={"maxiter": 100, "batch_limit": max(2, _JOINT_VARIABLES // starts.shape[-1])},
                return_best_only=False,
            )
        points = points.detach().reshape(-1, starts.shape[-1])
        return points[torch.isfinite(points).all(dim=1)]

    def _score(self, rows: np.ndarray, options: SimplexOptions) -> np.ndarray:
        """The acquisition value of every row vector: `(n_points,)`."""
        points = self._points(rows, options).unsqueeze(1)
        with torch.no_grad():
            return torch.cat([self.evaluate(X=chunk) for chunk in points.split(_CHUNK)]).numpy()

    def _points(self, rows: np.ndarray, options: SimplexOptions) -> torch.Tensor:
        """Rows `(n_points, n_domains)` as Ax's features `(n_points, n_free)`."""
        return torch.tensor(rows[:, options.free] / options.space.n_rows, dtype=self.dtype)

    def _shares(self, points: torch.Tensor, options: SimplexOptions) -> np.ndarray:
        """Ax's features `(n_points, n_free)` as shares `(n_points, n_domains)`."""
        points = points.detach().reshape(-1, len(options.free))
        shares = np.tile(np.array(options.space.tightest()[0]) / options.space.n_rows, (len(points), 1))
        shares[:, options.free] = points.numpy()
        return shares


def _on_faces(n_free: int, random: np.random.Generator) -> np.ndarray:
    """Points uniform on random faces: `(_N_DRAWS, n_free)`, each with 2 to n_free − 1 domains in use."""
    points = random.exponential(size=(_N_DRAWS, n_free))
    n_used = random.integers(2, max(3, n_free), size=(_N_DRAWS, 1))
    order = np.argsort(random.random((_N_DRAWS, n_free)), axis=1)
    points[np.argsort(order, axis=1) >= n_used] = 0
    return points / points.sum(axis=1, keepdims=True)


def _best_allowed(rows: np.ndarray, values: np.ndarray, avoid: frozenset[tuple[int, ...]]) -> int:
    """The index of the largest value outside `avoid`, or of the largest value where nothing else is left."""
    ranked = np.argsort(-values, kind="stable")
    return int(next((i for i in ranked if tuple(rows[i].tolist()) not in avoid), ranked[0]))
