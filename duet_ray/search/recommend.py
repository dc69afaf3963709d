"""Which ratio to take home: the posterior's best, not the luckiest observation.

The best of T noisy observations is the one that was lucky, the more so the more were made (the winner's curse). The
posterior mean shares what neighbouring ratios have seen, so its best among the trained ratios is both a better choice
and one whose value can be believed.

One ratio needs no search: the uniform one. So a point ranks by what it is sure to gain on it,

    E[f(r) − f(u)] + sd(f(r) − f(u)),

under the joint posterior; u, which every study trains first, has 0. With few trials or much noise that keeps a study
from recommending something worse than what was there for free, and costs nothing on average (`benchmarks/README.md`).
`standings` ranks the trained points; `anywhere` looks beyond them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from duet_ray.records import Point
from duet_ray.search.told import Told

if TYPE_CHECKING:
    from duet_ray.search.fitted import Fitted
    from duet_ray.search.proposer import Proposer

FEWEST = 3
"""With fewer observations a model has nothing to share: the observations rank."""
SURE = 0.5
"""A requirement counts as kept where the model gives it at least this probability."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What the model thinks of one trained point, as a whole trial."""

    mean: float
    """Posterior mean of the noiseless loss, in the units told."""
    sd: float
    feasible: float = 1.0
    """Probability that all requirements are kept."""
    ranks_by: float = 0.0
    """Lower is better: the sure loss against the reference, or with a front the compromise between its metrics."""

    @property
    def key(self) -> tuple[bool, float, float]:
        """Sorts standings, best first: those that keep the requirements come before those that do not."""
        kept = self.feasible >= SURE
        return (not kept, self.ranks_by if kept else -self.feasible, self.ranks_by)


def standings(proposer: "Proposer", told: Sequence[Told]) -> list[Standing]:
    """The standing of every told point, in the order told. Points told at a lower fidelity stand as whole trials.

    Raises:
        FeedbackError: as `Proposer.propose`.
    """
    from duet_ray.search.objectives import compromise

    proposer.check(told, [])
    if len(told) < FEWEST or proposer.points.is_single:
        return [
            Standing(
                mean=one.loss,
                sd=math.nan if one.sem is None else one.sem,
                feasible=_observed_feasible(proposer, one),
                ranks_by=one.loss,
            )
            for one in told
        ]
    from duet_ray.search.fitted import fitted

    points = [replace(one.point, fidelity=1.0) for one in told]
    model = fitted(proposer, told)
    mean, sd = model.at(points)
    feasible = np.ones(len(told))
    for limit in proposer.targets.limits:
        if (other := _model_of(proposer, told, limit.metric)) is not None:
            at, spread = other.at(points)
            feasible *= _normal_cdf((limit.bound - at) / np.maximum(spread, 1e-12))
    ranks_by = model.against(points, proposer.reference)
    models = [_model_of(proposer, told, metric) for metric in proposer.targets.front]
    if traded := [m.at(points)[0] for m in models if m is not None]:
        ranks_by = compromise(np.column_stack(traded))
    return [
        Standing(mean=float(m), sd=float(s), feasible=float(p), ranks_by=float(r))
        for m, s, p, r in zip(mean, sd, feasible, ranks_by, strict=True)
    ]


def ranking(told: Sequence[Told], standing: Sequence[Standing]) -> list[int]:
    """Indices into `told`, best first: every distinct point once, whole trials only."""
    order = sorted(range(len(told)), key=lambda i: (standing[i].key, told[i].loss, i))
    seen: set[Point] = set()
    found = []
    for i in order:
        if told[i].fidelity == 1 and told[i].point not in seen:
            seen.add(told[i].point)
            found.append(i)
    return found


def recommend(proposer: "Proposer", told: Sequence[Told]) -> Told:
    """The told point to go with: the best standing among whole trials.

    Args:
        told: at least one whole trial among them.
    """
    return told[ranking(told, standings(proposer, told))[0]]


def anywhere(proposer: "Proposer", told: Sequence[Told]) -> Point:
    """The point with the best posterior mean of all, trained or not.

    Args:
        told: at least `FEWEST`, and a space of more than one point.
    """
    settings = proposer.settings.model_copy(update={"acquisition": "lcb", "beta": 0.0})
    greedy = replace(proposer, settings=settings)
    from duet_ray.search.fitted import kernel_for, next_point

    # With every noise "known" nothing is avoided: the best may be a point that was trained.
    footing = proposer.footing(told).told
    found = next_point(
        space=greedy.points,
        settings=settings,
        seed=0,
        told=footing,
        pending=[],
        kernel=kernel_for(settings.kernel, greedy.points, footing, greedy.own),
        targets=proposer.targets,
        missing=greedy.own,
        may_repeat=True,
    )
    return found.point


def _model_of(proposer: "Proposer", told: Sequence[Told], metric: str) -> "Fitted | None":
    """A model of another metric; None where hardly any trial has it."""
    from duet_ray.search.fitted import fitted

    having = [
        replace(one, loss=one.others[metric], sem=None, samples=(), k_used=1) for one in told if metric in one.others
    ]
    return fitted(proposer, having) if len(having) >= FEWEST else None


def _observed_feasible(proposer: "Proposer", one: Told) -> float:
    limits = proposer.targets.limits
    return float(all(one.others.get(limit.metric, -math.inf) <= limit.bound for limit in limits))


def _normal_cdf(z: np.ndarray) -> np.ndarray:
    from scipy.special import ndtr

    return np.asarray(ndtr(z))
