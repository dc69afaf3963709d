"""A domain as everything after it sees it: two sets of rows, a fingerprint and what was found while reading."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from duet_ray.domains.readers import BadRow
from duet_ray.domains.rows import RowSet
from duet_ray.errors import DataError

LAYOUT = 1
"""Raise it when the files of a cache folder, or the tokens a row becomes, change: old caches are then made anew."""

META, TRAIN, VALIDATION = "meta.json", "train.arrow", "validation.arrow"


@dataclass(frozen=True, kw_only=True)
class DomainReport:
    """What was found while a domain was read."""

    n_read: int
    """Rows in the sources, good and bad."""
    n_bad: int
    bad: tuple[BadRow, ...]
    """The first ten bad rows."""
    n_duplicates: int
    """Rows that repeat an earlier one, turn for turn. They are kept, in the training set."""
    n_cut: int
    """Rows longer than `training.max_tokens`."""
    n_tokens: int
    """Tokens of all good rows, after cutting."""
    n_train: int
    n_validation: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "DomainReport":
        return cls(**{**data, "bad": tuple(BadRow(**row) for row in data["bad"])})


@dataclass(frozen=True, kw_only=True)
class Domain:
    """One of the study's data sets, tokenised, split and on disk."""

    name: str
    index: int
    """Its place in the study file, and in every ratio."""
    train: RowSet
    validation: RowSet
    fingerprint: str
    """16 hex digits of everything that decides its rows: content, format, tokenizer, template, length, split."""
    report: DomainReport
    folder: Path


def open_domain(folder: Path, *, index: int = 0) -> Domain:
    """Open a prepared domain from its cache folder, e.g. in a worker; nothing is read anew.

    Args:
        folder: `Domain.folder`.
        index: the domain's place in the study, which its folder does not know: studies share caches.

    Raises:
        DataError: the folder is no complete cache of a domain, or one of another version.
    """
    folder = Path(folder)
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        if meta["layout"] != LAYOUT:
            raise DataError(f"{folder}: prepared in layout {meta['layout']}, this version reads {LAYOUT}")
        report = DomainReport.from_json(meta["report"])
        name, fingerprint = meta["name"], meta["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: not a prepared domain: {error}") from error
    train, validation = RowSet(folder / TRAIN), RowSet(folder / VALIDATION)
    if (len(train), len(validation)) != (report.n_train, report.n_validation):
        raise DataError(f"{folder}: holds {len(train)} + {len(validation)} rows, not the number it was made with")
    return Domain(
        name=name,
        index=index,
        train=train,
        validation=validation,
        fingerprint=fingerprint,
        report=report,
        folder=folder,
    )
