"""What the search is told of a finished trial: a point and its loss, lower is better, whatever the feedback.

The searcher that proposes the next point and the report that explains the model afterwards make it of a stored trial
with the same function, `told_of`, so that both speak of one model.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from duet_ray.records import PastRun, Point, Ratio, SampleResult, Settings, Trial

if TYPE_CHECKING:
    from duet_ray.config import StudyConfig


@dataclass(frozen=True, kw_only=True)
class Told:
    """One finished trial, as the search sees it."""

    ratio: Ratio
    loss: float
    """Finite; lower is better."""
    sem: float | None = None
    """Standard error of `loss` under a repeat with other seeds. Used only if every observation has one."""
    settings: Settings = ()
    fidelity: float = 1.0
    k_used: int = 1
    """How many samples `loss` is the least of."""
    samples: tuple[float, ...] = ()
    """The losses of all samples with a value, where they are known; `loss` is the least of them."""
    others: Mapping[str, float] = field(default_factory=dict)
    """Other metrics by name, all as losses, where the study's objective needs them."""

    @property
    def point(self) -> Point:
        return Point(ratio=self.ratio, settings=self.settings, fidelity=self.fidelity)


def told_of(trial: Trial, config: "StudyConfig") -> Told | None:
    """What a trial tells the search; None where it has no observation (yet), or is no trial of the search.

    Other metrics are those of the sample that gave the observation: together they describe one model, the one that
    would be handed over.
    """
    if trial.ratio is None or trial.observation is None or trial.kind not in ("start", "search"):
        return None
    losses = [config.direction.to_loss(s.value) for s in trial.samples if s.value is not None]
    best = next((s for s in trial.samples if s.spec.sample == trial.observation.best_sample), None)
    return Told(
        ratio=trial.ratio,
        loss=config.direction.to_loss(trial.observation.value),
        sem=trial.observation.sem,
        settings=trial.settings,
        fidelity=trial.fidelity,
        k_used=trial.observation.k_used,
        samples=tuple(losses),
        others=metric_losses(best, config) if best is not None else {},
    )


def told_of_run(run: PastRun, config: "StudyConfig") -> Told:
    """What a past run tells the search."""
    loss = config.direction.to_loss(run.value)
    return Told(ratio=run.ratio, loss=loss, sem=run.sem, fidelity=run.fidelity, samples=(loss,))


def metric_losses(sample: SampleResult, config: "StudyConfig") -> dict[str, float]:
    """The feedback's value and the metrics measured beside it, by name, each turned by its own direction.

    A metric that could not be measured, or is not finite, is left out. Where a sample's `value` is a weighted sum of
    metrics (`search.objective.weights`), the feedback's own number stands among its metrics.
    """
    if sample.value is None:
        return {}
    values = {config.feedback.metric_key: sample.value, **sample.metrics}
    return {
        feedback.metric_key: feedback.direction.to_loss(values[feedback.metric_key])
        for feedback in (config.feedback, *config.also)
        if math.isfinite(values.get(feedback.metric_key, math.nan))
    }
