"""One session of a study on Ray: base and scores first, then the search, then the confirmation (DUET, Algorithm 1).

Everything that happens is written to the store by this process, in the order that makes a `kill -9` harmless: a ratio
before anything is trained on it, a sample as soon as its result is there, an observation after its samples.
"""

import logging
import shutil
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Protocol

from duet_ray.budget import n_left, n_samples, searched
from duet_ray.config import StudyConfig
from duet_ray.errors import DuetError, ResourceError, SelectionError, StudyFailed
from duet_ray.execution.artifacts import (
    adopt_finished,
    clear_ended,
    leave_result,
    prune_adapters,
    sample_folder,
)
from duet_ray.execution.broker import InFlight, Outcome, Task
from duet_ray.execution.finalists import store_order, to_confirm
from duet_ray.execution.platform import Platform, PlatformLost, RayPlatform
from duet_ray.execution.trial import (
    TrialPlan,
    leave_failed_comparison,
    sample_result,
    sample_tasks,
    scoring_tasks,
)
from duet_ray.execution.worker import Assignment
from duet_ray.kept_models import KeptModels
from duet_ray.records import BASE_TRIAL, CONFIRM_ANYWHERE, Trial
from duet_ray.reduce import failure_reason, reduce_samples
from duet_ray.search import Proposer, SimplexSpace
from duet_ray.search.told import metric_losses
from duet_ray.selection import n_shards
from duet_ray.store import Store

log = logging.getLogger(__name__)

PUMP_SECONDS = 0.2
RENEW_SECONDS = 10.0


class Watcher(Protocol):
    """Is told how a run goes; called from the driver's threads, and must be quick."""

    def phase(self, text: str) -> None:
        """A new part of the run begins."""
        ...

    def tick(self, in_flight: Sequence[InFlight]) -> None:
        """A few times a second: the tasks under way and how far they are."""
        ...

    def scored(self, domain: str, n_done: int, n_rows: int) -> None:
        """So many rows of a domain are measured; all of them and once more when it is weighed."""
        ...

    def changed(self) -> None:
        """The store has something new."""
        ...


Way = Generator[Sequence[Task], list[Outcome], str | None]
"""Yields tasks to be done together, is sent their outcomes, and returns what it failed of."""


def _at_once(tasks: Sequence[Task]) -> Way:
    """The way of tasks that need nothing of one another."""
    yield tasks
    return None


class SilentWatcher:
    """Watches nothing."""

    def phase(self, text: str) -> None:
        pass

    def tick(self, in_flight: Sequence[InFlight]) -> None:
        pass

    def scored(self, domain: str, n_done: int, n_rows: int) -> None:
        pass

    def changed(self) -> None:
        pass


class Paused(DuetError):
    """The run was stopped before its end; the same command goes on."""


@dataclass(kw_only=True)
class StudyRun:
    """One session. `run()` ends when the study is done, paused or beyond help."""

    config: StudyConfig
    store: Store
    space: SimplexSpace
    assignment: Assignment
    unscored: Sequence[int]
    """Domains whose weights are not stored yet."""
    n_train: Sequence[int]
    """Training rows per domain."""
    watcher: Watcher = field(default_factory=SilentWatcher)
    on_weighed: Callable[[], None] = lambda: None
    """Called when domains have been weighed: there is more to say of them now."""
    make_platform: Callable[[StudyConfig, Assignment, Callable[[str], None]], Platform] = RayPlatform
    """Called with the study, the workers' assignment, and what to call, again and again, with what is waited for; it
    raises when the wait is to end."""

    def __post_init__(self) -> None:
        self._stop, self._ending = threading.Event(), threading.Event()
        self._pump_lock = threading.Lock()
        self._n_pumped = 0
        self._waited_for = ""
        self._next_renewal = 0.0
        self._n_measured: dict[int, int] = {}
        self._models = KeptModels.of(self.config)

    def stop(self) -> None:
        """Ask the run to pause; safe to call from a signal handler."""
        self._stop.set()

    def run(self) -> None:
        """Run to the end.

        Raises:
            Paused: `stop` was called.
            StudyFailed: the base model cannot be measured, or no trial has an observation.
            SelectionError: a domain cannot be scored; the other domains' weights are kept.
            ResourceError: fewer devices than asked for, a full disk, or no group is left.
        """
        for scratch in (self.config.study_folder / ".ray", *self.config.study_folder.glob("artifacts/**/*.tmp-*")):
            shutil.rmtree(scratch, ignore_errors=True)  # of drivers and workers that were killed
        adopt_finished(self.config, self.store)
        if self._n_to_search() == 0:
            self._fail_if_nothing_observed()
            self._put_in_order()
        if self._is_complete():
            return
        try:
            with self._on_the_fleet():
                self._measure_base_and_score()
                self._search()
                self._put_in_order()
                self._confirm()
        except Paused:
            self._put_in_order()
            raise

    def score(self) -> None:
        """Weigh the rows of every domain that has no stored weights; raises as `run` does."""
        if self.unscored:
            with self._on_the_fleet():
                self._measure_base_and_score(measure_base=False)

    @contextmanager
    def _on_the_fleet(self) -> Iterator[None]:
        """The broker and the groups, all stopped at the end."""
        self.watcher.phase("starting Ray and the fleet")
        with self.make_platform(self.config, self.assignment, self._wait_for) as self._platform:
            yield

    def _wait_for(self, what: str) -> None:
        """Say what is waited for; called again and again as long as that lasts, so that a stop ends it."""
        self._pause_if_stopped()
        if what != self._waited_for:
            self._waited_for = what
            self.watcher.phase(what)

    # The three parts --------------------------------------------------------------------------------------------

    def _measure_base_and_score(self, *, measure_base: bool = True) -> None:
        """The untouched model's value, and the weights that are not stored yet; both before any ratio is tried."""
        base = self._base_tasks() if measure_base else []
        parts = ["measuring the untouched model"] if base else []
        n_domains = len(self.unscored)
        parts += [f"scoring the rows of {n_domains} domain{'s'[: n_domains != 1]}"] if n_domains else []
        if not parts:
            return
        self.watcher.phase(" and ".join(parts))
        ways = [self._weigh(domain) for domain in self.unscored]
        errors = self._do_all([*([self._measure_base(base)] if base else []), *ways])
        if ways:
            self.on_weighed()
        if errors:
            raise SelectionError("\n".join(errors))

    def _measure_base(self, tasks: Sequence[Task]) -> Way:
        yield tasks
        self._observe_base()
        return None

    def _weigh(self, domain: int) -> Way:
        """The way of one domain to its weights: prepare it, then all its shards at once, then weigh it."""
        name, n_rows = self.config.domains[domain].name, self.n_train[domain]
        self.watcher.scored(name, 0, n_rows)
        for tasks in scoring_tasks(domain, name, n_shards(n_rows, self.config.selection.shard_rows)):
            outcomes = yield tasks
            if errors := [error for o in outcomes if (error := o.reason or o.result.get("error"))]:
                return str(errors[0])
            if tasks[0].kind != "score":
                self.watcher.scored(name, self._n_measured.get(domain, 0), n_rows)
        self.watcher.changed()
        return None

    def _base_tasks(self) -> list[Task]:
        """The task that measures the base; none when it is measured. A base that failed stays failed."""
        self.store.add_trial(BASE_TRIAL, "base", None, "base")
        trial = self._trial(BASE_TRIAL)
        assert trial is not None
        if trial.status != "done" and trial.samples:  # A kill came between its sample and what was made of it.
            self._observe_base()
            return []
        return [] if trial.status == "done" else sample_tasks(trial, [0])

    def _observe_base(self) -> None:
        trial = self._trial(BASE_TRIAL)
        assert trial is not None
        observation = reduce_samples(trial.samples, self.config.direction)
        if observation is None:
            reason = failure_reason(trial.samples)
            self.store.fail_trial(BASE_TRIAL, reason)
            raise StudyFailed(
                f"the untouched model cannot be measured, so nothing was trained: {reason}\n"
                f"correct `feedback` and start anew: delete {self.config.study_folder}, or give the study another name"
            )
        self.store.add_observation(BASE_TRIAL, observation)
        self.watcher.changed()

    def _search(self) -> None:
        from duet_ray.execution.searcher import StudySearcher

        n_trials = self._n_to_search()
        if not n_trials:
            return
        self.watcher.phase("searching")
        searcher = StudySearcher(
            self._proposer(),
            self.config,
            self.store,
            on_change=self._trial_changed,
            before_reduce=self._pump,
            is_ending=self._ending.is_set,
        )
        errors: list[BaseException] = []

        def run_trials() -> None:
            try:
                self._platform.run_trials(searcher, n_trials, self._plan)
            except BaseException as error:
                errors.append(searcher.error or error)

        thread = threading.Thread(target=run_trials, name="trials", daemon=True)
        thread.start()
        with self._closing_on_trouble():
            while thread.is_alive():
                self._pump()
                thread.join(PUMP_SECONDS)
        self._check()
        if errors:
            raise errors[0]
        self._fail_if_nothing_observed()

    def _n_to_search(self) -> int:
        """Planned trials that have not ended; with fidelities, at most so many."""
        return n_left(self.store.trials(), self.config)

    def _proposer(self) -> Proposer:
        base = self._trial(BASE_TRIAL)
        metrics = metric_losses(base.samples[0], self.config) if base is not None and base.samples else {}
        return Proposer.of(self.config, self.space, self.n_train, base=metrics)

    def _fail_if_nothing_observed(self) -> None:
        trials = searched(self.store.trials())
        if all(t.status == "failed" for t in trials):
            reason = failure_reason([s for t in trials for s in t.samples]) or trials[0].reason
            raise StudyFailed(f"every trial failed: {reason}")

    def _put_in_order(self) -> None:
        """Store what the search's model says of the trials so far, and who is best."""
        if any(t.observation is not None for t in searched(self.store.trials())):
            store_order(self.store, self.config, self._proposer(), is_over=self._n_to_search() == 0)
            self._trial_changed()

    def _confirm(self) -> None:
        """Train and measure the finalists and the uniform ratio again, with seeds that no trial has used."""
        tasks: list[Task] = []
        confirmations = to_confirm(self.store, self.config)
        for trial in confirmations:
            self.store.add_trial(trial.number, "confirm", trial.ratio, trial.method, settings=trial.settings)
            done = {sample.spec.sample for sample in trial.samples}
            every = range(n_samples(trial, self.config))
            missing = [sample for sample in every if sample not in done]
            tasks += sample_tasks(trial, missing, of=every, fuse=self._plan.fuse)
        if tasks:
            self.watcher.phase("measuring the finalists again with fresh seeds")
            self._do_all([_at_once(tasks)])
        for number in [trial.number for trial in confirmations]:
            confirmed = self._trial(number)
            assert confirmed is not None
            observation = reduce_samples(confirmed.samples, self.config.direction)
            if observation is None:
                self.store.fail_trial(number, failure_reason(confirmed.samples))
            elif number >= CONFIRM_ANYWHERE and confirmed.observation is None:
                # No trial before it has a model of this point: one of these is to be handed over.
                self.store.add_observation(number, observation)
            else:
                self.store.finish_trial(number)
        self._trial_changed()

    # Talking to the broker --------------------------------------------------------------------------------------

    def _submit(self, tasks: Sequence[Task]) -> None:
        self._platform.ask("submit", list(tasks))

    def _do_all(self, ways: Sequence[Way]) -> list[str]:
        """Go several ways side by side, each a sequence of tasks to be done one after the other.

        Returns:
            What ended some of the ways before their end.
        """
        under_way: dict[int, tuple[Way, list[str]]] = {}
        errors: list[str] = []

        def go_on(index: int, way: Way, outcomes: list[Outcome] | None) -> None:
            try:
                tasks = way.send(outcomes) if outcomes is not None else next(way)
            except StopIteration as end:
                under_way.pop(index, None)
                errors.extend([end.value] if end.value else [])
            else:
                self._submit(tasks)
                under_way[index] = way, [task.key for task in tasks]

        for index, way in enumerate(ways):
            go_on(index, way, None)
        with self._closing_on_trouble():
            while under_way:
                self._pump()
                self._check()
                for index, (way, keys) in list(under_way.items()):
                    if (outcomes := self._platform.ask("outcomes", keys)) is not None:
                        self._pump()
                        self._check()
                        go_on(index, way, outcomes)
                time.sleep(PUMP_SECONDS)
        return errors

    def _pump(self) -> None:
        """Store what has finished, end what hangs, see that the study is still ours, and say how far it is."""
        with self._pump_lock:
            pulse = self._platform.ask("pulse", self._n_pumped, list(self._platform.ended_groups()))
            for outcome in pulse.finished:
                self._record(outcome)
                self._n_pumped += 1
        for place in pulse.hung:
            self._platform.end(place)
        if time.monotonic() >= self._next_renewal:
            self._next_renewal = time.monotonic() + RENEW_SECONDS
            self.store.renew()  # A thread of its own keeps the lease; here it is seen that it is still ours.
        for reason in pulse.given_up:
            log.warning("the study goes on without a group: %s", reason)
        self.watcher.tick(pulse.in_flight)

    def _record(self, outcome: Outcome) -> None:
        """Store one finished sample, leaving its result in its folder where its worker could not; count one shard."""
        if outcome.task.kind == "score" and outcome.status == "done" and "error" not in outcome.result:
            self._shard_measured(outcome.task)
        if outcome.task.kind == "compare" and outcome.status == "failed":
            leave_failed_comparison(self.config.study_folder, outcome)
        if outcome.task.kind != "sample" or (result := sample_result(outcome)) is None:
            return
        if outcome.status == "failed":
            folder = sample_folder(self.config.study_folder, result.spec)
            folder.mkdir(parents=True, exist_ok=True)
            result = leave_result(folder, result)
        if self.store.add_sample(result):
            self.watcher.changed()
        clear_ended(sample_folder(self.config.study_folder, result.spec), result, self._models)

    def _shard_measured(self, task: Task) -> None:
        assert task.domain is not None
        assert task.shard is not None
        n_rows, size = self.n_train[task.domain], self.config.selection.shard_rows
        n_done = self._n_measured.get(task.domain, 0) + min(size, n_rows - task.shard * size)
        self._n_measured[task.domain] = n_done
        self.watcher.scored(self.config.domains[task.domain].name, n_done, n_rows)

    @contextmanager
    def _closing_on_trouble(self) -> Iterator[None]:
        """While waiting: a stop, trouble or the loss of the last group ends the wait, and no new trial starts."""
        finished = threading.Event()

        def watch() -> None:
            while not finished.wait(PUMP_SECONDS):
                with suppress(PlatformLost):  # Who waits meets the same error, and raises it.
                    if self._stop.is_set():
                        self._platform.ask("close")
                    elif self._platform.is_gone:
                        reasons = "; ".join(sorted(set(self._platform.ended_groups().values())))
                        self._platform.ask("close", f"no group of the fleet is left: {reasons}")
                    if self._stop.is_set() or self._platform.ask("trouble") is not None:
                        self._ending.set()

        thread = threading.Thread(target=watch, name="watch", daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            self._ending.set()
            raise
        finally:
            finished.set()
            thread.join()

    def _check(self) -> None:
        """Raise if the run cannot or must not go on."""
        if (trouble := self._platform.ask("trouble")) is not None:
            raise ResourceError(trouble)
        self._pause_if_stopped()

    def _pause_if_stopped(self) -> None:
        if self._stop.is_set():
            raise Paused(f"study {self.config.name} is paused")

    # The study's state ------------------------------------------------------------------------------------------

    def _trial_changed(self) -> None:
        prune_adapters(self.config, self.store, self._models)
        self.watcher.changed()

    def _trial(self, number: int) -> Trial | None:
        return next((t for t in self.store.trials() if t.number == number), None)

    def _is_complete(self) -> bool:
        """Whether there is nothing left to do, so that Ray need not start."""
        trials = {t.number: t for t in self.store.trials()}
        base = trials.get(BASE_TRIAL)
        if self.unscored or self._n_to_search() or base is None or base.status != "done":
            return False
        return all(
            t.status != "pending" and len(t.samples) >= n_samples(t, self.config)
            for t in to_confirm(self.store, self.config)
        )

    @property
    def _plan(self) -> TrialPlan:
        fuse = self.config.training.fuse
        assert fuse != "auto", "it is resolved before the start"
        return TrialPlan(fuse=fuse, racing=self.config.sampling.racing, direction=self.config.direction)
