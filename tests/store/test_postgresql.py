"""What belongs to PostgreSQL alone: names, rights, and a server that goes away in the middle."""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from duet_ray.errors import StoreError, StudyLocked
from duet_ray.processes import ProcessIdentity
from duet_ray.records import Observation, Ratio
from duet_ray.store import NoStudy, Store, lease, schema, transactions
from duet_ray.store.postgresql import MAX_NAME_BYTES, PostgreSQL, schema_name
from tests.store.places import forked, result, set_driver
from tests.store.postgres_server import PostgresServer, Wire, free_port

pytest_plugins = ("tests.store.postgres_fixture",)
pytestmark = pytest.mark.postgres

RATIO = Ratio(counts=(3, 7))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / f"study-{os.urandom(4).hex()}"


# Names and rights -------------------------------------------------------------------------------------------------


def test_many_studies_in_one_database(postgres: PostgresServer, tmp_path: Path) -> None:
    """Names that differ in case, in their 64th letter, or are PostgreSQL's own words."""
    mark = os.urandom(4).hex()
    names = [f"Maths-{mark}", f"maths-{mark}", "public", "pg_study", "information_schema", "user", f"1-{mark}"]
    names += ["a" * 63 + "b", "a" * 63 + "c", "a" * 58, "a" * 59]
    for number, name in enumerate(names):
        with Store(tmp_path / name, create=True, url=postgres.url()).writing() as store:
            store.create_study(name=name, config={"number": number}, versions={})
    for number, name in enumerate(names):
        record = Store(tmp_path / name, url=postgres.url()).study()
        assert record is not None
        assert (record.name, record.config) == (name, {"number": number})
    there = {row[0] for row in postgres.query("studies", "SELECT nspname FROM pg_namespace WHERE nspname ~ '^duet_'")}
    assert {f"duet_Maths-{mark}", f"duet_maths-{mark}", "duet_public", f"duet_{'a' * 58}"} <= there
    schemas = {str(schema_name(name)) for name in names}
    assert len(schemas) == len(names)
    assert max(len(name) for name in schemas) == MAX_NAME_BYTES


def test_a_schema_that_another_study_took_is_not_written(postgres: PostgresServer, tmp_path: Path) -> None:
    """Two names whose digests were equal: found out by the name that is stored."""
    with Store(tmp_path / "one", create=True, url=postgres.url()).writing() as store:
        store.create_study(name="another", config={}, versions={})
    with pytest.raises(StoreError, match="holds another study, another, not one"):
        Store(tmp_path / "one", create=True, url=postgres.url())


def test_connections_that_are_turned_down_say_what_helps(
    postgres: PostgresServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = time.monotonic()
    with pytest.raises(StoreError, match=r"duet@127.0.0.1:\d+/nothing: cannot be used: .*create it: createdb"):
        Store(folder, create=True, url=postgres.url(database="nothing"))
    with pytest.raises(StoreError, match=r"Connection refused.*see that the server runs"):
        Store(folder, create=True, url=postgres.url(port=free_port()))
    with pytest.raises(NoStudy, match=r"studies: there is no study study-\w+ here; `duet run` starts one"):
        Store(folder, url=postgres.url())
    postgres.query("postgres", "CREATE DATABASE latin ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    with pytest.raises(StoreError, match="the database's encoding is LATIN1, and must be UTF8"):
        Store(folder, create=True, url=postgres.url(database="latin"))
    postgres.query("postgres", "CREATE ROLE guest LOGIN PASSWORD 'guest-password'")
    monkeypatch.setenv("PGPASSWORD", "guest-password")
    with pytest.raises(StoreError, match="the user needs the right to create a schema"):
        Store(folder, create=True, url=postgres.url(user="guest"))
    monkeypatch.setenv("PGPASSWORD", "wrong-password")
    with pytest.raises(StoreError, match=r"set PGPASSWORD, or write the password into ~/.pgpass") as refused:
        Store(folder, create=True, url=postgres.url())
    assert "wrong-password" not in str(refused.value)
    monkeypatch.delenv("PGPASSWORD")
    monkeypatch.setenv("PGPASSFILE", "/nowhere")
    with pytest.raises(StoreError, match=r"set PGPASSWORD, or write the password into ~/.pgpass"):
        Store(folder, create=True, url=postgres.url())
    assert time.monotonic() - began < 30, "what cannot work is not tried for minutes"


def test_the_password_may_come_from_a_file(
    postgres: PostgresServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "pgpass"
    file.write_text(f"127.0.0.1:{postgres.port}:*:duet:{postgres.password}\n", encoding="utf-8")
    file.chmod(0o600)
    monkeypatch.delenv("PGPASSWORD")
    monkeypatch.setenv("PGPASSFILE", str(file))
    Store(folder, create=True, url=postgres.url()).close()


def test_without_the_driver_the_line_that_installs_it_is_shown(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(StoreError, match=r"pip install 'duet-ray\[postgres\]'"):
        Store(folder, create=True, url="postgresql+psycopg://me@host/db")


# A server that goes away ------------------------------------------------------------------------------------------


def test_a_server_that_stops_and_starts_loses_nothing_and_doubles_nothing(
    postgres: PostgresServer, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Writes go on in a loop while the server is stopped in every way that it knows, readers read on beside them."""
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.1)
    n_trials, errors = 0, list[BaseException]()
    ended = threading.Event()

    def write() -> None:
        nonlocal n_trials
        try:
            with Store(folder, create=True, url=postgres.url()).writing() as store:
                store.create_study(name=folder.name, config={}, versions={})
                while not ended.is_set():
                    store.add_trial(n_trials, "start", RATIO, "uniform")
                    assert store.add_sample(result(n_trials, 0, float(n_trials)))
                    store.add_observation(n_trials, Observation(value=float(n_trials), k=1, k_used=1, best_sample=0))
                    store.add_seconds(1.0)
                    n_trials += 1
        except BaseException as error:
            errors.append(error)

    def read() -> None:
        try:
            store = Store(folder, url=postgres.url())
            while not ended.is_set():
                for trial in store.trials():
                    assert (trial.status == "done") is (trial.observation is not None)
                time.sleep(0.02)
        except BaseException as error:
            errors.append(error)

    with caplog.at_level(logging.INFO, logger="duet_ray"):
        threads = [threading.Thread(target=write), threading.Thread(target=read)]
        threads[0].start()
        while n_trials < 3 and not errors:
            time.sleep(0.01)
        threads[1].start()
        for mode in ("fast", "immediate", "fast", "immediate"):
            time.sleep(0.5)
            postgres.stop(mode)
            time.sleep(0.2)
            postgres.start()
        n_before = n_trials
        deadline = time.monotonic() + 30
        while n_trials < n_before + 3 and not errors and time.monotonic() < deadline:
            time.sleep(0.05)
        ended.set()
        for thread in threads:
            thread.join(60)
    assert errors == []
    assert n_trials >= n_before + 3
    store = Store(folder, url=postgres.url())
    trials, record = store.trials(), store.study()
    assert [trial.number for trial in trials] == list(range(n_trials))
    assert all(t.samples == (result(t.number, 0, float(t.number)),) and t.status == "done" for t in trials)
    assert record is not None
    assert record.seconds == n_trials, "what adds up is added once"
    said = [message.getMessage() for message in caplog.records]
    assert any("does not answer" in line and "trying again for up to 5 minutes" in line for line in said)
    assert any("answers again after" in line for line in said)


@pytest.fixture
def wire(postgres: PostgresServer) -> Iterator[tuple[Wire, list[str]]]:
    """A connection that is cut at a COMMIT, once for every entry of the list: `before` or `after` it is carried out."""
    cuts = list[str]()
    wire = Wire(postgres.port, lambda data: cuts.pop(0) if cuts and b"COMMIT\0" in data else None)
    yield wire, cuts
    wire.close()


@pytest.mark.parametrize("cut", [["before"], ["after"], ["after", "after"], ["before", "after", "before"]])
def test_a_commit_whose_answer_is_lost_is_found_out(
    postgres: PostgresServer, folder: Path, wire: tuple[Wire, list[str]], cut: list[str]
) -> None:
    cable, cuts = wire
    store = Store(folder, create=True, url=postgres.url(port=cable.port))
    writes = [
        lambda: store.create_study(name=folder.name, config={}, versions={}),
        lambda: store.add_trial(0, "start", RATIO, "uniform"),
        lambda: store.add_seconds(1.0),
        lambda: store.add_sample(result(0, 0)),
        lambda: store.add_observation(0, Observation(value=1.0, k=1, k_used=1, best_sample=0)),
        lambda: store.add_seconds(1.0),
    ]
    answers = list[Any]()
    cuts.extend(cut)
    with store.writing():  # Taking the lease is cut too.
        fence = store._transactions.fence
        assert cuts == []
        for write in writes:
            cuts.extend(cut)
            answers.append(write())
            assert cuts == []
        cuts.extend(cut)
    assert cuts == []
    assert answers == [None, None, None, True, None, None]
    (trial,) = store.trials()
    record = store.study()
    assert (len(trial.samples), trial.status) == (1, "done")
    assert record is not None
    assert record.seconds == 2.0
    assert fence == 1, "the lease was taken once"
    with Store(folder, url=postgres.url()).writing():
        pass


def test_a_server_that_stays_away_ends_the_wait_with_what_to_do(
    postgres: PostgresServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transactions, "RETRY_SECONDS", 1.0)
    store = Store(folder, create=True, url=postgres.url())
    with store.writing():
        postgres.stop("immediate")
        try:
            began = time.monotonic()
            with pytest.raises(StoreError, match=r"see that the server runs .* and start the same command again"):
                store.add_trial(0, "start", RATIO, "uniform")
            waited = time.monotonic() - began
            with pytest.raises(StoreError):
                store.update_study(status="failed")
            assert time.monotonic() - began - waited < 0.5, "the next write does not wait as long again"
        finally:
            postgres.start()
        store.add_trial(1, "start", RATIO, "uniform")
        assert [trial.number for trial in store.trials()] == [1]


def test_an_outage_is_no_silence(postgres: PostgresServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the server is away nobody can renew a lease: one who waits begins to wait anew."""
    monkeypatch.setattr(lease, "LEASE_SECONDS", 3.0)
    monkeypatch.setattr(lease, "POLL_SECONDS", 0.1)
    store = Store(folder, create=True, url=postgres.url())
    set_driver(store, holder="h", host="elsewhere", machine="m", pid=7, process_started=1.0)
    back = list[float]()

    def restart() -> None:
        time.sleep(1.5)
        postgres.stop("fast")
        postgres.start()
        back.append(time.monotonic())

    thread = threading.Thread(target=restart)
    thread.start()
    with store.writing():
        taken = time.monotonic()
    thread.join()
    assert taken - back[0] > 2.5


def test_a_driver_suspended_inside_a_transaction_is_put_out(
    postgres: PostgresServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds the row's lock; the server ends its transaction, and what it was about to commit is never written."""
    monkeypatch.setattr(lease, "LEASE_SECONDS", 1.0)
    monkeypatch.setattr(lease, "POLL_SECONDS", 0.1)

    def write(pipe: Pipe) -> None:
        lease.RENEW_SECONDS = 60.0
        PostgreSQL.begin_writing = PostgreSQL.begin_writing.replace("= '60s'", "= '1s'")
        own = replace(ProcessIdentity.own(), machine="another")
        ProcessIdentity.own = classmethod(lambda cls: own)  # type: ignore[method-assign, assignment]
        with Store(folder, create=True, url=postgres.url()).writing() as store:
            store.create_study(name=folder.name, config={}, versions={})

            def suspended(connection: Any) -> None:
                connection.execute(schema.study.update().values(seconds=99.0))
                pipe.send("inside")
                os.kill(os.getpid(), signal.SIGSTOP)

            try:
                store._transactions.write(suspended)
                pipe.send("written")
            except StudyLocked as error:
                pipe.send(str(error))

    child, pipe = forked(write)
    assert pipe.recv() == "inside"
    with Store(folder, create=True, url=postgres.url()).writing() as store:
        os.kill(child.pid or 0, signal.SIGCONT)
        assert "another driver has taken this study over" in pipe.recv()
        record = store.study()
        assert record is not None
        assert record.seconds == 0.0
        store.add_seconds(1.0)
    child.join()


def test_readers_do_not_wait_for_the_writer(postgres: PostgresServer, folder: Path) -> None:
    writer, reader = (Store(folder, create=True, url=postgres.url()) for _ in range(2))

    def write(connection: Any) -> float:
        connection.execute(schema.driver.update().values(host="x"))
        began = time.monotonic()
        reader.trials()
        reader._transactions.read(lambda c: c.scalar(select(schema.driver.c.host)))
        return time.monotonic() - began

    with writer.writing():
        assert writer._transactions.write(write) < 5.0
