"""Everything a report needs of a study, and the plain questions that one asks of it.

The store fills a `StudySummary`; figures, page, status table, JSON and export read nothing else. All functions here
are pure, and the only notion of "better" is `Direction.better`.
"""

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from duet_ray.records import Direction, SampleResult, Trial
from duet_ray.report.scores import ScoreSummary
from duet_ray.report.wording import ValueFormat, decimals_for, first_line

CONFIRMS = "confirm:"
"""A confirmation's `Trial.method` is this and the name of the trial it confirms."""


@dataclass(frozen=True, kw_only=True)
class DomainSummary:
    """One domain's data, as it was read and weighted."""

    name: str
    source: str
    n_train: int
    n_validation: int
    n_bad: int
    n_duplicates: int
    n_overlap: int | None
    """Training rows that stand in the task's text; None where that text is not at hand."""
    effective_sample_size: float | None
    """How many rows the selection weights are worth, 1 … n_train; None before they are computed."""
    notes: tuple[str, ...] = ()
    """What the selection method has to say about this domain."""
    scores: ScoreSummary | None = None
    """Its scores and its best and worst rows; None before they are computed, or in a store of an older version."""


@dataclass(frozen=True, kw_only=True)
class StudySummary:
    """A study as its store holds it at one moment, finished or not."""

    name: str
    direction: Direction
    domain_names: tuple[str, ...]
    n_rows: int
    k: int
    n_planned: int
    """Start design and Bayesian trials together."""
    feedback_name: str
    trials: tuple[Trial, ...]
    """Base, start, search and confirm, in order of number, with the failed and the pending ones."""
    domains: tuple[DomainSummary, ...]
    config_yaml: str
    started: datetime | None
    seconds: float | None
    """Time spent on the study so far."""
    versions: dict[str, str]
    notes: tuple[str, ...] = ()
    feedback_is_random: bool = False
    """Whether the feedback may return another value for the same model."""
    model_path: str = "<base model>"
    """Folder or hub id of the base model."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Repeated measurements of one thing, each with a model trained from a fresh seed (or of the untouched model)."""

    values: tuple[float, ...]
    """At least one, in the user's own direction."""
    n_failed: int = 0
    trained: bool = True
    """False for the untouched model."""
    exact: bool = False
    """Nothing varies, neither a training nor the feedback: one value stands for itself."""

    def __post_init__(self) -> None:
        assert self.values, "a measurement has at least one value"

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float | None:
        """Standard deviation between repeats (n − 1 in the denominator); None for one repeat."""
        return statistics.stdev(self.values) if self.n >= 2 else None

    @property
    def standard_error(self) -> float | None:
        """Of the mean: spread / √n; for a single value 0 where it is exact, else None: not known."""
        if self.spread is None:
            return 0.0 if self.exact else None
        return self.spread / math.sqrt(self.n)


StudyState = Literal["empty", "base_only", "failed", "running", "finished"]
"""`empty`: no value at all; `base_only`: only the untouched model's; `failed`: every trial that ended has failed."""


def searched(summary: StudySummary) -> tuple[Trial, ...]:
    """The trials of the start design and of the search, without base and confirmations."""
    return tuple(t for t in summary.trials if t.kind in ("start", "search"))


def confirmations(summary: StudySummary) -> tuple[Trial, ...]:
    return tuple(t for t in summary.trials if t.kind == "confirm")


def observed(summary: StudySummary) -> tuple[Trial, ...]:
    """Start and search trials that have an observation."""
    return tuple(t for t in searched(summary) if t.status == "done" and t.observation is not None)


def n_ended(summary: StudySummary) -> int:
    """Start and search trials that are over, with or without a value."""
    return sum(t.status != "pending" for t in searched(summary))


def n_failed(summary: StudySummary) -> int:
    return sum(t.status == "failed" for t in searched(summary))


def state(summary: StudySummary) -> StudyState:
    ended = n_ended(summary)
    if not observed(summary):
        if ended:
            return "failed"
        return "base_only" if base_measurement(summary) else "empty"
    return "finished" if ended >= summary.n_planned else "running"


def value_of(trial: Trial) -> float:
    """The observation's value of a trial that has one."""
    assert trial.observation is not None, f"{trial.name} has no observation"
    return trial.observation.value


def best_of(trials: Iterable[Trial], direction: Direction) -> Trial | None:
    """The trial with the best observation; the earlier of two equal ones; None if none has one."""
    best: Trial | None = None
    for trial in trials:
        if trial.observation and (best is None or direction.better(value_of(trial), value_of(best))):
            best = trial
    return best


def best_trial(summary: StudySummary) -> Trial | None:
    """The best trial so far, by its observation."""
    return best_of(observed(summary), summary.direction)


def running_best(summary: StudySummary, *, up_to: int | None = None) -> tuple[tuple[Trial, Trial | None], ...]:
    """Each start or search trial, in order of number, with the best trial up to and including it.

    The best is None as long as no trial has an observation; pending and failed trials repeat the best before them.
    """
    pairs: list[tuple[Trial, Trial | None]] = []
    best: Trial | None = None
    for trial in searched(summary):
        if up_to is not None and trial.number > up_to:
            break
        if trial.status == "done":
            best = best_of([best, trial] if best else [trial], summary.direction)
        pairs.append((trial, best))
    return tuple(pairs)


def uniform_trial(summary: StudySummary) -> Trial | None:
    """Trial 0: the uniform ratio, projected into the bounds; it opens every start design."""
    return next((t for t in searched(summary) if t.number == 0), None)


def base_trial(summary: StudySummary) -> Trial | None:
    return next((t for t in summary.trials if t.kind == "base"), None)


def base_measurement(summary: StudySummary) -> Measurement | None:
    """The untouched model's value; None before it is measured or where that failed."""
    trial = base_trial(summary)
    return measurement_of(trial.samples, trained=False, exact=not summary.feedback_is_random) if trial else None


def confirmed_name(trial: Trial) -> str:
    """The name of the trial that a confirmation confirms: `t0003` for the method `confirm:t0003`."""
    return trial.method.removeprefix(CONFIRMS)


def confirmation_of(summary: StudySummary, name: str) -> Measurement | None:
    """The fresh-seed values of the trial called `name`; None where there are none (yet)."""
    samples = [s for t in confirmations(summary) if confirmed_name(t) == name for s in t.samples]
    return measurement_of(samples)


def measurement_of(samples: Sequence[SampleResult], *, trained: bool = True, exact: bool = False) -> Measurement | None:
    """The samples' values as one measurement; None where no sample has a value."""
    values = tuple(s.value for s in samples if s.value is not None)
    if not values:
        return None
    return Measurement(values=values, n_failed=sum(s.failed for s in samples), trained=trained, exact=exact)


def finalists(summary: StudySummary) -> tuple[tuple[Trial, Measurement], ...]:
    """The search's trials that were measured again, with their fresh values, in order of number.

    The uniform ratio is measured again in every study for comparison, so it counts as a finalist only where it also
    is the best observed one.
    """
    best, uniform = best_trial(summary), uniform_trial(summary)
    found = []
    for trial in observed(summary):
        again = confirmation_of(summary, trial.name)
        if again and (trial is not uniform or trial is best):
            found.append((trial, again))
    return tuple(found)


def chosen_trial(summary: StudySummary) -> Trial | None:
    """The trial to take away: the finalist with the best mean of fresh values, else the best observed one.

    Where the uniform ratio's fresh mean is better than every finalist's, the uniform ratio is taken: the search found
    nothing better. Observations are the best of many noisy numbers and flatter whoever was lucky; fresh values do so
    much less.
    """
    best = best_measured(finalists(summary), summary.direction)
    if best is None:
        return best_trial(summary)
    uniform = uniform_trial(summary)
    # Without an observation of its own, the uniform trial has no model to hand over.
    again = confirmation_of(summary, uniform.name) if uniform and uniform in observed(summary) else None
    return uniform if again and summary.direction.better(again.mean, best[1].mean) else best[0]


def best_measured(
    measured: Iterable[tuple[Trial, Measurement]], direction: Direction
) -> tuple[Trial, Measurement] | None:
    """The trial with the best mean of fresh values, with these; the earlier of two equal ones; None of none."""
    best: tuple[Trial, Measurement] | None = None
    for trial, again in measured:
        if best is None or direction.better(again.mean, best[1].mean):
            best = (trial, again)
    return best


def best_sample(trial: Trial) -> SampleResult | None:
    """The sample that gave a trial its observation."""
    if trial.observation is None:
        return None
    return next((s for s in trial.samples if s.spec.sample == trial.observation.best_sample), None)


def failure_reasons(trials: Iterable[Trial]) -> tuple[tuple[str, int], ...]:
    """The first lines of failed samples' reasons with how often each occurred, most frequent first."""
    reasons = Counter(first_line(s.reason or "") for t in trials for s in t.samples if s.failed)
    return tuple(reasons.most_common())


def n_stopped(trial: Trial) -> int:
    """Samples that were behind in their trial's race, and stopped before the end."""
    return sum(s.was_stopped for s in trial.samples)


def all_values(summary: StudySummary) -> tuple[float, ...]:
    """Every value measured in the study, of every kind of trial."""
    return tuple(s.value for t in summary.trials for s in t.samples if s.value is not None)


def value_format(summary: StudySummary) -> ValueFormat:
    """As many decimals as the study's values need to be told apart."""
    return ValueFormat(decimals_for(all_values(summary)))


def metric_means(samples: Sequence[SampleResult]) -> dict[str, float]:
    """The mean of every metric measured beside the value, over the samples that have it."""
    names = dict.fromkeys(name for s in samples if s.ok for name in s.metrics)
    found = {name: [s.metrics[name] for s in samples if s.ok and name in s.metrics] for name in names}
    return {name: statistics.fmean(values) for name, values in found.items()}
