"""The figures of what the search has learned, as PNG bytes.

Everything that is told apart by colour is told apart by shape, hatch or place as well, so that a print in black and
white says the same: domains by their name, uncertainty by bars and bands, the better side by an arrow on the axis.
"""

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, PercentFormatter
from matplotlib.tri import Triangulation

from duet_ray.records import Direction, Ratio, Trial
from duet_ray.report.figures import (
    DPI,
    WIDTH,
    Picture,
    _escaped,
    _legend_below,
    _marker,
    _picture,
    _plain_axes,
    _side,
)
from duet_ray.report.palette import INK, MUTED, domain_look
from duet_ray.report.summary import StudySummary, is_whole, observed
from duet_ray.report.wording import better_is, join_words, plural
from duet_ray.search.insight import Calibration, Insight, Sensitivity, Slice

MOST_SLICES = 12
MOST_BARS = 24
_GRID = "#d0d7de"
_HEIGHT = np.sqrt(3) / 2
"""Of the triangle with sides of 1."""


def draw_insight(summary: StudySummary, insight: Insight) -> tuple[Picture, ...]:
    """Every figure that the insight has something to show for, in the order of the page."""
    drawn = (
        sensitivity(summary, insight),
        slices(summary, insight),
        ternary(summary, insight),
        calibrated(summary, insight),
    )
    return tuple(p for p in drawn if p)


def sensitivity(summary: StudySummary, insight: Insight) -> Picture | None:
    """Total effect and change of every domain, each with its 95 % interval; None without any."""
    shown = insight.sensitivities[:MOST_BARS]
    if not shown:
        return None
    figure, (left, right) = _panels(1, 2, 0.36 * len(shown) + 1.7)
    places = np.arange(len(shown))[::-1]
    for y, one in zip(places, shown, strict=True):
        look = domain_look(_index(summary, one.domain))
        left.barh(y, one.total, 0.66, color=look.colour, hatch=look.hatch, edgecolor="white", lw=0.4, zorder=2)
        _whisker(left, y, one.total, one.total_interval)
        sure = _is_sure(one)
        right.plot(
            one.change, y, marker="D" if sure else "o", ms=7.5, mfc=look.colour if sure else "white",
            mec=look.colour, mew=1.8, ls="", zorder=4,
        )  # fmt: skip
        _whisker(right, y, None, one.change_interval)
    left.set_yticks(places, [_escaped(one.domain, most=24) for one in shown], fontsize=10)
    right.set_yticks(places, [""] * len(shown))
    left.set_xlim(0, 1)
    left.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    left.set_xlabel("share of the variance over all ratios\n(total effect)", color=INK)
    right.axvline(0, color=INK, lw=1.0, zorder=1)
    right.set_xlabel(
        f"change of {_escaped(summary.feedback_name, most=28)} from the\n"
        f"smallest to the largest share ({_side(summary.direction)})",
        color=INK,
    )
    right.xaxis.set_major_locator(MaxNLocator(6))
    for axes in (left, right):
        axes.set_ylim(-0.6, len(shown) - 0.4)
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", color=_GRID, lw=0.7)
    _legend_below(
        figure,
        [
            Line2D([], [], color=INK, lw=1.6, label="95 % interval"),
            _marker("D", MUTED, "the interval excludes 0", filled=True, size=7),
            _marker("o", MUTED, "may be nothing", size=7),
        ],
    )
    first = shown[0]
    return _picture(
        figure,
        name="sensitivity",
        title="Which domains matter",
        alt=f"Total effect and change of {plural(len(shown), 'domain')} with 95 % intervals, the most sensitive first: "
        f"{', '.join(f'{one.domain} {_percent(one.total)}' for one in shown[:6])}. From its smallest to its largest "
        f"share {first.domain} changes the value by {first.change:+.3g}.",
    )


def slices(summary: StudySummary, insight: Insight) -> Picture | None:
    """The posterior along every domain's share, a panel each on one scale; None without any."""
    shown = insight.slices[:MOST_SLICES]
    if not shown:
        return None
    n_columns = min(len(shown), 4 if len(shown) > 9 or len(shown) == 4 else 3)
    n_lines = -(-len(shown) // n_columns)
    figure, panels = _panels(n_lines, n_columns, 2.25 * n_lines + 0.9, share_y=True)
    tried = [t.ratio for t in observed(summary) if t.ratio is not None and is_whole(t)]
    for axes, one in zip(panels, shown, strict=False):
        _slice_panel(axes, one, summary, insight, tried)
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    low, high = min(min(s.low) for s in shown), max(max(s.high) for s in shown)
    margin = 0.06 * (high - low) or 1.0
    panels[0].set_ylim(low - margin, high + margin)
    figure.supylabel(f"{_escaped(summary.feedback_name, most=36)} ({_side(summary.direction)})", color=INK, fontsize=10)
    # A label below would lie on the legend: the layout knows only of a title.
    figure.suptitle("over the share of one domain, the others in the recommended proportions", color=MUTED, fontsize=10)
    _legend_below(
        figure,
        [
            Line2D([], [], color=INK, lw=2, label="expected"),
            Patch(facecolor=MUTED, alpha=0.3, label="95 % band"),
            Line2D([], [], color=INK, lw=1.3, ls=(0, (4, 3)), label="recommended share"),
            Line2D([], [], color=MUTED, marker="|", ms=8, mew=1.2, ls="", label="trained"),
        ],
        n_columns=4,
    )
    return _picture(
        figure,
        name="slices",
        title="The value along each domain's share",
        alt=f"Expected value and 95 % band along the share of {plural(len(shown), 'domain')}: "
        + "; ".join(_slice_words(one, summary.direction) for one in shown)
        + ".",
    )


def ternary(summary: StudySummary, insight: Insight) -> Picture | None:
    """The posterior over the ratios of three domains, and how unsure it is; None for any other number."""
    grid = insight.ternary
    if grid is None:
        return None
    figure, panels = _panels(1, 2, 3.9)
    shares = np.array(grid.shares)
    points = _flat(shares)
    triangles = _triangles(points)
    if triangles is None:
        return None
    tried = [t for t in observed(summary) if t.ratio is not None and is_whole(t)]
    mean, sd = np.array(grid.mean), np.array(grid.sd)
    # Light is good in both: what is dark should be kept away from, or is not known.
    dark_is_high = "cividis_r" if summary.direction is Direction.MINIMIZE else "cividis"
    panes = ((panels[0], mean, dark_is_high, "expected"), (panels[1], sd, "Greys", "standard deviation"))
    for axes, values, colours, what in panes:
        _ternary_panel(figure, axes, triangles, values, colours, labelled=axes is panels[0])
        _frame(axes, insight, points)
        axes.set_title(f"{_escaped(summary.feedback_name, most=24)}, {what}", fontsize=10.5, color=INK, pad=4)
        _tried_points(axes, tried, insight)
    _legend_below(
        figure,
        [_marker("o", INK, "a trial", size=6), _marker("*", INK, "recommended", size=13)],
    )
    best = grid.shares[int(np.argmin([summary.direction.to_loss(v) for v in grid.mean]))]
    return _picture(
        figure,
        name="ternary",
        title="All ratios of the three domains",
        alt=f"Two triangles over the shares of {join_words(insight.domains)}, the expected value and its standard "
        f"deviation, with {plural(len(tried), 'trial')}; {better_is(summary.direction)}, and the best expected value "
        f"is at {', '.join(f'{name} {_percent(share)}' for name, share in zip(insight.domains, best, strict=True))}.",
    )


def calibrated(summary: StudySummary, insight: Insight) -> Picture | None:
    """Every observation against its prediction from the others; None for too few observations."""
    found = insight.calibration
    if found is None:
        return None
    figure, (left, right) = _panels(1, 2, 4.0)
    observed_values, predicted, sd = map(np.array, (found.observed, found.predicted, found.sd))
    left.errorbar(
        predicted, observed_values, xerr=1.96 * sd, fmt="o", ms=5, mfc="white", mec=INK, mew=1.3, ecolor="#b6bcc4",
        elinewidth=1.2, zorder=3,
    )  # fmt: skip
    both = np.concatenate([observed_values, predicted])
    margin = 0.08 * np.ptp(both) or 1.0
    ends = (both.min() - margin, both.max() + margin)
    left.plot(ends, ends, color=INK, lw=1.2, ls=(0, (4, 3)), zorder=2)
    left.set_ylim(*ends)
    reach = max(ends[1] - both.min(), float(np.quantile(1.96 * sd, 0.5)))
    left.set_xlim(min(ends[0], predicted.min() - reach), max(ends[1], predicted.max() + reach))
    left.set_xlabel("predicted from the others, with its 95 % interval", color=INK)
    left.set_ylabel(f"observed {_escaped(summary.feedback_name, most=30)}", color=INK)
    for axis in (left.xaxis, left.yaxis):
        axis.set_major_locator(MaxNLocator(5))
    left.ticklabel_format(useOffset=False)
    _residual_panel(right, found)
    return _picture(
        figure,
        name="calibration",
        title="Can the model be trusted?",
        alt=f"Left: {plural(len(found.observed), 'observation')} against what the model predicts of each from the "
        f"others, about the diagonal. Right: their standardised residuals, {_percent(found.inside_50)} within the 50 % "
        f"band and {_percent(found.inside_95)} within the 95 % band. {found.sentence}",
    )


def _residual_panel(axes: Axes, found: Calibration) -> None:
    """The residuals in order of size, on the bands that should hold half and 95 % of them."""
    z = np.sort(np.array(found.residuals))
    axes.axhspan(-1.96, 1.96, color="#e4e8ec", lw=0, zorder=0)
    axes.axhspan(-0.6745, 0.6745, color="#c6cdd5", lw=0, zorder=0)
    axes.axhline(0, color=INK, lw=1.0)
    limit = max(2.6, 1.1 * float(np.abs(z).max()))
    limit = min(limit, 8.0)
    places = np.arange(len(z))
    outside = np.abs(z) > 1.96
    axes.plot(places[~outside], z[~outside], "o", ms=5, mfc="white", mec=INK, mew=1.3)
    axes.plot(places[outside], np.clip(z[outside], -limit, limit), "D", ms=6, mfc=INK, mec=INK)
    axes.set_ylim(-limit, limit)
    axes.set_xticks([])
    axes.set_xlabel("observations, by residual", color=INK)
    axes.set_ylabel("(observed − predicted) / sd", color=INK)
    axes.grid(visible=False)
    for level, share, should in ((0.6745, found.inside_50, 50), (1.96, found.inside_95, 95)):
        axes.annotate(
            f"{_percent(share)} within (should be {should} %)", (0, level), xycoords=("axes fraction", "data"),
            xytext=(5, -3), textcoords="offset points", va="top", fontsize=8.5, color=INK,
        )  # fmt: skip


def _slice_panel(axes: Axes, one: Slice, summary: StudySummary, insight: Insight, tried: list[Ratio]) -> None:
    index = _index(summary, one.domain)
    look = domain_look(index)
    axes.fill_between(
        one.shares, one.low, one.high, color=look.colour, alpha=0.28, lw=0, hatch=look.hatch or None, zorder=1
    )
    axes.plot(one.shares, one.low, color=look.colour, lw=0.8, zorder=2)
    axes.plot(one.shares, one.high, color=look.colour, lw=0.8, zorder=2)
    axes.plot(one.shares, one.mean, color=INK, lw=2, zorder=4)
    axes.axvline(insight.recommended[index], color=INK, lw=1.3, ls=(0, (4, 3)), zorder=3)
    trained = [ratio.values[index] for ratio in tried]
    axes.plot(
        trained, [0.03] * len(trained), "|", color=MUTED, ms=8, mew=1.2, transform=axes.get_xaxis_transform(), zorder=3
    )
    axes.set_title(_escaped(one.domain, most=24), fontsize=10.5, color=INK)
    pad = 0.02 * (one.shares[-1] - one.shares[0])
    axes.set_xlim(one.shares[0] - pad, one.shares[-1] + pad)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(
        PercentFormatter(1.0, decimals=0 if one.shares[-1] - one.shares[0] > 0.1 else 1, symbol=" %")
    )
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.tick_params(labelsize=8.5)


def _slice_words(one: Slice, direction: Direction) -> str:
    best = int(np.argmin([direction.to_loss(v) for v in one.mean]))
    return f"{one.domain} expects its best at {_percent(one.shares[best])}"


def _ternary_panel(
    figure: Figure, axes: Axes, triangles: Triangulation, values: np.ndarray, colours: str, *, labelled: bool
) -> None:
    span = float(np.ptp(values))
    levels = (
        MaxNLocator(9).tick_values(values.min(), values.max()) if span > 1e-12 * max(1, abs(values).max()) else None
    )
    if levels is None or len(levels) < 3:
        axes.text(0.5, _HEIGHT / 3, "the same everywhere", ha="center", color=MUTED, fontsize=9)
        axes.set_aspect("equal")
        return
    filled = axes.tricontourf(triangles, values, levels=levels, cmap=colours, alpha=0.9)
    lines = axes.tricontour(triangles, values, levels=levels, colors=INK, linewidths=0.6)
    if labelled:
        step = float(levels[1] - levels[0])
        decimals = next((d for d in range(7) if math.isclose(round(step, d), step, rel_tol=1e-6)), 6)
        for label in axes.clabel(lines, fontsize=7.5, fmt=f"%.{decimals}f", inline_spacing=2):
            label.set_path_effects([withStroke(linewidth=2.2, foreground="white")])  # readable on the dark levels
    bar = figure.colorbar(filled, ax=axes, shrink=0.72, pad=0.04)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)  # type: ignore[operator]


def _frame(axes: Axes, insight: Insight, points: np.ndarray) -> None:
    """The whole simplex around what may be trained, its corners named."""
    corners = _flat(np.eye(3))
    axes.plot(*np.vstack([corners, corners[:1]]).T, color=INK, lw=1.2, zorder=3)
    for d, (name, (x, y)) in enumerate(zip(insight.domains, corners, strict=True)):
        text = f"{_escaped(name, most=18)} 100 %"
        top = d == 2
        axes.text(
            x, y + (0.035 if top else -0.035), text, ha="center", va="bottom" if top else "top", fontsize=9, color=INK
        )
    axes.set_xlim(-0.14, 1.14)
    axes.set_ylim(-0.1, _HEIGHT + 0.08)
    axes.set_aspect("equal")
    axes.set_axis_off()


def _tried_points(axes: Axes, tried: list[Trial], insight: Insight) -> None:
    if tried:
        at = _flat(np.array([t.ratio.values for t in tried if t.ratio is not None]))
        axes.scatter(at[:, 0], at[:, 1], s=26, facecolors="white", edgecolors=INK, linewidths=1.2, zorder=5)
    star = _flat(np.array([insight.recommended]))
    axes.scatter(
        star[:, 0], star[:, 1], s=190, marker="*", facecolors="white", edgecolors=INK, linewidths=1.3, zorder=6
    )


def _flat(shares: np.ndarray) -> np.ndarray:
    """Shares of three domains as points of the plane: the first two below, the third on top."""
    return np.column_stack([shares[:, 1] + shares[:, 2] / 2, shares[:, 2] * _HEIGHT])


def _triangles(points: np.ndarray) -> Triangulation | None:
    """A triangulation without slivers along the edge; None where the points are on a line."""
    if np.linalg.matrix_rank(points - points[0], tol=1e-9) < 2:
        return None
    found = Triangulation(*points.T)
    a, b, c = (points[found.triangles[:, i]] for i in range(3))
    area = np.abs((b - a)[:, 0] * (c - a)[:, 1] - (b - a)[:, 1] * (c - a)[:, 0])
    found.set_mask(area < 1e-3 * np.median(area))
    return found


def _panels(n_lines: int, n_columns: int, height: float, *, share_y: bool = False) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(n_lines, n_columns, squeeze=False, sharey=share_y).ravel())
    for axes in panels:
        _plain_axes(axes)
    return figure, panels


def _whisker(axes: Axes, y: float, at: float | None, interval: tuple[float, float]) -> None:
    axes.plot(interval, [y, y], color=INK, lw=1.6, solid_capstyle="butt", zorder=3)
    axes.plot(interval, [y, y], "|", color=INK, ms=7, mew=1.6, zorder=3)
    if at is not None:
        axes.plot(at, y, "o", ms=4, color=INK, zorder=4)


def _is_sure(one: Sensitivity) -> bool:
    low, high = one.change_interval
    return low > 0 or high < 0


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _index(summary: StudySummary, name: str) -> int:
    return summary.domain_names.index(name)
