"""The figures of a report, as PNG bytes.

Drawn on `Figure` objects without pyplot, so that nothing global is touched and a driver's thread may draw while
another one does. Every value axis says which direction is better; values far outside the rest are drawn as arrows at
the edge and counted, never dropped, so that one diverged sample does not flatten the picture.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, PathPatch
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator

from duet_ray.config import StudyConfig
from duet_ray.records import Direction, Trial
from duet_ray.report.objectives import directions, judged, objective_of, on_front
from duet_ray.report.palette import BASE, INK, MUTED, UNIFORM, DomainLook, domain_look
from duet_ray.report.scores import Histogram
from duet_ray.report.summary import (
    Measurement,
    StudySummary,
    base_measurement,
    base_metrics,
    chosen_trial,
    confirmation_of,
    confirmations,
    confirmed_name,
    is_anywhere,
    is_whole,
    k_text,
    metrics_of,
    observed,
    running_best,
    searched,
    uniform_trial,
    value_format,
    value_of,
)
from duet_ray.report.wording import ValueFormat, better_is, join_words, plural

DPI = 150
WIDTH = 9.0
_SEARCH = "#0072B2"
_START = "#8A8A8A"
MOST_BARS = 200
"""With more trials their bars would be all edge, and drawing them takes minutes."""
MOST_NAMES = 120
"""More trials than this are not all named at an axis."""
_LOOSE = 3.0
"""A value further than this many widths of the middle 80 % outside them goes to the edge of the axis."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One finished figure."""

    name: str
    """File name without ending."""
    title: str
    alt: str
    """What the figure shows, for those who cannot see it."""
    png: bytes


def draw_all(summary: StudySummary) -> tuple[Picture, ...]:
    """Every figure that the study has something to show for, in the order of the page."""
    drawn = (
        best_so_far(summary),
        confirmed(summary),
        mixtures(summary),
        samples(summary),
        front(summary),
        scores(summary),
    )
    return tuple(p for p in drawn if p)


def best_so_far(summary: StudySummary) -> Picture | None:
    """The best observation up to each trial, over the values it came from; None before the first value."""
    trials = searched(summary)
    if not observed(summary):
        return None
    values = value_format(summary)
    base, uniform = base_measurement(summary, as_trials=True), uniform_trial(summary)
    levels = [("untouched model", base.mean, BASE, (0, (6, 3)))] if base else []
    if uniform and uniform.observation:
        levels.append(("uniform ratio, trial 0", value_of(uniform), UNIFORM, (0, (2, 2))))
    figure, axes = _canvas(4.6)
    places = {t.number: i for i, t in enumerate(trials)}
    limits = _limits([s.value for t in trials for s in t.samples if s.value is not None], [v for _, v, _, _ in levels])
    _mark_start_design(axes, trials)
    for colour, group in _by_colour(trials):
        loose = [(places[t.number], s.value) for t in group for s in t.samples if s.value is not None]
        _points(axes, loose, limits, colour=colour)
        seen = [(places[t.number], value_of(t)) for t in group if t.observation and is_whole(t)]
        _points(axes, seen, limits, colour=colour, filled=True)
        cheap = [(places[t.number], value_of(t)) for t in group if t.observation and not is_whole(t)]
        _points(axes, cheap, limits, colour=colour, marker="s", size=34)
    _crosses(axes, [places[t.number] for t in trials if t.status == "failed"])
    steps = [(places[t.number], value_of(b)) for t, b in running_best(summary) if b]
    handles = []
    if steps:
        axes.step([x for x, _ in steps], [y for _, y in steps], where="post", color=INK, lw=2.2, zorder=4)
        axes.plot([steps[-1][0], len(trials) - 0.5], [steps[-1][1]] * 2, color=INK, lw=2.2, zorder=4)
        handles.append(Line2D([], [], color=INK, lw=2.2, label=f"best so far ({values(steps[-1][1])})"))
    for label, level, colour, dashes in levels:
        inside = limits[0] <= level <= limits[1]
        arrow = "" if inside else (" ↑ above the axis" if level > limits[1] else " ↓ below the axis")
        handles.append(
            Line2D([], [], color=colour, lw=1.8, linestyle=dashes, label=f"{label} ({values(level)}){arrow}")
        )
        if inside:
            axes.axhline(level, color=colour, lw=1.8, linestyle=dashes, zorder=2)
    handles += _dot_handles(summary, trials, limits)
    axes.set_xlim(-0.6, max(len(trials), 6) - 0.4)
    _trial_axis(axes, trials)
    _value_axis(axes, summary, limits)
    _legend_below(figure, handles)
    return _picture(
        figure,
        name="best_so_far",
        title="Best so far",
        alt=f"Best observation over {plural(len(trials), 'trial')}, "
        f"{f'ending at {values(steps[-1][1])}' if steps else 'none of them whole'}, with the values of all samples and "
        "lines for the untouched model and the uniform ratio.",
    )


def mixtures(summary: StudySummary) -> Picture | None:
    """The ratio of every trial as a stacked bar; None before the first trial."""
    trials = [t for t in searched(summary) if t.ratio is not None]
    if not trials:
        return None
    names, best = summary.domain_names, chosen_trial(summary)
    shares = np.stack([t.ratio.values for t in trials if t.ratio is not None])
    n_columns = 1 if len(names) <= 10 else 2
    figure, axes = _canvas(max(4.2, 0.24 * -(-len(names) // n_columns) + 1.4))
    has_value = np.array([t.observation is not None for t in trials])
    (_bars if len(trials) <= MOST_BARS else _columns)(axes, shares, has_value)
    for x, trial in enumerate(trials):
        mark = "★" if trial is best else "×" if trial.status == "failed" else "…" if trial.status == "pending" else ""
        if mark:
            axes.text(x, 1.012, mark, ha="center", va="bottom", fontsize=12, color=INK)
    _mark_start_design(axes, trials, shade=False)
    axes.set_xlim(-0.6, max(len(trials), 6) - 0.4)
    axes.set_ylim(0, 1)
    axes.set_yticks(np.linspace(0, 1, 5), [f"{p:.0%}" for p in np.linspace(0, 1, 5)])
    axes.set_ylabel("share of the mixture", color=INK)
    axes.grid(False)
    _trial_axis(axes, trials)
    handles = [
        Patch(
            facecolor=domain_look(i).colour,
            hatch=domain_look(i).hatch,
            edgecolor="white",
            label=_escaped(name, most=26),
        )
        for i, name in enumerate(names)
    ]
    figure.legend(
        handles=handles[::-1] if n_columns == 1 else handles,
        loc="outside right center",
        ncols=n_columns,
        frameon=False,
        fontsize=9,
        handlelength=1.4,
        handleheight=1.2,
        columnspacing=1.0,
    )
    marks = [
        ("★", "the ratio to take", best is not None),
        ("×", "failed", any(t.status == "failed" for t in trials)),
        ("…", "not finished", any(t.status == "pending" for t in trials)),
    ]
    if said := "     ".join(f"{mark} {text}" for mark, text, used in marks if used):
        axes.set_xlabel(f"trial          {said}", color=INK)
    return _picture(
        figure,
        name="mixtures",
        title="The mixture over the trials",
        alt=f"One stacked bar per trial, {plural(len(trials), 'trial')}: the shares of {', '.join(names)}.",
    )


def _bars(axes: Axes, shares: np.ndarray, has_value: np.ndarray) -> None:
    """Stacked bars, paler where a trial has no value. `shares`: `(n_trials, n_domains)`."""
    bottom = np.zeros(len(shares))
    width = 0.86 if len(shares) <= 30 else 0.94
    for index in range(shares.shape[1]):
        look = domain_look(index)
        used = np.flatnonzero(shares[:, index])
        bars = axes.bar(
            used,
            shares[used, index],
            width,
            bottom=bottom[used],
            color=look.colour,
            hatch=look.hatch,
            edgecolor="white",
            linewidth=0.4,
        )
        for bar, place in zip(bars, used, strict=True):
            bar.set_alpha(1.0 if has_value[place] else 0.35)
        bottom += shares[:, index]


def _columns(axes: Axes, shares: np.ndarray, has_value: np.ndarray) -> None:
    """The same without gaps and edges, which would hide columns of a pixel: one or two shapes a domain, since
    thousands of bars in fifty colours take minutes.
    """
    top = np.cumsum(shares, axis=1)
    left, right = np.arange(len(shares)) - 0.5, np.arange(len(shares)) + 0.5
    for index in range(shares.shape[1]):
        high, low = top[:, index], top[:, index] - shares[:, index]
        outline = ((left, low), (right, low), (right, high), (left, high))
        corners = np.stack([np.stack(xy, axis=-1) for xy in outline], axis=1)
        for alpha, which in ((1.0, has_value), (0.35, ~has_value)):
            drawn = corners[which & (shares[:, index] > 0)]
            if not len(drawn):
                continue
            columns = PathPatch(
                Path.make_compound_path_from_polys(drawn),
                facecolor=domain_look(index).colour,
                hatch=domain_look(index).hatch,
                edgecolor="white",  # of the hatching
                linewidth=0,
                alpha=alpha,
                antialiased=False,
            )
            axes.add_patch(columns)


def samples(summary: StudySummary) -> Picture | None:
    """The k values of every trial, best trial first, so that noise and differences can be compared by eye.

    None before there are two values to compare.
    """
    sign = summary.direction.to_loss
    seen_trials = observed(summary)
    whole = [t for t in seen_trials if is_whole(t)] or seen_trials  # values on fewer rows are on another scale
    trials = sorted(whole, key=lambda t: (sign(value_of(t)), t.number))
    if not trials or (len(trials) == 1 and summary.k == 1):
        return None
    figure, axes = _canvas(4.2)
    limits = _limits([s.value for t in trials for s in t.samples if s.value is not None], [])
    places = {t.number: i for i, t in enumerate(trials)}
    for colour, group in _by_colour(trials):
        points = [(places[t.number], s.value) for t in group for s in t.samples if s.value is not None]
        ranges = np.clip([_range(t) for t in group], *limits)
        axes.vlines([places[t.number] for t in group], ranges[:, 0], ranges[:, 1], color=colour, lw=1.4, alpha=0.5)
        _points(axes, points, limits, colour=colour, size=30)
        seen = [(places[t.number], value_of(t)) for t in group]
        _points(axes, seen, limits, colour=colour, filled=True, marker="D", size=44)
    short = [t for t in trials if t.observation and any(s.failed for s in t.samples)]
    _crosses(axes, [places[t.number] for t in short])
    axes.set_xlim(-0.6, max(len(trials), 6) - 0.4)
    size = 9 if len(trials) <= 24 else 7 if len(trials) <= 45 else 6
    every = -(-len(trials) // MOST_NAMES)
    named = trials[::every]
    axes.set_xticks(range(0, len(trials), every), [t.name for t in named], rotation=90, fontsize=size)
    axes.set_xlabel("trials, the best observation first", color=INK)
    _value_axis(axes, summary, limits)
    what = f"observation: the best of {k_text(summary)}" if summary.k > 1 else "observation"
    handles: list[Line2D | Patch] = [_marker("D", _START, what, filled=True, size=7)]
    if summary.k > 1:
        handles.append(_marker("o", _START, "the other samples", size=6))
    if any(t.kind == "search" for t in trials):
        handles += [Patch(facecolor=_START, label="start design"), Patch(facecolor=_SEARCH, label="Bayesian search")]
    if short:
        handles.append(_marker("x", BASE, "a sample of this trial failed", filled=True, size=7))
    handles += _beyond_handle(trials, limits)
    _legend_below(figure, handles)
    return _picture(
        figure,
        name="samples",
        title=_samples_title(summary),
        alt=f"The values of all samples of {plural(len(trials), 'trial')}, ordered by observation, best first.",
    )


def _samples_title(summary: StudySummary) -> str:
    if summary.k == 1:
        return "The value of every trial"
    return "The values of every trial" if summary.k_bounds else f"The {summary.k} values of every trial"


def confirmed(summary: StudySummary) -> Picture | None:
    """Fresh-seed values of the finalists and the uniform ratio beside the untouched model; None without any."""
    values, rows = value_format(summary), _confirm_rows(summary)
    if not rows:
        return None
    trained = [v for _, m, seen, _ in rows for v in (*m.values, *([] if seen is None else [seen]))]
    base = base_measurement(summary)
    if base:
        rows = [*rows, ("untouched model", base, None, BASE)]
    figure, axes = _canvas(0.66 * len(rows) + 1.5)
    limits = _limits(trained, [base.mean] if base else [], robust=False)
    axes.set_xlim(*limits)
    for y, (_, measured, seen, colour) in enumerate(reversed(rows)):
        _measured_row(axes, y, measured, seen, colour, values, limits)
    axes.set_yticks(range(len(rows)), [label for label, *_ in reversed(rows)], fontsize=10)
    axes.set_ylim(-0.55, len(rows) - 0.3)
    axes.set_xlabel(f"{_escaped(summary.feedback_name)} ({_side(summary.direction)})", color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(7))
    axes.ticklabel_format(axis="x", useOffset=False)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color="#d0d7de", lw=0.7)
    handles = [
        _marker("D", _START, "mean ± standard error", filled=True, size=7),
        _marker("o", _START, "one repeat with a fresh seed", size=7),
    ]
    if any(seen is not None for _, _, seen, _ in rows):
        handles.append(_marker("*", INK, "what the search observed", size=11))
    _legend_below(figure, handles)
    return _picture(
        figure,
        name="confirm",
        title="Measured again with fresh seeds",
        alt="; ".join(f"{label}: mean {values(m.mean)}" for label, m, _, _ in rows) + ".",
    )


def front(summary: StudySummary) -> Picture | None:
    """Two metrics that are traded off, a panel for every further one; None without a front, or without two points."""
    config, objective = summary.config, objective_of(summary.config)
    if config is None or objective is None or not objective.pareto:
        return None
    trials = [t for t in observed(summary) if is_whole(t)]
    values = [metrics_of(summary, t, fresh=False) for t in trials]
    best = on_front(config, values)
    if sum(all(name in one for name in objective.pareto) for one in values) < 2:
        return None
    first, *others = objective.pareto
    figure = Figure(figsize=(WIDTH, 4.4), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, min(len(others), 3), squeeze=False).ravel()
    for axes, other in zip(panels, others, strict=False):
        _front_panel(axes, summary, config, first, other, trials, values, best)
    handles = [
        _marker("o", _SEARCH, "on the front: nothing is better in everything", filled=True, size=8),
        _marker("o", _START, "other trials", size=6),
        _marker("*", INK, "the compromise to take", size=12),
    ]
    base = base_metrics(summary)
    if base:
        handles.append(_marker("D", BASE, "untouched model", filled=True, size=7))
    _legend_below(figure, handles, n_columns=2)
    named = [t.name for t, is_best in zip(trials, best, strict=True) if is_best]
    return _picture(
        figure,
        name="front",
        title="What is traded for what",
        alt=f"{join_words([first, *others])} of {plural(len(trials), 'trial')}; on the front are "
        f"{join_words(named) if named else 'none'}.",
    )


def _front_panel(
    axes: Axes,
    summary: StudySummary,
    config: StudyConfig,
    x_name: str,
    y_name: str,
    trials: Sequence[Trial],
    values: Sequence[Mapping[str, float]],
    best: Sequence[bool],
) -> None:
    _plain_axes(axes)
    axes.grid(axis="x", color="#d0d7de", lw=0.7)
    chosen, base, by_metric = chosen_trial(summary), base_metrics(summary), directions(config)
    known = [i for i, one in enumerate(values) if x_name in one and y_name in one]
    rest = [i for i in known if not best[i]]
    axes.scatter(
        [values[i][x_name] for i in rest], [values[i][y_name] for i in rest], s=34, facecolors="white",
        edgecolors=_START, linewidths=1.4, zorder=3,
    )  # fmt: skip
    ahead = sorted((i for i in known if best[i]), key=lambda i: values[i][x_name])
    x, y = [values[i][x_name] for i in ahead], [values[i][y_name] for i in ahead]
    axes.plot(x, y, color=_SEARCH, lw=1.2, ls=(0, (2, 2)), zorder=2)
    axes.scatter(x, y, s=58, color=_SEARCH, zorder=4)
    for i in ahead[:12]:
        axes.annotate(
            trials[i].name, (values[i][x_name], values[i][y_name]), xytext=(5, 5), textcoords="offset points",
            fontsize=8.5, color=INK, zorder=6,
        )  # fmt: skip
    for i in known:
        if trials[i] is chosen:
            at = values[i][x_name], values[i][y_name]
            axes.scatter(*at, s=210, marker="*", color="white", edgecolors=INK, linewidths=1.3, zorder=5)
    if x_name in base and y_name in base:
        axes.scatter(base[x_name], base[y_name], s=50, marker="D", color=BASE, zorder=4)
    for one in judged(config, {}, base):
        if one.bound is None:
            continue
        if one.requirement.metric == x_name:
            axes.axvline(one.bound, color=INK, lw=1.0, ls=(0, (5, 3)), zorder=1)
        elif one.requirement.metric == y_name:
            axes.axhline(one.bound, color=INK, lw=1.0, ls=(0, (5, 3)), zorder=1)
    axes.set_xlabel(f"{_escaped(x_name, most=30)}\n({_side(by_metric[x_name])})", color=INK)
    axes.set_ylabel(f"{_escaped(y_name, most=30)}\n({_side(by_metric[y_name])})", color=INK)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(6))
    axes.ticklabel_format(useOffset=False)
    axes.margins(0.1)


def scores(summary: StudySummary) -> Picture | None:
    """The scores of every domain's rows, a panel each with a scale of its own; None where no domain has any."""
    drawn = [(i, d, shape) for i, d in enumerate(summary.domains) if d.scores and (shape := d.scores["histogram"])]
    if not drawn:
        return None
    n_columns = min(3, len(drawn))
    n_lines = -(-len(drawn) // n_columns)
    figure = Figure(figsize=(WIDTH, 2.3 * n_lines + 0.5), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(n_lines, n_columns, squeeze=False).ravel()
    for axes, (index, domain, shape) in zip(panels, drawn, strict=False):
        _score_panel(axes, domain.name, shape, domain_look(index))
    for axes in panels[len(drawn) :]:
        axes.set_axis_off()
    figure.supxlabel("score of a row (higher: more helpful)", color=INK, fontsize=10)
    figure.supylabel("rows", color=INK, fontsize=10)
    return _picture(
        figure,
        name="scores",
        title="The scores of the rows",
        alt=f"A histogram of the scores of {plural(len(drawn), 'domain')}: {', '.join(d.name for _, d, _ in drawn)}.",
    )


def _score_panel(axes: Axes, name: str, shape: Histogram, look: DomainLook) -> None:
    """One histogram; the numbers in its corners are rows beyond its edges, and the black line is a score of 0."""
    edges = np.asarray(shape["edges"])
    _plain_axes(axes)
    axes.bar(
        edges[:-1],
        shape["counts"],
        np.diff(edges),
        align="edge",
        color=look.colour,
        hatch=look.hatch,
        edgecolor="white",
        linewidth=0.4,
    )
    if edges[0] <= 0 <= edges[-1]:
        axes.axvline(0, color=INK, lw=0.8, zorder=3)
    beyond = [f"← {shape['n_below']:,}" * (shape["n_below"] > 0), f"{shape['n_above']:,} →" * (shape["n_above"] > 0)]
    for place, side, text in zip((0, 1), ("left", "right"), beyond, strict=True):
        axes.text(place, 1.01, text, transform=axes.transAxes, ha=side, va="bottom", fontsize=8, color=MUTED)
    axes.set_title(_escaped(name, most=22), fontsize=10.5, color=INK)
    axes.set_xlim(edges[0], edges[-1])
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.ticklabel_format(axis="x", scilimits=(-3, 4), useMathText=True, useOffset=False)
    axes.tick_params(labelsize=8.5)
    axes.xaxis.offsetText.set_fontsize(8.5)


def _measured_row(
    axes: Axes,
    y: float,
    measured: Measurement,
    seen: float | None,
    colour: str,
    values: ValueFormat,
    limits: tuple[float, float],
) -> None:
    """Mean, standard error, repeats (just below, so that the bar's ends stay visible) and what the search saw."""
    mean, error = measured.mean, measured.standard_error
    text = values(mean) + (f" ± {values.difference(error)}" if error else "")
    if not limits[0] <= mean <= limits[1]:
        right = mean > limits[1]
        axes.plot(limits[right], y, marker=">" if right else "<", ms=9, color=colour, clip_on=False, zorder=4)
        label = f"{text} →" if right else f"← {text}"
        axes.annotate(
            label, (limits[right], y), xytext=(-10 if right else 10, 0), textcoords="offset points",
            ha="right" if right else "left", va="center", fontsize=9.5, color=INK,
        )  # fmt: skip
        return
    if error:
        axes.errorbar(mean, y, xerr=error, color=colour, lw=2, capsize=5, capthick=2, zorder=4)
    if measured.trained or measured.n > 1:
        dots = np.clip(measured.values, *limits)
        axes.scatter(
            dots, [y - 0.2] * measured.n, s=34, facecolors="white", edgecolors=colour, linewidths=1.5, zorder=3
        )
    axes.scatter([mean], [y], marker="D", s=52, color=colour, zorder=5)
    if seen is not None:
        axes.scatter([seen], [y - 0.2], marker="*", s=120, color="white", edgecolors=INK, linewidths=1.2, zorder=6)
    axes.annotate(text, (mean, y), xytext=(0, 8), textcoords="offset points", ha="center", fontsize=9.5, color=INK)


def _confirm_rows(summary: StudySummary) -> list[tuple[str, Measurement, float | None, str]]:
    """(label, fresh values, observed value, colour): the chosen trial first, the uniform ratio last."""
    by_name = {t.name: t for t in searched(summary)}
    best, uniform = chosen_trial(summary), uniform_trial(summary)
    names = list(dict.fromkeys(confirmed_name(t) for t in confirmations(summary)))
    names.sort(key=lambda n: (bool(uniform) and n == uniform.name, not (best and n == best.name), n))  # type: ignore[union-attr]
    rows = []
    for name in names:
        again, trial = confirmation_of(summary, name), by_name.get(name)
        if again is None:
            continue
        is_best = best is not None and name == best.name
        is_uniform = uniform is not None and name == uniform.name
        label = f"uniform ratio ({name})" if is_uniform else f"best ratio ({name})" if is_best else f"finalist {name}"
        label += ", the best" if is_best and is_uniform else ""
        label += ", not searched" if any(is_anywhere(t) and t.name == name for t in confirmations(summary)) else ""
        seen = value_of(trial) if trial and trial.observation else None
        rows.append((label, again, seen, UNIFORM if is_uniform else _SEARCH if is_best else _START))
    return rows


def _canvas(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _plain_axes(axes)
    return figure, axes


def _plain_axes(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(MUTED)
    axes.tick_params(colors=INK, labelsize=10)
    axes.grid(axis="y", color="#d0d7de", lw=0.7)
    axes.set_axisbelow(True)


def _picture(figure: Figure, *, name: str, title: str, alt: str) -> Picture:
    buffer = io.BytesIO()
    # Without the library's name and version in the file, the same study gives the same bytes.
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return Picture(name=name, title=title, alt=alt, png=buffer.getvalue())


def _limits(values: Sequence[float], levels: Sequence[float], *, robust: bool = True) -> tuple[float, float]:
    """A value axis that shows all values, or all but far outliers, and the lines that lie within or near them."""
    low, high = np.quantile(values, [0.1, 0.9]) if robust else (min(values), max(values))
    width = high - low or (max(values) - min(values)) or abs(values[0]) * 0.1 or 1.0
    near = [v for v in [*values, *levels] if low - _LOOSE * width <= v <= high + _LOOSE * width]
    bottom, top = min(near), max(near)
    margin = 0.08 * (top - bottom) or 0.1 * width
    return bottom - margin, top + margin


def _points(
    axes: Axes,
    points: Sequence[tuple[float, float]],
    limits: tuple[float, float],
    *,
    colour: str,
    filled: bool = False,
    marker: str = "o",
    size: float = 26,
) -> None:
    """Dots at (trial, value); those beyond the axis become arrows at its edge."""
    if not points:
        return
    x, y = np.asarray(points, dtype=float).T
    face, order = (colour, 5) if filled else ("white", 3)
    for shape, here in (
        ("^", y > limits[1]),
        ("v", y < limits[0]),
        (marker, (limits[0] <= y) & (y <= limits[1])),
    ):
        axes.scatter(
            x[here], np.clip(y[here], *limits), s=size, marker=shape, facecolors=face, edgecolors=colour,
            linewidths=1.2, zorder=order, clip_on=False,
        )  # fmt: skip


def _by_colour(trials: Sequence[Trial]) -> list[tuple[str, list[Trial]]]:
    """The trials of the start design and those of the search, each with its colour; a group without any is left out."""
    groups = [(c, [t for t in trials if t.kind == kind]) for kind, c in (("start", _START), ("search", _SEARCH))]
    return [(colour, group) for colour, group in groups if group]


def _range(trial: Trial) -> tuple[float, float]:
    values = [s.value for s in trial.samples if s.value is not None]
    return min(values), max(values)


def _crosses(axes: Axes, places: Sequence[float]) -> None:
    """What failed has no value to draw: a cross at the foot of the axis says that it was tried."""
    foot = axes.get_xaxis_transform()
    axes.plot(places, [0.025] * len(places), marker="x", color=BASE, ms=7, mew=2, transform=foot, ls="")


def _beyond_handle(trials: Sequence[Trial], limits: tuple[float, float]) -> list[Line2D]:
    values = [s.value for t in trials for s in t.samples if s.value is not None]
    above, below = sum(v > limits[1] for v in values), sum(v < limits[0] for v in values)
    handles = []
    if above:
        handles.append(_marker("^", _START, f"{above} above the axis"))
    if below:
        handles.append(_marker("v", _START, f"{below} below the axis"))
    return handles


def _mark_start_design(axes: Axes, trials: Sequence[Trial], *, shade: bool = True) -> None:
    """Set the start design apart from the Bayesian trials, where there are both."""
    n_start = sum(t.kind == "start" for t in trials)
    if not 0 < n_start < len(trials):
        return
    if shade:
        axes.axvspan(-0.6, n_start - 0.5, color="#f0f2f5", zorder=0, lw=0)
    else:
        axes.axvline(n_start - 0.5, color=INK, lw=1.2, linestyle=(0, (4, 3)), ymax=1.0, zorder=6)
    labels = [(n_start - 0.5, " Bayesian search")]
    if n_start / max(len(trials), 6) > 0.14:  # room for the words
        labels.append((-0.6, " start design"))
    for x, text in labels:
        height = 1.01 if shade else 1.07
        axes.text(x, height, text, transform=axes.get_xaxis_transform(), va="bottom", fontsize=9, color=MUTED)


def _trial_axis(axes: Axes, trials: Sequence[Trial]) -> None:
    """Numbers as ticks, not more than fit."""
    every = max(1, -(-len(trials) // 20))
    places = range(0, len(trials), every)
    axes.set_xticks(list(places), [str(trials[i].number) for i in places])
    axes.set_xlabel("trial", color=INK)


def _value_axis(axes: Axes, summary: StudySummary, limits: tuple[float, float]) -> None:
    axes.set_ylim(*limits)
    axes.set_ylabel(f"{_escaped(summary.feedback_name, most=40)}\n({_side(summary.direction)})", color=INK)
    axes.yaxis.set_major_locator(MaxNLocator(7))
    axes.ticklabel_format(axis="y", useOffset=False)


def _side(direction: Direction) -> str:
    arrow = "↓" if direction is Direction.MINIMIZE else "↑"
    return f"{arrow} {better_is(direction)}"


def _marker(marker: str, colour: str, label: str, *, filled: bool = False, size: float = 6) -> Line2D:
    face = colour if filled else "white"
    return Line2D([], [], ls="", marker=marker, mfc=face, mec=colour, mew=1.4, ms=size, label=label)


def _dot_handles(summary: StudySummary, trials: Sequence[Trial], limits: tuple[float, float]) -> list[Line2D]:
    handles = []
    for kind, colour, where in (("start", _START, "start design"), ("search", _SEARCH, "Bayesian search")):
        if any(t.kind == kind for t in trials):
            handles.append(_marker("o", colour, f"observation, {where}", filled=True))
    if any(t.observation and not is_whole(t) for t in trials):
        handles.append(_marker("s", _START, "on fewer rows: another scale"))
    if summary.k > 1:
        handles.append(_marker("o", _START, "other samples"))
    if any(t.status == "failed" for t in trials):
        handles.append(_marker("x", BASE, "failed trial", filled=True, size=7))
    return handles + _beyond_handle(trials, limits)


def _legend_below(figure: Figure, handles: Sequence[Line2D | Patch], *, n_columns: int = 3) -> None:
    figure.legend(
        handles=list(handles),
        loc="outside lower center",
        ncols=min(len(handles), n_columns),
        frameon=False,
        fontsize=9.5,
    )


def _escaped(text: str, *, most: int = 60) -> str:
    """Plain text for matplotlib, which reads a pair of dollar signs as a formula."""
    short = text if len(text) <= most else text[: most - 1] + "…"
    return short.replace("$", r"\$")
