"""The check without a hub or a network: every mistake at once, and what was not looked at said plainly."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from duet_ray.cli.app import app
from duet_ray.config import StudyConfig, config_from
from duet_ray.errors import ConfigError
from duet_ray.offline import check_offline, is_hub_id
from tests.toy_study import toy_data, write_study_file, write_toy_study


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **_: Any) -> None:
        raise AssertionError(f"a network attempt: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def hub_study(folder: Path, **changes: Any) -> StudyConfig:
    data = toy_data(
        model={"path": "owner/model"},
        domains=[{"name": "a", "source": "hf:owner/a"}, {"name": "b", "source": "hf:owner/b", "split": "train[:50%]"}],
        feedback={"kind": "lm_eval", "tasks": {"gsm8k": 1}, "metric": "exact_match,strict-match"}
        | {"direction": "maximize"},
        **changes,
    )
    return config_from(data, folder=folder)


def problems(config: StudyConfig) -> dict[str, str]:
    with pytest.raises(ConfigError) as error:
        check_offline(config)
    return {problem.path: problem.message for problem in error.value.problems}


def test_a_sound_study_of_the_hub_and_what_is_left_open(tmp_path: Path) -> None:
    found = check_offline(hub_study(tmp_path, store="postgresql+psycopg://me@host/duet"))
    assert "feedback: tasks gsm8k and their metrics, by lm-eval's task files" in found.checked
    assert "2 data sets of the hub: the form of their names" in found.checked
    open_ = "\n".join(found.not_checked)
    for expected in (
        "owner/model: ",
        "a (hf:owner/a, train), b (hf:owner/b, train[:50%])",
        "gsm8k: its data",
        "store: ",
    ):
        assert expected in open_


def test_a_sound_study_of_local_files(tmp_path: Path) -> None:
    from duet_ray.config import load_config

    found = check_offline(load_config(write_toy_study(tmp_path)))
    assert "3 local files: they are there and have these columns" in found.checked
    assert "feedback: heldout_loss can be measured" in found.checked
    assert not any("hub" in line for line in (*found.checked, *found.not_checked))


def test_every_problem_at_once(tmp_path: Path) -> None:
    write_toy_study(tmp_path)
    (tmp_path / "empty").mkdir()
    data = toy_data(
        model={"path": "./nowhere"},
        selection={"method": "influence", "surrogate": {"path": "no owner"}, "embedding_model": "empty"},
        domains=[
            {"name": "one", "source": "hf:gsm8k"},
            {"name": "two", "source": "hf:openai/gsm8k", "split": "train[half"},
            {"name": "three", "source": "data/aples.jsonl"},
            {"name": "four", "source": "data/apples.jsonl", "columns": {"prompt": "{question}"}},
            {"name": "five", "source": "hf:./gone"},
            {"name": "six", "source": "data/apples.jsonl", "columns": {"text": "prompt"}},
        ],
        search={"constraints": ["one >= 60 %", "two >= 60 %"]},
        feedback={"kind": "lm_eval", "tasks": {"gsm9k": 1, "gsm8k": 1}, "direction": "maximize"},
        also=[{"kind": "heldout_loss", "name": "x", "file": "nothing.jsonl"}],
    )
    with pytest.raises(ConfigError) as error:
        check_offline(config_from(data, folder=tmp_path))
    said = str(error.value)
    for expected in (
        "model.path: neither a folder (",
        "selection.surrogate.path: neither a folder (",
        "selection.embedding_model: ",
        "empty has no config.json",
        "domains[0].source (one): 'hf:gsm8k': must be hf:owner/name",
        "domains[1].source (two): 'hf:openai/gsm8k': split: 'train[half' is not a name",
        "domains[2].source (three): 'data/aples.jsonl'",
        "domains[3] (four): column '{question}' not found in any row; columns there: prompt, completion",
        "domains[4].source: no such folder: ",
        "domains[5].columns: text: no such column in format prompt_completion",
        "no ratio meets all of",
        "feedback.tasks.gsm9k: no task of lm-eval has that name; did you mean ",
        "feedback.metric: gsm8k has no metric 'acc,none', it has: exact_match,strict-match, ",
        "also[0]: feedback.file: no such file: ",
    ):
        assert expected in said, f"{expected!r} is not in:\n{said}"


def test_tasks_of_a_folder_of_ones_own(tmp_path: Path) -> None:
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "base.yaml").write_text("dataset_path: json\nmetric_list: [{metric: acc}, {metric: f1}]\n")
    (folder / "mine.yaml").write_text("include: base.yaml\ntask: mine\ndoc_to_text: !function code.text\n")
    (folder / "other.yaml").write_text("task: other\nclass: !function code.Task\n")
    (folder / "self.yaml").write_text("task: self\ninclude: self.yaml\n")
    feedback = {"kind": "lm_eval", "tasks_folder": "tasks", "direction": "maximize", "metric": "f1,none"}
    tasks = {"mine": 1, "other": 1, "self": 1}
    found = check_offline(config_from({**toy_hub(), "feedback": {**feedback, "tasks": tasks}}, folder=tmp_path))
    assert [line for line in found.not_checked if "metrics" in line] == [
        "other: whether f1,none is one of its metrics",
        "self: whether f1,none is one of its metrics",
    ]
    wrong = config_from({**toy_hub(), "feedback": {**feedback, "tasks": tasks, "metric": "f2,none"}}, folder=tmp_path)
    assert problems(wrong) == {"feedback.metric": "mine has no metric 'f2,none', it has: acc,none, f1,none"}


def toy_hub() -> dict[str, Any]:
    return {"name": "s", "model": {"path": "o/m"}, "domains": [{"name": "a", "source": "hf:o/a"}]}


@pytest.mark.parametrize("text", ["meta-llama/Meta-Llama-3-8B-Instruct", "Qwen/Qwen2.5-7B-Instruct", "o/n", "_a/b_"])
def test_a_hub_id(text: str) -> None:
    assert is_hub_id(text)


@pytest.mark.parametrize(
    "text", ["gsm8k", "a/b/c", "./a", "/a/b", "a/", "a/b--c", "a/..", "a/b c", "a/b.", "a" * 95 + "/b"]
)
def test_no_hub_id(text: str) -> None:
    assert not is_hub_id(text)


def test_the_command(tmp_path: Path) -> None:
    data = {**toy_hub(), "feedback": {"kind": "lm_eval", "tasks": {"sciq": 1}, "direction": "maximize"}}
    path = write_study_file(tmp_path, data)
    ended = CliRunner().invoke(app, ["validate", str(path), "--offline", "--json"])
    assert ended.exit_code == 0, ended.output
    shown = json.loads(ended.stdout)
    assert shown["ok"]
    assert any("sciq: its data" in line for line in shown["not_checked"])
    ended = CliRunner().invoke(app, ["validate", str(path), "--offline"])
    assert ended.exit_code == 0
    assert ended.stdout == ""
    assert "not checked: data sets of the hub" in ended.stderr
    assert "s is well-formed; " in ended.stderr
