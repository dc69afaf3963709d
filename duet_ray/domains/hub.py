"""Data sets of the Hugging Face hub, through `datasets`: downloaded once into its own cache, then memory-mapped.

`hf:owner/name` is the hub; `hf:./folder` and `hf:/folder` hand a local copy to the same loader.
"""

import re
from collections.abc import Collection, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from duet_ray.config import fingerprint
from duet_ray.domains.readers import BadRow, Record, batch_records
from duet_ray.errors import DataError

_CHUNK_ROWS = 1024

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)  # "csv" alone is a reader's name
_SUBSET = re.compile(r"[^\x00-\x1f<>:/\\|?*]{1,128}")
_SPLIT = re.compile(r"[\w.]{1,64}(\[[-:%\d]{0,40}\])?(\(\w+\))?(\+[\w.\[\]:%-]{1,128})*")
_REF = re.compile(r"[A-Za-z0-9][\w./-]{0,127}", re.ASCII)
"""Names that become parts of paths in the cache of `datasets`."""


class HubSource:
    """One split of a data set. Loaded when it is first looked into."""

    def __init__(self, path: str, *, name: str, subset: str | None, split: str, revision: str | None) -> None:
        """Args:
        path: what `datasets.load_dataset` takes: a hub id or a local folder.
        name: how the source is called in messages and exports.
        subset: the data set's configuration, where it has several.
        revision: a commit to pin; without one, a changed data set gets another fingerprint.

        Raises:
            DataError: one of them is no name of the hub's, and might lead out of its cache.
        """
        if not Path(path).is_absolute() and not _HUB_ID.fullmatch(path):
            raise DataError(f"must be hf:owner/name, or hf:./folder for a local copy, got {path!r}")
        for key, value, pattern in (
            ("subset", subset, _SUBSET),
            ("split", split, _SPLIT),
            ("revision", revision, _REF),
        ):
            if value is not None and (not pattern.fullmatch(value) or ".." in value):
                raise DataError(f"{key}: {value!r} is not a name that the hub can have")
        self.path, self.name, self.subset, self.split, self.revision = path, name, subset, split, revision

    @cached_property
    def dataset(self) -> Any:
        """The split as a `datasets.Dataset`.

        Raises:
            DataError: there is no such data set, subset, split or revision, or no connection to fetch it.
        """
        import datasets

        if not Path(self.path).is_absolute() and Path(self.path).exists():
            raise DataError(f"{self.name}: {Path(self.path).absolute()} would be read in its place; start elsewhere")
        try:
            loaded = datasets.load_dataset(self.path, name=self.subset, split=self.split, revision=self.revision)
        except (OSError, ValueError, RuntimeError, TypeError, LookupError, datasets.exceptions.DatasetsError) as error:
            where = f"subset {self.subset or '(default)'}, split {self.split}, revision {self.revision or '(newest)'}"
            raise DataError(f"{self.name}: cannot be loaded ({where}): {error}") from error
        return loaded

    def digest(self) -> str:
        """The data set's own fingerprint (its builder's hash: the commit, or the files of a local copy)."""
        return fingerprint([self.dataset._fingerprint, self.subset, self.split, self.revision, len(self.dataset)])

    def stamp(self) -> object:
        return self.dataset._fingerprint

    def columns(self) -> list[str]:
        return list(self.dataset.column_names)

    def records(self, wanted: Collection[str]) -> Iterator[Record | BadRow]:
        """The rows, numbered from 1."""
        columns = [c for c in self.columns() if c in wanted] or self.columns()
        table = self.dataset.select_columns(columns).with_format("arrow")
        line = 1
        for chunk in table.iter(batch_size=_CHUNK_ROWS):
            for batch in chunk.to_batches():
                yield from batch_records(batch, self.name, line)
                line += batch.num_rows
