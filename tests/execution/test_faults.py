"""Faults around a study that trains nothing: clocks, torn files, changed files, full disks, a second driver.

Which test stands for which line of the table of faults is said in `tests/README.md`.
"""

import json
import os
import random
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.execution.test_study_run import essence, trials_of
from tests.light.zygote import Session, Zygote
from tests.toy_study import WORDS, write_rows, write_toy_study

STUDY: dict[str, Any] = {"search__n_start": 3, "search__n_trials": 2}


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote() as started:
        yield started


@pytest.fixture(scope="module")
def calm(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ended(zygote, write_toy_study(tmp_path_factory.mktemp("calm"), **STUDY))


def ended(zygote: Zygote, study: Path, *overrides: str, **how: Any) -> Path:
    session = zygote.start(study, *overrides, **how)
    assert session.wait() == 0, session.output()
    return study


def wait_for_trainings(study: Path, n: int, session: Session) -> None:
    log, deadline = study.parent / "trained.log", time.monotonic() + 60
    while not log.is_file() or len(log.read_text().split()) < n:
        assert session.is_alive(), session.output()
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("seconds", [-86_400.0, 86_400.0], ids=["back", "forward"])
def test_the_clock_is_moved(zygote: Zygote, calm: Path, tmp_path: Path, seconds: float) -> None:
    """In the middle of a run, by a day, and again after a kill: leases, time limits and ratios do not notice."""
    study = write_toy_study(tmp_path, **STUDY)
    first = zygote.start(study, clock=(seconds, 3), seconds=0.02)
    wait_for_trainings(study, 5, first)
    first.kill()
    assert first.wait() is None
    ended(zygote, study, clock=(seconds, 1))
    assert essence(trials_of(study)) == essence(trials_of(calm))


def test_a_second_driver_is_refused_also_when_the_clock_was_moved(zygote: Zygote, tmp_path: Path) -> None:
    study = write_toy_study(tmp_path, **STUDY)
    first = zygote.start(study, clock=(86_400.0, 1), seconds=0.3)
    wait_for_trainings(study, 2, first)
    second = zygote.start(study)
    assert second.wait() == 1
    assert f"study toy is already run by process {first.pid} on " in second.output()
    assert first.wait() == 0, first.output()


@pytest.mark.parametrize("torn", [b"", b'{"spec": {"trial": 2', b"\x00" * 64, b"[]", b'{"value": NaN}'])
def test_torn_results_and_reports(zygote: Zygote, calm: Path, tmp_path: Path, torn: bytes) -> None:
    """Of a finished sample that was not stored yet: it is taken for unfinished, and made again."""
    study = write_toy_study(tmp_path, **STUDY)
    assert zygote.start(study, kill=("store", "add_sample", "before", 6)).wait() is None
    sample = study.parent / "studies/toy/artifacts/t0002/s0"
    assert (sample / "result.json").is_file(), "it was finished, and its driver died before it said so"
    for name in ("result.json", "trained.json"):
        (sample / name).write_bytes(torn)
    ended(zygote, study)
    assert essence(trials_of(study)) == essence(trials_of(calm))


def test_a_torn_store_is_named_and_nothing_is_trained(zygote: Zygote, tmp_path: Path) -> None:
    study = ended(zygote, write_toy_study(tmp_path, **STUDY))
    store = study.parent / "studies" / "toy" / "study.db"
    whole = store.read_bytes()
    store.write_bytes(os.urandom(len(whole)))
    for extra in ("-wal", "-shm"):
        Path(f"{store}{extra}").unlink(missing_ok=True)
    before = (study.parent / "trained.log").read_text()
    broken = zygote.start(study, "search.n_trials=3")
    assert broken.wait() == 1
    assert "StoreError" in broken.output()
    assert "study.db" in broken.output()
    assert (study.parent / "trained.log").read_text() == before
    store.write_bytes(whole)
    ended(zygote, study, "search.n_trials=3")


def test_a_changed_study_file_or_changed_data_are_refused_with_the_difference(zygote: Zygote, tmp_path: Path) -> None:
    study = write_toy_study(tmp_path, **STUDY)
    first = zygote.start(study, kill=("store", "add_sample", "after", 4))
    assert first.wait() is None
    changed = zygote.start(study, "training.rank=8")
    assert changed.wait() == 1
    assert "training.rank: 4 -> 8" in changed.output()
    write_rows(tmp_path / "data" / "bricks.jsonl", WORDS["bricks"], 61)
    other_data = zygote.start(study)
    assert other_data.wait() == 1
    assert "was started with other data: domain bricks" in other_data.output()
    write_rows(tmp_path / "data" / "bricks.jsonl", WORDS["bricks"], 60)
    ended(zygote, study)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 160 MB, where the rights allow to mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=160m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("a file system can be mounted by root alone")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=False)


def test_the_disk_is_full(zygote: Zygote, calm: Path, tmp_path: Path, small_disk: Path) -> None:
    """Said at the start; in the middle the study stops, can be read, and goes on when there is room."""
    study = write_toy_study(tmp_path, **STUDY, storage=str(small_disk / "studies"))
    ballast = small_disk / "ballast"
    fill(ballast, leave=20 << 20)
    early = zygote.start(study)
    assert early.wait() == 1
    assert "GiB free; make room, lower keep_best, or choose another storage" in early.output()
    ballast.unlink()
    running = zygote.start(study, seconds=0.1)
    wait_for_trainings(study, 5, running)
    fill(ballast, leave=0)
    assert running.wait() == 1, "it stops"
    assert any(said in running.output() for said in ("the disk is full", "database or disk is full")), running.output()
    assert "make room and start the same command again" in running.output()
    n_done = sum(len(t.samples) for t in stored(small_disk))
    assert n_done >= 4, "what was measured can be read"
    ballast.unlink()
    ended(zygote, study)
    assert essence(stored(small_disk)) == essence(trials_of(calm))
    again = [key for key, n in Counter((tmp_path / "trained.log").read_text().split()).items() if n > 1]
    assert len(again) <= 1


def fill(ballast: Path, *, leave: int) -> None:
    free = shutil.disk_usage(ballast.parent).free
    try:
        with ballast.open("wb") as file:
            for _ in range(max(0, (free - leave) // (1 << 16)) + (0 if leave else 2)):
                file.write(bytes(1 << 16))
    except OSError:
        assert not leave, "it was to stay below the limit"


def stored(disk: Path) -> Any:
    from duet_ray.store import Store

    store = Store(disk / "studies" / "toy")
    try:
        return store.trials()
    finally:
        store.close()


def test_two_drivers_race(zygote: Zygote, calm: Path, tmp_path: Path) -> None:
    """Started at the same moment: one runs the study, the others are refused by name; whoever comes later finds it."""
    study = write_toy_study(tmp_path, **STUDY)
    sessions = [zygote.start(study, seconds=0.05) for _ in range(4)]
    codes = [session.wait() for session in sessions]
    assert codes.count(0) == 1, sessions[0].output()
    assert sessions[0].output().count("StudyLocked: study toy is already run by process") == 3
    assert essence(trials_of(study)) == essence(trials_of(calm))
    assert max(Counter((tmp_path / "trained.log").read_text().split()).values()) == 1


def test_models_kept_elsewhere_through_kills(zygote: Zygote, calm: Path, tmp_path: Path) -> None:
    """With `artifacts` at a URL: every value is that of a calm study, and what killed drivers left there is cleared."""
    study = write_toy_study(tmp_path, **STUDY, artifacts=f"file://{tmp_path}/bucket")
    for nth in (2, 5, 3):
        killed = zygote.start(study, kill=("store", "add_sample", "before", nth))
        assert killed.wait() is None, killed.output()
    ended(zygote, study)
    assert [t[-1] for t in essence(trials_of(study))] == [t[-1] for t in essence(trials_of(calm))]
    there = {str(p.parent) for p in (tmp_path / "bucket").rglob("complete.json")}
    results = [json.loads(p.read_text()) for p in study.parent.glob("studies/toy/artifacts/*/*/result.json")]
    assert there <= {r["adapter"].removeprefix("file://") for r in results if r["adapter"]}, "no orphan is left"


def test_a_chaos_run_ends_as_a_calm_one(zygote: Zygote, tmp_path: Path) -> None:
    """A study of 60 trials, its driver killed at random moments: the small brother of `benchmarks/chaos.py`."""
    size: dict[str, Any] = {"search__n_start": 50, "search__n_trials": 10, "fleet__groups": 2, "n_rows": 60}
    calm = ended(zygote, write_toy_study(tmp_path / "calm", **size), seconds=0.01)
    study = write_toy_study(tmp_path / "chaos", **size)
    moments, n_kills = random.Random(20261125), 0
    restart = measured_restart(zygote, calm)
    while True:
        session = zygote.start(study, seconds=0.01)
        deadline = time.monotonic() + moments.expovariate(1 / (2 * restart))
        while session.is_alive() and time.monotonic() < deadline:
            time.sleep(0.002)
        if not session.is_alive():
            break
        session.kill()
        session.wait()
        n_kills += 1
    assert session.wait() == 0, session.output()
    assert n_kills >= 3, "a calm run proves nothing"
    assert essence(trials_of(study)) == essence(trials_of(calm))
    trained = Counter((study.parent / "trained.log").read_text().split())
    assert sum(trained.values()) - len(trained) <= 2 * n_kills, "at most a sample a group was in flight at each kill"


def measured_restart(zygote: Zygote, finished: Path) -> float:
    """Seconds from the start of a driver until it has nothing to do but training."""
    started = time.monotonic()
    ended(zygote, finished)
    return time.monotonic() - started


def test_a_study_whose_folder_is_not_here_is_not_started_over_it(zygote: Zygote, tmp_path: Path) -> None:
    """With the store elsewhere: a share that is not mounted must not look like a study without files."""
    study = write_toy_study(tmp_path, **STUDY, store=f"sqlite:///{tmp_path}/records.db")
    ended(zygote, study)
    (tmp_path / "studies").rename(tmp_path / "unmounted")
    refused = zygote.start(study, "search.n_trials=3")
    assert refused.wait() == 1
    assert "study toy has begun" in refused.output()
    assert "is the share mounted here? `storage` says where it is" in refused.output()
    shutil.rmtree(tmp_path / "studies", ignore_errors=True)
    (tmp_path / "unmounted").rename(tmp_path / "studies")
    ended(zygote, study, "search.n_trials=3")
