"""A study's summary and verdict as plain data, for `--json`: no NaN, no objects, stable names."""

import math
from dataclasses import asdict
from typing import Any

from duet_ray.records import SampleResult, Trial
from duet_ray.report.curse import Promise, promises
from duet_ray.report.objectives import judged, objective_of, on_front, parts
from duet_ray.report.summary import (
    Measurement,
    StudySummary,
    base_measurement,
    base_metrics,
    best_sample,
    best_trial,
    chosen_trial,
    confirmation_of,
    confirmations,
    confirmed_name,
    finalists,
    metrics_of,
    n_ended,
    n_failed,
    n_spent,
    observed,
    recommended_trial,
    state,
    uniform_trial,
)
from duet_ray.report.verdict import Comparison, verdict
from duet_ray.report.welch import CONFIDENCE


def to_json(summary: StudySummary) -> dict[str, Any]:
    """Everything `duet status --json` and `duet report --json` print; safe for `json.dumps(..., allow_nan=False)`."""
    base, said = base_measurement(summary), verdict(summary)
    names = list(dict.fromkeys(confirmed_name(t) for t in confirmations(summary)))
    again = {name: confirmation_of(summary, name) for name in names}
    return {
        "study": summary.name,
        "state": state(summary),
        "feedback": summary.feedback_name,
        "direction": summary.direction.value,
        "feedback_is_random": summary.feedback_is_random,
        "domains": [_domain(summary, i) for i in range(len(summary.domains))],
        "domain_names": list(summary.domain_names),
        "n_rows": summary.n_rows,
        "k": summary.k,
        "n_planned": summary.n_planned,
        "n_ended": n_ended(summary),
        "n_failed": n_failed(summary),
        "n_spent": n_spent(summary),
        "k_bounds": list(summary.k_bounds) if summary.k_bounds else None,
        "n_past_runs": len(summary.past_runs),
        "base": _measurement(base) if base else None,
        "uniform": _trial_or_none(summary, uniform_trial(summary)),
        "best": _trial_or_none(summary, chosen_trial(summary)),
        "naive_best": _name(best_trial(summary)),
        "recommended": _name(recommended_trial(summary)),
        "promises": [_promise(p) for p in promises(summary)],
        "objective": _objective(summary),
        "confirmed": {name: _measurement(m) for name, m in again.items() if m},
        "verdict": {
            "headline": said.headline,
            "sentences": list(said.sentences),
            "advice": said.advice,
            "confirmed": said.confirmed,
            "versus_base": _comparison(said.versus_base),
            "versus_uniform": _comparison(said.versus_uniform),
            "versus_finalist": _comparison(said.versus_finalist),
        },
        "trials": [_trial(summary, t) for t in summary.trials],
        "started": summary.started.isoformat() if summary.started else None,
        "seconds": summary.seconds,
        "versions": dict(summary.versions),
        "notes": list(summary.notes),
    }


def _trial_or_none(summary: StudySummary, trial: Trial | None) -> dict[str, Any] | None:
    return _trial(summary, trial) if trial else None


def _trial(summary: StudySummary, trial: Trial) -> dict[str, Any]:
    seen, best = trial.observation, best_sample(trial, summary.direction)
    values = [float(v) for v in trial.ratio.values] if trial.ratio else None
    return {
        "name": trial.name,
        "number": trial.number,
        "kind": trial.kind,
        "status": trial.status,
        "method": trial.method,
        "ratio": dict(zip(summary.domain_names, values, strict=True)) if values else None,
        "counts": list(trial.ratio.counts) if trial.ratio else None,
        "observation": seen.value if seen else None,
        "sem": seen.sem if seen else None,
        "k_used": seen.k_used if seen else None,
        "adapter": best.adapter if best else None,
        "settings": dict(trial.settings),
        "fidelity": trial.fidelity,
        "k": trial.k,
        "posterior": _posterior(summary.posterior.get(trial.number)),
        "samples": [_sample(s) for s in trial.samples],
    }


def _name(trial: Trial | None) -> str | None:
    return trial.name if trial else None


def _posterior(found: tuple[float, float] | None) -> dict[str, float] | None:
    return {"mean": found[0], "sd": found[1]} if found else None


def _promise(promise: Promise) -> dict[str, Any]:
    return {
        "trial": promise.trial.name,
        "roles": list(promise.roles),
        "observed": promise.observed,
        "expected": _posterior(promise.expected),
        "measured_again": _measurement(promise.again) if promise.again else None,
        "too_good_by": promise.too_good,
        "interval": list(promise.interval) if promise.interval else None,
        "confidence": CONFIDENCE if promise.interval else None,
    }


def _objective(summary: StudySummary) -> dict[str, Any] | None:
    """What the study asks of several metrics, and what the ratios make of it; None where it asks for one number."""
    config, objective = summary.config, objective_of(summary.config)
    if config is None or objective is None:
        return None
    base, chosen = base_metrics(summary), chosen_trial(summary)
    trials = [t for t in observed(summary) if t.fidelity == 1]
    values = [metrics_of(summary, t, fresh=False) for t in trials]
    weighed = list({t.name: t for t in (*(t for t, _ in finalists(summary)), *([chosen] if chosen else []))}.values())
    return {
        "base": base,
        "metrics": {t.name: found for t, found in zip(trials, values, strict=True)},
        "front": [t.name for t, best in zip(trials, on_front(config, values), strict=True) if best],
        "requirements": {
            t.name: [
                {
                    "text": one.requirement.text,
                    "value": one.value,
                    "base": one.base,
                    "bound": one.bound,
                    "margin": one.margin,
                    "kept": one.kept,
                }
                for one in judged(config, metrics_of(summary, t, fresh=True), base)
            ]
            for t in weighed
        },
        "parts": {
            t.name: [asdict(part) for part in parts(config, metrics_of(summary, t, fresh=True))] for t in weighed
        },
    }


def _sample(sample: SampleResult) -> dict[str, Any]:
    return {
        "name": sample.spec.key,
        "value": sample.value,
        "reason": sample.reason,
        "stopped_after": sample.train.get("stopped_after"),
        "stderr": _finite(sample.stderr),
        "metrics": {name: _finite(value) for name, value in sample.metrics.items()},
        "train_seconds": sample.train_seconds,
        "feedback_seconds": sample.feedback_seconds,
        "adapter": sample.adapter,
        "n_retries": sample.n_retries,
    }


def _measurement(measured: Measurement) -> dict[str, Any]:
    return {
        "values": list(measured.values),
        "mean": measured.mean,
        "standard_error": measured.standard_error if measured.n >= 2 else None,
        "n_failed": measured.n_failed,
    }


def _comparison(comparison: Comparison | None) -> dict[str, Any] | None:
    if comparison is None:
        return None
    test = comparison.test
    return {
        "outcome": comparison.outcome,
        "basis": comparison.basis,
        "best": comparison.best.mean,
        "other": comparison.other.mean,
        "difference": comparison.difference,
        "standard_error": test.standard_error if test else None,
        "degrees_of_freedom": test.degrees_of_freedom if test else None,
        "interval": list(test.interval) if test else None,
        "confidence": CONFIDENCE if test else None,
    }


def _domain(summary: StudySummary, index: int) -> dict[str, Any]:
    domain = summary.domains[index]
    scores = domain.scores
    # The rows at both ends are for a page or for `duet score --json`: who asks for the status wants no data in it.
    numbers = {n: v for n, v in scores.items() if n not in ("best", "worst")} if scores else None
    return {name: getattr(domain, name) for name in domain.__dataclass_fields__} | {
        "notes": list(domain.notes),
        "scores": numbers,
    }


def _finite(value: float | None) -> float | None:
    """JSON has no NaN: a number that is none is null."""
    return value if value is not None and math.isfinite(value) else None
