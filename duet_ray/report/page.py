"""The report: one self-contained HTML page, and the figures beside it as PNG.

Everything is inside the page (CSS, figures as data URIs, no script), so it can be mailed, printed and opened years
later. The template holds the words and the layout; this module only prepares plain values for it. Jinja escapes
everything; nothing is marked safe but the style sheet values that `palette.py` defines.
"""

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from duet_ray.files import write_file
from duet_ray.records import Ratio, SampleResult, Trial
from duet_ray.report.palette import domain_look
from duet_ray.report.scores import ScoreSummary, ShownRow, seconds_spent, shortened
from duet_ray.report.summary import (
    StudySummary,
    base_trial,
    best_sample,
    chosen_trial,
    confirmation_of,
    confirmations,
    confirmed_name,
    failure_reasons,
    measurement_of,
    metric_means,
    n_ended,
    n_failed,
    n_stopped,
    state,
    uniform_trial,
    value_format,
)
from duet_ray.report.verdict import verdict
from duet_ray.report.wording import better_is, duration, first_line, plural, ratio_text, share

_KINDS = {"base": "untouched model", "start": "start design", "search": "Bayesian", "confirm": "confirmation"}
_STATES = {
    "empty": "not started",
    "base_only": "running",
    "failed": "no value yet",
    "running": "not finished",
    "finished": "finished",
}


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One domain's part of a ratio bar."""

    name: str
    percent: float
    css: str


@dataclass(frozen=True, kw_only=True)
class TrialRow:
    """One line of the trial table, as text."""

    name: str
    kind: str
    method: str
    status: str
    segments: tuple[Segment, ...]
    ratio: str
    values: tuple[str, ...]
    observation: str
    used: str
    reasons: tuple[tuple[str, str], ...]
    """First line with how many samples it stopped, and the full text where there is more of it."""
    chosen: bool


@dataclass(frozen=True, kw_only=True)
class ShareRow:
    """One domain's line in the table of the best ratio."""

    name: str
    css: str
    percent: float
    share: str
    count: int
    uniform_count: int | None
    n_train: int | None


def write_report(summary: StudySummary, folder: Path) -> Path:
    """Write `folder/report.html` and `folder/figures/*.png`; each file appears whole or not at all.

    Returns:
        The path of the page.
    """
    from duet_ray.report.figures import draw_all  # matplotlib: only when something is drawn

    pictures = draw_all(summary)
    figures = folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        write_file(figures / f"{picture.name}.png", picture.png)
    shown = [
        {
            "title": p.title,
            "alt": p.alt,
            "name": p.name,
            "source": f"data:image/png;base64,{base64.b64encode(p.png).decode()}",
        }
        for p in pictures
    ]
    page = folder / "report.html"
    write_file(page, render(summary, shown).encode())
    return page


def render(summary: StudySummary, figures: list[dict[str, str]]) -> str:
    """The page as text.

    Args:
        summary: the study.
        figures: `title`, `alt`, `name` and `source` (a data URI) of each figure.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("duet_ray.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(**_context(summary), figures=figures)


def _context(summary: StudySummary) -> dict[str, Any]:
    best = chosen_trial(summary)
    sample = best_sample(best) if best else None
    values = value_format(summary)
    return {
        "study": summary,
        "verdict": verdict(summary),
        "direction": better_is(summary.direction),
        "state": _STATES[state(summary)],
        "facts": _facts(summary),
        "best": best,
        "best_is_uniform": best is not None and best is uniform_trial(summary),
        "best_ratio": ratio_text(best.ratio, summary.domain_names) if best and best.ratio else "",
        "best_value": values(sample.value) if sample and sample.value is not None else "",
        "shares": _shares(summary, best.ratio) if best and best.ratio else [],
        "sample": sample,
        "beside": _beside(summary, best),
        "trials": [_trial_row(summary, t, is_chosen=t is best) for t in summary.trials],
        "legend": [Segment(name=n, percent=0, css=domain_look(i).css) for i, n in enumerate(summary.domain_names)],
        "domains": [
            {"css": domain_look(i).css, "data": d, "worth": _worth(d.effective_sample_size, d.n_train)}
            for i, d in enumerate(summary.domains)
        ],
        "selection": _selection(summary),
    }


def _facts(summary: StudySummary) -> list[tuple[str, str]]:
    samples = [s for t in summary.trials for s in t.samples]
    trained = sum(s.train_seconds for s in samples)
    measured = sum(s.feedback_seconds for s in samples)
    failed = n_failed(summary)
    facts = [
        ("Trials", f"{n_ended(summary)} of {summary.n_planned}" + (f", {failed} failed" if failed else "")),
        ("Samples per trial (k)", f"{summary.k}"),
        ("Rows per mixture", f"{summary.n_rows:,}"),
        ("Domains", f"{len(summary.domain_names)}"),
        ("Feedback", f"{summary.feedback_name} ({better_is(summary.direction)})"),
    ]
    if summary.started:
        facts.append(("Started", f"{summary.started:%Y-%m-%d %H:%M} {summary.started.tzname() or ''}".strip()))
    if summary.seconds is not None:
        facts.append(("Time", duration(summary.seconds)))
    if trained or measured:
        facts.append(("Spent in workers", f"{duration(trained)} training, {duration(measured)} measuring"))
    return facts


def _shares(summary: StudySummary, ratio: Ratio) -> list[ShareRow]:
    """The best ratio, domain by domain, the largest share first."""
    uniform = uniform_trial(summary)
    even = uniform.ratio if uniform else None
    available = {d.name: d.n_train for d in summary.domains}
    order = sorted(range(ratio.n_domains), key=lambda i: (-ratio.counts[i], i))
    return [
        ShareRow(
            name=summary.domain_names[i],
            css=domain_look(i).css,
            percent=100 * ratio.counts[i] / ratio.n_rows,
            share=share(ratio.counts[i], ratio.n_rows),
            count=ratio.counts[i],
            uniform_count=even.counts[i] if even else None,
            n_train=available.get(summary.domain_names[i]),
        )
        for i in order
    ]


def _trial_row(summary: StudySummary, trial: Trial, *, is_chosen: bool) -> TrialRow:
    values = value_format(summary)
    return TrialRow(
        name=trial.name,
        kind=_KINDS[trial.kind],
        method=trial.method,
        status=trial.status,
        segments=_segments(summary, trial.ratio) if trial.ratio else (),
        ratio=ratio_text(trial.ratio, summary.domain_names, most=6) if trial.ratio else "",
        values=tuple(values(s.value) for s in trial.samples if s.value is not None),
        observation=_observation(summary, trial),
        used=_used(trial),
        reasons=_reasons(trial),
        chosen=is_chosen,
    )


def _used(trial: Trial) -> str:
    if not trial.samples:
        return ""
    stopped = f", {n_stopped(trial)} stopped early" if n_stopped(trial) else ""
    return f"{sum(s.ok for s in trial.samples)} of {len(trial.samples)}{stopped}"


def _reasons(trial: Trial) -> tuple[tuple[str, str], ...]:
    full = {first_line(s.reason): s.reason.strip() for s in trial.samples if s.failed and s.reason}
    return tuple(
        (f"{plural(n, 'sample')} failed: {line}", full[line] if full[line] != line else "")
        for line, n in failure_reasons([trial])
    )


def _observation(summary: StudySummary, trial: Trial) -> str:
    """The number that counts for this trial: its observation, or for a confirmation and the base its mean."""
    values = value_format(summary)
    if trial.kind == "confirm":
        again = measurement_of(trial.samples)
        if again is None:
            return ""
        error = f" ± {values.difference(again.standard_error)}" if again.standard_error else ""
        return f"mean {values(again.mean)}{error}"
    if trial.kind == "base":
        measured = measurement_of(trial.samples, trained=False)
        return values(measured.mean) if measured else ""
    return values(trial.observation.value) if trial.observation else ""


def _segments(summary: StudySummary, ratio: Ratio) -> tuple[Segment, ...]:
    return tuple(
        Segment(name=name, percent=100 * count / ratio.n_rows, css=domain_look(i).css)
        for i, (name, count) in enumerate(zip(summary.domain_names, ratio.counts, strict=True))
        if count
    )


def _beside(summary: StudySummary, best: Trial | None) -> dict[str, Any] | None:
    """The metrics measured beside the feedback, for the untouched model, the uniform and the best ratio."""
    base, uniform = base_trial(summary), uniform_trial(summary)
    columns = [
        ("untouched model", metric_means(base.samples) if base else {}),
        ("uniform ratio", metric_means(_measured_last(summary, uniform)) if uniform else {}),
    ]
    if best is not uniform:
        columns.append(("best ratio", metric_means(_measured_last(summary, best)) if best else {}))
    names = list(dict.fromkeys(name for _, means in columns for name in means))
    if not names:
        return None
    rows = [(name, [f"{means[name]:.4g}" if name in means else "–" for _, means in columns]) for name in names]
    return {"columns": [title for title, _ in columns], "rows": rows}


def _measured_last(summary: StudySummary, trial: Trial) -> list[SampleResult]:
    """The fresh-seed samples of a trial where there are any, else its own."""
    again = [s for t in confirmations(summary) if confirmed_name(t) == trial.name for s in t.samples]
    return again if confirmation_of(summary, trial.name) else list(trial.samples)


def _selection(summary: StudySummary) -> dict[str, Any] | None:
    """The scores of the domains that have any summary of them; None before there is one."""
    known = [(domain_look(i).css, d, d.scores) for i, d in enumerate(summary.domains) if d.scores]
    if not known:
        return None
    return {
        "methods": list(dict.fromkeys(scores["method"] for *_, scores in known)),
        "compares": any(scores["best"] or scores["histogram"] for *_, scores in known),
        "has_order": all(scores["has_order"] for *_, scores in known),
        "domains": [{"css": css, "name": d.name} | _scored_domain(scores) for css, d, scores in known],
    }


def _scored_domain(scores: ScoreSummary) -> dict[str, Any]:
    low, _, middle, _, high = [f"{q:.3g}" for q in scores["quantiles"]] if scores["quantiles"] else ["–"] * 5
    seconds = seconds_spent(scores["details"])
    n_best, n_worst = len(scores["best"]), len(scores["worst"])
    if scores["has_order"]:
        titles = (
            f"The first {n_best} of the order",
            f"The last {n_worst} of the {scores['n_drawable']:,} that can be drawn",
        )
    else:
        titles = f"The {n_best} best", f"The {n_worst} worst, the lowest first"
    groups = zip(titles, (scores["best"], scores["worst"]), strict=True)
    return {
        "worth": f"{scores['n_drawable']:,} of {scores['n_rows']:,}"
        if scores["has_order"]
        else _worth(scores["effective_sample_size"], scores["n_rows"]),
        "lowest": low,
        "median": middle,
        "highest": high,
        "time": duration(seconds) if seconds is not None else "–",
        "details": [
            (name.replace("_", " "), "is not finite" if value is None else f"{value:.4g}")
            for name, value in scores["details"].items()
            if not name.endswith("_seconds")
        ],
        "has_order": scores["has_order"],
        "groups": [(title, [_shown_row(row) for row in rows]) for title, rows in groups if rows],
    }


def _shown_row(row: ShownRow) -> dict[str, str]:
    short = shortened(row["prompt"], row["completion"])
    full = f"{row['prompt']}\n→ {row['completion']}" if row["prompt"] else row["completion"]
    if row["place"] is not None:
        chance = f"{row['place']:,}"
    else:
        chance = _times(row["times_uniform"])
    return {
        "row": f"{row['row']:,}",
        "score": "–" if row["score"] is None else f"{row['score']:.3g}",
        "chance": chance,
        "where": f"{row['source'].rsplit('/', 1)[-1]}:{row['line']}",
        "source": row["source"],
        "short": short,
        "full": "" if " ".join(full.split()) == short else full,
    }


def _times(times: float | None) -> str:
    """How much likelier than uniform: `2.4`, `0.013`, `never`."""
    if times is None:
        return "–"
    return "never" if times == 0 else f"{times:,.0f}" if times >= 100 else f"{times:.2g}"


def _worth(effective: float | None, n_train: int) -> str:
    if effective is None:
        return "–"
    return f"{effective:,.0f} ({share(round(effective), n_train)})" if n_train else f"{effective:,.0f}"
