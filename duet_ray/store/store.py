"""The study's store: every fact in one transaction, one writer at a time.

Only the driver writes. It holds a lease with a fencing number: each transaction first checks that the number is still
its own, so that a driver that was thought dead and wakes up again cannot write over its successor. A driver that died
on this host is recognised by its process id and start time and replaced at once; one on another host is waited for.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from sqlalchemy import Connection, Engine, create_engine, delete, event, insert, select, update
from sqlalchemy.exc import DatabaseError, IntegrityError, OperationalError

from duet_ray.errors import StoreError, StudyLocked
from duet_ray.records import Observation, PastRun, Ratio, SampleResult, Settings, Trial, settings_from, trial_name
from duet_ray.store import schema

LEASE_SECONDS = 60.0
"""How long a driver on another host may be silent before it is taken for dead."""


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


class Store:
    """A study's store in its folder.

    Readers may open it at any time. To write, enter `writing()`, which takes the driver's lease.
    """

    def __init__(self, folder: Path, *, create: bool = False) -> None:
        """Open the store in a study's folder.

        Raises:
            StoreError: there is none and `create` is False, it cannot be read, or a newer duet_ray wrote it.
        """
        self.path = Path(folder) / "study.db"
        if create:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        elif not self.path.is_file():
            raise StoreError(f"{folder}: there is no study here (no study.db); `duet run` starts one")
        self._lock = threading.RLock()
        self._fence: int | None = None
        self._engine = _engine(self.path)
        try:
            if create:
                schema.metadata.create_all(self._engine)
            with self._engine.connect() as connection:
                version = connection.scalar(select(schema.study.c.schema_version))
        except DatabaseError as error:
            raise StoreError(f"{self.path}: cannot be read as a study's store: {error.orig}") from None
        if version is not None and version < schema.SCHEMA_VERSION:
            self._bring_up_to_date()
        if version is not None and version > schema.SCHEMA_VERSION:
            raise StoreError(
                f"{self.path}: written by a newer duet_ray (schema {version}, this one knows {schema.SCHEMA_VERSION}); "
                f"upgrade duet_ray"
            )

    def _bring_up_to_date(self) -> None:
        """Give a store of version 1 the columns and tables of version 2; what stands in it stays as it is."""
        with self._lock, _transaction(self._engine) as connection:
            if connection.scalar(select(schema.study.c.schema_version)) == 1:
                for column in (
                    "settings JSON NOT NULL DEFAULT '[]'",
                    "fidelity FLOAT NOT NULL DEFAULT 1.0",
                    "k INTEGER",
                ):
                    connection.exec_driver_sql(f"ALTER TABLE trial ADD COLUMN {column}")
                schema.metadata.create_all(connection)
                connection.execute(update(schema.study).values(schema_version=schema.SCHEMA_VERSION))

    def close(self) -> None:
        self._engine.dispose()

    # The driver's lease -----------------------------------------------------------------------------------------

    @contextmanager
    def writing(self) -> Iterator["Store"]:
        """Hold the driver's lease.

        Raises:
            StudyLocked: another driver holds this study; names its host and process.
        """
        self._take_lease()
        try:
            yield self
        finally:
            self._drop_lease()

    def renew(self) -> None:
        """Tell others that this driver lives; to be called a few times per `LEASE_SECONDS`."""
        with self._write() as connection:
            connection.execute(update(schema.driver).values(expires=time.time() + LEASE_SECONDS))

    def _take_lease(self) -> None:
        with self._lock, _transaction(self._engine) as connection:
            row = connection.execute(select(schema.driver)).mappings().first()
            if row is not None and row["holder"] is not None and _alive(dict(row)):
                raise StudyLocked(
                    f"study {self.path.parent.name} is already run by process {row['pid']} on {row['host']}; "
                    f"stop it there, or wait until it ends"
                )
            mine = {
                "fence": (row["fence"] if row is not None else 0) + 1,
                "holder": uuid.uuid4().hex,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "process_started": psutil.Process().create_time(),
                "expires": time.time() + LEASE_SECONDS,
            }
            if row is None:
                connection.execute(insert(schema.driver).values(id=1, **mine))
            else:
                connection.execute(update(schema.driver).values(**mine))
            self._fence = mine["fence"]

    def _drop_lease(self) -> None:
        with self._lock:
            try:
                with self._write() as connection:
                    connection.execute(update(schema.driver).values(holder=None, expires=0.0))
            except StudyLocked:
                pass  # Another driver has taken over: the lease is no longer ours to drop.
            finally:
                self._fence = None

    @contextmanager
    def _write(self) -> Iterator[Connection]:
        """One transaction of the driver that holds the lease."""
        assert self._fence is not None, "the store is written inside `writing()`"
        with self._lock, _transaction(self._engine) as connection:
            fence = connection.scalar(select(schema.driver.c.fence))
            if fence != self._fence:
                raise StudyLocked(f"study {self.path.parent.name}: another driver has taken this study over")
            yield connection

    # Writing ----------------------------------------------------------------------------------------------------

    def create_study(self, *, name: str, config: Mapping[str, Any], versions: Mapping[str, str]) -> None:
        """Write the study's own row; once."""
        with self._write() as connection:
            connection.execute(
                insert(schema.study).values(
                    id=1, name=name, schema_version=schema.SCHEMA_VERSION, config=dict(config), inputs={}, resolved={},
                    domains=[], versions=dict(versions), status="new", created=time.time(), seconds=0.0,
                )
            )  # fmt: skip

    def update_study(self, **values: Any) -> None:
        """Set columns of the study's row: `config`, `inputs`, `resolved`, `domains`, `status`, `versions`."""
        with self._write() as connection:
            connection.execute(update(schema.study).values(**values))

    def add_seconds(self, seconds: float) -> None:
        """Add to the time spent running."""
        with self._write() as connection:
            connection.execute(update(schema.study).values(seconds=schema.study.c.seconds + seconds))

    def add_trial(
        self,
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
        with self._write() as connection:
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

    def add_sample(self, result: SampleResult) -> bool:
        """Record a finished or failed sample.

        Returns:
            False when it was known already: the first result stands.
        """
        key = (schema.sample.c.trial == result.spec.trial) & (schema.sample.c.sample == result.spec.sample)
        with self._write() as connection:
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

    def add_observation(self, number: int, observation: Observation) -> None:
        """Record a trial's observation and mark the trial done, in one transaction."""
        with self._write() as connection:
            try:
                connection.execute(insert(schema.observation).values(trial=number, **asdict(observation)))
            except IntegrityError:
                raise StoreError(f"trial {trial_name(number)} has an observation already") from None
            connection.execute(update(schema.trial).where(schema.trial.c.number == number).values(status="done"))

    def finish_trial(self, number: int) -> None:
        """Mark a trial done without an observation: a confirmation, whose samples speak for themselves."""
        with self._write() as connection:
            connection.execute(update(schema.trial).where(schema.trial.c.number == number).values(status="done"))

    def fail_trial(self, number: int, reason: str) -> None:
        """Mark a trial as failed: it has no observation and never will."""
        with self._write() as connection:
            connection.execute(
                update(schema.trial).where(schema.trial.c.number == number).values(status="failed", reason=reason)
            )

    def drop_artifact(self, trial: int, sample: int) -> None:
        """Record that a sample's adapter is deleted."""
        with self._write() as connection:
            connection.execute(
                update(schema.artifact)
                .where((schema.artifact.c.trial == trial) & (schema.artifact.c.sample == sample))
                .values(kept=0)
            )

    def set_posterior(
        self, posterior: Mapping[int, tuple[float, float | None]], ranking: Sequence[int] | None = None
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
        with self._write() as connection:
            connection.execute(delete(schema.posterior))
            if rows:
                connection.execute(insert(schema.posterior), rows)

    def add_past_runs(self, runs: Sequence[PastRun]) -> int:
        """Record experiments from before the study. One that is known already, from the same place, is not added again.

        Returns:
            How many were added.
        """
        with self._write() as connection:
            known = set(_past_runs(connection))
            new = [run for run in dict.fromkeys(runs) if run not in known]
            if new:
                rows = [{**asdict(run), "counts": list(run.counts)} for run in new]
                connection.execute(insert(schema.past_run), rows)
        return len(new)

    # Reading ----------------------------------------------------------------------------------------------------

    def study(self) -> StudyRecord | None:
        """The study's own row; None in a store that was just made."""
        with self._read() as connection:
            row = connection.execute(select(schema.study)).mappings().first()
        if row is None:
            return None
        return StudyRecord(**{name: row[name] for name in StudyRecord.__dataclass_fields__})

    def trials(self) -> list[Trial]:
        """Every trial with its samples and observation, in order of number."""
        with self._read() as connection:
            trials = connection.execute(select(schema.trial).order_by(schema.trial.c.number)).mappings().all()
            samples = connection.execute(
                select(schema.sample).order_by(schema.sample.c.trial, schema.sample.c.sample)
            ).mappings()
            by_trial: dict[int, list[SampleResult]] = {}
            for row in samples:
                by_trial.setdefault(row["trial"], []).append(SampleResult.from_json(row["result"]))
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

    def kept_artifacts(self) -> dict[tuple[int, int], str]:
        """(trial, sample) → the adapter's path relative to the study's folder, for those still on disk."""
        with self._read() as connection:
            rows = connection.execute(select(schema.artifact).where(schema.artifact.c.kept == 1)).mappings()
            return {(row["trial"], row["sample"]): row["path"] for row in rows}

    def posterior(self) -> dict[int, tuple[float, float]]:
        """Trial → the model's (mean, standard deviation), in the user's own direction; empty where no model was made.

        It is that of the moment when the search ended, or was last paused.
        """
        with self._read() as connection:
            rows = connection.execute(select(schema.posterior).order_by(schema.posterior.c.trial)).mappings()
            return {row["trial"]: (row["mean"], row["sd"]) for row in rows if row["sd"] is not None}

    def ranking(self) -> tuple[list[int], set[int]]:
        """(the trials that may be recommended, best first; all trials that were told when they were put in order)."""
        with self._read() as connection:
            rows = connection.execute(select(schema.posterior)).mappings().all()
        placed = sorted((row["place"], row["trial"]) for row in rows if row["place"] is not None)
        return [trial for _, trial in placed], {row["trial"] for row in rows}

    def past_runs(self) -> list[PastRun]:
        """Experiments from before the study, in the order they were added."""
        with self._read() as connection:
            return _past_runs(connection)

    @contextmanager
    def _read(self) -> Iterator[Connection]:
        """One snapshot: what is read together was true together."""
        with self._lock, _transaction(self._engine, "BEGIN") as connection:
            yield connection


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


def _engine(path: Path) -> Engine:
    engine = create_engine(
        f"sqlite:///{path}",
        connect_args={"timeout": 30, "check_same_thread": False, "isolation_level": None},
        json_serializer=lambda value: json.dumps(value, ensure_ascii=False),
    )

    @event.listens_for(engine, "connect")
    def _settings(connection: Any, _record: Any) -> None:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")

    return engine


@contextmanager
def _transaction(engine: Engine, begin: str = "BEGIN IMMEDIATE") -> Iterator[Connection]:
    """One transaction. `BEGIN IMMEDIATE` takes SQLite's write lock, so that what it reads cannot change under it."""
    with engine.connect() as connection:
        try:
            connection.exec_driver_sql(begin)
            try:
                yield connection
                connection.exec_driver_sql("COMMIT")
            except BaseException:
                # SQLite may have rolled back by itself, on a full disk for one.
                with suppress(OperationalError):
                    connection.exec_driver_sql("ROLLBACK")
                raise
        except OperationalError as error:
            advice = "; make room and start the same command again" if "full" in str(error.orig) else ""
            raise StoreError(f"{engine.url.database}: cannot be used: {error.orig}{advice}") from error


def _alive(row: Mapping[str, Any]) -> bool:
    """Whether the driver that holds the lease still runs."""
    if row["host"] != socket.gethostname():
        return row["expires"] > time.time()
    try:
        process = psutil.Process(row["pid"])
        same = abs(process.create_time() - row["process_started"]) < 2.0
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
