"""A `Platform` in one process: the real `Broker`, groups that are threads, trials that are threads."""

import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from ray.tune.search import Searcher

from duet_ray.config import StudyConfig
from duet_ray.execution import serving, study_run, trial
from duet_ray.execution.broker import Broker, Place
from duet_ray.execution.searcher import StudySearcher
from duet_ray.execution.serving import MakeWorker, Seat, serve
from duet_ray.execution.trial import TrialPlan, run_trial
from duet_ray.execution.worker import Assignment, Worker


def be_quick() -> None:
    """Shorten the waits of this process: nothing here crosses a network."""
    trial.POLL_SECONDS, study_run.PUMP_SECONDS = 0.002, 0.01
    serving.SHORTEST_WAIT, serving.LONGEST_WAIT, serving.BEAT_SECONDS = 0.001, 0.005, 0.05


class LightPlatform:
    """What `RayPlatform` is to Ray; see `duet_ray.execution.platform.Platform`."""

    def __init__(
        self,
        config: StudyConfig,
        assignment: Assignment,
        say: Callable[[str], None],
        *,
        make_worker: MakeWorker = Worker,
    ) -> None:
        self._config, self._assignment, self._make_worker = config, assignment, make_worker
        self._broker, self._lock = Broker(config.sampling.max_retries), threading.RLock()
        self._ended: dict[int, str] = {}
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> "LightPlatform":
        for group in range(self._config.fleet.groups):
            thread = threading.Thread(target=self._run_group, args=(group,), daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(self, *_: object) -> None:
        self.ask("close")
        for thread in self._threads:
            thread.join(timeout=30)

    def ask(self, method: str, *arguments: Any) -> Any:
        with self._lock:
            return getattr(self._broker, method)(*arguments)

    def ended_groups(self) -> dict[int, str]:
        return dict(self._ended)

    @property
    def is_gone(self) -> bool:
        return len(self._ended) == self._config.fleet.groups

    def end(self, place: Place) -> None:
        raise AssertionError("a thread has no place of its own")

    def run_trials(self, searcher: StudySearcher, n_trials: int, plan: TrialPlan) -> None:
        running: dict[str, threading.Thread] = {}
        may_start = True
        while running or may_start:
            while may_start and len(running) < self._config.search.concurrent_trials:
                name = uuid.uuid4().hex
                suggested = searcher.suggest(name)
                if suggested is None:
                    break
                if suggested == Searcher.FINISHED:
                    may_start = False
                    break
                running[name] = threading.Thread(target=run_trial, args=(suggested, self.ask, plan), daemon=True)
                running[name].start()
            for name in [name for name, thread in running.items() if not thread.is_alive()]:
                del running[name]
                searcher.on_trial_complete(name)
            time.sleep(0.001)

    def _run_group(self, group: int) -> None:
        def tell(method: str, *arguments: Any) -> None:
            self.ask(method, *arguments)

        reason = "it left"
        while self.ask("wants", group):  # as Ray Train does
            try:
                seat = Seat(ask=self.ask, tell=tell, group=group, incarnation=uuid.uuid4().hex)
                serve(seat, self._assignment, make_worker=self._make_worker)
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
        self._ended[group] = reason
