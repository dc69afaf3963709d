"""A group of the fleet: a Ray Train run that lives as long as the study and pulls tasks from the broker.

Starting a worker group takes longer than training a small sample (process, imports, process group, base model), so a
group is started once and keeps the base model in memory. Of several processes the first leases, measures and writes;
the others train along with it.
"""

import ctypes
import logging
import os
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duet_ray.errors import DuetError, FeedbackError, SelectionError
from duet_ray.execution.broker import Place, Task
from duet_ray.execution.worker import Assignment, Progress, Worker, is_disk_full
from duet_ray.kept_models import ModelsUnreachable
from duet_ray.processes import ProcessIdentity
from duet_ray.secret_text import RedactingFormatter
from duet_ray.training import Stopped

log = logging.getLogger(__name__)

BEAT_SECONDS = 1.0

SHORTEST_WAIT, LONGEST_WAIT = 0.02, 0.25
"""Seconds between questions to the broker when there is nothing to do: short at first, longer when idle."""


class GroupLost(RuntimeError):
    """The group was taken for lost while it still lived: it has to start anew."""


@dataclass(frozen=True, kw_only=True)
class Seat:
    """A process's place in a group, and the broker it talks to."""

    broker: Any
    group: int
    incarnation: str
    """Of the group: the same in all its processes, another after a restart."""
    rank: int
    n_ranks: int

    def say(self, method: str, *arguments: Any) -> Any:
        """Call the broker in the name of this life of the group."""
        import ray

        return ray.get(getattr(self.broker, method).remote(self.group, self.incarnation, *arguments))

    def follow(self, what: Mapping[str, Any]) -> None:
        """Have the other processes of the group do something along with this one, the first."""
        if self.n_ranks > 1:
            self.say("command", what)


def group_loop(settings: dict[str, Any]) -> None:
    """The `train_loop_per_worker` of a group.

    Args:
        settings: `group` (number), `broker` and `namespace` (the actor's name), `assignment` (an `Assignment`),
            `n_threads`, `uses_gpu`, `log_file`.
    """
    import ray
    import torch

    from duet_ray.training import ranks

    torch.set_num_threads(settings["n_threads"])
    _take_device(settings["uses_gpu"])
    broker = ray.get_actor(settings["broker"], namespace=settings["namespace"])
    seat = Seat(
        broker=broker,
        group=settings["group"],
        incarnation=ranks.first_says(uuid.uuid4().hex),
        rank=ranks.rank(),
        n_ranks=ranks.n_ranks(),
    )
    _log_to(Path(settings["log_file"]), seat)
    own = ProcessIdentity.own()
    place = Place(node=ray.get_runtime_context().get_node_id(), pid=own.pid, started=own.started)
    seat.say("register", seat.rank, place)
    with _heartbeat(seat) as life:
        try:
            _work(seat, life, Assignment(**settings["assignment"]))
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
    import ray

    try:
        return bool(seat.say("beat", seat.rank) == "stop")
    except ray.exceptions.RayError:
        return True


def _take_device(uses_gpu: bool) -> None:
    """Make `cuda` mean this worker's own GPU: it sees those of all workers of its group on its node. Or none at all."""
    if not uses_gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # in time: nothing has asked for a device yet
        return
    import torch
    from ray.train.torch import get_device

    torch.cuda.set_device(get_device())


def _work(seat: Seat, life: "_Life", assignment: Assignment) -> None:
    """Load the model, and do tasks until there are no more."""
    import ray

    try:
        worker = Worker(assignment, on_follow=seat.follow)
        life.is_waited_for = lambda: seat.rank > 0 or (seat.n_ranks > 1 and worker.others_wait)
        worker.preload()
    except Exception as error:
        log.exception("group %d cannot start", seat.group)
        reason = str(error) if isinstance(error, DuetError) else f"{type(error).__name__}: {error}"
        ray.get(seat.broker.cannot_start.remote(seat.group, f"a worker cannot start: {reason}"))
        raise
    log.info("group %d is ready", seat.group)
    if seat.rank == 0:
        ray.get(seat.broker.ready.remote(seat.group))
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
    import ray

    broker = seat.broker
    progress = _progress(broker, task.key, lease)
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
        ray.get(broker.complete.remote(task.key, lease, {"error": str(error)}))
    except Exception as error:
        log.exception("%s: failed", task.key)
        if is_disk_full(error):
            ray.get(broker.close.remote(f"the disk is full ({error}); make room and start the same command again"))
        elif isinstance(error, (FeedbackError, ModelsUnreachable)):
            # Nobody's failure: what is finished is kept, and a resume asks again.
            what = "no feedback" if isinstance(error, FeedbackError) else "no place for models"
            ray.get(broker.retry_or_close.remote(task.key, lease, f"{what}: {error}"))
        else:
            place = traceback.extract_tb(error.__traceback__)[-1]
            text = str(error) if isinstance(error, DuetError) else f"{type(error).__name__}: {error}"
            where = "" if isinstance(error, DuetError) else f" ({Path(place.filename).name} line {place.lineno})"
            ray.get(broker.retry.remote(task.key, lease, text + where))
        if seat.n_ranks > 1 and worker.others_wait:
            raise  # They wait for this process in the middle of a step: all start anew.
    else:
        ray.get(broker.complete.remote(task.key, lease, result))


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
    import ray

    life, finished = _Life(), threading.Event()

    def beat() -> None:
        while not finished.wait(BEAT_SECONDS):
            try:
                verdict = seat.say("beat", seat.rank)
            except ray.exceptions.RayError:
                verdict = "stop"  # The driver is gone, and the broker with it.
            if verdict != "go on":
                life.interrupt(is_lost=verdict == "lost")
                return

    threading.Thread(target=beat, daemon=True, name="heartbeat").start()
    try:
        yield life
    finally:
        finished.set()


def _progress(broker: Any, key: str, lease: int) -> Progress:
    """A progress function that speaks at most twice a second and never waits for an answer."""
    last = 0.0

    def say(stage: str, done: int = 0, total: int = 0) -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= 0.5:
            last = now
            broker.progress.remote(key, lease, stage, done, total)

    return say


def _log_to(file: Path, seat: Seat) -> None:
    """All processes of a group write to one file, each line says whose it is."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(file)
    who = f" [{seat.rank}]" if seat.n_ranks > 1 else ""
    handler.setFormatter(RedactingFormatter(f"%(asctime)s{who} %(levelname)s %(message)s"))
    root = logging.getLogger("duet_ray")
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    root.propagate = False
