"""A study in the terminal: the table of `duet run` and `duet status`, and plain lines where there is no terminal.

The table fits into 80 columns: the ratio is a bar of blocks in the domains' colours (letters where the terminal shows
no colours), and whatever does not fit wraps instead of being cut. Names from the study are `Text`, never markup.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement as Width
from rich.segment import Segment
from rich.style import Style
from rich.table import Table
from rich.text import Text

from duet_ray.records import Ratio, Trial
from duet_ray.report.palette import domain_look
from duet_ray.report.summary import (
    StudySummary,
    base_measurement,
    best_trial,
    chosen_trial,
    confirmation_of,
    confirmed_name,
    failure_reasons,
    is_anywhere,
    k_text,
    measurement_of,
    n_stopped,
    own_text,
    past_runs_text,
    progress_text,
    running_best,
    searched,
    uniform_trial,
    value_format,
    value_of,
)
from duet_ray.report.wording import ValueFormat, better_is, duration, first_line, number, plural, ratio_text

BAR_CELLS = (12, 32)
"""Narrowest and widest bar."""
SHOWN_VALUES = 4
"""More values than this are shown as their range."""


class RatioBar:
    """A ratio as a bar of terminal cells, as wide as the table allows; `below` it there may be a few words."""

    def __init__(self, ratio: Ratio, *, faint: bool = False, below: str = "") -> None:
        self.ratio = ratio
        self.faint = faint
        self.below = below

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Width:
        return Width(*BAR_CELLS).with_maximum(options.max_width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        letters = shows_letters(console)
        for index, n in enumerate(cells(self.ratio, min(options.max_width, BAR_CELLS[1]))):
            if n:
                look = domain_look(index)
                style = None if letters else Style(color=look.colour, dim=self.faint)
                yield Segment((look.letter if letters else look.glyph) * n, style)
        if self.below:
            yield Segment.line()
            yield Text(self.below, style="dim")


def shows_letters(console: Console) -> bool:
    """Blocks differ by colour only, so a terminal without colours or without Unicode gets letters."""
    return console.color_system is None or not has_unicode(console)


def has_unicode(console: Console) -> bool:
    return console.encoding.lower().startswith("utf")


def cells(ratio: Ratio, width: int) -> tuple[int, ...]:
    """Split `width` cells over the domains by largest remainder; they sum to exactly `width`."""
    exact = ratio.values * width
    found = np.floor(exact).astype(int)
    order = np.argsort(-(exact - found), kind="stable")
    found[order[: width - int(found.sum())]] += 1
    return tuple(int(n) for n in found)


def trial_table(
    summary: StudySummary,
    *,
    in_flight: Mapping[str, str] | None = None,
    seconds_left: float | None = None,
    max_rows: int | None = None,
) -> RenderableType:
    """The whole study at a glance.

    Args:
        summary: the study as it is now.
        in_flight: what is going on right now: a sample's key (`t0003-s1`) or a trial's name → a few words.
        seconds_left: an estimate, if there is one.
        max_rows: show at most this many trials, the newest ones, besides the best one; None for all.
    """
    active = dict(in_flight or {})
    values = value_format(summary)
    best = chosen_trial(summary)
    best_at = {t.number: b for t, b in running_best(summary)}
    shown = _shown(summary, best, max_rows)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    table.add_column("trial", no_wrap=True)
    table.add_column("kind", no_wrap=True)
    table.add_column("ratio", min_width=BAR_CELLS[0])
    table.add_column(f"values (k = {k_text(summary)})" if summary.k > 1 else "value")
    table.add_column("observed", justify="right", no_wrap=True)
    table.add_column("best so far", justify="right", no_wrap=True)
    if len(shown) < len(summary.trials):
        table.add_row(Text("…"), Text(""), Text(plural(len(summary.trials) - len(shown), "more trial"), style="dim"))
    for trial in shown:
        mark = " ★" if trial is best else ""
        table.add_row(
            Text(trial.name + mark, style="bold" if mark else ""),
            Text(trial.kind),
            _tried(trial),
            _values(trial, active, values),
            _observed(trial, values),
            _best_cell(trial, best_at.get(trial.number), values),
        )
    return Group(
        _title(summary),
        Text(""),
        table,
        Text(""),
        _Legend(summary.domain_names),
        *_footer(summary, best, active, seconds_left, values),
    )


def _tried(trial: Trial) -> RenderableType:
    """What the trial tries: its ratio, and below it what else is its own."""
    if trial.ratio is None:
        return Text("untouched model")
    return RatioBar(trial.ratio, faint=trial.status != "done", below=own_text(trial))


def log_line(summary: StudySummary, trial: Trial) -> str:
    """One line for a trial that ended, for logs: no colours, no line breaks.

    `t0003 search bayesian:lcb | maths 60 %, chats 40 % | heldout_loss 2.113 (best of 2: 2.113 2.140) | best so far
    t0003 2.113 | 4/12`
    """
    values = value_format(summary)
    parts = [f"{trial.name} {trial.kind} {trial.method}".rstrip() if trial.kind != "base" else "base untouched model"]
    if trial.ratio:
        parts.append(
            ", ".join(p for p in (ratio_text(trial.ratio, summary.domain_names, most=5), own_text(trial)) if p)
        )
    parts.append(_outcome(summary, trial, values))
    if trial.kind in ("start", "search"):
        pairs = running_best(summary, up_to=trial.number)
        best = pairs[-1][1] if pairs else None
        if best:
            parts.append(f"best so far {best.name} {values(value_of(best))}")
        ended = [t.fidelity for t in searched(summary) if t.status != "pending" and t.number <= trial.number]
        parts.append(f"{number(sum(ended))}/{summary.n_planned}")
    return " | ".join(parts)


def _outcome(summary: StudySummary, trial: Trial, values: ValueFormat) -> str:
    got = [s.value for s in trial.samples if s.value is not None]
    reasons = [f"{plural(n, 'sample')} failed: {reason}" for reason, n in failure_reasons([trial])]
    if trial.status == "pending":
        return "pending"
    if not got:
        return "FAILED: " + ("; ".join(reasons) or "no sample has a value")
    listed = " ".join(values(v) for v in got)
    if trial.kind == "confirm":
        again = measurement_of(trial.samples)
        assert again is not None
        error = f" ± {values.difference(again.standard_error)}" if again.standard_error else ""
        whose = "the model's best of all ratios" if is_anywhere(trial) else f"{confirmed_name(trial)} again"
        text = f"{whose}: {summary.feedback_name} mean {values(again.mean)}{error} (of {again.n}: {listed})"
    elif trial.observation is None:
        text = f"{summary.feedback_name} {listed}" if trial.kind == "base" else f"FAILED: too few values ({listed})"
    elif trial.observation.k == 1:
        text = f"{summary.feedback_name} {values(value_of(trial))}"
    else:
        stopped = f"; {n_stopped(trial)} stopped early" if n_stopped(trial) else ""
        used = trial.observation.k_used
        text = f"{summary.feedback_name} {values(value_of(trial))} (best of {used}: {listed}{stopped})"
    return "; ".join([text, *reasons])


def _shown(summary: StudySummary, best: Trial | None, max_rows: int | None) -> Sequence[Trial]:
    if max_rows is None or len(summary.trials) <= max_rows:
        return summary.trials
    newest = summary.trials[-max(1, max_rows - 2) :]
    return [best, *newest] if best and best not in newest else newest


def _title(summary: StudySummary) -> Text:
    title = Text(summary.name, style="bold")
    title.append(f"   {summary.feedback_name}, {better_is(summary.direction)}", style="dim")
    return title


def _values(trial: Trial, active: dict[str, str], values: ValueFormat) -> Text:
    """The values so far, then what is going on, then why something failed; takes what it shows out of `active`."""
    got = [s.value for s in trial.samples if s.value is not None]
    reasons = [s.reason or "" for s in trial.samples if s.failed]
    if len(got) > SHOWN_VALUES:
        text = Text(f"{values(min(got))} … {values(max(got))} ({len(got)})")
    else:
        text = Text(" ".join(values(v) for v in got))
    if reasons:
        what = first_line(reasons[0], width=60) if not got else f"{len(reasons)} failed"
        text.append(f"{' ' if got else ''}{what}", style="red")
    if stopped := n_stopped(trial):
        text.append(f"{' ' if text.plain else ''}{stopped} stopped", style="dim")
    mine = [key for key in active if key == trial.name or key.startswith(f"{trial.name}-s")]
    stages = [f"{key.removeprefix(trial.name).lstrip('-')} {active.pop(key)}".strip() for key in mine]
    if stages:
        text.append(f"{' ' if text.plain else ''}{', '.join(stages)}", style="cyan")
    elif trial.status == "pending" and not got:
        text.append("waiting", style="dim")
    return text


def _observed(trial: Trial, values: ValueFormat) -> Text:
    if trial.status == "failed":
        return Text("failed", style="red")
    if trial.kind in ("base", "confirm"):
        measured = measurement_of(trial.samples)
        return Text(("mean " if trial.kind == "confirm" else "") + values(measured.mean)) if measured else Text("")
    if trial.observation is None:
        return Text("")
    return Text(values(value_of(trial)))


def _best_cell(trial: Trial, best: Trial | None, values: ValueFormat) -> Text:
    if best is None or trial.status == "pending":
        return Text("")
    return Text(values(value_of(best)), style="bold green" if best is trial else "dim")


def _said_of_best(summary: StudySummary, best: Trial, values: ValueFormat) -> str:
    expected = summary.posterior.get(best.number)
    if best is best_trial(summary) or expected is None:
        return f"best so far: {best.name} {values(value_of(best))}"
    error = f" ± {values.difference(expected[1])}"
    return f"recommended so far: {best.name} {values(value_of(best))}, expected {values(expected[0])}{error}"


class _Flow:
    """Pieces side by side, as many a line as fit; a piece is never broken unless it is wider than the line."""

    def __init__(self, pieces: Sequence[Text], *, gap: str) -> None:
        self.pieces = pieces
        self.gap = gap

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        line = Text()
        for piece in self.pieces:
            if line and line.cell_len + cell_len(self.gap) + piece.cell_len > options.max_width:
                yield line
                line = Text()
            line = Text.assemble(line, self.gap, piece) if line else piece
        yield line


class _Legend:
    """The domains with their blocks (or letters)."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        letters = shows_letters(console)
        looks = [(domain_look(i), name) for i, name in enumerate(self.names)]
        marks = [Text(d.letter) if letters else Text(d.glyph * 2, style=d.colour) for d, _ in looks]
        yield _Flow([Text.assemble(mark, f" {name}") for mark, (_, name) in zip(marks, looks, strict=True)], gap="  ")


def _footer(
    summary: StudySummary, best: Trial | None, active: dict[str, str], seconds_left: float | None, values: ValueFormat
) -> list[RenderableType]:
    lines: list[RenderableType] = []
    if best and best.ratio:
        again = confirmation_of(summary, best.name)
        said = (
            f"to take: {best.name}, mean {values(again.mean)} with fresh seeds"
            if again
            else _said_of_best(summary, best, values)
        )
        own = f", {own_text(best)}" if own_text(best) else ""
        lines.append(Text(f"{said}, {ratio_text(best.ratio, summary.domain_names)}{own}"))
    base, uniform = base_measurement(summary, as_trials=True), uniform_trial(summary)
    facts = [progress_text(summary)]
    if past := past_runs_text(summary):
        facts.append(past)
    if base:
        facts.append(f"untouched model {values(base.mean)}")
    if uniform and uniform.observation:
        facts.append(f"uniform ratio {values(value_of(uniform))}")
    if seconds_left is not None:
        facts.append(f"about {duration(seconds_left)} left")
    lines.append(_Flow([Text(fact) for fact in facts], gap=" · "))
    if active:
        lines.append(Text("now: " + ", ".join(f"{key} {stage}" for key, stage in active.items()), style="cyan"))
    return lines
