"""How much memory a sample will need, before anything is loaded.

The model is built on the meta device (shapes, no numbers), so that even a 70B model is counted in seconds. The estimate
is the sum of what is certain (weights, adapters with their gradients and Adam states) and of what is a rule of thumb
(activations), and is meant to tell "fits easily" from "does not fit", not to be exact. Importing this module loads
neither torch nor transformers, since every command does.
"""

from dataclasses import dataclass
from typing import Any

import psutil

from duet_ray.config import StudyConfig
from duet_ray.errors import ConfigError, Problem

GIB = 2**30
_ACTIVATION_TENSORS = 24
"""Hidden-size tensors kept per layer and token for the backward pass of a Llama-like block, attention included."""


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Of one worker, in GiB."""

    n_parameters: int
    n_trained: int
    weights_gib: float
    adapter_gib: float
    activations_gib: float
    micro_batch_size: int

    @property
    def total_gib(self) -> float:
        return self.weights_gib + self.adapter_gib + self.activations_gib

    def describe(self) -> str:
        return (
            f"about {self.total_gib:.1f} GiB per worker: weights {self.weights_gib:.1f}, adapter with optimizer "
            f"{self.adapter_gib:.1f}, activations {self.activations_gib:.1f} at micro-batch {self.micro_batch_size} "
            f"({self.n_parameters / 1e6:,.0f} M parameters, {self.n_trained / 1e6:,.1f} M trained)"
        )


def estimate_memory(config: StudyConfig) -> MemoryEstimate:
    """Estimate one worker's memory for the study's model and training settings.

    Raises:
        ConfigError: the model's configuration cannot be read, or no layer matches `training.target_modules`.
    """
    import torch

    model, about = _empty_model(config)
    training = config.training
    n_parameters = sum(p.numel() for p in model.parameters())
    head = model.get_output_embeddings()
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}
    if training.target_modules != "all-linear":
        wanted = tuple(training.target_modules)
        linears = {n: m for n, m in linears.items() if n in wanted or n.endswith(tuple(f".{w}" for w in wanted))}
        if not linears:
            kinds = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)})
            message = f"no linear layer is called {', '.join(wanted)}; there are: {', '.join(kinds)}"
            raise ConfigError([Problem(path="training.target_modules", message=message)])
    n_trained = sum(training.rank * (m.in_features + m.out_features) for m in linears.values())
    micro = training.micro_batch_size or resolved_micro_batch(training.batch_size)
    width = 2 if config.model.dtype == "bfloat16" else 4
    n_tokens = micro * training.max_tokens
    layers = 1 if training.gradient_checkpointing else about.num_hidden_layers
    per_token = layers * _ACTIVATION_TENSORS * about.hidden_size * width
    # Logits of the predicted tokens as they come, as float32, and their gradient.
    per_token += about.vocab_size * (width + 4 + 4)
    return MemoryEstimate(
        n_parameters=n_parameters,
        n_trained=n_trained,
        weights_gib=n_parameters * width / GIB,
        adapter_gib=n_trained * 16 / GIB,
        activations_gib=n_tokens * per_token / GIB,
        micro_batch_size=micro,
    )


def memory_problem(config: StudyConfig, estimate: MemoryEstimate) -> str | None:
    """What does not fit on this machine, with the first setting to change; None when it fits or is not known."""
    import torch

    if config.fleet.gpus_per_worker > 0:
        if not torch.cuda.is_available():
            return None  # The GPUs are on other nodes.
        free, where, n_workers = (
            torch.cuda.mem_get_info()[1] / GIB,
            "this GPU",
            1 / min(1, config.fleet.gpus_per_worker),
        )
    else:
        free, where, n_workers = psutil.virtual_memory().available / GIB, "this machine", config.fleet.groups
    need = estimate.total_gib * n_workers
    if need <= free:
        return None
    if estimate.activations_gib > estimate.weights_gib and estimate.micro_batch_size > 1:
        remedy = f"lower training.micro_batch_size (now {estimate.micro_batch_size})"
    elif config.fleet.groups > 1 and estimate.total_gib <= free:
        remedy = f"lower fleet.groups (now {config.fleet.groups})"
    elif config.model.dtype == "float32":
        remedy = "set model.dtype: bfloat16"
    else:
        remedy = "take a smaller model"
    return f"memory: {need:.1f} GiB may be needed and {where} has {free:.1f}; {remedy}"


def resolved_micro_batch(batch_size: int) -> int:
    """The micro-batch for `micro_batch_size: null`: the largest divisor of the batch up to 8."""
    return max(size for size in range(1, 9) if batch_size % size == 0)


def _empty_model(config: StudyConfig) -> tuple[Any, Any]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        about = AutoConfig.from_pretrained(
            config.model_path, revision=config.model.revision, trust_remote_code=config.model.trust_remote_code
        )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(about, trust_remote_code=config.model.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            [
                Problem(
                    path="model.path",
                    message=f"{config.model_path}: cannot be read as a causal language model: {reason}",
                )
            ]
        ) from None
    return model, about.get_text_config()
