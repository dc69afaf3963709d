"""The fixture of a PostgreSQL server, for `pytest_plugins` of the test modules that want one."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.store.postgres_server import PostgresServer


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A running server; `PGPASSWORD` is set while it is there."""
    pytest.importorskip("psycopg")
    programs = _programs()
    if programs is None:
        pytest.skip("no PostgreSQL server here: install Debian's `postgresql`, or put `initdb` on the PATH")
    server = PostgresServer(programs)
    patch = pytest.MonkeyPatch()
    patch.setenv("PGPASSWORD", server.password)
    try:
        yield server
    finally:
        patch.undo()
        server.remove()


def _programs() -> Path | None:
    """The folder of `initdb`: Debian's newest, or that on the PATH."""
    if found := list(Path("/usr/lib/postgresql").glob("*/bin/initdb")):
        return max(found, key=lambda path: int(path.parts[-3])).parent
    on_path = shutil.which("initdb")
    return Path(on_path).resolve().parent if on_path else None
