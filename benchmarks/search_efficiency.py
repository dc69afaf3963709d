"""How many trials does a search need to find a good ratio, against every peer, with noisy feedback?

    OMP_NUM_THREADS=1 python benchmarks/search_efficiency.py --table FOLDER --out results
    OMP_NUM_THREADS=1 python benchmarks/search_efficiency.py --table FOLDER --objectives "table:*" "closed:face:9:*" \\
        --methods ours random tpe public --ours "noisy:acquisition=qlognei" --seeds 0-19 --jobs 2 --out results
    OMP_NUM_THREADS=1 python benchmarks/search_efficiency.py --quick --out results

Every method searches the same objectives (`search_objectives.py`, and from tables of runs `search_surrogates.py`) with
the same seeds and budget, on the lattice of 10,000 rows. Methods, and what they recommend by, stand in
`search_methods.py`, tables and figures in `search_tables.py`.

**The rules, fixed before the first run**

- A run is one method on one objective with one seed. Its first trial is the uniform ratio, whoever searches; trial t of
  a seed has the same noise for every method, and the domains are in an order of the seed's own, the same for all.
- A gain is the noiseless improvement over the uniform ratio as a share of the best possible: 0 is uniform, 1 the best.
  Three are kept after each trial: `trained`, the best of all ratios trained so far, which nobody with noisy feedback
  can point out; `observed`, of the ratio with the lowest observation; and every 5 trials and at the end `recommended`,
  of the ratio that the method would hand over.
- Trials to 50, 90 and 95 % of the gain: the first of those checks at which the recommended ratio has that gain. A run
  that never has it counts as the budget + 1, and a median there is shown as "> budget".
- Where several methods are compared by a ratio of such medians, a peer's censored median is taken as budget + 1, which
  favours the peer.
- Intervals are 95 % percentile bootstraps over seeds; differences to random search are paired by seed.
- A slow peer gets the first `--slow-seeds` seeds only, and up to `--slow-domains` domains; tables say how many.
- Seconds are CPU seconds of this process, of a proposal alone.

Results are kept in `--out/runs.csv` as runs end, and a run found there is not repeated; `--again METHOD` forgets what a
method did (after a change of its code). Objectives whose numbers changed count as new.
"""

import argparse
import csv
import fnmatch
import importlib.metadata
import logging
import multiprocessing
import os
import platform
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from search_methods import Method, MethodError, MethodSpec, best_observed, missing_packages, specs
from search_objectives import FORMS, Objective, ObjectiveError, closed_form
from search_surrogates import Table, table_objectives

from duet_ray.errors import DuetError
from duet_ray.search import SimplexSpace, Told

N_ROWS = 10_000
SLOW = ("ax", "public")
"""40 trials with 17 domains take a CPU minute or two, against 6 s of `optuna-gp` and less of the other peers."""
METHODS = ("ours", "random", "sobol", "tpe", "optuna-gp", "cmaes", "ax", "public", "regmix")
CLOSED = tuple(f"closed:{form}:{n}:{noise:g}" for form in FORMS for n in (3, 9, 30) for noise in (0.1, 0.3))


@dataclass(frozen=True, kw_only=True)
class Step:
    """One trial of one run: a line of the CSV."""

    objective: str
    check: str
    """`Objective.check`."""
    n_domains: int
    noise: float
    """Standard deviation of an observation, in shares of the achievable gain."""
    method: str
    settings: str
    seed: int
    budget: int
    trial: int
    """1 … budget."""
    trained: float
    observed: float
    recommended: float | None
    seconds: float
    """CPU seconds of the proposal."""

    @property
    def run(self) -> tuple[str, str, str, str, int, int]:
        return self.objective, self.check, self.method, self.settings, self.seed, self.budget


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is to be run."""

    objective: Objective
    method: MethodSpec
    seed: int
    budget: int
    every: int

    @property
    def key(self) -> tuple[str, str, str, str, int, int]:
        return (
            self.objective.name, self.objective.check, self.method.name, self.method.settings, self.seed, self.budget,
        )  # fmt: skip


def search(run: Run) -> list[Step]:
    """One run, from the uniform ratio to the last trial."""
    objective, n = run.objective, run.objective.n_domains
    space = SimplexSpace(names=tuple(f"d{d}" for d in range(n)), n_rows=N_ROWS, lower=(0,) * n, upper=(N_ROWS,) * n)
    order = np.random.default_rng([4, run.seed]).permutation(n)
    told: list[Told] = []
    steps: list[Step] = []
    method: Method | None = None
    trained = -np.inf
    with _settled():
        for trial in range(run.budget):
            started = time.process_time()
            if method is None:
                method, ratio = run.method.make(space, run.seed, run.budget), space.uniform()
            else:
                ratio = method.ask(told)
            seconds = time.process_time() - started
            loss = objective.true(ratio.values[order])
            noise = objective.draw_noise(np.random.default_rng([5, run.seed, trial]))
            told.append(Told(ratio=ratio, loss=loss + noise))
            trained = max(trained, objective.gain(loss))
            checked = (trial + 1) % run.every == 0 or trial + 1 == run.budget
            recommended = method.recommend(told).values[order] if checked else None
            steps.append(
                Step(
                    objective=objective.name,
                    check=objective.check,
                    n_domains=n,
                    noise=objective.noise / (objective.uniform - objective.best),
                    method=run.method.name,
                    settings=run.method.settings,
                    seed=run.seed,
                    budget=run.budget,
                    trial=trial + 1,
                    trained=trained,
                    observed=objective.gain(objective.true(best_observed(told).values[order])),
                    recommended=None if recommended is None else objective.gain(objective.true(recommended)),
                    seconds=seconds,
                )
            )
    return steps


class _settled:
    """One thread, and no advice from the libraries of the peers."""

    def __enter__(self) -> None:
        import torch

        torch.set_num_threads(1)
        self.caught = warnings.catch_warnings()
        self.caught.__enter__()
        warnings.simplefilter("ignore")
        logging.getLogger("ax").setLevel(logging.ERROR)

    def __exit__(self, *error: object) -> None:
        self.caught.__exit__(None, None, None)


class Kept:
    """The CSV of every run: only whole runs are written."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.steps: list[Step] = []
        if file.is_file():
            with file.open(encoding="utf-8", newline="") as lines:
                self.steps = [_step(row) for row in csv.DictReader(lines)]

    def forget(self, methods: Sequence[str]) -> None:
        if any(step.method in methods for step in self.steps):
            kept = [step for step in self.steps if step.method not in methods]
            self.steps = []
            self.file.unlink()
            self.add(kept)

    def has(self, run: Run) -> bool:
        return any(step.run == run.key for step in self.steps)

    def add(self, steps: Sequence[Step]) -> None:
        new = not self.file.is_file()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Step)])
            if new:
                writer.writeheader()
            for step in steps:
                row = asdict(step)
                writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
        self.steps += steps


def _step(row: dict[str, str]) -> Step:
    return Step(
        objective=row["objective"],
        check=row["check"],
        n_domains=int(row["n_domains"]),
        noise=float(row["noise"]),
        method=row["method"],
        settings=row["settings"],
        seed=int(row["seed"]),
        budget=int(row["budget"]),
        trial=int(row["trial"]),
        trained=float(row["trained"]),
        observed=float(row["observed"]),
        recommended=float(row["recommended"]) if row["recommended"] else None,
        seconds=float(row["seconds"]),
    )


def planned(
    objectives: Sequence[Objective],
    methods: Sequence[MethodSpec],
    seeds: Sequence[int],
    asked: argparse.Namespace,
) -> list[Run]:
    """Seed by seed, so that what is there after half of the time is a whole table with half of the seeds."""
    runs = []
    for index, seed in enumerate(seeds):
        for objective in objectives:
            for method in methods:
                slow = method.kind in SLOW
                if slow and (index >= asked.slow_seeds or objective.n_domains > asked.slow_domains):
                    continue
                runs.append(Run(objective=objective, method=method, seed=seed, budget=asked.trials, every=asked.every))
    return runs


def carried_out(runs: Sequence[Run], jobs: int) -> Iterator[tuple[Run, list[Step]]]:
    """The runs' steps, as they end."""
    if jobs == 1:
        for run in runs:
            yield run, search(run)
        return
    os.environ["OMP_NUM_THREADS"] = "1"  # what is spawned from here on reads it when NumPy is imported
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(search, run): run for run in runs}
        for done in as_completed(waiting):
            yield waiting[done], done.result()


def chosen_objectives(asked: argparse.Namespace) -> list[Objective]:
    """The objectives that any of the patterns names.

    Raises:
        ObjectiveError: a pattern names none, or a table is needed and not given.
    """
    patterns = asked.objectives
    names = list(CLOSED)
    if asked.table is not None:
        names = [f"table:{metric}:{kind}" for metric in asked.metrics for kind in ("gp", "trees")] + names
    names += [p for p in patterns if p.startswith("closed:") and not any(c in p for c in "*?[") and p not in names]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            missing = "; tables of runs are given with --table" if pattern.startswith("table:") else ""
            raise ObjectiveError(f"no objective is called {pattern!r}{missing}; there are: {', '.join(names)}")
    wanted = [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    found: list[Objective] = []
    table = Table.read(asked.table, ratio_prefix=asked.ratio_prefix) if asked.table is not None else None
    for metric in asked.metrics:
        classes = [name.rpartition(":")[2] for name in wanted if name.startswith(f"table:{metric}:")]
        if classes and table is not None:
            found += table_objectives(
                table,
                metric,
                noise_fraction=asked.noise_fraction,
                allow_poor=asked.allow_poor,
                cache=asked.out,
                classes=classes,
            )
    for name in wanted:
        if name.startswith("closed:"):
            _, form, n, share = name.split(":")
            if form not in FORMS or not n.isdigit() or int(n) < 2:
                raise ObjectiveError(f"{name}: must be closed:FORM:DOMAINS:NOISE, with FORM of {', '.join(FORMS)}")
            found.append(closed_form(form, int(n), float(share)))  # type: ignore[arg-type]
    return found


def chosen_methods(asked: argparse.Namespace) -> list[MethodSpec]:
    """The methods asked for whose packages are there; the others are named."""
    found = []
    for spec in specs(asked.methods, asked.ours):
        if missing := missing_packages(spec.kind):
            print(f"{spec.name} is left out: pip install {' '.join(missing)}", flush=True)
        else:
            found.append(spec)
    if not found:
        raise MethodError("no method is left; --methods and --ours name them")
    return found


def seed_range(text: str) -> list[int]:
    """`"0-4"` or `"0,3,7"`."""
    first, dash, last = text.partition("-")
    return list(range(int(first), int(last) + 1)) if dash else [int(part) for part in text.split(",")]


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("studies/search_efficiency"), help="folder of all that is kept"
    )
    parser.add_argument("--table", type=Path, help="a CSV of runs, or a folder in RegMix's layout")
    parser.add_argument("--ratio-prefix", default="train_", help="how the table's ratio columns begin")
    parser.add_argument("--metrics", nargs="+", default=["pile_cc", "mean"], help="parts of column names; mean: of all")
    parser.add_argument("--noise-fraction", type=float, default=1.0, help="of the surrogate's out-of-fold residuals")
    parser.add_argument("--allow-poor", action="store_true", help="take surrogates with R² below 0.5")
    parser.add_argument("--objectives", nargs="+", metavar="PATTERN", help="such as table:* or closed:face:9:0.1")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), help=f"of {', '.join(METHODS)}; tpe@sticks …")
    parser.add_argument("--ours", action="append", default=[], metavar="NAME:KEY=VALUE,…", help="a variant of ours")
    parser.add_argument("--seeds", type=seed_range, default=seed_range("0-19"), help="0-19 or 0,3,7")
    parser.add_argument("--slow-seeds", type=int, default=5, help=f"of {', '.join(SLOW)}")
    parser.add_argument("--slow-domains", type=int, default=17, help=f"of {', '.join(SLOW)}, at most")
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--every", type=int, default=5, help="trials between recommendations")
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--again", nargs="+", default=[], metavar="METHOD", help="forget the runs of these methods")
    parser.add_argument("--tables-only", action="store_true", help="no runs: tables and figures of what is kept")
    parser.add_argument("--quick", action="store_true", help="a minute: 2 seeds, 12 trials, small closed forms")
    asked = parser.parse_args(argv)
    if asked.quick:
        asked.seeds, asked.trials, asked.slow_seeds = asked.seeds[:2], 12, 1
        asked.objectives = asked.objectives or ["closed:vertex:3:0.1", "closed:several:3:0.3"]
    asked.objectives = asked.objectives or (["table:*"] if asked.table else []) + ["closed:*"]
    return asked


def main(argv: Sequence[str] | None = None) -> None:
    # Here, because a spawned process imports this module too and draws nothing.
    from search_tables import report

    asked = arguments(argv)
    try:
        objectives, methods = chosen_objectives(asked), chosen_methods(asked)
    except DuetError as error:
        sys.exit(str(error))
    kept = Kept(asked.out / "runs.csv")
    kept.forget(asked.again)
    runs = planned(objectives, methods, asked.seeds, asked)
    left = [] if asked.tables_only else [run for run in runs if not kept.has(run)]
    started = time.perf_counter()
    for number, (run, steps) in enumerate(carried_out(left, asked.jobs), start=1):
        kept.add(steps)
        last = steps[-1]
        minutes = (time.perf_counter() - started) / 60
        print(
            f"{number}/{len(left)} {minutes:.1f} min  {run.objective.name}  {run.method.name}  seed {run.seed}  "
            f"recommended {last.recommended:.2f}  {sum(s.seconds for s in steps):.1f} s",
            flush=True,
        )
    wanted = {run.key for run in runs}
    ours = [method.name for method in methods if method.kind == "ours"]
    report([step for step in kept.steps if step.run in wanted], objectives, asked.out, versions(), ours)


def versions() -> str:
    names = ("numpy", "torch", "botorch", "ax-platform", "scikit-learn", "optuna", "cmaes", "lightgbm")
    found = []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, Python {platform.python_version()}; {', '.join(found)}"


if __name__ == "__main__":
    main()
