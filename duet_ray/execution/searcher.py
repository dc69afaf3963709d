"""Ray Tune's `Searcher` over our proposer and our store.

Time does not decide: with c concurrent trials, proposal t sees exactly the trials up to t − c as finished and the rest
as pending, even if they are done. So the ratios follow from the study file and the observations alone, whichever
machine was quicker, and a resumed study proposes what an uninterrupted one would have. The store is the truth; nothing
is pickled.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ray.tune.search import Searcher

from duet_ray.budget import is_spent, n_samples, searched
from duet_ray.config import StudyConfig
from duet_ray.errors import ResourceError
from duet_ray.execution.trial import as_config
from duet_ray.records import Trial, TrialKind
from duet_ray.reduce import failure_reason, reduce_samples
from duet_ray.search import Proposer
from duet_ray.search.told import told_of, told_of_run
from duet_ray.store import Store


class StudySearcher(Searcher):
    """Suggests the study's next point, and records what came of it.

    Args:
        proposer: makes a point from (trial, told, pending).
        store: where trials and observations are read and written.
        on_change: called after a trial was suggested or ended.
        before_reduce: called before a trial's samples are reduced, to store those that have just ended.
        is_ending: True once no new trial may start.

    Attributes:
        error: what went wrong inside a call by Tune, as it was raised.
    """

    def __init__(
        self,
        proposer: Proposer,
        config: StudyConfig,
        store: Store,
        *,
        on_change: Callable[[], None] = lambda: None,
        before_reduce: Callable[[], None] = lambda: None,
        is_ending: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__()
        self._proposer, self._config, self._store = proposer, config, store
        self._on_change, self._before_reduce, self._is_ending = on_change, before_reduce, is_ending
        self.error: BaseException | None = None
        self._running: dict[str, int] = {}
        self._lock = threading.RLock()

    def suggest(self, trial_id: str) -> dict[str, Any] | Any:
        """The next trial as a Tune config; None when it must wait for another; FINISHED when all are under way."""
        with self._lock, self._remembering():
            trials = {t.number: t for t in searched(self._store.trials())}
            number = self._next(trials)
            if self._is_ending() or number is None:
                return Searcher.FINISHED
            concurrent = self._config.search.concurrent_trials
            if len(self._running) >= concurrent or not _all_ended(trials, number - concurrent):
                return None
            if number not in trials:
                trials[number] = self._propose(number, trials)
            trial = trials[number]
            self._running[trial_id] = number
            self._on_change()
            return as_config(trial, n_samples(trial, self._config))

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Reduce the samples that the store has to the trial's observation, or its failure.

        Whatever became of the thin Tune trial, a trial with all its samples has an observation; one whose samples did
        not all end stays pending, and a resume takes it up again.
        """
        with self._lock, self._remembering():
            number = self._running.pop(trial_id, None)
            if number is None:
                return
            self._before_reduce()
            trial = next(t for t in self._store.trials() if t.number == number)
            sampling = self._config.sampling
            if len(trial.samples) == n_samples(trial, self._config):
                observation = reduce_samples(trial.samples, self._config.direction, min_samples=sampling.min_samples)
                if observation is not None:
                    self._store.add_observation(number, observation)
                else:
                    self._store.fail_trial(number, failure_reason(trial.samples))
            elif not self._is_ending():
                raise ResourceError(f"Ray ended trial {trial.name} before its samples; the same command goes on")
            self._on_change()

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its searcher at every turn; ours has nothing to say there that the store does not say."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the store holds all there is to know."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a study is resumed from its store, not from Tune's checkpoint")

    @contextmanager
    def _remembering(self) -> Iterator[None]:
        """Keep an error as it was: Tune passes it on as text."""
        try:
            yield
        except BaseException as error:
            self.error = self.error or error
            raise

    def _next(self, trials: dict[int, Trial]) -> int | None:
        """The lowest trial that has neither ended nor is under way."""
        for number in sorted(trials):
            if trials[number].status == "pending" and number not in self._running.values():
                return number
        return None if is_spent(list(trials.values()), self._config) else len(trials)

    def _propose(self, number: int, trials: dict[int, Trial]) -> Trial:
        horizon = number - self._config.search.concurrent_trials
        told, pending = [told_of_run(run, self._config) for run in self._store.past_runs()], []
        for other in sorted(trials):
            trial = trials[other]
            if other >= number:
                continue
            if other > horizon or trial.status == "failed":
                # A failed point has taught nothing, but proposing it again would fail again.
                pending.append(trial.point)
            elif (seen := told_of(trial, self._config)) is not None:
                told.append(seen)
        proposal = self._proposer.propose(number, told, pending)
        kind: TrialKind = "start" if number < self._config.search.n_start_trials else "search"
        self._store.add_trial(
            number,
            kind,
            proposal.ratio,
            proposal.method,
            settings=proposal.settings,
            fidelity=proposal.fidelity,
            k=proposal.k,
        )
        return Trial(
            number=number,
            kind=kind,
            ratio=proposal.ratio,
            status="pending",
            method=proposal.method,
            settings=proposal.settings,
            fidelity=proposal.fidelity,
            k=proposal.k,
        )


def _all_ended(trials: dict[int, Trial], last: int) -> bool:
    """Whether every trial up to `last` has ended."""
    return all(n in trials and trials[n].status != "pending" for n in range(last + 1))
