"""Ax: the model of `model.py` rebuilt, fitted and asked once per proposal.

Of Ax we use the experiment, the adapter and the modular BoTorch generator directly. `Client` and `GenerationStrategy`
are left out because attaching through them costs time quadratic in the trials (4.5 s of CPU at 200), and because the
start design and the bookkeeping are ours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
from ax.core.optimization_config import MultiObjectiveOptimizationConfig, OptimizationConfig
from ax.core.outcome_constraint import OutcomeConstraint
from ax.core.parameter import ParameterType, RangeParameter
from ax.core.parameter_constraint import ParameterConstraint
from ax.core.search_space import SearchSpace
from ax.core.utils import extract_pending_observations
from ax.generators.torch.botorch_modular.generator import BoTorchGenerator
from ax.generators.torch.botorch_modular.surrogate import SurrogateSpec
from ax.generators.torch.botorch_modular.utils import ModelConfig
from botorch.acquisition.logei import qLogNoisyExpectedImprovement
from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
from gpytorch.mlls import ExactMarginalLogLikelihood

from duet_ray.config import SearchConfig
from duet_ray.records import Point
from duet_ray.search.acquisition import SimplexAcquisition, SimplexOptions
from duet_ray.search.acquisitions import ExpectedImprovement, KnowledgeGradient, LowerConfidenceBound, ThompsonDraw
from duet_ray.search.features import PointSpace
from duet_ray.search.model import LossScale, MixtureGP, Recipe, one_thread, quiet
from duet_ray.search.objectives import Targets
from duet_ray.search.told import Told

_LOSS = "loss"


@dataclass(frozen=True)
class Predicted:
    """A point with what the model thinks of its noiseless loss, in the units told."""

    point: Point
    mean: float
    sd: float


def next_point(
    *,
    space: PointSpace,
    settings: SearchConfig,
    seed: int,
    told: Sequence[Told],
    pending: Sequence[Point],
    kernel: str,
    targets: Targets,
    missing: Sequence[tuple[str, Any]] = (),
    may_repeat: bool = False,
) -> Predicted:
    """Fit the model and optimise the acquisition, for a whole trial.

    Args:
        space: must hold more than one point.
        seed: of this proposal alone.
        told: at least one.
        pending: points in training.
        kernel: a name of `kernels`.
        missing: settings of told points that have none.
        may_repeat: whether a point that was told may be chosen again, also where the noise is not known.
    """
    # Noise by the law is known on average only, and a search that believes it looks at its best again and again.
    known = may_repeat or (settings.noise != "theory" and all(one.sem is not None for one in told))
    # What was only looked at cheaply may still be trained whole; `best_fidelity` takes no look twice.
    looked = [one.point for one in told if one.fidelity == 1 or not space.has_fidelities]
    avoid = [] if known else [*looked, *pending]
    filled = [replace(point, settings=point.settings or tuple(missing)) for point in avoid]
    options = SimplexOptions(space=space, seed=seed, avoid=frozenset(filled))
    with quiet(), one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        table = outcomes(told, targets)
        experiment = build_experiment(space, told, table, targets, pending, missing)
        adapter = fit(
            experiment,
            settings=settings,
            options=options,
            recipe=Recipe.of(space, kernel),
            targets=targets,
            whole=_whole(space, [one.point for one in told], missing),
            pending=_whole(space, pending, missing),
        )
        run = adapter.gen(n=1, pending_observations=extract_pending_observations(experiment))
        point = _point_of(run.arms[0], space)
        mean, sd = posterior(adapter, space.encode([point]))
    scale = LossScale.of([one.loss for one in told])
    return Predicted(point, scale.mean + scale.spread * mean, scale.spread * sd)


def outcomes(told: Sequence[Told], targets: Targets) -> pd.DataFrame:
    """What every point came to, a row for every point and metric: standardised means and standard errors."""
    parts = []
    known = all(one.sem is not None for one in told)
    for name, metric in _names(told, targets).items():
        rows = [i for i, one in enumerate(told) if metric is None or metric in one.others]
        losses = [told[i].loss if metric is None else told[i].others[metric] for i in rows]
        scale = LossScale.of(losses)
        sems = [told[i].sem for i in rows]
        noise = [float(s) / scale.spread for s in sems if s is not None] if known and metric is None else np.nan
        parts.append(
            pd.DataFrame({"index": rows, "metric_name": name, "mean": scale.standardise(losses), "sem": noise})
        )
    return pd.concat(parts, ignore_index=True)


def build_experiment(
    space: PointSpace,
    told: Sequence[Told],
    table: pd.DataFrame,
    targets: Targets,
    pending: Sequence[Point],
    missing: Sequence[tuple[str, Any]] = (),
) -> Experiment:
    """An Ax experiment over the features with every observation completed and every pending point running.

    Args:
        table: from `outcomes`.
    """
    experiment = Experiment(
        name="duet",
        search_space=_search_space(space),
        metrics=[Metric(name=name, lower_is_better=True) for name in _names(told, targets)],
        optimization_config=_optimization(told, targets),
    )
    points = [*(one.point for one in told), *pending]
    trials = [experiment.new_trial() for _ in points]
    features = space.encode(points, tuple(missing))
    for trial, row in zip(trials, features, strict=True):
        trial.add_arm(Arm(parameters={f"x{i}": float(value) for i, value in enumerate(row)}))
        trial.mark_running(no_runner_required=True)
    observed = trials[: len(told)]
    index = table["index"].to_numpy()
    filled = pd.DataFrame(
        {
            "trial_index": [observed[i].index for i in index],
            "arm_name": [observed[i].arms[0].name for i in index],
            "metric_name": table["metric_name"],
            "metric_signature": table["metric_name"],
            "mean": table["mean"],
            "sem": table["sem"],
        }
    )
    experiment.attach_data(Data(df=filled))
    for trial in observed:
        trial.mark_completed()
    return experiment


def fit(
    experiment: Experiment,
    *,
    settings: SearchConfig,
    options: SimplexOptions,
    recipe: Recipe,
    targets: Targets,
    whole: torch.Tensor,
    pending: torch.Tensor,
) -> TorchAdapter:
    """Fit the Gaussian process to an experiment, and prepare the acquisition.

    Args:
        whole: `(n_distinct, n_features)` what was told, as whole trials; `pending`: what is pending, likewise.
    """
    config = ModelConfig(
        botorch_model_class=MixtureGP,
        model_options={"recipe": recipe},
        mll_class=ExactMarginalLogLikelihood,
        input_transform_classes=None,
        outcome_transform_classes=None,
    )
    n_traded = len(_front(dict.fromkeys(experiment.metrics)))
    acquisition_class, acquisition_options = _acquisition(settings, targets, recipe, whole, pending, n_traded)
    adapter = Generators.BOTORCH_MODULAR(
        experiment=experiment,
        data=experiment.lookup_data(),
        transforms=[],
        surrogate_spec=SurrogateSpec(model_configs=[config], allow_batched_models=False),
        acquisition_class=SimplexAcquisition,
        acquisition_options={"simplex": options},
        botorch_acqf_class=acquisition_class,
        botorch_acqf_options=acquisition_options,
        torch_device=torch.device("cpu"),
    )
    assert isinstance(adapter, TorchAdapter)
    return adapter


def posterior(adapter: TorchAdapter, features: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of the noiseless standardised loss at `(1, n_features)`."""
    generator = adapter.generator
    assert isinstance(generator, BoTorchGenerator)
    with torch.no_grad():
        mean, covariance = generator.surrogate.predict(torch.from_numpy(features))
    at = list(generator.surrogate.outcomes).index(_LOSS)
    return float(mean[0, at]), float(covariance[0, at, at].clamp_min(0).sqrt())


def _names(told: Sequence[Told], targets: Targets) -> dict[str, str | None]:
    """Every outcome that is modelled: its name in Ax, which real names need not be, and its metric; None: the loss.

    Ax lets no constraint rest on an objective, so a metric of a front that is limited too is there twice. Metrics that
    no trial has are left out.
    """
    having = {metric for one in told for metric in one.others}
    front = {f"m{i}": metric for i, metric in enumerate(targets.front) if metric in having}
    limits = {f"c{i}": metric for i, metric in enumerate(_bounds(targets)) if metric in having}
    return {_LOSS: None, **front, **limits}


def _bounds(targets: Targets) -> dict[str, float]:
    """Metric → the tightest bound on it."""
    found: dict[str, float] = {}
    for limit in targets.limits:
        found[limit.metric] = min(limit.bound, found.get(limit.metric, limit.bound))
    return found


def _optimization(told: Sequence[Told], targets: Targets) -> OptimizationConfig:
    names = _names(told, targets)
    constraints = []
    for i, (metric, limit) in enumerate(_bounds(targets).items()):
        if (name := f"c{i}") in names:
            scale = LossScale.of([one.others[metric] for one in told if metric in one.others])
            bound = float(scale.standardise([limit])[0])
            constraints.append(
                OutcomeConstraint(
                    expression=f"{name} <= {bound:.12f}", metric_name_to_signature={name: name}, relative=False
                )
            )
    front = _front(names)
    if len(front) > 1:
        objective = Objective(
            expression=", ".join(f"-{name}" for name in front), metric_name_to_signature={n: n for n in front}
        )
        return MultiObjectiveOptimizationConfig(objective=objective, outcome_constraints=constraints)
    only = front[0] if front else _LOSS
    objective = Objective(expression=f"-{only}", metric_name_to_signature={only: only})
    return OptimizationConfig(objective=objective, outcome_constraints=constraints)


def _front(names: Mapping[str, str | None]) -> list[str]:
    """The outcomes, of `_names`, that are traded off."""
    return [name for name in names if name.startswith("m")]


def _search_space(space: PointSpace) -> SearchSpace:
    """Ax's search space: a range for every feature, the sum of the shares as a native equality (tolerance 1e-8)."""
    simplex = space.simplex
    least, most = simplex.tightest()
    bounds = [(float(least[d] / simplex.n_rows), float(most[d] / simplex.n_rows)) for d in space.free]
    # A run from elsewhere may have been cheaper than any of this study's trials.
    bounds += [(0.0, 1.0)] * space.n_settings + [(0.0, 10.0)] * space.has_fidelities
    names = [f"x{i}" for i in range(len(bounds))]
    shares = names[: len(space.free)]
    constraints = []
    if shares:
        rest = simplex.n_rows - sum(int(least[d]) for d in range(simplex.n_domains) if d not in space.free)
        constraints.append(ParameterConstraint(equality=f"{' + '.join(shares)} == {rest / simplex.n_rows!r}"))
    return SearchSpace(
        parameters=[
            RangeParameter(name=name, parameter_type=ParameterType.FLOAT, lower=low, upper=high)
            for name, (low, high) in zip(names, bounds, strict=True)
        ],
        parameter_constraints=constraints,
    )


def _acquisition(
    settings: SearchConfig, targets: Targets, recipe: Recipe, whole: torch.Tensor, pending: torch.Tensor, n_traded: int
) -> tuple[type, dict[str, Any]]:
    if n_traded > 1:
        return qLogNoisyExpectedHypervolumeImprovement, {}
    if targets.limits or targets.front or settings.acquisition == "qlognei":
        # What Ax would compare with has the losses of cheap trials in it, which no whole trial may ever reach.
        as_whole = {"X_baseline": whole, "X_pending": pending if len(pending) else None}
        return qLogNoisyExpectedImprovement, as_whole if recipe.has_fidelity else {}
    if settings.acquisition == "lcb":
        return LowerConfidenceBound, {
            "factor": settings.beta,
            "rkhs_norm": settings.rkhs_norm,
            "delta": settings.delta,
            "n_trials": settings.n_start + settings.n_trials,
        }
    if settings.acquisition == "thompson":
        return ThompsonDraw, {}
    if settings.acquisition == "kg":
        return KnowledgeGradient, {"whole": torch.cat([whole, pending])}  # a pending point may be recommended, too
    return ExpectedImprovement, {"whole": whole}


def _whole(space: PointSpace, points: Sequence[Point], missing: Sequence[tuple[str, Any]]) -> torch.Tensor:
    """The distinct ones of points, as whole trials: `(n_distinct, n_features)`."""
    whole = [replace(point, fidelity=1.0) for point in points]
    return torch.from_numpy(np.unique(space.encode(whole, tuple(missing)), axis=0))


def _point_of(arm: Arm, space: PointSpace) -> Point:
    features = np.array([float(arm.parameters[f"x{i}"]) for i in range(space.n_features)])  # type: ignore[arg-type]
    simplex, n_free = space.simplex, len(space.free)
    settings = space.decode_settings(features[n_free : n_free + space.n_settings])
    if space.fixed_ratio is not None:
        return Point(ratio=space.fixed_ratio, settings=settings)
    shares = np.array(simplex.tightest()[0]) / simplex.n_rows
    shares[list(space.free)] = features[:n_free]
    return Point(ratio=simplex.project(shares), settings=settings)
