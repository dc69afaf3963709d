"""A pool: many independent samples of one ratio, so that the best of k of them can be studied without new training.

Every sample is drawn, trained and measured as a study's would be, in this process (`PoolTrainer`) or on Ray
(`pool_on_fleet`). Only in this process is it also measured on its way, which races need. What was trained in this
process is kept as a row of a jsonl file, whose name has the settings that the values depend on in it.
"""

import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from duet_ray.config import StudyConfig, fingerprint, load_config
from duet_ray.errors import NoValueError, SampleFailed
from duet_ray.records import Ratio, SampleSpec
from duet_ray.report.summary import searched
from duet_ray.seeds import child_seed

POOL_TRIAL = 3_000_000
"""Trial numbers of the pool's draws: of no study and no confirmation."""
SAY_SECONDS = 10.0


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


def named(ratio: Ratio, config: StudyConfig) -> str:
    even = max(ratio.counts) - min(ratio.counts) <= 1
    return "uniform ratio" if even else ratio.describe(config.domain_names)


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
