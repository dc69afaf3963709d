"""Transactions on one study's tables: whole or not at all, tried again while the server is away, and never done twice.

A server may stop in the middle of a transaction, and then nobody can say from here whether its COMMIT was carried out.
So every write of a driver counts itself in the driver's row, in the same transaction. Tried again, it first looks
whether the row has its number already: then it was done, and only the answer was lost. The row is locked from the
start of every write, which keeps other writers out and holds the fence: a driver that was replaced finds another
number there and writes nothing.
"""

import json
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from sqlalchemy import Connection, select, update
from sqlalchemy.exc import DBAPIError, NoResultFound, SQLAlchemyError

from duet_ray.errors import StoreError, StudyLocked
from duet_ray.store import schema
from duet_ray.store.base import Database

log = logging.getLogger(__name__)

RETRY_SECONDS = 300.0
"""How long a server that was there may be away before it is given up."""
_PAUSES = (0.1, 0.3, 1.0, 2.0, 5.0)
"""Seconds between tries; the last one again and again."""

T = TypeVar("T")
Work = Callable[[Connection], T]


class Transactions:
    """All transactions of one opened store, one at a time."""

    def __init__(self, database: Database, study: str) -> None:
        self.database = database
        self.study = study
        self.fence: int | None = None
        """The number of this driver's lease, while it holds it."""
        self.n_outages = 0
        """How often the server was away."""
        self._lock = threading.RLock()
        self._n_writes = 0
        self._was_reached = False
        self._is_given_up = False

    def close(self) -> None:
        self.database.engine.dispose()

    def read(self, work: Work[T]) -> T:
        """Do what only reads: it sees one snapshot."""
        return self._tried(self.database.begin_reading, work)

    def exclusive(self, work: Work[T]) -> T:
        """Do what may write without a lease. It may happen twice, so the second time must change nothing."""
        return self._tried(self.database.begin_writing, work)

    def write(self, work: Work[T]) -> T:
        """Do what the driver that holds the lease writes, once.

        Raises:
            StudyLocked: another driver has taken over; nothing was written.
        """
        assert self.fence is not None, "the store is written inside `writing()`"
        with self._lock:
            self._n_writes += 1
            number, results = self._n_writes, list[T]()

            def once(connection: Connection) -> T:
                lease = select(schema.driver.c.fence, schema.driver.c.n_writes).with_for_update()
                row = connection.execute(lease).one()
                if row.fence != self.fence:
                    raise StudyLocked(f"study {self.study}: another driver has taken this study over")
                if row.n_writes == number:
                    log.info("%s: the last write had been carried out", self.database.place)
                    return results[-1]
                connection.execute(update(schema.driver).values(n_writes=number))
                results.append(work(connection))
                return results[-1]

            return self._tried(self.database.begin_writing, once)

    def begin_lease(self, fence: int) -> None:
        """A new lease begins: its row says that nothing was written yet."""
        self.fence, self._n_writes = fence, 0

    def end_lease(self) -> None:
        self.fence = None

    def _tried(self, begin: str, work: Work[T]) -> T:
        """One transaction, again and again while the server is away."""
        with self._lock:
            first_failure: float | None = None
            n_tries = 0
            while True:
                try:
                    result = self._once(begin, work)
                except DBAPIError as error:
                    first_failure = first_failure or time.monotonic()
                    if not self._goes_on(error, time.monotonic() - first_failure, n_tries):
                        raise StoreError(self.complaint(error)) from error
                    n_tries += 1
                else:
                    if first_failure is not None:
                        log.warning(
                            "%s answers again after %.0f s", self.database.place, time.monotonic() - first_failure
                        )
                    self._was_reached, self._is_given_up = True, False
                    return result

    def _goes_on(self, error: DBAPIError, seconds: float, n_tries: int) -> bool:
        """Whether to try again, after a pause."""
        if not (self._was_reached and self.database.is_passing(error)):
            return False
        if n_tries == 0:
            self.n_outages += 1
        if self._is_given_up or seconds > RETRY_SECONDS:
            self._is_given_up = True  # What follows, such as a last word about the study, does not wait as long again.
            return False
        if n_tries == 0:
            log.warning(
                "%s does not answer (%s); trying again for up to %.0f minutes",
                self.database.place, _words(error), RETRY_SECONDS / 60,
            )  # fmt: skip
        time.sleep(_PAUSES[min(n_tries, len(_PAUSES) - 1)])
        return True

    def _once(self, begin: str, work: Work[T]) -> T:
        try:
            with self.database.engine.connect() as connection:
                # Without parameters it may be several statements.
                connection.exec_driver_sql(begin, execution_options={"no_parameters": True})
                try:
                    result = work(connection)
                    connection.exec_driver_sql("COMMIT")
                except BaseException:
                    _roll_back(connection)
                    raise
                return result
        except (json.JSONDecodeError, UnicodeDecodeError, NoResultFound) as error:
            raise StoreError(f"{self.database.place}: is damaged: a part of it cannot be read ({error})") from error

    def complaint(self, error: DBAPIError) -> str:
        """What to tell the user of an error of the database."""
        return f"{self.database.place}: cannot be used: {_words(error)}{self.database.advice(error)}"


def _roll_back(connection: Connection) -> None:
    """End the transaction. A connection that broke, or was left in the middle of an answer, is not used again."""
    try:
        connection.exec_driver_sql("ROLLBACK")
    except SQLAlchemyError:
        with suppress(SQLAlchemyError):
            connection.invalidate()


def _words(error: DBAPIError) -> str:
    """The database's own words, in one line."""
    return " ".join(str(error.orig).split())
