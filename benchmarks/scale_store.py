"""A study's store as it grows, and what the driver asks of it for every trial, for `scale.py`.

The real `StudySearcher` (with a proposer that thinks of nothing), the real store in SQLite and the real tidying up are
taken through a whole study, sample by sample as the driver stores them; models are not on disk, since none is trained.
"""

import time
import tracemalloc
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from scale_broker import simulated_result, simulated_trial

from duet_ray.config import StudyConfig, config_from
from duet_ray.execution.artifacts import prune_adapters
from duet_ray.execution.searcher import StudySearcher
from duet_ray.records import Observation, Point
from duet_ray.report.from_store import read_summary
from duet_ray.search import Proposal, Told
from duet_ray.store import Store

N_TIMED = 3
"""Trials before a look that are asked for, reduced and tidied up after as in a study; the others are only written."""


@dataclass(frozen=True, kw_only=True)
class Grown:
    """A store with so many samples, and what it takes there. Seconds are medians of what came since the last look."""

    n_samples: int
    file_bytes: int
    read_seconds: float
    """`Store.trials()`: everything there is."""
    n_reads: float
    """How often it is called for one trial, from the proposal to the end."""
    sample_seconds: float
    """To store one sample."""
    suggest_seconds: float
    """From Tune's question to the next trial, less the proposal itself."""
    complete_seconds: float
    """To reduce a trial's samples and store the observation."""
    tidy_seconds: float
    """To see which models may be deleted: twice a trial."""
    summary_seconds: float
    """`read_summary`, what the screen shows: once a second at most."""
    trials_bytes: int
    """What `trials()` returns holds in memory."""
    rss_bytes: int
    """The whole process."""

    @property
    def trial_seconds(self) -> float:
        """What a trial costs the driver."""
        return self.suggest_seconds + self.complete_seconds + 2 * self.tidy_seconds


class _NoThought:
    """A proposer that knows its ratios beforehand."""

    def __init__(self, n_domains: int) -> None:
        self._n_domains = n_domains

    def propose(self, trial: int, told: Sequence[Told], pending: Sequence[Point]) -> Proposal:
        ratio = simulated_trial(trial, self._n_domains).ratio
        assert ratio is not None
        return Proposal(ratio=ratio, method="bayesian:lcb", seconds=0.0)


class _Counting:
    """A store that counts how often all of it is read."""

    def __init__(self, store: Store) -> None:
        self._store, self.n_reads = store, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def trials(self) -> Any:
        self.n_reads += 1
        return self._store.trials()


def _config(folder: Path, n_trials: int, k: int, n_domains: int) -> StudyConfig:
    domains = [{"name": f"d{i}", "source": f"d{i}.jsonl"} for i in range(n_domains)]
    return config_from(
        {
            "name": "scale",
            "model": {"path": "none"},
            "domains": domains,
            "mixture": {"n_rows": 10_000},
            "sampling": {"k": k},
            "search": {"n_start": 1, "n_trials": n_trials},
            "feedback": {"kind": "function", "function": "none:none", "direction": "minimize"},
            "storage": str(folder),
        },
        folder=folder,
    )


def grow(folder: Path, looks: Sequence[int], *, k: int = 4, n_domains: int = 50) -> list[Grown]:
    """Take a study through its trials, and look at its store whenever it has one of these numbers of samples."""
    n_trials = max(looks) // k
    config = _config(folder, n_trials, k, n_domains)
    seconds: dict[str, list[float]] = defaultdict(list)
    grown = []

    def timed(name: str, call: Any, *arguments: Any) -> Any:
        started = time.perf_counter()
        answer = call(*arguments)
        seconds[name].append(time.perf_counter() - started)
        return answer

    with Store(config.study_folder, create=True).writing() as store:
        store.create_study(name=config.name, config=config.model_dump(mode="json"), versions={})
        counting = _Counting(store)
        searcher = StudySearcher(_NoThought(n_domains), config, counting)  # type: ignore[arg-type]
        for number in range(n_trials):
            trial = simulated_trial(number, n_domains)
            to_look = [look for look in looks if 0 < look - number * k <= N_TIMED * k]
            is_look, before = (number + 1) * k in looks, counting.n_reads
            if to_look:
                timed("suggest", searcher.suggest, str(number))
                timed("tidy", prune_adapters, config, counting)
            else:  # The long way between two looks: written, and nothing asked of it.
                store.add_trial(number, "search", trial.ratio, "bayesian:lcb")
            for sample in range(k):
                result = simulated_result(trial.spec(sample), value=float(number % 97) + sample)
                timed("sample", store.add_sample, result)
                store.drop_artifact(number, sample)  # There is no model on disk.
            if to_look:
                timed("complete", searcher.on_trial_complete, str(number), {"ended": 1})
                timed("tidy", prune_adapters, config, counting)
            else:
                store.add_observation(number, Observation(value=float(number % 97), k=k, k_used=k, best_sample=0))
            if is_look:
                n_reads = counting.n_reads - before
                grown.append(_look(store, config, (number + 1) * k, seconds, n_reads))
                seconds.clear()
    return grown


def _look(store: Store, config: StudyConfig, n_samples: int, seconds: dict[str, list[float]], n_reads: int) -> Grown:
    def median(name: str, most: int = 20) -> float:
        last = sorted(seconds[name][-most:])
        return last[len(last) // 2]

    def taken(call: Any) -> float:
        times = []
        for _ in range(3):
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
        return sorted(times)[1]

    read = taken(store.trials)
    tracemalloc.start()
    trials = store.trials()
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert sum(len(trial.samples) for trial in trials) == n_samples
    return Grown(
        n_samples=n_samples,
        file_bytes=sum(file.stat().st_size for file in config.study_folder.glob("study.db*")),
        read_seconds=read,
        n_reads=n_reads,
        sample_seconds=median("sample"),
        suggest_seconds=median("suggest"),
        complete_seconds=median("complete"),
        tidy_seconds=median("tidy"),
        summary_seconds=taken(lambda: read_summary(config.study_folder)),
        trials_bytes=held,
        rss_bytes=psutil.Process().memory_info().rss,
    )
