"""SQLite: one file on a disk of this machine.

In WAL mode readers never wait for the writer; the two share an index in memory, which is why all of them must run on
one machine, and why a file on a network file system is refused (https://sqlite.org/wal.html, "Overview").
"""

import sqlite3
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, create_engine, event
from sqlalchemy.exc import DBAPIError

from duet_ray.errors import StoreError
from duet_ray.file_systems import network_file_system
from duet_ray.store.base import to_json

BUSY_SECONDS = 30.0
"""How long a transaction waits for another one's lock before it fails."""

_PASSING = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL}


class SQLite:
    """A `store.base.Database` in a file.

    Raises:
        StoreError: the file lies, or would lie, on a network file system.
    """

    schema: str | None = None
    begin_reading = "BEGIN"
    begin_writing = "BEGIN IMMEDIATE"  # Takes the write lock, so that what is read cannot change before it is written.

    def __init__(self, path: Path) -> None:
        self.path = path
        self.place = str(path)
        self._refuse_network()
        self.engine = create_engine(
            URL.create("sqlite", database=str(path)),
            connect_args={"timeout": BUSY_SECONDS, "check_same_thread": False, "isolation_level": None},
            json_serializer=to_json,
        )

        @event.listens_for(self.engine, "connect")
        def _settings(connection: Any, _record: Any) -> None:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute("PRAGMA foreign_keys=ON")

    def is_there(self) -> bool:
        return self.path.is_file()

    def make_place(self, connection: Connection) -> None:
        pass

    def is_passing(self, error: DBAPIError) -> bool:
        return getattr(error.orig, "sqlite_errorcode", 0) & 0xFF in _PASSING

    def advice(self, error: DBAPIError) -> str:
        code = getattr(error.orig, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_FULL:
            return "; make room and start the same command again"
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            return "; the file is damaged: put a copy of it back, or save what can be read with `sqlite3 FILE .recover`"
        if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
            return "; see that this user may write the file and its folder"
        if code == sqlite3.SQLITE_IOERR:
            return "; see that its disk is well and has room"
        return ""

    def _refuse_network(self) -> None:
        kind = network_file_system(self.path)
        if kind is not None:
            raise StoreError(
                f"{self.path}: SQLite cannot be used on a network file system ({kind}): the processes that share it "
                f"must share memory, so they must be on one machine, and locks over a network are not reliable.\n"
                f"In the study file, set one of:\n"
                f"  store: postgresql+psycopg://user@host/database   (the study's folder may stay where it is)\n"
                f"  store: sqlite:////folder/on/a/local/disk/study.db\n"
                f"  storage: a folder on a local disk"
            )
