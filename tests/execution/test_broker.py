"""Leases, retries and outcomes, without Ray."""

import time

import pytest

from duet_ray.execution.broker import MAX_BARREN_STARTS, SILENCE_SECONDS, START_SECONDS, Broker, Task


def _broker(*keys: str, max_retries: int = 1) -> Broker:
    broker = Broker(max_retries)
    broker.submit([Task(key=key, kind="score", domain=0) for key in keys])
    return broker


def _lease(broker: Broker, group: int = 0, incarnation: str = "a") -> tuple[str, int]:
    broker.register(group, incarnation)
    verdict, task, number = broker.lease(group, incarnation)
    assert verdict == "task"
    assert task is not None
    return task.key, number


def test_tasks_go_out_once_and_in_order() -> None:
    broker = _broker("x", "y")
    broker.submit([Task(key="x", kind="score", domain=0)])
    assert [_lease(broker, 0)[0], _lease(broker, 1)[0]] == ["x", "y"]
    assert broker.lease(0, "a") == ("wait", None, 0)
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
    assert broker.lease(0, "first life")[0] == "stop"
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
    broker.beat(0)
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
    broker = _broker("x", max_retries=100)
    for life in range(MAX_BARREN_STARTS):
        _lease(broker, 3, f"life {life}")
    assert broker.trouble() is None
    broker.register(3, "once more")
    assert "group 3 started 4 times and died each time before it finished anything" in (broker.trouble() or "")


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
