"""More than one number: what was asked of several metrics (`search.objective`), and what each ratio makes of it.

Metrics are read off the samples, each in its own units and direction. Everything here works on plain mappings of
metrics, so that what the search saw and what fresh seeds gave are judged by the same rules.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from duet_ray.config import ObjectiveConfig, StudyConfig
from duet_ray.records import Direction, SampleResult
from duet_ray.requirements import Requirement, parse_requirement
from duet_ray.search.objectives import compromise, front_of
from duet_ray.search.told import metric_losses

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One requirement against one model's metrics."""

    requirement: Requirement
    value: float | None
    """None where the metric was not measured."""
    base: float | None
    """The untouched model's."""
    bound: float | None
    """None where it is the base's, which was not measured."""

    @property
    def margin(self) -> float | None:
        """By how much the value is on the right side; negative where the requirement is broken; None: not known."""
        if self.value is None or self.bound is None:
            return None
        return self.requirement.margin(self.value, self.base)

    @property
    def kept(self) -> bool | None:
        return None if self.margin is None else self.margin >= 0


@dataclass(frozen=True, kw_only=True)
class Part:
    """One metric of a weighted sum."""

    metric: str
    weight: float
    value: float | None
    """In the metric's own units."""
    of_sum: float | None
    """What it adds to the sum, where lower is better."""


def objective_of(config: StudyConfig | None) -> ObjectiveConfig | None:
    return config.search.objective if config is not None else None


def directions(config: StudyConfig) -> dict[str, Direction]:
    """Every metric that an objective can name, the feedback's first, with its direction."""
    return {feedback.metric_key: feedback.direction for feedback in (config.feedback, *config.also)}


def metric_values(config: StudyConfig, samples: "Iterable[SampleResult]") -> dict[str, float]:
    """Means over the samples of all metrics that an objective can name, each in its own units."""
    losses = [metric_losses(sample, config) for sample in samples]
    return {
        name: direction.to_value(statistics.fmean(found))
        for name, direction in directions(config).items()
        if (found := [one[name] for one in losses if name in one])
    }


def judged(config: StudyConfig, values: Mapping[str, float], base: Mapping[str, float]) -> tuple[Judged, ...]:
    """Every requirement of the study against one model's metrics.

    Args:
        values, base: from `metric_values`.
    """
    objective = objective_of(config)
    if objective is None:
        return ()
    found = []
    for text in objective.require:
        required = parse_requirement(text, list(directions(config)))
        known = base.get(required.metric)
        bound = required.bound(known) if known is not None or not required.needs_base else None
        found.append(Judged(requirement=required, value=values.get(required.metric), base=known, bound=bound))
    return tuple(found)


def on_front(config: StudyConfig, values: Sequence[Mapping[str, float]]) -> list[bool]:
    """Which models no other is at least as good as in every metric of the front, and better in one.

    A model that lacks one of these metrics is on no front.
    """
    names = _front_names(config)
    whole = [i for i, one in enumerate(values) if all(name in one for name in names)]
    found = [False] * len(values)
    if names and whole:
        for i, best in zip(whole, front_of(_losses(config, [values[i] for i in whole])), strict=True):
            found[i] = bool(best)
    return found


def gives_up_least(config: StudyConfig, values: Sequence[Mapping[str, float]]) -> int | None:
    """The place of the compromise between the metrics of the front; None without a front, or where nobody has all."""
    names = _front_names(config)
    whole = [i for i, one in enumerate(values) if all(name in one for name in names)]
    if not names or not whole:
        return None
    return whole[int(np.argmin(compromise(_losses(config, [values[i] for i in whole]))))]


def parts(config: StudyConfig, values: Mapping[str, float]) -> tuple[Part, ...]:
    """What each metric adds to the weighted sum; empty without weights."""
    objective, by_metric = objective_of(config), directions(config)
    if objective is None or objective.weights is None:
        return ()
    return tuple(
        Part(
            metric=name,
            weight=weight,
            value=values.get(name),
            of_sum=weight * by_metric[name].to_loss(values[name]) if name in values else None,
        )
        for name, weight in objective.weights.items()
    )


def _front_names(config: StudyConfig) -> tuple[str, ...]:
    objective = objective_of(config)
    return tuple(objective.pareto or ()) if objective is not None else ()


def _losses(config: StudyConfig, values: Sequence[Mapping[str, float]]) -> np.ndarray:
    by_metric = directions(config)
    return np.array([[by_metric[name].to_loss(one[name]) for name in _front_names(config)] for one in values])
