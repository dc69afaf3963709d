"""One writer, one truth: the store under kill -9, second drivers and strange files."""

import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from duet_ray.errors import StoreError, StudyLocked
from duet_ray.records import BASE_TRIAL, Observation, PastRun, Ratio, SampleResult, SampleSpec
from duet_ray.store import Store


def _result(trial: int, sample: int, value: float | None = 0.5) -> SampleResult:
    ratio = None if trial == BASE_TRIAL else Ratio(counts=(3, 7))
    return SampleResult(
        spec=SampleSpec(trial=trial, sample=sample, kind="start", ratio=ratio),
        value=value,
        reason=None if value is not None else "NaN",
        metrics={"accuracy": 0.25},
        adapter=f"artifacts/t{trial}/{sample}/adapter",
    )


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    store = Store(tmp_path, create=True)
    assert store.study() is None
    with store.writing():
        store.create_study(name="x", config={"seed": 1}, versions={"ray": "2"})
        store.add_trial(0, "start", Ratio(counts=(3, 7)), "uniform")
        assert store.add_sample(_result(0, 0, 0.1 + 0.2))
        assert store.add_sample(_result(0, 1, None))
        store.add_observation(0, Observation(value=0.1 + 0.2, k=2, k_used=1, best_sample=0))
    (trial,) = Store(tmp_path).trials()
    assert trial.ratio == Ratio(counts=(3, 7))
    assert trial.status == "done"
    assert trial.samples == (_result(0, 0, 0.1 + 0.2), _result(0, 1, None))
    assert trial.observation == Observation(value=0.1 + 0.2, k=2, k_used=1, best_sample=0)


def test_the_first_result_of_a_sample_stands(tmp_path: Path) -> None:
    store = Store(tmp_path, create=True)
    with store.writing():
        store.add_trial(0, "start", Ratio(counts=(3, 7)), "uniform")
        assert store.add_sample(_result(0, 0, 0.5))
        assert not store.add_sample(_result(0, 0, 0.1))
        assert store.trials()[0].samples[0].value == 0.5
        store.add_observation(0, Observation(value=0.5, k=1, k_used=1, best_sample=0))
        with pytest.raises(StoreError, match="trial t0000 has an observation already"):
            store.add_observation(0, Observation(value=0.4, k=1, k_used=1, best_sample=0))


def test_a_trial_keeps_its_ratio(tmp_path: Path) -> None:
    with Store(tmp_path, create=True).writing() as store:
        store.add_trial(4, "search", Ratio(counts=(3, 7)), "bayesian:lcb")
        store.add_trial(4, "search", Ratio(counts=(3, 7)), "bayesian:lcb")
        with pytest.raises(StoreError, match=r"trial t0004 has ratio \[3, 7\], not \[4, 6\]"):
            store.add_trial(4, "search", Ratio(counts=(4, 6)), "bayesian:lcb")


def test_a_second_driver_is_refused_by_name(tmp_path: Path) -> None:
    code = f"""
        import sys, time
        from pathlib import Path
        from duet_ray.store import Store
        with Store(Path({str(tmp_path)!r}), create=True).writing():
            print("held", flush=True)
            time.sleep(60)
    """
    other = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(StudyLocked, match=rf"already run by process {other.pid} on "), Store(tmp_path).writing():
            pass
        # Killed without a word, its lease is free at once: same host, no such process.
        other.send_signal(signal.SIGKILL)
        other.wait()
        with Store(tmp_path).writing() as store:
            store.renew()
    finally:
        other.kill()
        other.wait()


def test_a_driver_that_was_replaced_cannot_write(tmp_path: Path) -> None:
    old = Store(tmp_path, create=True)
    with old.writing():
        # The successor found the lease expired (another host, a long silence) and took it.
        with sqlite3.connect(tmp_path / "study.db") as raw:
            raw.execute("UPDATE driver SET fence = fence + 1, holder = 'successor'")
        with pytest.raises(StudyLocked, match="another driver has taken this study over"):
            old.add_trial(0, "start", Ratio(counts=(1, 1)), "uniform")
    with sqlite3.connect(tmp_path / "study.db") as raw:
        assert raw.execute("SELECT holder FROM driver").fetchone() == ("successor",)


def test_a_lease_of_another_host_is_waited_for_until_it_expires(tmp_path: Path) -> None:
    with Store(tmp_path, create=True).writing():
        pass
    with sqlite3.connect(tmp_path / "study.db") as raw:
        raw.execute("UPDATE driver SET holder='h', host='elsewhere', pid=1, expires=strftime('%s','now') + 30")
    with pytest.raises(StudyLocked, match="process 1 on elsewhere"), Store(tmp_path).writing():
        pass
    with sqlite3.connect(tmp_path / "study.db") as raw:
        raw.execute("UPDATE driver SET expires=0")
    with Store(tmp_path).writing():
        pass


def test_a_reused_process_id_does_not_lock(tmp_path: Path) -> None:
    with Store(tmp_path, create=True).writing():
        pass
    with sqlite3.connect(tmp_path / "study.db") as raw:
        raw.execute("UPDATE driver SET holder='h', pid=?, process_started=1.0, expires=9e12", (os.getpid(),))
    with Store(tmp_path).writing():
        pass


def test_kill_between_statements_leaves_whole_transactions(tmp_path: Path) -> None:
    """SIGKILL inside the transaction of an observation: the trial is not half done."""
    code = f"""
        import os, signal
        from pathlib import Path
        from sqlalchemy import event
        from duet_ray.records import Observation, Ratio
        from duet_ray.store import Store
        store = Store(Path({str(tmp_path)!r}), create=True)
        with store.writing():
            store.add_trial(0, "start", Ratio(counts=(1, 1)), "uniform")
            @event.listens_for(store._engine, "after_cursor_execute")
            def die(conn, cursor, statement, parameters, context, executemany):
                if statement.startswith("INSERT INTO observation"):
                    os.kill(os.getpid(), signal.SIGKILL)
            store.add_observation(0, Observation(value=1.0, k=1, k_used=1, best_sample=0))
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert ended.returncode == -signal.SIGKILL
    (trial,) = Store(tmp_path).trials()
    assert trial.status == "pending"
    assert trial.observation is None
    with Store(tmp_path).writing() as store:
        store.add_observation(0, Observation(value=1.0, k=1, k_used=1, best_sample=0))


def test_no_study_a_newer_study_and_a_broken_file(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no study here"):
        Store(tmp_path)
    with Store(tmp_path, create=True).writing() as store:
        store.create_study(name="x", config={}, versions={})
    with sqlite3.connect(tmp_path / "study.db") as raw:
        raw.execute("UPDATE study SET schema_version = 99")
    with pytest.raises(StoreError, match="written by a newer duet_ray"):
        Store(tmp_path)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "study.db").write_bytes(b"not a database at all" * 100)
    with pytest.raises(StoreError, match="cannot be read as a study's store"):
        Store(broken)


SETTINGS = (("training.rank", 8), ("training.target_modules", ("q_proj", "v_proj")), ("training.layers", None))


def test_a_trial_keeps_its_settings_its_fidelity_and_its_k(tmp_path: Path) -> None:
    def add(store: Store, fidelity: float = 0.25, rank: int = 8) -> None:
        settings = (("training.rank", rank), *SETTINGS[1:])
        store.add_trial(1, "start", Ratio(counts=(3, 7)), "random", settings=settings, fidelity=fidelity, k=3)

    with Store(tmp_path, create=True).writing() as store:
        add(store)
        add(store)
        (trial,) = Store(tmp_path).trials()
        assert (trial.settings, trial.fidelity, trial.k) == (SETTINGS, 0.25, 3)
        assert trial.spec(2).settings == SETTINGS
        assert SampleSpec.from_json(trial.spec(2).to_json()) == trial.spec(2)
        with pytest.raises(StoreError, match=r"t0001 has settings \{'training.rank': 8, .* at fidelity 0.25, not"):
            add(store, rank=16)
        with pytest.raises(StoreError, match=r"at fidelity 0.25, not .* at 1"):
            add(store, fidelity=1.0)


def test_past_runs_are_added_once_and_stay_in_order(tmp_path: Path) -> None:
    runs = [
        PastRun(counts=(3, 7), value=0.1 + 0.2, sem=0.01, fidelity=0.5, source="runs.csv:2"),
        PastRun(counts=(5, 5), value=-1.0, source="runs.csv:3"),
    ]
    with Store(tmp_path, create=True).writing() as store:
        assert store.past_runs() == []
        assert store.add_past_runs(runs) == 2
        assert store.add_past_runs([*reversed(runs), PastRun(counts=(5, 5), value=-1.0, source="runs.csv:4")]) == 1
        assert store.past_runs()[:2] == runs
        assert [run.source for run in Store(tmp_path).past_runs()] == ["runs.csv:2", "runs.csv:3", "runs.csv:4"]


def test_the_order_of_the_trials_is_replaced_as_a_whole(tmp_path: Path) -> None:
    with Store(tmp_path, create=True).writing() as store:
        for number in range(4):
            store.add_trial(number, "start", Ratio(counts=(3, 7)), "random")
        assert (store.posterior(), store.ranking()) == ({}, ([], set()))
        store.set_posterior({0: (0.5, 0.1), 1: (0.25, 0.2)}, [1, 0])
        store.set_posterior({0: (0.5, 0.1), 2: (0.25, 0.2), 3: (0.75, None)}, [2, 0])
        assert store.posterior() == {0: (0.5, 0.1), 2: (0.25, 0.2)}
        assert store.ranking() == ([2, 0], {0, 2, 3})


VERSION_1 = """
CREATE TABLE study (id INTEGER NOT NULL PRIMARY KEY, name VARCHAR(64) NOT NULL, schema_version INTEGER NOT NULL,
    config JSON NOT NULL, inputs JSON NOT NULL, resolved JSON NOT NULL, domains JSON NOT NULL, versions JSON NOT NULL,
    status VARCHAR(16) NOT NULL, created FLOAT NOT NULL, seconds FLOAT NOT NULL);
CREATE TABLE trial (number INTEGER NOT NULL PRIMARY KEY, kind VARCHAR(16) NOT NULL, counts JSON,
    status VARCHAR(16) NOT NULL, method VARCHAR(64) NOT NULL, reason TEXT);
CREATE TABLE sample (trial INTEGER NOT NULL, sample INTEGER NOT NULL, value FLOAT, result JSON NOT NULL,
    PRIMARY KEY (trial, sample), FOREIGN KEY(trial) REFERENCES trial (number));
CREATE TABLE observation (trial INTEGER NOT NULL PRIMARY KEY, value FLOAT NOT NULL, sem FLOAT, k INTEGER NOT NULL,
    k_used INTEGER NOT NULL, best_sample INTEGER NOT NULL, FOREIGN KEY(trial) REFERENCES trial (number));
CREATE TABLE feedback_event (id VARCHAR(64) NOT NULL PRIMARY KEY, trial INTEGER NOT NULL, sample INTEGER NOT NULL,
    value FLOAT NOT NULL, received FLOAT NOT NULL);
CREATE TABLE artifact (trial INTEGER NOT NULL, sample INTEGER NOT NULL, path VARCHAR(255) NOT NULL,
    kept INTEGER NOT NULL, UNIQUE (trial, sample));
CREATE TABLE driver (id INTEGER NOT NULL PRIMARY KEY, fence INTEGER NOT NULL, holder VARCHAR(64), host VARCHAR(255),
    pid INTEGER, process_started FLOAT, expires FLOAT NOT NULL);
INSERT INTO study VALUES (1, 'old', 1, '{"seed": 3}', '{}', '{}', '[]', '{}', 'done', 1.0, 2.0);
INSERT INTO trial VALUES (-1, 'base', NULL, 'done', 'base', NULL), (0, 'start', '[3, 7]', 'done', 'uniform', NULL),
    (1, 'start', '[5, 5]', 'pending', 'random', NULL);
INSERT INTO sample VALUES (0, 0, 0.5, '{"spec": {"trial": 0, "sample": 0, "kind": "start", "counts": [3, 7]},
    "value": 0.5, "reason": null, "stderr": null, "metrics": {}, "train": {}, "train_seconds": 1.0,
    "feedback_seconds": 1.0, "rows_digest": "x", "adapter": null, "lease": 1, "n_retries": 0}');
INSERT INTO observation VALUES (0, 0.5, NULL, 1, 1, 0);
INSERT INTO driver VALUES (1, 4, NULL, 'h', 1, 1.0, 0.0);
"""
"""A store as version 1 of the schema made it, written by hand."""


@pytest.mark.parametrize("create", [False, True], ids=["reader", "driver"])
def test_a_store_of_an_older_version_is_brought_up_to_date(tmp_path: Path, create: bool) -> None:
    with sqlite3.connect(tmp_path / "study.db") as raw:
        raw.executescript(VERSION_1)
    store = Store(tmp_path, create=create)
    _, done, pending = store.trials()
    assert (done.settings, done.fidelity, done.k, pending.settings) == ((), 1.0, None, ())
    assert done.samples[0].spec == done.spec(0)
    assert done.observation == Observation(value=0.5, k=1, k_used=1, best_sample=0)
    assert (store.past_runs(), store.posterior()) == ([], {})
    again = Store(tmp_path)
    assert again.trials() == store.trials(), "once is enough"
    with again.writing():
        again.add_trial(2, "start", Ratio(counts=(1, 9)), "random", settings=SETTINGS, fidelity=0.5, k=2)
        again.set_posterior({0: (0.5, 0.1)}, [0])
        again.add_past_runs([PastRun(counts=(3, 7), value=1.0, source="a.csv:2")])
    with sqlite3.connect(tmp_path / "study.db") as raw:
        assert raw.execute("SELECT schema_version FROM study").fetchone() == (2,)
        assert raw.execute("SELECT settings, fidelity, k FROM trial WHERE number = 1").fetchone() == ("[]", 1.0, None)
