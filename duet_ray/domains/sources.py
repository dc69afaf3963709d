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
from duet_ray.errors import ConfigError, DataError, DataErrors

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
        return f"{self.path.name.encode('utf-8', 'backslashreplace').decode()}:{content}"

    def stamp(self) -> object:
        try:
            status = self.path.stat()
        except OSError as error:
            raise DataError(f"{self.name}: cannot be read: {error}") from error
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
        try:
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
            for file in _match(config.resolve_path(pattern)):
                found[file] = FileSource(file, _shown(file, config.folder))
        except (DataError, ConfigError) as error:
            errors.append(DataError(f"domains[{index}].source ({domain.name}): {pattern!r}: {error}"))
    if errors:
        raise DataErrors(errors)
    return list(found.values())


def _match(path: Path) -> list[Path]:
    """The files that a path or glob stands for."""
    # `os.path` rather than `Path`, which raises for a name that is too long or a folder that is closed.
    if os.path.isfile(path):
        files = [path]
    elif os.path.isdir(path):
        raise DataError(f"{path} is a folder; name its files, e.g. {path.name}/*.jsonl")
    elif not _GLOB & set(str(path)):
        raise DataError(_nothing_there(path))
    else:
        files = [Path(name) for name in sorted(_expand(path)) if os.path.isfile(name)]
        if not files:
            raise DataError(_nothing_there(path))
    for file in files:
        if file.suffix.lower() not in READERS:
            raise DataError(f"{file.name}: unknown kind of file {file.suffix!r}; must be one of {', '.join(READERS)}")
    return files


def _expand(pattern: Path) -> set[str]:
    """What a glob stands for. `**` goes through links to folders, and into each folder once: links may form a ring."""
    if "**" not in pattern.parts:
        return set(glob.glob(str(pattern)))
    at = pattern.parts.index("**")
    above, below = Path(*pattern.parts[:at]), pattern.parts[at + 1 :] or ("*",)
    found: set[str] = set()
    for base in glob.glob(str(above)):
        for folder in _folders_below(base):
            found |= _expand(Path(glob.escape(folder), *below))
    return found


def _folders_below(base: str) -> Iterator[str]:
    """A folder and all below it, each once, but hidden ones, which a glob does not look into."""
    seen: set[tuple[int, int]] = set()
    for folder, names, _ in os.walk(base, followlinks=True):
        try:
            status = os.stat(folder)
        except OSError:
            status = None
        if status is None or (status.st_dev, status.st_ino) in seen:
            names.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        names[:] = sorted(name for name in names if not name.startswith("."))
        yield folder


def _nothing_there(path: Path) -> str:
    """Nothing at `path`: name the folder that is missing, or the most similar names in the one that is there."""
    folder = path.parent
    missing = None
    while not os.path.isdir(folder) and folder != folder.parent:
        folder, missing = folder.parent, folder
    if missing is not None and not _GLOB & set(str(missing)):
        wanted, message = missing.name, f"there is no folder {missing}"
    else:
        wanted, message = path.name, f"nothing matches {path}" if _GLOB & set(str(path)) else f"there is no file {path}"
    # Compared without suffixes: any two .jsonl would be alike, and the right name with another suffix is worth showing.
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        return f"{message}: {folder} cannot be looked into: {error.strerror}"
    stems = difflib.get_close_matches(Path(wanted).stem, sorted({Path(n).stem for n in names}), n=3, cutoff=0.6)
    close = [name for stem in stems for name in names if Path(name).stem == stem]
    return message + (f"; did you mean {' or '.join(close)}?" if close else "")


def _shown(file: Path, folder: Path) -> str:
    """A file's name for people: relative to the study file where it lies below it. Half a character is spelled out."""
    name = str(file.relative_to(folder)) if file.is_relative_to(folder) else str(file)
    return name.encode("utf-8", "backslashreplace").decode()
