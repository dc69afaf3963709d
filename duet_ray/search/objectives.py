"""What the search looks for where the study asks for more than one number: requirements, and fronts.

Everything here is a loss, lower is better. A requirement of the study file, in the user's units and direction, becomes
a bound on a loss once the untouched model is measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from duet_ray.config import StudyConfig
from duet_ray.errors import FeedbackError
from duet_ray.requirements import parse_requirement
from duet_ray.search.told import Told


@dataclass(frozen=True, kw_only=True)
class Limit:
    """A requirement: the loss called `metric` is at most `bound`."""

    metric: str
    bound: float


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What is minimised, and what must hold. Names are keys of `Told.others`."""

    front: tuple[str, ...] = ()
    """The losses that are traded off; empty: `Told.loss` alone is minimised."""
    limits: tuple[Limit, ...] = ()

    @classmethod
    def of(cls, config: StudyConfig, base: Mapping[str, float]) -> "Targets":
        """The targets of a study.

        Args:
            base: the untouched model's metrics by name, as losses.

        Raises:
            FeedbackError: a requirement names the untouched model's metric, and it has none.
        """
        objective = config.search.objective
        if objective is None:
            return cls()
        directions = {f.metric_key: f.direction for f in (config.feedback, *config.also)}
        limits = []
        for text in objective.require:
            required = parse_requirement(text, list(directions))
            direction = directions[required.metric]
            if required.needs_base and required.metric not in base:
                raise FeedbackError(f"search.objective.require: {text!r}: the untouched model has no {required.metric}")
            of_base = direction.to_value(base[required.metric]) if required.needs_base else None
            limits.append((direction.to_loss(required.bound(of_base)), required, direction))
        # `accuracy >= a` and `loss <= b` bound a loss from above; the other two forms bound it from below.
        wrong = [r.text for _, r, d in limits if (r.sense == ">=") != (d.value == "maximize")]
        if wrong:
            raise FeedbackError(
                f"search.objective.require: {wrong[0]!r} asks for a worse value than it names; turn the sign round"
            )
        return cls(
            front=tuple(objective.pareto or ()),
            limits=tuple(Limit(metric=required.metric, bound=bound) for bound, required, _ in limits),
        )

    @property
    def metrics(self) -> tuple[str, ...]:
        """The losses beside `Told.loss` that must be modelled."""
        return tuple(dict.fromkeys([*self.front, *(limit.metric for limit in self.limits)]))


def front_of(losses: np.ndarray) -> np.ndarray:
    """`(n,)`: which of `(n, n_metrics)` losses no other beats, being as good in everything and better in something."""
    worse_or_equal = (losses[None] <= losses[:, None]).all(axis=-1)
    better_somewhere = (losses[None] < losses[:, None]).any(axis=-1)
    beaten: np.ndarray = np.any(worse_or_equal & better_somewhere, axis=1)
    return ~beaten


def compromise(losses: np.ndarray) -> np.ndarray:
    """One number for several losses: the largest regret, each counted from the best to the worst of the front.

    Args:
        losses: `(n, n_metrics)`.

    Returns:
        `(n,)`: 0 would be the best in everything; the least is the compromise that gives up least (Chebyshev).
    """
    front = losses[front_of(losses)]
    best, worst = front.min(axis=0), front.max(axis=0)
    return ((losses - best) / np.where(worst > best, worst - best, 1.0)).max(axis=1)


def check_others(told: Sequence[Told], targets: Targets) -> None:
    """Raise `FeedbackError` where a metric that is needed is not finite."""
    for one in told:
        for name in targets.metrics:
            if name in one.others and not np.isfinite(one.others[name]):
                raise FeedbackError(f"only finite losses can be told to the search, got {one.others[name]} for {name}")
