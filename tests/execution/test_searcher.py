"""The searcher between Tune, the proposer and the store; no Ray is started."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from duet_ray.config import StudyConfig, config_from
from duet_ray.errors import ResourceError
from duet_ray.execution.searcher import StudySearcher
from duet_ray.records import Observation, Ratio, SampleResult, SampleSpec
from duet_ray.search import Proposal, Told
from duet_ray.store import Store
from tests.toy_study import toy_data


@dataclass
class ScriptedProposer:
    """Proposes trial t's own ratio, and remembers what it was told."""

    calls: list[tuple[int, list[int], list[int]]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def propose(self, trial: int, told: Sequence[Told], pending: Sequence[Ratio]) -> Proposal:
        self.calls.append((trial, [t.ratio.counts[0] for t in told], [p.counts[0] for p in pending]))
        self.losses = [t.loss for t in told]
        return Proposal(ratio=Ratio(counts=(trial, 10, 14 - trial)), method="scripted", seconds=0.0)


def _config(**changes: Any) -> StudyConfig:
    return config_from(toy_data(**changes), folder=Path())


ENDED = {"ended": 1}


def _store_samples(store: Store, number: int, *values: float | None) -> None:
    """What the driver does before a trial is reduced: store the samples that have ended."""
    trial = next(t for t in store.trials() if t.number == number)
    for sample, value in enumerate(values):
        spec = SampleSpec(trial=number, sample=sample, kind=trial.kind, ratio=trial.ratio)
        store.add_sample(SampleResult(spec=spec, value=value, reason=None if value is not None else "NaN"))


def _searcher(store: Store, config: StudyConfig) -> tuple[StudySearcher, ScriptedProposer]:
    proposer = ScriptedProposer()
    return StudySearcher(proposer, config, store), proposer  # type: ignore[arg-type]


def test_a_study_one_by_one(tmp_path: Path) -> None:
    with Store(tmp_path, create=True).writing() as store:
        searcher, proposer = _searcher(store, _config())
        for number in range(5):
            suggested = searcher.suggest(f"id{number}")
            assert suggested["trial"] == number
            assert suggested["kind"] == ("start" if number < 3 else "search")
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
