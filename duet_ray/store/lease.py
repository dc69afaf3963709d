"""The driver's lease: one writer a study, wherever it runs, and no clock that could make two of it.

Two machines' clocks differ, and one that is set moves. So nothing here compares a time that somebody wrote down. On
one machine the holder is looked up among the processes, and is alive or not. A holder on another machine is watched:
it counts up its `n_writes` every few seconds, and one that was watched for `LEASE_SECONDS`, on the watcher's own
steady clock, without a change is taken for dead. If it was only asleep, it finds another fence in its row when it
wakes up, and cannot write (`transactions`).
"""

import logging
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from sqlalchemy import Connection, RowMapping, select, update

from duet_ray.errors import StoreError, StudyLocked
from duet_ray.processes import ProcessIdentity
from duet_ray.store import schema
from duet_ray.store.transactions import Transactions

log = logging.getLogger(__name__)

LEASE_SECONDS = 60.0
"""How long a driver on another machine must be silent before it is taken for dead."""
RENEW_SECONDS = 10.0
"""How often a driver says that it lives."""
POLL_SECONDS = 1.0
"""How often one that waits looks."""


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The driver that the row names."""

    key: str
    host: str
    process: ProcessIdentity
    mark: tuple[int, int]
    """(fence, n_writes): changes with everything the holder does."""

    @classmethod
    def of(cls, row: RowMapping) -> "Holder | None":
        if row["holder"] is None:
            return None
        return cls(
            key=row["holder"],
            host=row["host"],
            process=ProcessIdentity(machine=row["machine"], pid=row["pid"], started=row["process_started"]),
            mark=(row["fence"], row["n_writes"]),
        )

    def __str__(self) -> str:
        return f"process {self.process.pid} on {self.host}"


class Lease:
    """Takes the lease, renews it from a thread of its own as long as this process lives, and gives it back."""

    def __init__(self, transactions: Transactions) -> None:
        self._transactions = transactions

    @contextmanager
    def held(self, on_wait: Callable[[str], None] | None = None) -> Iterator[None]:
        """Hold the lease; see `Store.writing`."""
        self._take(on_wait)
        ended = threading.Event()
        thread = threading.Thread(target=self._keep_renewing, args=(ended,), name="lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self._drop()

    def renew(self) -> None:
        """Say that this driver lives: a write of nothing is counted like any other."""
        self._transactions.write(lambda connection: None)

    def _take(self, on_wait: Callable[[str], None] | None) -> None:
        key = uuid.uuid4().hex
        watched: Holder | None = None
        since, n_outages = 0.0, 0
        while True:
            is_silent = watched is not None and time.monotonic() - since >= LEASE_SECONDS
            silent = watched.mark if watched is not None and is_silent else None
            holder = self._transactions.exclusive(partial(_take, key=key, silent=silent))
            if isinstance(holder, int):
                self._transactions.begin_lease(holder)
                return
            if holder.process.is_running() or (watched is not None and holder.mark != watched.mark):
                raise StudyLocked(
                    f"study {self._transactions.study} is already run by {holder}; stop it there, or wait until it ends"
                )
            if watched is None or self._transactions.n_outages != n_outages:
                # While the server was away, nobody could renew anything: that is no silence.
                since, n_outages = time.monotonic(), self._transactions.n_outages
            if watched is None:
                said = (
                    f"study {self._transactions.study} is held by {holder}, which cannot be seen from here; "
                    f"waiting {LEASE_SECONDS:.0f} s for a sign of life before taking over"
                )
                log.warning(said)
                if on_wait is not None:
                    on_wait(said)
            watched = holder
            time.sleep(POLL_SECONDS)

    def _keep_renewing(self, ended: threading.Event) -> None:
        while not ended.wait(RENEW_SECONDS):
            try:
                self.renew()
            except StudyLocked as error:
                log.error("%s", error)
                return  # The next write says so too.
            except StoreError as error:
                log.error("%s", error)

    def _drop(self) -> None:
        free = update(schema.driver).values(holder=None)
        try:
            self._transactions.write(lambda connection: connection.execute(free) and None)
        except StudyLocked:
            pass  # Another driver has taken over: the lease is no longer ours to drop.
        except StoreError as error:
            log.warning("the lease is not given back: %s", error)  # The next driver finds that this process has ended.
        finally:
            self._transactions.end_lease()


def _take(connection: Connection, *, key: str, silent: tuple[int, int] | None) -> Holder | int:
    """Take the lease if nobody has it, a dead driver, or one whose mark is `silent`.

    Returns:
        The number of the lease; or who holds it.
    """
    row = connection.execute(select(schema.driver).with_for_update()).mappings().one()
    holder = Holder.of(row)
    if holder is not None and holder.key == key:
        return int(row["fence"])  # Tried again: the first time was carried out.
    if holder is not None and holder.mark != silent and holder.process.is_running() is not False:
        return holder
    own = ProcessIdentity.own()
    fence = int(row["fence"]) + 1
    connection.execute(
        update(schema.driver).values(
            fence=fence, n_writes=0, holder=key, host=socket.gethostname(),
            machine=own.machine, pid=own.pid, process_started=own.started,
        )
    )  # fmt: skip
    return fence
