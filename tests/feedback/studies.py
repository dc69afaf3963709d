"""A study around one feedback section, in a folder with the files that it names."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from duet_ray.config import StudyConfig, config_from


def study(folder: Path, feedback: Mapping[str, Any], **more: Any) -> StudyConfig:
    data = {
        "name": "toy",
        "model": {"path": "model"},
        "domains": [{"name": "a", "source": "a.jsonl"}],
        "feedback": dict(feedback),
        **more,
    }
    return config_from(data, folder=folder)


def write_jsonl(file: Path, rows: Sequence[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


PAIRS = [
    {"prompt": "the cat", "completion": "sat"},
    {"prompt": "two and two", "completion": "are four"},
    {"prompt": "a", "completion": "longer answer than the others here"},
    {"prompt": "sky", "completion": "blue"},
    {"prompt": "grass is", "completion": "green"},
]

ITEMS = [
    {"question": "sky", "choices": ["blue", "a green thing", "red"], "answer": 0},
    {"question": "two and two", "choices": ["five", "four"], "answer": 1},
    {"question": "cats", "choices": ["bark", "meow", "sing", "fly away"], "answer": 1},
    {"question": "ice is", "choices": ["cold", "hot"], "answer": 0},
]

TASK_YAML = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
"""


def write_task(folder: Path, name: str = "toy_task", items: Sequence[Any] = ITEMS, data: str | None = None) -> Path:
    """A folder with one multiple-choice task and its data, which the task names by a relative path."""
    folder.mkdir(exist_ok=True)
    write_jsonl(folder / f"{name}.jsonl", items)
    (folder / f"{name}.yaml").write_text(TASK_YAML.format(name=name, data=data or f"{name}.jsonl"), encoding="utf-8")
    return folder
