"""Requirements and fronts: by hand, and what becomes of a search that has them."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from duet_ray.config import FunctionConfig, ObjectiveConfig, SearchConfig, StudyConfig
from duet_ray.errors import FeedbackError
from duet_ray.records import Point, Ratio
from duet_ray.search import Proposer, SimplexSpace, Told, start_design
from duet_ray.search.objectives import Limit, Targets, check_others, compromise, front_of
from duet_ray.search.recommend import recommend, standings

SPACE = SimplexSpace(names=("a", "b", "c"), n_rows=30, lower=(0, 0, 0), upper=(30, 30, 30))
TOLD = [Told(ratio=r, loss=float(np.square(r.values - [0.6, 0.3, 0.1]).sum())) for r in start_design(SPACE, 8, 0, True)]


def proposer(targets: Targets) -> Proposer:
    return Proposer(SPACE, SearchConfig(acquisition="qlognei", kernel="se"), 0, targets=targets)


def told(**metrics: Any) -> list[Told]:
    """The same trials with other metrics: functions of a ratio's shares, or None for what was not measured."""
    return [
        replace(
            one, others={name: f(one.ratio.values) for name, f in metrics.items() if f(one.ratio.values) is not None}
        )
        for one in TOLD
    ]


def a(shares: np.ndarray) -> float:
    return float(np.square(shares - [1, 0, 0]).sum())


def b(shares: np.ndarray) -> float:
    return float(np.square(shares - [0, 1, 0]).sum())


# By hand -------------------------------------------------------------------------------------------------------------


def test_the_front_by_hand_and_by_brute_force():
    losses = np.array([[0, 3], [1, 1], [3, 0], [2, 2], [1, 3], [1, 1]], dtype=float)
    assert front_of(losses).tolist() == [True, True, True, False, False, True], "equal ones do not beat each other"
    many = np.random.default_rng(0).integers(0, 6, (40, 3)).astype(float)
    beaten = [any(np.all(o <= x) and np.any(o < x) for o in many) for x in many]
    assert front_of(many).tolist() == [not one for one in beaten]


def test_the_compromise_gives_up_least():
    """Regrets of the front are counted from best to worst: (0, 1), (0.25, 0.25), (1, 0)."""
    losses = np.array([[0, 40], [1, 10], [4, 0], [4, 40]], dtype=float)
    assert compromise(losses) == pytest.approx([1, 0.25, 1, 1])
    assert compromise(losses * [1000, 1]) == pytest.approx([1, 0.25, 1, 1]), "units do not matter"
    assert compromise(np.ones((3, 2))) == pytest.approx([0, 0, 0])


def test_metrics_must_be_finite_where_they_are_needed():
    targets = Targets(limits=(Limit(metric="a", bound=1.0),))
    sound = Told(ratio=Ratio(counts=(1,)), loss=1.0, others={"a": 2.0, "b": np.inf})
    check_others([sound, Told(ratio=Ratio(counts=(1,)), loss=1.0)], targets)
    with pytest.raises(FeedbackError, match="only finite losses can be told to the search, got nan for a"):
        check_others([replace(sound, others={"a": np.nan})], targets)


def study(require: list[str], **more: Any) -> StudyConfig:
    """A study with a score `gain` to maximise, and `harm` to minimise beside it."""
    feedback = FunctionConfig(kind="function", name="gain", function="m:f", direction="maximize")
    harm = FunctionConfig(kind="function", name="harm", function="m:g", direction="minimize")
    search = SearchConfig(acquisition="qlognei", objective=ObjectiveConfig(require=require, **more))
    return StudyConfig.model_construct(feedback=feedback, also=[harm], search=search)


def test_requirements_become_bounds_on_losses():
    """base: gain 0.8 (a loss of -0.8), harm 2. A score of at least 0.76 is a loss of at most -0.76."""
    targets = Targets.of(
        study(["gain >= 95 % base", "harm <= base + 0.5", "harm <= 3"], pareto=["gain", "harm"]),
        {"gain": -0.8, "harm": 2.0},
    )
    assert [(limit.metric, limit.bound) for limit in targets.limits] == [
        ("gain", pytest.approx(-0.76)),
        ("harm", 2.5),
        ("harm", 3.0),
    ]
    assert targets.front == ("gain", "harm")
    assert targets.metrics == ("gain", "harm")
    assert Targets() == Targets(front=(), limits=())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gain <= 0.5", "asks for a worse value than it names; turn the sign round"),
        ("harm >= 0.5", "asks for a worse value than it names"),
        ("harm <= base", "the untouched model has no harm"),
    ],
)
def test_requirements_that_make_no_sense(text, said):
    with pytest.raises(FeedbackError, match=said):
        Targets.of(study([text]), {"gain": -0.8})


# In the search -------------------------------------------------------------------------------------------------------


def test_a_requirement_moves_the_proposal():
    """The best ratio breaks b <= 0.3, that is, needs more of the second domain."""
    limited = proposer(Targets(limits=(Limit(metric="b", bound=0.3),)))
    free = proposer(Targets())
    data = told(b=b)
    assert b(free.propose(100, data, []).ratio.values) > 0.4
    assert b(limited.propose(100, data, []).ratio.values) < 0.35
    assert b(recommend(limited, data).ratio.values) <= 0.35
    assert recommend(free, data).loss == min(one.loss for one in data)


def test_several_bounds_on_a_metric_are_the_tightest():
    data = told(b=b)
    twice = Targets(limits=(Limit(metric="b", bound=0.3), Limit(metric="b", bound=1.0)))
    once = Targets(limits=(Limit(metric="b", bound=0.3),))
    assert proposer(twice).propose(100, data, []).ratio == proposer(once).propose(100, data, []).ratio


def test_a_metric_called_loss_is_not_taken_for_the_loss():
    limits = [Targets(limits=(Limit(metric=name, bound=0.3),)) for name in ("loss", "b")]
    same = [
        proposer(limit).propose(100, told(**{name: b}), []).ratio
        for limit, name in zip(limits, ("loss", "b"), strict=True)
    ]
    assert same[0] == same[1]


@pytest.mark.parametrize(
    ("targets", "metrics"),
    [
        (Targets(limits=(Limit(metric="b", bound=-5.0),)), {"b": b}),
        (Targets(limits=(Limit(metric="b", bound=0.3),)), {}),
        (Targets(limits=(Limit(metric="b", bound=0.3),)), {"b": lambda r: b(r) if r[0] > 0.3 else None}),
        (Targets(front=("a", "b")), {"a": a, "b": b}),
        (Targets(front=("a", "b")), {"a": lambda r: 1.0, "b": lambda r: 1.0}),
        (Targets(front=("a", "b")), {"a": a, "b": lambda r: b(r) if r[0] > 0.3 else None}),
        (Targets(front=("a", "b")), {"a": a}),
        (Targets(front=("a", "b")), {}),
        (Targets(front=("a", "b"), limits=(Limit(metric="b", bound=0.5),)), {"a": a, "b": b}),
    ],
    ids=[
        "no point keeps it",
        "never measured",
        "measured for some",
        "front",
        "front of equals",
        "front measured for some",
        "half a front",
        "no front",
        "limited front",
    ],
)
@pytest.mark.filterwarnings("ignore:When all training points are infeasible")
def test_a_search_goes_on_whatever_its_metrics_are(targets, metrics):
    data = told(**metrics)
    pending = [Point(ratio=Ratio(counts=(10, 15, 5)))]
    proposal = proposer(targets).propose(100, data, pending)
    assert SPACE.contains(proposal.ratio)
    assert proposal.ratio not in {one.ratio for one in data} | {pending[0].ratio}
    assert np.isfinite(proposal.expected)
    found = standings(proposer(targets), data)
    assert all(np.isfinite([s.mean, s.sd, s.ranks_by]).all() and 0 <= s.feasible <= 1 for s in found)
    assert recommend(proposer(targets), data) in data


def test_a_front_recommends_what_lies_between():
    """Vertex a is best for a and worst for b, and the other way round; the third domain is bad for both."""
    data = told(a=a, b=b)
    chosen = recommend(proposer(Targets(front=("a", "b"))), data)
    regrets = compromise(np.array([[one.others["a"], one.others["b"]] for one in data]))
    assert regrets[data.index(chosen)] <= np.sort(regrets)[1] + 0.1
    assert max(chosen.others["a"], chosen.others["b"]) < 2
