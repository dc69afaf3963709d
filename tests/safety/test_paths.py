"""Nothing that a study file says makes us write outside its storage."""

import os
from pathlib import Path
from typing import Any

import pytest

from duet_ray.config import config_from
from duet_ray.errors import ConfigError
from duet_ray.preflight import Preflight, preflight
from tests.safety.fuzzing import result_or_message
from tests.toy_study import toy_data, write_toy_study

BAD_NAMES = ("..", ".", "../x", "/x", "a/b", "a\\b", "~", "a b", "-a", "", "a\n", "a\0", "é", "x" * 65, "con:")


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize("place", ["name", "domain", "feedback", "also"])
def test_names_are_words(place: str, name: str) -> None:
    data = toy_data()
    if place == "name":
        data["name"] = name
    elif place == "domain":
        data["domains"][0]["name"] = name
    elif place == "feedback":
        data["feedback"]["name"] = name
    else:
        data["also"] = [{**data["feedback"], "name": name}]
    with pytest.raises(ConfigError, match=r"must be 1 to 64 letters|NUL"):
        config_from(data, folder=Path())


def everything(folder: Path) -> dict[str, Any]:
    """Path → what tells whether it was touched, below a folder; links are not followed."""
    found = {}
    for here, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(here, name)
            status = path.lstat()
            found[str(path)] = status.st_mode if path.is_dir() and not path.is_symlink() else status.st_mtime_ns
    return found


CHANGES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "data from above": {"domains": [{"name": "a", "source": "../outside/rows.jsonl"}]},
    "data through a link": {"domains": [{"name": "a", "source": "linked/*.jsonl"}]},
    "data by a whole path": {"domains": [{"name": "a", "source": "{above}/outside/rows.jsonl"}]},
    "feedback from above": {"feedback": {"kind": "heldout_loss", "file": "../outside/rows.jsonl"}},
    "columns that are paths": {"domains": [{"name": "a", "source": "data/*.jsonl", "columns": {"prompt": "../x"}}]},
    "a storage that goes up and down": {"storage": "data/../studies"},
    "a hub id that goes up": {"domains": [{"name": "a", "source": "hf:../outside"}]},
    "a subset that goes up": {"domains": [{"name": "a", "source": "hf:owner/name", "subset": "../../../x"}]},
    "a revision that goes up": {"domains": [{"name": "a", "source": "hf:owner/name", "revision": "../../../x"}]},
    "a model's revision that goes up": {"model": {"path": "owner/name", "revision": "../../../x"}},
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_written_lies_below_the_storage(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    study = tmp_path / "study"
    file = write_toy_study(study)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "rows.jsonl").write_bytes((study / "data" / "apples.jsonl").read_bytes())
    (study / "linked").symlink_to(tmp_path / "outside")
    hub = tmp_path / "hub"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(hub))
    before = everything(tmp_path)
    data = {**toy_data(), **CHANGES[name]}
    for domain in data["domains"]:
        domain["source"] = domain["source"].replace("{above}", str(tmp_path))

    found = result_or_message(lambda: preflight(config_from(data, folder=file.parent)))
    reads = ("as it is", "data from above", "data through a link", "data by a whole path", "feedback from above")
    assert isinstance(found, Preflight) == (
        name in (*reads, "a storage that goes up and down", "a hub id that goes up")
    )
    changed = {path for path, mark in everything(tmp_path).items() if before.get(path) != mark}
    allowed = (str(study / "studies"), str(hub))
    assert changed or isinstance(found, str)
    assert [path for path in changed if not path.startswith(allowed)] == []
    assert not (before.keys() - everything(tmp_path).keys()), "nothing is deleted"
