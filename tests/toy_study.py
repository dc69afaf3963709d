"""A whole study that trains in seconds: a tiny model, three domains of letters, a task that one of them answers.

The task asks for the letters of the domain `apples`, so the more of the mixture is `apples`, the lower the loss.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.tiny_model import write_tiny_model

WORDS = {"apples": "aaab", "bricks": "zzyy", "clouds": "qqqp"}


def write_rows(path: Path, word: str, n_rows: int, *, first: int = 0) -> Path:
    """`n_rows` different rows whose completions are made of one word's letters."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for number in range(first, first + n_rows):
            completion = "".join(word[(number * 7 + i * (1 + number % 3)) % len(word)] for i in range(6))
            file.write(json.dumps({"prompt": f"say {number}:", "completion": completion}) + "\n")
    return path


def toy_data(**changes: Any) -> dict[str, Any]:
    """The study file as plain data. `changes` are dotted paths with `__` for the dot: `search__n_trials=2`."""
    data: dict[str, Any] = {
        "name": "toy",
        "seed": 3,
        "model": {"path": "model", "dtype": "float32"},
        "domains": [{"name": name, "source": f"data/{name}.jsonl"} for name in WORDS],
        "mixture": {"n_rows": 24},
        "search": {"n_start": 3, "n_trials": 2},
        "sampling": {"k": 2},
        "training": {"rank": 4, "learning_rate": 2e-2, "batch_size": 8, "max_tokens": 32},
        "feedback": {"kind": "heldout_loss", "file": "data/task.jsonl"},
        "confirm": {"finalists": 1, "repeats": 1},
        "keep_best": 2,
    }
    for path, value in changes.items():
        here = data
        *parents, last = path.split("__")
        for part in parents:
            here = here.setdefault(part, {})
        here[last] = value
    return data


def write_toy_study(folder: Path, *, n_rows: int = 60, **changes: Any) -> Path:
    """Write model, data and study file into a folder, and return the study file's path."""
    write_tiny_model(folder / "model")
    for name, word in WORDS.items():
        write_rows(folder / "data" / f"{name}.jsonl", word, n_rows)
    write_rows(folder / "data" / "task.jsonl", WORDS["apples"], 16, first=1000)
    return write_study_file(folder, toy_data(**changes))


def write_study_file(folder: Path, data: Mapping[str, Any]) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(dict(data), sort_keys=False), encoding="utf-8")
    return path
