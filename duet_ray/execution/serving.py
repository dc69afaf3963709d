"""What a process of a group does: it asks the broker for tasks and does them, until there are no more.

Without Ray: a `Seat` carries the words. A heartbeat of its own tells the broker that the process lives, and hears when
the study is stopped or the group taken for lost; then the task under way is interrupted.
"""

import ctypes
import logging
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duet_ray.errors import DuetError, FeedbackError, ResourceError, SelectionError
from duet_ray.execution.broker import SILENCE_SECONDS, Place, Task
from duet_ray.execution.worker import Assignment, Progress, Worker, is_disk_full
from duet_ray.files import seen
from duet_ray.kept_models import ModelsUnreachable
from duet_ray.training import Stopped

log = logging.getLogger(__name__)

BEAT_SECONDS = 1.0

SHORTEST_WAIT, LONGEST_WAIT = 0.02, 0.25
"""Seconds between questions to the broker when there is nothing to do: short at first, longer when idle."""


def pace(n_groups: int) -> float:
    """`Seat.pace` of a fleet: one core answers some 2,000 calls a second (`benchmarks/scale.py`)."""
    return max(1.0, n_groups / 250)


class GroupLost(RuntimeError):
    """The group was taken for lost while it still lived: it has to start anew."""


class BrokerGone(RuntimeError):
    """The broker does not answer: the driver is gone, and the study goes on with another one."""


@dataclass(frozen=True, kw_only=True)
class Seat:
    """A process's place in a group, and how it talks to the broker."""

    ask: Callable[..., Any]
    """Calls a method of the `Broker`, and returns its answer; raises `BrokerGone`."""
    tell: Callable[..., None]
    """The same without waiting for the answer."""
    group: int
    incarnation: str
    """Of the group: the same in all its processes, another after a restart."""
    rank: int = 0
    n_ranks: int = 1
    pace: float = 1.0
    """How many times less often than in a small fleet this process speaks of itself: one broker hears all of them."""

    def say(self, method: str, *arguments: Any) -> Any:
        """Call the broker in the name of this life of the group."""
        return self.ask(method, self.group, self.incarnation, *arguments)

    def follow(self, what: Mapping[str, Any]) -> None:
        """Have the other processes of the group do something along with this one, the first."""
        if self.n_ranks > 1:
            self.say("command", what)


MakeWorker = Callable[..., Worker]


def serve(seat: Seat, assignment: Assignment, place: Place | None = None, make_worker: MakeWorker = Worker) -> None:
    """Do what the broker has for this process, until the study is over.

    Args:
        place: where the process is, so that it can be ended when it hangs.
        make_worker: called as `Worker` is.

    Raises:
        GroupLost: the group has to start anew.
        Exception: it cannot start, or it failed in the middle of what the group's other processes do along with it.
    """
    seat.say("register", seat.rank, place)
    with _heartbeat(seat) as life:
        try:
            _work(seat, life, assignment, make_worker)
        except Stopped:
            log.info("group %d is %s", seat.group, "lost" if life.is_lost else "stopped")
        except Exception:
            if not _is_stopped(seat):
                raise
            log.info("group %d is stopped: its processes left in the middle of a step", seat.group)
        finally:
            life.end()
    if life.is_lost:
        raise GroupLost(f"group {seat.group} was taken for lost")


def _is_stopped(seat: Seat) -> bool:
    """Whether the study is over: then it is no matter that a process of the group was left alone."""
    return _beat(seat) == "stop"


def _beat(seat: Seat) -> str:
    """Say that this process lives, and hear what is to be; again and again where no answer comes.

    One call that is lost on its way is no end of a study. Without an answer for as long as the broker would wait for a
    sign of this process, the driver is taken for gone.
    """
    deadline = time.monotonic() + SILENCE_SECONDS
    while True:
        try:
            return str(seat.say("beat", seat.rank))
        except BrokerGone as error:
            if time.monotonic() > deadline:
                log.warning("group %d: no answer from the broker, it is taken for gone: %s", seat.group, error)
                return "stop"
            time.sleep(BEAT_SECONDS)


def see_study(folder: Path) -> None:
    """See that this node has the study's folder.

    Raises:
        ResourceError: it has not.
    """
    if not seen((folder / "study.yaml").is_file):
        raise ResourceError(
            f"node {socket.gethostname()} does not see the study's folder {folder}: "
            "`storage` must be a folder that every node of the cluster sees"
        )


def _work(seat: Seat, life: "_Life", assignment: Assignment, make_worker: MakeWorker) -> None:
    """Load the model, and do tasks until there are no more."""
    try:
        see_study(assignment.study_config().study_folder)
        worker = make_worker(assignment, on_follow=seat.follow)
        life.is_waited_for = lambda: seat.rank > 0 or (seat.n_ranks > 1 and worker.others_wait)
        worker.preload()
    except Exception as error:
        log.exception("group %d cannot start", seat.group)
        reason = str(error) if isinstance(error, DuetError) else f"{type(error).__name__}: {error}"
        seat.ask("cannot_start", seat.group, f"a worker cannot start: {reason}")
        raise
    log.info("group %d is ready", seat.group)
    if seat.rank == 0:
        seat.ask("ready", seat.group)
        for leased in _answers(lambda: seat.say("lease"), "task"):
            for task, lease in leased:
                _do(worker, seat, task, lease)
    else:
        done: list[Any] = []
        for what in _answers(lambda: seat.say("commanded", len(done)), "do"):
            worker.follow(what)
            done.append(what)


def _answers(ask: Callable[[], tuple[str, Any]], wanted: str) -> Iterator[Any]:
    """What the broker has for this process to do, until it says that there will be no more.

    Raises:
        GroupLost: the group is to start anew.
    """
    wait = SHORTEST_WAIT
    while True:
        verdict, answer = ask()
        if verdict == "stop":
            return
        if verdict == "lost":
            raise GroupLost("the group was taken for lost")
        if verdict == wanted:
            wait = SHORTEST_WAIT
            yield answer
        else:
            time.sleep(wait)
            wait = min(LONGEST_WAIT, wait * 1.5)


def _do(worker: Worker, seat: Seat, task: Task, lease: int) -> None:
    """Do one task and hand in how it ended."""
    progress = _progress(seat, task.key, lease)
    log.info("%s: lease %d", task.key, lease)
    try:
        if task.kind == "sample":
            assert task.spec is not None
            result = worker.do_sample(task.spec, lease, progress, bundle=task.bundle).to_json()
        elif task.kind == "compare":
            result = worker.do_comparison(task, progress)
        else:
            result = worker.do_scoring(task, progress)
    except SelectionError as error:
        # Final: the same rows and the same model would fail again.
        seat.ask("complete", task.key, lease, {"error": str(error)})
    except Exception as error:
        log.exception("%s: failed", task.key)
        if is_disk_full(error):
            seat.ask("close", f"the disk is full ({error}); make room and start the same command again")
        elif isinstance(error, (FeedbackError, ModelsUnreachable)):
            # Nobody's failure: what is finished is kept, and a resume asks again.
            what = "no feedback" if isinstance(error, FeedbackError) else "no place for models"
            seat.ask("retry_or_close", task.key, lease, f"{what}: {error}")
        else:
            place = traceback.extract_tb(error.__traceback__)[-1]
            text = str(error) if isinstance(error, DuetError) else f"{type(error).__name__}: {error}"
            where = "" if isinstance(error, DuetError) else f" ({Path(place.filename).name} line {place.lineno})"
            seat.ask("retry", task.key, lease, text + where)
            raise  # What broke may be this process: a device, a file system. The group starts anew.
        if seat.n_ranks > 1 and worker.others_wait:
            raise  # They wait for this process in the middle of a step: all start anew.
    else:
        seat.ask("complete", task.key, lease, result)


class _Life:
    """Whether the loop still runs; after `end` it is not interrupted any more.

    A process that others may wait for in the middle of a step is not interrupted: it says to its trainer that all are
    to stop, and they do so together. Outside a step the group's first process alone has anything to interrupt, and the
    others hear that it is over when they ask what to do.
    """

    def __init__(self) -> None:
        self.is_lost = False
        self.is_waited_for: Callable[[], bool] = lambda: False
        self._thread = threading.get_ident()
        self._lock = threading.Lock()
        self._ended = False

    def interrupt(self, *, is_lost: bool) -> None:
        """Raise `Stopped` in the loop's thread, at its next step in Python."""
        with self._lock:
            if self._ended:
                return
            self._ended, self.is_lost = True, is_lost
            if self.is_waited_for():
                from duet_ray.training import ranks

                ranks.stop()
            else:
                set_exception = ctypes.pythonapi.PyThreadState_SetAsyncExc
                set_exception(ctypes.c_ulong(self._thread), ctypes.py_object(Stopped))

    def end(self) -> None:
        with self._lock:
            self._ended = True


@contextmanager
def _heartbeat(seat: Seat) -> Iterator[_Life]:
    """Tell the broker every few seconds that this process lives, also in the middle of a long task.

    The answer says whether the study has been stopped: then the task under way is interrupted, for it is lost anyway,
    and a driver that waited for it would seem to hang.
    """
    life, finished = _Life(), threading.Event()

    def beat() -> None:
        while not finished.wait(BEAT_SECONDS * seat.pace):
            verdict = _beat(seat)
            if verdict != "go on":
                life.interrupt(is_lost=verdict == "lost")
                return

    threading.Thread(target=beat, daemon=True, name="heartbeat").start()
    try:
        yield life
    finally:
        finished.set()


def _progress(seat: Seat, key: str, lease: int) -> Progress:
    """A progress function that speaks at most twice a second, in a small fleet, and never waits for an answer."""
    last = 0.0

    def say(stage: str, done: int = 0, total: int = 0) -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= 0.5 * seat.pace:
            last = now
            seat.tell("progress", key, lease, stage, done, total)

    return say
