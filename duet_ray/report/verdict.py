"""Did it pay off? The best ratio against the untouched model and against the uniform ratio, in plain English.

Two traps stand between a search's best number and the truth. The best of many noisy observations is too good (the
winner's curse), so the verdict rests on fresh-seed confirmations wherever there are any. And two means of a few
repeats differ by chance, so the word "beats" is kept for a difference of more than two standard errors,

    |mean_a - mean_b| > 2 · sqrt(s_a² / n_a + s_b² / n_b)      (Welch's unpooled standard error),

with at least two repeats of everything that is trained; anything less is called an indication. The rule is simple on
purpose: with two or three repeats s is itself rough, and the text says so.
"""

import math
from dataclasses import dataclass
from typing import Literal

from duet_ray.records import Direction, Trial
from duet_ray.report.summary import (
    Measurement,
    StudySummary,
    base_measurement,
    best_trial,
    chosen_trial,
    confirmation_of,
    failure_reasons,
    finalists,
    n_ended,
    n_failed,
    observed,
    searched,
    state,
    uniform_trial,
    value_format,
    value_of,
)
from duet_ray.report.wording import ValueFormat, better_is, plural

MANY_REPEATS = 5
"""From here on a standard error is solid enough to go without a warning."""

Outcome = Literal["beats", "loses", "unclear", "ahead", "behind", "equal", "same"]
"""`beats`, `loses`: by more than two standard errors; `unclear`: by less; `ahead`, `behind`, `equal`: an indication
only; `same`: the best ratio is the uniform one."""
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
_NAMES = {"base": "the untouched model", "uniform": "the uniform ratio"}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The best ratio against one other thing."""

    against: Literal["base", "uniform"]
    basis: Basis
    """`confirm`: means over fresh seeds; `observation`: the best of k that the search saw."""
    best: Measurement
    other: Measurement
    outcome: Outcome

    @property
    def difference(self) -> float:
        """best − other, in the user's own units and direction."""
        return self.best.mean - self.other.mean

    @property
    def standard_error(self) -> float | None:
        """Of the difference; None where either side is a single repeat or an observation."""
        return _difference_error(self.best, self.other) if self.basis == "confirm" else None


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


def verdict(summary: StudySummary) -> Verdict:
    """Weigh what the study measured so far; works at every stage of a study, also an empty or failed one."""
    best = chosen_trial(summary)
    if best is None:
        return _without_observation(summary)
    values = value_format(summary)
    again = confirmation_of(summary, best.name)
    base, uniform = _versus_base(summary, best), _versus_uniform(summary, best)
    comparisons = [c for c in (base, uniform) if c]
    sentences = [
        *_progress(summary),
        *(_comparison_sentence(summary, c, values) for c in comparisons if c.outcome != "same"),
        *_curse_sentence(summary, best, again, values),
        *_caveats(summary, best, comparisons, again),
    ]
    return Verdict(
        headline=_headline(summary, best, base, uniform, confirmed=again is not None),
        sentences=tuple(sentences),
        advice=_advice(summary, base, uniform, confirmed=again is not None),
        tone=_tone(comparisons, confirmed=again is not None),
        confirmed=again is not None,
        best=best,
        versus_base=base,
        versus_uniform=uniform,
    )


def compare(
    best: Measurement, other: Measurement, direction: Direction, *, against: Literal["base", "uniform"], basis: Basis
) -> Comparison:
    """Compare two measurements; only confirmations with a known, non-zero standard error can "beat" or "lose"."""
    error = _difference_error(best, other) if basis == "confirm" else None
    ahead, behind = direction.better(best.mean, other.mean), direction.better(other.mean, best.mean)
    if error is None or error == 0:
        outcome: Outcome = "ahead" if ahead else "behind" if behind else "equal"
    elif abs(best.mean - other.mean) <= 2 * error:
        outcome = "unclear"
    else:
        outcome = "beats" if ahead else "loses"
    return Comparison(against=against, basis=basis, best=best, other=other, outcome=outcome)


def _difference_error(a: Measurement, b: Measurement) -> float | None:
    if a.standard_error is None or b.standard_error is None:
        return None
    return math.hypot(a.standard_error, b.standard_error)


def _versus_base(summary: StudySummary, best: Trial) -> Comparison | None:
    base = base_measurement(summary)
    if base is None:
        return None
    again = confirmation_of(summary, best.name)
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
    if best.ratio == uniform.ratio:
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


def _as_measurement(trial: Trial) -> Measurement:
    """An observation as one value, so that it can be compared; it is never more than an indication."""
    return Measurement(values=(value_of(trial),))


def _headline(
    summary: StudySummary, best: Trial, base: Comparison | None, uniform: Comparison | None, *, confirmed: bool
) -> str:
    subject = "The best ratio"
    if uniform and uniform.outcome == "same":
        subject = "The only ratio there is" if len(summary.domain_names) == 1 else "The uniform ratio is the best found"
        join = " " if len(summary.domain_names) == 1 else "; it "
        text = f"{subject}{join}{_VERBS[base.outcome]} {_NAMES['base']}" if base else subject
        return f"{text}{_not_confirmed(summary, confirmed)}."
    if base and uniform and base.outcome == uniform.outcome:
        text = f"{subject} {_VERBS[base.outcome]} both {_NAMES['base']} and {_NAMES['uniform']}"
    elif base and uniform:
        link = "and" if _good(base) == _good(uniform) else "but"
        text = (
            f"{subject} {_VERBS[base.outcome]} {_NAMES['base']}, {link} {_VERBS[uniform.outcome]} {_NAMES['uniform']}"
        )
    elif known := base or uniform:
        text = f"{subject} {_VERBS[known.outcome]} {_NAMES[known.against]}"
    else:
        return f"{subject} so far is {best.name}; there is nothing to compare it with yet."
    return f"{text}{_not_confirmed(summary, confirmed)}."


def _not_confirmed(summary: StudySummary, confirmed: bool) -> str:
    if confirmed:
        return ""
    return " so far (not confirmed yet)" if state(summary) == "running" else " (not confirmed)"


def _good(comparison: Comparison) -> bool:
    return comparison.outcome in ("beats", "ahead")


def _tone(comparisons: list[Comparison], *, confirmed: bool) -> Tone:
    outcomes = {c.outcome for c in comparisons if c.outcome != "same"}
    if not confirmed or not outcomes:
        return "open"
    if outcomes == {"beats"}:
        return "good"
    if outcomes <= {"beats", "ahead"}:
        return "open"
    return "bad" if any(c.against == "base" and c.outcome in ("loses", "behind") for c in comparisons) else "mixed"


def _comparison_sentence(summary: StudySummary, comparison: Comparison, values: ValueFormat) -> str:
    """`Against the uniform ratio: heldout_loss 2.11 ± 0.01 (…) against 2.15 ± 0.01 (…); 0.04 lower, …`"""
    difference, error = comparison.difference, comparison.standard_error
    side = "lower" if difference < 0 else "higher"
    by = "no difference" if difference == 0 else f"{values.difference(difference)} {side}"
    start = f"Against {_NAMES[comparison.against]}: {summary.feedback_name}"
    if comparison.basis == "observation":
        return (
            f"{start} {values(comparison.best.mean)} against {values(comparison.other.mean)}; {by} "
            f"({better_is(summary.direction)}), going by the search's own observations."
        )
    text = f"{start} {_with_error(comparison.best, values)} against {_with_error(comparison.other, values)}; {by}"
    return f"{text} ({better_is(summary.direction)}), {_certainty(comparison, error, values)}."


def _certainty(comparison: Comparison, error: float | None, values: ValueFormat) -> str:
    if error is None:
        return "from one repeat: treat as an indication"
    if error == 0:
        return "but all repeats gave the same value, so their spread says nothing: treat as an indication"
    size = values.difference(error)
    if comparison.outcome == "unclear":
        return f"within twice the standard error of that difference, {size}: it may be chance"
    return f"more than twice the standard error of that difference, {size}"


def _with_error(measurement: Measurement, values: ValueFormat) -> str:
    mean, error = values(measurement.mean), measurement.standard_error
    if not measurement.trained:
        return mean
    if error is None:
        return f"{mean} (one fresh repeat)"
    return f"{mean} ± {values.difference(error)} ({measurement.n} fresh repeats)"


def _curse_sentence(summary: StudySummary, best: Trial, again: Measurement | None, values: ValueFormat) -> list[str]:
    if again is None:
        return []
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


def _caveats(summary: StudySummary, best: Trial, comparisons: list[Comparison], again: Measurement | None) -> list[str]:
    found = []
    if again is None and len(observed(summary)) > 1:
        found.append(
            f"{best.name} is the best of {plural(len(observed(summary)), 'trial')}, and the best of many noisy numbers "
            "is too good: only a measurement with fresh seeds can tell."
        )
    observed_best = best_trial(summary)
    if again and observed_best and observed_best is not best:
        found.append(
            f"{observed_best.name} had the best observation, but measured again {best.name} has the better mean of the "
            f"{plural(len(finalists(summary)), 'finalist')}."
        )
    repeats = [m.n for c in comparisons if c.basis == "confirm" for m in (c.best, c.other) if m.trained]
    if repeats and 2 <= min(repeats) < MANY_REPEATS:
        found.append(
            f"With {min(repeats)} repeats a side the standard error is itself rough; more of them "
            "(confirm.repeats) make the verdict firmer."
        )
    used = best.observation.k_used if best.observation else summary.k
    if used < summary.k:
        found.append(
            f"{best.name} has only {used} of {plural(summary.k, 'sample')}: the others failed, and the best of fewer "
            "samples is a weaker observation."
        )
    return found


def _progress(summary: StudySummary) -> list[str]:
    ended, failed = n_ended(summary), n_failed(summary)
    found = []
    if ended < summary.n_planned:
        found.append(f"The study is not finished: {ended} of {plural(summary.n_planned, 'trial')} have ended.")
    if failed:
        reason, times = failure_reasons(searched(summary))[0] if failure_reasons(searched(summary)) else ("", 0)
        why = f" Most frequent reason ({times} ×): {reason.rstrip('.')}." if reason else ""
        found.append(f"{plural(failed, 'trial')} failed and {'has' if failed == 1 else 'have'} no value.{why}")
    return found


def _advice(summary: StudySummary, base: Comparison | None, uniform: Comparison | None, *, confirmed: bool) -> str:
    """What to do with it, in one or two sentences."""
    if base and base.outcome in ("loses", "behind"):
        return (
            "Fine-tuning hurts here: keep the untouched model for this task. Try a lower training.learning_rate, "
            "fewer rows (mixture.n_rows) or other domains."
        )
    if not confirmed:
        return (
            "Treat this as an indication: let the study run to its end, with confirm.finalists of at least 1 and "
            "confirm.repeats of at least 2, before you rely on it."
        )
    if base and base.outcome != "beats":
        return "It is not clear that fine-tuning helps here: confirm with more repeats (confirm.repeats) before you do."
    if uniform and uniform.outcome == "beats":
        return "Use the best ratio: train on it, or take its adapter as it is."
    if uniform and uniform.outcome == "same" and len(summary.domain_names) == 1:
        return "With one domain there is no ratio to choose; add domains to give the search something to find."
    if uniform and uniform.outcome in ("loses", "behind"):
        return "Use the uniform ratio: it did better when both were measured again. More trials may find a better one."
    if uniform and uniform.outcome == "ahead":
        return "The best ratio is the better bet; confirm.repeats of 2 or more would settle it."
    return (
        "The uniform ratio is the simpler choice as long as nothing beats it. More trials (search.n_trials), more "
        "samples a ratio (sampling.k) or more repeats (confirm.repeats) can still tell them apart."
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
    )


def _all_failed(summary: StudySummary) -> str:
    failed, planned = n_failed(summary), summary.n_planned
    which = "the only trial" if failed == 1 else f"every one of the {plural(failed, 'trial')}"
    return f"{which} that ended so far failed (of {planned} planned)" if failed < planned else f"{which} failed"
