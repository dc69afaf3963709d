"""What is known before the first trial: experiments from before the study, and a ratio to start with.

Experiments are read from a CSV with a column of shares per domain and a column of values, in the user's own units and
direction. A table that is wrong in one row may be wrong in others that do not show it, so it is refused whole, with all
its problems at once; the one thing that is mended is a sum of shares within 1 % of 1, as rounding leaves it.

A run has a ratio on the study's lattice of whole rows, and is then like any other observation. A run outside the
study's bounds and constraints stays out: the model lives on the ratios that the study may train, and a run that only
they forbid would pull it to places where it can propose nothing.
"""

import csv
import difflib
import io
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from duet_ray.config import StudyConfig
from duet_ray.errors import DataError, DataErrors
from duet_ray.records import Direction, PastRun, Ratio
from duet_ray.search.simplex import SimplexSpace

SUM_TOLERANCE = 0.01
"""Shares that sum to 1 within this are renormalised; others are refused."""
SHOWN_PROBLEMS = 20

_EXACT = 1e-6
_DELIMITERS = ",;\t"


@dataclass(frozen=True, kw_only=True)
class RunColumns:
    """Which columns of a CSV are what."""

    domains: Mapping[str, str] = field(default_factory=dict)
    """Domain → column, where the column is not called as the domain."""
    value: str | None = None
    """None: a column called as the feedback, or `value`, or the only other one that holds numbers."""
    sem: str | None = None
    """Column of the value's standard error; None where it is not known."""
    fidelity: float | str = 1.0
    """Share of a whole trial that all runs are worth, or the column that says it for each."""


@dataclass(frozen=True, kw_only=True)
class RunRow:
    """One sound row."""

    line: int
    shares: tuple[float, ...]
    """`(n_domains,)` in the study's order, as the file has them: their sum is within 1 % of 1."""
    value: float
    sem: float | None
    fidelity: float

    @property
    def is_off(self) -> bool:
        """Whether its shares have to be renormalised."""
        return abs(math.fsum(self.shares) - 1) > _EXACT


@dataclass(frozen=True, kw_only=True)
class RunTable:
    """A CSV of past runs, read and found sound."""

    name: str
    """The file's name."""
    rows: tuple[RunRow, ...]
    value_column: str
    ignored: tuple[str, ...]
    """Columns that nobody reads."""

    @property
    def n_renormalised(self) -> int:
        return sum(row.is_off for row in self.rows)


@dataclass(frozen=True, kw_only=True)
class PlacedRuns:
    """Past runs on a study's lattice."""

    runs: tuple[PastRun, ...]
    """Those within the space of the study."""
    outside: tuple[int, ...]
    """Lines of those outside, which are left out."""
    n_moved: int
    """Runs of which a domain was moved by more than a row, or by more than 1 % of the mixture."""
    farthest: float
    """The largest such move: rows in one domain."""


def read_runs(path: str | Path, config: StudyConfig, columns: RunColumns | None = None) -> RunTable:
    """Read a CSV of past runs: UTF-8, a header, separated by comma, semicolon or tab.

    Where the separator is not a comma, numbers may have a decimal comma.

    Raises:
        DataErrors: every problem of the file, by line; of problems with rows the first 20.
        DataError: the study cannot be told such runs.
    """
    columns = columns or RunColumns()
    _refuse_study(config, columns)
    file = Path(path)
    names = [columns.domains.get(name, name) for name in config.domain_names]
    header, lines, decimal_comma = _table(file, names)
    header_problems = list(_header_problems(file, config, columns, header))
    if header_problems:
        raise DataErrors(header_problems)
    if not lines:
        raise DataError(f"{file}: has a header and no runs")
    reader = _Reader(file=file, header=header, decimal_comma=decimal_comma)
    value = columns.value or _value_column(reader, config, columns, lines)
    used = {*names, value, *(c for c in (columns.sem, columns.fidelity) if isinstance(c, str))}
    if any("." in cell for _, cells in lines for name, cell in zip(header, cells, strict=False) if name in used):
        reader = _Reader(file=file, header=header, decimal_comma=False)
    rows, problems = [], []
    for line, cells in lines:
        row, wrong = reader.row(line, cells, names, value, columns)
        problems += [DataError(f"{file}:{line}: {text}") for text in wrong]
        rows += [row] if row is not None else []
    if not problems and any(row.fidelity < 1 for row in rows) and config.search.fidelity is None:
        problems.append(
            DataError(
                "runs of a fidelity below 1 need search.fidelity in the study, or they are taken for whole ones; "
                "add for instance `search: {fidelity: {rows: [0.25]}}`, or leave the fidelity out"
            )
        )
    if problems:
        raise DataErrors(_first(problems))
    return RunTable(
        name=file.name,
        rows=tuple(rows),
        value_column=value,
        ignored=tuple(name for name in header if name and name not in used),
    )


def place_runs(table: RunTable, space: SimplexSpace) -> PlacedRuns:
    """Put runs on the lattice of a study, each on the nearest mixture of whole rows, and see which its space holds."""
    whole = SimplexSpace(
        names=space.names,
        n_rows=space.n_rows,
        lower=(0,) * space.n_domains,
        upper=(space.n_rows,) * space.n_domains,
    )
    shares = np.array([row.shares for row in table.rows])
    counts = whole.project_rows(shares / shares.sum(axis=1, keepdims=True))
    moves = np.abs(counts - shares * space.n_rows).max(axis=1)
    runs, outside, moved = [], [], []
    for row, placed, move in zip(table.rows, counts.tolist(), moves.tolist(), strict=True):
        if not space.contains(Ratio(counts=tuple(placed))):
            outside.append(row.line)
            continue
        if move > min(1.0, 0.01 * space.n_rows) + _EXACT:
            moved.append(move)
        runs.append(
            PastRun(
                counts=tuple(placed),
                value=row.value,
                sem=row.sem,
                fidelity=row.fidelity,
                source=f"{table.name}:{row.line}",
            )
        )
    return PlacedRuns(runs=tuple(runs), outside=tuple(outside), n_moved=len(moved), farthest=max(moved, default=0.0))


@dataclass(frozen=True, kw_only=True)
class ImportedRuns:
    """What became of a file of past runs."""

    table: RunTable
    placed: PlacedRuns
    new: tuple[PastRun, ...]
    """Those that the study did not know yet."""

    @property
    def n_known(self) -> int:
        return len(self.placed.runs) - len(self.new)

    def best(self, direction: Direction) -> PastRun:
        """The run with the best value among those of the highest fidelity: cheap values are another scale."""
        highest = max(run.fidelity for run in self.placed.runs)
        return min(
            (run for run in self.placed.runs if run.fidelity == highest), key=lambda run: direction.to_loss(run.value)
        )


def imported_runs(
    table: RunTable, space: SimplexSpace, known: Sequence[PastRun], outside: Literal["skip", "error"] = "skip"
) -> ImportedRuns:
    """Place the runs of a file, and tell those that are new from those that are `known`.

    Raises:
        DataError: none lies within the space, or one does not and `outside` is `error`.
    """
    placed = place_runs(table, space)
    if placed.outside and (outside == "error" or not placed.runs):
        which = lines_of(placed.outside) if placed.runs else "every run"
        raise DataError(
            f"{table.name}: outside the study's bounds, constraints or the rows there are: {which}; "
            "widen domains[].bounds or search.constraints, or take such runs out of the file"
        )
    return ImportedRuns(table=table, placed=placed, new=tuple(new_runs(known, placed.runs)))


def lines_of(lines: Sequence[int]) -> str:
    """`line 4`, `lines 4, 7, 9, …`: the first ten."""
    shown = ", ".join(map(str, lines[:10])) + (", …" if len(lines) > 10 else "")
    return f"line{'s'[: len(lines) != 1]} {shown}"


def new_runs(known: Sequence[PastRun], given: Sequence[PastRun]) -> list[PastRun]:
    """Those of `given` that are not `known`: a file may be imported again after rows were added or moved about.

    Runs are the same if they come from files of the same name and say the same; a file that says the same twice has
    two runs.
    """
    exactly = set(known)
    moved = [run for run in given if run not in exactly]
    left = Counter(map(_identity, exactly - set(given)))
    found = []
    for run in moved:
        key = _identity(run)
        if left[key] > 0:
            left[key] -= 1
        else:
            found.append(run)
    return found


def prior_ratio(
    space: SimplexSpace, prior: Literal["sizes"] | Mapping[str, float] | None, n_train_rows: Sequence[int]
) -> Ratio | None:
    """The ratio of `search.prior`: the nearest one that the study may train.

    Args:
        space: the study's.
        prior: `sizes`: shares in proportion to the domains' training rows; or domain → share, where domains left out
            have none; or None.
        n_train_rows: `(n_domains,)` training rows per domain.

    Returns:
        The ratio, within bounds and constraints; None without a prior.
    """
    if prior is None:
        return None
    if prior == "sizes":
        parts = np.array(n_train_rows, dtype=np.float64)
    else:
        assert not isinstance(prior, str), "the study file was checked"
        parts = np.array([prior.get(name, 0.0) for name in space.names], dtype=np.float64)
    assert parts.sum() > 0, "a study has rows, and its prior was checked"
    return space.project(parts / parts.sum())


# Reading --------------------------------------------------------------------------------------------------------


def _refuse_study(config: StudyConfig, columns: RunColumns) -> None:
    """Raise for a study that cannot use runs with a ratio and one value each."""
    if config.search.objective is not None:
        raise DataError("search.objective needs several metrics of every run, and an imported run has one value")
    if config.search.optimize == "model":
        raise DataError("search.optimize: model tries one ratio only, so runs of other ratios teach it nothing")
    if isinstance(columns.fidelity, float | int) and not 0 < columns.fidelity <= 1:
        raise DataError(f"the fidelity must be a share of a whole trial, above 0 and up to 1, got {columns.fidelity:g}")


def _table(file: Path, names: Sequence[str]) -> tuple[list[str], list[tuple[int, list[str]]], bool]:
    """Header, (line, cells) of every row that is not empty, and whether decimal commas are possible."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{file}: no such file") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: is not UTF-8 text (byte {error.start}); save it as CSV in UTF-8") from None
    delimiter = max(_DELIMITERS, key=lambda d: _fit(text, d, names))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    lines: list[tuple[int, list[str]]] = []
    end = 0
    try:
        for raw in reader:
            line, end = end + 1, reader.line_num
            cells = [cell.strip() for cell in raw]
            if not any(cells):
                continue
            if not header:
                header = cells
            else:
                lines.append((line, cells))
    except csv.Error as error:
        raise DataError(f"{file}:{end + 1}: is no CSV: {error}") from None
    if not header:
        raise DataError(f"{file}: is empty; it needs a header and a row per run")
    return header, lines, delimiter != ","


def _fit(text: str, delimiter: str, names: Sequence[str]) -> tuple[int, int]:
    """How well a delimiter splits the header: domains found, columns."""
    try:
        header = next((row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if any(row)), [])
    except csv.Error:
        return 0, 0
    found = {cell.strip() for cell in header}
    return sum(name in found for name in names), len(header)


def _header_problems(
    file: Path, config: StudyConfig, columns: RunColumns, header: Sequence[str]
) -> Iterator[DataError]:
    """Columns that are missing, stand twice, or are asked to be two things."""
    wanted: list[tuple[str, str]] = []
    for domain in columns.domains:
        if domain not in config.domain_names:
            yield DataError(
                f"--column {domain}={columns.domains[domain]}: there is no domain {domain}; "
                f"{_close(domain, config.domain_names, 'domains')}"
            )
    for domain in config.domain_names:
        name = columns.domains.get(domain, domain)
        wanted.append((name, f"domain {domain}"))
        if name not in header:
            remedy = f"; name it with --column {domain}=COLUMN, or add it (0 where it was not used)"
            yield DataError(
                f"{file}:1: there is no column {name!r} for domain {domain} ({_close(name, header, 'columns')})"
                f"{remedy if domain not in columns.domains else ''}"
            )
    given = [(columns.value, "the value"), (columns.sem, "the standard error")]
    given += [(columns.fidelity, "the fidelity")] if isinstance(columns.fidelity, str) else []
    for column, role in given:
        if column is not None:
            wanted.append((column, role))
            if column not in header:
                yield DataError(
                    f"{file}:1: there is no column {column!r} for {role} ({_close(column, header, 'columns')})"
                )
    for name, count in Counter(name for name, _ in wanted).items():
        if count > 1:
            roles = " and ".join(role for other, role in wanted if other == name)
            yield DataError(f"{file}:1: column {name!r} cannot be {roles} at once")
        if header.count(name) > 1:
            yield DataError(f"{file}:1: column {name!r} stands {header.count(name)} times")


def _value_column(
    reader: "_Reader", config: StudyConfig, columns: RunColumns, lines: Sequence[tuple[int, list[str]]]
) -> str:
    """The column of values where nobody named it.

    Raises:
        DataError: none or several could be it.
    """
    header = reader.header
    taken = {columns.domains.get(name, name) for name in config.domain_names}
    taken |= {c for c in (columns.sem, columns.fidelity) if isinstance(c, str)}
    free = [name for name in header if name and name not in taken]
    for name in (config.feedback.shown_name, config.feedback.metric_key, "value"):
        if name in free and header.count(name) == 1:
            return name

    def is_numeric(name: str) -> bool:
        at = header.index(name)
        cells = [cells[at] for _, cells in lines if at < len(cells) and cells[at]]
        return bool(cells) and all(reader.number(cell) is not None for cell in cells)

    numeric = [name for name in dict.fromkeys(free) if is_numeric(name) and name not in ("sem", "fidelity")]
    if len(numeric) == 1 and header.count(numeric[0]) == 1:
        return numeric[0]
    found = f"{', '.join(numeric)} could be it" if numeric else "no other column holds numbers"
    raise DataError(
        f"{reader.file}:1: which column holds the value? There is no {config.feedback.shown_name!r} and no 'value', "
        f"and {found}; name it with --value COLUMN"
    )


@dataclass(frozen=True, kw_only=True)
class _Reader:
    """Reads the cells of one file."""

    file: Path
    header: Sequence[str]
    decimal_comma: bool

    def number(self, cell: str) -> float | None:
        """A cell as a number, which may be infinite or not a number; None where it is text."""
        if self.decimal_comma and cell.count(",") == 1 and "." not in cell:
            cell = cell.replace(",", ".")
        try:
            return float(cell) if "_" not in cell else None
        except ValueError:
            return None

    def row(
        self, line: int, cells: Sequence[str], names: Sequence[str], value: str, columns: RunColumns
    ) -> tuple[RunRow | None, list[str]]:
        """One row and what is wrong with it; None for the row as soon as anything is."""
        problems: list[str] = []
        if len(cells) != len(self.header) and any(cells[len(self.header) :]):
            return None, [f"has {len(cells)} cells, the header {len(self.header)}"]
        at = {name: cells[place] for place, name in enumerate(self.header) if place < len(cells)}

        def read(name: str, low: float, allowed: str, high: float = math.inf, *, above: bool = False) -> float:
            cell = at.get(name, "")
            number = self.number(cell) if cell else None
            if not cell:
                problems.append(f"{name} is missing")
            elif number is None:
                problems.append(f"{name} must be a number, got {cell[:40]!r}")
            elif not math.isfinite(number):
                problems.append(f"{name} must be finite, got {cell}")
            elif number < low or number > high or (above and number == low):
                problems.append(f"{name} must be {allowed}, got {cell}")
            return math.nan if number is None else number

        shares = tuple(read(name, 0, "a share >= 0") for name in names)
        if not problems and abs((total := math.fsum(shares)) - 1) > SUM_TOLERANCE + 1e-9:
            hint = "" if total < 1.5 else "; write shares, not percent or numbers of rows"
            problems.append(f"the shares must sum to 1 (within 1 %), got {total:.6g}{hint}")
        result = read(value, -math.inf, "a number")
        sem = read(columns.sem, 0, "> 0", above=True) if columns.sem is not None else None
        fidelity = columns.fidelity
        if isinstance(fidelity, str):
            fidelity = read(fidelity, 0, "above 0 and up to 1", 1, above=True)
        if problems:
            return None, problems
        return RunRow(line=line, shares=shares, value=result, sem=sem, fidelity=float(fidelity)), []


def _close(name: str, known: Sequence[str], what: str) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"{what} here: {', '.join(known)}"


def _first(problems: list[DataError]) -> list[DataError]:
    n_more = len(problems) - SHOWN_PROBLEMS
    return problems if n_more <= 0 else [*problems[:SHOWN_PROBLEMS], DataError(f"… and {n_more} more like these")]


def _identity(run: PastRun) -> tuple[str, tuple[int, ...], float, float | None, float]:
    return run.source.rpartition(":")[0], run.counts, run.value, run.sem, run.fidelity
