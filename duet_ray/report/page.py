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
from duet_ray.records import CONFIRM_BASE, Ratio, SampleResult, Trial
from duet_ray.report.curse import Promise, curse_sentences, promises, roles_text
from duet_ray.report.learned import Learned, learned
from duet_ray.report.objectives import directions, judged, objective_of, on_front, parts
from duet_ray.report.palette import domain_look
from duet_ray.report.scores import ScoreSummary, ShownRow, seconds_spent, shortened
from duet_ray.report.summary import (
    StudySummary,
    base_metrics,
    base_trial,
    best_sample,
    chosen_trial,
    confirmation_of,
    confirmations,
    confirmed_name,
    failure_reasons,
    finalists,
    is_anywhere,
    is_same_point,
    is_whole,
    k_text,
    measurement_of,
    metric_means,
    metrics_of,
    n_failed,
    n_stopped,
    observed,
    own_text,
    past_runs_text,
    progress_text,
    state,
    uniform_trial,
    value_format,
)
from duet_ray.report.verdict import verdict
from duet_ray.report.wording import ValueFormat, better_is, duration, first_line, plural, ratio_text, share

_KINDS = {"base": "untouched model", "start": "start design", "search": "Bayesian", "confirm": "confirmation"}
_STATES = {
    "empty": "not started",
    "base_only": "running",
    "failed": "no value yet",
    "running": "not finished",
    "finished": "finished",
}


_PLACES = {
    "selection": ("scores",),
    "objective": ("front",),
    "learned": ("sensitivity", "slices", "ternary", "calibration"),
}
"""Section → its figures; the others stand together."""
MOST_NAMED = 12


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
    own: str
    """Training settings and fidelity, where they are the trial's own."""
    values: tuple[str, ...]
    observation: str
    expected: str
    """What the search's model expects of it; empty without a posterior."""
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
    from duet_ray.report.insight_figures import draw_insight

    found = learned(summary, folder)
    pictures = [*draw_all(summary)]
    if found is not None and found.insight is not None:
        pictures += draw_insight(summary, found.insight)
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
    write_file(page, render(summary, shown, found).encode())
    return page


def render(summary: StudySummary, figures: list[dict[str, str]], found: Learned | None = None) -> str:
    """The page as text.

    Args:
        summary: the study.
        figures: `title`, `alt`, `name` and `source` (a data URI) of each figure.
        found: what the search has learned; None leaves its section out.
    """
    places = {name: place for place, names in _PLACES.items() for name in names}
    sorted_figures: dict[str, list[dict[str, str]]] = {place: [] for place in (*_PLACES, "general")}
    for figure in figures:
        sorted_figures[places.get(figure["name"], "general")].append(figure)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("duet_ray.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(**_context(summary, found), figures=sorted_figures)


def _context(summary: StudySummary, found: Learned | None = None) -> dict[str, Any]:
    best = chosen_trial(summary)
    sample = best_sample(best, summary.direction) if best else None
    values = value_format(summary)
    return {
        "study": summary,
        "verdict": verdict(summary),
        "direction": better_is(summary.direction),
        "state": _STATES[state(summary)],
        "facts": _facts(summary),
        "best": best,
        "best_is_uniform": best is not None and best is uniform_trial(summary),
        "best_own": own_text(best) if best else "",
        "best_is_anywhere": best is not None and is_anywhere(best),
        "k": k_text(summary),
        "promises": _promises(summary),
        "objective": _objective(summary, best),
        "learned": _learned(summary, found),
        "has_expected": bool(summary.posterior),
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
        (
            "Trials",
            progress_text(summary).removesuffix(" trials").removesuffix(" trial")
            + (f", {failed} failed" if failed else ""),
        ),
        ("Samples per trial (k)", k_text(summary)),
        ("Rows per mixture", f"{summary.n_rows:,}"),
        ("Domains", f"{len(summary.domain_names)}"),
        ("Feedback", f"{summary.feedback_name} ({better_is(summary.direction)})"),
    ]
    if past := past_runs_text(summary):
        facts.append(("Told beforehand", past.removesuffix(" were told").removesuffix(" was told")))
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
        kind="untouched model again" if trial.number == CONFIRM_BASE else _KINDS[trial.kind],
        method=trial.method,
        status=trial.status,
        segments=_segments(summary, trial.ratio) if trial.ratio else (),
        ratio=ratio_text(trial.ratio, summary.domain_names, most=6) if trial.ratio else "",
        own=own_text(trial),
        values=tuple(values(s.value) for s in trial.samples if s.value is not None),
        observation=_observation(summary, trial),
        expected=_with_sd(summary.posterior.get(trial.number), values),
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
    if best is None or uniform is None or not is_same_point(best, uniform):
        columns.append(("best ratio", metric_means(_measured_last(summary, best)) if best else {}))
    names = list(dict.fromkeys(name for _, means in columns for name in means))
    if not names:
        return None
    rows = [(name, [f"{means[name]:.4g}" if name in means else "–" for _, means in columns]) for name in names]
    return {"columns": [title for title, _ in columns], "rows": rows}


def _with_sd(expected: tuple[float, float] | None, values: ValueFormat) -> str:
    return f"{values(expected[0])} ± {values.difference(expected[1])}" if expected else ""


def _promises(summary: StudySummary) -> dict[str, Any] | None:
    """The naive best, the recommended and the confirmed ratio side by side; None while there is one number only."""
    sentences = curse_sentences(summary)
    if not sentences:
        return None
    return {"sentences": sentences, "rows": [_promise_row(summary, one) for one in promises(summary)]}


def _promise_row(summary: StudySummary, one: Promise) -> dict[str, str]:
    values = value_format(summary)
    again, interval = one.again, one.interval
    error = again.standard_error if again else None
    too_good = "–"
    if one.too_good is not None:
        too_good = _signed(one.too_good, values)
        if interval is not None:
            too_good += f" ({_signed(interval[0], values)} to {_signed(interval[1], values)})"
    return {
        "trial": one.trial.name,
        "roles": roles_text(one),
        "observed": values(one.observed) if one.observed is not None else "–",
        "expected": _with_sd(one.expected, values) or "–",
        "again": f"{values(again.mean)}{f' ± {values.difference(error)}' if error else ''} ({again.n})"
        if again
        else "–",
        "too_good": too_good,
    }


def _signed(value: float, values: ValueFormat) -> str:
    return f"{'−' if value < 0 else ''}{values.difference(value)}"


def _objective(summary: StudySummary, best: Trial | None) -> dict[str, Any] | None:
    """Front, requirements and parts of a weighted sum; None where the study asks for one number."""
    config, objective = summary.config, objective_of(summary.config)
    if config is None or objective is None:
        return None
    base = base_metrics(summary)
    weighed = {t.number: t for t in (*([best] if best else []), *(t for t, _ in finalists(summary)))}
    fresh = {number: metrics_of(summary, t, fresh=True) for number, t in weighed.items()}
    return {
        "front": _front_rows(summary, best) if objective.pareto else None,
        "requirements": [
            {
                "trial": weighed[number].name,
                "chosen": weighed[number] is best,
                "again": confirmation_of(summary, weighed[number].name) is not None,
                "text": one.requirement.text,
                "value": _plain(one.value),
                "bound": _plain(one.bound),
                "margin": "–" if one.margin is None else f"{one.margin:+.4g}".replace("-", "−"),
                "base": _plain(one.base),
                "kept": {True: "kept", False: "broken", None: "not known"}[one.kept],
            }
            for number, values in fresh.items()
            for one in judged(config, values, base)
        ],
        "parts": _parts_table(summary, weighed, fresh, base),
    }


def _front_rows(summary: StudySummary, best: Trial | None) -> dict[str, Any]:
    config, objective = summary.config, objective_of(summary.config)
    assert config is not None, "it has an objective"
    assert objective is not None, "the caller looked"
    names = objective.pareto or []
    by_metric, base = directions(config), base_metrics(summary)
    trials = [t for t in observed(summary) if is_whole(t)]
    values = [metrics_of(summary, t, fresh=False) for t in trials]
    ahead = [(t, found) for t, found, is_best in zip(trials, values, on_front(config, values), strict=True) if is_best]
    ahead.sort(key=lambda pair: by_metric[names[0]].to_loss(pair[1][names[0]]))
    return {
        "metrics": [f"{name} ({better_is(by_metric[name])})" for name in names],
        "rows": [
            {
                "trial": t.name,
                "chosen": t is best,
                "ratio": ratio_text(t.ratio, summary.domain_names, most=6) if t.ratio else "",
                "own": own_text(t),
                "values": [_plain(found.get(name)) for name in names],
            }
            for t, found in ahead
        ],
        "base": [_plain(base.get(name)) for name in names] if base else None,
        "n": len(trials),
    }


def _parts_table(
    summary: StudySummary, weighed: dict[int, Trial], fresh: dict[int, dict[str, float]], base: dict[str, float]
) -> dict[str, Any] | None:
    """What each metric adds to the weighted sum, for the finalists and the untouched model."""
    config = summary.config
    assert config is not None, "it has an objective"
    rows = [("untouched model", parts(config, base))] if base else []
    rows = [(weighed[number].name, parts(config, values)) for number, values in fresh.items()] + rows
    if not rows or not rows[0][1]:
        return None
    by_metric = directions(config)
    return {
        "metrics": [f"{part.weight:g} × {part.metric} ({better_is(by_metric[part.metric])})" for part in rows[0][1]],
        "rows": [
            {
                "name": name,
                "cells": [_plain(part.value) for part in found],
                "sum": _plain(summary.direction.to_value(sum(part.of_sum or 0.0 for part in found)))
                if all(part.of_sum is not None for part in found)
                else "–",
            }
            for name, found in rows
        ],
    }


def _plain(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}".replace("-", "−")


def _learned(summary: StudySummary, found: Learned | None) -> dict[str, Any] | None:
    """The words beside the figures of what the search has learned; None leaves the section out."""
    if found is None:
        return None
    insight = found.insight
    if insight is None:
        return {"why_not": found.why_not}
    values = value_format(summary)
    rest = [one.domain for one in insight.slices[MOST_NAMED:]]
    scales = sorted(insight.length_scales.items(), key=lambda pair: pair[1])
    alike = len({f"{scale:.3g}" for _, scale in scales}) <= 1
    return {
        "why_not": "",
        "n_told": insight.n_told,
        "past": past_runs_text(summary),
        "trust": insight.calibration.trust if insight.calibration else "few",
        "sentence": insight.calibration.sentence if insight.calibration else "",
        "kernel": insight.kernel,
        "noise": values.difference(insight.noise_sd) if insight.noise_sd is not None else "",
        "scale": f"{scales[0][1]:.3g}" if scales and alike else "",
        "scales": [] if alike else [(name, f"{scale:.3g}") for name, scale in scales],
        "notes": insight.notes,
        "rest": rest,
        "rows": [
            {
                "css": domain_look(summary.domain_names.index(one.domain)).css,
                "domain": one.domain,
                "shares": f"{100 * one.shares[0]:.0f} % → {100 * one.shares[1]:.0f} %",
                "change": _signed(one.change, values),
                "change_interval": " to ".join(_signed(end, values) for end in one.change_interval),
                "total": f"{100 * one.total:.0f} %",
                "total_interval": f"{100 * one.total_interval[0]:.0f} to {100 * one.total_interval[1]:.0f} %",
            }
            for one in insight.sensitivities
        ],
    }


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
