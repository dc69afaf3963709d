"""The broker leases tasks to the groups of the fleet and keeps their results until the driver has stored them.

It is the one place that knows which sample is where. A group that comes back under a new incarnation has lost what it
held: that alone is leased again, the task that was under way at most `max_retries` times. A result that comes with an
old lease is refused, so an orphan that finishes late changes nothing. Tasks are leased in the order they came, so that
the samples of one trial stay together and every trial gets its turn; samples that train in one pass go to one group
together. A group with a process that is silent for too long, or with a task that takes too long or a training that
makes no step any more, is taken for lost, and the driver is told which processes to end.

A group may have several processes: the first one leases, and says here what the others are to do along with it. They
ask; nobody waits in a collective operation, whose time limit would be another one.

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

ANSWER_SECONDS = 120.0
"""The broker answers within milliseconds: one that has not for so long hangs, and is as good as gone."""

START_SECONDS = 900.0
"""With no group heard of for this long, something is wrong with the cluster, not with a group."""

LONG_SECONDS, TIMES_LONGEST = 86_400.0, 10.0
"""Where the study file does not say how long a task may take: `TIMES_LONGEST` the longest of its kind so far, and never
under a day, for a quick one (the untouched model, a small domain) says nothing of the next."""

STALL_SECONDS, TIMES_STEP = 1800.0, 20.0
"""A sample whose training has made two steps and then none for so long hangs: `TIMES_STEP` its longest step so far, and
never under half an hour."""

DIED = "its worker died (killed because memory ran out, or its node is lost?)"
"""All that can be known of a process that is gone: the system that kills for memory leaves no word."""

TaskKind = Literal["sample", "compare", "prepare", "score", "weigh"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One piece of work for a group.

    `sample`: train (unless it is the base model, or trained already) and measure one sample. `compare`: train one until
    a share of its steps and measure it quickly. The others weigh the rows of one domain, in this order: `prepare`,
    then `score` for each of its shards, then `weigh`.
    """

    key: str
    """Names the work: the same key is the same work, and is done once."""
    kind: TaskKind
    spec: SampleSpec | None = None
    domain: int | None = None
    shard: int | None = None
    bundle: tuple[SampleSpec, ...] = ()
    """The samples that train in one pass, this one among them; none: it trains alone."""
    until: float = 1.0
    """`compare`: the share of the steps."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """A process of a group."""

    node: str
    """Ray's id of its node."""
    pid: int
    started: float
    """As `processes.started` gives it: a pid is given out again."""


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
    hung: tuple[Place, ...] = ()
    """Processes to end: theirs is a group that is taken for lost."""
    given_up: tuple[str, ...] = ()
    """Groups that will not be waited for any more, and why."""


@dataclass
class _Lease:
    task: Task
    number: int
    group: int
    n_together: int
    """Tasks leased in one go: the first to end has trained for all."""
    progress: InFlight
    moved: float = 0.0
    """When the last step was heard of."""
    longest_step: float = 0.0

    def is_stalled(self, now: float) -> bool:
        """Whether a training is in the middle of its steps, and makes none any more."""
        if self.task.spec is None or not 2 <= self.progress.done < self.progress.total:
            return False
        return now - self.moved > max(STALL_SECONDS, TIMES_STEP * self.longest_step)


@dataclass
class _Group:
    """What is known of a group: all but `barren_starts` since it last started."""

    incarnation: str | None = None
    heard: dict[int, float] = field(default_factory=dict)
    """Rank → when it was last heard of."""
    places: dict[int, Place] = field(default_factory=dict)
    commands: list[Any] = field(default_factory=list)
    busy_since: float = 0.0
    """When it was given, or ended, its last task."""
    barren_starts: int = 0
    is_given_up: bool = False


class Broker:
    """Tasks in, leases out, outcomes in, outcomes out.

    Args:
        max_retries: how often a task is leased again after its group died or it raised something that is not its own
            fault. Failures of the sample itself arrive as results and are never retried.
        max_seconds: that a task may take, and so many tasks leased together that many times as long; None: see
            `LONG_SECONDS`.
        n_groups: that the study starts with.
    """

    def __init__(self, max_retries: int, max_seconds: float | None = None, n_groups: int = 1) -> None:
        self._max_retries = max_retries
        self._max_seconds = max_seconds
        self._longest: dict[TaskKind, float] = {}
        # One task may kill its worker until its retries are used up; a second one in a row is no accident.
        self._max_barren_starts = max(4, 2 * (max_retries + 1))
        self._hung: list[Place] = []
        self._given_up: list[str] = []
        self._queue: deque[Task] = deque()
        self._leases: dict[str, _Lease] = {}
        self._held: dict[int, dict[str, _Lease]] = {}
        """Group → its leases in their order: looking through all of them for each of 1,000 groups takes too long."""
        self._retries: dict[str, int] = {}
        self._failed_in: dict[str, set[int]] = {}
        """Task → groups in which something broke that is not its own fault: another one is to try it."""
        self._outcomes: dict[str, Outcome] = {}
        self._finished: list[Outcome] = []
        self._known: set[str] = set()
        self._groups: dict[int, _Group] = {}
        self._any_ready = False
        self._n_groups = n_groups
        self._cannot_start: set[int] = set()
        self._last_alive = time.monotonic()
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

    def register(self, group: int, incarnation: str, rank: int = 0, place: Place | None = None) -> None:
        """A process of a group (re)starts: what the group held under another incarnation is leased again."""
        known = self._groups.setdefault(group, _Group())
        if known.incarnation != incarnation:
            self.group_lost(group)
            known = self._groups[group] = _Group(incarnation=incarnation, barren_starts=known.barren_starts + 1)
            if known.barren_starts > self._max_barren_starts:
                self._give_up(
                    group,
                    f"group {group} started {self._max_barren_starts} times and died each time before it finished "
                    f"anything; see logs/group-{group}.log in the study's folder. Is there enough memory?",
                )
        known.heard[rank] = time.monotonic()
        if place is not None:
            known.places[rank] = place

    def ready(self, group: int) -> None:
        """A group has its model in memory."""
        self._any_ready = True
        self._cannot_start.discard(group)

    def wants(self, group: int) -> bool:
        """Whether a group that has left is to come back."""
        return not self._closed and not (group in self._groups and self._groups[group].is_given_up)

    def cannot_start(self, group: int, reason: str) -> None:
        """A group could not load its model: the study's fault if none of those it starts with can, else its own.

        One such group is started anew, maybe on another node, until it has died too often.
        """
        self._cannot_start.add(group)
        if not self._any_ready and len(self._cannot_start) >= self._n_groups:
            self.close(reason)

    def beat(self, group: int, incarnation: str, rank: int = 0) -> Literal["go on", "stop", "lost"]:
        """A process says that it lives, and hears whether the study is stopped, or its group taken for lost."""
        known = self._groups[group]
        if known.incarnation == incarnation:
            known.heard[rank] = time.monotonic()
        return self._verdict(group, incarnation)

    def sweep(self) -> None:
        """Take silent groups, and those whose task takes too long, for lost; to be called now and then."""
        now = time.monotonic()
        for number, group in self._groups.items():
            held = self._held.get(number, {}).values()
            if any(now - heard > SILENCE_SECONDS for heard in group.heard.values()):
                self._end_group(number, "its worker was silent, and is taken for dead")
            elif held and now - group.busy_since > (limit := max(self._limit(lease) for lease in held)):
                reason = f"it took longer than {limit / 60:.3g} minutes (fleet.max_task_minutes)"
                self._end_group(number, reason)
            elif stalled := [lease for lease in held if lease.is_stalled(now)]:
                minutes = (now - stalled[0].moved) / 60
                self._end_group(number, f"it made no training step for {minutes:.0f} minutes")
        if any(group.incarnation is not None and not group.is_given_up for group in self._groups.values()):
            self._last_alive = now
        elif now - self._last_alive > START_SECONDS:
            long = f"{START_SECONDS / 60:.0f} minutes"
            self.close(
                f"no group of the fleet is alive for {long}: the nodes they ran on are gone, and no others came"
                if self._groups
                else f"no group of the fleet has started within {long}; is the cluster busy? What its workers said "
                "stands in Ray's logs on their nodes"
            )

    def group_lost(self, group: int, reason: str = DIED) -> None:
        """A group is gone: its tasks go back to the front of the queue.

        Tasks leased together are done in their order: the first was under way, and fails when its retries are used up.
        """
        held = list(self._held.get(group, {}).values())
        for lease in reversed(held[1:]):
            self._let_go(lease)
            self._queue.appendleft(lease.task)
        if held:
            self._again(held[0], reason)

    def lease(
        self, group: int, incarnation: str
    ) -> tuple[Literal["task", "wait", "stop", "lost"], tuple[tuple[Task, int], ...]]:
        """What a group is to do next, each task with the number of its lease: one, or all of a bundle that wait."""
        if (verdict := self._verdict(group, incarnation)) != "go on":
            return verdict, ()
        if (index := self._first_for(group)) is None:
            return "wait", ()
        first = self._queue[index]
        del self._queue[index]
        same = [first]
        if first.bundle:
            together = (first.bundle, first.until)
            same += [t for t in self._queue if (t.bundle, t.until) == together]
            self._queue = deque(t for t in self._queue if (t.bundle, t.until) != together)
        self._groups[group].busy_since = time.monotonic()
        leased = []
        for task in same:
            self._n_leases += 1
            lease = _Lease(task, self._n_leases, group, len(same), InFlight(task=task))
            self._leases[task.key] = self._held.setdefault(group, {})[task.key] = lease
            leased.append((task, self._n_leases))
        return "task", tuple(leased)

    def _first_for(self, group: int) -> int | None:
        """The place in the queue of a group's next task: one that has not broken there, as long as others live."""
        for index, task in enumerate(self._queue):
            if group not in self._failed_in.get(task.key, ()):
                return index
        others = (g for number, g in self._groups.items() if number != group and not g.is_given_up)
        return 0 if self._queue and all(other.incarnation is None for other in others) else None

    def command(self, group: int, incarnation: str, what: Any) -> None:
        """The first process of a group says what the others are to do along with it."""
        if self._groups[group].incarnation == incarnation:
            self._groups[group].commands.append(what)

    def commanded(self, group: int, incarnation: str, index: int) -> tuple[Literal["do", "wait", "stop", "lost"], Any]:
        """What the other processes of a group are to do after `index` commands."""
        if (verdict := self._verdict(group, incarnation)) != "go on":
            return verdict, None
        commands = self._groups[group].commands
        return ("do", commands[index]) if index < len(commands) else ("wait", None)

    def progress(self, key: str, number: int, stage: str, done: int, total: int) -> None:
        """Say how far a task is; a stale lease is ignored."""
        if self._holds(key, number):
            lease, now = self._leases[key], time.monotonic()
            if stage == lease.progress.stage and 0 < lease.progress.done < done:
                lease.longest_step = max(lease.longest_step, now - lease.moved)
            lease.moved = now
            lease.progress = InFlight(task=lease.task, stage=stage, done=done, total=total)

    def complete(self, key: str, number: int, result: Mapping[str, Any]) -> bool:
        """Hand in a result.

        Returns:
            False when the lease is no longer this one: the result is refused.
        """
        if not self._holds(key, number):
            return False
        lease = self._leases[key]
        self._let_go(lease)
        self._took(lease)
        self._end(Outcome(task=lease.task, status="done", result=dict(result), n_retries=self._retries.get(key, 0)))
        return True

    def settle(self, task: Task, result: Mapping[str, Any]) -> None:
        """End a task that nobody needs to do: its result is known. One that is known already is left alone."""
        if task.key not in self._known:
            self._known.add(task.key)
            self._end(Outcome(task=task, status="done", result=dict(result)))

    def retry(self, key: str, number: int, reason: str) -> None:
        """Something broke that is not the sample's fault: lease it again, or fail it when its retries are used up.

        It goes to another group if there is one: a device or a share that is broken for a process stays so.
        """
        if self._holds(key, number):
            self._failed_in.setdefault(key, set()).add(self._leases[key].group)
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
        self._held.clear()
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
        hung, self._hung = tuple(self._hung), []
        given_up, self._given_up = tuple(self._given_up), []
        finished = tuple(self.finished_since(index))
        return Pulse(finished=finished, in_flight=self.in_flight(), hung=hung, given_up=given_up)

    def _holds(self, key: str, number: int) -> bool:
        return key in self._leases and self._leases[key].number == number

    def _let_go(self, lease: _Lease) -> None:
        del self._leases[lease.task.key]
        del self._held[lease.group][lease.task.key]

    def _verdict(self, group: int, incarnation: str) -> Literal["go on", "stop", "lost"]:
        """Whether this life of a group is to go on."""
        if self._closed or self._groups[group].is_given_up:
            return "stop"
        return "go on" if self._groups[group].incarnation == incarnation else "lost"

    def _give_up(self, number: int, reason: str) -> None:
        """Go on without a group, as long as there is another: one bad node is no reason to stop a study."""
        self._groups[number].is_given_up = True
        others = [group for group in self._groups.values() if not group.is_given_up]
        if others:
            self._given_up.append(reason)
        else:
            self.close(reason)

    def _end_group(self, number: int, reason: str) -> None:
        """Take a group for lost, and have its processes ended: it comes back under another incarnation, or not."""
        group = self._groups[number]
        self._hung += group.places.values()
        self.group_lost(number, reason)
        group.incarnation = None
        group.heard.clear()
        group.places.clear()

    def _limit(self, lease: _Lease) -> float:
        """Seconds that a lease may take."""
        if self._max_seconds is not None:
            return self._max_seconds * lease.n_together
        return max(LONG_SECONDS, TIMES_LONGEST * self._longest.get(lease.task.kind, 0.0) * lease.n_together)

    def _took(self, lease: _Lease) -> None:
        """A task ended well: its group is no barren one, and its kind takes at least so long."""
        group, now, kind = self._groups[lease.group], time.monotonic(), lease.task.kind
        group.barren_starts = 0
        self._longest[kind] = max(self._longest.get(kind, 0.0), now - group.busy_since)
        group.busy_since = now

    def _again(self, lease: _Lease, reason: str) -> None:
        key = lease.task.key
        self._let_go(lease)
        n_retries = self._retries.get(key, 0)
        if n_retries >= self._max_retries:
            retries = "retry" if n_retries == 1 else "retries"
            times = f"after {n_retries} {retries}" if n_retries else "and sampling.max_retries is 0"
            self._end(Outcome(task=lease.task, status="failed", reason=f"{reason} {times}", n_retries=n_retries))
        else:
            self._retries[key] = n_retries + 1
            self._queue.appendleft(lease.task)

    def _end(self, outcome: Outcome) -> None:
        self._outcomes[outcome.task.key] = outcome
        self._finished.append(outcome)


def ask_actor(broker: Any, method: str, *arguments: Any) -> Any:
    """Call a method of the broker's actor, and return its answer.

    Raises:
        RayError: it is gone, or has not answered within `ANSWER_SECONDS`.
    """
    import ray

    return ray.get(getattr(broker, method).remote(*arguments), timeout=ANSWER_SECONDS)


def start_broker(name: str, namespace: str, max_retries: int, max_seconds: float | None, n_groups: int) -> Any:
    """Start the broker's actor, and return its handle. Groups and trials find it by name.

    It is on the driver's node: what it knows is lost with the driver anyway, and with no other node.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # One thread: every call is short and sees a consistent state.
    actor = ray.remote(num_cpus=0)(Broker)
    return actor.options(name=name, namespace=namespace, scheduling_strategy=here).remote(
        max_retries, max_seconds, n_groups
    )
