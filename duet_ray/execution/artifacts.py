"""What samples leave on disk, who finds it, and what is deleted.

A sample's folder is `artifacts/<trial>/<sample>/`. It fills in three steps, each a rename into place: `adapter/`
(trained weights; `model/` where every weight is trained; with `artifacts: URL` it lies there instead), `trained.json`
(what the trainer reports), `result.json` (the value, or the reason there is none). Whoever finds a step done goes on
after it, so a kill between training and feedback costs the feedback only, and "finished" means one thing:
`result.json` is there.

Until then there may be `training/` (the state of a training that was left off), and with racing `comparisons.json`
(what the sample measured on its way) and `trained-<share>.json`.
"""

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from duet_ray.budget import n_left, n_samples, searched
from duet_ray.config import StudyConfig
from duet_ray.execution.finalists import best_trials, finalists
from duet_ray.files import write_json
from duet_ray.kept_models import KeptModels, is_url
from duet_ray.records import CONFIRM_ANYWHERE, CONFIRM_FIRST, SampleResult, SampleSpec, trial_name
from duet_ray.secret_text import redact, redact_data
from duet_ray.store import Store

log = logging.getLogger(__name__)

TRAINING = "training"
"""Folder, in a sample's folder, of the state of its training."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What a sample measured on its way, to be compared with the others of its trial."""

    share: float
    """Of its optimizer steps."""
    value: float | None
    """Of the quick feedback, in the user's own direction; None exactly when the sample failed."""
    reason: str | None
    train_seconds: float
    feedback_seconds: float


def sample_folder(study_folder: Path, spec: SampleSpec) -> Path:
    return study_folder / "artifacts" / trial_name(spec.trial) / f"s{spec.sample}"


def read_result(folder: Path) -> SampleResult | None:
    """The finished sample in a folder; None when there is none, or its file is damaged."""
    data = read_json(folder / "result.json")
    if data is None:
        return None
    try:
        return SampleResult.from_json(data)
    except (KeyError, TypeError, AssertionError):
        return None


def leave_result(folder: Path, result: SampleResult) -> SampleResult:
    """Put `result.json` in place unless a sound one is there: the first result stands, and is returned."""
    if (earlier := read_result(folder)) is not None:
        return earlier
    if result.reason is not None:
        result = replace(result, reason=redact(result.reason))
    write_json(folder / "result.json", result.to_json())
    return result


def read_comparisons(folder: Path) -> list[Comparison]:
    """A sample's comparisons so far, the earliest first."""
    data = read_json(folder / "comparisons.json")
    try:
        return [Comparison(**found) for found in data["comparisons"]] if data else []
    except (KeyError, TypeError):
        return []


def leave_comparisons(folder: Path, comparisons: Sequence[Comparison]) -> None:
    write_json(folder / "comparisons.json", {"comparisons": [redact_data(asdict(c)) for c in comparisons]})


def clear_ended(folder: Path, result: SampleResult, models: KeptModels) -> None:
    """Delete what nobody needs of a sample that has ended: the state of its training, models that do not stand."""
    shutil.rmtree(folder / TRAINING, ignore_errors=True)
    models.remove_all_but(folder, result.adapter)
    for stale in folder.glob("trained-*.json"):
        stale.unlink(missing_ok=True)


def adopt_finished(config: StudyConfig, store: Store) -> None:
    """Store the samples that finished while no driver was there to see it."""
    for trial in store.trials():
        known = {sample.spec.sample for sample in trial.samples}
        for sample in range(n_samples(trial, config)):
            spec = trial.spec(sample)
            if sample in known:
                continue
            result = read_result(sample_folder(config.study_folder, spec))
            if result is not None and result.spec == spec:
                log.info("%s had finished: adopted", spec.key)
                store.add_sample(result)


def prune_adapters(config: StudyConfig, store: Store, models: KeptModels | None = None) -> None:
    """Delete all models but those that may be handed over; results stay.

    Kept are the best `keep_best` samples, and the best sample of every point that is, was or will be confirmed, where
    it was trained on all rows. Which those are is known for good only when the search is over: of a finalist whose
    model is gone by then, the best confirmation is kept in its place.
    """
    models = models or KeptModels.of(config)
    on_disk = store.kept_artifacts()  # Before the trials: a sample stored in between is not judged yet.
    for key, place in list(on_disk.items()):
        # A kill came between deleting it and saying so. At a URL it is deleted again: that costs no question each time.
        if not is_url(place) and not models.has(place):
            store.drop_artifact(*key)
            del on_disk[key]
    trials = store.trials()
    values = {
        (t.number, s.spec.sample): config.direction.to_loss(s.value)
        for t in trials
        for s in t.samples
        if s.value is not None
    }
    confirmed = {t.number - CONFIRM_FIRST for t in trials if CONFIRM_FIRST <= t.number < CONFIRM_ANYWHERE}
    likely = best_trials(trials, config, max(1, config.confirm.finalists))
    again = finalists(trials, store.ranking()[0], config)
    whole = {t.number for t in searched(trials) if t.fidelity == 1}
    handed_over = confirmed | {t.number for t in (*again, *likely)}
    if config.confirm.finalists == 0:  # No confirmation will replace the model of the one that is recommended.
        ranking, ranked = store.ranking()
        is_final = n_left(trials, config) == 0 and ranked == {t.number for t in searched(trials) if t.observation}
        handed_over |= set(ranking[:1]) if is_final else whole
    keep = set()
    for trial in trials:
        if trial.observation is not None and (trial.number in handed_over or trial.number >= CONFIRM_ANYWHERE):
            keep.add((trial.number, trial.observation.best_sample))
    for number in confirmed:
        if not any(key[0] == number and key in keep for key in on_disk):
            of_confirmation = [key for key in on_disk if key[0] == CONFIRM_FIRST + number and key in values]
            keep |= set(sorted(of_confirmation, key=lambda k: (values[k], k))[:1])
    candidates = sorted((k for k in on_disk if k[0] in whole and k in values), key=lambda k: (values[k], k))
    keep |= set(candidates[: config.keep_best])
    judged = {t.number for t in trials if t.status != "pending"}
    for key, place in on_disk.items():
        if key not in keep and key[0] in judged and models.remove(place):
            store.drop_artifact(*key)


def read_json(path: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (json.JSONDecodeError, UnicodeDecodeError):
        log.warning("%s is damaged and is made again", path)
        return None
    return data if isinstance(data, dict) else None
