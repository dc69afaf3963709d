"""The searcher between Tune, the proposer and the store; no Ray is started."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from duet_ray.budget import spent
from duet_ray.config import StudyConfig, config_from
from duet_ray.errors import ResourceError
from duet_ray.execution.searcher import StudySearcher
from duet_ray.records import Observation, PastRun, Point, Ratio, SampleResult
from duet_ray.search import Proposal, Told
from duet_ray.store import Store
from tests.toy_study import toy_data


@dataclass
class ScriptedProposer:
    """Proposes trial t's own ratio, and remembers what it was told."""

    calls: list[tuple[int, list[int], list[int]]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    told: list[Told] = field(default_factory=list)
    script: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Trial → what its proposal says beside the ratio."""

    def propose(self, trial: int, told: Sequence[Told], pending: Sequence[Point]) -> Proposal:
        self.calls.append((trial, [t.ratio.counts[0] for t in told], [p.ratio.counts[0] for p in pending]))
        self.told, self.losses = list(told), [t.loss for t in told]
        ratio = Ratio(counts=(trial, 10, 14 - trial))
        return Proposal(ratio=ratio, method="scripted", seconds=0.0, **self.script.get(trial, {}))


def _config(**changes: Any) -> StudyConfig:
    return config_from(toy_data(**changes), folder=Path())


ENDED = {"ended": 1}


def _store_samples(store: Store, number: int, *values: float | None, metrics: dict[str, float] | None = None) -> None:
    """What the driver does before a trial is reduced: store the samples that have ended."""
    trial = next(t for t in store.trials() if t.number == number)
    for sample, value in enumerate(values):
        reason = None if value is not None else "NaN"
        store.add_sample(SampleResult(spec=trial.spec(sample), value=value, reason=reason, metrics=metrics or {}))


def _searcher(
    store: Store, config: StudyConfig, script: dict[int, dict[str, Any]] | None = None
) -> tuple[StudySearcher, ScriptedProposer]:
    proposer = ScriptedProposer(script=script or {})
    return StudySearcher(proposer, config, store), proposer  # type: ignore[arg-type]


def test_a_study_one_by_one(tmp_path: Path) -> None:
    with Store(tmp_path, create=True).writing() as store:
        searcher, proposer = _searcher(store, _config())
        for number in range(5):
            suggested = searcher.suggest(f"id{number}")
            assert suggested["trial"] == number
            assert suggested["spec"]["kind"] == ("start" if number < 3 else "search")
            assert searcher.suggest("too early") == (None if number < 4 else "FINISHED")
            _store_samples(store, number, number + 0.5, float(number))
            searcher.on_trial_complete(f"id{number}", ENDED)
        assert searcher.suggest("after the end") == "FINISHED"
        # Proposal t has been told all t observations before it, and nothing is pending.
        assert proposer.calls == [(t, list(range(t)), []) for t in range(5)]
        assert [t.observation.value for t in store.trials() if t.observation] == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_with_two_at_once_time_does_not_decide(tmp_path: Path) -> None:
    """Proposal t sees the trials up to t − 2 as finished and t − 1 as pending, whoever ends first."""
    with Store(tmp_path, create=True).writing() as store:
        searcher, proposer = _searcher(store, _config(search__concurrent_trials=2))
        assert searcher.suggest("a")["trial"] == 0
        assert searcher.suggest("b")["trial"] == 1
        _store_samples(store, 1, 1.0, 2.0)
        searcher.on_trial_complete("b", ENDED)
        assert searcher.suggest("c") is None, "trial 2 waits for trial 0, although trial 1 was quicker"
        _store_samples(store, 0, 0.0, 2.0)
        searcher.on_trial_complete("a", ENDED)
        assert searcher.suggest("c")["trial"] == 2
        assert searcher.suggest("d")["trial"] == 3
        assert proposer.calls == [(0, [], []), (1, [], [0]), (2, [0], [1]), (3, [0, 1], [2])]


def test_the_direction_is_turned_on_the_way_in(tmp_path: Path) -> None:
    feedback = {"kind": "lm_eval", "tasks": {"x": 1.0}, "direction": "maximize"}
    with Store(tmp_path, create=True).writing() as store:
        searcher, proposer = _searcher(store, _config(feedback=feedback))
        searcher.suggest("a")
        _store_samples(store, 0, 0.75, 0.5)
        searcher.on_trial_complete("a", ENDED)
        searcher.suggest("b")
        assert proposer.losses == [-0.75]
        assert store.trials()[0].observation.value == 0.75  # type: ignore[union-attr]


def test_a_failed_trial_is_no_observation_and_its_ratio_is_avoided(tmp_path: Path) -> None:
    with Store(tmp_path, create=True).writing() as store:
        searcher, proposer = _searcher(store, _config())
        searcher.suggest("a")
        _store_samples(store, 0, None, None)
        searcher.on_trial_complete("a", ENDED)
        searcher.suggest("b")
        _store_samples(store, 1, None, 3.0)
        searcher.on_trial_complete("b", ENDED)
        searcher.suggest("c")
        assert proposer.calls[2] == (2, [1], [0])
        first, second, _ = store.trials()
        assert (first.status, first.reason) == ("failed", "NaN (2 of 2 samples)")
        assert second.observation == Observation(value=3.0, k=2, k_used=1, best_sample=1)


def test_each_trial_has_as_many_samples_as_it_was_given(tmp_path: Path) -> None:
    config = _config(sampling={"k": "auto", "k_bounds": [1, 3]})
    with Store(tmp_path, create=True).writing() as store:
        searcher, _ = _searcher(store, config, {0: {"k": 1}, 1: {"k": 3}})
        first = searcher.suggest("a")
        assert (first["k"], first["missing"]) == (1, [0])
        _store_samples(store, 0, 2.0)
        searcher.on_trial_complete("a", ENDED)
        assert store.trials()[0].observation == Observation(value=2.0, k=1, k_used=1, best_sample=0)
        assert searcher.suggest("b")["missing"] == [0, 1, 2]
        _store_samples(store, 1, 1.0)
        resumed, proposer = _searcher(store, config)
        assert resumed.suggest("b again")["missing"] == [1, 2], "its k is stored"
        _store_samples(store, 1, 1.0, 0.5, None)
        resumed.on_trial_complete("b again", ENDED)
        resumed.suggest("c")
        assert [(t.k_used, t.samples) for t in proposer.told] == [(1, (2.0,)), (2, (1.0, 0.5))]


def test_cheap_trials_spend_a_share_of_the_budget(tmp_path: Path) -> None:
    """5 whole trials' worth: 1 + 8 · 0.25 of the start design (3 whole), then one whole trial and four quarters."""
    config = _config(search__fidelity={"rows": [0.25]})
    script = {t: {"fidelity": 1.0 if t in (0, 9) else 0.25} for t in range(20)}
    with Store(tmp_path, create=True).writing() as store:
        searcher, _ = _searcher(store, config, script)
        n = 0
        while (suggested := searcher.suggest(f"id{n}")) != "FINISHED":
            assert suggested["spec"]["kind"] == ("start" if n < 9 else "search")
            _store_samples(store, n, 1.0, 2.0)
            searcher.on_trial_complete(f"id{n}", ENDED)
            n += 1
            searcher, _ = _searcher(store, config, script)  # as every resume would go on
        assert n == 14
        assert spent(store.trials()) == 5
        assert [t.fidelity for t in store.trials()] == [script[t]["fidelity"] for t in range(14)]


def test_the_proposer_is_told_all_that_a_trial_was(tmp_path: Path) -> None:
    """Past runs first; settings, fidelity, and other metrics as losses, each in its own direction."""
    side = {"kind": "function", "function": "side:effect", "direction": "maximize", "name": "safety"}
    config = _config(also=[side], search__also={"training.rank": {"choices": [2, 8]}}, search__optimize="both")
    settings = (("training.rank", 8),)
    with Store(tmp_path, create=True).writing() as store:
        store.add_past_runs([PastRun(counts=(20, 2, 2), value=9.0, sem=0.5, fidelity=0.5, source="runs.csv:2")])
        searcher, proposer = _searcher(store, config, {0: {"settings": settings, "fidelity": 0.5}})
        searcher.suggest("a")
        assert [(t.loss, t.sem, t.fidelity, t.k_used, t.settings) for t in proposer.told] == [(9.0, 0.5, 0.5, 1, ())]
        _store_samples(store, 0, 2.0, 1.5, metrics={"safety": 0.75, "shown": 3.0})
        searcher.on_trial_complete("a", ENDED)
        searcher.suggest("b")
        past, own = proposer.told
        assert past.ratio.counts == (20, 2, 2)
        assert own == Told(
            ratio=Ratio(counts=(0, 10, 14)),
            loss=1.5,
            settings=settings,
            fidelity=0.5,
            k_used=2,
            samples=(2.0, 1.5),
            others={"heldout_loss_loss": 1.5, "safety": -0.75},
        )


def test_a_dead_tune_trial_does_not_throw_its_samples_away(tmp_path: Path) -> None:
    with Store(tmp_path, create=True).writing() as store:
        searcher, _ = _searcher(store, _config())
        searcher.suggest("a")
        _store_samples(store, 0, 1.0, 2.0)
        searcher.on_trial_complete("a", None, error=True)
        assert store.trials()[0].observation == Observation(value=1.0, k=2, k_used=2, best_sample=0)


def test_a_tune_trial_that_dies_too_early_is_said_and_its_trial_stays_pending(tmp_path: Path) -> None:
    with Store(tmp_path, create=True).writing() as store:
        searcher, _ = _searcher(store, _config())
        searcher.suggest("a")
        _store_samples(store, 0, 1.0)
        with pytest.raises(ResourceError, match="Ray ended trial t0000 before its samples; the same command goes on"):
            searcher.on_trial_complete("a", None, error=True)
        assert isinstance(searcher.error, ResourceError)
        assert store.trials()[0].status == "pending"


def test_a_stopped_trial_is_taken_up_again_with_its_ratio_and_what_is_missing(tmp_path: Path) -> None:
    with Store(tmp_path, create=True).writing() as store:
        ending: list[int] = []
        proposer = ScriptedProposer()
        searcher = StudySearcher(proposer, _config(), store, is_ending=lambda: bool(ending))  # type: ignore[arg-type]
        interrupted = searcher.suggest("a")
        assert interrupted["missing"] == [0, 1]
        _store_samples(store, 0, 1.0)
        ending.append(1)
        searcher.on_trial_complete("a", ENDED)
        assert searcher.suggest("no more") == "FINISHED"
        resumed, proposer = _searcher(store, _config())
        assert resumed.suggest("a again") == {**interrupted, "missing": [1]}
        assert proposer.calls == [], "a ratio that is stored is not proposed anew"


def test_tune_pickles_nothing_of_it(tmp_path: Path) -> None:
    with Store(tmp_path, create=True).writing() as store:
        searcher, _ = _searcher(store, _config())
        assert searcher.__getstate__() == {}
        with pytest.raises(NotImplementedError, match="from its store"):
            searcher.restore("anywhere")
