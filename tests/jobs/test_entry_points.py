"""The entry points for `ray job submit`: exit codes, what is said, and a storage that would go with the job."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from duet_ray.cli.job import JOB_VARIABLE, fleeting, job_line
from duet_ray.config import config_from
from tests.execution.test_study_run import finish, wait_for, write_study
from tests.toy_study import toy_data, write_study_file

JOBS = Path(__file__).parents[2] / "jobs"
IN_A_JOB = {JOB_VARIABLE: json.dumps({"runtime_env": {"working_dir": "gcs://_ray_pkg_0.zip"}, "metadata": {}})}


def start_job(script: str, *arguments: object, cwd: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(JOBS / script), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        start_new_session=True,
    )


def problems(environment: dict[str, str], here: Path, **changes: Any) -> dict[str, str]:
    config = config_from(toy_data(**changes), folder=here / "jobs")
    return {problem.path: problem.message for problem in fleeting(config, environment, here)}


def test_what_lies_in_the_copy_of_the_working_folder_is_refused(tmp_path: Path) -> None:
    found = problems(IN_A_JOB, tmp_path)
    assert list(found) == ["storage"]
    assert found["storage"].startswith(f"{tmp_path / 'jobs' / 'studies'} lies in the copy of --working-dir")
    assert found["storage"].endswith("--set storage=/shared/studies")
    outside = {"storage": "/shared/studies"}
    assert problems(IN_A_JOB, tmp_path, **outside) == {}
    inside = problems(
        IN_A_JOB, tmp_path, store=f"sqlite:///{tmp_path}/s.db", artifacts=f"file://{tmp_path}/a", **outside
    )
    assert list(inside) == ["store", "artifacts"]
    elsewhere = {"store": "postgresql+psycopg://me@host/duet", "artifacts": "s3://bucket/duet"}
    assert problems(IN_A_JOB, tmp_path, **elsewhere, **outside) == {}


def test_a_folder_of_rays_session_is_refused_whatever_the_working_folder(tmp_path: Path) -> None:
    plain = {JOB_VARIABLE: json.dumps({"runtime_env": {}})}
    session = tmp_path / "session_2026-01-31_10-00-00_000000_1" / "studies"
    assert "goes with the cluster" in problems(plain, tmp_path, storage=str(session))["storage"]
    assert problems(plain, tmp_path) == {}, "without --working-dir there is no copy"
    assert problems({}, tmp_path, storage=str(session)) == {}, "and outside a job nothing goes"


def test_the_line_that_goes_on_is_the_one_that_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(JOB_VARIABLE, raising=False)
    line = job_line("jobs/run_study.py", Path("a b.yaml"), ["storage=/shared"])
    assert line == "python jobs/run_study.py --config 'a b.yaml' --set storage=/shared"
    monkeypatch.setenv(JOB_VARIABLE, "{}")
    line = job_line("jobs/run_study.py", Path("a.yaml"), [])
    assert line == "ray job submit --working-dir . -- python jobs/run_study.py --config a.yaml"


@pytest.mark.parametrize("script", ["run_study.py", "score_domains.py"])
def test_a_job_that_would_lose_its_study_ends_before_it_starts(script: str, tmp_path: Path) -> None:
    write_study_file(tmp_path, toy_data())
    job = start_job(script, "--config", "study.yaml", cwd=tmp_path, **IN_A_JOB)
    output, said = job.communicate(timeout=120)
    assert (job.returncode, output) == (2, "")
    assert "error: storage: " in said
    assert "--set storage=/shared/studies" in said
    assert not (tmp_path / "studies").exists()


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_sigterm_pauses_and_the_same_command_goes_on_to_the_end(tmp_path: Path) -> None:
    study = write_study(tmp_path, search={"n_start": 2, "n_trials": 0}, confirm__finalists=0)
    (tmp_path / "hold-at").write_text("3")
    job = start_job("run_study.py", "--config", study.name, cwd=tmp_path)
    wait_for((tmp_path / "holding").exists, job)
    job.send_signal(signal.SIGTERM)
    (tmp_path / "hold-at").unlink()
    output, said = job.communicate(timeout=120)
    assert (job.returncode, output) == (130, ""), said
    assert "paused; everything finished is kept. To go on: python jobs/run_study.py --config study.yaml" in said
    assert "base" in said, "log lines tell of what ended"
    again = start_job("run_study.py", "--config", study.name, "--json", cwd=tmp_path)
    code, output = finish(again)
    assert code == 0
    assert [trial["name"] for trial in json.loads(output)["trials"]] == ["base", "t0000", "t0001"]
    assert (tmp_path / "studies" / "toy" / "report.html").is_file()
