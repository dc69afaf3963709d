"""Whole studies whose groups have several workers, whose samples train in one pass, or race; and what kills them."""

import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from duet_ray.records import Trial
from tests.execution.test_study_run import essence, finish, start, trials_of, wait_for, write_study
from tests.tiny_model import tiny_llama

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

START_ONLY: dict[str, Any] = {"search": {"n_start": 3, "n_trials": 0}, "confirm": {"finalists": 0}}
SHORT: dict[str, Any] = {"search": {"n_start": 2, "n_trials": 1}, "confirm": {"finalists": 0}}


def run(study: Path) -> list[Trial]:
    code, output = finish(start(study))
    assert code == 0, output
    return trials_of(study)


def workers_of(process: Any) -> list[psutil.Process]:
    return [c for c in psutil.Process(process.pid).children(recursive=True) if "RayTrainWorker" in c.name()]


def log_of(study: Path, group: int = 0) -> str:
    return (study.parent / "studies" / "toy" / "logs" / f"group-{group}.log").read_text()


def assert_alike(found: list[Trial], expected: list[Trial]) -> None:
    """The same rows, and the same values but for rounding."""
    for trial, other in zip(found, expected, strict=True):
        assert trial.ratio == other.ratio
        assert [s.rows_digest for s in trial.samples] == [s.rows_digest for s in other.samples]
        np.testing.assert_allclose([s.value for s in trial.samples], [s.value for s in other.samples], rtol=1e-3)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[Trial]:
    """Every sample by itself, on one worker. Only the start design: a proposal follows the rounding."""
    return run(
        write_study(tmp_path_factory.mktemp("alone"), search={"n_start": 3, "n_trials": 0}, confirm__finalists=0)
    )


def test_two_workers_train_a_sample_together_and_one_of_them_is_killed(alone: list[Trial], tmp_path: Path) -> None:
    study = write_study(tmp_path, fleet={"workers_per_group": 2, "cpus_per_worker": 0.5}, **START_ONLY)
    (tmp_path / "hold-at").write_text("4")
    process = start(study)
    wait_for((tmp_path / "holding").exists, process)
    workers = workers_of(process)
    assert len(workers) == 2
    workers[1].kill()
    (tmp_path / "hold-at").unlink()
    code, output = finish(process)
    assert code == 0, output
    trials = trials_of(study)
    assert_alike(trials, alone)
    assert sum(s.n_retries for t in trials for s in t.samples) == 1
    log = log_of(study)
    assert log.count("[0] INFO group 0 is ready") == log.count("[1] INFO group 0 is ready") == 2


def test_ctrl_c_stops_two_workers_in_the_middle_of_a_step(tmp_path: Path) -> None:
    """One of them hears of it first, and the other would wait for it in the exchange of gradients."""
    training = {"rank": 4, "learning_rate": 1e-3, "batch_size": 4, "max_tokens": 32, "epochs": 400}
    study = write_study(
        tmp_path, training=training, fleet={"workers_per_group": 2, "cpus_per_worker": 0.5}, **START_ONLY
    )
    process = start(study)
    wait_for((tmp_path / "studies/toy/artifacts/t0000/s0").is_dir, process)
    time.sleep(5)
    children = psutil.Process(process.pid).children(recursive=True)
    pressed = time.monotonic()
    process.send_signal(signal.SIGINT)
    code, output = finish(process, 60)
    assert code == 130, output
    assert "To go on: duet run" in output
    assert time.monotonic() - pressed < 25, "nobody waits for a process that has left"
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive
    assert not list(tmp_path.glob("studies/toy/artifacts/t0000/s0/result.json")), "it was in the middle of the sample"


def test_samples_train_in_one_pass_and_a_kill_changes_nothing(alone: list[Trial], tmp_path: Path) -> None:
    settings = {**SHORT, "training__fuse": 2}
    calm = run(write_study(tmp_path / "calm", **settings))
    assert_alike(calm[:3], alone[:3])
    assert [s.train["n_fused"] for t in calm[1:] for s in t.samples] == [2] * 6
    study = write_study(tmp_path / "killed", **settings)
    (study.parent / "kill-at").write_text("3")
    assert essence(run(study)) == essence(calm)
    assert "was trained already: only its feedback is repeated" in log_of(study)


def test_samples_that_are_behind_stop_early_whoever_is_killed(tmp_path: Path) -> None:
    settings = {**SHORT, "sampling": {"k": 4, "racing": {"at": [0.34, 0.67], "keep": 0.5}}}
    one = run(write_study(tmp_path / "one", **settings))
    for trial in one[1:]:
        assert trial.observation is not None
        assert (trial.observation.k, trial.observation.k_used) == (4, 1)
        stopped = Counter(s.train.get("stopped_after") for s in trial.samples)
        assert stopped == {None: 1, 0.34: 2, 0.67: 1}
        assert {s.reason is None for s in trial.samples if not s.was_stopped} == {True}
    study = write_study(tmp_path / "two", fleet__groups=2, **settings)
    (study.parent / "hold-at").write_text("3")
    process = start(study)
    wait_for((study.parent / "holding").exists, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (study.parent / "hold-at").unlink()
    time.sleep(5)  # its workers see that it is gone
    assert essence(run(study)) == essence(one)
    assert not list(study.parent.glob("studies/toy/artifacts/*/*/training"))


def test_a_worker_that_hangs_is_ended_and_its_sample_made_by_the_next(alone: list[Trial], tmp_path: Path) -> None:
    """It lives and says so, and gets nowhere: the time limit finds it."""
    study = write_study(tmp_path, fleet__max_task_minutes=0.25, **START_ONLY)
    (tmp_path / "hang-at").write_text("4")
    trials = run(study)
    assert essence(trials) == essence(alone)
    assert sum(s.n_retries for t in trials for s in t.samples) == 1
    assert log_of(study).count("group 0 is ready") == 2


def test_every_weight_is_trained_by_two_workers_as_by_one_and_the_model_is_exported(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    training = {"method": "full", "learning_rate": 3e-3, "batch_size": 8, "max_tokens": 32}
    settings: dict[str, Any] = {"search": {"n_start": 2, "n_trials": 0}, "confirm": {"finalists": 0}}
    one = run(write_study(tmp_path / "one", training=training, **settings))
    fleet = {"workers_per_group": 2, "cpus_per_worker": 0.5}
    study = write_study(tmp_path / "two", training={**training, "zero": {"stage": 3}}, fleet=fleet, **settings)
    two = run(study)
    assert_alike(two, one)
    base, best = two[0].samples[0], min(s.value or np.inf for t in two[1:] for s in t.samples)
    assert base.value is not None
    assert best < base.value
    code, output = finish(start(study, "--out", str(tmp_path / "best"), verb="export"))
    assert code == 0, output
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "best" / "model")
    tuned, untouched = (dict(m.named_parameters()) for m in (model, tiny_llama()))
    assert not any(torch.equal(tuned[name], untouched[name]) for name in tuned)
    assert not [p for p in (tmp_path / "two" / "studies").rglob("*") if p.suffix in (".pkl", ".pickle", ".pt", ".bin")]
