"""Leases, retries and outcomes, without Ray."""

import time
from typing import Any

import pytest

from duet_ray.execution.broker import (
    LONG_SECONDS,
    SILENCE_SECONDS,
    STALL_SECONDS,
    START_SECONDS,
    Broker,
    Place,
    Task,
)
from duet_ray.records import Ratio, SampleSpec

PLACE = Place(node="here", pid=42, started=1.0)


def _broker(*keys: str, max_retries: int = 1) -> Broker:
    broker = Broker(max_retries)
    broker.submit([Task(key=key, kind="score", domain=0) for key in keys])
    return broker


def _lease(broker: Broker, group: int = 0, incarnation: str = "a") -> tuple[str, int]:
    broker.register(group, incarnation)
    verdict, leased = broker.lease(group, incarnation)
    assert verdict == "task"
    [(task, number)] = leased
    return task.key, number


def _later(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + seconds)


def test_tasks_go_out_once_and_in_order() -> None:
    broker = _broker("x", "y")
    broker.submit([Task(key="x", kind="score", domain=0)])
    assert [_lease(broker, 0)[0], _lease(broker, 1)[0]] == ["x", "y"]
    assert broker.lease(0, "a") == ("wait", ())
    assert broker.outcomes(["x"]) is None


def test_a_result_is_taken_once_from_the_holder_of_the_lease() -> None:
    broker = _broker("x")
    key, number = _lease(broker)
    assert broker.complete(key, number, {"value": 1})
    assert not broker.complete(key, number, {"value": 2})
    outcomes = broker.outcomes(["x"])
    assert outcomes is not None
    assert outcomes[0].result == {"value": 1}


def test_a_group_that_comes_back_gets_its_task_again_and_its_orphan_is_refused() -> None:
    broker = _broker("x", "y")
    key, number = _lease(broker, 0, "first life")
    again, second = _lease(broker, 0, "second life")
    assert again == key == "x"
    assert not broker.complete(key, number, {"value": "from the orphan"})
    assert broker.lease(0, "first life")[0] == "lost"
    assert broker.complete(again, second, {"value": "mine"})
    outcomes = broker.outcomes(["x"])
    assert outcomes is not None
    assert (outcomes[0].result, outcomes[0].n_retries) == ({"value": "mine"}, 1)


def test_another_group_is_untouched_by_a_death() -> None:
    broker = _broker("x", "y")
    _lease(broker, 0)
    key, number = _lease(broker, 1)
    broker.group_lost(0)
    assert broker.complete(key, number, {})
    assert _lease(broker, 1)[0] == "x"


def test_retries_are_bounded_and_then_the_task_has_failed() -> None:
    broker = _broker("x", max_retries=2)
    for _ in range(3):
        key, number = _lease(broker)
        broker.retry(key, number, "no network")
    outcomes = broker.outcomes(["x"])
    assert outcomes is not None
    assert (outcomes[0].status, outcomes[0].reason) == ("failed", "no network after 2 retries")
    assert broker.lease(0, "a")[0] == "wait"


def test_trouble_stops_everything_and_records_nothing() -> None:
    broker = _broker("x", "y", "z")
    key, number = _lease(broker)
    assert broker.complete(key, number, {})
    _lease(broker)
    broker.close("the disk is full")
    broker.close("a later thought")
    outcomes = broker.outcomes(["x", "y", "z"])
    assert outcomes is not None
    assert [o.status for o in outcomes] == ["done", "stopped", "stopped"]
    assert broker.trouble() == "the disk is full"
    assert broker.lease(0, "a")[0] == "stop"
    broker.submit([Task(key="late", kind="score", domain=0)])
    assert broker.outcomes(["late"]) is not None


def test_the_driver_reads_each_outcome_once() -> None:
    broker = _broker("x", "y")
    for expected in ("x", "y"):
        key, number = _lease(broker)
        broker.progress(key, number, "training", 1, 2)
        assert [(t.task.key, t.text) for t in broker.in_flight()] == [(expected, "training 1/2")]
        broker.complete(key, number, {})
    assert [o.task.key for o in broker.finished_since(0)] == ["x", "y"]
    assert [o.task.key for o in broker.finished_since(1)] == ["y"]
    assert broker.in_flight() == ()


def test_the_pulse_is_all_in_one_call() -> None:
    broker = _broker("x", "y")
    key, number = _lease(broker, 0)
    broker.complete(key, number, {})
    _lease(broker, 1)
    pulse = broker.pulse(0, lost=[])
    assert [o.task.key for o in pulse.finished] == ["x"]
    assert [t.task.key for t in pulse.in_flight] == ["y"]
    pulse = broker.pulse(1, lost=[1])
    assert not pulse.finished
    assert not pulse.in_flight, "its group is lost: it waits to be leased again"
    assert _lease(broker, 0)[0] == "y"


def test_a_silent_group_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    broker = _broker("x")
    key, number = _lease(broker, 0)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + SILENCE_SECONDS - 1)
    broker.sweep()
    assert broker.in_flight(), "not yet"
    assert broker.beat(0, "a") == "go on"
    monkeypatch.setattr(time, "monotonic", lambda: now + 2 * SILENCE_SECONDS - 2)
    broker.sweep()
    assert broker.in_flight(), "it was heard of"
    monkeypatch.setattr(time, "monotonic", lambda: now + 3 * SILENCE_SECONDS)
    broker.sweep()
    assert not broker.in_flight()
    assert not broker.complete(key, number, {})
    assert _lease(broker, 1)[0] == "x"


def test_no_group_ever_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    broker = _broker("x")
    broker.sweep()
    assert broker.trouble() is None
    later = time.monotonic() + START_SECONDS + 1
    monkeypatch.setattr(time, "monotonic", lambda: later)
    broker.sweep()
    assert "no group of the fleet has started within 15 minutes" in (broker.trouble() or "")


def test_a_group_that_dies_at_every_start_is_named() -> None:
    broker = _broker("x", "y", max_retries=1)
    for life in range(4):
        _lease(broker, 3, f"life {life}")
    assert broker.trouble() is None, "x, which killed it twice, has failed; y may be as bad"
    broker.register(3, "once more")
    assert "group 3 started 4 times and died each time before it finished anything" in (broker.trouble() or "")


def test_one_bad_group_among_good_ones_is_given_up() -> None:
    """A node that kills whatever starts there is no reason to stop a study that has others."""
    broker = _broker(*"abcdefghij", max_retries=100)
    _lease(broker, 0, "good")
    broker.ready(0)
    for life in range(203):
        assert broker.trouble() is None
        broker.register(3, f"life {life}")
    assert broker.lease(3, "life 202")[0] == "stop", "it leaves"
    assert broker.beat(0, "good") == "go on"
    pulse = broker.pulse(0, [])
    assert broker.trouble() is None
    assert [reason.split(" and ")[0] for reason in pulse.given_up] == ["group 3 started 202 times"]
    assert broker.pulse(0, []).given_up == (), "it is said once"
    for life in range(203):
        broker.register(0, f"life {life}")
    assert "group 0 started 202 times" in (broker.trouble() or ""), "the last one is not given up in silence"


def test_when_every_node_is_gone_the_study_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    broker = _broker("x", "y", max_retries=5)
    _lease(broker)
    _later(monkeypatch, SILENCE_SECONDS + 1)
    broker.sweep()
    assert broker.in_flight() == (), "its group was silent"
    assert broker.trouble() is None, "another node may come"
    _later(monkeypatch, START_SECONDS)
    broker.sweep()
    assert "no group of the fleet is alive for 15 minutes" in (broker.trouble() or "")
    assert broker.outcomes(["x"]) is not None, "nobody waits for it any more"


def test_a_group_that_finishes_things_may_die_often() -> None:
    broker = _broker(*"abcdefghij", max_retries=100)
    for life in range(10):
        key, number = _lease(broker, 0, f"life {life}")
        assert broker.complete(key, number, {})
    assert broker.trouble() is None


def test_a_model_that_no_group_can_load_ends_the_study_and_one_bad_restart_does_not() -> None:
    first = _broker("x")
    first.cannot_start(0, "no such model")
    assert first.trouble() == "no such model"
    second = _broker("x")
    second.ready(1)
    second.cannot_start(0, "out of memory")
    assert second.trouble() is None


def test_no_feedback_pauses_the_study_and_fails_no_sample() -> None:
    broker = _broker("x", max_retries=1)
    for _ in range(2):
        key, number = _lease(broker)
        broker.retry_or_close(key, number, "no feedback: the service is away")
    outcomes = broker.outcomes(["x"])
    assert outcomes is not None
    assert outcomes[0].status == "stopped"
    assert (broker.trouble() or "").startswith("no feedback: the service is away. The models are kept")


def spec(sample: int) -> SampleSpec:
    return SampleSpec(trial=0, sample=sample, kind="start", ratio=Ratio(counts=(1, 1)))


def _bundles(k: int, size: int) -> list[Task]:
    specs = [spec(s) for s in range(k)]
    cut = [tuple(specs[i : i + size]) for i in range(0, k, size)]
    return [Task(key=s.key, kind="sample", spec=s, bundle=bundle) for bundle in cut for s in bundle]


def test_samples_that_train_in_one_pass_go_to_one_group_and_end_one_by_one() -> None:
    broker = Broker(max_retries=1)
    broker.submit(_bundles(4, 2))
    broker.register(0, "a")
    broker.register(1, "b")
    _, first = broker.lease(0, "a")
    _, second = broker.lease(1, "b")
    assert [[t.key for t, _ in leased] for leased in (first, second)] == [
        ["t0000-s0", "t0000-s1"],
        ["t0000-s2", "t0000-s3"],
    ]
    assert broker.complete(first[0][0].key, first[0][1], {})
    broker.group_lost(0)
    _, again = broker.lease(1, "b")
    assert [t.key for t, _ in again] == ["t0000-s1"], "what is done is done"
    assert again[0][0].bundle == (spec(0), spec(1))
    broker.group_lost(1)
    _, both = broker.lease(0, "a")
    assert [t.key for t, _ in both] == ["t0000-s2", "t0000-s3"], "in their old order, together again"


def test_a_task_that_takes_too_long_is_given_away_and_its_processes_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    broker = Broker(max_retries=1, max_seconds=100)
    broker.submit([Task(key="x", kind="score", domain=0)])
    broker.register(0, "a", 0, PLACE)
    _, [(task, number)] = broker.lease(0, "a")
    _later(monkeypatch, 50)
    assert broker.beat(0, "a") == "go on"
    assert broker.pulse(0, []).hung == ()
    _later(monkeypatch, 51)
    assert broker.beat(0, "a") == "go on", "it lives, which does not help"
    assert broker.pulse(0, []).hung == (PLACE,)
    assert broker.pulse(0, []).hung == (), "once"
    assert broker.beat(0, "a") == "lost"
    assert broker.lease(0, "a") == ("lost", ())
    assert not broker.complete(task.key, number, {})
    broker.register(0, "a new life", 0, PLACE)
    _, [(_, number)] = broker.lease(0, "a new life")
    _later(monkeypatch, 101)
    broker.beat(0, "a new life")
    broker.sweep()
    [outcome] = broker.finished_since(0)
    assert (outcome.status, outcome.reason) == (
        "failed",
        "it took longer than 1.67 minutes (fleet.max_task_minutes) after 1 retry",
    )


def test_without_a_limit_a_quick_task_says_nothing_and_ten_times_the_longest_is_too_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broker = _broker("quick", "long", "longer")

    def still_leased_after(seconds: float) -> bool:
        _later(monkeypatch, seconds)
        broker.beat(0, "a")
        broker.sweep()
        return bool(broker.in_flight())

    assert broker.complete(*_lease(broker), {})
    long = _lease(broker)
    assert still_leased_after(LONG_SECONDS - 1)
    assert broker.complete(*long, {})
    _lease(broker)
    assert still_leased_after(10 * LONG_SECONDS - 20)
    assert not still_leased_after(20)


def test_a_training_that_makes_no_step_any_more_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    broker = Broker(max_retries=3)
    broker.submit([Task(key="s", kind="sample", spec=spec(0))])
    broker.register(0, "a", 0, PLACE)
    _, [(task, number)] = broker.lease(0, "a")

    def goes_on_after(seconds: float, *progress: Any) -> bool:
        _later(monkeypatch, seconds)
        if progress:
            broker.progress(task.key, number, *progress)
        broker.beat(0, "a")
        broker.sweep()
        return bool(broker.in_flight())

    assert goes_on_after(2 * STALL_SECONDS), "loading and drawing make no steps"
    assert goes_on_after(1, "training", 1, 4)
    assert goes_on_after(STALL_SECONDS), "a first step may compile, or wait for another node"
    assert goes_on_after(0, "training", 2, 4)
    assert goes_on_after(300, "training", 3, 4), "its longest step took STALL_SECONDS"
    assert goes_on_after(19 * STALL_SECONDS)
    assert not goes_on_after(2 * STALL_SECONDS)
    assert broker.pulse(0, []).hung == (PLACE,)


def test_feedback_takes_as_long_as_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    broker = Broker(max_retries=3)
    broker.submit([Task(key="s", kind="sample", spec=spec(0))])
    broker.register(0, "a")
    _, [(task, number)] = broker.lease(0, "a")
    for step in (1, 2, 3):
        broker.progress(task.key, number, "training", step, 3)
    _later(monkeypatch, 9 * STALL_SECONDS)
    broker.beat(0, "a")
    broker.sweep()
    assert broker.in_flight()


def test_only_the_task_under_way_pays_for_a_death() -> None:
    broker = Broker(max_retries=1)
    broker.submit(_bundles(2, 2))
    for life in "ab":
        broker.register(0, life)
        broker.lease(0, life)
    broker.group_lost(0)
    assert [(o.task.key, o.status) for o in broker.finished_since(0)] == [("t0000-s0", "failed")]
    broker.register(0, "d")
    _, [(other, number)] = broker.lease(0, "d")
    assert broker.complete(other.key, number, {})
    assert [(o.task.key, o.n_retries) for o in broker.finished_since(1)] == [("t0000-s1", 0)]


def test_one_silent_process_makes_its_group_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    broker = _broker("x")
    for rank in (0, 1):
        broker.register(0, "a", rank, Place(node="here", pid=rank, started=1.0))
    broker.lease(0, "a")
    _later(monkeypatch, SILENCE_SECONDS + 1)
    broker.beat(0, "a", 0)
    assert {place.pid for place in broker.pulse(0, []).hung} == {0, 1}
    assert not broker.in_flight()


def test_the_other_processes_of_a_group_hear_what_to_do_in_order_and_a_new_life_starts_afresh() -> None:
    broker = _broker("x")
    broker.register(0, "a", 0)
    broker.register(0, "a", 1)
    assert broker.commanded(0, "a", 0) == ("wait", None)
    broker.command(0, "a", "first")
    broker.command(0, "a", "second")
    assert [broker.commanded(0, "a", i) for i in range(3)] == [("do", "first"), ("do", "second"), ("wait", None)]
    broker.register(0, "b", 1)
    assert broker.commanded(0, "a", 2) == ("lost", None)
    broker.command(0, "a", "from the old life")
    assert broker.commanded(0, "b", 0) == ("wait", None)
    broker.close()
    assert broker.commanded(0, "b", 0)[0] == "stop"


def test_a_task_whose_result_is_known_is_settled_once() -> None:
    broker = Broker(max_retries=0)
    task = Task(key="x", kind="sample", spec=spec(0))
    broker.settle(task, {"value": 1})
    broker.settle(task, {"value": 2})
    broker.submit([task])
    assert [(o.status, o.result) for o in broker.finished_since(0)] == [("done", {"value": 1})]
