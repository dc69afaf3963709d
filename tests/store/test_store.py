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
from duet_ray.records import BASE_TRIAL, Observation, Ratio, SampleResult, SampleSpec
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
