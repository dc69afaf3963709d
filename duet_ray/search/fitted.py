"""A fitted model of everything told, and what may be asked of it.

Built with BoTorch alone: Ax is needed only where a point is proposed (`surrogate`, imported on demand).
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from botorch.posteriors import GPyTorchPosterior

from duet_ray.records import Point, Settings
from duet_ray.search.features import PointSpace
from duet_ray.search.kernels import AUTO, leave_one_out, leave_one_out_log_likelihood
from duet_ray.search.model import LossScale, MixtureGP, Recipe, fit_model, one_thread, quiet, training_covariance
from duet_ray.search.told import Told

if TYPE_CHECKING:
    from duet_ray.search.proposer import Proposer
    from duet_ray.search.surrogate import Predicted

COST_POWER_DECAY = 0.99
"""Yen et al. 2025: the value of a trial is divided by its cost to the power 0.99^i, i Bayesian trials before it."""


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A Gaussian process fitted to observations; means and standard deviations are in their units."""

    space: PointSpace
    model: MixtureGP
    scale: LossScale
    told: tuple[Told, ...]
    """On one footing, in the order of the model's data."""
    own: Settings

    @property
    def kernel(self) -> str:
        return self.model.recipe.kernel

    @cached_property
    def noise_sd(self) -> float:
        """Standard deviation of one observation: the mean over observations where it is told."""
        noise = self.model.likelihood.noise.detach().reshape(-1)
        return self.scale.spread * float(noise.sqrt().mean())

    @cached_property
    def length_scales(self) -> dict[str, float]:
        """Domain → length-scale, in the coordinates of the kernel; domains that the bounds fix have none."""
        names = self.space.simplex.names
        if self.model.ratio is None:
            return {}
        scales = self.model.ratio.length_scales()
        each = np.broadcast_to(scales, (len(self.space.free),))
        return {names[d]: float(scale) for d, scale in zip(self.space.free, each, strict=True)}

    def predict(self, shares: np.ndarray, settings: Settings = ()) -> tuple[np.ndarray, np.ndarray]:
        """Posterior mean and standard deviation of the noiseless loss of whole trials.

        Args:
            shares: `(n_points, n_domains)`; need not lie on the lattice.
            settings: of all points; none: the study's own.
        """
        return self._mean_and_sd(self._features(shares, settings))

    def joint(self, shares: np.ndarray, settings: Settings = ()) -> tuple[np.ndarray, np.ndarray]:
        """As `predict`, with the covariance `(n_points, n_points)` between points."""
        mean, covariance = self._posterior(self._features(shares, settings), diagonal=False)
        return self.scale.mean + self.scale.spread * mean, self.scale.spread * (self.scale.spread * covariance)

    def at(self, points: Sequence[Point]) -> tuple[np.ndarray, np.ndarray]:
        """As `predict`, for points with their own settings and fidelity."""
        return self._mean_and_sd(self.space.encode(points, self.own))

    def means_of(self, told: Sequence[Told]) -> np.ndarray:
        """`(n_told,)` posterior means at told points, as whole trials."""
        return self.at([replace(one.point, fidelity=1.0) for one in told])[0]

    def against(self, points: Sequence[Point], reference: Point) -> np.ndarray:
        """`(n_points,)`: E[f(r) − f(u)] + sd(f(r) − f(u)) for every point r and the reference u; 0 for u itself."""
        mean, covariance = self._posterior(self.space.encode([reference, *points], self.own), diagonal=False)
        variance = np.diag(covariance) + covariance[0, 0] - 2 * covariance[0]
        apart = np.any(self.space.encode(points, self.own) != self.space.encode([reference], self.own), axis=1)
        return self.scale.spread * (mean[1:] - mean[0] + apart * np.sqrt(np.maximum(variance[1:], 0.0)))

    def leave_one_out(self) -> tuple[np.ndarray, np.ndarray]:
        """What the model predicts of every observation from the others: `(n_told,)` means and standard deviations.

        With the hyperparameters of the whole fit; the noise is in the standard deviation. In the order of `told`.
        """
        kernel, noise, prior = training_covariance(self.model)
        losses = self.scale.standardise([one.loss for one in self.told])
        mean, sd = leave_one_out(kernel, losses - prior, noise)
        return self.scale.mean + self.scale.spread * (mean + prior), self.scale.spread * sd

    def _mean_and_sd(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mean, variance = self._posterior(features, diagonal=True)
        return self.scale.mean + self.scale.spread * mean, self.scale.spread * np.sqrt(variance)

    def _features(self, shares: np.ndarray, settings: Settings) -> np.ndarray:
        shares = np.atleast_2d(np.asarray(shares, dtype=np.float64))
        rest = [*self.space.encode_settings(settings or self.own), *([0.0] * self.space.has_fidelities)]
        return np.hstack([shares[:, list(self.space.free)], np.tile(np.array(rest), (len(shares), 1))])

    def _posterior(self, features: np.ndarray, *, diagonal: bool) -> tuple[np.ndarray, np.ndarray]:
        """In standardised units: the square of a huge loss would overflow."""
        with quiet(), one_thread(), torch.no_grad():
            found = self.model.posterior(torch.from_numpy(features))
            mean = found.mean.reshape(-1).numpy()
            if diagonal:
                spread = found.variance.reshape(-1).clamp_min(0).numpy()
            else:
                assert isinstance(found, GPyTorchPosterior)
                spread = found.distribution.covariance_matrix.numpy()
        return mean, spread


def fitted(proposer: "Proposer", told: Sequence[Told]) -> Fitted:
    """Fit the study's model to everything told.

    Args:
        told: at least one; what `Proposer.propose` would be given.
    """
    footing = proposer.footing(told).told
    kernel = kernel_for(proposer.settings.kernel, proposer.points, footing, proposer.own)
    return _fit(kernel, proposer.points, footing, proposer.own)


def kernel_for(name: str, space: PointSpace, told: Sequence[Told], own: Settings) -> str:
    """The kernel to use: `auto` is the one that predicts every observation best from the others.

    The criterion is the leave-one-out predictive likelihood (Rasmussen & Williams 2006, Sec. 5.4.2). Kernels with a
    length-scale per domain are not among the choices: fitted to the same points, they look better there than they are.
    """
    if name != "auto":
        return name
    if len(told) < 3 or not space.free:
        return AUTO[0]
    likelihoods = []
    for choice in AUTO:
        found = _fit(choice, space, told, own)
        kernel, noise, prior = training_covariance(found.model)
        losses = found.scale.standardise([one.loss for one in told])
        likelihoods.append(leave_one_out_log_likelihood(kernel, losses - prior, noise))
    return AUTO[int(np.argmax(likelihoods))]


def best_fidelity(proposer: "Proposer", point: Point, told: Sequence[Told], n_before: int) -> float:
    """How much of a mixture to train at `point`: what narrows the whole trial's loss most for its cost.

    An observation at fidelity s lowers the variance of the whole trial's loss by cov² / (σ_s² + noise); the fall of the
    standard deviation is divided by s to the power 0.99^i (Yen et al. 2025), i being the Bayesian trials so far.
    """
    model = fitted(proposer, told)
    choices = [Point(ratio=point.ratio, settings=point.settings, fidelity=f) for f in proposer.points.fidelities]
    tried = {replace(one.point, settings=one.settings or proposer.own) for one in told}
    covariance = model._posterior(model.space.encode(choices, model.own), diagonal=False)[1]
    whole = covariance[-1, -1]
    lowered = covariance[-1] ** 2 / (np.diag(covariance) + (model.noise_sd / model.scale.spread) ** 2)
    gained = np.sqrt(max(whole, 0.0)) - np.sqrt(np.maximum(whole - lowered, 0.0))
    worth = gained / np.array(proposer.points.fidelities) ** (COST_POWER_DECAY**n_before)
    worth[[choice in tried for choice in choices]] = -1.0
    if worth.max() < 0:
        return 1.0  # A second look, where the search wants one, is at the whole.
    return float(proposer.points.fidelities[int(np.argmax(worth))])


def next_point(**asked: object) -> "Predicted":
    """`surrogate.next_point`, with Ax, which takes seconds to load and so is loaded only here.

    Ax writes a line about its SQL storage to the terminal when it is imported; we do not use that storage.
    """
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        from duet_ray.search import surrogate
    finally:
        logging.disable(before)
    return surrogate.next_point(**asked)  # type: ignore[arg-type]


def _fit(kernel: str, space: PointSpace, told: Sequence[Told], own: Settings) -> Fitted:
    losses = [one.loss for one in told]
    scale = LossScale.of(losses)
    sems = [one.sem for one in told if one.sem is not None]
    noise = np.array(sems) / scale.spread if len(sems) == len(told) else None
    features = space.encode([one.point for one in told], own)
    with quiet(), one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = fit_model(features, scale.standardise(losses), noise, Recipe.of(space, kernel))
    return Fitted(space=space, model=model, scale=scale, told=tuple(told), own=own)
