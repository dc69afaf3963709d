"""SIGKILL at a chosen point of a store, for a child process that is to die there."""

import os
import signal
from collections.abc import Callable
from typing import Any, Literal

from duet_ray.store.transactions import Transactions

When = Literal["before", "inside", "after"]


def kill_at(store_class: type, method: str, when: When, nth: int = 1) -> None:
    """From now on, this process kills itself at the nth call of a method of the store.

    To be called in a child process, which it patches for good.

    Args:
        when: `before` anything is written, `inside` the transaction when all is said and only the COMMIT is missing, or
            `after` the COMMIT.
    """
    original = getattr(store_class, method)
    n_calls = 0

    def deadly(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal n_calls
        n_calls += 1
        if n_calls != nth:
            return original(self, *args, **kwargs)
        if when == "before":
            die()
        if when == "inside":
            _die_before_commit()
        result = original(self, *args, **kwargs)
        if when == "after":
            die()
        return result

    setattr(store_class, method, deadly)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _die_before_commit() -> None:
    write = Transactions.write

    def deadly(self: Transactions, work: Callable[..., Any]) -> Any:
        def all_but_commit(connection: Any) -> Any:
            result = work(connection)
            die()
            return result

        return write(self, all_but_commit)

    Transactions.write = deadly  # type: ignore[method-assign]
