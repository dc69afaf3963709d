"""Whole files and folders or none: written under another name, flushed to the disk, renamed into place.

So a reader never sees half of one, and what a killed writer leaves behind has a name that nobody reads.
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SEEN_SECONDS = 60.0
"""How long a node may take to see what another one wrote: network file systems remember what was not there."""

STALE_SECONDS = 86_400.0
"""Unfinished folders older than this are of writers that were killed."""


def write_file(path: Path, data: bytes) -> None:
    """Write a file, replacing one that is there."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp's 0600 would lock out workers that run as somebody else
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write plain data as JSON, with every float to its last bit."""
    write_file(path, json.dumps(data, indent=1, ensure_ascii=False).encode())


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` if the block ends well, unless another process was first.

    For folders whose name says what is in them, so that it does not matter whose copy stands.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp-", dir=folder.parent))
    try:
        yield work
        work.chmod(0o755)  # as for files
        flush(work)
        try:
            work.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
        _flush_one(folder.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def seen(is_there: Callable[[], bool]) -> bool:
    """Whether something that another node has written is there, or comes into sight within `SEEN_SECONDS`."""
    deadline = time.monotonic() + SEEN_SECONDS
    while not is_there():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True


def remove_stale(parent: Path, name: str) -> None:
    """Remove what killed writers of folders named like the glob `name` left behind more than a day ago."""
    for old in parent.glob(f"{name}.tmp-*"):
        try:
            if time.time() - old.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(old)
        except FileNotFoundError:
            continue  # another process was quicker


def flush(folder: Path) -> None:
    """Flush every file under a folder, and the folders' own entries, to the disk."""
    for path in [*folder.rglob("*"), folder]:
        _flush_one(path)


def _flush_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
