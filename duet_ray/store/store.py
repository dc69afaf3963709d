"""The study's store: every fact in one transaction, one writer at a time.

Only the driver writes, while it holds the lease (`lease`); anybody reads, at any time. What a method here does is one
transaction, whole or not at all (`transactions`), in SQLite or in PostgreSQL (`base.Database`).
"""

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from sqlalchemy import Connection, delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from duet_ray.errors import RatioError, StoreError
from duet_ray.records import Observation, PastRun, Ratio, SampleResult, Settings, Trial, settings_from, trial_name
from duet_ray.store import schema
from duet_ray.store.base import Database
from duet_ray.store.lease import Lease
from duet_ray.store.postgresql import PostgreSQL
from duet_ray.store.sqlite import SQLite
from duet_ray.store.transactions import Transactions
from duet_ray.store.upgrade import bring_up_to_date, make_tables, version_of

_NO_RECORD = (AssertionError, AttributeError, KeyError, RatioError, TypeError, ValueError)
"""What a row raises that is none of ours."""

MOST_AT_ONCE = 500
"""Values in one condition: databases have limits for that."""

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class StudyRecord:
    """The one row of the study table."""

    name: str
    config: dict[str, Any]
    inputs: dict[str, Any]
    resolved: dict[str, Any]
    domains: list[dict[str, Any]]
    versions: dict[str, str]
    status: str
    created: float
    seconds: float


def _writes(method: Callable[Concatenate["Store", Connection, P], T]) -> Callable[Concatenate["Store", P], T]:
    """A method whose body is one write of the driver. It may run again if the server goes away in the middle."""

    @functools.wraps(method)
    def write(self: "Store", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._transactions.write(lambda connection: method(self, connection, *args, **kwargs))

    return write


def _reads(method: Callable[Concatenate["Store", Connection, P], T]) -> Callable[Concatenate["Store", P], T]:
    """A method whose body reads one snapshot: what is read together was true together."""

    @functools.wraps(method)
    def read(self: "Store", /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return self._transactions.read(lambda connection: method(self, connection, *args, **kwargs))
        except _NO_RECORD as error:
            raise StoreError(f"{self.place}: is damaged: a row makes no sense ({error!r})") from error

    return read


class NoStudy(StoreError):
    """There is no study where one was looked for."""


class Store:
    """A study's store.

    Readers may open it at any time. To write, enter `writing()`, which takes the driver's lease.
    """

    def __init__(self, folder: Path, *, create: bool = False, url: str | None = None) -> None:
        """Open the store of the study whose folder this is.

        Args:
            create: make it if there is none.
            url: `postgresql+psycopg://user@host/database` or `sqlite:////file`; None is `study.db` in the folder.

        Raises:
            NoStudy: there is none, and `create` is False.
            StoreError: it cannot be read, it holds another study, a newer duet_ray wrote it, or it is SQLite on a
                network file system.
        """
        folder = Path(folder)
        database = _database(folder, url)
        if create:
            _make_folders(folder, database)
        self.url = url
        self.place = database.place
        """For messages: the file, or the URL."""
        self._transactions = Transactions(database, folder.name)
        self._lease = Lease(self._transactions)
        self._samples: dict[tuple[int, int], SampleResult] = {}
        try:
            self._open(folder, create=create, is_own_file=url is None)
        except BaseException:
            self.close()
            raise

    def _open(self, folder: Path, *, create: bool, is_own_file: bool) -> None:
        database, version = self._transactions.database, None
        if database.is_there():
            version = self._transactions.read(lambda connection: version_of(connection, database.schema))
        if version is None and not create:
            where = f"{folder}: there is no study here (no study.db)"
            other = f"{self.place}: there is no study {folder.name} here"
            raise NoStudy(f"{where if is_own_file else other}; `duet run` starts one")
        if version is None or version < schema.SCHEMA_VERSION:
            self._transactions.exclusive(lambda connection: _make_ready(connection, database))
        elif version > schema.SCHEMA_VERSION:
            raise StoreError(
                f"{self.place}: written by a newer duet_ray (schema {version}, this one knows "
                f"{schema.SCHEMA_VERSION}); upgrade duet_ray"
            )
        name = self._transactions.read(lambda connection: connection.scalar(select(schema.study.c.name)))
        if not is_own_file and name is not None and name != folder.name:
            raise StoreError(
                f"{self.place}: holds another study, {name}, not {folder.name}; "
                f"give each study a file of its own in `store`"
            )

    def close(self) -> None:
        self._transactions.close()

    @contextmanager
    def writing(self, on_wait: Callable[[str], None] | None = None) -> Iterator["Store"]:
        """Hold the driver's lease.

        A holder that is dead is replaced at once where that can be seen, on this machine. One elsewhere is waited for:
        about a minute without a sign of life, and it is taken for dead.

        Args:
            on_wait: told once whom this waits for.

        Raises:
            StudyLocked: another driver holds this study and lives; names its host and process.
        """
        with self._lease.held(on_wait):
            yield self

    def renew(self) -> None:
        """Tell others that this driver lives. A thread does so by itself while the lease is held."""
        self._lease.renew()

    # Writing ----------------------------------------------------------------------------------------------------

    @_writes
    def create_study(
        self, connection: Connection, *, name: str, config: Mapping[str, Any], versions: Mapping[str, str]
    ) -> None:
        """Write the study's own row; once."""
        connection.execute(
            insert(schema.study).values(
                id=1, name=name, schema_version=schema.SCHEMA_VERSION, config=dict(config), inputs={}, resolved={},
                domains=[], versions=dict(versions), status="new", created=time.time(), seconds=0.0,
            )
        )  # fmt: skip

    @_writes
    def update_study(self, connection: Connection, **values: Any) -> None:
        """Set columns of the study's row: `config`, `inputs`, `resolved`, `domains`, `status`, `versions`."""
        connection.execute(update(schema.study).values(**values))

    @_writes
    def add_seconds(self, connection: Connection, seconds: float) -> None:
        """Add to the time spent running."""
        connection.execute(update(schema.study).values(seconds=schema.study.c.seconds + seconds))

    @_writes
    def add_trial(
        self,
        connection: Connection,
        number: int,
        kind: str,
        ratio: Ratio | None,
        method: str,
        *,
        settings: Settings = (),
        fidelity: float = 1.0,
        k: int | None = None,
    ) -> None:
        """Record a point before anything is trained on it. The same again has no effect; another point is refused."""
        counts = list(ratio.counts) if ratio is not None else None
        plain: list[list[Any]] = [[path, list(v) if isinstance(v, tuple) else v] for path, v in settings]
        row = connection.execute(select(schema.trial).where(schema.trial.c.number == number)).mappings().first()
        if row is None:
            connection.execute(
                insert(schema.trial).values(
                    number=number,
                    kind=kind,
                    counts=counts,
                    status="pending",
                    method=method,
                    settings=plain,
                    fidelity=fidelity,
                    k=k,
                )
            )
        elif row["counts"] != counts:
            raise StoreError(f"trial {trial_name(number)} has ratio {row['counts']}, not {counts}")
        elif (row["settings"], row["fidelity"]) != (plain, fidelity):
            had, given = dict(row["settings"]), dict(plain)
            raise StoreError(
                f"trial {trial_name(number)} has settings {had} at fidelity {row['fidelity']:g}, "
                f"not {given} at {fidelity:g}"
            )

    @_writes
    def add_sample(self, connection: Connection, result: SampleResult) -> bool:
        """Record a finished or failed sample.

        Returns:
            False when it was known already: the first result stands.
        """
        key = (schema.sample.c.trial == result.spec.trial) & (schema.sample.c.sample == result.spec.sample)
        if connection.execute(select(schema.sample.c.trial).where(key)).first() is not None:
            return False
        connection.execute(
            insert(schema.sample).values(
                trial=result.spec.trial, sample=result.spec.sample, value=result.value, result=result.to_json()
            )
        )
        if result.adapter is not None:
            connection.execute(
                insert(schema.artifact).values(
                    trial=result.spec.trial, sample=result.spec.sample, path=result.adapter, kept=1
                )
            )
        return True

    @_writes
    def add_observation(self, connection: Connection, number: int, observation: Observation) -> None:
        """Record a trial's observation and mark the trial done, in one transaction."""
        try:
            connection.execute(insert(schema.observation).values(trial=number, **asdict(observation)))
        except IntegrityError:
            raise StoreError(f"trial {trial_name(number)} has an observation already") from None
        connection.execute(update(schema.trial).where(schema.trial.c.number == number).values(status="done"))

    @_writes
    def finish_trial(self, connection: Connection, number: int) -> None:
        """Mark a trial done without an observation: a confirmation, whose samples speak for themselves."""
        connection.execute(update(schema.trial).where(schema.trial.c.number == number).values(status="done"))

    @_writes
    def fail_trial(self, connection: Connection, number: int, reason: str) -> None:
        """Mark a trial as failed: it has no observation and never will."""
        connection.execute(
            update(schema.trial).where(schema.trial.c.number == number).values(status="failed", reason=reason)
        )

    @_writes
    def drop_artifact(self, connection: Connection, trial: int, sample: int) -> None:
        """Record that a sample's adapter is deleted."""
        connection.execute(
            update(schema.artifact)
            .where((schema.artifact.c.trial == trial) & (schema.artifact.c.sample == sample))
            .values(kept=0)
        )

    @_writes
    def set_posterior(
        self,
        connection: Connection,
        posterior: Mapping[int, tuple[float, float | None]],
        ranking: Sequence[int] | None = None,
    ) -> None:
        """Replace what the search's model says of the trials, and their order.

        Args:
            posterior: trial → (mean, standard deviation), in the user's own direction; the deviation is None where the
                mean is the observation itself.
            ranking: the trials that may be recommended, best first.
        """
        places = {number: place for place, number in enumerate(ranking or ())}
        rows = [
            {"trial": number, "mean": mean, "sd": sd, "place": places.get(number)}
            for number, (mean, sd) in posterior.items()
        ]
        connection.execute(delete(schema.posterior))
        if rows:
            connection.execute(insert(schema.posterior), rows)

    @_writes
    def add_past_runs(self, connection: Connection, runs: Sequence[PastRun]) -> int:
        """Record experiments from before the study. One that is known already, from the same place, is not added again.

        Returns:
            How many were added.
        """
        known = set(_past_runs(connection))
        new = [run for run in dict.fromkeys(runs) if run not in known]
        if new:
            rows = [{**asdict(run), "counts": list(run.counts)} for run in new]
            connection.execute(insert(schema.past_run), rows)
        return len(new)

    # Reading ----------------------------------------------------------------------------------------------------

    @_reads
    def study(self, connection: Connection) -> StudyRecord | None:
        """The study's own row; None in a store that was just made."""
        row = connection.execute(select(schema.study)).mappings().first()
        if row is None:
            return None
        return StudyRecord(**{name: row[name] for name in StudyRecord.__dataclass_fields__})

    @_reads
    def n_drivers(self, connection: Connection) -> int:
        """How often a driver has taken this study up."""
        return int(connection.scalar(select(schema.driver.c.fence)) or 0)

    @_reads
    def trials(self, connection: Connection) -> list[Trial]:
        """Every trial with its samples and observation, in order of number."""
        trials = connection.execute(select(schema.trial).order_by(schema.trial.c.number)).mappings().all()
        by_trial = self._samples_by_trial(connection)
        observations = {
            row["trial"]: Observation(**{name: row[name] for name in Observation.__dataclass_fields__})
            for row in connection.execute(select(schema.observation)).mappings()
        }
        return [
            Trial(
                number=row["number"],
                kind=row["kind"],
                ratio=Ratio(counts=tuple(row["counts"])) if row["counts"] is not None else None,
                status=row["status"],
                method=row["method"],
                reason=row["reason"],
                samples=tuple(by_trial.get(row["number"], ())),
                observation=observations.get(row["number"]),
                settings=settings_from(row["settings"]),
                fidelity=row["fidelity"],
                k=row["k"],
            )
            for row in trials
        ]

    def _samples_by_trial(self, connection: Connection) -> dict[int, list[SampleResult]]:
        """Trial → its samples in order. A sample never changes once it is there: each is read and understood once."""
        key = (schema.sample.c.trial, schema.sample.c.sample)
        there = [(row.trial, row.sample) for row in connection.execute(select(*key).order_by(*key))]
        missing = sorted({trial for trial, sample in there if (trial, sample) not in self._samples})
        for first in range(0, len(missing), MOST_AT_ONCE):
            of = schema.sample.c.trial.in_(missing[first : first + MOST_AT_ONCE])
            for row in connection.execute(select(*key, schema.sample.c.result).where(of)):
                self._samples[row.trial, row.sample] = SampleResult.from_json(row.result)
        by_trial: dict[int, list[SampleResult]] = {}
        for trial, sample in there:
            by_trial.setdefault(trial, []).append(self._samples[trial, sample])
        return by_trial

    @_reads
    def kept_artifacts(self, connection: Connection) -> dict[tuple[int, int], str]:
        """(trial, sample) → the place of its model (see `kept_models`), for those that are not deleted."""
        rows = connection.execute(select(schema.artifact).where(schema.artifact.c.kept == 1)).mappings()
        return {(row["trial"], row["sample"]): row["path"] for row in rows}

    @_reads
    def posterior(self, connection: Connection) -> dict[int, tuple[float, float]]:
        """Trial → the model's (mean, standard deviation), in the user's own direction; empty where no model was made.

        It is that of the moment when the search ended, or was last paused.
        """
        rows = connection.execute(select(schema.posterior).order_by(schema.posterior.c.trial)).mappings()
        return {row["trial"]: (row["mean"], row["sd"]) for row in rows if row["sd"] is not None}

    @_reads
    def ranking(self, connection: Connection) -> tuple[list[int], set[int]]:
        """(the trials that may be recommended, best first; all trials that were told when they were put in order)."""
        rows = connection.execute(select(schema.posterior)).mappings().all()
        placed = sorted((row["place"], row["trial"]) for row in rows if row["place"] is not None)
        return [trial for _, trial in placed], {row["trial"] for row in rows}

    @_reads
    def past_runs(self, connection: Connection) -> list[PastRun]:
        """Experiments from before the study, in the order they were added."""
        return _past_runs(connection)


def _past_runs(connection: Connection) -> list[PastRun]:
    rows = connection.execute(select(schema.past_run).order_by(schema.past_run.c.id)).mappings()
    return [
        PastRun(
            counts=tuple(row["counts"]),
            value=row["value"],
            sem=row["sem"],
            fidelity=row["fidelity"],
            source=row["source"],
        )
        for row in rows
    ]


def _database(folder: Path, url: str | None) -> Database:
    if url is None:
        return SQLite(folder / "study.db")
    if url.startswith("sqlite:///"):
        return SQLite(Path(url.removeprefix("sqlite:///")))
    if url.startswith("postgresql+psycopg://"):
        return PostgreSQL(url, folder.name)
    raise StoreError(f"store: must start with postgresql+psycopg:// or sqlite:////, got {url!r}")


def _make_folders(folder: Path, database: Database) -> None:
    for needed in {folder, *([database.path.parent] if isinstance(database, SQLite) else [])}:
        try:
            needed.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"{needed}: cannot be made: {error.strerror}; see `storage` and `store`") from None


def _make_ready(connection: Connection, database: Database) -> None:
    """Make the tables, or bring them up to date; another process may have done so in the meantime."""
    database.make_place(connection)
    version = version_of(connection, database.schema)
    if version is not None and version < schema.SCHEMA_VERSION:
        bring_up_to_date(connection, version)
    else:
        make_tables(connection)
