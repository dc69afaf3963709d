"""A process that was written down is known again, whatever the clock says."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from duet_ray import processes
from duet_ray.processes import ProcessIdentity, machine, started

linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads Linux's /proc")


def test_this_process_runs_and_one_that_had_its_pid_does_not() -> None:
    own = ProcessIdentity.own()
    assert own.is_running() is True
    assert replace(own, started=own.started - 1).is_running() is False
    assert replace(own, machine="another").is_running() is None


def test_a_process_that_ended_a_zombie_and_a_stopped_one() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    began = started(child.pid)
    assert began is not None
    identity = ProcessIdentity(machine=machine(), pid=child.pid, started=began)
    os.kill(child.pid, signal.SIGSTOP)
    assert identity.is_running() is True, "suspended is not dead"
    child.kill()
    while Path(f"/proc/{child.pid}/stat").exists() and ") Z " not in Path(f"/proc/{child.pid}/stat").read_text():
        time.sleep(0.01)
    assert identity.is_running() is False, "a zombie is dead"
    child.wait()
    assert identity.is_running() is False
    assert started(child.pid) is None


@linux
def test_a_clock_that_is_moved_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is what psutil adds to the ticks; here it jumps by an hour, as it does for a clock set anew."""
    own = ProcessIdentity.own()
    boot = psutil.boot_time()
    monkeypatch.setattr(psutil, "boot_time", lambda: boot + 3600)
    monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: boot + 3600)
    monkeypatch.setattr(time, "time", lambda: boot)
    assert ProcessIdentity.own() == own
    assert own.is_running() is True


@linux
def test_a_program_with_a_strange_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self/stat").touch()
    (tmp_path / "77").mkdir()
    fields = " ".join(["S", *(str(n) for n in range(4, 22)), "987654", "0"])
    (tmp_path / "77/stat").write_text(f"77 (a) Z (b c) {fields}\n", encoding="utf-8")
    monkeypatch.setattr(processes, "_PROC", tmp_path)
    assert started(77) == 987654.0


@linux
@pytest.mark.parametrize(("error", "running"), [(PermissionError, None), (ProcessLookupError, False)])
def test_a_process_of_somebody_else_may_be_hidden(
    monkeypatch: pytest.MonkeyPatch, error: type[OSError], running: bool | None
) -> None:
    def kill(pid: int, number: int) -> None:
        raise error

    monkeypatch.setattr(processes.os, "kill", kill)
    gone = ProcessIdentity(machine=machine(), pid=4_194_305, started=1.0)  # above the highest pid there can be
    assert gone.is_running() is running


def test_where_there_is_no_proc_psutil_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(processes, "_PROC", tmp_path)
    assert started(os.getpid()) == psutil.Process().create_time()
    assert started(4_194_305) is None
    assert processes.machine.__wrapped__()
