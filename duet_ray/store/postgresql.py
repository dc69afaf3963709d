"""PostgreSQL by URL: many studies in one database, each in a schema of its own, and drivers on any machine.

The schema of study `x` is `duet_x`. The prefix keeps clear of what is PostgreSQL's own (`public`, `pg_…`). Names are
quoted, so that `Maths` and `maths` are two; one too long for PostgreSQL is cut, and ends in a digest of the whole.
"""

import hashlib
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.schema import CreateSchema
from sqlalchemy.sql import quoted_name

from duet_ray.errors import StoreError
from duet_ray.store.base import to_json

MAX_NAME_BYTES = 63
LOCK_SECONDS = 30
"""How long a transaction waits for another one's lock before it fails."""
IDLE_SECONDS = 60
"""When the server ends a transaction that does nothing: that of a driver whose machine hangs or is gone."""

CONNECTION = {
    "connect_timeout": 10,
    # A connection that is cut without a word is noticed within about a minute, not after the system's two hours.
    "keepalives_idle": 20,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,
    # No prepared statements: they do not survive a pooler between us and the server.
    "prepare_threshold": None,
    "application_name": "duet_ray",
}

_PASSING = {
    "25006",  # read only: the server we knew has become the standby of another
    "25P03",  # ended for idleness
    "40001",  # serialization failure
    "40P01",  # deadlock
    "53300",  # too many connections
    "55P03",  # a lock was not to be had in time
    "57P01",  # shutting down
    "57P02",  # crashed
    "57P03",  # starting up
    "57P05",  # ended for idleness, between transactions
}
"""SQLSTATE codes; besides those of class 08, connection exceptions."""

_FINAL = (
    ("password authentication failed", "set PGPASSWORD, or write the password into ~/.pgpass (mode 0600)"),
    ("no password supplied", "set PGPASSWORD, or write the password into ~/.pgpass (mode 0600)"),
    ("no pg_hba.conf entry", "the server does not let this user in from this machine: see its pg_hba.conf"),
    ("is not permitted to log in", "give the user the right to: ALTER ROLE … LOGIN"),
    ('FATAL:  role "', "create the user on the server, or name another in `store`"),
    ('FATAL:  database "', "create it: createdb --encoding UTF8 --template template0 NAME"),
)
"""(words of a server that turns a connection down for good, what helps). Such errors have no SQLSTATE."""


class PostgreSQL:
    """A `store.base.Database` in a schema of a server's database.

    Raises:
        StoreError: the driver is not installed.
    """

    begin_reading = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"
    begin_writing = (
        f"BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL lock_timeout = '{LOCK_SECONDS}s'; "
        f"SET LOCAL idle_in_transaction_session_timeout = '{IDLE_SECONDS}s'"
    )

    def __init__(self, url: str, study: str) -> None:
        try:
            parsed = make_url(url)
        except (ArgumentError, ValueError) as error:
            raise StoreError(f"store: must be postgresql+psycopg://user@host:port/database ({error})") from None
        self.schema = schema_name(study)
        self.place = parsed.render_as_string(hide_password=True)
        self.engine = self._engine(parsed)

    def _engine(self, url: URL) -> Engine:
        try:
            import psycopg  # noqa: F401
        except ImportError as error:
            raise StoreError(
                f"store: {self.place} needs the PostgreSQL driver ({error}); install it: "
                f"pip install 'duet-ray[postgres]'"
            ) from None
        return create_engine(
            url,
            isolation_level="AUTOCOMMIT",
            pool_size=1,
            connect_args={name: value for name, value in CONNECTION.items() if name not in url.query},
            execution_options={"schema_translate_map": {None: self.schema}},
            json_serializer=to_json,
        )

    def is_there(self) -> bool:
        return True

    def make_place(self, connection: Connection) -> None:
        encoding = connection.scalar(text("SHOW server_encoding"))
        if encoding != "UTF8":
            raise StoreError(
                f"{self.place}: the database's encoding is {encoding}, and must be UTF8: "
                f"createdb --encoding UTF8 --template template0 NAME"
            )
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _lock_key(self.schema)})
        connection.execute(CreateSchema(self.schema, if_not_exists=True))

    def is_passing(self, error: DBAPIError) -> bool:
        import psycopg

        state = getattr(error.orig, "sqlstate", None)
        if state is not None:
            return state.startswith("08") or state in _PASSING
        lost = error.connection_invalidated or isinstance(error.orig, psycopg.OperationalError | psycopg.InterfaceError)
        return lost and self._final(error) is None

    def advice(self, error: DBAPIError) -> str:
        state = getattr(error.orig, "sqlstate", None)
        if state == "53100":
            return "; make room on the server and start the same command again"
        if state == "42501":
            return "; the user needs the right to create a schema: GRANT CREATE ON DATABASE … TO …"
        if (remedy := self._final(error)) is not None:
            return f"; {remedy}"
        if self.is_passing(error):
            return "; see that the server runs and can be reached from here, and start the same command again"
        return ""

    def _final(self, error: DBAPIError) -> str | None:
        said = str(error.orig)
        return next((remedy for words, remedy in _FINAL if words in said), None)


def schema_name(study: str) -> Any:
    """The schema of a study, always quoted."""
    name = f"duet_{study}"
    if len(name.encode()) > MAX_NAME_BYTES:
        digest = hashlib.sha256(study.encode()).hexdigest()[:8]
        name = f"{name[: MAX_NAME_BYTES - 9]}_{digest}"
    return quoted_name(name, quote=True)


def _lock_key(schema: str) -> int:
    """A 64-bit number for PostgreSQL's advisory lock of a name."""
    return int.from_bytes(hashlib.sha256(schema.encode()).digest()[:8], signed=True)
