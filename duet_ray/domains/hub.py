"""Data sets of the Hugging Face hub, through `datasets`: downloaded once into its own cache, then memory-mapped.

`hf:owner/name` is the hub; `hf:./folder` and `hf:/folder` hand a local copy to the same loader.
"""

from collections.abc import Collection, Iterator
from functools import cached_property
from typing import Any

from duet_ray.config import fingerprint
from duet_ray.domains.readers import BadRow, Record, batch_records
from duet_ray.errors import DataError

_CHUNK_ROWS = 1024


class HubSource:
    """One split of a data set. Loaded when it is first looked into."""

    def __init__(self, path: str, *, name: str, subset: str | None, split: str, revision: str | None) -> None:
        """Args:
        path: what `datasets.load_dataset` takes: a hub id or a local folder.
        name: how the source is called in messages and exports.
        subset: the data set's configuration, where it has several.
        revision: a commit to pin; without one, a changed data set gets another fingerprint.
        """
        self.path, self.name, self.subset, self.split, self.revision = path, name, subset, split, revision

    @cached_property
    def dataset(self) -> Any:
        """The split as a `datasets.Dataset`.

        Raises:
            DataError: there is no such data set, subset, split or revision, or no connection to fetch it.
        """
        import datasets

        try:
            loaded = datasets.load_dataset(self.path, name=self.subset, split=self.split, revision=self.revision)
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
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
