import json

import pytest
import torch

from duet_ray.config import StudyConfig, config_from
from duet_ray.errors import ConfigError, ResourceError
from duet_ray.training import base_model
from duet_ray.training.base_model import load_base, load_tokenizer
from tests.tiny_model import tiny_llama, write_tiny_model


def study(folder, **model) -> StudyConfig:
    data = {
        "name": "s",
        "model": {"path": "model", "dtype": "float32", **model},
        "domains": [{"name": "a", "source": "a.jsonl"}],
        "feedback": {"kind": "heldout_loss", "file": "task.jsonl"},
    }
    return config_from(data, folder=folder)


@pytest.fixture
def folder(tmp_path):
    write_tiny_model(tmp_path / "model")
    return tmp_path


def test_the_base_is_loaded_frozen_and_in_eval_mode(folder):
    model, tokenizer = load_base(study(folder), device="cpu")
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    ids = torch.arange(4, 20)[None]
    assert torch.equal(model(ids).logits, tiny_llama()(ids).logits)
    assert tokenizer.pad_token == "<pad>"


def test_the_type_is_as_configured(folder):
    assert next(load_base(study(folder, dtype="bfloat16"), "cpu")[0].parameters()).dtype == torch.bfloat16


def test_loading_says_nothing(folder, capfd):
    load_base(study(folder), "cpu")
    assert capfd.readouterr() == ("", "")


def test_the_pad_token_falls_back_to_the_end_of_sequence(folder):
    file = folder / "model" / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    del settings["pad_token"]
    file.write_text(json.dumps(settings))
    tokenizer = load_tokenizer(study(folder))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2


def test_a_tokenizer_without_either_is_refused(folder):
    file = folder / "model" / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    del settings["pad_token"], settings["eos_token"]
    file.write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"model\.path: the tokenizer .* neither a pad nor an end-of-sequence token"):
        load_tokenizer(study(folder))


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(
        ConfigError, match=rf"model\.path: no such folder: {tmp_path}/none; give a model folder or a hub"
    ):
        load_base(study(tmp_path, path="./none"))


def test_a_folder_without_a_model_is_named(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(ConfigError, match=r"model\.path: .*/model is a folder without config\.json"):
        load_base(study(tmp_path))


def test_a_hub_id_that_cannot_be_reached_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.path: the tokenizer of no/such at revision abc cannot be loaded"):
        load_base(study(tmp_path, path="no/such", revision="abc"))


def test_a_damaged_model_is_named(folder):
    (folder / "model" / "model.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00nonsense")
    with pytest.raises(ConfigError, match=r"model\.path: the model of .* cannot be loaded"):
        load_base(study(folder), "cpu")


def test_a_model_that_does_not_fit_is_a_lack_of_memory(folder, monkeypatch):
    def fail(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(base_model.AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(ResourceError, match=r"0\.0 GiB on disk\) as float32 does not fit into the memory of cpu; use"):
        load_base(study(folder), "cpu")
