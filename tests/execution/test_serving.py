"""What a process of a group does when things around it break: with the real broker, without Ray."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from duet_ray import files
from duet_ray.execution import serving
from duet_ray.execution.broker import Broker, Task
from duet_ray.execution.serving import BrokerGone, Seat, serve
from duet_ray.execution.worker import Assignment
from duet_ray.records import Ratio, SampleResult, SampleSpec
from tests.light.platform import LightPlatform
from tests.toy_study import toy_data

SPECS = [SampleSpec(trial=0, sample=s, kind="start", ratio=Ratio(counts=(8, 8, 8))) for s in range(6)]
TASKS = [Task(key=spec.key, kind="sample", spec=spec) for spec in SPECS]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(serving, "LONGEST_WAIT", 0.02)


@pytest.fixture
def assignment(tmp_path: Path) -> Assignment:
    study = tmp_path / "studies" / "toy"
    study.mkdir(parents=True)
    (study / "study.yaml").touch()
    return Assignment(
        config=toy_data(),
        folder=str(tmp_path),
        domain_folders=(),
        scoring_folders=(),
        weights_folder=str(tmp_path),
        weights_keys=(),
    )


class StubWorker:
    """Every sample takes a moment; in the groups named bad, it breaks."""

    others_wait = False
    bad: frozenset[int] = frozenset()

    def __init__(self, _assignment: Assignment, on_follow: Callable[..., None]) -> None:
        self._group = getattr(threading.current_thread(), "group", 0)

    def preload(self) -> None:
        pass

    def do_sample(self, spec: SampleSpec, lease: int, *_: Any, **__: Any) -> SampleResult:
        time.sleep(0.05)
        if self._group in self.bad:
            raise OSError(116, "Stale file handle")
        return SampleResult(spec=spec, value=1.0, lease=lease)


def run_groups(
    broker: Broker, assignment: Assignment, n_groups: int, ask: Callable[..., Any]
) -> list[threading.Thread]:
    """Groups that start anew as long as the broker wants them."""

    def loop(group: int) -> None:
        threading.current_thread().group = group  # type: ignore[attr-defined]
        life = 0
        while broker.wants(group):
            life += 1
            seat = Seat(ask=ask, tell=lambda *_: None, group=group, incarnation=f"{group}-{life}")
            try:
                serve(seat, assignment, make_worker=StubWorker)  # type: ignore[arg-type]
            except Exception:
                time.sleep(0.01)

    threads = [threading.Thread(target=loop, args=(group,), daemon=True) for group in range(n_groups)]
    for thread in threads:
        thread.start()
    return threads


def wait_for(condition: Callable[[], Any], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def locked(broker: Broker) -> Callable[..., Any]:
    lock = threading.RLock()

    def ask(method: str, *arguments: Any) -> Any:
        with lock:
            return getattr(broker, method)(*arguments)

    return ask


def test_a_sick_group_fails_no_sample_while_another_is_well(
    assignment: Assignment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stale share or a broken device makes every task fail at once: it is for another group to do them."""
    monkeypatch.setattr(StubWorker, "bad", frozenset({1}))
    broker = Broker(max_retries=3, n_groups=2)
    ask = locked(broker)
    threads = run_groups(broker, assignment, 2, ask)
    ask("submit", TASKS)
    wait_for(lambda: ask("outcomes", [task.key for task in TASKS]))
    assert [o.status for o in ask("outcomes", [task.key for task in TASKS])] == ["done"] * len(TASKS)
    ask("close")
    for thread in threads:
        thread.join(timeout=10)
        assert not thread.is_alive()


def test_a_group_that_is_alone_and_sick_is_given_its_task_again_and_then_it_fails(assignment: Assignment) -> None:
    broker = Broker(max_retries=1)
    broker.submit(TASKS[:1])
    for life in ("a", "b"):
        broker.register(0, life)
        verdict, [(task, lease)] = broker.lease(0, life)
        assert verdict == "task"
        broker.retry(task.key, lease, "stale")
    [outcome] = broker.outcomes([TASKS[0].key]) or []
    assert (outcome.status, outcome.reason) == ("failed", "stale after 1 retry")


def test_a_lost_call_is_no_end(assignment: Assignment) -> None:
    """The broker does not answer for a while: the task goes on, and the group with it."""
    broker = Broker(max_retries=0)
    answer, away = locked(broker), threading.Event()

    def ask(method: str, *arguments: Any) -> Any:
        if away.is_set() and method == "beat":
            raise BrokerGone("temporarily unavailable")
        return answer(method, *arguments)

    away.set()
    [thread] = run_groups(broker, assignment, 1, ask)
    answer("submit", TASKS)
    wait_for(lambda: answer("outcomes", [task.key for task in TASKS[:3]]))
    away.clear()
    wait_for(lambda: answer("outcomes", [task.key for task in TASKS]))
    assert {o.status for o in answer("outcomes", [task.key for task in TASKS])} == {"done"}
    answer("close")
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_a_broker_that_stays_away_is_taken_for_gone(assignment: Assignment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "SILENCE_SECONDS", 0.2)
    broker = Broker(max_retries=0)
    answer = locked(broker)

    def ask(method: str, *arguments: Any) -> Any:
        if method == "beat":
            raise BrokerGone("the driver was killed")
        return answer(method, *arguments)

    seat = Seat(ask=ask, tell=lambda *_: None, group=0, incarnation="a")
    began = time.monotonic()
    serve(seat, assignment, make_worker=StubWorker)  # type: ignore[arg-type]
    assert 0.2 <= time.monotonic() - began < 10, "it leaves by itself"


def test_a_node_that_does_not_see_the_study_says_so(assignment: Assignment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "SEEN_SECONDS", 0.1)
    broker = Broker(max_retries=0)
    Path(assignment.folder, "studies", "toy", "study.yaml").unlink()
    seat = Seat(ask=locked(broker), tell=lambda *_: None, group=0, incarnation="a")
    serve(seat, assignment, make_worker=StubWorker)  # type: ignore[arg-type]
    assert "does not see the study's folder" in (broker.trouble() or "")
    assert "`storage` must be a folder that every node of the cluster sees" in (broker.trouble() or "")


def test_a_file_that_comes_into_sight_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "SEEN_SECONDS", 5.0)
    file = tmp_path / "study.yaml"
    threading.Timer(0.3, file.touch).start()
    assert files.seen(file.is_file)


def test_one_bad_node_does_not_end_a_session_while_the_others_load() -> None:
    broker = Broker(max_retries=3, n_groups=3)
    broker.register(0, "a")
    broker.cannot_start(0, "a worker cannot start: no GPU")
    broker.cannot_start(0, "a worker cannot start: no GPU")
    assert broker.trouble() is None, "two others may be loading"
    broker.cannot_start(1, "a worker cannot start: no such model")
    assert broker.trouble() is None
    broker.cannot_start(2, "a worker cannot start: no such model")
    assert broker.trouble() == "a worker cannot start: no such model"


def test_the_light_platform_is_a_platform() -> None:
    """What tests use in the place of Ray has all that `StudyRun` asks for."""
    from duet_ray.execution.platform import Platform, RayPlatform

    wanted = {name for name in vars(Platform) if not name.startswith("_")}
    assert wanted == {"ask", "ended_groups", "is_gone", "end", "run_trials"}
    assert all(hasattr(RayPlatform, name) and hasattr(LightPlatform, name) for name in wanted)
