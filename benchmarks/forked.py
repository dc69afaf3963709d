"""Work done in forked processes: each starts from what its parent holds, and leaves nothing behind but its result."""

import multiprocessing
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Failure:
    """Why there is no result: the end of a traceback, or that the process died."""

    reason: str


def run_forked(
    works: Sequence[Callable[[], T]], n_processes: int = 1, on_done: Callable[[int], None] = lambda n: None
) -> list[T | Failure]:
    """Call every function in one of `n_processes` forks of this process, next come, next served.

    Args:
        on_done: called with the number of results so far.

    Returns:
        A result or a failure for each of `works`, in their order.
    """
    context = multiprocessing.get_context("fork")
    taken = context.Value("i", 0)
    results: list[T | Failure] = [Failure("the process died") for _ in works]

    def work(sender: Connection) -> None:
        while True:
            with taken.get_lock():
                index = taken.value
                taken.value += 1
            if index >= len(works):
                return
            try:
                sender.send((index, works[index]()))
            except Exception as error:  # it is the caller who knows what a failure means
                traceback.print_exc(file=sys.stderr)
                first = (str(error).splitlines() or [""])[0]
                sender.send((index, Failure(f"{type(error).__name__}: {first}")))

    receivers: list[Connection] = []
    for _ in range(min(n_processes, len(works))):
        receiver, sender = context.Pipe(duplex=False)
        context.Process(target=work, args=(sender,), daemon=True).start()
        sender.close()
        receivers.append(receiver)
    n_done = 0
    while receivers:
        ready = wait(receivers)
        for receiver in [one for one in receivers if one in ready]:
            try:
                index, result = receiver.recv()
            except EOFError:
                receivers.remove(receiver)
                continue
            results[index] = result
            n_done += 1
            on_done(n_done)
    return results
