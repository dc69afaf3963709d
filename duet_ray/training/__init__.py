"""One mixture → one model: the base model, and the trainers by name. torch is loaded on use."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from duet_ray.config import StudyConfig, TrainingConfig
from duet_ray.errors import ConfigError, Problem
from duet_ray.training.base import Checkpoint, Halt, Stopped, Trainer, TrainReport

TRAINERS: dict[str, str] = {
    "lora": "duet_ray.training.lora:LoraTrainer",
    "full": "duet_ray.training.full:FullTrainer",
}
"""`training.method` → `"module:Class"`."""


def check_installed(training: TrainingConfig) -> None:
    """Say before the start, and not in every worker, that a package is missing.

    Raises:
        ConfigError: names the package and how to install it.
    """
    if training.method == "full" and find_spec("deepspeed") is None:
        message = 'full needs DeepSpeed, which is not installed: pip install "duet-ray[full]"'
        raise ConfigError([Problem(path="training.method", message=message)])


def make_trainer(training: TrainingConfig, model: Any, tokenizer: Any) -> Trainer:
    """The trainer that `training.method` names, around a base model in memory.

    Raises:
        ConfigError: no trainer has that name.
    """
    if training.method not in TRAINERS:
        message = f"no trainer is called {training.method!r}; there are: {', '.join(sorted(TRAINERS))}"
        raise ConfigError([Problem(path="training.method", message=message)])
    module, name = TRAINERS[training.method].split(":")
    trainer: Trainer = getattr(import_module(module), name)(model, tokenizer, training)
    return trainer


def load_base(config: StudyConfig, device: str | None = None) -> tuple[Any, Any]:
    """The base model, frozen and in eval mode, and its tokenizer: `training.base_model.load_base`."""
    from duet_ray.training import base_model

    return base_model.load_base(config, device)


def load_tokenizer(config: StudyConfig) -> Any:
    """The base model's tokenizer: `training.base_model.load_tokenizer`."""
    from duet_ray.training import base_model

    return base_model.load_tokenizer(config)


__all__ = [
    "TRAINERS",
    "Checkpoint",
    "Halt",
    "Stopped",
    "TrainReport",
    "Trainer",
    "check_installed",
    "load_base",
    "load_tokenizer",
    "make_trainer",
]
