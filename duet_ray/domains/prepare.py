"""Read, check, tokenise and split every domain once, into a cache that any later study with the same data opens.

One pass reads the sources in chunks and writes all good rows; a second copies them into a training and a validation
file. What stays in memory is eight bytes a row: the hash of its content, from which duplicates are counted and the
split is drawn. The cache folder is named after a fingerprint of everything that decides the rows, is written under a
temporary name, synced and renamed into place: a folder that is there is complete, and two processes that prepare the
same domain at once make the same folder, of which the first stays.
"""

import hashlib
import json
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from duet_ray import seeds
from duet_ray.config import StudyConfig, fingerprint
from duet_ray.domains.domain import LAYOUT, META, TRAIN, VALIDATION, Domain, DomainReport, open_domain
from duet_ray.domains.encode import EncodedRow, EncodeSettings, chat_template, encode_rows, special_tokens
from duet_ray.domains.formats import ParsedRow, check_columns, parse_records, wanted_columns
from duet_ray.domains.readers import BadRow
from duet_ray.domains.rows import BATCH_ROWS, RowWriter, split_file, to_batch
from duet_ray.domains.sources import Source, find_sources
from duet_ray.errors import DataError, DataErrors
from duet_ray.files import new_folder, remove_stale, write_json

N_BAD_SHOWN = 10

OnProgress = Callable[[str, int], None]
"""Called with (domain name, rows read so far)."""


def prepare_domains(config: StudyConfig, tokenizer: Any, *, on_progress: OnProgress | None = None) -> list[Domain]:
    """Make every domain of a study ready, from its cache where there is one.

    Args:
        config: the study.
        tokenizer: of the study's model.
        on_progress: called after every chunk of rows that is read; not at all for a cached domain.

    Returns:
        The domains in the study's order.

    Raises:
        DataErrors: with the problems of all domains: nothing at a source, a column not found, too many bad rows, too
            few rows to split.
    """
    domains: list[Domain] = []
    errors: list[Exception] = []
    identity = tokenizer_identity(tokenizer)
    for index, domain in enumerate(config.domains):
        try:
            domains.append(_prepare(config, index, tokenizer, identity, on_progress))
        except DataErrors as several:
            errors.extend(several.errors)
        except DataError as error:
            errors.append(DataError(f"domains[{index}] ({domain.name}): {error}"))
    if errors:
        raise DataErrors(errors)
    return domains


def cache_folder(config: StudyConfig) -> Path:
    """Where prepared domains lie; shared by all studies of one storage."""
    return config.resolve_path(config.storage) / "cache" / "domains"


def tokenizer_identity(tokenizer: Any) -> str:
    """A hash of what a tokenizer does with text, without the state that calls leave behind in it."""
    if tokenizer.is_fast:
        model = json.loads(tokenizer.backend_tokenizer.to_str())
        model.pop("truncation", None)
        model.pop("padding", None)
    else:
        model = {"class": type(tokenizer).__qualname__, "vocabulary": tokenizer.get_vocab()}
    return fingerprint([model, tokenizer.bos_token, tokenizer.eos_token, special_tokens(tokenizer)])


def held_out(keys: np.ndarray, fraction: float, generator: np.random.Generator) -> np.ndarray:
    """Choose the validation rows of a domain.

    Rows that stand there several times stay together, on the training side: a copy in both halves would let selection
    reward a row for being itself. Only where every row has a copy does one such group go to validation, the smallest.

    Args:
        keys: `(n_rows,)` a hash of each row's content.
        fraction: share of rows to hold out; above 0 it is at least one row, and at least one stays for training.
        generator: decides which.

    Returns:
        `(n_rows,)` bool, True for validation.

    Raises:
        DataError: `fraction` is above 0 and there are no two different rows.
    """
    chosen = np.zeros(len(keys), dtype=bool)
    if fraction == 0:
        return chosen
    # Sorted, equal keys stand side by side: that takes half the memory of `np.unique` with all it can return.
    order = np.argsort(keys)
    begins = np.concatenate([[True], np.diff(keys[order]) != 0])
    if np.count_nonzero(begins) < 2:
        what = "has one row" if len(keys) == 1 else f"has {len(keys)} rows that are all the same"
        raise DataError(f"{what}, and a validation set needs two different ones: add rows or set "
                        "data.validation_fraction: 0")  # fmt: skip
    is_alone = np.empty(len(keys), dtype=bool)
    is_alone[order] = begins & np.append(begins[1:], True)
    del order
    alone = np.flatnonzero(is_alone)
    if len(alone) == 0:
        _, group, size = np.unique(keys, return_inverse=True, return_counts=True)
        return np.asarray(group == generator.choice(np.flatnonzero(size == size.min())))
    n_chosen = min(max(round(fraction * len(keys)), 1), len(keys) - 1, len(alone))
    chosen[generator.choice(alone, n_chosen, replace=False)] = True
    return chosen


def check_bad_rows(report: DomainReport, most: int | float, setting: str = "data.max_bad_rows") -> None:
    """Refuse a domain with more bad rows than its setting allows.

    Raises:
        DataError: naming the first of them, one a line.
    """
    allowed = most * report.n_read if isinstance(most, float) and most < 1 else most
    if report.n_bad <= allowed:
        return
    lines = [f"  {row}" for row in report.bad]
    if report.n_bad > len(report.bad):
        lines.append(f"  … and {report.n_bad - len(report.bad)} more")
    head = f"{report.n_bad} of {report.n_read} rows are bad, more than {setting} = {most} allows:"
    raise DataError("\n".join([head, *lines]))


def _prepare(config: StudyConfig, index: int, tokenizer: Any, identity: str, on_progress: OnProgress | None) -> Domain:
    domain = config.domains[index]
    check_columns(domain.format, domain.columns, f"domains[{index}].columns")
    sources = find_sources(config, index)
    stamps = [source.stamp() for source in sources]
    settings = EncodeSettings.from_config(config)
    identity_of_all = {
        "layout": LAYOUT,
        "sources": [source.digest() for source in sources],
        "format": domain.format,
        "columns": dict(domain.columns),
        "tokenizer": identity,
        "template": chat_template(tokenizer, settings),
        "max_tokens": settings.max_tokens,
        "loss_on": settings.loss_on,
        "split": [domain.name, config.seed, config.data.validation_fraction],
    }
    if domain.rows is not None:
        identity_of_all["rows"] = domain.rows
    mark = fingerprint(identity_of_all)
    folder = cache_folder(config) / f"{domain.name}-{mark}"
    prepared = _reopen(folder, index)
    if prepared is None:
        remove_stale(folder.parent, f"{domain.name}-*")
        with new_folder(folder) as work:
            rows = _Rows(config, index, tokenizer, settings, sources, on_progress)
            report = _write_halves(rows, work, config)
            if [source.stamp() for source in sources] != stamps:
                raise DataError("a source was changed while it was read: start again")
            _write_meta(work / META, domain.name, mark, report)
        prepared = open_domain(folder, index=index)
    check_bad_rows(prepared.report, *_most_bad_rows(config, index))
    return prepared


def _most_bad_rows(config: StudyConfig, index: int) -> tuple[int | float, str]:
    """How many bad rows a domain may have, and the setting that says so."""
    own = config.domains[index].max_bad_rows
    return (config.data.max_bad_rows, "data.max_bad_rows") if own is None else (own, f"domains[{index}].max_bad_rows")


def _reopen(folder: Path, index: int) -> Domain | None:
    """A complete cache, or None; what a crash of the disk left broken is moved out of the way."""
    try:
        return open_domain(folder, index=index)
    except DataError:
        if folder.exists():
            broken = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp-", dir=folder.parent))
            folder.rename(broken / "broken")
            shutil.rmtree(broken)
        return None


@dataclass
class _Rows:
    """One reading of a domain's sources: what goes to disk, and what is counted on the way."""

    config: StudyConfig
    index: int
    tokenizer: Any
    settings: EncodeSettings
    sources: Sequence[Source]
    on_progress: OnProgress | None
    n_read: int = 0
    n_cut: int = 0
    n_tokens: int = 0
    n_bad: int = 0
    bad: list[BadRow] = field(default_factory=list)
    keys: array = field(default_factory=lambda: array("Q"))

    def write(self, writer: RowWriter) -> None:
        """Read, parse and tokenise everything, chunk by chunk."""
        files = {source.name: number for number, source in enumerate(self.sources)}
        for chunk in _chunks(self._parsed(), BATCH_ROWS):
            parsed = [row for row in chunk if isinstance(row, ParsedRow)]
            encoded = iter(encode_rows(parsed, self.tokenizer, self.settings))
            kept: list[tuple[ParsedRow, EncodedRow]] = []
            for row in chunk:
                result = next(encoded) if isinstance(row, ParsedRow) else row
                if isinstance(row, ParsedRow) and isinstance(result, EncodedRow):
                    kept.append((row, result))
                elif isinstance(result, BadRow):
                    self._count_bad(result)
            self._count_good(kept)
            writer.write(to_batch([row for row, _ in kept], [e for _, e in kept], files))
            self.n_read += len(chunk)
            if self.on_progress:
                self.on_progress(self.config.domains[self.index].name, self.n_read)

    def report(self, n_validation: int) -> DomainReport:
        """What was counted, once everything is read."""
        return DomainReport(
            n_read=self.n_read,
            n_bad=self.n_bad,
            bad=tuple(self.bad),
            n_duplicates=len(self.keys) - len(np.unique(np.asarray(self.keys))),
            n_cut=self.n_cut,
            n_tokens=self.n_tokens,
            n_train=len(self.keys) - n_validation,
            n_validation=n_validation,
        )

    def _parsed(self) -> Iterator[ParsedRow | BadRow]:
        domain = self.config.domains[self.index]
        wanted = wanted_columns(domain.format, domain.columns)
        records = (record for source in self.sources for record in source.records(wanted))
        yield from parse_records(
            islice(records, *slice_of(domain.rows)),
            domain.format,
            domain.columns,
            there=self.sources[0].columns,
            setting=f"domains[{self.index}].columns",
        )

    def _count_bad(self, row: BadRow) -> None:
        self.n_bad += 1
        if len(self.bad) < N_BAD_SHOWN:
            self.bad.append(row)

    def _count_good(self, kept: Sequence[tuple[ParsedRow, EncodedRow]]) -> None:
        for row, encoded in kept:
            self.keys.append(row.key)
            self.n_tokens += len(encoded.tokens)
            self.n_cut += encoded.was_cut


def _write_halves(rows: _Rows, folder: Path, config: StudyConfig) -> DomainReport:
    """Write the training and the validation file."""
    everything = folder / "rows.arrow"
    with RowWriter(everything, [source.name for source in rows.sources]) as writer:
        rows.write(writer)
    if rows.n_read == 0:
        raise DataError(f"no rows in {', '.join(source.name for source in rows.sources)}")
    check_bad_rows(rows.report(0), *_most_bad_rows(config, rows.index))
    if not rows.keys:
        raise DataError(f"no good row among {rows.n_read}; the first: {rows.bad[0]}")
    name = config.domains[rows.index].name
    generator = seeds.generator(config.seed, "split", _name_key(name))
    chosen = held_out(np.asarray(rows.keys), config.data.validation_fraction, generator)
    split_file(everything, chosen, folder / TRAIN, folder / VALIDATION)
    everything.unlink()
    return rows.report(int(chosen.sum()))


def _name_key(name: str) -> int:
    """A domain's own stream of random numbers: keyed on its name, so that the order of domains does not matter."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def slice_of(rows: str | None) -> tuple[int | None, int | None, int | None]:
    """`"start:stop:step"` as the arguments of `islice`; all rows where there is none."""
    parts = [int(part) if part else None for part in (rows or ":").split(":")]
    return (*parts, None)[:3]  # type: ignore[return-value]


def _chunks(rows: Iterator[ParsedRow | BadRow], size: int) -> Iterator[list[ParsedRow | BadRow]]:
    while chunk := list(islice(rows, size)):
        yield chunk


def _write_meta(file: Path, name: str, mark: str, report: DomainReport) -> None:
    meta: Mapping[str, Any] = {"layout": LAYOUT, "name": name, "fingerprint": mark, "report": report.to_json()}
    write_json(file, meta)
