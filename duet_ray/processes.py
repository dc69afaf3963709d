"""Which process is which, without trusting a clock: whether one that was written down still runs.

A pid is given out again, so a process is named by its pid and the moment it started. On Linux that moment is counted in
ticks since the machine started (`/proc/<pid>/stat`), which no change of the clock moves; psutil's time of creation is
computed from the clock and shifts with it. A pid means something on one machine only, and inside one pid namespace
only: containers may share a host's name, and even its kernel, and not see each other's processes.
"""

import functools
import os
import socket
from dataclasses import dataclass
from pathlib import Path

import psutil

_PROC = Path("/proc")


@dataclass(frozen=True, kw_only=True)
class ProcessIdentity:
    """One process on one machine, for as long as it runs."""

    machine: str
    """From `machine()`."""
    pid: int
    started: float
    """From `started()`."""

    @classmethod
    def own(cls) -> "ProcessIdentity":
        mine = started(os.getpid())
        assert mine is not None, "this process runs"
        return cls(machine=machine(), pid=os.getpid(), started=mine)

    def is_running(self) -> bool | None:
        """Whether it still runs; None when this process cannot tell: another machine, or hidden from it."""
        if self.machine != machine():
            return None
        now = started(self.pid)
        if now is not None:
            return now == self.started
        return None if _is_hidden(self.pid) else False


@functools.cache
def machine() -> str:
    """Names this run of this machine, as far as pids reach: another start or another container is another machine."""
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink(_PROC / 'self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {psutil.boot_time():.0f}"


def started(pid: int) -> float | None:
    """When a process of this machine started; None when there is none of this pid, or it is dead and not yet reaped.

    A number to be compared with others of the same pid and machine, and to nothing else: ticks since the machine
    started on Linux, seconds since the epoch elsewhere.
    """
    if not (_PROC / "self/stat").exists():
        return _started_elsewhere(pid)
    try:
        text = (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    fields = text.rpartition(")")[2].split()  # The name of the program may hold blanks and brackets.
    return None if fields[0] in "ZXx" else float(fields[19])


def _started_elsewhere(pid: int) -> float | None:
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return None


def _is_hidden(pid: int) -> bool:
    """Whether a process runs that this one may not look at (`hidepid`)."""
    if (_PROC / str(pid)).exists():
        return False  # It can be seen: it is a zombie.
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return False
