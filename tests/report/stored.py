"""Studies that went through a store, with everything a search may be asked: every number is given by hand."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from duet_ray.config import StudyConfig, config_from
from duet_ray.records import (
    BASE_TRIAL,
    CONFIRM_ANYWHERE,
    CONFIRM_BASE,
    CONFIRM_FIRST,
    Observation,
    PastRun,
    Ratio,
    SampleResult,
    SampleSpec,
    Settings,
    TrialKind,
    trial_name,
)
from duet_ray.report.from_store import read_summary
from duet_ray.report.summary import StudySummary
from duet_ray.store import Store
from tests.toy_study import WORDS, toy_data

N_ROWS = 24
Metrics = Mapping[str, float]


def ratio_at(number: int) -> Ratio:
    """Another ratio of three domains for every number: the uniform one is 0."""
    if number == 0:
        return Ratio(counts=(8, 8, 8))
    a = (5 * number) % 21
    b = (7 * number) % (25 - a)
    return Ratio(counts=(a, b, N_ROWS - a - b))


class Written:
    """A store that is filled trial by trial."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.folder = folder
        self.config: StudyConfig = config_from(toy_data(**changes), folder=folder)
        self.store = Store(folder, create=True)
        with self.store.writing():
            self.store.create_study(name="toy", config=self.config.model_dump(mode="json"), versions={})
            self.store.update_study(domains=[_domain(name) for name in WORDS])

    def base(self, value: float, metrics: Metrics | None = None, *, again: bool = False) -> "Written":
        number = CONFIRM_BASE if again else BASE_TRIAL
        return self._add(
            number, "confirm" if again else "base", None, [value], "confirm:base" if again else "base", metrics
        )

    def trial(
        self,
        number: int,
        values: Sequence[float | None],
        *,
        metrics: Metrics | None = None,
        ratio: Ratio | None = None,
        settings: Settings = (),
        fidelity: float = 1.0,
        k: int | None = None,
    ) -> "Written":
        kind: TrialKind = "start" if number < 3 else "search"
        method = "uniform" if number == 0 else "random" if kind == "start" else "bayesian:lcb"
        ratio = ratio or ratio_at(number)
        return self._add(number, kind, ratio, values, method, metrics, settings=settings, fidelity=fidelity, k=k)

    def confirm(
        self, number: int, values: Sequence[float], metrics: Metrics | None = None, settings: Settings = ()
    ) -> "Written":
        method = f"confirm:{trial_name(number)}"
        return self._add(
            CONFIRM_FIRST + number, "confirm", ratio_at(number), values, method, metrics, settings=settings
        )

    def anywhere(self, ratio: Ratio, values: Sequence[float]) -> "Written":
        return self._add(CONFIRM_ANYWHERE, "confirm", ratio, values, "confirm:anywhere", None, observed=True)

    def posterior(self, found: Mapping[int, tuple[float, float | None]], ranking: Sequence[int] = ()) -> "Written":
        with self.store.writing():
            self.store.set_posterior(found, ranking)
        return self

    def past(self, *runs: PastRun) -> "Written":
        with self.store.writing():
            self.store.add_past_runs(runs)
        return self

    @property
    def summary(self) -> StudySummary:
        return read_summary(self.folder)

    def _add(
        self,
        number: int,
        kind: TrialKind,
        ratio: Ratio | None,
        values: Sequence[float | None],
        method: str,
        metrics: Metrics | None,
        *,
        settings: Settings = (),
        fidelity: float = 1.0,
        k: int | None = None,
        observed: bool = False,
    ) -> "Written":
        spec = SampleSpec(trial=number, sample=0, kind=kind, ratio=ratio, settings=settings, fidelity=fidelity)
        samples = [
            SampleResult(
                spec=replace(spec, sample=i),
                value=value,
                reason="loss is not finite" if value is None else None,
                metrics=dict(metrics or {}) if value is not None else {},
                train_seconds=20.0,
                feedback_seconds=5.0,
            )
            for i, value in enumerate(values)
        ]
        with self.store.writing():
            self.store.add_trial(number, kind, ratio, method, settings=settings, fidelity=fidelity, k=k)
            for sample in samples:
                self.store.add_sample(sample)
            good = [s for s in samples if s.value is not None]
            if good and (kind in ("start", "search") or observed):
                best = min(good, key=lambda s: self.config.direction.to_loss(s.value or 0.0))
                assert best.value is not None
                self.store.add_observation(
                    number,
                    Observation(value=best.value, k=len(values), k_used=len(good), best_sample=best.spec.sample),
                )
            elif good:
                self.store.finish_trial(number)
            else:
                self.store.fail_trial(number, "loss is not finite")
        return self


def plain_study(folder: Path, *, n: int = 8, **changes: Any) -> Written:
    """A study whose loss falls with the share of the first domain, with a little noise."""
    written = Written(folder, **changes).base(3.0)
    random = np.random.default_rng(0)
    sign = written.config.direction.to_value(1.0)
    for number in range(n):
        loss = 2.5 - ratio_at(number).values[0] + 0.05 * random.standard_normal()
        written.trial(number, [sign * loss, sign * (loss + 0.03)])
    return written


def _domain(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "source": f"data/{name}.jsonl",
        "n_train": 54,
        "n_validation": 6,
        "n_bad": 0,
        "n_duplicates": 0,
        "n_overlap": None,
        "effective_sample_size": None,
        "notes": [],
        "scores": None,
    }
