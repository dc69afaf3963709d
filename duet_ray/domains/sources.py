"""What a domain's `source` names: files, globs, several of them, or a data set of the hub.

Order is part of the data: files come in the order of the study file, those of a glob sorted by path, and a file that
is named twice counts once.
"""

import difflib
import glob
import hashlib
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from duet_ray.config import StudyConfig
from duet_ray.domains.hub import HubSource
from duet_ray.domains.readers import READERS, BadRow, Record, column_names, read_records
from duet_ray.errors import DataError, DataErrors

HUB = "hf:"
_GLOB = set("*?[")


class Source(Protocol):
    """Somewhere that rows come from."""

    @property
    def name(self) -> str:
        """How it is called in messages, reports and exports."""
        ...

    def digest(self) -> str:
        """A hash of its content: equal exactly when the content is."""
        ...

    def stamp(self) -> object:
        """Something cheap that changes when the content is changed while it is being read."""
        ...

    def columns(self) -> list[str]:
        """Its columns, for messages."""
        ...

    def records(self, wanted: Collection[str]) -> Iterator[Record | BadRow]:
        """Its rows in order; only the columns in `wanted` need be there."""
        ...


@dataclass(frozen=True)
class FileSource:
    """One local file."""

    path: Path
    name: str

    def digest(self) -> str:
        # Always over the bytes: a size and a time of change can be equal for different content.
        try:
            with self.path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"{self.name}: cannot be read: {error}") from error
        return f"{self.path.name}:{content}"

    def stamp(self) -> object:
        status = self.path.stat()
        return status.st_size, status.st_mtime_ns, status.st_ino

    def columns(self) -> list[str]:
        return column_names(self.path)

    def records(self, wanted: Collection[str]) -> Iterator[Record | BadRow]:
        return read_records(self.path, name=self.name, wanted=wanted)


def find_sources(config: StudyConfig, index: int) -> list[Source]:
    """Resolve the source of domain `index`.

    Raises:
        DataErrors: with one error per pattern that matches nothing, names a folder, or has an unknown suffix.
    """
    domain = config.domains[index]
    found: dict[object, Source] = {}
    errors: list[Exception] = []
    for pattern in domain.sources:
        if pattern.startswith(HUB):
            path = pattern.removeprefix(HUB)
            local = path.startswith((".", "/", "~"))
            found[pattern] = HubSource(
                str(config.resolve_path(path)) if local else path,
                name=pattern,
                subset=domain.subset,
                split=domain.split,
                revision=domain.revision,
            )
            continue
        try:
            for file in _match(config.resolve_path(pattern)):
                found[file] = FileSource(file, _shown(file, config.folder))
        except DataError as error:
            errors.append(DataError(f"domains[{index}].source ({domain.name}): {pattern!r}: {error}"))
    if errors:
        raise DataErrors(errors)
    return list(found.values())


def _match(path: Path) -> list[Path]:
    """The files that a path or glob stands for."""
    if path.is_file():
        files = [path]
    elif path.is_dir():
        raise DataError(f"{path} is a folder; name its files, e.g. {path.name}/*.jsonl")
    elif not _GLOB & set(str(path)):
        raise DataError(_nothing_there(path))
    else:
        files = [Path(p) for p in sorted(glob.glob(str(path), recursive=True)) if Path(p).is_file()]
        if not files:
            raise DataError(_nothing_there(path))
    for file in files:
        if file.suffix.lower() not in READERS:
            raise DataError(f"{file.name}: unknown kind of file {file.suffix!r}; must be one of {', '.join(READERS)}")
    return files


def _nothing_there(path: Path) -> str:
    """Nothing at `path`: name the folder that is missing, or the most similar names in the one that is there."""
    folder = path.parent
    missing = None
    while not folder.is_dir() and folder != folder.parent:
        folder, missing = folder.parent, folder
    if missing is not None and not _GLOB & set(str(missing)):
        wanted, message = missing.name, f"there is no folder {missing}"
    else:
        wanted, message = path.name, f"nothing matches {path}" if _GLOB & set(str(path)) else f"there is no file {path}"
    # Compared without suffixes: any two .jsonl would be alike, and the right name with another suffix is worth showing.
    names = sorted(os.listdir(folder))
    stems = difflib.get_close_matches(Path(wanted).stem, sorted({Path(n).stem for n in names}), n=3, cutoff=0.6)
    close = [name for stem in stems for name in names if Path(name).stem == stem]
    return message + (f"; did you mean {' or '.join(close)}?" if close else "")


def _shown(file: Path, folder: Path) -> str:
    """A file's name for people: relative to the study file where it lies below it."""
    return str(file.relative_to(folder)) if file.is_relative_to(folder) else str(file)
