"""What every store keeps, wherever it is: SQLite in the study's folder, SQLite by URL, PostgreSQL."""

import json
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, select

from duet_ray import processes
from duet_ray.errors import StoreError, StudyLocked
from duet_ray.processes import ProcessIdentity
from duet_ray.records import BASE_TRIAL, Observation, PastRun, Ratio, SampleResult, SampleSpec
from duet_ray.store import Store, lease, schema
from tests.store.kill import When, die, kill_at
from tests.store.places import KINDS, Place, forked, place_of, result, set_driver

pytest_plugins = ("tests.store.postgres_fixture",)
RATIO = Ratio(counts=(3, 7))


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return place_of(request.param, tmp_path, request)


# What is kept -----------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_back(place: Place) -> None:
    store = place.open()
    assert store.study() is None
    observed = Observation(value=0.1 + 0.2, k=2, k_used=1, best_sample=0)
    with store.writing():
        store.create_study(name=place.folder.name, config={"seed": 1, "names": ["ä"]}, versions={"ray": "2"})
        store.update_study(status="running", inputs={"a": 1}, resolved={"b": [2]}, domains=[{"notes": ["seen"]}])
        store.add_seconds(1.5)
        store.add_seconds(0.25)
        store.add_trial(BASE_TRIAL, "base", None, "base")
        store.add_trial(0, "start", RATIO, "uniform")
        assert store.add_sample(result(0, 0, 0.1 + 0.2))
        assert store.add_sample(result(0, 1, None))
        store.add_observation(0, observed)
        store.fail_trial(BASE_TRIAL, "it cannot be measured")
        store.drop_artifact(0, 1)
    again = place.open(create=False)
    record = again.study()
    assert record is not None
    assert (record.name, record.config, record.versions) == (
        place.folder.name,
        {"seed": 1, "names": ["ä"]},
        {"ray": "2"},
    )
    assert (record.status, record.inputs, record.resolved, record.seconds) == ("running", {"a": 1}, {"b": [2]}, 1.75)
    assert record.domains == [{"notes": ["seen"]}]
    base, trial = again.trials()
    assert (base.ratio, base.status, base.reason) == (None, "failed", "it cannot be measured")
    assert (trial.ratio, trial.status) == (RATIO, "done")
    assert trial.samples == (result(0, 0, 0.1 + 0.2), result(0, 1, None))
    assert trial.observation == observed
    assert again.kept_artifacts() == {(0, 0): "artifacts/t0/0/adapter"}


def test_what_was_read_once_is_not_read_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample never changes, and a study of thousands reads them at every turn; a reader beside sees the new ones."""
    understood: list[str] = []
    from_json = SampleResult.from_json

    def counted(data: Any) -> SampleResult:
        understood.append(data["spec"]["trial"])
        return from_json(data)

    monkeypatch.setattr(SampleResult, "from_json", counted)
    store, reader = place.open(), place.open(create=False)
    with store.writing():
        store.create_study(name=place.folder.name, config={}, versions={})
        for number in range(3):
            store.add_trial(number, "start", RATIO, "random")
            store.add_sample(result(number, 0, float(number)))
            for which in (store, reader):
                assert [s.value for t in which.trials() for s in t.samples] == [float(n) for n in range(number + 1)]
        store.add_sample(result(0, 1, 9.0))
        assert [s.value for t in reader.trials() for s in t.samples] == [0.0, 9.0, 1.0, 2.0]
    # Each of two readers understood each sample once, but for the trial that got another one.
    assert sorted(understood) == [0, 0, 0, 0, 1, 1, 2, 2]
    assert place.open(create=False).trials() == reader.trials()


def test_there_is_no_study_before_one_is_made(place: Place) -> None:
    with pytest.raises(StoreError, match=r"there is no study .*`duet run` starts one"):
        place.open(create=False)
    place.open().close()
    assert place.open(create=False).study() is None
    assert place.open().trials() == [], "made once is enough"


def test_the_first_result_of_a_sample_stands(place: Place) -> None:
    with place.open().writing() as store:
        store.add_trial(0, "start", RATIO, "uniform")
        assert store.add_sample(result(0, 0, 0.5))
        assert not store.add_sample(result(0, 0, 0.1))
        assert store.trials()[0].samples[0].value == 0.5
        store.add_observation(0, Observation(value=0.5, k=1, k_used=1, best_sample=0))
        with pytest.raises(StoreError, match="trial t0000 has an observation already"):
            store.add_observation(0, Observation(value=0.4, k=1, k_used=1, best_sample=0))
        store.finish_trial(0)
        with pytest.raises(StoreError, match=re.escape(store.place) + ": cannot be used: "):
            store.add_sample(result(7, 0))  # of a trial that there is not


def test_a_trial_keeps_its_ratio(place: Place) -> None:
    with place.open().writing() as store:
        store.add_trial(4, "search", RATIO, "bayesian:lcb")
        store.add_trial(4, "search", RATIO, "bayesian:lcb")
        with pytest.raises(StoreError, match=r"trial t0004 has ratio \[3, 7\], not \[4, 6\]"):
            store.add_trial(4, "search", Ratio(counts=(4, 6)), "bayesian:lcb")


SETTINGS = (("training.rank", 8), ("training.target_modules", ("q_proj", "v_proj")), ("training.layers", None))


def test_a_trial_keeps_its_settings_its_fidelity_and_its_k(place: Place) -> None:
    def add(store: Store, fidelity: float = 0.25, rank: int = 8) -> None:
        settings = (("training.rank", rank), *SETTINGS[1:])
        store.add_trial(1, "start", RATIO, "random", settings=settings, fidelity=fidelity, k=3)

    with place.open().writing() as store:
        add(store)
        add(store)
        (trial,) = place.open().trials()
        assert (trial.settings, trial.fidelity, trial.k) == (SETTINGS, 0.25, 3)
        assert trial.spec(2).settings == SETTINGS
        assert SampleSpec.from_json(trial.spec(2).to_json()) == trial.spec(2)
        with pytest.raises(StoreError, match=r"t0001 has settings \{'training.rank': 8, .* at fidelity 0.25, not"):
            add(store, rank=16)
        with pytest.raises(StoreError, match=r"at fidelity 0.25, not .* at 1"):
            add(store, fidelity=1.0)


def test_past_runs_are_added_once_and_stay_in_order(place: Place) -> None:
    runs = [
        PastRun(counts=(3, 7), value=0.1 + 0.2, sem=0.01, fidelity=0.5, source="runs.csv:2"),
        PastRun(counts=(5, 5), value=-1.0, source=f"{'long' * 100}.csv:3"),
    ]
    with place.open().writing() as store:
        assert store.past_runs() == []
        assert store.add_past_runs(runs) == 2
        assert store.add_past_runs([*reversed(runs), PastRun(counts=(5, 5), value=-1.0, source="runs.csv:4")]) == 1
        assert store.past_runs()[:2] == runs
        assert [run.source[-5:] for run in place.open().past_runs()] == ["csv:2", "csv:3", "csv:4"]


def test_the_order_of_the_trials_is_replaced_as_a_whole(place: Place) -> None:
    with place.open().writing() as store:
        for number in range(4):
            store.add_trial(number, "start", RATIO, "random")
        assert (store.posterior(), store.ranking()) == ({}, ([], set()))
        store.set_posterior({0: (0.5, 0.1), 1: (0.25, 0.2)}, [1, 0])
        store.set_posterior({0: (0.5, 0.1), 2: (0.25, 0.2), 3: (0.75, None)}, [2, 0])
        assert store.posterior() == {0: (0.5, 0.1), 2: (0.25, 0.2)}
        assert store.ranking() == ([2, 0], {0, 2, 3})
        store.set_posterior({})
        assert store.ranking() == ([], set())


def test_any_text_and_any_number_can_be_told(place: Place) -> None:
    said = 'a\0b "ü" \\u0000 日本 %s %(x)s :name'
    odd = {"last_loss": float("nan"), "worst": float("-inf"), "said": said, "n": 2**60}
    with place.open().writing() as store:
        store.add_trial(0, "start", RATIO, "bayesian:" + "x" * 300)
        store.add_sample(result(0, 0, None, reason="a\0b \ud800 %s :name", train=odd))
        store.fail_trial(0, "a\0b \ud800 100 % :name")
        (trial,) = store.trials()
    train = trial.samples[0].train
    assert str(train.pop("last_loss")) == "nan"
    assert train == {key: value for key, value in odd.items() if key != "last_loss"}
    assert trial.samples[0].reason == "a\0b ? %s :name"
    assert trial.reason == "a\ufffdb ? 100 % :name"
    assert trial.method == "bayesian:" + "x" * 300


def test_no_secret_is_written(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    token = "hf_" + "a1B2" * 8
    monkeypatch.setenv("SOME_API_KEY", "correct-horse-battery")
    with place.open().writing() as store:
        store.create_study(name=place.folder.name, config={}, versions={})
        store.add_trial(0, "start", RATIO, "uniform")
        store.add_sample(result(0, 0, None, reason=f"401 for {token}", train={"said": ["correct-horse-battery"]}))
        store.fail_trial(0, f"every sample failed: 401 for {token}")
        store.update_study(domains=[{"name": "x", "notes": [f"read with {token}"]}])
        (trial,) = store.trials()
        record = store.study()
    assert record is not None
    everything = json.dumps([trial.reason, trial.samples[0].to_json(), record.domains])
    assert token not in everything
    assert "correct-horse" not in everything
    assert everything.count("[redacted]") == 4
    assert trial.samples[0].spec == result(0, 0).spec


def test_reading_sees_one_moment(place: Place) -> None:
    """A trial and its observation are written together, and never seen apart, even by one who reads in between."""
    with place.open().writing() as store:
        store.add_trial(0, "start", RATIO, "uniform")
        reader = place.open(create=False)

        def while_it_writes(connection: Any) -> tuple[str | None, int]:
            status = connection.scalar(select(schema.trial.c.status))
            store.add_observation(0, Observation(value=0.5, k=1, k_used=1, best_sample=0))
            return status, len(connection.execute(select(schema.observation)).all())

        assert reader._transactions.read(while_it_writes) == ("pending", 0)
        assert reader.trials()[0].observation is not None


# One driver -------------------------------------------------------------------------------------------------------


def hold(place: Place) -> Callable[[Pipe], None]:
    """A child that holds the lease until it is told to let go, or says why not."""

    def main(pipe: Pipe) -> None:
        try:
            with place.open().writing():
                pipe.send("held")
                pipe.recv()
        except StudyLocked as error:
            pipe.send(str(error))
        pipe.send("ended")

    return main


def test_a_second_driver_is_refused_by_name_and_a_dead_one_replaced_at_once(place: Place) -> None:
    child, pipe = forked(hold(place))
    assert pipe.recv() == "held"
    began = time.monotonic()
    with pytest.raises(StudyLocked, match=rf"already run by process {child.pid} on "), place.open().writing():
        pass
    os.kill(child.pid or 0, signal.SIGKILL)
    while ProcessIdentity(machine=processes.machine(), pid=child.pid or 0, started=0.0).is_running() is None:
        time.sleep(0.01)
    while processes.started(child.pid or 0) is not None:
        time.sleep(0.01)
    # A zombie, which nobody has waited for, is dead too.
    with place.open().writing() as store:
        store.renew()
    assert time.monotonic() - began < 10, "nobody was waited for"
    child.join()


def test_a_lease_that_was_given_back_is_free(place: Place) -> None:
    for _ in range(3):
        with place.open().writing() as store:
            store.add_seconds(1.0)
    with pytest.raises(ZeroDivisionError), place.open().writing():
        _ = 1 / 0
    with place.open().writing():
        pass


def test_a_reused_process_id_does_not_lock(place: Place) -> None:
    store = place.open()
    own = ProcessIdentity.own()
    set_driver(
        store, holder="h", host="here", machine=own.machine, pid=own.pid, process_started=own.started - 1, n_writes=3
    )
    with store.writing():
        pass


def elsewhere(store: Store, n_writes: int = 5) -> None:
    """Let the lease be held by a process of another machine."""
    set_driver(store, holder="h", host="elsewhere", machine="m", pid=7, process_started=1.0, fence=3, n_writes=n_writes)


def test_a_holder_elsewhere_is_watched_and_replaced_when_silent(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LEASE_SECONDS", 1.0)
    monkeypatch.setattr(lease, "POLL_SECONDS", 0.05)
    # Whatever the clocks say.
    monkeypatch.setattr(time, "time", lambda: 0.0)
    store, told = place.open(), list[str]()
    elsewhere(store)
    began = time.monotonic()
    with store.writing(told.append):
        assert 1.0 <= time.monotonic() - began < 5.0
        store.add_trial(0, "start", RATIO, "uniform")
    (said,) = told
    assert "is held by process 7 on elsewhere" in said


def test_a_holder_elsewhere_that_shows_itself_is_not_replaced(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LEASE_SECONDS", 2.0)
    monkeypatch.setattr(lease, "POLL_SECONDS", 0.05)
    store, other = place.open(), place.open()
    elsewhere(store)
    timer = threading.Timer(0.7, elsewhere, args=(other, 6))
    timer.start()
    began = time.monotonic()
    with pytest.raises(StudyLocked, match="already run by process 7 on elsewhere"), store.writing():
        pass
    assert time.monotonic() - began < 1.9, "it is refused as soon as it is seen"
    timer.join()


def test_a_holder_elsewhere_that_gives_back_is_followed_at_once(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "POLL_SECONDS", 0.05)
    store, other = place.open(), place.open()
    elsewhere(store)
    timer = threading.Timer(0.3, set_driver, args=(other,), kwargs={"holder": None})
    timer.start()
    began = time.monotonic()
    with store.writing():
        assert time.monotonic() - began < 10.0
    timer.join()


def test_a_driver_shows_itself_without_being_asked(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Preparing data takes minutes in which nothing is written."""
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.05)
    n_writes = select(schema.driver.c.n_writes)
    with place.open().writing():
        reader = place.open(create=False)
        before = reader._transactions.read(lambda connection: connection.scalar(n_writes))
        time.sleep(0.5)
        after = reader._transactions.read(lambda connection: connection.scalar(n_writes))
    assert after - before >= 3


@pytest.mark.parametrize("n_rounds", [40])
def test_of_two_drivers_that_race_exactly_one_wins(place: Place, n_rounds: int) -> None:
    place.open().close()
    line = multiprocessing.get_context("fork").Barrier(2)

    def race(pipe: Pipe) -> None:
        while pipe.recv() == "go":
            store = place.open(create=False)
            line.wait()
            try:
                with store.writing():
                    pipe.send("held")
                    pipe.recv()
            except StudyLocked as error:
                pipe.send(str(error))
                pipe.recv()
            store.close()
            pipe.send("ended")

    racers = [forked(race) for _ in range(2)]
    winners = []
    for _ in range(n_rounds):
        for _, pipe in racers:
            pipe.send("go")
        said = [pipe.recv() for _, pipe in racers]
        assert said.count("held") == 1, said
        winner = said.index("held")
        assert f"already run by process {racers[winner][0].pid} on " in said[1 - winner]
        winners.append(winner)
        for _, pipe in racers:
            pipe.send("let go")
        assert [pipe.recv() for _, pipe in racers] == ["ended"] * 2
    for child, pipe in racers:
        pipe.send("stop")
        child.join()
    fence = select(schema.driver.c.fence)
    assert place.open()._transactions.read(lambda connection: connection.scalar(fence)) == n_rounds


def test_two_that_make_a_store_at_once_make_one(place: Place) -> None:
    line = multiprocessing.get_context("fork").Barrier(4)

    def make(pipe: Pipe) -> None:
        pipe.recv()
        line.wait()
        try:
            place.open().close()
            pipe.send("made")
        except BaseException as error:
            pipe.send(repr(error))

    children = [forked(make) for _ in range(4)]
    for _, pipe in children:
        pipe.send("go")
    assert [pipe.recv() for _, pipe in children] == ["made"] * 4
    for child, _ in children:
        child.join()
    with place.open().writing():
        pass


# A driver that was replaced ---------------------------------------------------------------------------------------


def test_a_driver_that_was_replaced_cannot_write(place: Place) -> None:
    old, new = place.open(), place.open()
    with old.writing():
        set_driver(new, holder="successor", fence=99)
        with pytest.raises(StudyLocked, match="another driver has taken this study over"):
            old.add_trial(0, "start", RATIO, "uniform")
        with pytest.raises(StudyLocked):
            old.renew()
    holder = select(schema.driver.c.holder)
    assert new._transactions.read(lambda connection: connection.scalar(holder)) == "successor"
    assert new.trials() == []


def test_a_suspended_driver_wakes_up_and_cannot_write(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child believes to be on another machine, is stopped, and goes on when its lease is another's."""
    monkeypatch.setattr(lease, "LEASE_SECONDS", 1.0)
    monkeypatch.setattr(lease, "POLL_SECONDS", 0.05)

    def write(pipe: Pipe) -> None:
        lease.RENEW_SECONDS = 0.2
        own = replace(ProcessIdentity.own(), machine="another")
        ProcessIdentity.own = classmethod(lambda cls: own)  # type: ignore[method-assign, assignment]
        with place.open().writing() as store:
            pipe.send("held")
            while True:
                pipe.recv()
                try:
                    store.add_seconds(1.0)
                    pipe.send("written")
                except StudyLocked as error:
                    pipe.send(str(error))

    child, pipe = forked(write)
    assert pipe.recv() == "held"
    pipe.send("write")
    assert pipe.recv() == "written"
    with pytest.raises(StudyLocked), place.open().writing():
        pass
    os.kill(child.pid or 0, signal.SIGSTOP)
    with place.open().writing() as store:
        store.create_study(name=place.folder.name, config={}, versions={})
        pipe.send("write")
        time.sleep(0.3)
        os.kill(child.pid or 0, signal.SIGCONT)
        assert "another driver has taken this study over" in pipe.recv()
        record = store.study()
        assert record is not None
        assert record.seconds == 0.0
    child.kill()
    child.join()


def test_a_write_and_a_takeover_at_the_same_time_come_one_after_the_other(place: Place) -> None:
    """The fence is looked at and the row written in one transaction that keeps the successor out, and the reverse."""
    old, new = place.open(), place.open()
    order = list[str]()
    with old.writing():
        # The write is under way when the successor comes: it is carried out, and only then is the lease taken.
        begun, go_on = threading.Event(), threading.Event()

        def slowly(connection: Any) -> None:
            begun.set()
            go_on.wait(10)
            connection.execute(schema.trial.insert().values(number=1, kind="start", status="pending", method="m"))
            order.append("written")

        writing = threading.Thread(target=old._transactions.write, args=(slowly,))
        writing.start()
        begun.wait(10)
        taking = threading.Thread(
            target=lambda: (set_driver(new, fence=99, holder="new"), order.append("taken over")), daemon=True
        )
        taking.start()
        time.sleep(0.3)
        assert order == []
        go_on.set()
        writing.join(30)
        taking.join(30)
        assert order == ["written", "taken over"]
        assert [trial.number for trial in new.trials()] == [1]
        # The lease is being taken when the write comes: it waits, finds the new fence, and writes nothing.
        set_driver(new, fence=old._transactions.fence)
        begun, go_on = threading.Event(), threading.Event()

        def take(connection: Any) -> None:
            connection.execute(schema.driver.update().values(fence=100))
            begun.set()
            go_on.wait(10)

        taking = threading.Thread(target=new._transactions.exclusive, args=(take,))
        taking.start()
        begun.wait(10)
        refused = list[str]()

        def late() -> None:
            try:
                old.add_trial(2, "start", RATIO, "uniform")
            except StudyLocked as error:
                refused.append(str(error))

        writing = threading.Thread(target=late)
        writing.start()
        time.sleep(0.3)
        assert refused == []
        go_on.set()
        writing.join(30)
        taking.join(30)
        assert len(refused) == 1
        assert [trial.number for trial in new.trials()] == [1]


# SIGKILL at every commit point ------------------------------------------------------------------------------------

OBSERVED = Observation(value=1.0, k=1, k_used=1, best_sample=0)
WRITES: dict[str, Callable[[Store], Any]] = {
    "create_study": lambda s: s.create_study(name=s._transactions.study, config={"seed": 1}, versions={}),
    "update_study": lambda s: s.update_study(status="done", domains=[{"a": 1}]),
    "add_seconds": lambda s: s.add_seconds(5.0),
    "add_trial": lambda s: s.add_trial(9, "start", RATIO, "uniform"),
    "add_sample": lambda s: s.add_sample(result(0, 5)),
    "add_observation": lambda s: s.add_observation(0, OBSERVED),
    "finish_trial": lambda s: s.finish_trial(0),
    "fail_trial": lambda s: s.fail_trial(0, "why"),
    "drop_artifact": lambda s: s.drop_artifact(0, 0),
    "set_posterior": lambda s: s.set_posterior({0: (1.0, 0.5), 1: (2.0, 0.5)}, [1, 0]),
    "add_past_runs": lambda s: s.add_past_runs([PastRun(counts=(3, 7), value=float(n), source="a") for n in range(3)]),
}


def test_every_writing_method_is_in_the_list() -> None:
    writing = {name for name, m in vars(Store).items() if hasattr(m, "__wrapped__") and m.__code__.co_name == "write"}
    assert writing == WRITES.keys()


def everything(store: Store) -> list[Any]:
    record = store.study()
    return [
        replace(record, created=0.0) if record else None,
        store.trials(),
        store.kept_artifacts(),
        store.posterior(),
        store.ranking(),
        store.past_runs(),
    ]


def prepared(place: Place, method: str) -> None:
    """A store on which the method has something to do."""
    with place.open().writing() as store:
        if method != "create_study":
            store.create_study(name=place.folder.name, config={}, versions={})
        for trial in range(2):
            store.add_trial(trial, "start", RATIO, "uniform")
        store.add_sample(result(0, 0))
        store.set_posterior({0: (0.5, 0.1)}, [0])
        store.close()


@pytest.mark.parametrize("method", list(WRITES))
def test_sigkill_before_inside_and_after_a_write_leaves_all_of_it_or_none(place: Place, method: str) -> None:
    prepared(place, method)
    reader = place.open(create=False)
    before = everything(reader)
    reader.close()

    def killed(when: When) -> list[Any]:
        def write(pipe: Pipe) -> None:
            kill_at(Store, method, when)
            with place.open().writing() as store:
                WRITES[method](store)

        child, _ = forked(write)
        child.join()
        assert child.exitcode == -signal.SIGKILL
        store = place.open(create=False)
        found = everything(store)
        with store.writing():  # The next driver comes in at once.
            pass
        store.close()
        return found

    assert killed("before") == before
    assert killed("inside") == before
    after = killed("after")
    assert after != before
    again = place.open(create=False)
    assert everything(again) == after


def test_sigkill_between_two_statements_leaves_the_trial_whole(place: Place) -> None:
    prepared(place, "")

    def write(pipe: Pipe) -> None:
        store = place.open()

        @event.listens_for(store._transactions.database.engine, "after_cursor_execute")
        def end(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
            if statement.startswith("INSERT INTO") and "observation" in statement:
                die()

        with store.writing():
            store.add_observation(0, OBSERVED)

    child, _ = forked(write)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    trial = place.open().trials()[0]
    assert (trial.status, trial.observation) == ("pending", None)
    with place.open().writing() as store:
        store.add_observation(0, OBSERVED)


@pytest.mark.parametrize("when", ["taking", "giving back"])
def test_sigkill_while_the_lease_changes_hands_locks_nobody_out(place: Place, when: str) -> None:
    prepared(place, "")

    def main(pipe: Pipe) -> None:
        store = place.open()
        engine = store._transactions.database.engine
        wanted = 1 if when == "taking" else 2

        @event.listens_for(engine, "after_cursor_execute")
        def end(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
            nonlocal wanted
            if statement.startswith("UPDATE") and "holder=" in statement:
                wanted -= 1
                if wanted == 0:
                    die()

        with store.writing():
            pass

    child, _ = forked(main)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    with place.open().writing() as store:
        store.add_observation(0, OBSERVED)
