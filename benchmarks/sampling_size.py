"""What do k samples per ratio buy, what do they cost, and does the law of Theorem 3.2 hold?

    OMP_NUM_THREADS=1 python benchmarks/sampling_size.py --out results
    OMP_NUM_THREADS=1 python benchmarks/sampling_size.py --study .demo/study.yaml --out results --set mixture.n_rows=24
    RAY_ADDRESS=auto python benchmarks/sampling_size.py --study study.yaml --out /shared/results --groups 8

Without `--study` a toy is made: a tiny model, three domains of letters, a fifth of their rows spoilt. Four questions:

(a) What is the observation (the best of k) at a fixed ratio? A pool of N samples is trained per ratio and selection
    method; all subsets of size k of the pool give the observation's distribution, exactly. Beside it stands the law of
    Theorem 3.2 with rate and cut fitted to the pool, and whether the pool could have come from it.
(b) Which ratio does a whole study find with each k? Regret: the mean of single models with fresh seeds at the ratio
    that a study observed to be best, less the mean at the best ratio known: of those that studies with the same seed
    measured again the best, trained anew N times. No observation is in it, which would flatter large k. Only studies
    with the same seed are compared: another seed splits off other validation rows, and so selects other rows.
(c) What does it cost? Seconds of training and feedback, as the samples' results have them.
(d) What would racing (`sampling.racing`) have saved and changed? Every sample of the pool is measured at shares of its
    steps too, and races are held among subsets of the pool.

Everything is kept in `--out` and taken up again from there: a second call trains nothing twice. The pool is trained in
this process, or with `--groups` on Ray by as many groups, which leaves (d) out. The studies of (b) run on Ray.
"""

import argparse
import csv
import io
import json
import math
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for tests.toy_study

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch

from duet_ray.config import StudyConfig, fingerprint, load_config
from duet_ray.errors import DuetError, NoValueError, SampleFailed
from duet_ray.records import Direction, Ratio, SampleSpec
from duet_ray.report.palette import ACCENT, BASE, INK, MUTED, domain_look
from duet_ray.report.summary import (
    StudySummary,
    best_trial,
    confirmation_of,
    confirmations,
    running_best,
    searched,
    value_of,
)
from duet_ray.seeds import child_seed
from duet_ray.theory import GoodnessOfFit, SpacingsFit, fit_spacings, goodness_of_fit, minimum_weights

POOL_TRIAL = 3_000_000
"""Trial numbers of the pool's draws: of no study and no confirmation."""
SELECTION_COLOURS = (ACCENT, "#8A8A8A", "#CC79A7", "#E69F00")
RACES = 4000
RESAMPLES = 400
SAY_SECONDS = 10.0


# The pool -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PoolSample:
    """One model, measured on its way and at its end. Losses: lower is better, whatever the feedback."""

    number: int
    losses: tuple[float, ...]
    """After each share of the steps that races compare at, and in the end."""
    steps: tuple[int, ...]
    """Optimizer steps so far, at the same moments."""
    train_seconds: float
    feedback_seconds: float
    """Of the last measurement alone."""


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Independent samples of one ratio under one selection method."""

    ratio: Ratio
    selection: str
    samples: tuple[PoolSample, ...]
    n_failed: int = 0

    @property
    def losses(self) -> np.ndarray:
        """`(n,)` final losses."""
        return np.array([sample.losses[-1] for sample in self.samples])


class PoolTrainer:
    """Trains pools in this process: the same draws, training and feedback as a study's, one base model in memory."""

    def __init__(self, at: Sequence[float], say: Callable[[str], None]) -> None:
        self._at, self._say = at, say
        self._loaded: Any = None

    def measure(self, config: StudyConfig, ratio: Ratio, n: int, place: Path) -> Pool:
        """Train and measure n samples; those that `place` holds already are read.

        Samples are told apart by the draws of trial `POOL_TRIAL`, at which no study trains.
        """
        from duet_ray.execution.worker import load_draws, mixture_of
        from duet_ray.feedback import make_feedback
        from duet_ray.preflight import preflight
        from duet_ray.training import Halt, load_base, make_trainer

        ready = preflight(config)
        config = ready.config
        file = place / f"pool-{fingerprint([pool_settings(config), ratio.counts, list(self._at)])}.jsonl"
        known = {row["number"]: row for row in read_rows(file)}
        if set(range(n)) - known.keys():
            if self._loaded is None:
                model, tokenizer = load_base(config)
                self._loaded = make_trainer(config.training, model, tokenizer), tokenizer
            trainer, tokenizer = self._loaded
            assignment = weighed(config, trainer, self._say)
            draws, feedback = load_draws(assignment, config), make_feedback(config)
        said = -math.inf
        for number in range(n):
            if number in known:
                continue
            if time.monotonic() > said + SAY_SECONDS:
                said = time.monotonic()
                self._say(f"{config.selection.method}, {named(ratio, config)}: sample {number + 1} of {n}")
            spec = SampleSpec(trial=POOL_TRIAL, sample=number, kind="confirm", ratio=ratio)
            mixture = mixture_of(config, spec, draws)
            drawn = zip(ready.domains, mixture.rows, strict=True)
            rows = [row for domain, ids in drawn if len(ids) for row in domain.train.rows(ids.tolist())]
            seeds = {use: child_seed(config.seed, use, POOL_TRIAL, number) for use in ("train", "evaluate")}
            losses, steps, seconds = [], [], []
            try:
                with tempfile.TemporaryDirectory() as scratch:
                    for share in (*self._at, 1.0):
                        halt = Halt(folder=Path(scratch), after=share) if self._at else None
                        started = time.perf_counter()
                        report = trainer.train(rows, seed=seeds["train"], halt=halt)
                        trained = time.perf_counter()
                        value = feedback.measure(trainer.model, tokenizer, seed=seeds["evaluate"]).value
                        losses.append(config.direction.to_loss(value))
                        steps.append(report.n_steps)
                        seconds.append((trained - started, time.perf_counter() - trained))
                sample = PoolSample(
                    number=number,
                    losses=tuple(losses),
                    steps=tuple(steps),
                    train_seconds=sum(s for s, _ in seconds),
                    feedback_seconds=seconds[-1][1],
                )
                known[number] = asdict(sample)
            except (SampleFailed, NoValueError) as error:
                known[number] = {"number": number, "reason": str(error)}
            append_row(file, known[number])
        return pool_of(ratio, config.selection.method, [known[number] for number in range(n)])


def weighed(config: StudyConfig, trainer: Any, say: Callable[[str], None]) -> Any:
    """The study's `Assignment`, every domain having its weights: scored in this process where they are not stored."""
    from duet_ray.execution.trial import scoring_tasks
    from duet_ray.execution.worker import Assignment, Worker
    from duet_ray.preflight import preflight
    from duet_ray.selection import n_shards

    ready = preflight(config)
    assignment = Assignment(
        config=ready.config.model_dump(mode="json"),
        folder=str(ready.config.folder),
        domain_folders=tuple(str(domain.folder) for domain in ready.domains),
        scoring_folders=tuple(str(domain.folder) for domain in ready.scoring_domains),
        weights_folder=str(ready.weights_folder),
        weights_keys=ready.weights_keys,
    )
    if ready.unscored:
        trainer.reset()
        worker = Worker(assignment)
        for index in ready.unscored:
            domain = ready.domains[index]
            say(f"scoring {domain.name}")
            for tasks in scoring_tasks(index, domain.name, n_shards(len(domain.train), config.selection.shard_rows)):
                for task in tasks:
                    worker.do_scoring(task, lambda *_: None)
    return assignment


def pool_on_fleet(config: StudyConfig, path: Path, sets: Sequence[str], ratio: Ratio, n: int) -> Pool:
    """The same on Ray: a study whose bounds leave this ratio alone, with one trial of n samples."""
    from duet_ray.study import Study

    # A name of its own for each ratio and n; what else it depends on is in the settings' fingerprint.
    name = f"pool-{fingerprint([pool_settings(config), ratio.counts, n])}"
    bounds = [[count / ratio.n_rows, count / ratio.n_rows] for count in ratio.counts]
    fixed = [f"domains[{i}].bounds={bound}" for i, bound in enumerate(bounds) if bound[1] > 0]
    fixed += [f"domains[{i}].bounds=[0.0, 1.0e-12]" for i, bound in enumerate(bounds) if bound[1] == 0]
    plan = [f"name={name}", "search.n_start=1", "search.n_trials=0", f"sampling.k={n}", "confirm.finalists=0"]
    summary = Study(load_config(path, [*sets, *fixed, *plan])).run()
    (trial,) = searched(summary)
    rows = [
        {"number": s.spec.sample, "reason": s.reason}
        if s.value is None
        else asdict(
            PoolSample(
                number=s.spec.sample,
                losses=(config.direction.to_loss(s.value),),
                steps=(int(s.train["n_steps"]),),
                train_seconds=s.train_seconds,
                feedback_seconds=s.feedback_seconds,
            )
        )
        for s in trial.samples
    ]
    return pool_of(ratio, config.selection.method, rows)


def pool_of(ratio: Ratio, selection: str, rows: Sequence[dict[str, Any]]) -> Pool:
    good = [row for row in rows if "losses" in row]
    samples = tuple(PoolSample(**{**row, "losses": tuple(row["losses"]), "steps": tuple(row["steps"])}) for row in good)
    return Pool(ratio=ratio, selection=selection, samples=samples, n_failed=len(rows) - len(good))


def pool_settings(config: StudyConfig) -> dict[str, Any]:
    """What a pool's values depend on."""
    data = config.model_dump(mode="json")
    return {
        name: data[name]
        for name in ("seed", "model", "domains", "data", "mixture", "selection", "training", "feedback")
    }


# (a) The observation --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """The law of Theorem 3.2 on one pool."""

    fit: SpacingsFit
    goodness: GoodnessOfFit
    shift: float
    """y*, the estimated best loss of the ratio."""
    shift_error: float


def fitted(pool: Pool, n_bootstrap: int, seed: int) -> Fitted | None:
    """None where the pool's values are all equal, or fewer than two."""
    try:
        fit = fit_spacings([pool.losses.tolist()])
    except DuetError:
        return None
    shift, error = fit.law.shift(pool.losses.tolist())
    goodness = goodness_of_fit([pool.losses.tolist()], fit, n_bootstrap=n_bootstrap, seed=seed)
    return Fitted(fit=fit, goodness=goodness, shift=shift, shift_error=error)


@dataclass(frozen=True, kw_only=True)
class ObservationLaw:
    """The best of k over all subsets of a pool."""

    k: int
    mean: float
    error: float
    """Standard error of `mean`: another pool would give another one."""
    spread: float


def observation_law(losses: np.ndarray, k: int, generator: np.random.Generator) -> ObservationLaw:
    """The smallest of k values: exact over the subsets, its error from resampled pools."""
    weights, ordered = minimum_weights(len(losses), k), np.sort(losses)
    mean = float(weights @ ordered)
    again = np.sort(generator.choice(losses, size=(RESAMPLES, len(losses))), axis=1) @ weights
    spread = math.sqrt(max(0.0, float(weights @ np.square(ordered - mean))))
    return ObservationLaw(k=k, mean=mean, error=float(again.std(ddof=1)), spread=spread)


# (d) Races ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Races:
    """What racing does to trials of k samples, on average over subsets of a pool."""

    k: int
    steps_saved: float
    """Share of the optimizer steps that are not trained."""
    seconds_saved: float
    """Share of the seconds, the comparisons counted as full measurements."""
    best_survived: float
    """Share of the races that the sample with the best final loss won."""
    change: float
    """Mean rise of the observation's loss, >= 0."""
    equal_k: float
    """How many samples run to the end cost as much as the race."""
    equal_change: float
    """Mean rise of the observation's loss if so many are run to the end instead of k, >= 0."""


def race(losses: np.ndarray, keep: float) -> tuple[int, np.ndarray]:
    """Successive halving of one trial, as `sampling.racing` has it.

    Args:
        losses: `(n_moments, k)`, at the comparisons and, last, in the end.
        keep: share that goes on; at least one does.

    Returns:
        The winner, and `(n_moments,)` how many trained up to each moment.
    """
    alive = np.arange(losses.shape[1])
    trained = []
    for compared in losses[:-1]:
        trained.append(len(alive))
        n_kept = max(1, math.ceil(keep * len(alive) - 1e-9))
        alive = alive[np.argsort(compared[alive], kind="stable")[:n_kept]]
    trained.append(len(alive))
    return int(alive[np.argmin(losses[-1][alive])]), np.array(trained)


def races(pool: Pool, k: int, keep: float, generator: np.random.Generator) -> Races:
    """Races among random subsets of a pool."""
    losses = np.array([sample.losses for sample in pool.samples]).T
    steps = np.array(pool.samples[0].steps, dtype=float)
    per_moment = np.diff(steps, prepend=0.0)
    train = float(np.mean([sample.train_seconds for sample in pool.samples]))
    feedback = float(np.mean([sample.feedback_seconds for sample in pool.samples]))
    used, spent, changes, survived = [], [], [], []
    for _ in range(RACES):
        chosen = losses[:, generator.choice(losses.shape[1], size=k, replace=False)]
        winner, trained = race(chosen, keep)
        # A race that is down to one sample compares nothing any more.
        n_measured = sum(n for n in trained[:-1] if n > 1) + trained[-1]
        used.append(trained @ per_moment / (k * steps[-1]))
        spent.append((used[-1] * k * train + n_measured * feedback) / (k * (train + feedback)))
        changes.append(chosen[-1][winner] - chosen[-1].min())
        survived.append(changes[-1] == 0)
    equal_k = max(1.0, k * float(np.mean(spent)))
    return Races(
        k=k,
        steps_saved=1 - float(np.mean(used)),
        seconds_saved=1 - float(np.mean(spent)),
        best_survived=float(np.mean(survived)),
        change=float(np.mean(changes)),
        equal_k=equal_k,
        equal_change=mean_of_best(pool.losses, equal_k) - mean_of_best(pool.losses, k),
    )


def mean_of_best(losses: np.ndarray, k: float) -> float:
    """The mean smallest of k; between whole numbers, of a draw between the two."""
    low = min(int(k), len(losses))
    means = [float(minimum_weights(len(losses), n) @ np.sort(losses)) for n in (low, min(low + 1, len(losses)))]
    return means[0] + (k - low) * (means[1] - means[0]) if k > low else means[0]


def rank_correlations(pool: Pool) -> list[float]:
    """Spearman's, between the losses at each comparison and the final ones."""
    from scipy.stats import spearmanr

    losses = np.array([sample.losses for sample in pool.samples]).T
    return [float(spearmanr(early, losses[-1]).statistic) for early in losses[:-1]]


# (b), (c) Whole studies -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Run:
    """One study."""

    k: int
    seed: int
    summary: StudySummary = field(repr=False)

    @property
    def sign(self) -> Callable[[float], float]:
        return self.summary.direction.to_loss

    def best_losses(self) -> list[float]:
        """The best observation so far, trial by trial; NaN before the first."""
        return [self.sign(value_of(best)) if best else math.nan for _, best in running_best(self.summary)]

    def measured_again(self) -> list[tuple[Ratio, tuple[float, ...]]]:
        """Every ratio that fresh models were trained at: the finalist and the uniform one, with their losses."""
        found = [(t.ratio, [s.value for s in t.samples]) for t in confirmations(self.summary)]
        return [(r, tuple(self.sign(v) for v in values if v is not None)) for r, values in found if r is not None]

    def chosen(self) -> tuple[Ratio, tuple[float, ...]] | None:
        """The ratio that was observed to be best, and the losses of fresh models there."""
        best = best_trial(self.summary)
        again = confirmation_of(self.summary, best.name) if best else None
        if best is None or best.ratio is None or again is None:
            return None
        return best.ratio, tuple(self.sign(value) for value in again.values)

    def sample_seconds(self) -> tuple[float, float]:
        """Mean seconds of training and of feedback, of a sample of the search."""
        samples = [s for t in searched(self.summary) for s in t.samples if s.ok]
        return float(np.mean([s.train_seconds for s in samples])), float(np.mean([s.feedback_seconds for s in samples]))

    def groups(self) -> list[list[float]]:
        """The losses of every trial."""
        return [[self.sign(s.value) for s in t.samples if s.value is not None] for t in searched(self.summary)]


def run_studies(path: Path, sets: Sequence[str], asked: argparse.Namespace, say: Callable[[str], None]) -> list[Run]:
    """One study a k and seed, each found again in its folder if it was run before."""
    from duet_ray.study import Study

    config = load_config(path, sets)
    runs = []
    for seed in range(config.seed, config.seed + asked.seeds):
        for k in asked.k:
            plan = [f"seed={seed}", f"sampling.k={k}", "confirm.finalists=1", f"confirm.repeats={asked.repeats}"]
            plan += ["keep_best=1"]
            if asked.trials is not None:
                plan.append(f"search.n_trials={asked.trials}")
            mark = fingerprint([pool_settings(config), config.model_dump(mode="json")["search"], asked.trials])[:8]
            study = Study(load_config(path, [*sets, *plan, f"name=k{k}-seed{seed}-{mark}"]))
            say(f"study with k = {k}, seed {seed}")
            runs.append(Run(k=k, seed=seed, summary=study.run()))
    return runs


def best_known(runs: Sequence[Run]) -> Ratio | None:
    """The ratio with the best mean over all fresh models that any study trained at it."""
    fresh: dict[Ratio, list[float]] = {}
    for run in runs:
        for ratio, losses in run.measured_again():
            fresh.setdefault(ratio, []).extend(losses)
    fresh = {ratio: losses for ratio, losses in fresh.items() if losses}
    return min(fresh, key=lambda ratio: float(np.mean(fresh[ratio]))) if fresh else None


# Tables ---------------------------------------------------------------------------------------------------------


@dataclass
class Tables:
    """Prints tables as they come, and keeps them as Markdown and CSV."""

    out: Path
    text: str = ""

    def add(self, name: str, title: str, head: Sequence[str], rows: Sequence[Sequence[Any]], note: str = "") -> None:
        lines = [f"### {title}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
        block = "\n".join([*lines, *(["", note] if note else [])]) + "\n\n"
        print(block, flush=True)
        self.text += block
        (self.out / "tables.md").write_text(self.text, encoding="utf-8")
        with (self.out / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([head, *rows])


def named(ratio: Ratio, config: StudyConfig) -> str:
    even = max(ratio.counts) - min(ratio.counts) <= 1
    return "uniform ratio" if even else ratio.describe(config.domain_names)


def number(value: float, digits: int = 3) -> str:
    """So many significant digits, without an exponent where that is short."""
    return "∞" if math.isinf(value) else f"{value:.{digits}g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.1e}"


def law_tables(
    tables: Tables, pools: Sequence[Pool], laws: Sequence[Fitted | None], asked: argparse.Namespace, config: StudyConfig
) -> None:
    back = config.direction.to_value
    rows = []
    for pool, law in zip(pools, laws, strict=True):
        losses = pool.losses
        row = [named(pool.ratio, config), pool.selection, len(losses), number(back(float(losses.mean())), 5)]
        row += [number(float(losses.std(ddof=1))), number(back(float(losses.min())), 5)]
        if law is None:
            rows.append([*row, "", "", "", ""])
            continue
        rate, cut = law.fit.rate_interval, law.fit.cut_interval
        row += [f"{number(law.fit.law.rate)} ({number(rate[0])} to {number(rate[1])})"]
        row += [f"{number(law.fit.law.cut)} ({number(cut[0])} to {number(cut[1])})"]
        row += [f"{number(back(law.shift), 5)} ± {number(law.shift_error, 2)}"]
        rows.append([*row, f"{law.goodness.p_value:.3f}{'' if law.goodness.tenable else ', refused'}"])
    head = ["ratio", "selection", "N", "mean", "sd", "best", "rate λ (95 %)", "cut c (95 %)", "y* by the law", "p"]
    note = (
        "λ, c and y* are of the law of Theorem 3.2, fitted to each pool. p: could the pool come from it (parametric "
        f"bootstrap, {asked.bootstrap} pools)? Up to 0.05 the law is refused, and what it says of this pool is not "
        "to be relied on; above, it may still be wrong. A cut up to ∞: the values do not show one."
    )
    if any(pool.n_failed for pool in pools):
        note += f" {sum(pool.n_failed for pool in pools)} samples failed and are left out."
    tables.add("pools", "Single samples", head, rows, note)
    generator = np.random.default_rng(asked.random_seed)
    rows = []
    for pool, law in zip(pools, laws, strict=True):
        for k in sizes_of(pool, asked.k):
            seen = observation_law(pool.losses, k, generator)
            row = [named(pool.ratio, config), pool.selection, k]
            row += [f"{number(back(seen.mean), 5)} ± {number(seen.error, 2)}"]
            if law is None:
                rows.append([*row, "", "", number(seen.spread), ""])
                continue
            row += [number(seen.mean - law.shift), number(law.fit.law.mean(k))]
            rows.append([*row, number(seen.spread), number(law.fit.law.std(k))])
    head = ["ratio", "selection", "k", "observation", "above y*", "law: above y*", "sd", "law: sd"]
    note = (
        "The best of k over all subsets of the pool, ± the error that comes of the pool's size. Subsets of a pool "
        "overlap: where k is not small beside N, their sd is too small."
    )
    tables.add("observations", "The observation (best of k)", head, rows, note)


def racing_table(tables: Tables, pools: Sequence[Pool], asked: argparse.Namespace, config: StudyConfig) -> None:
    generator = np.random.default_rng(asked.random_seed + 1)
    rows = []
    for pool in pools:
        spread = float(pool.losses.std(ddof=1)) or 1.0
        correlations = ", ".join(f"{r:.2f}" for r in rank_correlations(pool))
        for k in (k for k in sizes_of(pool, asked.k) if k > 1):
            raced = races(pool, k, asked.keep, generator)
            row = [named(pool.ratio, config), pool.selection, correlations, k]
            row += [f"{raced.steps_saved:.0%}", f"{raced.seconds_saved:.0%}", f"{raced.best_survived:.2f}"]
            row += [f"{number(raced.change, 2)} ({raced.change / spread:.2f} sd)", f"{raced.equal_k:.1f}"]
            rows.append([*row, f"{number(raced.equal_change, 2)} ({raced.equal_change / spread:.2f} sd)"])
    steps = ", ".join(f"{s}" for s in pools[0].samples[0].steps[:-1])
    head = ["ratio", "selection", "rank correlation with the end", "k", "steps saved", "seconds saved"]
    head += ["best one survived", "observation worse by", "same seconds without: k", "then worse by"]
    note = (
        f"Races compare after {steps} of {pools[0].samples[0].steps[-1]} steps and keep {asked.keep:.0%}. Seconds "
        "count each comparison as a whole measurement (`sampling.racing.limit` makes them cheaper). 'Worse' is against "
        "all k run to the end. The last two columns are the alternative: as many samples to the end as cost the same, "
        "and how much worse their best is. Racing pays where it loses less than that."
    )
    tables.add("racing", "Racing", head, rows, note)


def study_tables(tables: Tables, runs: Sequence[Run], references: Mapping[int, Pool], config: StudyConfig) -> None:
    back = config.direction.to_value
    rows, by_k = [], []
    for run in sorted(runs, key=lambda r: (r.k, r.seed)):
        found, losses = run.chosen(), run.best_losses()
        n_samples = sum(len(t.samples) for t in searched(run.summary))
        row = [run.k, run.seed, len(losses), n_samples, number(back(losses[-1]), 5)]
        if found is None:
            rows.append([*row, "", "", ""])
            continue
        regret, text = regret_of(found[1], references.get(run.seed))
        by_k.append((run.k, regret))
        mean = f"{number(back(float(np.mean(found[1]))), 5)} (n = {len(found[1])})"
        rows.append([*row, named(found[0], config), mean, text])
    head = ["k", "seed", "trials", "samples", "best observation", "its ratio", "fresh models there", "regret"]
    note = (
        "Regret: mean of fresh models at the ratio less that at the best ratio known, ± standard error; > 0 is worse."
    )
    if references:
        known = [
            f"seed {seed}: {named(pool.ratio, config)}, {number(back(float(pool.losses.mean())), 5)}"
            for seed, pool in references.items()
        ]
        note += f" Best known, the mean of {len(next(iter(references.values())).losses)} models: {'; '.join(known)}."
    tables.add("studies", "Whole studies", head, rows, note)
    rows = []
    for k in sorted({run.k for run in runs}):
        mine = [run for run in runs if run.k == k]
        train, feedback = (float(np.mean(s)) for s in zip(*(run.sample_seconds() for run in mine), strict=True))
        regrets = [regret for size, regret in by_k if size == k]
        error = f" ± {number(float(np.std(regrets, ddof=1)) / len(regrets) ** 0.5, 2)}" if len(regrets) > 1 else ""
        mean = f"{number(float(np.mean(regrets)))}{error}" if regrets and references else ""
        n_trials = float(np.mean([len(searched(run.summary)) for run in mine]))
        wall = float(np.mean([run.summary.seconds or math.nan for run in mine]))
        row = [k, len(mine), mean, f"{train:.2f}", f"{feedback:.2f}", f"{k * (train + feedback):.1f}"]
        rows.append([*row, f"{n_trials * k * (train + feedback):.0f}", f"{wall:.0f}"])
    head = ["k", "studies", "regret", "s to train", "s of feedback", "s a trial", "s of a search", "wall s of a study"]
    note = (
        "Seconds of one worker, means over samples: multiply by its CPUs or GPUs. A search is the start design and all "
        "trials; wall time has Ray's start, scoring, confirmations and the other load of the machine in it."
    )
    tables.add("costs", "Regret and cost", head, rows, note)


def own_values_table(tables: Tables, runs: Sequence[Run], asked: argparse.Namespace) -> None:
    """The law as a study can know it: from the k values of its own trials."""
    rows = []
    for k in sorted({run.k for run in runs if run.k > 1}):
        groups = [group for run in runs if run.k == k for group in run.groups()]
        try:
            fit = fit_spacings(groups)
        except DuetError:
            continue
        goodness = goodness_of_fit(groups, fit, n_bootstrap=asked.bootstrap, seed=asked.random_seed)
        rate, cut = fit.rate_interval, fit.cut_interval
        row = [k, len(fit.group_sizes), f"{number(fit.law.rate)} ({number(rate[0])} to {number(rate[1])})"]
        row += [f"{number(fit.law.cut)} ({number(cut[0])} to {number(cut[1])})", number(fit.law.std(k))]
        rows.append([*row, f"{goodness.p_value:.3f}{'' if goodness.tenable else ', refused'}"])
    if rows:
        head = ["k", "trials", "rate λ (95 %)", "cut c (95 %)", "law: sd of the observation", "p"]
        note = "All trials of the studies with this k together; the law is assumed to be the same at every ratio."
        tables.add("own_values", "The law from the studies' own k values", head, rows, note)


def regret_of(fresh: Sequence[float], reference: Pool | None) -> tuple[float, str]:
    if reference is None:
        return math.nan, ""
    regret = float(np.mean(fresh) - reference.losses.mean())
    error = reference.losses.var(ddof=1) / len(reference.losses)
    if len(fresh) < 2:
        return regret, number(regret)
    return regret, f"{number(regret)} ± {number(math.sqrt(error + np.var(fresh, ddof=1) / len(fresh)), 2)}"


def sizes_of(pool: Pool, sizes: Sequence[int]) -> list[int]:
    """The k of which the pool has at least two subsets."""
    return [k for k in sizes if k < len(pool.samples)]


# Figures --------------------------------------------------------------------------------------------------------


def canvas(n_columns: int, height: float = 3.9, width: float = 9.0) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(1, n_columns, squeeze=False).ravel())
    for axes in panels:
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_color(MUTED)
        axes.tick_params(colors=INK, labelsize=9)
        axes.grid(axis="y", color="#d0d7de", lw=0.7)
        axes.set_axisbelow(True)
    return figure, panels


def keep_figure(figure: Figure, file: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    file.write_bytes(buffer.getvalue())
    print(f"figure: {file}", flush=True)


def distributions_figure(pools: Sequence[Pool], laws: Sequence[Fitted | None], k: int, config: StudyConfig) -> Figure:
    """As the paper's Figures 3 and 8: single samples, and the best of k, with the fitted law as a line."""
    figure, (left, right) = canvas(2)
    direction, sign = config.direction, config.direction.to_value
    everything = np.concatenate([pool.losses for pool in pools])
    low, high = float(everything.min()), float(everything.max())
    low = min([low, *(law.shift for law in laws if law is not None and law.shift > low - (high - low))])
    edges = np.linspace(low, high + 1e-9 * max(1.0, abs(high)), 19)
    line = np.linspace(low, high, 300)
    for index, (pool, law) in enumerate(zip(pools, laws, strict=True)):
        colour = SELECTION_COLOURS[index % len(SELECTION_COLOURS)]
        ordered = np.sort(pool.losses)
        for axes, size in ((left, 1), (right, k)):
            weights = minimum_weights(len(ordered), size)
            heights, _ = np.histogram(ordered, bins=edges, weights=weights)
            heights = heights / np.diff(edges)
            axes.stairs(heights, sign_all(edges, sign), fill=True, color=colour, alpha=0.28)
            axes.stairs(heights, sign_all(edges, sign), color=colour, lw=1.3, label=pool.selection)
            mean = float(weights @ ordered)
            axes.axvline(sign(mean), color=colour, lw=1.4, linestyle=(0, (4, 3)), zorder=4)
            if law is not None and law.goodness.tenable:
                density = law.fit.law.pdf(line - law.shift, size)
                there = density > 0
                axes.plot(sign_all(line[there], sign), density[there], color=colour, lw=2.0, zorder=3)
    refused = [p.selection for p, law in zip(pools, laws, strict=True) if law is not None and not law.goodness.tenable]
    own = laws[0]
    if own is not None and own.goodness.tenable:
        for axes in (left, right):
            axes.axvline(sign(own.shift), color=BASE, lw=2.0, zorder=5, label=f"y* by the law ({pools[0].selection})")
    better = "lower" if direction is Direction.MINIMIZE else "higher"
    left.set_title("single samples", fontsize=11, color=INK)
    right.set_title(f"the observation: best of {k}", fontsize=11, color=INK)
    for axes in (left, right):
        axes.set_xlabel(f"{config.feedback.shown_name} ({better} is better)", color=INK, fontsize=9.5)
        # The law's density at its edge can be far above any histogram: the bars keep the scale.
        axes.set_ylim(0, 1.25 * max(float(patch.get_data()[0].max()) for patch in axes.findobj(StepPatch)))
    left.set_ylabel("density", color=INK)
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    note = "dashed: mean; curve: fitted law" + (f" (refused for {', '.join(refused)})" if refused else "")
    figure.suptitle(f"{named(pools[0].ratio, config)}     {note}", fontsize=9.5, color=MUTED)
    return figure


def sign_all(values: np.ndarray, sign: Callable[[float], float]) -> np.ndarray:
    return np.array([sign(float(value)) for value in values])


def observation_figure(
    groups: Sequence[tuple[list[Pool], list[Fitted | None]]], sizes: Sequence[int], config: StudyConfig
) -> Figure:
    """The observation and its spread against k, a panel a ratio: measured, and by the law."""
    figure, panels = canvas(len(groups))
    generator, sign = np.random.default_rng(0), config.direction.to_value
    for axes, (pools, laws) in zip(panels, groups, strict=True):
        for index, (pool, law) in enumerate(zip(pools, laws, strict=True)):
            colour, shift = SELECTION_COLOURS[index % len(SELECTION_COLOURS)], 1 + 0.04 * (index - 1)
            usable = sizes_of(pool, sizes)
            seen = [observation_law(pool.losses, k, generator) for k in usable]
            x = [k * shift for k in usable]
            axes.errorbar(
                x, [sign(s.mean) for s in seen], yerr=[s.spread for s in seen], color=colour, marker="o", ms=5,
                lw=0, elinewidth=1.4, capsize=4, label=pool.selection,
            )  # fmt: skip
            if law is not None and law.goodness.tenable:
                smooth = np.arange(1, max(usable) + 1)
                values = [sign(law.shift + law.fit.law.mean(int(k))) for k in smooth]
                axes.plot(smooth * shift, values, color=colour, lw=1.6, linestyle=(0, (2, 1.5)))
                axes.axhline(sign(law.shift), color=colour, lw=0.8)
        ticks = sizes_of(pools[0], sizes)
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(k) for k in ticks])
        axes.minorticks_off()
        axes.set_xlabel("k", color=INK)
        axes.set_title(named(pools[0].ratio, config), fontsize=10, color=INK)
    panels[0].set_ylabel(config.feedback.shown_name, color=INK)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle("dots: mean ± sd of the best of k; dashes: the fitted law; line: its y*", fontsize=9.5, color=MUTED)
    return figure


def studies_figure(runs: Sequence[Run], references: Mapping[int, Pool], config: StudyConfig) -> Figure:
    """As the paper's Figure 7, by trials and by what they cost, and the regret of what was found."""
    figure, (by_trial, by_cost, regrets) = canvas(3, width=11.0)
    sign = config.direction.to_value
    sizes = sorted({run.k for run in runs})
    for index, k in enumerate(sizes):
        colour = domain_look(index).colour
        mine = [run for run in runs if run.k == k]
        curves = np.array([run.best_losses() for run in mine])
        trials = np.arange(1, curves.shape[1] + 1)
        values = np.vectorize(sign)(curves)
        for axes, x in ((by_trial, trials), (by_cost, trials * k)):
            for curve in values:
                axes.step(x, curve, where="post", color=colour, lw=0.7, alpha=0.45)
            axes.step(x, values.mean(axis=0), where="post", color=colour, lw=2.2, label=f"k = {k}")
        found = [(run.chosen(), references.get(run.seed)) for run in mine]
        points = [regret_of(f[1], reference)[0] for f, reference in found if f is not None and reference is not None]
        if points:
            regrets.scatter([index] * len(points), points, s=34, facecolors="white", edgecolors=colour, linewidths=1.5)
            regrets.scatter([index], [float(np.mean(points))], marker="D", s=52, color=colour, zorder=4)
    by_trial.set_xlabel("trials", color=INK)
    by_cost.set_xlabel("samples trained", color=INK)
    by_trial.set_ylabel(f"best observation so far\n({config.feedback.shown_name})", color=INK)
    regrets.set_xticks(range(len(sizes)), [str(k) for k in sizes])
    regrets.set_xlabel("k", color=INK)
    regrets.set_ylabel("regret of the ratio found, fresh models", color=INK)
    regrets.axhline(0, color=INK, lw=1.0)
    regrets.set_xlim(-0.6, len(sizes) - 0.4)
    handles, labels = by_trial.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(sizes), frameon=False, fontsize=9.5)
    figure.suptitle("thin: one study; thick and diamonds: mean over seeds", fontsize=9.5, color=MUTED)
    return figure


# The toy, files, the way through --------------------------------------------------------------------------------


def write_toy(folder: Path) -> Path:
    """The toy study of the tests, larger, with a fifth of every domain's rows spoilt, so that selection has a task."""
    from tests.toy_study import WORDS, write_toy_study

    path = write_toy_study(
        folder,
        n_rows=120,
        mixture__n_rows=48,
        training__batch_size=4,
        training__learning_rate=1e-2,
        search__n_start=4,
        search__n_trials=4,
        selection={"method": "influence", "n_fit_rows": 64, "n_hessian_rows": 32},
    )
    draws = random.Random(0)
    for name in WORDS:
        file = folder / "data" / f"{name}.jsonl"
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        for row in draws.sample(rows, len(rows) // 5):
            row["completion"] = "".join(draws.choice("cdefghijklm") for _ in range(6))
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Rows of a jsonl file; a torn last line is left out."""
    if not file.is_file():
        return
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


def append_row(file: Path, row: dict[str, Any]) -> None:
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(row) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, help="a study file; default: a toy that is made")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="as in `duet run`")
    parser.add_argument(
        "--out", type=Path, default=Path("studies/sampling_size"), help="folder of everything that is kept"
    )
    parser.add_argument("--k", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--parts", nargs="+", choices=("studies", "pool"), default=["studies", "pool"])
    parser.add_argument("--samples", type=int, default=32, help="N, of every pool")
    parser.add_argument("--selections", nargs="+", help="default: the study's own, uniform, remove_harmful")
    parser.add_argument("--ratio", type=float, nargs="+", help="shares of a ratio for the pool, beside the uniform one")
    parser.add_argument("--seeds", type=int, default=2, help="studies a k")
    parser.add_argument("--trials", type=int, help="search.n_trials of the studies")
    parser.add_argument("--repeats", type=int, default=6, help="fresh models at the ratio that a study found")
    parser.add_argument("--at", type=float, nargs="*", default=[0.25, 0.5], help="shares of the steps races compare at")
    parser.add_argument("--keep", type=float, default=0.5, help="share of a race that goes on")
    parser.add_argument("--groups", type=int, help="train the pool on Ray too, with so many groups")
    parser.add_argument("--bootstrap", type=int, default=199)
    parser.add_argument("--random-seed", type=int, default=0, help="of subsets and bootstraps, not of trainings")
    return parser.parse_args()


def main() -> None:
    from small_domain import machine

    asked = arguments()
    out: Path = asked.out.resolve()
    figures = out / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    path = asked.study or (out / "toy" / "study.yaml")
    if asked.study is None and not path.is_file():
        write_toy(path.parent)
    sets = [*asked.set, f"storage={out / 'studies'}"]
    if asked.groups:
        sets.append(f"fleet.groups={asked.groups}")
    config = load_config(path, sets)
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:6.0f} s] {text}", file=sys.stderr, flush=True)

    tables = Tables(out=out)
    tables.text = f"`{' '.join(['python', *sys.argv])}`, {machine('torch', 'ray', 'transformers', 'peft', 'scipy')}, "
    tables.text += (
        f"{os.environ.get('OMP_NUM_THREADS', 'default')} thread(s). {config.mixture.n_rows} rows a mixture.\n\n"
    )
    print(tables.text)
    runs = run_studies(Path(path), sets, asked, say) if "studies" in asked.parts else []
    if "pool" not in asked.parts:
        if runs:
            study_tables(tables, runs, {}, config)
            own_values_table(tables, runs, asked)
        return
    selections = asked.selections or list(dict.fromkeys([config.selection.method, "uniform", "remove_harmful"]))
    trainer = PoolTrainer(() if asked.groups else tuple(asked.at), say)

    def measured(own: Sequence[str], ratio: Ratio) -> Pool:
        here = load_config(path, own)
        if not asked.groups:
            return trainer.measure(here, ratio, asked.samples, out)
        say(f"{here.selection.method}, {named(ratio, config)}: {asked.samples} samples on Ray")
        return pool_on_fleet(here, Path(path), own, ratio, asked.samples)

    groups: list[tuple[list[Pool], list[Fitted | None]]] = []
    for ratio in ratios_of(config, asked, best_known([run for run in runs if run.seed == config.seed])):
        methods = [[] if name == config.selection.method else [f"selection.method={name}"] for name in selections]
        pools = [pool for method in methods if len((pool := measured([*sets, *method], ratio)).samples) > 1]
        groups.append((pools, [fitted(pool, asked.bootstrap, asked.random_seed) for pool in pools]))
    flat = [pool for pools, _ in groups for pool in pools]
    law_tables(tables, flat, [law for _, laws in groups for law in laws], asked, config)
    for index, (pools, laws) in enumerate(groups):
        k = max(sizes_of(pools[0], asked.k))
        keep_figure(distributions_figure(pools, laws, k, config), figures / f"distributions_{index}.png")
    keep_figure(observation_figure(groups, asked.k, config), figures / "observation.png")
    if len(flat[0].samples[0].losses) > 1:
        racing_table(tables, [pools[0] for pools, _ in groups], asked, config)
    if runs:
        bests = {seed: best_known([run for run in runs if run.seed == seed]) for seed in sorted({r.seed for r in runs})}
        references = {s: measured([*sets, f"seed={s}"], ratio) for s, ratio in bests.items() if ratio is not None}
        study_tables(tables, runs, references, config)
        own_values_table(tables, runs, asked)
        keep_figure(studies_figure(runs, references, config), figures / "studies.png")
    say("done")


def ratios_of(config: StudyConfig, asked: argparse.Namespace, best: Ratio | None) -> list[Ratio]:
    """The uniform ratio, and one other: as asked for, else the best that the studies found, else a random one."""
    from duet_ray.preflight import preflight
    from duet_ray.search import start_design

    space = preflight(config).space
    if asked.ratio is not None:
        other = space.project(np.array(asked.ratio) / sum(asked.ratio))
    else:
        other = best or start_design(space, 2, config.seed, vertices=False)[-1]
    return list(dict.fromkeys([space.uniform(), other]))


if __name__ == "__main__":
    main()
