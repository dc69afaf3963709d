"""The Gaussian process over points, without Ax: built, fitted, and asked for means, joint draws and leave-one-out.

    loss(point) = mean(fidelity) + f(point) + noise,   f ~ GP(0, κ_ratio(shares) · κ_settings · κ_fidelity)

κ_ratio is chosen by name (`kernels`); the paper's is the isotropic squared exponential on the shares themselves with
unit variance on standardised losses, and m (and the noise, unless it is told) by maximum likelihood without priors. It
is set by name, because SingleTaskGP's default kernel and priors change with the version. Shares are not normalised:
bounds on a domain would stretch its axis.

κ_settings is a squared exponential with a length-scale per feature and dimension-scaled priors (Hvarfner, Hellsten &
Nardi 2024); κ_fidelity is one more, beside a mean that is linear in the fidelity (Yen et al. 2025). Both are absent
where nothing of the kind is searched.
"""

import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from botorch.exceptions.warnings import InputDataWarning
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.utils.constraints import LogTransformedInterval
from botorch.utils.datasets import SupervisedDataset
from gpytorch.constraints import GreaterThan, Interval
from gpytorch.kernels import Kernel, RBFKernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.means import ConstantMean, Mean
from gpytorch.mlls import ExactMarginalLogLikelihood
from gpytorch.priors import LogNormalPrior
from linear_operator.utils.warnings import NumericalWarning
from threadpoolctl import ThreadpoolController

from duet_ray.search.features import PointSpace
from duet_ray.search.kernels import RatioModel, ratio_model

NOISES = (1e-4, 4.0)
"""Inferred noise variance, on standardised losses. The floor keeps the Cholesky factor sound where points repeat."""


@dataclass(frozen=True)
class LossScale:
    """Standardises losses to mean 0 and standard deviation 1, and back: the model sees no units."""

    mean: float
    spread: float

    @classmethod
    def of(cls, losses: Sequence[float]) -> "LossScale":
        """Losses that are all equal (up to rounding), or a single one, keep their unit: spread is 1."""
        largest = max(map(abs, losses)) or 1.0
        unit = np.asarray(losses, dtype=np.float64) / largest  # the squares of huge losses would overflow
        spread = float(unit.std(ddof=1)) if len(unit) > 1 else 0.0
        return cls(mean=float(unit.mean()) * largest, spread=spread * largest if spread > 1e-12 else 1.0)

    def standardise(self, losses: Sequence[float]) -> np.ndarray:
        return (np.asarray(losses, dtype=np.float64) - self.mean) / self.spread


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a model is built from, beside its data. Plain data, so that Ax may copy and print it."""

    kernel: str
    """A name of `kernels`, never `auto`."""
    n_free: int
    n_settings: int = 0
    has_fidelity: bool = False

    @classmethod
    def of(cls, space: PointSpace, kernel: str) -> "Recipe":
        return cls(
            kernel=kernel,
            n_free=len(space.free),
            n_settings=space.n_settings,
            has_fidelity=space.has_fidelities,
        )


class FidelityMean(Mean):
    """A constant, and a slope along the fidelity, the last feature: how much worse cheap trials are is learnt."""

    def __init__(self) -> None:
        super().__init__()
        self.constant = ConstantMean()
        self.register_parameter("slope", torch.nn.Parameter(torch.zeros(1, dtype=torch.float64)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.constant(x) + self.slope * x[..., -1]


class MixtureGP(SingleTaskGP):
    """The model of the module's docstring; exact, so everything BoTorch does with a SingleTaskGP holds."""

    def __init__(
        self,
        train_X: torch.Tensor,
        train_Y: torch.Tensor,
        train_Yvar: torch.Tensor | None = None,
        recipe: Recipe | None = None,
    ) -> None:
        """
        Args:
            train_X: `(n, n_features)`.
            train_Y: `(n, 1)` standardised losses.
            train_Yvar: `(n, 1)` known noise variances, or None to infer one.
        """
        assert recipe is not None, "a mixture model is built by its recipe"
        ratio = ratio_model(recipe.kernel, recipe.n_free) if recipe.n_free else None
        train_Yvar = None if train_Yvar is None else train_Yvar.clamp_min(NOISES[0])
        super().__init__(
            train_X,
            train_Y,
            train_Yvar,
            covar_module=_covariance(recipe, ratio),
            mean_module=FidelityMean() if recipe.has_fidelity else ConstantMean(),
            likelihood=_likelihood(ratio) if train_Yvar is None else None,
            outcome_transform=None,
            input_transform=None,
        )
        self.recipe, self.ratio = recipe, ratio
        noise = None if train_Yvar is None else train_Yvar.sqrt().reshape(-1).numpy()
        if ratio is not None:
            points, losses = train_X[:, : recipe.n_free].numpy(), train_Y.reshape(-1).numpy()
            ratio.start(self.likelihood, points, losses, noise)

    @classmethod
    def construct_inputs(cls, training_data: SupervisedDataset, *, recipe: Recipe) -> dict[str, Any]:  # type: ignore[override]
        """What Ax builds the model from."""
        return {**super().construct_inputs(training_data), "recipe": recipe}


def fit_model(x: np.ndarray, losses: np.ndarray, noise: np.ndarray | None, recipe: Recipe) -> MixtureGP:
    """Build and fit a model.

    Args:
        x: `(n, n_features)`.
        losses: `(n,)` standardised.
        noise: `(n,)` known standard errors on the same scale, or None.
    """
    variances = None if noise is None else torch.tensor(noise**2).unsqueeze(-1)
    model = MixtureGP(torch.tensor(x), torch.tensor(losses).unsqueeze(-1), variances, recipe)
    fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
    return model


def training_covariance(model: MixtureGP) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """κ between the training points `(n, n)`, their noise variances `(n,)`, and the prior mean at them `(n,)`."""
    x = model.train_inputs[0]
    with torch.no_grad():
        kernel = model.covar_module(x).to_dense().numpy()
        mean = model.mean_module(x).numpy()
    noise = model.likelihood.noise.detach().reshape(-1).numpy()
    return kernel, np.broadcast_to(noise, (len(kernel),)).copy(), mean


@contextmanager
def one_thread() -> Iterator[None]:
    """Small matrices: more threads only wait for each other, and change the last bits. Torch's, and those of BLAS."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _thread_pools().limit(limits=1):
            yield
    finally:
        torch.set_num_threads(before)


@cache
def _thread_pools() -> ThreadpoolController:
    """The thread pools of the loaded libraries; looking for them takes longer than limiting them."""
    return ThreadpoolController()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Ax's bookkeeping off the user's terminal, and BoTorch's advice to normalise what must not be normalised."""
    logger = logging.getLogger("ax")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", InputDataWarning)
            warnings.simplefilter("ignore", NumericalWarning)  # jitter on the covariance of nearby points
            warnings.filterwarnings("ignore", "To copy construct from a tensor", UserWarning)  # in Ax's own code
            yield
    finally:
        logger.setLevel(before)


def _covariance(recipe: Recipe, ratio: RatioModel | None) -> Kernel:
    parts: list[Kernel] = [] if ratio is None else [ratio.kernel]
    if recipe.n_settings:
        dims = tuple(range(recipe.n_free, recipe.n_free + recipe.n_settings))
        prior = LogNormalPrior(math.sqrt(2) + 0.5 * math.log(recipe.n_settings), math.sqrt(3))
        kernel = RBFKernel(
            ard_num_dims=len(dims),
            active_dims=dims,
            lengthscale_prior=prior,
            lengthscale_constraint=GreaterThan(0.05, transform=None, initial_value=1.0),
        )
        parts.append(kernel)
    if recipe.has_fidelity:
        dims = (recipe.n_free + recipe.n_settings,)
        interval = Interval(0.1, 10.0, transform=None, initial_value=1.0)
        parts.append(
            RBFKernel(active_dims=dims, lengthscale_constraint=interval, lengthscale_prior=LogNormalPrior(0.5, 1.0))
        )
    product = parts[0]
    for part in parts[1:]:
        product = product * part
    return product


def _likelihood(ratio: RatioModel | None) -> GaussianLikelihood:
    if ratio is None or ratio.noise_prior is None:
        # transform=None: L-BFGS-B gets the interval as its bounds, instead of a sigmoid with flat ends.
        return GaussianLikelihood(noise_constraint=Interval(*NOISES, transform=None, initial_value=0.1))
    # With a prior the fit is several times shorter where it steps in the logarithm.
    return GaussianLikelihood(
        noise_constraint=LogTransformedInterval(*NOISES, initial_value=0.1), noise_prior=ratio.noise_prior
    )
