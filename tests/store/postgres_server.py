"""A PostgreSQL server for tests: made, started, stopped and deleted by them; and a wire to it that can be cut."""

import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

USER, DATABASE = "duet", "studies"


class PostgresServer:
    """One server on a free port of loopback, with a user, a password and a database in UTF-8."""

    def __init__(self, programs: Path) -> None:
        self._programs = programs
        # Not below pytest's own folders: another user, whom the server needs, may not enter those.
        self.folder = Path(tempfile.mkdtemp(prefix="duet-postgres-"))
        self.password = secrets.token_hex(12)
        self.port = free_port()
        # PostgreSQL refuses to run as root.
        self._user = "nobody" if os.getuid() == 0 else None
        if self._user:
            shutil.chown(self.folder, self._user)
        (self.folder / "password").write_text(self.password, encoding="utf-8")
        if self._user:
            shutil.chown(self.folder / "password", self._user)
        self._run(
            "initdb", "--username", USER, "--pwfile", str(self.folder / "password"), "--auth", "scram-sha-256",
            "--encoding", "UTF8", "--no-locale", "--no-sync",
        )  # fmt: skip
        with (self.folder / "data" / "postgresql.conf").open("a", encoding="utf-8") as file:
            file.write(
                f"listen_addresses = '127.0.0.1'\nport = {self.port}\nunix_socket_directories = '{self.folder}'\n"
                "max_connections = 40\nshared_buffers = 16MB\nfsync = off\n"
            )
        self.start()
        self.query("postgres", f"CREATE DATABASE {DATABASE} ENCODING 'UTF8' TEMPLATE template0")

    def url(self, *, port: int | None = None, database: str = DATABASE, user: str = USER) -> str:
        return f"postgresql+psycopg://{user}@127.0.0.1:{port or self.port}/{database}"

    def query(self, database: str, statement: str) -> list[tuple[object, ...]]:
        import psycopg

        with psycopg.connect(
            host="127.0.0.1", port=self.port, user=USER, password=self.password, dbname=database, autocommit=True
        ) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def start(self) -> None:
        self._run("pg_ctl", "start", "-w", "-t", "60", "-l", str(self.folder / "log"))

    def stop(self, mode: str = "fast") -> None:
        self._run("pg_ctl", "stop", "-w", "-m", mode)

    def remove(self) -> None:
        with suppress(subprocess.CalledProcessError):
            self.stop("immediate")
        shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self, program: str, *arguments: str) -> None:
        subprocess.run(
            [self._programs / program, "-D", self.folder / "data", *arguments],
            user=self._user, cwd=self.folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
        return port


class Wire:
    """A port that leads to another, until it is cut.

    `cut` is asked of every piece that a client sends, and says whether the connection is to end `"before"` the piece is
    handed on, or `"after"` the server has answered it, its answer being thrown away.
    """

    def __init__(self, to_port: int, cut: Callable[[bytes], str | None]) -> None:
        self._to_port = to_port
        self._cut = cut
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listening.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._to_port))
            threading.Thread(target=self._forward, args=(client, server), daemon=True).start()

    def _forward(self, client: socket.socket, server: socket.socket) -> None:
        silent = threading.Event()

        def answers() -> None:
            with suppress(OSError):
                while data := server.recv(65536):
                    if silent.is_set():
                        break
                    client.sendall(data)
            for end in (client, server):
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()

        threading.Thread(target=answers, daemon=True).start()
        with suppress(OSError):
            while data := client.recv(65536):
                when = self._cut(data)
                if when == "before":
                    break
                if when == "after":
                    silent.set()
                server.sendall(data)
        with suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)
