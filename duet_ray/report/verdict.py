"""Did it pay off? The best ratio against the untouched model and against the uniform ratio, in plain English.

Two traps stand between a search's best number and the truth. The best of many noisy observations is too good (the
winner's curse), so the verdict rests on fresh-seed confirmations wherever there are any. And two means of a few
repeats differ by chance, so the word "beats" is kept for a difference whose 95 % interval (`welch.py`) excludes 0,
with at least two repeats of everything that varies; anything less is called an indication. Honest intervals from two
or three repeats are wide: the text says so, and what would narrow them.
"""

from dataclasses import dataclass
from typing import Literal

from duet_ray.records import Direction, Trial
from duet_ray.report.objectives import judged, objective_of
from duet_ray.report.summary import (
    Measurement,
    StudySummary,
    base_measurement,
    base_metrics,
    best_measured,
    best_trial,
    chosen_trial,
    confirmation_of,
    confirmations,
    confirmed_name,
    failure_reasons,
    finalists,
    is_anywhere,
    is_open,
    is_same_point,
    metrics_of,
    n_failed,
    observed,
    progress_text,
    searched,
    state,
    uniform_trial,
    value_format,
    value_of,
)
from duet_ray.report.welch import CONFIDENCE, Welch, welch
from duet_ray.report.wording import ValueFormat, better_is, join_words, plural

Outcome = Literal["beats", "loses", "unclear", "ahead", "behind", "equal", "same"]
"""`beats`, `loses`: the 95 % interval excludes 0; `unclear`: it includes 0; `ahead`, `behind`, `equal`: there is no
interval, so an indication only; `same`: the best ratio is the uniform one."""
Against = Literal["base", "uniform", "finalist"]
"""`finalist`: the best of the search's ratios, where the uniform one did better than all of them."""
Basis = Literal["confirm", "observation"]
Tone = Literal["good", "mixed", "bad", "open"]

_VERBS: dict[Outcome, str] = {
    "beats": "beats",
    "loses": "is worse than",
    "unclear": "cannot be told apart from",
    "ahead": "looks better than",
    "behind": "looks worse than",
    "equal": "looks no better than",
    "same": "is",
}
_NAMES: dict[Against, str] = {
    "base": "the untouched model",
    "uniform": "the uniform ratio",
    "finalist": "the best finalist",
}
FEW_REPEATS_REACH = 2.3
"""In standard errors: an interval that reaches further is wide because the repeats are few."""
_INTERVAL = f"{100 * CONFIDENCE:.0f} % interval"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The best ratio against one other thing."""

    against: Against
    basis: Basis
    """`confirm`: means over fresh seeds; `observation`: the best of k that the search saw."""
    best: Measurement
    other: Measurement
    outcome: Outcome
    test: Welch | None = None
    """The interval of the difference; None where there is none: an observation, or too little was measured."""

    @property
    def difference(self) -> float:
        """best − other, in the user's own units and direction."""
        return self.best.mean - self.other.mean

    @property
    def base_may_vary(self) -> bool:
        """Against an untouched model whose one value is not the last word: the feedback is random."""
        return not self.other.trained and self.other.standard_error is None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    headline: str
    sentences: tuple[str, ...]
    """The numbers behind the headline, one thought each."""
    advice: str
    tone: Tone
    confirmed: bool
    """Whether the best ratio was trained and measured again with fresh seeds."""
    best: Trial | None
    versus_base: Comparison | None
    versus_uniform: Comparison | None
    versus_finalist: Comparison | None
    """Where the uniform ratio is the best although ratios of the search were measured again: against their best."""


def verdict(summary: StudySummary) -> Verdict:
    """Weigh what the study measured so far; works at every stage of a study, also an empty or failed one."""
    best = chosen_trial(summary)
    if best is None:
        return _without_observation(summary)
    values = value_format(summary)
    again = confirmation_of(summary, best.name)
    base, uniform = _versus_base(summary, best), _versus_uniform(summary, best)
    finalist = _versus_finalist(summary, best)
    comparisons = [c for c in (base, uniform, finalist) if c]
    sentences = [
        *_progress(summary),
        *(_comparison_sentence(summary, best, c, values) for c in comparisons if c.outcome != "same"),
        *_objective_sentences(summary, best),
        *_curse_sentence(summary, best, again, values),
        *_caveats(summary, best, comparisons, again),
    ]
    return Verdict(
        headline=_headline(summary, best, base, uniform, confirmed=again is not None),
        sentences=tuple(sentences),
        advice=_advice(summary, base, uniform, confirmed=again is not None),
        tone=_tone(
            comparisons,
            confirmed=again is not None,
            uniform_is_best=len(summary.domain_names) > 1 and uniform is not None and uniform.outcome == "same",
        ),
        confirmed=again is not None,
        best=best,
        versus_base=base,
        versus_uniform=uniform,
        versus_finalist=finalist,
    )


def compare(
    best: Measurement, other: Measurement, direction: Direction, *, against: Against, basis: Basis
) -> Comparison:
    """Compare two measurements; only confirmations with an interval of their difference can "beat" or "lose"."""
    test = welch(best, other) if basis == "confirm" else None
    ahead, behind = direction.better(best.mean, other.mean), direction.better(other.mean, best.mean)
    if test is None:
        outcome: Outcome = "ahead" if ahead else "behind" if behind else "equal"
    elif not test.excludes_zero:
        outcome = "unclear"
    else:
        outcome = "beats" if ahead else "loses"
    return Comparison(against=against, basis=basis, best=best, other=other, outcome=outcome, test=test)


def _versus_base(summary: StudySummary, best: Trial) -> Comparison | None:
    again = confirmation_of(summary, best.name)
    base = base_measurement(summary, as_trials=again is None)
    if base is None:
        return None
    return compare(
        again or _as_measurement(best),
        base,
        summary.direction,
        against="base",
        basis="confirm" if again else "observation",
    )


def _versus_uniform(summary: StudySummary, best: Trial) -> Comparison | None:
    """Fresh values against fresh values, or observation against observation: never one against the other."""
    uniform = uniform_trial(summary)
    if uniform is None:
        return None
    again, uniform_again = confirmation_of(summary, best.name), confirmation_of(summary, uniform.name)
    if is_same_point(best, uniform):
        own = again or _as_measurement(best)
        basis: Basis = "confirm" if again else "observation"
        return Comparison(against="uniform", basis=basis, best=own, other=own, outcome="same")
    if again and uniform_again:
        return compare(again, uniform_again, summary.direction, against="uniform", basis="confirm")
    if uniform.observation is None or uniform.status != "done":
        return None
    return compare(
        _as_measurement(best),
        _as_measurement(uniform),
        summary.direction,
        against="uniform",
        basis="observation",
    )


def _versus_finalist(summary: StudySummary, best: Trial) -> Comparison | None:
    """The chosen uniform ratio against the best finalist, which it has overtaken."""
    again, uniform, rival = confirmation_of(summary, best.name), uniform_trial(summary), _rival(summary, best)
    if again is None or rival is None or uniform is None or not is_same_point(uniform, best):
        return None
    return compare(again, rival[1], summary.direction, against="finalist", basis="confirm")


def _rival(summary: StudySummary, best: Trial) -> tuple[Trial, Measurement] | None:
    """The best of the finalists with another ratio than the chosen one."""
    return best_measured([f for f in finalists(summary) if not is_same_point(f[0], best)], summary.direction)


def _as_measurement(trial: Trial) -> Measurement:
    """An observation as one value, so that it can be compared; it is never more than an indication."""
    return Measurement(values=(value_of(trial),))


def _headline(
    summary: StudySummary, best: Trial, base: Comparison | None, uniform: Comparison | None, *, confirmed: bool
) -> str:
    subject = "The best ratio"
    if uniform and uniform.outcome == "same":
        return f"{_uniform_headline(summary, base, confirmed=confirmed)}{_not_confirmed(summary, confirmed)}."
    if base and uniform and base.outcome == uniform.outcome:
        text = f"{subject} {_VERBS[base.outcome]} both {_NAMES['base']} and {_named(summary, 'uniform')}"
    elif base and uniform:
        link = "and" if _good(base) == _good(uniform) else "but"
        start = f"{subject} {_VERBS[base.outcome]} {_NAMES['base']}"
        text = f"{start}, {link} {_VERBS[uniform.outcome]} {_named(summary, 'uniform')}"
    elif known := base or uniform:
        text = f"{subject} {_VERBS[known.outcome]} {_named(summary, known.against)}"
    else:
        return f"{subject} so far is {best.name}; there is nothing to compare it with yet."
    return f"{text}{_not_confirmed(summary, confirmed)}."


def _named(summary: StudySummary, against: Against) -> str:
    """Trial 0 is more than a ratio where training settings are searched too."""
    optimize = summary.config.search.optimize if summary.config is not None else "data"
    if against == "uniform" and optimize != "data":
        own = "the study's own settings"
        return own if optimize == "model" else f"{_NAMES[against]} with {own}"
    return _NAMES[against]


def _uniform_headline(summary: StudySummary, base: Comparison | None, *, confirmed: bool) -> str:
    """Where the best ratio is the uniform one, or the only one."""
    than_base = f"{_VERBS[base.outcome]} {_NAMES['base']}" if base else ""
    if len(summary.domain_names) == 1:
        return f"The only ratio there is {than_base}" if base else "There is only one ratio"
    if summary.config is not None and summary.config.search.optimize == "model":
        return "The study's own settings are the best found" + (f"; their model {than_base}" if base else "")
    if not confirmed:
        return "The uniform ratio is the best found" + (f"; it {than_base}" if base else "")
    objective = objective_of(summary.config)
    if objective is not None and (objective.pareto or objective.require):
        why = "is the compromise to take" if objective.pareto else "is the best that keeps the requirements"
        return f"The uniform ratio {why}" + (f"; it {than_base}" if base else "")
    if base and not _good(base):
        return f"No mixture found beats the uniform ratio, and that one {than_base}"
    return "No mixture found beats the uniform ratio: take the uniform one" + (f"; it {than_base}" if base else "")


def _not_confirmed(summary: StudySummary, confirmed: bool) -> str:
    if confirmed:
        return ""
    return " so far (not confirmed yet)" if state(summary) == "running" else " (not confirmed)"


def _good(comparison: Comparison) -> bool:
    return comparison.outcome in ("beats", "ahead")


def _tone(comparisons: list[Comparison], *, confirmed: bool, uniform_is_best: bool) -> Tone:
    """`good` only where the search has paid off against everything; a win of the uniform ratio is mixed at best."""
    weighed = [c for c in comparisons if c.outcome != "same" and c.against != "finalist"]
    outcomes = {c.outcome for c in weighed}
    if not confirmed or not outcomes:
        return "open"
    if any(c.against == "base" and c.outcome in ("loses", "behind") for c in weighed):
        return "bad"
    if uniform_is_best:
        return "mixed"
    if outcomes == {"beats"}:
        return "good"
    return "open" if outcomes <= {"beats", "ahead"} else "mixed"


def _comparison_sentence(summary: StudySummary, best: Trial, comparison: Comparison, values: ValueFormat) -> str:
    """`Against the uniform ratio: heldout_loss 2.11 ± 0.01 (…) against 2.15 ± 0.01 (…); 0.04 lower (…), …`"""
    by = "no difference" if comparison.difference == 0 else _sided(comparison.difference, values)
    name = _named(summary, comparison.against)
    if comparison.against == "finalist" and (rival := _rival(summary, best)):
        name = f"{name}, {rival[0].name}"
    start = f"Against {name}: {summary.feedback_name}"
    if comparison.basis == "observation":
        text = f"{start} {values(comparison.best.mean)} against {values(comparison.other.mean)}; {by}"
        certainty = ["going by the search's own observations"]
    else:
        text = f"{start} {_with_error(comparison.best, values)} against {_with_error(comparison.other, values)}; {by}"
        certainty = _certainty(comparison, values)
    if comparison.base_may_vary:
        certainty = [f"{_LOOKS[comparison.outcome]} ({_MEASURED_ONCE})", *certainty]
    return f"{text} ({better_is(summary.direction)}), {', '.join(certainty)}."


_LOOKS: dict[Outcome, str] = {"ahead": "looks better", "behind": "looks worse", "equal": "looks no better"}
_MEASURED_ONCE = "the untouched model was measured once, by a feedback that varies"


def _certainty(comparison: Comparison, values: ValueFormat) -> list[str]:
    """How far the difference of two confirmations can be trusted, in pieces of a sentence."""
    if test := comparison.test:
        interval = f"{_INTERVAL} {_span(*test.interval, values)}"
        return [interval if test.excludes_zero else f"{interval}: it includes 0, so this may be chance"]
    if any(m.trained and m.n == 1 for m in (comparison.best, comparison.other)):
        return ["from one repeat: treat as an indication"]
    if comparison.base_may_vary:
        return []  # said with what it looks like
    return ["but all repeats gave the same value, so their spread says nothing: treat as an indication"]


def _sided(difference: float, values: ValueFormat) -> str:
    return f"{values.difference(difference)} {'lower' if difference < 0 else 'higher'}"


def _span(low: float, high: float, values: ValueFormat) -> str:
    """`0.123 to 0.397` where both ends are on the side just named, else `0.26 lower to 0.24 higher`."""
    if low > 0 or high < 0:
        near, far = sorted((abs(low), abs(high)))
        return f"{values.difference(near)} to {values.difference(far)}"
    return f"{_sided(low, values)} to {_sided(high, values)}"


def _with_error(measurement: Measurement, values: ValueFormat) -> str:
    mean, error = values(measurement.mean), measurement.standard_error
    if measurement.n == 1:
        return f"{mean} (one fresh repeat)" if measurement.trained else mean
    what = "fresh repeats" if measurement.trained else "measurements"
    return f"{mean} ± {values.difference(error or 0.0)} ({measurement.n} {what})"


def _curse_sentence(summary: StudySummary, best: Trial, again: Measurement | None, values: ValueFormat) -> list[str]:
    if again is None or is_anywhere(best):
        return []  # a ratio that was only trained to confirm it has promised nothing
    seen, mean = value_of(best), again.mean
    used = best.observation.k_used if best.observation else 1
    of = f"the best of its {plural(used, 'sample')}" if used > 1 else "one sample"
    start = f"Winner's curse: {best.name} was observed at {values(seen)} ({of})"
    if summary.direction.better(seen, mean):
        gap = values.difference(mean - seen)
        end = f"measured again it has {values(mean)}, {gap} worse. Expect the second number, not the first."
    else:
        end = f"measured again it has {values(mean)}: the search's number was not too good here."
    return [f"{start}; {end}"]


def _objective_sentences(summary: StudySummary, best: Trial) -> list[str]:
    """What the best ratio makes of requirements and of a front, where the study asks for more than one number."""
    config, objective = summary.config, objective_of(summary.config)
    if config is None or objective is None:
        return []
    found = []
    if objective.pareto:
        found.append(
            f"{join_words(objective.pareto)} are traded off, so there is no best ratio but a front; {best.name} is the "
            "compromise that gives up least."
        )
    for one in judged(config, metrics_of(summary, best, fresh=True), base_metrics(summary)):
        if one.kept is None:
            found.append(f"Whether {best.name} keeps the requirement {one.requirement.text} is not known.")
        elif one.kept:
            found.append(f"{best.name} keeps the requirement {one.requirement.text}: it has {one.value:.4g}.")
        else:
            found.append(
                f"{best.name} breaks the requirement {one.requirement.text}: it has {one.value:.4g}, and no ratio that "
                "could be taken keeps all requirements."
            )
    return found


def _caveats(summary: StudySummary, best: Trial, comparisons: list[Comparison], again: Measurement | None) -> list[str]:
    found = []
    if again is None and len(observed(summary)) > 1 and best is best_trial(summary):
        found.append(
            f"{best.name} is the best of {plural(len(observed(summary)), 'trial')}, and the best of many noisy numbers "
            "is too good: only a measurement with fresh seeds can tell."
        )
    elif again is None and len(observed(summary)) > 1:
        found.append(
            f"{best.name} is the ratio that the search's model expects the most of, not the luckiest observation; only "
            "a measurement with fresh seeds can tell."
        )
    found += _choice_caveats(summary, best) if again else []
    found += _width_caveat(comparisons)
    if best.observation and not is_anywhere(best) and (n_lost := sum(s.failed for s in best.samples)):
        found.append(
            f"{best.name} has only {best.observation.k_used} of {plural(len(best.samples), 'sample')}: {n_lost} "
            "failed, and the best of fewer samples is a weaker observation."
        )
    return found


def _choice_caveats(summary: StudySummary, best: Trial) -> list[str]:
    """How the best of the confirmed ratios was chosen, and what that does to its numbers."""
    found, observed_best, again = [], best_trial(summary), finalists(summary)
    n_candidates = len(again) + all(best is not trial for trial, _ in again)  # the uniform ratio may win as well
    if is_anywhere(best):
        found.append(
            f"{best.name} is no trial of the search: its model expected the most of this ratio, which was then trained "
            "to confirm it."
        )
    if observed_best and observed_best is not best:
        start = f"{observed_best.name} had the best observation, but"
        if not confirmation_of(summary, observed_best.name):
            tried = any(confirmed_name(t) == observed_best.name for t in confirmations(summary))
            found.append(f"{start} {'none of its fresh repeats has a value' if tried else 'was not measured again'}.")
        elif best is uniform_trial(summary):
            found.append(f"{start} measured again the uniform ratio, {best.name}, has the better mean.")
        else:
            found.append(
                f"{start} measured again {best.name} has the better mean of the {plural(len(again), 'finalist')}."
            )
    if n_candidates > 1:
        found.append(
            f"{best.name} was picked from {n_candidates} ratios on the same fresh values that stand here, so they "
            "still flatter it a little."
        )
    return found


def _width_caveat(comparisons: list[Comparison]) -> list[str]:
    """Why an interval that includes 0 is as wide as it is, and what would narrow it."""
    unclear = [c for c in comparisons if c.outcome == "unclear"]
    if not unclear:
        return []
    repeats = min(m.n for c in unclear for m in (c.best, c.other) if m.trained)
    reach = max(c.test.quantile for c in unclear if c.test)
    if reach < FEW_REPEATS_REACH:
        return ["More repeats (confirm.repeats) would narrow the interval."]
    return [
        f"With {repeats} repeats a side an interval is wide, {reach:.1f} standard errors each way (2.0 with many): "
        "more of them (confirm.repeats) would narrow it."
    ]


def _progress(summary: StudySummary) -> list[str]:
    failed = n_failed(summary)
    found = []
    if is_open(summary):
        found.append(f"The study is not finished: {progress_text(summary)} have ended.")
    if failed:
        reason, times = failure_reasons(searched(summary))[0] if failure_reasons(searched(summary)) else ("", 0)
        why = f" Most frequent reason ({times} ×): {reason.rstrip('.')}." if reason else ""
        found.append(f"{plural(failed, 'trial')} failed and {'has' if failed == 1 else 'have'} no value.{why}")
    return found


def _advice(summary: StudySummary, base: Comparison | None, uniform: Comparison | None, *, confirmed: bool) -> str:
    """What to do with it, in a few sentences; in line with what is handed over, which is the best ratio's model."""
    if base and base.outcome in ("loses", "behind"):
        hurts = "hurts" if base.outcome == "loses" else "seems to hurt"
        return (
            f"Fine-tuning {hurts} here: keep the untouched model for this task. Try a lower training.learning_rate, "
            "fewer rows (mixture.n_rows) or other domains."
        )
    if not confirmed:
        return (
            "Treat this as an indication: let the study run to its end, with confirm.finalists of at least 1 and "
            "confirm.repeats of at least 2, before you rely on it."
        )
    if base and base.base_may_vary:
        return (
            f"{_ratio_advice(summary, uniform)} Whether fine-tuning helps at all stays an indication: {_MEASURED_ONCE}."
        )
    if base and base.outcome != "beats":
        return "It is not clear that fine-tuning helps here: confirm with more repeats (confirm.repeats) before you do."
    return _ratio_advice(summary, uniform)


def _ratio_advice(summary: StudySummary, uniform: Comparison | None) -> str:
    """Which ratio to take, given that one wants to fine-tune."""
    if len(summary.domain_names) == 1:
        return "With one domain there is no ratio to choose; add domains to give the search something to find."
    if uniform is None:
        return "Use the best ratio; there is no uniform one to compare it with."
    if uniform.outcome == "same":
        return (
            "Use the uniform ratio: the search found nothing better. More trials (search.n_trials) or more samples a "
            "ratio (sampling.k) may still do."
        )
    if uniform.outcome == "beats":
        return "Use the best ratio: train on it, or take its model as it is."
    if uniform.outcome in ("loses", "behind"):
        return (
            "Use the uniform ratio: it did better when both were measured again. Its own trial has no value, so there "
            "is no model of it to hand over: train one on it."
        )
    if uniform.basis == "observation":
        return "The best ratio is the better bet, but the uniform one was not measured again: nothing is sure yet."
    if uniform.outcome == "ahead":
        return "The best ratio is the better bet; more repeats (confirm.repeats) would settle it."
    return (
        "Take the best ratio, but do not count on a gain over the uniform one, which is the simpler choice. More "
        "repeats (confirm.repeats), more trials (search.n_trials) or more samples a ratio (sampling.k) can still tell "
        "them apart."
    )


def _without_observation(summary: StudySummary) -> Verdict:
    """A study that has nothing to show yet, or nothing at all."""
    now, base = state(summary), base_measurement(summary)
    values = value_format(summary)
    if now == "failed":
        headline = f"No ratio has a value: {_all_failed(summary)}."
        sentences = [f"{times} ×: {reason}" for reason, times in failure_reasons(searched(summary))]
        advice = "The most frequent reason stands first. Remove it and run the study again: it resumes where it was."
    elif now == "base_only":
        assert base is not None
        headline = (
            f"Only the untouched model has been measured so far: {summary.feedback_name} {values(base.mean)} "
            f"({better_is(summary.direction)})."
        )
        sentences, advice = [], "The first trial, the uniform ratio, comes next."
    else:
        headline, sentences = "Nothing has been measured yet.", []
        sentences = [f"{times} ×: {reason}" for reason, times in failure_reasons(summary.trials)]
        advice = "Run the study; the untouched model and the uniform ratio are measured first."
    return Verdict(
        headline=headline,
        sentences=tuple(sentences),
        advice=advice,
        tone="bad" if now == "failed" else "open",
        confirmed=False,
        best=None,
        versus_base=None,
        versus_uniform=None,
        versus_finalist=None,
    )


def _all_failed(summary: StudySummary) -> str:
    failed, planned = n_failed(summary), summary.n_planned
    which = "the only trial" if failed == 1 else f"every one of the {plural(failed, 'trial')}"
    return f"{which} that ended so far failed (of {planned} planned)" if failed < planned else f"{which} failed"
