"""Code that comes with a model runs only where the study file says so."""

import json
from pathlib import Path
from typing import Any

import pytest

from duet_ray.config import StudyConfig, config_from
from duet_ray.errors import ConfigError
from duet_ray.training import load_base
from duet_ray.training.estimate import estimate_memory
from tests.tiny_model import write_tiny_model
from tests.toy_study import toy_data

CODE = """
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

Path({place!r}).touch()


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that the model's own code makes when it runs."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = write_tiny_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    config |= {"model_type": "own", "architectures": ["OwnModel"], "auto_map": own}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(CODE.format(place=str(tmp_path / "code-ran")))
    return tmp_path / "code-ran"


def study(folder: Path, **model: Any) -> StudyConfig:
    return config_from(toy_data(model={"path": "model", "dtype": "float32", **model}), folder=folder)


@pytest.mark.parametrize("load", [load_base, estimate_memory])
def test_it_is_refused(tmp_path: Path, ran: Path, load: Any) -> None:
    config = study(tmp_path)
    with pytest.raises(ConfigError, match=r"code of its own.* unless model\.trust_remote_code is true") as error:
        load(config)
    assert error.value.problems[0].path.startswith("model")
    assert not ran.exists()


def test_it_runs_where_the_study_file_says_so(tmp_path: Path, ran: Path) -> None:
    model, _ = load_base(study(tmp_path, trust_remote_code=True), device="cpu")
    assert type(model).__name__ == "OwnModel"
    assert ran.exists()
