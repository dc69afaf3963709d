"""A worker that trains nothing: its value is a known function of the ratio and the rows drawn for it.

It keeps a model, leaves what a worker leaves, in the same steps, and writes down each training that it made.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from duet_ray.execution.artifacts import clear_ended, leave_result, read_json, read_result, sample_folder
from duet_ray.execution.worker import MARK, MODEL, Assignment, Progress, load_draws, mixture_of, trained_file
from duet_ray.files import write_json
from duet_ray.kept_models import KeptModels
from duet_ray.mixture import rows_digest
from duet_ray.records import SampleResult, SampleSpec

BEST = np.array([0.7, 0.2, 0.1])
"""The ratio of the least loss, before the noise."""


def toy_loss(ratio: np.ndarray, digest: str) -> float:
    """Squared distance from the best ratio, and a noise that the rows alone decide."""
    return float(np.square(ratio - BEST[: len(ratio)]).sum()) + int(digest[:8], 16) / 2**32 / 20


class ToyWorker:
    """Stands in for `duet_ray.execution.worker.Worker`.

    Args:
        log: a file; one line for every training that begins.
        seconds: that a training takes.
    """

    others_wait = False

    def __init__(
        self,
        assignment: Assignment,
        on_follow: Callable[[Mapping[str, Any]], None] = lambda _: None,
        *,
        log: Path | None = None,
        seconds: float = 0.0,
    ) -> None:
        self._config = assignment.study_config()
        self._weights = load_draws(assignment, self._config)
        self._models = KeptModels.of(self._config)
        self._log, self._seconds = log, seconds

    def preload(self) -> None:
        pass

    def do_sample(
        self, spec: SampleSpec, lease: int, progress: Progress, *, bundle: Sequence[SampleSpec] = ()
    ) -> SampleResult:
        folder = sample_folder(self._config.study_folder, spec)
        if (earlier := read_result(folder)) is not None:
            return earlier
        folder.mkdir(parents=True, exist_ok=True)
        if spec.ratio is None:
            return leave_result(folder, SampleResult(spec=spec, value=1.0, lease=lease))
        digest = rows_digest(mixture_of(self._config, spec, self._weights))
        place = self._trained(folder, spec, digest, progress)
        result = SampleResult(
            spec=spec,
            value=toy_loss(spec.ratio.values, digest),
            train={"toy": 1},
            rows_digest=digest,
            adapter=place,
            lease=lease,
        )
        result = leave_result(folder, result)
        clear_ended(folder, result, self._models)
        return result

    def _trained(self, folder: Path, spec: SampleSpec, digest: str, progress: Progress) -> str:
        """Train, or find what an earlier worker trained; the place of the model."""
        known = read_json(trained_file(folder))
        if known is not None and known.get(MARK) == digest and self._models.has(known[MODEL]):
            return str(known[MODEL])
        progress("training", 1, 2)
        if self._log is not None:
            with open(self._log, "a", encoding="utf-8") as file:
                file.write(f"{spec.key}\n")
                file.flush()
                os.fsync(file.fileno())
        time.sleep(self._seconds)
        place = self._models.keep(folder, "adapter", lambda local: _write_adapter(local, digest))
        write_json(trained_file(folder), {MARK: digest, MODEL: place})
        return place


def _write_adapter(folder: Path, digest: str) -> None:
    (folder / "adapter_model.safetensors").write_text(digest)
    (folder / "adapter_config.json").write_text("{}")
