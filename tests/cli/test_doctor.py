"""`duet doctor` as it is typed."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from duet_ray.cli import doctor
from duet_ray.cli.app import app
from tests.test_doctor import WELL
from tests.toy_study import toy_data, write_study_file


@pytest.mark.parametrize("changes", [{}, {"gpus": ()}, {"auth_mode": "disabled"}], ids=["well", "a note", "a problem"])
def test_the_exit_code_is_1_exactly_where_there_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, object]
) -> None:
    monkeypatch.setattr(doctor, "look", lambda *_, **__: replace(WELL, **changes))  # type: ignore[arg-type]
    shown = CliRunner().invoke(app, ["doctor"])
    assert shown.exit_code == ("auth_mode" in changes)
    assert "unset RAY_AUTH_MODE" in " ".join(shown.stdout.split()) or "auth_mode" not in changes


def test_for_real(tmp_path: Path) -> None:
    study = write_study_file(tmp_path, toy_data())
    secret = "plain-words-of-mine"
    environment = {**os.environ, "HF_TOKEN": secret, "PGPASSWORD": secret, "HOME": str(tmp_path), "COLUMNS": "200"}
    command = [sys.executable, "-c", "from duet_ray.cli import main; main()", "doctor", str(study), "--offline"]
    shown = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert shown.returncode in (0, 1), shown.stderr
    assert shown.stderr == ""
    as_json = subprocess.run([*command, "--json"], capture_output=True, text=True, env=environment, check=False)
    data = json.loads(as_json.stdout)
    levels = [finding["level"] for finding in data["findings"]]
    assert as_json.returncode == ("problem" in levels)
    assert data["ok"] == ("problem" not in levels)
    assert {"python", "packages", "cpu", "gpu", "authentication", "storage", "hub", "model"} <= {
        finding["about"] for finding in data["findings"]
    }
    assert secret not in shown.stdout + as_json.stdout
    assert not (tmp_path / "studies").exists(), "nothing is written"
    assert not (tmp_path / ".ray").exists()


def test_a_study_file_with_a_mistake(tmp_path: Path) -> None:
    study = write_study_file(tmp_path, {**toy_data(), "nmae": "x"})
    command = [sys.executable, "-c", "from duet_ray.cli import main; main()", "doctor", str(study), "--offline"]
    shown = subprocess.run(command, capture_output=True, text=True, check=False)
    assert shown.returncode == 2
    assert "did you mean `name`?" in shown.stderr
