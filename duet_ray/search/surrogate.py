"""The Gaussian process over the simplex, in Ax: rebuilt, fitted and asked once per proposal.

The kernel is the paper's isotropic squared exponential on the shares themselves,

    κ(r, r') = exp(−‖r − r'‖² / (2 m²)),

with unit variance on standardised losses, a constant mean, and m (and the noise, unless it is told) by maximum
likelihood without priors. It is set by name, because SingleTaskGP's default kernel and priors change with the version.
Inputs are not normalised: bounds on a domain would stretch its axis, and the kernel would no longer be isotropic.

Of Ax we use the experiment, the adapter and the modular BoTorch generator directly. `Client` and `GenerationStrategy`
are left out because attaching through them costs time quadratic in the trials (4.5 s of CPU at 200), and because the
start design and the bookkeeping are ours.
"""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from ax.adapter.registry import Generators
from ax.adapter.torch import TorchAdapter
from ax.core.arm import Arm
from ax.core.data import Data
from ax.core.experiment import Experiment
from ax.core.metric import Metric
from ax.core.objective import Objective
from ax.core.optimization_config import OptimizationConfig
from ax.core.parameter import ParameterType, RangeParameter
from ax.core.parameter_constraint import ParameterConstraint
from ax.core.search_space import SearchSpace
from ax.core.utils import extract_pending_observations
from ax.generators.torch.botorch_modular.generator import BoTorchGenerator
from ax.generators.torch.botorch_modular.surrogate import SurrogateSpec
from ax.generators.torch.botorch_modular.utils import ModelConfig
from botorch.acquisition.logei import qLogNoisyExpectedImprovement
from botorch.exceptions.warnings import InputDataWarning
from botorch.models import SingleTaskGP
from gpytorch.constraints import Interval
from gpytorch.kernels import RBFKernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.mlls import ExactMarginalLogLikelihood
from linear_operator.utils.warnings import NumericalWarning

from duet_ray.config import SearchConfig
from duet_ray.records import Ratio
from duet_ray.search.acquisition import LowerConfidenceBound, SimplexAcquisition, SimplexOptions
from duet_ray.search.simplex import SimplexSpace

_LOSS = "loss"
LENGTH_SCALES = (0.05, 5.0)
"""Two ratios are at most √2 apart: with shorter scales no two are alike, with longer ones all are."""
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


def next_ratio(
    *,
    space: SimplexSpace,
    settings: SearchConfig,
    seed: int,
    ratios: Sequence[Ratio],
    losses: Sequence[float],
    sems: Sequence[float | None],
    pending: Sequence[Ratio],
) -> tuple[Ratio, float, float]:
    """Fit the surrogate and optimise the acquisition.

    Args:
        space: must hold more than one ratio.
        seed: of this proposal alone.
        ratios: observed ratios, with their `losses` (lower is better) and standard errors; at least one.
        pending: ratios in training.

    Returns:
        the ratio, and the posterior mean and standard deviation of its noiseless loss, in the units of `losses`.
    """
    least, most = space.tightest()
    free = tuple(int(d) for d in np.flatnonzero(least < most))
    scale = LossScale.of(losses)
    known = [sem for sem in sems if sem is not None]
    noise = np.array(known) / scale.spread if len(known) == len(sems) else None
    avoid = frozenset() if noise is not None else frozenset(ratio.counts for ratio in [*ratios, *pending])
    with _quiet(), _one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        experiment = build_experiment(space, free, ratios, scale.standardise(losses), noise, pending)
        adapter = fit(
            experiment,
            start=likelihood_peak(_shares(ratios, free), scale.standardise(losses), noise),
            infer_noise=noise is None,
            settings=settings,
            options=SimplexOptions(space=space, free=free, seed=seed, avoid=avoid),
        )
        run = adapter.gen(n=1, pending_observations=extract_pending_observations(experiment))
        ratio = _ratio_of(run.arms[0], space, free)
        mean, sigma = posterior(adapter, ratio, free)
    return ratio, scale.mean + scale.spread * mean, scale.spread * sigma


def parameter_name(domain: int) -> str:
    """The name of a domain in Ax. The only place that maps them: real names need not be symbols that sympy parses."""
    return f"d{domain}"


def build_experiment(
    space: SimplexSpace,
    free: Sequence[int],
    ratios: Sequence[Ratio],
    losses: np.ndarray,
    noise: np.ndarray | None,
    pending: Sequence[Ratio],
) -> Experiment:
    """An Ax experiment over the free domains with every observation completed and every pending ratio running.

    Args:
        losses: `(n_told,)` standardised.
        noise: `(n_told,)` standard errors on the same scale, or None to have the noise inferred.
    """
    experiment = Experiment(
        name="duet",
        search_space=_search_space(space, free),
        metrics=[Metric(name=_LOSS, lower_is_better=True)],
        optimization_config=OptimizationConfig(
            objective=Objective(expression=f"-{_LOSS}", metric_name_to_signature={_LOSS: _LOSS})
        ),
    )
    trials = [experiment.new_trial() for _ in [*ratios, *pending]]
    for trial, ratio in zip(trials, [*ratios, *pending], strict=True):
        shares = ratio.values
        trial.add_arm(Arm(parameters={parameter_name(d): float(shares[d]) for d in free}))
        trial.mark_running(no_runner_required=True)
    observed = trials[: len(ratios)]
    table = pd.DataFrame(
        {
            "trial_index": [trial.index for trial in observed],
            "arm_name": [trial.arms[0].name for trial in observed],
            "metric_name": _LOSS,
            "metric_signature": _LOSS,
            "mean": losses,
            "sem": np.full(len(ratios), np.nan) if noise is None else noise,
        }
    )
    experiment.attach_data(Data(df=table))
    for trial in observed:
        trial.mark_completed()
    return experiment


def fit(
    experiment: Experiment,
    *,
    start: tuple[float, float],
    infer_noise: bool,
    settings: SearchConfig,
    options: SimplexOptions,
) -> TorchAdapter:
    """Fit the Gaussian process to an experiment, and prepare the acquisition.

    Args:
        start: length-scale and noise variance that the gradient search for the likelihood's maximum starts from.
    """
    config = ModelConfig(
        botorch_model_class=SingleTaskGP,
        covar_module_class=RBFKernel,
        covar_module_options={
            # transform=None: L-BFGS-B gets the interval as its bounds, instead of a sigmoid with flat ends.
            "lengthscale_constraint": Interval(*LENGTH_SCALES, transform=None, initial_value=start[0]),
        },
        likelihood_class=GaussianLikelihood if infer_noise else None,
        likelihood_options=(
            {"noise_constraint": Interval(*NOISES, transform=None, initial_value=start[1])} if infer_noise else {}
        ),
        mll_class=ExactMarginalLogLikelihood,
        input_transform_classes=None,
        outcome_transform_classes=None,
    )
    acquisition_class, acquisition_options = _acquisition(settings)
    adapter = Generators.BOTORCH_MODULAR(
        experiment=experiment,
        data=experiment.lookup_data(),
        transforms=[],
        surrogate_spec=SurrogateSpec(model_configs=[config]),
        acquisition_class=SimplexAcquisition,
        acquisition_options={"simplex": options},
        botorch_acqf_class=acquisition_class,
        botorch_acqf_options=acquisition_options,
        torch_device=torch.device("cpu"),
    )
    assert isinstance(adapter, TorchAdapter)
    return adapter


def posterior(adapter: TorchAdapter, ratio: Ratio, free: Sequence[int]) -> tuple[float, float]:
    """Mean and standard deviation of the noiseless standardised loss at `ratio`."""
    generator = adapter.generator
    assert isinstance(generator, BoTorchGenerator)
    with torch.no_grad():
        mean, covariance = generator.surrogate.predict(torch.from_numpy(_shares([ratio], free)))
    return float(mean), float(covariance.clamp_min(0).sqrt())


def likelihood_peak(points: np.ndarray, losses: np.ndarray, noise: np.ndarray | None) -> tuple[float, float]:
    """The largest marginal likelihood on a grid of length-scales and noise variances.

    The likelihood of a Gaussian process often has two peaks (all signal, all noise); a gradient search ends on the
    one it starts near. One eigendecomposition per length-scale serves every noise variance.

    Args:
        points: `(n_told, n_free)` shares.
        losses: `(n_told,)` standardised.
        noise: `(n_told,)` known standard errors, or None.

    Returns:
        length-scale and noise variance (the latter meaningless where the noise is known).
    """
    squared = np.square(points[:, None] - points[None]).sum(axis=-1)
    candidates = [0.0] if noise is not None else np.geomspace(NOISES[0] * 1.1, 1.0, 9)
    peak, found = -np.inf, (0.5, 0.1)
    for length_scale in np.geomspace(LENGTH_SCALES[0] * 1.1, LENGTH_SCALES[1] / 1.1, 15):
        kernel = np.exp(-squared / (2 * length_scale**2))
        if noise is not None:
            kernel += np.diag(np.maximum(noise**2, NOISES[0]))
        spectrum, basis = np.linalg.eigh(kernel)
        ones, values = basis.T @ np.ones(len(losses)), basis.T @ losses
        for variance in candidates:
            total = np.maximum(spectrum, 0) + max(variance, 1e-10)
            mean = (ones * values / total).sum() / (ones * ones / total).sum()
            likelihood = -0.5 * (np.log(total).sum() + ((values - mean * ones) ** 2 / total).sum())
            if likelihood > peak:
                peak, found = likelihood, (float(length_scale), float(variance))
    return found


def _search_space(space: SimplexSpace, free: Sequence[int]) -> SearchSpace:
    """Ax's search space: one share per free domain, the sum as a native equality (its tolerance is 1e-8)."""
    least, most = space.tightest()
    rest = space.n_rows - sum(int(least[d]) for d in range(space.n_domains) if d not in free)
    names = [parameter_name(d) for d in free]
    return SearchSpace(
        parameters=[
            RangeParameter(
                name=name,
                parameter_type=ParameterType.FLOAT,
                lower=float(least[d] / space.n_rows),
                upper=float(most[d] / space.n_rows),
            )
            for d, name in zip(free, names, strict=True)
        ],
        parameter_constraints=[ParameterConstraint(equality=f"{' + '.join(names)} == {rest / space.n_rows!r}")],
    )


def _acquisition(settings: SearchConfig) -> tuple[type, dict[str, Any]]:
    if settings.acquisition == "lcb":
        return LowerConfidenceBound, {"factor": settings.beta}
    return qLogNoisyExpectedImprovement, {}


def _ratio_of(arm: Arm, space: SimplexSpace, free: Sequence[int]) -> Ratio:
    shares = np.array(space.tightest()[0]) / space.n_rows
    shares[list(free)] = [float(arm.parameters[parameter_name(d)]) for d in free]  # type: ignore[arg-type]
    return space.project(shares)


def _shares(ratios: Sequence[Ratio], free: Sequence[int]) -> np.ndarray:
    return np.stack([ratio.values[list(free)] for ratio in ratios])


@contextmanager
def _one_thread() -> Iterator[None]:
    """Small matrices: more threads only wait for each other, and change the last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Ax's bookkeeping off the user's terminal, and BoTorch's advice to normalise what must not be normalised."""
    logger = logging.getLogger("ax")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", InputDataWarning)
            warnings.simplefilter("ignore", NumericalWarning)  # jitter on the covariance of nearby points
            yield
    finally:
        logger.setLevel(before)
