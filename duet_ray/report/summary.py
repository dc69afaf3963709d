"""Everything a report needs of a study, and the plain questions that one asks of it.

The store fills a `StudySummary`; figures, page, status table, JSON and export read nothing else. All functions here
are pure, and the only notion of "better" is `Direction.better`.
"""

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from duet_ray.budget import cheapest, spent
from duet_ray.budget import searched as searched_trials
from duet_ray.config import StudyConfig
from duet_ray.records import CONFIRM_ANYWHERE, CONFIRM_BASE, Direction, PastRun, SampleResult, Trial
from duet_ray.report.objectives import gives_up_least, judged, metric_values, objective_of
from duet_ray.report.scores import ScoreSummary
from duet_ray.report.wording import (
    ValueFormat,
    decimals_for,
    fidelity_text,
    first_line,
    join_words,
    number,
    plural,
    settings_text,
)

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
    """Start design and Bayesian trials together; with fidelities, in whole trials' worth of rows."""
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
    posterior: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    """Trial number → mean and standard deviation of the noiseless value of its ratio, as a whole trial, by the search's
    model once all was told; in the user's own direction. Empty before the end of the search."""
    ranking: tuple[int, ...] = ()
    """Numbers of the trials that the search recommends, best first; empty as long as it has put none in order."""
    past_runs: tuple[PastRun, ...] = ()
    """Experiments from before the study that its search was told."""
    k_bounds: tuple[int, int] | None = None
    """The fewest and the most samples of a trial where that is chosen trial by trial; `k` is then the most."""
    config: StudyConfig | None = None
    """The study as it is stored; None in a summary that no store has made."""


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
    return tuple(searched_trials(summary.trials))


def confirmations(summary: StudySummary) -> tuple[Trial, ...]:
    """Ratios that were trained and measured again (or, see `is_anywhere`, only then)."""
    return tuple(t for t in summary.trials if t.kind == "confirm" and t.number != CONFIRM_BASE)


def is_anywhere(trial: Trial) -> bool:
    """Whether this is a confirmation without a trial before it: the model's best of all ratios, trained or not."""
    return trial.number >= CONFIRM_ANYWHERE


def is_same_point(a: Trial, b: Trial) -> bool:
    """Whether two trials try the same: ratio and training settings."""
    return a.ratio == b.ratio and a.settings == b.settings


def is_whole(trial: Trial) -> bool:
    """Whether it was trained on all rows of its mixture. Values of cheaper trials are not on the same scale."""
    return trial.fidelity == 1


def observed(summary: StudySummary) -> tuple[Trial, ...]:
    """Start and search trials that have an observation."""
    return tuple(t for t in searched(summary) if t.status == "done" and t.observation is not None)


def n_ended(summary: StudySummary) -> int:
    """Start and search trials that are over, with or without a value."""
    return sum(t.status != "pending" for t in searched(summary))


def n_spent(summary: StudySummary) -> float:
    """What those trials are worth in whole trials: a trial on a quarter of the rows is a quarter of one."""
    return spent(summary.trials, ended=True)


def has_fidelities(summary: StudySummary) -> bool:
    """Whether trials may be on fewer rows, so that trials are counted by what they are worth."""
    planned = summary.config is not None and summary.config.search.fidelity is not None
    return planned or any(not is_whole(t) for t in searched(summary))


def n_failed(summary: StudySummary) -> int:
    return sum(t.status == "failed" for t in searched(summary))


def state(summary: StudySummary) -> StudyState:
    ended = n_ended(summary)
    if not observed(summary):
        if ended:
            return "failed"
        return "base_only" if base_measurement(summary) else "empty"
    return "running" if is_open(summary) else "finished"


def is_open(summary: StudySummary) -> bool:
    """Whether trials of the search are still to come, or under way."""
    if not has_fidelities(summary):
        return n_ended(summary) < summary.n_planned
    # Over when what is left does not pay for the cheapest trial.
    least = cheapest(summary.config) if summary.config is not None else min(t.fidelity for t in searched(summary))
    waits = any(t.status == "pending" for t in searched(summary))
    return waits or summary.n_planned - n_spent(summary) >= least - 1e-9


def progress_text(summary: StudySummary) -> str:
    """`3 of 10 trials`; with fidelities what they are worth: `2.5 of 10 whole trials (7 trials)`."""
    if not has_fidelities(summary):
        return f"{n_ended(summary)} of {plural(summary.n_planned, 'trial')}"
    worth = f"{number(n_spent(summary))} of {plural(summary.n_planned, 'whole trial')}"
    return f"{worth} ({plural(n_ended(summary), 'trial')})"


def k_text(summary: StudySummary) -> str:
    """`4`, or `1 to 4` where every trial has a number of samples of its own."""
    if summary.k_bounds is None or summary.k_bounds[0] == summary.k_bounds[1]:
        return str(summary.k)
    return f"{summary.k_bounds[0]} to {summary.k_bounds[1]}"


def own_text(trial: Trial) -> str:
    """What else is a trial's own, beside its ratio: `rank 32, lr 2e-4, on 25 % of the rows`; empty for most."""
    return ", ".join(part for part in (settings_text(trial.settings), fidelity_text(trial.fidelity)) if part)


def past_runs_text(summary: StudySummary) -> str:
    """`12 past runs from runs.csv were told`; empty where there are none."""
    if not summary.past_runs:
        return ""
    files = dict.fromkeys(run.source.rpartition(":")[0] or run.source for run in summary.past_runs)
    named = join_words([name for name in files if name][:4]) if any(files) else ""
    more = f" and {len(files) - 4} more" if len(files) > 4 else ""
    n = len(summary.past_runs)
    return f"{plural(n, 'past run')}{f' from {named}{more}' if named else ''} {'was' if n == 1 else 'were'} told"


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
    """The best trial so far, by its observation; a cheap trial only where there is no whole one."""
    found = observed(summary)
    return best_of([t for t in found if is_whole(t)] or found, summary.direction)


def recommended_trial(summary: StudySummary) -> Trial | None:
    """The trial whose ratio the search recommends: the first of its ranking, else the posterior's best whole trial.

    With requirements the best of those that keep them, if any does; with a front the compromise that gives up least.
    Without a posterior (yet), the best observed one.
    """
    by_number = {t.number: t for t in observed(summary)}
    is_stale = max(by_number, default=-1) > max(summary.posterior, default=-1)  # Stored at a pause, and trials since.
    first = next((by_number[n] for n in summary.ranking if n in by_number), None)
    if first is not None and not is_stale:
        return first
    candidates = that_keep(summary, [t for t in observed(summary) if is_whole(t)])
    if (traded := compromise_of(summary, candidates)) is not None:
        return traded
    best: Trial | None = None
    for trial in candidates:
        if is_stale or trial.number not in summary.posterior:
            continue
        mean = summary.posterior[trial.number][0]
        if best is None or summary.direction.better(mean, summary.posterior[best.number][0]):
            best = trial
    return best or best_of(candidates, summary.direction) or best_trial(summary)


def running_best(summary: StudySummary, *, up_to: int | None = None) -> tuple[tuple[Trial, Trial | None], ...]:
    """Each start or search trial, in order of number, with the best trial up to and including it.

    The best is None as long as no whole trial has an observation; pending, failed and cheap trials repeat the best
    before them.
    """
    pairs: list[tuple[Trial, Trial | None]] = []
    best: Trial | None = None
    for trial in searched(summary):
        if up_to is not None and trial.number > up_to:
            break
        if trial.status == "done" and is_whole(trial):
            best = best_of([best, trial] if best else [trial], summary.direction)
        pairs.append((trial, best))
    return tuple(pairs)


def uniform_trial(summary: StudySummary) -> Trial | None:
    """Trial 0: the uniform ratio, projected into the bounds; it opens every start design."""
    return next((t for t in searched(summary) if t.number == 0), None)


def base_trial(summary: StudySummary) -> Trial | None:
    return next((t for t in summary.trials if t.kind == "base"), None)


def base_measurement(summary: StudySummary, *, as_trials: bool = False) -> Measurement | None:
    """The untouched model's value; None before it is measured or where that failed.

    Args:
        as_trials: as the search's trials were measured; else, where there is one, as the confirmations were, which may
            have looked closer.
    """
    again = None if as_trials else next((t for t in summary.trials if t.number == CONFIRM_BASE), None)
    for trial in (again, base_trial(summary)):
        if trial is not None:
            found = measurement_of(trial.samples, trained=False, exact=not summary.feedback_is_random)
            if found is not None:
                return found
    return None


def confirmed_name(trial: Trial) -> str:
    """The name of the trial that a confirmation confirms: `t0003` for the method `confirm:t0003`.

    One without a trial before it goes by its own name.
    """
    return trial.name if is_anywhere(trial) else trial.method.removeprefix(CONFIRMS)


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
    """The search's ratios that were measured again, with their fresh values, in order of number.

    The uniform ratio is measured again in every study for comparison, so it counts as a finalist only where it also
    is the best observed or the recommended one.
    """
    # One pass over the confirmations, of which there are few: one for every trial takes seconds with thousands of them.
    fresh: dict[str, list[SampleResult]] = {}
    for confirmation in confirmations(summary):
        fresh.setdefault(confirmed_name(confirmation), []).extend(confirmation.samples)
    if not fresh:
        return ()
    own, uniform = (best_trial(summary), recommended_trial(summary)), uniform_trial(summary)
    found = []
    for trial in (*observed(summary), *(t for t in confirmations(summary) if is_anywhere(t))):
        again = measurement_of(fresh.get(trial.name, ()))
        if again and (trial is not uniform or any(trial is t for t in own)):
            found.append((trial, again))
    return tuple(found)


def chosen_trial(summary: StudySummary) -> Trial | None:
    """The trial to take away: the finalist with the best mean of fresh values, else the recommended one.

    Where the uniform ratio's fresh mean is better than every finalist's, the uniform ratio is taken: the search found
    nothing better. Observations are the best of many noisy numbers and flatter whoever was lucky; fresh values do so
    much less. With requirements only ratios that keep them are weighed, if any does; with a front it is the compromise
    among those measured again.
    """
    again = list(finalists(summary))
    if not again:
        return recommended_trial(summary)
    uniform = uniform_trial(summary)
    # Without an observation of its own, the uniform trial has no model to hand over.
    rival = confirmation_of(summary, uniform.name) if uniform and uniform in observed(summary) else None
    if uniform is not None and rival is not None and all(trial is not uniform for trial, _ in again):
        again.append((uniform, rival))
    kept = that_keep(summary, [trial for trial, _ in again], fresh=True)
    if (traded := compromise_of(summary, kept, fresh=True)) is not None:
        return traded
    best = best_measured([(t, m) for t, m in again if any(t is k for k in kept)], summary.direction)
    assert best is not None, "some of them are always kept"
    return best[0]


def best_measured(
    measured: Iterable[tuple[Trial, Measurement]], direction: Direction
) -> tuple[Trial, Measurement] | None:
    """The trial with the best mean of fresh values, with these; the earlier of two equal ones; None of none."""
    best: tuple[Trial, Measurement] | None = None
    for trial, again in measured:
        if best is None or direction.better(again.mean, best[1].mean):
            best = (trial, again)
    return best


def that_keep(summary: StudySummary, trials: Sequence[Trial], *, fresh: bool = False) -> list[Trial]:
    """Those of the trials that keep the study's requirements; all of them where none does, or nothing is required."""
    if not trials or (objective := objective_of(summary.config)) is None or not objective.require:
        return list(trials)
    base = base_metrics(summary)
    assert summary.config is not None, "it has an objective"
    kept = [t for t in trials if all(j.kept for j in judged(summary.config, metrics_of(summary, t, fresh=fresh), base))]
    return kept or list(trials)


def compromise_of(summary: StudySummary, trials: Sequence[Trial], *, fresh: bool = False) -> Trial | None:
    """The trial that gives up least between the metrics of the study's front; None without a front."""
    objective = objective_of(summary.config)
    if summary.config is None or objective is None or not objective.pareto or not trials:
        return None
    place = gives_up_least(summary.config, [metrics_of(summary, t, fresh=fresh) for t in trials])
    return None if place is None else trials[place]


def metrics_of(summary: StudySummary, trial: Trial, *, fresh: bool) -> dict[str, float]:
    """The metrics of a trial that an objective can name.

    Args:
        fresh: means over the fresh samples where there are any, which luck has not chosen; else what the search saw,
            the metrics of the sample that gave the observation.
    """
    if summary.config is None:
        return {}
    confirmed = [t for t in confirmations(summary) if confirmed_name(t) == trial.name] if fresh else []
    again = [s for t in confirmed for s in t.samples if s.ok]
    best = best_sample(trial, summary.direction)
    return metric_values(summary.config, again or ([best] if best else []))


def base_metrics(summary: StudySummary) -> dict[str, float]:
    """The same of the untouched model."""
    if summary.config is None:
        return {}
    tried = (next((t for t in summary.trials if t.number == CONFIRM_BASE), None), base_trial(summary))
    return next((v for t in tried if t is not None and (v := metric_values(summary.config, t.samples))), {})


def best_sample(trial: Trial, direction: Direction | None = None) -> SampleResult | None:
    """The sample that gave a trial its observation.

    Args:
        direction: for a ratio that was only ever confirmed, and has no observation (yet): its best sample, then.
    """
    if trial.observation is None:
        good = [s for s in trial.samples if s.value is not None] if direction and is_anywhere(trial) else []
        return min(good, key=lambda s: direction.to_loss(s.value or 0.0)) if direction and good else None
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
