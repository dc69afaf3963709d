"""A shell that runs blocks of commands one after the other, as a reader of a README would type them."""

import os
import queue
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

import psutil


class Shell:
    """A bash that keeps its variables and jobs from one block to the next; everything it started ends with it."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            ["bash"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder,
            env={**os.environ, **environment}, start_new_session=True,
        )  # fmt: skip
        self._lines: queue.Queue[str] = queue.Queue()
        self._seen: set[psutil.Process] = set()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)

    def run(self, block: str, *, seconds: float = 300) -> tuple[int, str]:
        """Run a block to its end.

        Returns:
            The exit code of its last command, and all that was printed.
        """
        assert self._process.stdin is not None
        mark = uuid.uuid4().hex
        self._process.stdin.write(f"{block}\necho {mark} $?\n")
        self._process.stdin.flush()
        printed, deadline = "", time.monotonic() + seconds
        while True:
            self._seen |= set(psutil.Process(self._process.pid).children(recursive=True))
            try:
                line = self._lines.get(timeout=0.2)
            except queue.Empty:
                assert time.monotonic() < deadline, f"it does not end:\n{block}\n{printed}"
                assert self._process.poll() is None, printed
                continue
            if mark in line:
                head, _, code = line.partition(mark)
                return int(code), printed + head
            printed += line

    def children(self, name: str) -> list[psutil.Process]:
        """Processes below this shell whose command line has a word in it."""
        found = []
        for process in psutil.Process(self._process.pid).children(recursive=True):
            try:
                if name in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    def end(self) -> None:
        """Kill what is left, by its own ids."""
        if self._process.poll() is None:
            self._seen |= set(psutil.Process(self._process.pid).children(recursive=True))
            os.killpg(self._process.pid, signal.SIGKILL)
        for process in self._seen:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self._process.wait()
