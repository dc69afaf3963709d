"""Is a cheaper look worth it? The same kind of real runs at two sizes, and the search with and without the small ones.

    OMP_NUM_THREADS=1 python benchmarks/fidelities.py --table FOLDER
    OMP_NUM_THREADS=1 python benchmarks/fidelities.py --quick

`FOLDER` holds RegMix's published runs: 256 ratios of 17 domains, each trained with 1M and with 60M parameters
(`test_mixture_60m.csv`, `test_pile_loss_60m.csv`, the same with `1m`), and 512 others with 1M (`train_…_1m.csv`). A
whole trial is a 60M run, a cheap look a 1M run that is *counted* as 0.05 of one (by parameters it would be 0.017).
Either is a Gaussian process (`search_surrogates.py`, on roots or logarithms of the shares, chosen by cross-validation)
fitted to the 256 runs of its size.

Noise is drawn, for either size by itself, from the process's residuals out of fold at that size, as in
`search_efficiency.py` (there of the better of process and trees). They hold the process's misfit, so they are more than
the noise of a repeat: the two sizes' true losses agree better than what is observed here.

**Past runs:** 0, 20 or 60 of the 512 real runs at 1M (their own losses) are told as `fidelity=0.05` before a search of
whole trials alone. Only the whole trials are counted: the past is there for free. The search starts with the uniform
ratio alone, with ten ratios, or with the uniform one and that of the best past run (as `search.prior`). Beside it the
ratio of the best past run, handed over untrained at 60M.

**Cheap trials of the search's own:** `search.fidelity: {rows: [0.05]}`, with the cost of everything counted, against
whole trials alone. `yen` is the acquisition of Yen et al. 2025 in a simple form: expected improvement over the best
posterior mean *of the same size*, divided by cost^α with α = 0.99^i before the i-th Bayesian trial, over both sizes,
with our model. A trial that no longer fits the budget ends a run.

To stay within minutes, acquisitions are maximised here over some thousand random ratios and steps around the best of
them, ten times quicker than by the search's own climb, which `--own-climb` takes (but for `yen`). Model, acquisition,
choice of the size and recommendation are the search's.

A gain is that of the recommended ratio at 60M without noise: 0 uniform, 1 the best of the simplex. What is recommended
is a ratio that was trained whole.
"""

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from scipy.stats import norm
from search_objectives import Loss, Objective, make
from search_surrogates import SURROGATES, Table, choose

from duet_ray.config import FidelityConfig, SearchConfig
from duet_ray.records import Point
from duet_ray.search import Proposer, SimplexSpace, Told
from duet_ray.search.fitted import COST_POWER_DECAY, Fitted, best_fidelity, fitted
from duet_ray.search.recommend import recommend

CHEAP = 0.05
N_ROWS = 10_000
FIDELITY = FidelityConfig(rows=[CHEAP])
PROCESSES = {name: fit for name, fit in SURROGATES["gp"].items() if not name.endswith("shares")}
N_CANDIDATES = 600


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """A loss at two sizes, and runs at the smaller one that anybody may have made before."""

    whole: Objective
    cheap: Objective
    """Its `best` and `uniform` are those of the small size."""
    past_ratios: np.ndarray
    """`(n_past, n_domains)`."""
    past_losses: np.ndarray

    def observe(self, shares: np.ndarray, fidelity: float, random: np.random.Generator) -> float:
        objective = self.whole if fidelity == 1 else self.cheap
        return objective.true(shares) + objective.draw_noise(random)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to search."""

    name: str
    n_start: int
    n_past: int = 0
    looks: Literal["none", "search", "yen"] = "none"
    """Who decides on cheap trials."""
    best_first: bool = False
    """The ratio of the best past run is the second whole trial."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One run."""

    gains: tuple[float, ...]
    """Of the recommended ratio, at every check."""
    n_whole: int
    n_cheap: int
    past_alone: float
    """Gain of the best past run's ratio; nan without past runs."""
    seconds: float


def read_sizes(folder: Path, metric: str) -> Sizes:
    """RegMix's runs as the two sizes of one loss."""
    found = {size: _table(folder, "test", size) for size in ("60m", "1m")}
    whole, cheap = (_objective(found[size], metric, size) for size in ("60m", "1m"))
    past = _table(folder, "train", "1m")
    names = list(found["60m"].names)
    order = [past.names.index(name) for name in names]
    return Sizes(whole=whole, cheap=cheap, past_ratios=past.ratios[:, order], past_losses=past.target(metric)[0])


def _table(folder: Path, part: str, size: str) -> Table:
    ratios, metrics = (pd.read_csv(folder / f"{part}_{what}_{size}.csv") for what in ("mixture", "pile_loss"))
    joined = ratios.merge(metrics, on="index", validate="one_to_one")
    columns = [c for c in joined if c.startswith("train_")]
    shares = joined[columns].to_numpy(dtype=np.float64)
    return Table(
        names=tuple(columns),
        ratios=shares / shares.sum(axis=1, keepdims=True),
        metrics=joined[[c for c in joined if c not in columns and c != "index"]],
    )


def _objective(table: Table, metric: str, size: str) -> Objective:
    losses, _ = table.target(metric)
    chosen = choose(PROCESSES, table.ratios, losses)
    loss: Loss = PROCESSES[chosen.member](table.ratios, losses)
    return make(
        f"{metric}:{size}",
        table.ratios.shape[1],
        loss,
        noise=float(chosen.residuals.std()),
        starts=table.ratios,
        residuals=chosen.residuals,
        facts={"surrogate": chosen.member, "R2": chosen.explained},
    )


@dataclass(frozen=True)
class _Tilted:
    """A made-up small size for `--quick`: the large one's loss, worse, and a little different."""

    loss: Loss
    slope: np.ndarray

    def __call__(self, ratios: np.ndarray) -> np.ndarray:
        return 1.0 + self.loss(ratios) + ratios @ self.slope


def made_up_sizes(n_domains: int = 4) -> Sizes:
    """Closed forms, where no table is at hand."""
    from search_objectives import closed_form

    whole = closed_form("inside", n_domains, 0.1)
    tilt = 0.2 * (whole.uniform - whole.best) * np.linspace(-1, 1, n_domains)
    loss = _Tilted(whole.loss, tilt)
    ratios = np.random.default_rng(0).dirichlet(np.ones(n_domains), 100)
    return Sizes(
        whole=whole,
        cheap=make("cheap", n_domains, loss, noise=whole.noise),
        past_ratios=ratios,
        past_losses=loss(ratios),
    )


def run(sizes: Sizes, arm: Arm, seed: int, checks: Sequence[float], *, own: bool = False) -> Outcome:
    """One search.

    Args:
        checks: in whole trials spent, rising; the last is the budget.
        own: maximise the acquisition as the search does.
    """
    started, budget = time.process_time(), checks[-1]
    n = sizes.whole.n_domains
    space = SimplexSpace(names=tuple(f"d{d}" for d in range(n)), n_rows=N_ROWS, lower=(0,) * n, upper=(N_ROWS,) * n)
    order = np.random.default_rng([4, seed]).permutation(n)
    told = past(sizes, arm.n_past, seed, space, order)
    settings = SearchConfig(n_start=arm.n_start, n_trials=int(budget), acquisition="lcb")
    best_past = min(told, key=lambda one: one.loss).ratio if told else None
    plain = Proposer(space, settings, seed, prior=best_past if arm.best_first else None)
    looking = arm.n_past > 0 or arm.looks != "none"
    # Whole trials' start design is asked of `plain`: with fidelities most of it would be cheap.
    n_start = 1 if arm.looks == "none" else arm.n_start
    sized = Proposer(space, settings.model_copy(update={"fidelity": FIDELITY, "n_start": n_start}), seed)
    proposer, starting = sized if looking else plain, plain if arm.looks == "none" else sized
    past_alone = np.nan if best_past is None else sizes.whole.gain(sizes.whole.true(best_past.values[order]))
    spent, trial = 0.0, 0
    gains: list[float] = []
    n_whole = n_cheap = 0
    while True:
        if trial == 0:
            point = Point(ratio=space.uniform())
        elif trial < starting.settings.n_start_trials:
            proposal = starting.propose(trial, told, [])
            point = Point(ratio=proposal.ratio, fidelity=proposal.fidelity)
        elif own and arm.looks != "yen":
            proposal = proposer.propose(trial, told, [])
            point = Point(ratio=proposal.ratio, fidelity=1.0 if arm.looks == "none" else proposal.fidelity)
        else:
            point = light_point(proposer, told, arm.looks, trial - starting.settings.n_start_trials, [6, seed, trial])
        while len(gains) < len(checks) and spent + point.fidelity > checks[len(gains)] + 1e-9:
            gains.append(gain_of(sizes, proposer, told, order))
        if spent + point.fidelity > budget + 1e-9:
            break
        loss = sizes.observe(point.ratio.values[order], point.fidelity, np.random.default_rng([5, seed, trial]))
        told.append(Told(ratio=point.ratio, loss=loss, fidelity=point.fidelity))
        spent, trial = spent + point.fidelity, trial + 1
        n_whole, n_cheap = n_whole + (point.fidelity == 1), n_cheap + (point.fidelity < 1)
    return Outcome(
        gains=tuple(gains),
        n_whole=n_whole,
        n_cheap=n_cheap,
        past_alone=past_alone,
        seconds=time.process_time() - started,
    )


def past(sizes: Sizes, n_past: int, seed: int, space: SimplexSpace, order: np.ndarray) -> list[Told]:
    """The seed's past runs: the 20 are the first of the 60."""
    drawn = np.random.default_rng([7, seed]).permutation(len(sizes.past_losses))[:n_past]
    found = []
    for index in drawn:
        shares = np.empty(space.n_domains)
        shares[order] = sizes.past_ratios[index]
        found.append(Told(ratio=space.project(shares), loss=float(sizes.past_losses[index]), fidelity=CHEAP))
    return found


def gain_of(sizes: Sizes, proposer: Proposer, told: Sequence[Told], order: np.ndarray) -> float:
    return sizes.whole.gain(sizes.whole.true(recommend(proposer, told).ratio.values[order]))


def light_point(proposer: Proposer, told: Sequence[Told], looks: str, n_before: int, seed: Sequence[int]) -> Point:
    """The next point by our model: by lcb and then its size, or by improvement for cost at either size."""
    model, random = fitted(proposer, told), np.random.default_rng(seed)
    if looks == "yen":
        return _most_improvement_for_cost(model, told, n_before, random)
    beta = float(proposer.settings.beta)

    def worth(shares: np.ndarray) -> np.ndarray:
        mean, sd = _means(model, shares, 1.0)
        return beta * sd - mean

    tried = {one.point for one in told}
    points = [Point(ratio=proposer.space.project(shares)) for shares in _climbed(worth, model, told, random)]
    point = next((one for one in points if one not in tried), points[0])
    return replace(point, fidelity=best_fidelity(proposer, point, told, n_before)) if looks == "search" else point


def _most_improvement_for_cost(
    model: Fitted, told: Sequence[Told], n_before: int, random: np.random.Generator
) -> Point:
    tried, seen = {one.point for one in told}, np.array([one.ratio.values for one in told])
    found: list[tuple[float, Point]] = []
    for fidelity in model.space.fidelities:
        # The best of the size itself: beside whole trials' losses no cheap one ever improves.
        bar = float(_means(model, seen, fidelity)[0].min())

        def worth(shares: np.ndarray, fidelity: float = fidelity, bar: float = bar) -> np.ndarray:
            mean, sd = _means(model, shares, fidelity)
            z = (bar - mean) / np.maximum(sd, 1e-12)
            return np.log(np.maximum(sd * (z * norm.cdf(z) + norm.pdf(z)), 1e-300))

        points = _climbed(worth, model, told, random)
        for value, shares in zip(worth(points) - COST_POWER_DECAY**n_before * np.log(fidelity), points, strict=True):
            point = Point(ratio=model.space.simplex.project(shares), fidelity=fidelity)
            if point not in tried:
                found.append((float(value), point))
                break
    return max(found, key=lambda pair: pair[0])[1]


def _climbed(
    worth: Callable[[np.ndarray], np.ndarray], model: Fitted, told: Sequence[Told], random: np.random.Generator
) -> np.ndarray:
    """Ratios of much worth, best first."""
    points = _candidates(model, told, random)
    for width in (0.05, 0.02, 0.007):
        best = points[np.argsort(-worth(points), kind="stable")[:20]]
        points = np.vstack([best, _near(best, random, N_CANDIDATES // 2, width)])
    return points[np.argsort(-worth(points), kind="stable")]


def _candidates(model: Fitted, told: Sequence[Told], random: np.random.Generator) -> np.ndarray:
    n = model.space.simplex.n_domains
    drawn = [random.dirichlet(np.full(n, a), N_CANDIDATES // 3) for a in (1.0, 0.3, 0.1)]
    seen = np.array([one.ratio.values for one in told])
    best = seen[np.argsort(_means(model, seen, 1.0)[0])[:10]]
    return np.vstack([*drawn, _near(best, random, N_CANDIDATES // 2, 0.1)])


def _near(centres: np.ndarray, random: np.random.Generator, n_points: int, width: float) -> np.ndarray:
    """Ratios a normal step on the square roots away from the centres."""
    chosen = np.sqrt(centres[random.integers(len(centres), size=n_points)])
    moved = np.maximum(chosen + width * random.standard_normal(chosen.shape), 0) ** 2
    return moved / moved.sum(axis=1, keepdims=True)


def _means(model: Fitted, shares: np.ndarray, fidelity: float) -> tuple[np.ndarray, np.ndarray]:
    """Posterior means and standard deviations at one size."""
    if not model.space.has_fidelities:
        return model.predict(shares)
    feature = np.full((len(shares), 1), model.space.encode_fidelity(fidelity))
    return model._mean_and_sd(np.hstack([shares[:, list(model.space.free)], feature]))


TRANSFER = tuple(
    Arm(name=f"{n_past} past runs, {n_start} to start", n_start=n_start, n_past=n_past)
    for n_past in (0, 20, 60)
    for n_start in (1, 10)
) + tuple(
    Arm(name=f"{n_past} past runs, the best one's ratio first", n_start=2, n_past=n_past, best_first=True)
    for n_past in (20, 60)
)
COSTS = (
    Arm(name="whole trials alone", n_start=2),
    Arm(name="cheap ones where the search wants", n_start=2, looks="search"),
    Arm(name="EI / cost^α (Yen et al.)", n_start=2, looks="yen"),
)
"""`n_start=2` is one whole trial and 20 cheap ones where there are cheap ones."""


def table_of(sizes: Sizes, arms: Sequence[Arm], seeds: Sequence[int], checks: Sequence[float], *, own: bool) -> str:
    """A line per arm: means over seeds ± standard errors."""
    shown = " | ".join(f"gain at {check:g}" for check in checks)
    lines = [f"| search | {shown} | best past run alone | whole | cheap | CPU s |", "|---" * (len(checks) + 5) + "|"]
    for arm in arms:
        outcomes = [run(sizes, arm, seed, checks, own=own) for seed in seeds]
        gains = " | ".join(_mean([o.gains[i] for o in outcomes]) for i in range(len(checks)))
        alone = _mean([o.past_alone for o in outcomes]) if arm.n_past else "–"
        counts = " | ".join(f"{np.mean(c):.0f}" for c in zip(*((o.n_whole, o.n_cheap) for o in outcomes), strict=True))
        seconds = np.mean([o.seconds for o in outcomes])
        lines.append(f"| {arm.name} | {gains} | {alone} | {counts} | {seconds:.0f} |")
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> str:
    error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return f"{np.mean(values):.2f} ± {error:.2f}"


def facts(name: str, sizes: Sizes) -> str:
    whole, cheap = sizes.whole, sizes.cheap
    at = whole.gain(whole.true(cheap.best_ratio))
    shares = [f"{o.noise / (o.uniform - o.best):.2f}" for o in (whole, cheap)]
    told = "; ".join(f"{o.facts['surrogate']}, R² {o.facts['R2']:.2f}" for o in (whole, cheap) if "R2" in o.facts)
    return (
        f"**{name}** (whole; cheap: {told or 'made up'}). Noise {' and '.join(shares)} of what can be gained at "
        f"the size; the best ratio of the small size has a gain of {at:.2f} at the large one."
    )


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, help="a folder in RegMix's layout; made-up sizes without it")
    parser.add_argument("--metrics", nargs="+", default=["pile_cc", "mean"], help="parts of column names; mean: of all")
    parser.add_argument("--parts", nargs="+", choices=("transfer", "cost"), default=["transfer", "cost"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trials", type=float, nargs="+", default=[5, 10, 20], help="checks of the past-runs part")
    parser.add_argument("--cost", type=float, nargs="+", default=[4, 6], help="checks of the other, in whole trials")
    parser.add_argument("--own-climb", action="store_true", help="maximise lcb as the search does: ten times slower")
    parser.add_argument("--quick", action="store_true", help="seconds: made-up sizes, one seed, few trials")
    asked = parser.parse_args(argv)
    if asked.quick:
        asked.table, asked.seeds, asked.trials, asked.cost = None, 1, [3], [2.2]
    return asked


def main(argv: Sequence[str] | None = None) -> None:
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    asked = arguments(argv)
    found = {"made up": made_up_sizes()}
    if asked.table is not None:
        found = {metric: read_sizes(asked.table, metric) for metric in asked.metrics}
    for name, sizes in found.items():
        print(facts(name, sizes), end="\n\n", flush=True)
        for part, arms, checks in (("transfer", TRANSFER, asked.trials), ("cost", COSTS, asked.cost)):
            if part in asked.parts:
                seeds = range(asked.seeds)
                print(table_of(sizes, arms, seeds, checks, own=asked.own_climb), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
