"""What the store asks of a database: everything in which SQLite and PostgreSQL differ."""

import json
from typing import Any, Protocol

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError


class Database(Protocol):
    """One study's place in one database. The engine leaves transactions to us: it begins and ends none itself."""

    place: str
    """For messages: a file, or a URL without a password."""
    schema: str | None
    """PostgreSQL's schema of the study's tables."""
    engine: Engine
    begin_reading: str
    """Starts a transaction that sees one snapshot."""
    begin_writing: str
    """Starts a transaction in which a locked row is read as the last writer left it."""

    def is_there(self) -> bool:
        """Whether there is a place at all: a file of that name. True where only a connection can tell."""
        ...

    def make_place(self, connection: Connection) -> None:
        """Inside a transaction that writes: what tables need before they can be made. Others that do so wait."""
        ...

    def is_passing(self, error: DBAPIError) -> bool:
        """Whether the transaction may succeed if tried again: a server that restarts, a lock, a broken connection."""
        ...

    def advice(self, error: DBAPIError) -> str:
        """What the user can do about it, as the end of a message; may be empty."""
        ...


def to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
