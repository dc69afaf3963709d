"""Which ratio to take home: on toys where the truth is known."""

import math
from dataclasses import replace

import numpy as np
import pytest

from duet_ray.config import FidelityConfig, SearchConfig
from duet_ray.errors import FeedbackError
from duet_ray.records import Ratio
from duet_ray.search import Proposer, SimplexSpace, Told, start_design
from duet_ray.search.fitted import fitted
from duet_ray.search.objectives import Limit, Targets
from duet_ray.search.recommend import Standing, anywhere, ranking, recommend, standings
from tests.toys import quadratic_toy

SPACE = SimplexSpace(names=("a", "b", "c"), n_rows=100, lower=(0, 0, 0), upper=(100, 100, 100))
BEST = np.array([0.5, 0.4, 0.1])


def proposer(seed: int = 0, targets: Targets | None = None, **settings) -> Proposer:
    return Proposer(SPACE, SearchConfig(**{"kernel": "se", **settings}), seed, targets=targets or Targets())


def told(n: int, noise: float, seed: int = 0) -> list[Told]:
    toy = quadratic_toy(BEST, noise, seed)
    return [Told(ratio=r, loss=toy(r, i)) for i, r in enumerate(start_design(SPACE, n, seed, True))]


def test_the_posteriors_choice_beats_the_luckiest_observation():
    """Noise as large as the gain, 25 trials, 12 seeds: on average truly better, and never far worse than uniform."""
    exact = quadratic_toy(BEST)
    naive, chosen, uniform = [], [], exact(SPACE.uniform(), 0)
    for seed in range(12):
        data = told(25, noise=0.25, seed=seed)
        naive.append(exact(min(data, key=lambda one: one.loss).ratio, 0))
        chosen.append(exact(recommend(proposer(seed), data).ratio, 0))
    assert np.mean(chosen) < 0.75 * np.mean(naive)
    assert max(chosen) <= uniform + 0.05


def test_one_lucky_outlier_is_not_believed():
    """A bad ratio among its neighbours, with the lowest observation of all."""
    data = told(40, noise=0.05)
    bad = min(range(len(data)), key=lambda i: float(np.square(data[i].ratio.values - [0.2, 0.2, 0.6]).sum()))
    data[bad] = replace(data[bad], loss=min(one.loss for one in data) - 0.01)
    assert min(data, key=lambda one: one.loss) is data[bad]
    assert recommend(proposer(), data) is not data[bad]


def test_the_ranking_is_by_sure_gain_on_the_uniform_ratio():
    """E[f(r) − f(u)] + sd(f(r) − f(u)) of the joint posterior, computed again; 0 for the uniform ratio."""
    data = told(12, noise=0.1)
    found = standings(proposer(), data)
    mean, covariance = fitted(proposer(), data).joint(np.stack([one.ratio.values for one in data]))
    assert data[0].ratio == SPACE.uniform()
    sd = np.sqrt(np.maximum(np.diag(covariance) + covariance[0, 0] - 2 * covariance[0], 0))
    assert [s.mean for s in found] == pytest.approx(mean, abs=1e-6)
    assert [s.ranks_by for s in found] == pytest.approx(mean - mean[0] + sd, abs=1e-4)
    assert found[0].ranks_by == pytest.approx(0.0, abs=1e-6)
    order = ranking(data, found)
    assert [found[i].ranks_by for i in order] == sorted(s.ranks_by for s in found)


def test_those_that_keep_the_requirements_come_first():
    """By hand: of two that keep them the lower loss; of two that do not, the one nearer to keeping them."""
    good, better, broken, worse = (Ratio(counts=(i, 100 - i, 0)) for i in range(4))
    data = [Told(ratio=r, loss=1.0) for r in (worse, good, broken, better)]
    found = [
        Standing(mean=0, sd=1, feasible=0.1, ranks_by=-9),
        Standing(mean=0, sd=1, feasible=0.6, ranks_by=-1),
        Standing(mean=0, sd=1, feasible=0.4, ranks_by=5),
        Standing(mean=0, sd=1, feasible=0.5, ranks_by=-2),
    ]
    assert [data[i].ratio for i in ranking(data, found)] == [better, good, broken, worse]


def test_a_requirement_is_judged_by_its_posterior():
    """The cap on the third domain's share as a metric, told exactly: whoever keeps it is ahead of whoever does not."""
    data = [replace(one, others={"third": float(one.ratio.values[2])}) for one in told(15, noise=0.01)]
    targets = Targets(limits=(Limit(metric="third", bound=0.35),))
    found = standings(proposer(targets=targets, acquisition="qlognei"), data)
    kept = [data[i].others["third"] <= 0.35 for i in ranking(data, found)]
    clear = [k for i, k in zip(ranking(data, found), kept, strict=True) if abs(data[i].others["third"] - 0.35) > 0.05]
    assert clear == sorted(clear, reverse=True)
    assert any(clear)
    assert not all(clear)


def test_every_point_stands_once_and_whole():
    cheap = FidelityConfig(rows=[0.25])
    data = [*told(6, noise=0.05), *told(6, noise=0.05, seed=1)[:4]]
    data += [replace(one, fidelity=0.25, loss=one.loss - 1) for one in data]
    found = standings(proposer(fidelity=cheap), data)
    order = ranking(data, found)
    assert len(order) == len({one.point for one in data if one.fidelity == 1})
    assert all(data[i].fidelity == 1 for i in order)
    assert len({data[i].point for i in order}) == len(order)
    assert recommend(proposer(fidelity=cheap), data).fidelity == 1


def test_with_fewer_than_three_the_observations_rank():
    data = [Told(ratio=SPACE.uniform(), loss=1.0, sem=0.0), Told(ratio=Ratio(counts=(1, 0, 99)), loss=0.5)]
    found = standings(proposer(), data)
    assert [s.ranks_by for s in found] == [s.mean for s in found] == [1.0, 0.5]
    assert found[0].sd == 0.0
    assert math.isnan(found[1].sd)
    assert recommend(proposer(), data) is data[1]
    limit = Targets(limits=(Limit(metric="harm", bound=1.0),))
    judged = [replace(one, others={"harm": harm}) for one, harm in zip(data, (0.5, 2.0), strict=True)]
    assert recommend(proposer(targets=limit, acquisition="qlognei"), judged) is judged[0]


def test_only_numbers_are_ranked():
    with pytest.raises(FeedbackError, match="only finite losses"):
        standings(proposer(), [Told(ratio=SPACE.uniform(), loss=math.nan)])


@pytest.mark.parametrize("acquisition", ["ei", "qlognei", "thompson"])
def test_anywhere_is_at_least_as_good_as_any_trained_point(acquisition):
    data = told(14, noise=0.05)
    asked = proposer(acquisition=acquisition)
    model, point = fitted(asked, data), anywhere(asked, data)
    assert SPACE.contains(point.ratio)
    assert model.at([point])[0][0] <= model.means_of(data).min() + 1e-4 * model.scale.spread
    assert np.abs(point.ratio.values - BEST).max() < 0.15
    assert anywhere(asked, data[::-1]) == point


def test_the_order_of_telling_does_not_change_the_recommendation():
    data = told(12, noise=0.2)
    assert recommend(proposer(kernel="auto"), data).point == recommend(proposer(kernel="auto"), data[::-1]).point
