"""Loads the base model and its tokenizer, once per worker.

Every sample starts from this model (DUET, App. A.3), so it is loaded frozen and in eval mode, and trainers only ever
add to it. A model that cannot be loaded is a mistake in the study file and is reported as one, with the YAML path.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.utils import disable_progress_bars
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from duet_ray.config import StudyConfig
from duet_ray.errors import ConfigError, Problem, ResourceError
from duet_ray.training.memory import is_out_of_memory
from duet_ray.training.not_loadable import reason_of


def load_tokenizer(config: StudyConfig) -> Any:
    """The model's tokenizer; its pad token falls back to the end-of-sequence token.

    Raises:
        ConfigError: there is no tokenizer at `model.path`, or it has neither a pad nor an end-of-sequence token.
    """
    _quiet()
    path = _checked_path(config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=config.model.revision, trust_remote_code=config.model.trust_remote_code
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise _cannot_load("tokenizer", path, config, error) from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            message = f"the tokenizer of {path} has neither a pad nor an end-of-sequence token; add one to its files"
            raise ConfigError([Problem(path="model.path", message=message)])
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(config: StudyConfig, device: str | None = None) -> tuple[Any, Any]:
    """The base model, frozen and in eval mode, and its tokenizer.

    Args:
        device: where to put the model; None takes a GPU if there is one, else the CPU.

    Returns:
        (model, tokenizer).

    Raises:
        ConfigError: nothing loadable is at `model.path`.
        ResourceError: the model does not fit into the device's memory.
    """
    tokenizer = load_tokenizer(config)
    path = _checked_path(config)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            path,
            revision=config.model.revision,
            dtype=getattr(torch, config.model.dtype),
            trust_remote_code=config.model.trust_remote_code,
        )
        model = model.to(device)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise ResourceError(_too_large(path, config, device)) from error
        raise _cannot_load("model", path, config, error) from error
    except (OSError, ValueError, ImportError, KeyError, SafetensorError) as error:
        raise _cannot_load("model", path, config, error) from error
    if model.generation_config is not None and model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.requires_grad_(False).eval(), tokenizer


def _quiet() -> None:
    """No progress bars and no advice: a worker's output is read in a log, by someone who cannot act on it."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    disable_progress_bars()
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)


def _checked_path(config: StudyConfig) -> str:
    """`config.model_path`, refused where it can only be meant as a folder and is none, or holds no model."""
    path = config.model_path
    if Path(path).is_dir():
        if not (Path(path) / "config.json").is_file():
            message = f"{path} is a folder without config.json; give a model folder as `save_pretrained` writes it"
            raise ConfigError([Problem(path="model.path", message=message)])
        return path
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        message = f"no such folder: {config.resolve_path(path)}; give a model folder or a hub id (owner/name)"
        raise ConfigError([Problem(path="model.path", message=message)])
    return path


def _cannot_load(what: str, path: str, config: StudyConfig, error: Exception) -> ConfigError:
    revision = f" at revision {config.model.revision}" if config.model.revision else ""
    message = f"the {what} of {path}{revision} cannot be loaded: {reason_of(error)}"
    if not Path(path).is_dir():
        message += f"; {path} is no folder here, so it was looked for on the hub"
    return ConfigError([Problem(path="model.path", message=message)])


def _too_large(path: str, config: StudyConfig, device: str) -> str:
    files = [f for pattern in ("*.safetensors", "*.bin") for f in Path(path).glob(pattern)]
    size = f" ({sum(f.stat().st_size for f in files) / 2**30:.1f} GiB on disk)" if files else ""
    return (
        f"{path}{size} as {config.model.dtype} does not fit into the memory of {device}; "
        "use a smaller model, model.dtype: bfloat16, or a device with more memory"
    )
