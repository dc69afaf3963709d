"""Simulated groups, trials and driver around the real `Broker`, for `scale.py`.

A clock of our own stands in for `time.monotonic`, so that hours of a study pass in seconds and every call that the
processes of a study make comes when it would: heart beats, progress, leases, the trials' questions for their outcomes,
the driver's pulse. Only the broker's own Python is timed; what a call costs on its way is `scale_ray.py`'s question.
"""

import heapq
import itertools
import pickle
import time
import tracemalloc
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np

from duet_ray.execution import broker as broker_module
from duet_ray.execution.broker import Broker, Task
from duet_ray.execution.serving import BEAT_SECONDS, LONGEST_WAIT, SHORTEST_WAIT
from duet_ray.execution.study_run import PUMP_SECONDS
from duet_ray.execution.trial import POLL_SECONDS, sample_tasks
from duet_ray.records import Ratio, SampleResult, SampleSpec, Trial

RESTART_SECONDS = 20.0
"""From the death of a group to its next life."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How often the processes of a study speak to the broker."""

    beat_seconds: float = BEAT_SECONDS
    progress_seconds: float = 0.5
    """As in `serving._progress`: a group says how far it is at most this often."""
    first_poll_seconds: float = POLL_SECONDS
    """A trial asks for its outcomes after so long, and then after 1.5 times as long as before, up to `poll_seconds`."""
    poll_seconds: float = POLL_SECONDS


def simulated_trial(number: int, n_domains: int, n_rows: int = 10_000) -> Trial:
    """A pending trial at a ratio of its own."""
    share = np.random.default_rng(number).dirichlet(np.ones(n_domains))
    counts = np.floor(share * n_rows).astype(int)
    counts[0] += n_rows - counts.sum()
    return Trial(number=number, kind="search", ratio=Ratio(counts=tuple(counts.tolist())), status="pending", method="")


def simulated_result(spec: SampleSpec, value: float = 1.0) -> SampleResult:
    """A sample's result of ordinary size: ten metrics, what a trainer reports, a digest."""
    train = {"steps": 313, "tokens": 1_234_567, "first_loss": 2.71828, "last_loss": 1.41421, "skipped": 0}
    return SampleResult(
        spec=spec,
        value=value,
        stderr=0.0123456789,
        metrics={f"task_{i}/exact_match,strict-match": 0.123456789 + i for i in range(10)},
        train=train,
        train_seconds=47.11,
        feedback_seconds=12.34,
        rows_digest=f"{hash((spec.trial, spec.sample)) & (2**64 - 1):064x}",
        adapter=f"artifacts/{spec.key.replace('-', '/')}/adapter",
    )


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """What a simulated study did, and what it cost the broker."""

    n_groups: int
    n_samples: int
    seconds: float
    """Of the study, by the simulated clock."""
    calls: Counter[str]
    """Calls to the broker by name."""
    busy: dict[str, float]
    """Real seconds that the broker spent in them."""
    slowest: dict[str, float]
    """The longest call of each name, real seconds."""
    n_leases: Counter[str]
    """Task → how often it was leased."""
    n_done: Counter[str]
    """Task → how often the driver heard that it is done."""
    pulse_bytes: int
    """The largest answer to the driver's pulse, pickled; one in 50 is looked at."""
    n_deaths: int

    def mean_microseconds(self, name: str) -> float:
        return 1e6 * self.busy[name] / self.calls[name] if self.calls[name] else 0.0

    @property
    def calls_per_second(self) -> float:
        return self.calls.total() / self.seconds

    @property
    def calls_per_sample(self) -> float:
        return self.calls.total() / self.n_samples

    @property
    def load(self) -> float:
        """The share of its time that the broker is busy in its own Python."""
        return sum(self.busy.values()) / self.seconds


class _Clock:
    """What the broker asks for the time."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


class Simulation:
    """A study of `n_trials` trials of `k` samples on `n_groups` groups of one process.

    Args:
        seconds: that a sample takes, on average; each takes between 0.8 and 1.2 times as long.
        fuse: samples that train in one pass.
        n_deaths: groups that die in the middle of a sample, at random times, and start anew.
        pace: as the code has it, or another.
    """

    def __init__(
        self,
        n_groups: int,
        n_trials: int,
        k: int,
        *,
        seconds: float = 60.0,
        n_domains: int = 50,
        fuse: int = 1,
        n_deaths: int = 0,
        seed: int = 0,
        pace: Pace | None = None,
    ) -> None:
        self._pace = pace or Pace()
        self._n_groups, self._k, self._seconds, self._fuse = n_groups, k, seconds, fuse
        self._random = np.random.default_rng(seed)
        self._trials = deque(simulated_trial(n, n_domains) for n in range(n_trials))
        self._n_samples = n_trials * k
        self._at_once = max(1, n_groups // k)
        self._clock, self._order = _Clock(), itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._broker = Broker(max_retries=1000)
        self._life: dict[int, str] = {}
        self._calls: Counter[str] = Counter()
        self._busy: dict[str, float] = defaultdict(float)
        self._slowest: dict[str, float] = defaultdict(float)
        self._leases: Counter[str] = Counter()
        self._done: Counter[str] = Counter()
        self._n_pumped = self._pulse_bytes = self._n_dead = 0
        self._ended = False
        length = n_trials * k * seconds / n_groups
        times, groups = self._random.uniform(0, length, n_deaths), self._random.integers(n_groups, size=n_deaths)
        self._deaths = list(zip(times.tolist(), groups.tolist(), strict=True))

    def run(self) -> Simulated:
        with mock.patch.object(broker_module, "time", self._clock):
            for group in range(self._n_groups):
                self._at(float(self._random.uniform(0, self._pace.beat_seconds)), lambda g=group: self._start(g))
            for _ in range(self._at_once):
                self._at(0.0, self._next_trial)
            for when, group in self._deaths:
                self._at(when, lambda g=group: self._die(g))
            self._at(0.0, self._pump)
            while self._events and not self._ended:
                self._clock.now, _, event = heapq.heappop(self._events)
                event()
        return Simulated(
            n_groups=self._n_groups,
            n_samples=self._n_samples,
            seconds=self._clock.now,
            calls=self._calls,
            busy=dict(self._busy),
            slowest=dict(self._slowest),
            n_leases=self._leases,
            n_done=self._done,
            pulse_bytes=self._pulse_bytes,
            n_deaths=self._n_dead,
        )

    def _at(self, when: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), event))

    def _after(self, seconds: float, event: Callable[[], None]) -> None:
        self._at(self._clock.now + seconds, event)

    def _call(self, name: str, *arguments: Any) -> Any:
        started = time.perf_counter()
        answer = getattr(self._broker, name)(*arguments)
        took = time.perf_counter() - started
        self._calls[name] += 1
        self._busy[name] += took
        self._slowest[name] = max(self._slowest[name], took)
        return answer

    # A group

    def _start(self, group: int) -> None:
        life = f"{group}-{next(self._order)}"
        self._life[group] = life
        self._call("register", group, life)
        self._call("ready", group)
        self._beat(group, life)
        self._ask(group, life, SHORTEST_WAIT)

    def _die(self, group: int) -> None:
        if self._life.get(group):
            self._n_dead += 1
            self._life[group] = ""
            self._after(RESTART_SECONDS, lambda: self._start(group))

    def _lives(self, group: int, life: str) -> bool:
        return self._life[group] == life

    def _beat(self, group: int, life: str) -> None:
        if self._lives(group, life):
            assert self._call("beat", group, life) == "go on"
            self._after(self._pace.beat_seconds, lambda: self._beat(group, life))

    def _ask(self, group: int, life: str, wait: float) -> None:
        if not self._lives(group, life):
            return
        verdict, leased = self._call("lease", group, life)
        if verdict == "task":
            self._leases.update(task.key for task, _ in leased)
            self._work(group, life, deque(leased))
        elif verdict == "wait":
            self._after(wait, lambda: self._ask(group, life, min(LONGEST_WAIT, 1.5 * wait)))

    def _work(self, group: int, life: str, leased: deque[tuple[Task, int]]) -> None:
        if not self._lives(group, life):
            return
        if not leased:
            return self._ask(group, life, SHORTEST_WAIT)
        task, number = leased.popleft()
        ends = self._clock.now + self._seconds * float(self._random.uniform(0.8, 1.2))
        self._step(group, life, task, number, 0)
        self._at(ends, lambda: self._finish(group, life, task, number, leased))

    def _step(self, group: int, life: str, task: Task, number: int, step: int) -> None:
        if self._lives(group, life) and self._done[task.key] == 0:
            self._call("progress", task.key, number, "training", step, 1000)
            self._after(self._pace.progress_seconds, lambda: self._step(group, life, task, number, step + 1))

    def _finish(self, group: int, life: str, task: Task, number: int, leased: deque[tuple[Task, int]]) -> None:
        if self._lives(group, life):
            assert task.spec is not None
            assert self._call("complete", task.key, number, simulated_result(task.spec).to_json())
            self._work(group, life, leased)

    # A trial, and the driver

    def _next_trial(self) -> None:
        if self._trials:
            tasks = sample_tasks(self._trials.popleft(), range(self._k), fuse=self._fuse)
            self._call("submit", tasks)
            self._wait_for([task.key for task in tasks], self._pace.first_poll_seconds)

    def _wait_for(self, keys: list[str], wait: float) -> None:
        if self._call("outcomes", keys) is not None:
            self._next_trial()
        else:
            self._after(wait, lambda: self._wait_for(keys, min(self._pace.poll_seconds, 1.5 * wait)))

    def _pump(self) -> None:
        pulse = self._call("pulse", self._n_pumped, [])
        self._call("trouble")
        if self._calls["pulse"] % 50 == 0:
            self._pulse_bytes = max(self._pulse_bytes, len(pickle.dumps(pulse, protocol=5)))
        self._n_pumped += len(pulse.finished)
        self._done.update(outcome.task.key for outcome in pulse.finished if outcome.status == "done")
        self._ended = self._n_pumped >= self._n_samples
        self._after(PUMP_SECONDS, self._pump)


def broker_bytes(n_samples: int, n_domains: int = 50) -> int:
    """What a broker holds in memory once so many samples have ended."""
    tracemalloc.start()
    try:
        broker = Broker(max_retries=1)
        broker.register(0, "a")
        before = tracemalloc.get_traced_memory()[0]
        for number in range(-(-n_samples // 4)):
            tasks = sample_tasks(simulated_trial(number, n_domains), range(4))
            broker.submit(pickle.loads(pickle.dumps(tasks)))
            for _ in tasks:
                _, [(task, lease)] = broker.lease(0, "a")
                assert task.spec is not None
                # As they come over the wire: with no string or number shared with any other.
                result = pickle.loads(pickle.dumps(simulated_result(task.spec).to_json()))
                assert broker.complete(task.key, lease, result)
        return tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
