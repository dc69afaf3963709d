"""One task at a time, in this process: what a worker leaves on disk, and what it finds there."""

import errno
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from duet_ray.config import load_config
from duet_ray.execution.worker import Assignment, Worker, is_disk_full, read_result, sample_folder
from duet_ray.preflight import preflight
from duet_ray.records import BASE_TRIAL, Ratio, SampleSpec
from tests.toy_study import write_toy_study

SPEC = SampleSpec(trial=2, sample=1, kind="start", ratio=Ratio(counts=(12, 0, 12)))


def silent(_: str) -> None:
    pass


def make_worker(folder: Path, **changes: Any) -> tuple[Worker, Callable[[SampleSpec], Path]]:
    ready = preflight(load_config(write_toy_study(folder, **changes)))
    assignment = Assignment(
        config=ready.config.model_dump(mode="json"),
        folder=str(folder),
        domain_folders=tuple(str(d.folder) for d in ready.domains),
        weights_folder=str(ready.weights_folder),
        weights_keys=ready.weights_keys,
    )
    return Worker(assignment), lambda spec: sample_folder(ready.config.study_folder, spec)


def test_a_sample_from_draw_to_result(tmp_path: Path) -> None:
    worker, place = make_worker(tmp_path)
    base = worker.do_sample(SampleSpec(trial=BASE_TRIAL, sample=0, kind="base", ratio=None), 1, silent)
    result = worker.do_sample(SPEC, 2, silent)
    assert result.value is not None
    assert base.value is not None
    assert result.value < base.value, "twelve rows of the right domain help"
    assert base.adapter is None
    assert result.adapter == "artifacts/t0002/s1/adapter"
    files = {p.name for p in (place(SPEC) / "adapter").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= files
    assert {p.name for p in place(SPEC).iterdir()} == {"adapter", "trained.json", "result.json"}
    assert read_result(place(SPEC)) == result
    again = worker.do_sample(SampleSpec(trial=BASE_TRIAL, sample=1, kind="base", ratio=None), 3, silent)
    assert again.value == base.value, "nothing of a sample is left in the model"


def test_a_finished_sample_is_returned_and_not_made_again(tmp_path: Path) -> None:
    worker, place = make_worker(tmp_path)
    first = worker.do_sample(SPEC, 1, silent)
    changed = {**first.to_json(), "value": 123.0}
    (place(SPEC) / "result.json").write_text(json.dumps(changed))
    assert worker.do_sample(SPEC, 2, silent).value == 123.0


@pytest.mark.parametrize("torn", ["", '{"spec": {"trial": 2', "[]", '{"value": 1.0}'])
def test_a_torn_result_is_made_again(tmp_path: Path, torn: str) -> None:
    worker, place = make_worker(tmp_path)
    first = worker.do_sample(SPEC, 1, silent)
    (place(SPEC) / "result.json").write_text(torn)
    second = worker.do_sample(SPEC, 1, silent)
    times = {"train_seconds": 0.0, "feedback_seconds": 0.0}
    assert replace(second, **times) == replace(first, **times)


def test_only_the_feedback_is_repeated_when_it_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, place = make_worker(tmp_path)
    expected = worker.do_sample(SPEC, 1, silent)
    (place(SPEC) / "result.json").unlink()
    measure = worker._feedback.measure

    def broken(*_: Any, **__: Any) -> Any:
        raise ConnectionError("the rating service is away")

    monkeypatch.setattr(worker._feedback, "measure", broken)
    with pytest.raises(ConnectionError):
        worker.do_sample(SPEC, 2, silent)
    assert read_result(place(SPEC)) is None
    monkeypatch.setattr(worker._feedback, "measure", measure)
    monkeypatch.setattr(worker._trainer, "train", broken)
    assert worker.do_sample(SPEC, 3, silent).value == expected.value


def test_a_model_trained_on_other_rows_is_not_taken(tmp_path: Path) -> None:
    worker, place = make_worker(tmp_path)
    expected = worker.do_sample(SPEC, 1, silent)
    (place(SPEC) / "result.json").unlink()
    report = json.loads((place(SPEC) / "trained.json").read_text())
    (place(SPEC) / "trained.json").write_text(json.dumps({**report, "rows_digest": "another"}))
    trained = (place(SPEC) / "adapter" / "adapter_model.safetensors").stat().st_ino
    again = worker.do_sample(SPEC, 2, silent)
    assert again.value == expected.value
    assert (place(SPEC) / "adapter" / "adapter_model.safetensors").stat().st_ino != trained


def test_a_sample_that_fails_has_a_reason_and_no_value(tmp_path: Path) -> None:
    worker, place = make_worker(tmp_path, training__learning_rate=1e30)
    result = worker.do_sample(SPEC, 1, silent)
    assert result.value is None
    assert result.reason is not None
    assert "learning rate" in result.reason
    assert read_result(place(SPEC)) == result
    base = SampleSpec(trial=BASE_TRIAL, sample=0, kind="base", ratio=None)
    assert worker.do_sample(base, 2, silent).ok, "the next sample is not harmed"


def test_scoring_is_done_once(tmp_path: Path) -> None:
    worker, _ = make_worker(tmp_path, selection={"method": "influence", "n_fit_rows": 16, "n_hessian_rows": 8})
    stages: list[str] = []
    assert worker.do_score(0, stages.append) == {"domain": "apples"}
    assert stages
    stages.clear()
    worker.do_score(0, stages.append)
    assert not stages
    for index in (1, 2):
        worker.do_score(index, silent)
    assert worker.do_sample(SPEC, 1, silent).ok


def test_a_full_disk_is_recognised() -> None:
    assert is_disk_full(OSError(errno.ENOSPC, "No space left on device"))
    assert is_disk_full(OSError(errno.EDQUOT, "Disk quota exceeded"))
    wrapped = RuntimeError("could not save")
    wrapped.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert is_disk_full(wrapped)
    assert is_disk_full(RuntimeError("I/O error: No space left on device (os error 28)"))
    assert not is_disk_full(OSError(errno.ENOENT, "No such file"))
