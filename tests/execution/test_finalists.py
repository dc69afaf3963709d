"""Who is measured again: the order of a scripted model, and of a real one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from duet_ray.config import StudyConfig, config_from
from duet_ray.execution.finalists import best_trials, finalists, order_of, store_order, to_confirm
from duet_ray.records import CONFIRM_ANYWHERE, CONFIRM_BASE, CONFIRM_FIRST, Observation, PastRun, Point, Ratio
from duet_ray.search import Proposer, SimplexSpace, Told, recommend
from duet_ray.search.recommend import Standing
from duet_ray.store import Store
from tests.toy_study import toy_data

POINTS = [(8, 8, 8), (12, 6, 6), (0, 12, 12), (20, 2, 2), (24, 0, 0)]
VALUES = [5.0, 3.0, 1.0, 4.0, 2.0]
"""Observed; the luckiest is trial 2."""
MEANS = [4.0, 2.0, 3.0, 1.0, 5.0]
"""What the scripted model thinks; the best is trial 3, then 1."""


def study(**changes: Any) -> StudyConfig:
    return config_from(toy_data(**{"confirm": {"finalists": 2, "repeats": 2}, **changes}), folder=Path())


def proposer(config: StudyConfig) -> Proposer:
    space = SimplexSpace(names=config.domain_names, n_rows=24, lower=(0, 0, 0), upper=(24, 24, 24))
    return Proposer.of(config, space, [50, 50, 50], base={})


def fill(
    store: Store, values: Sequence[float | None] = tuple(VALUES), fidelities: dict[int, float] | None = None
) -> None:
    known = {trial.number for trial in store.trials()}
    for number, (counts, value) in enumerate(zip(POINTS, values, strict=False)):
        if number in known:
            continue
        fidelity = (fidelities or {}).get(number, 1.0)
        store.add_trial(number, "start", Ratio(counts=counts), "random", fidelity=fidelity)
        if value is not None:
            store.add_observation(number, Observation(value=value, k=1, k_used=1, best_sample=0))
        else:
            store.fail_trial(number, "NaN")


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A model that thinks `MEANS`; returns how many observations each call was told."""
    calls: list[int] = []

    def standings(_: Any, told: Sequence[Told]) -> list[Standing]:
        calls.append(len(told))
        means = dict(zip(POINTS, MEANS, strict=True))
        found = [means.get(one.ratio.counts, 9.0) for one in told]
        return [Standing(mean=mean, sd=0.5, ranks_by=mean) for mean in found]

    monkeypatch.setattr(recommend, "standings", standings)
    return calls


def test_the_model_ranks_and_the_luckiest_and_the_uniform_one_come_on_top(tmp_path: Path, model: list[int]) -> None:
    config = study()
    with Store(tmp_path, create=True).writing() as store:
        fill(store)
        store_order(store, config, proposer(config), is_over=True)
        assert store.ranking() == ([3, 1, 2, 0, 4], {0, 1, 2, 3, 4})
        assert store.posterior() == {n: (mean, 0.5) for n, mean in enumerate(MEANS)}
        assert [t.number for t in finalists(store.trials(), store.ranking()[0], config)] == [3, 1, 2, 0]
        assert [t.method for t in to_confirm(store, config)] == [
            "confirm:t0003", "confirm:t0001", "confirm:t0002", "confirm:t0000"
        ]  # fmt: skip
        many = study(confirm={"finalists": 4})
        assert [t.number for t in finalists(store.trials(), store.ranking()[0], many)] == [3, 1, 2, 0]
        assert to_confirm(store, study(confirm={"finalists": 0})) == []


def test_what_is_stored_is_not_computed_again(tmp_path: Path, model: list[int]) -> None:
    config = study()
    with Store(tmp_path, create=True).writing() as store:
        fill(store, VALUES[:4])
        store_order(store, config, proposer(config), is_over=False)
        store_order(store, config, proposer(config), is_over=True)
        assert model == [4]
        fill(store)  # a fifth
        store_order(store, config, proposer(config), is_over=True)
        assert model == [4, 5]


def test_a_score_is_stored_as_the_user_has_it(tmp_path: Path, model: list[int]) -> None:
    feedback = {"kind": "lm_eval", "tasks": {"x": 1.0}, "direction": "maximize"}
    config = study(feedback=feedback)
    with Store(tmp_path, create=True).writing() as store:
        fill(store)
        store_order(store, config, proposer(config), is_over=True)
        assert store.posterior()[3] == (-1.0, 0.5)
        assert store.ranking()[0][0] == 3, "the model's losses rank"
        assert best_trials(store.trials(), config, 1)[0].number == 0, "the largest score"


def test_cheap_trials_and_repeats_are_no_finalists(tmp_path: Path, model: list[int]) -> None:
    config = study(search__fidelity={"rows": [0.5]})
    with Store(tmp_path, create=True).writing() as store:
        fill(store, fidelities={3: 0.5, 2: 0.5})
        store.add_trial(5, "search", Ratio(counts=POINTS[1]), "bayesian:lcb")
        store.add_observation(5, Observation(value=2.5, k=1, k_used=1, best_sample=0))
        store_order(store, config, proposer(config), is_over=True)
        ranking, told = store.ranking()
        assert told == set(range(6))
        assert ranking == [5, 0, 4], "5 is the better one of the two at one point"
        assert [t.number for t in finalists(store.trials(), ranking, config)] == [5, 0, 4]


def test_past_runs_shape_the_model_and_are_never_finalists(tmp_path: Path, model: list[int]) -> None:
    config = study()
    with Store(tmp_path, create=True).writing() as store:
        fill(store)
        store.add_past_runs([PastRun(counts=POINTS[3], value=0.0, source="a.csv:2")])
        store_order(store, config, proposer(config), is_over=True)
        assert model == [6]
        assert store.ranking()[0] == [3, 1, 2, 0, 4]


def test_where_the_model_fails_the_observations_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> list[Standing]:
        raise RuntimeError("the covariance is not positive definite")

    monkeypatch.setattr(recommend, "standings", broken)
    config = study()
    with Store(tmp_path, create=True).writing() as store:
        fill(store, [5.0, 3.0, None, 4.0, 2.0])
        store_order(store, config, proposer(config), is_over=True)
        assert store.posterior() == {}, "there is none"
        assert store.ranking() == ([4, 1, 3, 0], {0, 1, 3, 4})
        assert [t.number for t in finalists(store.trials(), store.ranking()[0], config)] == [4, 1, 0]


def test_two_observations_are_too_few_for_a_model(tmp_path: Path) -> None:
    config = study()
    with Store(tmp_path, create=True).writing() as store:
        fill(store, VALUES[:2])
        store_order(store, config, proposer(config), is_over=True)
        assert store.posterior() == {}
        assert store.ranking() == ([1, 0], {0, 1})


def test_a_point_that_no_trial_had(tmp_path: Path, model: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    config = study(search__recommend="anywhere")
    found = Point(ratio=Ratio(counts=(18, 3, 3)), settings=())
    monkeypatch.setattr(recommend, "anywhere", lambda *_: found)
    with Store(tmp_path, create=True).writing() as store:
        fill(store, VALUES[:4])
        store_order(store, config, proposer(config), is_over=False)
        assert all(t.number < CONFIRM_FIRST for t in store.trials()), "the search goes on"
        store_order(store, config, proposer(config), is_over=True)
        store_order(store, config, proposer(config), is_over=True)
        last = store.trials()[-1]
        assert (last.number, last.method, last.ratio) == (CONFIRM_ANYWHERE, "confirm:anywhere", found.ratio)
        assert to_confirm(store, config)[-1].number == CONFIRM_ANYWHERE
        # The search has gone on since, and finds another one.
        found = Point(ratio=Ratio(counts=(19, 3, 2)), settings=())
        fill(store)
        store_order(store, config, proposer(config), is_over=True)
        assert to_confirm(store, config)[-1].number == CONFIRM_ANYWHERE + 1
        found = Point(ratio=Ratio(counts=POINTS[3]), settings=())
        order = order_of(store.trials(), [], proposer(config), config, anywhere=True)
        assert order.anywhere is None, "a trial has it"


def test_a_larger_look_is_had_at_the_untouched_model_too(tmp_path: Path, model: list[int]) -> None:
    feedback = {"kind": "heldout_loss", "file": "data/task.jsonl", "limit": 4}
    config = study(feedback=feedback, confirm={"finalists": 1, "limit": 8})
    with Store(tmp_path, create=True).writing() as store:
        fill(store)
        store_order(store, config, proposer(config), is_over=True)
        last = to_confirm(store, config)[-1]
        assert (last.number, last.method, last.ratio) == (CONFIRM_BASE, "confirm:base", None)
        assert last.spec(0).key == "cbase-s0"


def test_a_real_model(tmp_path: Path) -> None:
    """A valley at 12 of 24 rows for the first domain, and one observation that was lucky far from it."""
    config = study()
    with Store(tmp_path, create=True).writing() as store:
        for number, first in enumerate([0, 4, 8, 10, 12, 14, 16, 20, 24]):
            rest = 24 - first
            ratio = Ratio(counts=(first, rest // 2, rest - rest // 2))
            store.add_trial(number, "start", ratio, "random")
            value = ((first - 12) / 12) ** 2 - (0.05 if number == 6 else 0.0)
            store.add_observation(number, Observation(value=value, k=1, k_used=1, best_sample=0))
        store_order(store, config, proposer(config), is_over=True)
        ranking, _ = store.ranking()
        assert ranking[0] in (3, 4, 5)
        assert set(store.posterior()) == set(range(9))
        assert all(sd > 0 for _, sd in store.posterior().values())
