"""What belongs to SQLite alone: files that are old, new, torn or full, and shares that are refused."""

import os
import random
import signal
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from duet_ray import file_systems
from duet_ray.errors import StoreError
from duet_ray.records import BASE_TRIAL, Observation, PastRun, Ratio
from duet_ray.store import Store, schema
from tests.store.network_mount import network_mount
from tests.store.places import result, set_driver

RATIO = Ratio(counts=(3, 7))
OLD = Path(__file__).parent / "old"
"""Files that duet_ray wrote when its schema had that version, as SQL."""


def test_no_study_a_newer_study_and_a_broken_file(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no study here"):
        Store(tmp_path)
    with Store(tmp_path, create=True).writing() as store:
        store.create_study(name="x", config={}, versions={})
    with sqlite3.connect(tmp_path / "study.db") as raw:
        raw.execute("UPDATE study SET schema_version = 99")
    with pytest.raises(StoreError, match=r"written by a newer duet_ray \(schema 99, this one knows 3\)"):
        Store(tmp_path)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "study.db").write_bytes(b"not a database at all" * 100)
    with pytest.raises(StoreError, match=r"study.db: cannot be used: file is not a database; the file is damaged"):
        Store(broken)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"file/study: cannot be made: Not a directory; see `storage`"):
        Store(tmp_path / "file" / "study", create=True)


def test_a_file_by_url_holds_one_study(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/one.db"
    with Store(tmp_path / "x", create=True, url=url).writing() as store:
        store.create_study(name="x", config={}, versions={})
    with pytest.raises(StoreError, match=r"one.db: holds another study, x, not y; give each study a file of its own"):
        Store(tmp_path / "y", create=True, url=url)
    assert not (tmp_path / "x" / "study.db").exists()


def test_a_folder_with_strange_letters(tmp_path: Path) -> None:
    folder = tmp_path / "50 % of? #1&ü" / "study"
    with Store(folder, create=True).writing() as store:
        store.add_seconds(1.0)
    assert (folder / "study.db").is_file()


# Older versions ---------------------------------------------------------------------------------------------------


def old_store(folder: Path, version: int, *changes: str) -> None:
    with sqlite3.connect(folder / "study.db") as raw:
        raw.executescript((OLD / f"version_{version}.sql").read_text(encoding="utf-8"))
        for change in changes:
            raw.execute(change)


@pytest.mark.parametrize("create", [False, True], ids=["reader", "driver"])
@pytest.mark.parametrize("version", [1, 2])
def test_a_store_of_an_older_version_is_brought_up_to_date(tmp_path: Path, version: int, create: bool) -> None:
    old_store(tmp_path, version)
    store = Store(tmp_path, create=create)
    record = store.study()
    assert record is not None
    assert (record.name, record.status, record.seconds, record.domains) == (
        "old", "paused", 12.5, [{"name": "maths", "notes": ["a note"]}],
    )  # fmt: skip
    base, done, failed, pending = store.trials()
    assert (base.number, base.ratio, base.samples[0].value) == (BASE_TRIAL, None, 0.1 + 0.2)
    if version == 1:
        assert (done.settings, done.fidelity, done.k) == ((), 1.0, None)
        assert (store.past_runs(), store.posterior()) == ([], {})
    else:
        assert (done.settings, done.fidelity, done.k) == (
            (("training.rank", 8), ("training.target_modules", ("q_proj",))), 0.5, 2,
        )  # fmt: skip
        assert store.past_runs() == [PastRun(counts=(3, 7), value=1.0, source="a.csv:2")]
        assert (store.posterior(), store.ranking()) == ({0: (0.5, 0.1)}, ([0], {0}))
    assert done.observation == Observation(value=0.5, k=2, k_used=1, best_sample=0)
    assert done.samples[0].spec == done.spec(0)
    assert str(done.samples[1].train["last_loss"]) == "nan"
    assert (failed.status, failed.reason, pending.status) == ("failed", "no sample has a value", "pending")
    assert store.kept_artifacts() == {(0, 0): "artifacts/t0000/s0/adapter"}
    again = Store(tmp_path)
    assert repr(again.trials()) == repr(store.trials()), "once is enough"
    with again.writing():
        assert again._transactions.fence == 2, "leases go on being counted"
        again.add_trial(3, "start", RATIO, "random", settings=done.settings, fidelity=0.5, k=2)
        again.set_posterior({0: (0.5, 0.1)}, [0])
        again.add_past_runs([PastRun(counts=(3, 7), value=1.0, source="a.csv:3")])
    with sqlite3.connect(tmp_path / "study.db") as raw:
        assert raw.execute("SELECT schema_version FROM study").fetchone() == (schema.SCHEMA_VERSION,)
        made = {row[1:3] for row in raw.execute("PRAGMA table_info(driver)")}
        assert ("n_writes", "BIGINT") in made


@pytest.mark.parametrize("version", [1, 2])
def test_an_old_store_without_a_study_is_made_anew(tmp_path: Path, version: int) -> None:
    """A driver of that version was killed between making the tables and writing the study's row."""
    tables = (
        "sample",
        "observation",
        "artifact",
        "study",
        *(("posterior", "past_run") if version > 1 else ()),
        "trial",
    )
    old_store(tmp_path, version, *(f"DELETE FROM {table}" for table in tables), "DELETE FROM driver")
    with Store(tmp_path, create=True).writing() as store:
        store.create_study(name="x", config={}, versions={})
        store.add_trial(0, "start", RATIO, "uniform", k=2)
    assert Store(tmp_path).trials()[0].k == 2


def test_an_old_store_that_an_old_driver_holds_is_left_alone(tmp_path: Path) -> None:
    old_store(tmp_path, 2, "UPDATE driver SET holder = 'h', host = 'elsewhere', pid = 7, expires = 9e12")
    with pytest.raises(StoreError, match="an older duet_ray runs this study: process 7 on elsewhere"):
        Store(tmp_path)
    with sqlite3.connect(tmp_path / "study.db") as raw:
        assert raw.execute("SELECT schema_version FROM study").fetchone() == (2,)
        raw.execute("UPDATE driver SET expires = 0")
    assert len(Store(tmp_path).trials()) == 4


# Damaged files ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A study's file with some trials in it."""
    folder = tmp_path_factory.mktemp("sound")
    with Store(folder, create=True).writing() as store:
        store.create_study(name="x", config={"seed": 1}, versions={})
        for trial in range(30):
            store.add_trial(trial, "start", RATIO, "uniform")
            for sample in range(3):
                store.add_sample(result(trial, sample))
            store.add_observation(trial, Observation(value=0.5, k=3, k_used=3, best_sample=0))
    store.close()
    return (folder / "study.db").read_bytes()


def read_all(folder: Path) -> None:
    store = Store(folder)
    try:
        store.study()
        store.trials()
        store.kept_artifacts()
        with store.writing():
            store.add_seconds(1.0)
    finally:
        store.close()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_torn_file_is_named(tmp_path: Path, sound: bytes, share: float) -> None:
    (tmp_path / "study.db").write_bytes(sound[: int(len(sound) * share)])
    with pytest.raises(StoreError, match=r"study\.db"):
        read_all(tmp_path)


def test_a_corrupted_file_ends_in_a_store_error_or_in_an_answer(tmp_path: Path, sound: bytes) -> None:
    """Bytes changed at random: what SQLite does not notice may be read, and nothing ends in a traceback."""
    places = random.Random(0)
    n_noticed = 0
    for number in range(150):
        folder = tmp_path / str(number)
        folder.mkdir()
        data = bytearray(sound)
        for _ in range(1 + number % 40):
            data[places.randrange(len(data))] = places.randrange(256)
        (folder / "study.db").write_bytes(data)
        try:
            read_all(folder)
        except StoreError as error:
            assert f"{folder}/study.db" in str(error) or "study" in str(error)  # noqa: PT017
            n_noticed += 1
    assert 20 < n_noticed < 150


def test_a_store_whose_lease_is_missing_is_damaged(tmp_path: Path) -> None:
    Store(tmp_path, create=True).close()
    with sqlite3.connect(tmp_path / "study.db") as raw:
        raw.execute("DELETE FROM driver")
    with pytest.raises(StoreError, match=r"study.db: is damaged"), Store(tmp_path).writing():
        pass


# A full disk ------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 KB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", disk], check=False, capture_output=True, text=True
    ) if os.getuid() == 0 else None  # fmt: skip
    if mounted is None or mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr if mounted else 'not root'}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_on_a_full_disk_the_store_stays_readable_and_goes_on_when_there_is_room(small_disk: Path) -> None:
    folder, ballast = small_disk / "study", small_disk / "ballast"
    with Store(folder, create=True).writing() as store:
        store.create_study(name="study", config={}, versions={})
        ballast.write_bytes(b"x" * 100_000)

        def fill() -> None:
            for trial in range(10_000):
                store.add_trial(trial, "start", RATIO, "random" * 100)

        with pytest.raises(StoreError, match=r"study.db: cannot be used: .*make room and start the same command again"):
            fill()
        n_written = len(store.trials())
        assert 0 < n_written < 10_000
        assert len(Store(folder).trials()) == n_written, "others can read it too"
        with pytest.raises(StoreError, match="make room"):
            store.add_trial(n_written, "start", RATIO, "random" * 100)
        ballast.unlink()
        store.add_trial(n_written, "start", RATIO, "random" * 100)
        assert len(Store(folder).trials()) == n_written + 1
    assert Store(folder)._transactions.database.engine.connect().exec_driver_sql("PRAGMA quick_check").scalar() == "ok"


# Network file systems ---------------------------------------------------------------------------------------------


def test_a_share_is_refused_with_the_reason_and_the_remedies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    share, local = tmp_path / "share", tmp_path / "local"
    share.mkdir()
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"1 0 8:1 / / rw - ext4 /dev/sda rw\n2 1 0:2 / {share} rw - nfs4 server:/ rw\n", encoding="utf-8")
    monkeypatch.setattr(file_systems, "_MOUNTS", mounts)
    for create in (True, False):
        with pytest.raises(StoreError, match=r"SQLite cannot be used on a network file system \(nfs4\)") as refused:
            Store(share / "studies" / "x", create=create)
        assert "store: postgresql+psycopg://user@host/database" in str(refused.value)
        assert "store: sqlite:////" in str(refused.value)
    assert not (share / "studies").exists()
    with Store(share / "studies" / "x", create=True, url=f"sqlite:///{local}/x.db").writing():
        pass  # The folder may be shared if the store is not.
    with pytest.raises(StoreError, match="nfs4"):
        Store(local / "x", create=True, url=f"sqlite:///{share}/x.db")


@pytest.mark.parametrize("kind", ["fuse.sshfs", "fuse.gcsfuse"])
def test_a_share_that_is_really_mounted_is_refused(tmp_path: Path, kind: str) -> None:
    share, linked = tmp_path / "a share", tmp_path / "linked"
    share.mkdir()
    linked.symlink_to(share)
    with ExitStack() as stack:
        try:
            stack.enter_context(network_mount(share, kind))
        except OSError as error:
            pytest.skip(f"cannot mount: {error}")
        for folder in (share / "studies" / "x", linked / "x"):
            with pytest.raises(StoreError, match=rf"SQLite cannot be used on a network file system \({kind}\)"):
                Store(folder, create=True)
    Store(share / "studies" / "x", create=True).close()


# Locks ------------------------------------------------------------------------------------------------------------


def test_a_lock_of_somebody_else_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backup, or an open `sqlite3`, holds the file for longer than SQLite itself waits."""
    monkeypatch.setattr("duet_ray.store.sqlite.BUSY_SECONDS", 0.1)
    code = f"""
        import sqlite3, time
        raw = sqlite3.connect({str(tmp_path / "study.db")!r}, isolation_level=None)
        raw.execute("BEGIN IMMEDIATE")
        print("locked", flush=True)
        time.sleep(1.5)
        raw.execute("COMMIT")
    """
    with Store(tmp_path, create=True).writing() as store:
        other = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        store.add_trial(0, "start", RATIO, "uniform")
        assert other.wait() == 0, "it was waited for"
    assert len(Store(tmp_path).trials()) == 1


def test_a_stopped_driver_of_this_machine_is_not_taken_for_dead(tmp_path: Path) -> None:
    code = f"""
        from pathlib import Path
        from duet_ray.store import Store
        with Store(Path({str(tmp_path)!r}), create=True).writing():
            print("held", flush=True)
            input()
    """
    other = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    other.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(StoreError, match=f"already run by process {other.pid}"), Store(tmp_path).writing():
            pass
    finally:
        other.kill()
        other.wait()
    set_driver(Store(tmp_path), host="this")
    with Store(tmp_path).writing():
        pass
