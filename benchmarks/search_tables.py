"""The tables, CSV files and figures of `search_efficiency.py`."""

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from search_objectives import Objective

from duet_ray.report.palette import ACCENT, INK, MUTED

if TYPE_CHECKING:
    from search_efficiency import Step

SHARES = (0.5, 0.9, 0.95)
MODEL_FREE = ("random", "sobol")
_PEER_COLOURS = ("#8A8A8A", "#C4A35A", "#E69F00", "#CC79A7", "#56B4E9", "#009E73", "#D55E00", "#7A5195", "#444444")
_OUR_COLOURS = (ACCENT, "#B22222", "#1B7837", "#6A3D9A", "#B15928", "#01665E")


@dataclass(frozen=True, kw_only=True)
class Runs:
    """All runs of one method on one objective."""

    objective: str
    method: str
    ours: bool
    n_domains: int
    noise: float
    seeds: tuple[int, ...]
    budget: int
    checks: np.ndarray
    """`(n_checks,)` trials at which the method was asked to recommend."""
    trained: np.ndarray
    """`(n_seeds, budget)` gains."""
    observed: np.ndarray
    recommended: np.ndarray
    """`(n_seeds, n_checks)` gains."""
    seconds: np.ndarray
    """`(n_seeds, budget)`."""

    def trials_to(self, share: float) -> np.ndarray:
        """`(n_seeds,)`: the first check with this gain of the recommended ratio; budget + 1 without one."""
        reached = self.recommended >= share
        return np.where(reached.any(axis=1), self.checks[reached.argmax(axis=1)], self.budget + 1)

    def median_trials_to(self, share: float) -> float:
        return float(np.median(self.trials_to(share)))

    @property
    def final(self) -> np.ndarray:
        """`(n_seeds,)`: the gain of the ratio recommended in the end."""
        return self.recommended[:, -1]


def collected(steps: Iterable["Step"], ours: Sequence[str] = ()) -> list[Runs]:
    """Steps as arrays, in the order in which objectives and methods first appear."""
    found: dict[tuple[str, str], dict[int, list[Step]]] = {}
    for step in steps:
        found.setdefault((step.objective, step.method), {}).setdefault(step.seed, []).append(step)
    runs = []
    for (objective, method), by_seed in found.items():
        seeds = sorted(by_seed)
        table = [sorted(by_seed[seed], key=lambda s: s.trial) for seed in seeds]
        checked = [[s for s in row if s.recommended is not None] for row in table]
        runs.append(
            Runs(
                objective=objective,
                method=method,
                ours=method in ours or method == "ours",
                n_domains=table[0][0].n_domains,
                noise=table[0][0].noise,
                seeds=tuple(seeds),
                budget=table[0][0].budget,
                checks=np.array([s.trial for s in checked[0]]),
                trained=np.array([[s.trained for s in row] for row in table]),
                observed=np.array([[s.observed for s in row] for row in table]),
                recommended=np.array([[s.recommended for s in row] for row in checked], dtype=np.float64),
                seconds=np.array([[s.seconds for s in row] for row in table]),
            )
        )
    return runs


def interval(values: np.ndarray, of: Callable[..., Any] = np.mean, n_draws: int = 2000) -> tuple[float, float]:
    """The 95 % percentile bootstrap of a statistic over seeds, `(n_seeds,)`; one seed has no interval."""
    if len(values) < 2:
        return float("nan"), float("nan")
    drawn = np.random.default_rng(0).integers(len(values), size=(n_draws, len(values)))
    low, high = np.quantile(of(values[drawn], axis=1), [0.025, 0.975])
    return float(low), float(high)


def ratio_to_best_peer(mine: Runs, others: Sequence[Runs], share: float = 0.95) -> tuple[float, str, str] | None:
    """My median trials to a gain over those of the best peer.

    Returns:
        the ratio, the peer's name, and `<` where the peer's median is censored; None where mine is too, or no peer ran.
    """
    peers = [one for one in others if one.objective == mine.objective and not one.ours]
    if not peers:
        return None
    best = min(peers, key=lambda one: one.median_trials_to(share))
    trials, peers_trials = mine.median_trials_to(share), best.median_trials_to(share)
    if trials > mine.budget and peers_trials > mine.budget:
        return None
    censored = peers_trials > best.budget
    return trials / peers_trials, "none" if censored else best.method, "<" if censored else ""


def report(
    steps: Sequence["Step"], objectives: Sequence[Objective], out: Path, versions: str, ours: Sequence[str] = ()
) -> str:
    """Write `tables.md`, a CSV per table and the figures into `out`; returns the tables."""
    out.mkdir(parents=True, exist_ok=True)
    runs = collected(steps, ours)
    blocks = [f"{versions}\n"]

    def add(name: str, title: str, head: Sequence[str], rows: Sequence[Sequence[Any]], note: str) -> None:
        lines = [f"### {title}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
        blocks.append("\n".join([*lines, "", note]) + "\n")
        with (out / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([head, *rows])

    add("objectives", "Objectives", *_objectives(objectives))
    for objective, group in groupby(sorted(runs, key=lambda r: _place(r.objective, objectives)), lambda r: r.objective):
        add(f"gain-{_slug(objective)}", objective, *_one_objective(list(group)))
    add("trials", "Trials to 95 % of the gain, all objectives", *_all_objectives(runs, objectives))
    add("summary", "Summary", *_summary(runs))
    text = "\n".join(blocks)
    (out / "tables.md").write_text(text, encoding="utf-8")
    print(text, flush=True)
    for figure, name in figures(runs, objectives):
        file = out / f"{name}.png"
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
        file.write_bytes(buffer.getvalue())
        print(f"figure: {file}", flush=True)
    return text


Content = tuple[Sequence[str], Sequence[Sequence[Any]], str]


def _objectives(objectives: Sequence[Objective]) -> Content:
    rows = []
    for one in objectives:
        gain, facts = one.uniform - one.best, one.facts
        fit = facts.get("surrogate", "")
        explained = f"{facts['R2']:.3f}" if "R2" in facts else ""
        held_out = f"{facts['R2 held out']:.3f}" if facts.get("R2 held out") is not None else ""
        far = f"{facts['best to nearest run']:.2f} / {facts['run to nearest run']:.2f}" if explained else ""
        row = [one.name, one.n_domains, f"{one.uniform:.4g}", f"{one.best:.4g}", f"{one.noise / gain:.0%}"]
        rows.append([*row, facts.get("noise from", ""), fit, explained, held_out, far])
    head = ["objective", "n", "uniform", "best", "noise / gain", "noise from", "surrogate", "R² out of fold"]
    head += ["R² held out", "best to nearest run / run to nearest run"]
    note = (
        "Noise is a standard deviation in shares of what can be gained over the uniform ratio. The best of a surrogate "
        "is its best anywhere on the simplex; the last column says how far it lies from a run, and runs "
        "from each other."
    )
    return head, rows, note


def _one_objective(runs: Sequence[Runs]) -> Content:
    rows = []
    for one in runs:
        low, high = interval(one.final)
        between = f" ({low:.2f} to {high:.2f})" if len(one.seeds) > 1 else ""
        row = [one.method, len(one.seeds), f"{one.final.mean():.2f}{between}"]
        row += [f"{one.observed[:, -1].mean():.2f}", f"{one.trained[:, -1].mean():.2f}"]
        row += [_trials(one, share) for share in SHARES]
        row += [f"{(one.final >= SHARES[-1]).mean():.0%}", _seconds(one)]
        rows.append(row)
    head = ["method", "seeds", "recommended (95 %)", "observed", "trained"]
    head += [f"trials to {share:.0%} (95 %)" for share in SHARES] + ["ended ≥ 95 %", "s a proposal"]
    note = (
        f"Gains after {runs[0].budget} trials, means over seeds: 0 is the uniform ratio, 1 the best; noise "
        f"{runs[0].noise:.0%} of that. Trials are medians. Seconds: mean CPU seconds over the last half of a run."
    )
    return head, rows, note


def _all_objectives(runs: Sequence[Runs], objectives: Sequence[Objective]) -> Content:
    methods = list(dict.fromkeys(one.method for one in runs))
    by_name = {(one.objective, one.method): one for one in runs}
    rows = []
    for objective in objectives:
        there = [by_name.get((objective.name, method)) for method in methods]
        cells = [_trials(one, SHARES[-1], bounds=False) if one is not None else "" for one in there]
        rows.append([objective.name, *cells])
    return ["objective", *methods], rows, "Medians over seeds of the first check with 95 % of the gain."


def _summary(runs: Sequence[Runs]) -> Content:
    """One line a method: how it stands over all objectives."""
    rows = []
    by_name = {(one.objective, one.method): one for one in runs}
    for method in dict.fromkeys(one.method for one in runs):
        mine = [one for one in runs if one.method == method]
        finals = [float(one.final.mean()) for one in mine]
        others = [one for one in runs if one.method != method]
        compared = [found for one in mine if (found := ratio_to_best_peer(one, others)) is not None]
        below = [one.objective for one in mine if interval(one.final)[1] < 0]
        behind = [one.objective for one in mine if _behind(one, by_name.get((one.objective, "random")))]
        row = [method, len(mine), f"{np.mean(finals):.2f}", f"{np.median(finals):.2f}", f"{min(finals):.2f}"]
        ratio = ""
        if compared:
            bounded = "≤ " if any(sign for _, _, sign in compared) else ""
            ratio = f"{bounded}{np.median([value for value, _, _ in compared]):.2f} (of {len(compared)})"
        row += [ratio, "; ".join(below) or "none", "" if method == "random" else "; ".join(behind) or "none"]
        rows.append([*row, f"{np.mean([_late_seconds(one) for one in mine]):.2f}"])
    head = ["method", "objectives", "recommended, mean", "median", "worst", "trials to 95 % / best peer's, median"]
    head += ["worse than uniform beyond its interval", "behind random search beyond its interval", "s a proposal"]
    note = (
        "The ratio of trials is over the objectives where the method or a peer gets there in the median seed; the best "
        "peer of ours is the best method that is not ours, of a peer the best other peer. Means of a method that ran "
        "on fewer objectives are not comparable."
    )
    return head, rows, note


def _behind(mine: Runs, random: Runs | None) -> bool:
    """Whether the final recommendation is worse than random search's, beyond the interval of the paired difference."""
    if random is None or mine.method == random.method:
        return False
    common = [seed for seed in mine.seeds if seed in random.seeds]
    difference = np.array(
        [mine.final[mine.seeds.index(seed)] - random.final[random.seeds.index(seed)] for seed in common]
    )
    return len(common) > 1 and interval(difference)[1] < 0


def _trials(one: Runs, share: float, bounds: bool = True) -> str:
    trials = one.trials_to(share)

    def shown(value: float) -> str:
        return f"> {one.budget}" if value > one.budget else f"{value:g}"

    median = shown(float(np.median(trials)))
    if not bounds or len(trials) < 2 or (trials > one.budget).all():
        return median
    low, high = interval(trials, np.median)
    return f"{median} ({shown(low)} to {shown(high)})"


def _late_seconds(one: Runs) -> float:
    return float(one.seconds[:, one.budget // 2 :].mean())


def _seconds(one: Runs) -> str:
    return f"{_late_seconds(one):.2f}"


def _place(name: str, objectives: Sequence[Objective]) -> int:
    return [one.name for one in objectives].index(name)


def _slug(name: str) -> str:
    return name.replace(":", "-")


def figures(runs: Sequence[Runs], objectives: Sequence[Objective]) -> list[tuple[Figure, str]]:
    """The gain of the recommended ratio against trials, a panel an objective, up to six a figure; and final gains."""
    methods = list(dict.fromkeys(one.method for one in runs))
    look = _looks(methods, {one.method for one in runs if one.ours})
    names = [one.name for one in objectives if any(run.objective == one.name for run in runs)]
    found = []
    for start in range(0, len(names), 6):
        part = names[start : start + 6]
        figure, panels = _canvas(len(part))
        for axes, name in zip(panels, part, strict=False):
            for one in (run for run in runs if run.objective == name):
                _curve(axes, one, *look[one.method])
            noise = next(run.noise for run in runs if run.objective == name)
            axes.set_title(f"{name}, noise {noise:.0%}", fontsize=9.5, color=INK)
            axes.axhline(0, color=INK, lw=0.8)
            axes.axhline(1, color=INK, lw=0.8, linestyle=(0, (1, 2)))
            axes.set_ylim(max(-1.0, min(-0.1, axes.get_ylim()[0])), 1.05)
            axes.set_xlabel("trials", color=INK, fontsize=9)
        panels[0].set_ylabel("gain of the recommended ratio", color=INK, fontsize=9)
        handles = {text: line for axes in panels for line, text in zip(*axes.get_legend_handles_labels(), strict=True)}
        ordered = [method for method in methods if method in handles]
        figure.legend(
            [handles[m] for m in ordered], ordered, loc="outside lower center", ncols=6, frameon=False, fontsize=9
        )
        figure.suptitle(
            "0: the uniform ratio, 1: the best. Means over seeds; bands: 95 % bootstrap", fontsize=9.5, color=MUTED
        )
        found.append((figure, f"gain-{start // 6 + 1}"))
    found.append((_finals(runs, names, methods, look), "final"))
    return found


def _looks(methods: Sequence[str], ours: set[str]) -> dict[str, tuple[str, float]]:
    """Colour and width: ours in strong colours and thick."""
    peers = iter(_PEER_COLOURS * len(methods))
    mine = iter(_OUR_COLOURS * len(methods))
    return {method: (next(mine), 2.4) if method in ours else (next(peers), 1.3) for method in methods}


def _curve(axes: Axes, one: Runs, colour: str, width: float) -> None:
    axes.plot(one.checks, one.recommended.mean(axis=0), color=colour, lw=width, label=one.method, marker="o", ms=2.5)
    if len(one.seeds) > 1:
        bands = np.array([interval(column) for column in one.recommended.T])
        axes.fill_between(one.checks, bands[:, 0], bands[:, 1], color=colour, alpha=0.13, lw=0)


def _finals(
    runs: Sequence[Runs], names: Sequence[str], methods: Sequence[str], look: dict[str, tuple[str, float]]
) -> Figure:
    """Gains of the last recommendation: a row an objective, a dot a method, with its interval."""
    figure = Figure(figsize=(9.0, 1.4 + 0.42 * len(names)), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    _plain(axes, "x")
    for row, name in enumerate(names):
        for index, method in enumerate(methods):
            one = next((run for run in runs if run.objective == name and run.method == method), None)
            if one is None:
                continue
            y = row + 0.7 * ((index + 0.5) / len(methods) - 0.5)
            low, high = interval(one.final)
            colour, width = look[method]
            axes.plot([max(low, -1), high], [y, y], color=colour, lw=width * 0.8)
            axes.plot(max(float(one.final.mean()), -1), y, "o", color=colour, ms=4 if width < 2 else 6,
                      label=method if row == 0 else None)  # fmt: skip
    axes.axvline(0, color=INK, lw=0.8)
    axes.set_xlim(-1.02, 1.05)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("gain of the ratio recommended in the end (0: uniform, 1: best; cut at −1)", color=INK, fontsize=9)
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    return figure


def _canvas(n_panels: int) -> tuple[Figure, list[Axes]]:
    n_columns = min(3, n_panels)
    n_lines = -(-n_panels // n_columns)
    size = (3.6 * n_columns + 0.6, 2.9 * n_lines + 0.9)
    figure = Figure(figsize=size, dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(n_lines, n_columns, squeeze=False).ravel())
    for axes in panels[:n_panels]:
        _plain(axes, "y")
    for axes in panels[n_panels:]:
        axes.set_visible(False)
    return figure, panels[:n_panels]


def _plain(axes: Axes, grid: str) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(MUTED)
    axes.tick_params(colors=INK, labelsize=8.5)
    axes.grid(axis=grid, color="#d0d7de", lw=0.7)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
