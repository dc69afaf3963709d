"""A group of the fleet: a Ray Train run that lives as long as the study and pulls tasks from the broker.

Starting a worker group takes longer than training a small sample (process, imports, process group, base model), so a
group is started once and keeps the base model in memory.
"""

import ctypes
import logging
import threading
import time
import traceback
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from duet_ray.errors import DuetError, FeedbackError, SelectionError
from duet_ray.execution.broker import Task
from duet_ray.execution.worker import Assignment, Progress, Worker, is_disk_full

log = logging.getLogger(__name__)

BEAT_SECONDS = 1.0

SHORTEST_WAIT, LONGEST_WAIT = 0.02, 0.25
"""Seconds between questions to the broker when there is nothing to do: short at first, longer when idle."""


class Stopped(BaseException):
    """The study was stopped in the middle of a task. Not an `Exception`, so that no feedback takes it for its own."""


def group_loop(settings: dict[str, Any]) -> None:
    """The `train_loop_per_worker` of a group.

    Args:
        settings: `group` (number), `broker` and `namespace` (the actor's name), `assignment` (an `Assignment`),
            `n_threads`, `log_file`.
    """
    import ray
    import torch

    _log_to(Path(settings["log_file"]))
    torch.set_num_threads(settings["n_threads"])
    broker = ray.get_actor(settings["broker"], namespace=settings["namespace"])
    group, incarnation = settings["group"], uuid.uuid4().hex
    ray.get(broker.register.remote(group, incarnation))
    with _heartbeat(broker, group) as life:
        try:
            _work(broker, group, incarnation, Assignment(**settings["assignment"]))
        except Stopped:
            log.info("group %d is stopped", group)
        finally:
            life.end()


def _work(broker: Any, group: int, incarnation: str, assignment: Assignment) -> None:
    """Load the model, and do tasks until there are no more."""
    import ray

    try:
        worker = Worker(assignment)
        worker.preload()
    except Exception as error:
        log.exception("group %d cannot start", group)
        reason = str(error) if isinstance(error, DuetError) else f"{type(error).__name__}: {error}"
        ray.get(broker.cannot_start.remote(group, f"a worker cannot start: {reason}"))
        raise
    ray.get(broker.ready.remote(group))
    log.info("group %d is ready", group)
    wait = SHORTEST_WAIT
    while True:
        verdict, task, lease = ray.get(broker.lease.remote(group, incarnation))
        if verdict == "stop":
            return
        if verdict == "wait":
            time.sleep(wait)
            wait = min(LONGEST_WAIT, wait * 1.5)
            continue
        wait = SHORTEST_WAIT
        _do(worker, broker, task, lease)


def _do(worker: Worker, broker: Any, task: Task, lease: int) -> None:
    """Do one task and hand in how it ended."""
    import ray

    progress = _progress(broker, task.key, lease)
    log.info("%s: lease %d", task.key, lease)
    try:
        if task.kind == "sample":
            assert task.spec is not None
            result = worker.do_sample(task.spec, lease, progress).to_json()
        else:
            result = worker.do_scoring(task, progress)
    except SelectionError as error:
        # Final: the same rows and the same model would fail again.
        ray.get(broker.complete.remote(task.key, lease, {"error": str(error)}))
    except Exception as error:
        log.exception("%s: failed", task.key)
        if is_disk_full(error):
            ray.get(broker.close.remote(f"the disk is full ({error}); make room and start the same command again"))
        elif isinstance(error, FeedbackError):
            # No feedback is nobody's failure: the models are kept, and a resume asks again.
            ray.get(broker.retry_or_close.remote(task.key, lease, f"no feedback: {error}"))
        else:
            place = traceback.extract_tb(error.__traceback__)[-1]
            text = str(error) if isinstance(error, DuetError) else f"{type(error).__name__}: {error}"
            where = "" if isinstance(error, DuetError) else f" ({Path(place.filename).name} line {place.lineno})"
            ray.get(broker.retry.remote(task.key, lease, text + where))
    else:
        ray.get(broker.complete.remote(task.key, lease, result))


class _Life:
    """Whether the loop still runs; after `end` it is not interrupted any more."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self._lock = threading.Lock()
        self._ended = False

    def interrupt(self) -> None:
        """Raise `Stopped` in the loop's thread, at its next step in Python."""
        with self._lock:
            if not self._ended:
                self._ended = True
                set_exception = ctypes.pythonapi.PyThreadState_SetAsyncExc
                set_exception(ctypes.c_ulong(self._thread), ctypes.py_object(Stopped))

    def end(self) -> None:
        with self._lock:
            self._ended = True


@contextmanager
def _heartbeat(broker: Any, group: int) -> Iterator[_Life]:
    """Tell the broker every few seconds that this process lives, also in the middle of a long task.

    The answer says whether the study has been stopped: then the task under way is interrupted, for it is lost anyway,
    and a driver that waited for it would seem to hang.
    """
    import ray

    life, finished = _Life(), threading.Event()

    def beat() -> None:
        while not finished.wait(BEAT_SECONDS):
            try:
                is_closed = ray.get(broker.beat.remote(group))
            except ray.exceptions.RayError:
                is_closed = True  # The driver is gone, and the broker with it.
            if is_closed:
                life.interrupt()
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


def _log_to(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(file)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger("duet_ray")
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    root.propagate = False
