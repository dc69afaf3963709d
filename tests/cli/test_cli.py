"""The command line as its user meets it: messages, exit codes, and standard output fit for a pipe."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from duet_ray.cli.app import app
from duet_ray.config import load_config
from tests.toy_study import toy_data, write_rows, write_study_file, write_toy_study


def duet(*arguments: object) -> tuple[int, str, str]:
    code = "from duet_ray.cli import main; main()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    return ended.returncode, ended.stdout, ended.stderr


def test_help_names_every_verb() -> None:
    shown = CliRunner().invoke(app, ["--help"]).stdout
    for verb in ("init", "validate", "score", "run", "status", "report", "export"):
        assert verb in shown


def test_init_writes_a_file_that_loads_and_does_not_overwrite(tmp_path: Path) -> None:
    path = tmp_path / "new" / "study.yaml"
    assert duet("init", path)[0] == 0
    load_config(path)
    path.write_text("mine", encoding="utf-8")
    code, _, said = duet("init", path)
    assert code == 1
    assert "exists already; give another name, or --force to overwrite it" in said
    assert path.read_text() == "mine"


def test_validate_shows_what_there_is(tmp_path: Path) -> None:
    study = write_toy_study(tmp_path)
    with (tmp_path / "data" / "apples.jsonl").open("ab") as file:
        file.write(b'{"prompt": "p", "completion": ""}\n{"prompt": "p"\n\xff\xfe\n')
    code, output, said = duet("validate", study, "--set", "data.max_bad_rows=3", "--json")
    assert code == 0, said
    data = json.loads(output)
    assert [d["n_bad"] for d in data["domains"]] == [3, 0, 0]
    assert 0 < data["training_hours"] < 1
    assert 0.3 < data["memory_gib"] < 2
    assert [row["line"] for row in data["domains"][0]["bad"]] == [61, 62, 63]
    assert any(
        "apples: 3 bad rows left out, the first: " in note and "apples.jsonl:61" in note for note in data["notes"]
    )
    code, _, said = duet("validate", study)
    assert code == 1
    assert "3 of 63 rows are bad" in said
    assert "apples.jsonl:61" in said
    assert "max_bad_rows" in said


def test_every_data_problem_at_once(tmp_path: Path) -> None:
    write_toy_study(tmp_path)
    data = toy_data()
    data["domains"] = [
        {"name": "gone", "source": "data/aples.jsonl"},
        {"name": "wrong", "source": "data/apples.jsonl", "columns": {"prompt": "question"}},
        {"name": "empty", "source": "data/empty.jsonl"},
    ]
    (tmp_path / "data" / "empty.jsonl").write_text("")
    code, _, said = duet("validate", write_study_file(tmp_path, data))
    assert code == 1
    for expected in ("(gone)", "apples.jsonl", "(wrong)", "question", "(empty)"):
        assert expected in said


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model__path": "./nowhere"}, "model.path: no such folder: "),
        (
            {"training__target_modules": ["query"]},
            "training.target_modules: no linear layer is called query; there are: ",
        ),
        ({"feedback__file": "data/nothing.jsonl"}, "nothing.jsonl"),
        ({"mixture__n_rows": 500}, "500"),
        ({"mixture": {"n_rows": 60, "when_short": "error"}}, "mixture.when_short"),
    ],
    ids=["no-model", "no-layer", "no-task", "too-few-rows", "short"],
)
def test_what_validate_finds_before_anything_is_trained(tmp_path: Path, changes: dict, expected: str) -> None:  # type: ignore[type-arg]
    code, _, said = duet("validate", write_toy_study(tmp_path, **changes))
    assert code in (1, 2)
    assert expected in said
    assert "Traceback" not in said


def test_a_resume_with_another_file_or_other_data_is_refused(tmp_path: Path) -> None:
    from duet_ray.errors import StudyChanged
    from duet_ray.study import Study

    study = Study(load_config(write_toy_study(tmp_path)))
    with study._session(None):
        pass
    with pytest.raises(StudyChanged, match=r"another study file:\n  training.rank: 4 -> 8\nundo the change, or give"):
        Study(load_config(tmp_path / "study.yaml", ["training.rank=8"])).run()
    write_rows(tmp_path / "data" / "bricks.jsonl", "xyxy", 60)
    with pytest.raises(StudyChanged, match="started with other data: domain bricks; put the old data back"):
        study.run()


def test_no_study_yet(tmp_path: Path) -> None:
    study = write_toy_study(tmp_path)
    for verb in ("status", "report", "export"):
        code, output, said = duet(verb, study)
        assert (code, output) == (1, "")
        assert "there is no study here (no study.db); `duet run` starts one" in said


def test_a_wrong_study_file_has_exit_code_2(tmp_path: Path) -> None:
    data = toy_data()
    data["serch"] = {}
    code, output, said = duet("run", write_study_file(tmp_path, data))
    assert (code, output) == (2, "")
    assert "serch: unknown key; did you mean `search`? (study.yaml line" in said
