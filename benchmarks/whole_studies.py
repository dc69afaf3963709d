"""Whole studies, one a k and seed: run or taken up again, and what they found held against fresh models."""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pools import Pool, pool_settings

from duet_ray.config import fingerprint, load_config
from duet_ray.records import Ratio
from duet_ray.report.summary import (
    StudySummary,
    best_trial,
    confirmation_of,
    confirmations,
    running_best,
    searched,
    value_of,
)


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


def regret_of(fresh: Sequence[float], reference: Pool | None) -> tuple[float, float | None]:
    """How much worse fresh models are than those of the best ratio known; and its error, None of fewer than two."""
    if reference is None:
        return math.nan, None
    regret = float(np.mean(fresh) - reference.losses.mean())
    if len(fresh) < 2:
        return regret, None
    return regret, math.sqrt(reference.losses.var(ddof=1) / len(reference.losses) + np.var(fresh, ddof=1) / len(fresh))
