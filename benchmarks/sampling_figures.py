"""The figures of `sampling_size.py`: single samples and the best of k, the observation against k, whole studies."""

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch
from pools import Pool, named
from races import Fitted, observation_law, sizes_of
from whole_studies import Run, regret_of

from duet_ray.config import StudyConfig
from duet_ray.records import Direction
from duet_ray.report.palette import ACCENT, BASE, INK, MUTED, domain_look
from duet_ray.theory import minimum_weights

SELECTION_COLOURS = (ACCENT, "#8A8A8A", "#CC79A7", "#E69F00")


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


def canvas(n_columns: int, width: float = 9.0) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, 3.9), dpi=150, layout="constrained", facecolor="white")
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


def sign_all(values: np.ndarray, sign: Callable[[float], float]) -> np.ndarray:
    return np.array([sign(float(value)) for value in values])


def keep_figure(figure: Figure, file: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    file.write_bytes(buffer.getvalue())
    print(f"figure: {file}", flush=True)
