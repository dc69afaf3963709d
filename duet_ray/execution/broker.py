"""The broker leases tasks to the groups of the fleet and keeps their results until the driver has stored them.

It is the one place that knows which sample is where. A group that comes back under a new incarnation has lost what it
held: that task alone is leased again, at most `max_retries` times. A result that comes with an old lease is refused, so
an orphan that finishes late changes nothing. Tasks are leased in the order they came, so that the samples of one trial
stay together and every trial gets its turn. A group that is silent for too long is taken for lost.

`Broker` is plain Python, tested without Ray; `start_broker` wraps it in an actor.
"""

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from duet_ray.records import SampleSpec

SILENCE_SECONDS = 60.0
"""A group that has not been heard of for this long is lost: its node may be gone without a word."""

START_SECONDS = 900.0
"""With no group heard of for this long after the start, something is wrong with the cluster, not with a group."""

MAX_BARREN_STARTS = 4
"""A group that starts this often without finishing a task is not unlucky: it dies while loading, or at its task."""

TaskKind = Literal["sample", "prepare", "score", "weigh"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One piece of work for a group.

    `sample`: train (unless it is the base model, or trained already) and measure one sample. The others weigh the rows
    of one domain, in this order: `prepare`, then `score` for each of its shards, then `weigh`.
    """

    key: str
    """Names the work: the same key is the same work, and is done once."""
    kind: TaskKind
    spec: SampleSpec | None = None
    domain: int | None = None
    shard: int | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a task ended, for good."""

    task: Task
    status: Literal["done", "failed", "stopped"]
    """`failed`: retries used up. `stopped`: the study must pause (disk full and the like); nothing is recorded."""
    reason: str | None = None
    result: Mapping[str, Any] = field(default_factory=dict)
    n_retries: int = 0


@dataclass(frozen=True, kw_only=True)
class InFlight:
    """A task under way, and how far it is."""

    task: Task
    stage: str = ""
    done: int = 0
    total: int = 0
    """`done` of `total` steps of the stage; 0 where that is not known."""

    @property
    def text(self) -> str:
        return f"{self.stage} {self.done}/{self.total}" if self.total else self.stage


@dataclass(frozen=True, kw_only=True)
class Pulse:
    """What the driver learns a few times a second."""

    finished: tuple[Outcome, ...]
    in_flight: tuple[InFlight, ...]


@dataclass
class _Lease:
    task: Task
    number: int
    group: int
    progress: InFlight


class Broker:
    """Tasks in, leases out, outcomes in, outcomes out.

    Args:
        max_retries: how often a task is leased again after its group died or it raised something that is not its own
            fault. Failures of the sample itself arrive as results and are never retried.
    """

    def __init__(self, max_retries: int) -> None:
        self._max_retries = max_retries
        self._queue: deque[Task] = deque()
        self._leases: dict[str, _Lease] = {}
        self._retries: dict[str, int] = {}
        self._outcomes: dict[str, Outcome] = {}
        self._finished: list[Outcome] = []
        self._known: set[str] = set()
        self._incarnations: dict[int, str] = {}
        self._heard: dict[int, float] = {}
        self._barren_starts: dict[int, int] = {}
        self._any_ready = False
        self._started = time.monotonic()
        self._n_leases = 0
        self._closed = False
        self._trouble: str | None = None

    def submit(self, tasks: Sequence[Task]) -> None:
        """Queue tasks; one that is known already (queued, leased or ended) has no effect."""
        for task in tasks:
            if task.key not in self._known:
                self._known.add(task.key)
                if self._closed:
                    self._end(Outcome(task=task, status="stopped", reason=self._trouble))
                else:
                    self._queue.append(task)

    def register(self, group: int, incarnation: str) -> None:
        """A group says that it (re)starts: what it held under another incarnation is leased again."""
        if self._incarnations.get(group) == incarnation:
            return
        self._incarnations[group] = incarnation
        self._heard[group] = time.monotonic()
        self.group_lost(group)
        self._barren_starts[group] = self._barren_starts.get(group, 0) + 1
        if self._barren_starts[group] > MAX_BARREN_STARTS:
            self.close(
                f"group {group} started {MAX_BARREN_STARTS} times and died each time before it finished anything; "
                f"see logs/group-{group}.log in the study's folder. Is there enough memory?"
            )

    def ready(self, group: int) -> None:
        """A group has its model in memory."""
        self._any_ready = True

    def cannot_start(self, group: int, reason: str) -> None:
        """A group could not load its model: the study's fault if no group ever could, else this group's alone."""
        if not self._any_ready:
            self.close(reason)

    def beat(self, group: int) -> bool:
        """A group says that it lives, and hears whether the study has been stopped."""
        self._heard[group] = time.monotonic()
        return self._closed

    def sweep(self) -> None:
        """Take silent groups for lost; to be called now and then."""
        now = time.monotonic()
        for group, heard in list(self._heard.items()):
            if now - heard > SILENCE_SECONDS:
                self.group_lost(group)
        if not self._heard and now - self._started > START_SECONDS:
            self.close(
                f"no group of the fleet has started within {START_SECONDS / 60:.0f} minutes; is the cluster busy?"
            )

    def group_lost(self, group: int) -> None:
        """A group is gone: its tasks go back to the front of the queue, or fail when their retries are used up."""
        for lease in [lease for lease in self._leases.values() if lease.group == group]:
            self._again(lease, "its worker died")

    def lease(self, group: int, incarnation: str) -> tuple[Literal["task", "wait", "stop"], Task | None, int]:
        """The next task for a group, with the number of its lease."""
        if self._closed or self._incarnations.get(group) != incarnation:
            return "stop", None, 0
        if not self._queue:
            return "wait", None, 0
        task = self._queue.popleft()
        self._n_leases += 1
        self._leases[task.key] = _Lease(task, self._n_leases, group, InFlight(task=task))
        return "task", task, self._n_leases

    def progress(self, key: str, number: int, stage: str, done: int, total: int) -> None:
        """Say how far a task is; a stale lease is ignored."""
        if self._holds(key, number):
            lease = self._leases[key]
            lease.progress = InFlight(task=lease.task, stage=stage, done=done, total=total)

    def complete(self, key: str, number: int, result: Mapping[str, Any]) -> bool:
        """Hand in a result.

        Returns:
            False when the lease is no longer this one: the result is refused.
        """
        if not self._holds(key, number):
            return False
        lease = self._leases.pop(key)
        task = lease.task
        self._barren_starts[lease.group] = 0
        self._end(Outcome(task=task, status="done", result=dict(result), n_retries=self._retries.get(key, 0)))
        return True

    def retry(self, key: str, number: int, reason: str) -> None:
        """Something broke that is not the sample's fault: lease it again, or fail it when its retries are used up."""
        if self._holds(key, number):
            self._again(self._leases[key], reason)

    def retry_or_close(self, key: str, number: int, reason: str) -> None:
        """As `retry`, but when the retries are used up the study pauses, and the task is not taken for failed."""
        if self._holds(key, number):
            if self._retries.get(key, 0) >= self._max_retries:
                self.close(f"{reason}. The models are kept: start the same command again when it is mended")
            else:
                self._again(self._leases[key], reason)

    def close(self, trouble: str | None = None) -> None:
        """No more leases; every task that has not ended is `stopped`, and nothing is recorded for it.

        Args:
            trouble: why nothing can go on, e.g. the disk is full or the model cannot be loaded; the first one stands.
        """
        self._trouble = self._trouble or trouble
        self._closed = True
        for task in [*(lease.task for lease in self._leases.values()), *self._queue]:
            self._end(Outcome(task=task, status="stopped", reason=trouble))
        self._leases.clear()
        self._queue.clear()

    def trouble(self) -> str | None:
        """Why nothing can go on; None while all is well."""
        return self._trouble

    def outcomes(self, keys: Sequence[str]) -> list[Outcome] | None:
        """The outcomes of these tasks once all have ended; None before."""
        if all(key in self._outcomes for key in keys):
            return [self._outcomes[key] for key in keys]
        return None

    def finished_since(self, index: int) -> list[Outcome]:
        """The outcomes from the `index`-th on, in the order they came: the driver's way to read each just once."""
        return self._finished[index:]

    def in_flight(self) -> tuple[InFlight, ...]:
        """The tasks leased now."""
        return tuple(lease.progress for lease in self._leases.values())

    def pulse(self, index: int, lost: Sequence[int]) -> Pulse:
        """All that the driver says and asks a few times a second, in one call.

        Args:
            index: as for `finished_since`.
            lost: groups whose run has ended.
        """
        for group in lost:
            self.group_lost(group)
        self.sweep()
        return Pulse(finished=tuple(self.finished_since(index)), in_flight=self.in_flight())

    def _holds(self, key: str, number: int) -> bool:
        return key in self._leases and self._leases[key].number == number

    def _again(self, lease: _Lease, reason: str) -> None:
        key = lease.task.key
        del self._leases[key]
        n_retries = self._retries.get(key, 0)
        if n_retries >= self._max_retries:
            times = f"after {n_retries} retries" if n_retries else "and sampling.max_retries is 0"
            self._end(Outcome(task=lease.task, status="failed", reason=f"{reason} {times}", n_retries=n_retries))
        else:
            self._retries[key] = n_retries + 1
            self._queue.appendleft(lease.task)

    def _end(self, outcome: Outcome) -> None:
        self._outcomes[outcome.task.key] = outcome
        self._finished.append(outcome)


def start_broker(name: str, namespace: str, max_retries: int) -> Any:
    """Start the broker's actor, and return its handle. Groups and trials find it by name."""
    import ray

    # One thread: every call is short and sees a consistent state.
    actor = ray.remote(num_cpus=0)(Broker)
    return actor.options(name=name, namespace=namespace).remote(max_retries)
