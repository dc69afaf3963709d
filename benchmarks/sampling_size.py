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

Pools stand in `pools.py`, what (a) and (d) make of them in `races.py`, (b) in `whole_studies.py`, the figures in
`sampling_figures.py`.
"""

import argparse
import csv
import json
import math
import os
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for tests.toy_study

import numpy as np
from pools import Pool, PoolTrainer, named, pool_on_fleet
from races import Fitted, fitted, observation_law, races, rank_correlations, sizes_of
from sampling_figures import distributions_figure, keep_figure, observation_figure, studies_figure
from whole_studies import Run, best_known, regret_of, run_studies

from duet_ray.config import StudyConfig, load_config
from duet_ray.errors import DuetError
from duet_ray.records import Ratio
from duet_ray.report.summary import searched
from duet_ray.theory import fit_spacings, goodness_of_fit


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
        regret, error = regret_of(found[1], references.get(run.seed))
        text = number(regret) if run.seed in references else ""
        text += f" ± {number(error, 2)}" if error is not None else ""
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
        ends = f" ± {number(float(np.std(regrets, ddof=1)) / len(regrets) ** 0.5, 2)}" if len(regrets) > 1 else ""
        mean = f"{number(float(np.mean(regrets)))}{ends}" if regrets and references else ""
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
