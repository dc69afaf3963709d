"""How much memory and time a study will need, before anything is loaded.

The model is built on the meta device (shapes, no numbers), so that even a 70B model is counted in seconds. The memory
is the sum of what is certain (weights, gradients, optimizer states) and of what a Llama-like block keeps for its
backward pass, tensor by tensor; it is meant to tell "fits easily" from "does not fit", and errs to the safe side: every
row is taken to be as long as the longest, and every token to be in the loss. `benchmarks/memory.py` compares it with
what trainings really take. The time is that of real passes through the model's first layers, measured in the call.

Importing this module loads neither torch nor transformers, since every command does.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import psutil

from duet_ray.budget import n_confirmations
from duet_ray.config import StudyConfig
from duet_ray.errors import ConfigError, Problem
from duet_ray.training.blocks import in_blocks
from duet_ray.training.not_loadable import reason_of
from duet_ray.training.searched import SECTION, common_batch_size, dearest

GIB = 2**30

_BYTES_PER_LOGIT = 12
"""At the peak of the loss: the logits, their float32 copy and its log-softmax; then the gradients of these."""

_BYTES_PER_ADAPTER_WEIGHT = 20
"""float32: weight, gradient, Adam's two moments, and what the optimizer's step works with."""

_HEAP = {"cpu": 1.5, "cuda": 1.1}
"""Memory of the process per byte in tensors that a pass keeps: the allocator's loss (measured; a CPU's is the heap)."""

_CPU_CHECKPOINTED = 0.7
"""Share of a whole pass that checkpointing still takes on a CPU: what the heap does not give back between layers."""

_BYTES_PER_DROPPED = {"cpu": 4, "cuda": 1}
"""What dropout keeps of every input: its mask, which a GPU's kernel has as one byte."""

PROCESS_GIB = {"cpu": 0.6, "cuda": 1.5}
"""Resident memory of a worker before it has a model: Python and its libraries."""

CUDA_GIB = 0.7
"""What CUDA itself takes of a GPU for every process (measured on an H100)."""

_BUCKET, _GATHERED = 500_000_000, 1_000_000_000
"""DeepSpeed's defaults, in numbers: the buffer that gradients are exchanged through, and, in stage 3, the weights that
are put together at a time."""

_SECONDS_PER_PACE = 0.4

_MOST_ON_CPU = 400_000_000
"""Weights in the layers that a CPU may time in a second or two."""

_USABLE = 0.8
"""Share of a GPU's memory that bundles of samples may fill."""


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Of one worker, in GiB."""

    n_parameters: int
    n_trained: int
    weights_gib: float
    states_gib: float
    """What is trained: adapters (or master weights), gradients and optimizer states."""
    activations_gib: float
    logits_gib: float
    step_gib: float
    """What the optimizer's step works with, when the activations are gone."""
    feedback_gib: float
    """What measuring takes: the whole model and a forward pass, when gradients and optimizer states are gone."""
    host_gib: float
    """In the memory of the machine: the process, a copy of the base, and optimizer states that are kept there."""
    micro_batch_size: int
    fuse: int
    device: str
    """`cpu` or `cuda`: on a CPU, `host_gib` is of the same memory as all else."""
    method: str
    searched: str = ""
    """The values of searched settings that it is for: none needs more."""

    @property
    def device_gib(self) -> float:
        """At the peak: in a pass, in the optimizer's step, or in the feedback; on a GPU with what CUDA takes."""
        return max(self._training_gib, self.feedback_gib) + (CUDA_GIB if self.device == "cuda" else 0)

    @property
    def _training_gib(self) -> float:
        return self.weights_gib + self.states_gib + max(self.activations_gib + self.logits_gib, self.step_gib)

    @property
    def total_gib(self) -> float:
        """Of the memory that is the scarce one: the GPU's, or on a CPU the machine's."""
        return self.device_gib + (self.host_gib if self.device == "cpu" else 0)

    def describe(self) -> str:
        trained = "gradients" if self.method == "full" else "adapters" if self.fuse > 1 else "adapter"
        parts = [
            f"weights {self.weights_gib:.1f}",
            f"{trained} with optimizer {self.states_gib:.1f}",
            f"activations {self.activations_gib:.1f} and logits {self.logits_gib:.1f} at micro-batch "
            f"{self.micro_batch_size}" + (f" of {self.fuse} samples in one pass" if self.fuse > 1 else ""),
        ]
        if self.step_gib > self.activations_gib + self.logits_gib:
            parts[-1] = f"the optimizer's step {self.step_gib:.1f}"
        if self.feedback_gib > self._training_gib:
            parts = [f"weights and feedback {self.feedback_gib:.1f} (training takes {self._training_gib:.1f})"]
        process = "process and a copy of the base" if self.method == "full" else "process"
        host = f", {process} {self.host_gib:.1f}"
        if self.device == "cuda":
            host = f", and {self.host_gib:.1f} GiB of host memory"
        return (
            f"about {self.total_gib:.1f} GiB per worker: {', '.join(parts)}{host} "
            f"({self.n_parameters / 1e6:,.0f} M parameters, {self.n_trained / 1e6:,.1f} M trained)"
            + (f"; this is for the dearest of the settings searched: {self.searched}" if self.searched else "")
        )


@dataclass(frozen=True)
class _Shapes:
    """What the estimate must know of a model."""

    n_parameters: int
    n_layers: int
    hidden: int
    wide: int
    """Width between the two halves of a block's feed-forward part."""
    heads: int
    """Width of all attention heads together."""
    vocabulary: int
    linears: tuple[tuple[str, int, int], ...]
    """(name, n_in, n_out) of every linear layer but the output's."""


def estimate_memory(config: StudyConfig) -> MemoryEstimate:
    """Estimate one worker's memory for the study's model and training settings, the dearest where they are searched.

    Raises:
        ConfigError: the model's configuration cannot be read, or no layer matches `training.target_modules` or
            `training.layers`.
    """
    model = config.model
    return _estimate(_dearest(config), _shapes(config.model_path, model.revision, model.trust_remote_code))


def _dearest(config: StudyConfig) -> StudyConfig:
    """The study with the searched settings that need the most memory."""
    if not config.search.also:
        return config
    shapes = _shapes(config.model_path, config.model.revision, config.model.trust_remote_code)
    return max(dearest(config), key=lambda one: _estimate(one, shapes).total_gib)


def memory_problem(config: StudyConfig, estimate: MemoryEstimate) -> str | None:
    """What does not fit, with the first setting to change; None when it fits.

    GPUs that are not visible from here may have any size: then what is needed is said, and that it is not known.
    """
    gpu_gib = _gpu_gib() if config.fleet.gpus_per_worker > 0 else None
    if config.fleet.gpus_per_worker > 0 and gpu_gib is None:
        return (
            f"memory: no GPU is visible from here, so it is not known whether {estimate.device_gib:.1f} GiB for each "
            "worker fit; `duet validate` on a node with a GPU tells"
        )
    lacking = _lacking(config, estimate, gpu_gib)
    if lacking is None:
        return None
    config, model = _dearest(config), config.model
    shapes = _shapes(config.model_path, model.revision, model.trust_remote_code)
    done, texts = config, list[str]()
    remedies = _remedies(config, estimate)
    for together in (False, True):
        for options in remedies:
            for text, change in options:
                changed = change(done)
                if _lacking(changed, _estimate(changed, shapes), gpu_gib) is None:
                    return f"{lacking}; {', '.join([*texts, text])}"
            if together and options:
                done = changed
                texts.append(text)
    return f"{lacking}; take a smaller model, or a larger machine"


@dataclass(frozen=True, kw_only=True)
class TimeEstimate:
    """How long the trainings of a study take; feedback, scoring and the search itself are not in it."""

    n_samples: int
    seconds_per_sample: float
    tokens_per_second: float
    """Of one group, on rows of the study's mean length."""
    flops_per_second: float
    """Of one group, counted as 6 per weight and token, 4 where the base is frozen; 2 more with checkpointing."""
    n_at_once: int

    @property
    def seconds(self) -> float:
        return self.n_samples * self.seconds_per_sample / self.n_at_once

    def describe(self) -> str:
        return (
            f"about {_duration(self.seconds)} for {self.n_samples} trainings, {self.n_at_once} at a time, of "
            f"{_duration(self.seconds_per_sample)} each ({self.tokens_per_second:,.0f} tokens/s and "
            f"{self.flops_per_second / 1e9:,.0f} GFLOP/s a group, measured just now on the model's first layers); "
            "feedback comes on top"
        )


def estimate_time(config: StudyConfig, n_tokens: float) -> TimeEstimate | None:
    """Measure real passes through one and two layers of the model, of made-up weights, and count up from there.

    Args:
        n_tokens: in a row, on average.

    Returns:
        None where it cannot be known in a few seconds: the GPUs are elsewhere, or a CPU has the layers of a large model
        to pass through.

    Raises:
        ConfigError: as `estimate_memory` does.
    """
    import torch

    config = _dearest(config)
    training, fleet = config.training, config.fleet
    is_gpu = fleet.gpus_per_worker > 0
    shapes = _shapes(config.model_path, config.model.revision, config.model.trust_remote_code)
    n_matrix = sum(n_in * n_out for _, n_in, n_out in shapes.linears) + shapes.hidden * shapes.vocabulary
    n_first = shapes.hidden * shapes.vocabulary * 2 + 2 * n_matrix // shapes.n_layers
    if (is_gpu and not torch.cuda.is_available()) or (not is_gpu and n_first > _MOST_ON_CPU):
        return None
    width = max(2, round(min(n_tokens, training.max_tokens)))
    fuse = training.fuse if training.fuse != "auto" else 1
    micro = fuse * (training.micro_batch_size or resolved_micro_batch(common_batch_size(config)))
    n_rows, device = min(micro, max(1, 4096 // width)), "cuda" if is_gpu else "cpu"
    if shapes.n_layers > 2:
        one, two = (_pass_seconds(config, n, n_rows, width, device) for n in (1, 2))
        seconds = one + (shapes.n_layers - 1) * max(two - one, 0.1 * one)
    else:
        seconds = _pass_seconds(config, shapes.n_layers, n_rows, width, device)
    n_per_sample = config.mixture.n_rows * training.epochs * width
    per_second = fleet.workers_per_group * n_rows * width / seconds
    flops = (4 if training.method == "lora" else 6) + (2 if training.gradient_checkpointing else 0)
    return TimeEstimate(
        n_samples=config.sampling.k_most * config.n_planned_trials + n_confirmations(config),
        seconds_per_sample=n_per_sample / per_second,
        tokens_per_second=per_second,
        flops_per_second=flops * n_matrix * per_second,
        n_at_once=min(fleet.groups, math.ceil(config.sampling.k_most * config.search.concurrent_trials / fuse)),
    )


def resolved_micro_batch(batch_size: int) -> int:
    """The micro-batch for `micro_batch_size: null`: the largest divisor of the batch up to 8."""
    return max(size for size in range(1, 9) if batch_size % size == 0)


def resolved_fuse(config: StudyConfig) -> tuple[int, list[str]]:
    """The number of samples in one pass for `training.fuse: auto`, and what there is to say of it.

    1 unless one worker trains LoRA. On a CPU it is 1: processes side by side are faster than one pass for all, and
    where the memory does not hold as many, fewer `fleet.groups` are the remedy (`memory_problem` says so), not another
    number here. On GPUs it is the largest bundle that the concurrent trials can keep every group busy with, and that
    fills at most 80 % of the memory of the smallest GPU here.

    Raises:
        ConfigError: as `estimate_memory` does.
    """
    sampling, fleet = config.sampling, config.fleet
    most = min(sampling.k_most, math.ceil(sampling.k_most * config.search.concurrent_trials / fleet.groups))
    if config.training.method != "lora" or fleet.workers_per_group > 1 or fleet.gpus_per_worker == 0 or most == 1:
        return 1, []
    gpu_gib = _gpu_gib()
    if gpu_gib is None:
        return 1, [
            f"training.fuse: auto is 1, since no GPU is visible from here; give a number up to {most} to train that "
            "many samples of a trial in one pass"
        ]
    usable = _USABLE * gpu_gib * min(1.0, fleet.gpus_per_worker)
    fitting = (n for n in range(most, 1, -1) if estimate_memory(_with_training(config, fuse=n)).device_gib <= usable)
    return next(fitting, 1), []


def _estimate(config: StudyConfig, shapes: _Shapes) -> MemoryEstimate:
    training, fleet = config.training, config.fleet
    device = "cuda" if fleet.gpus_per_worker > 0 else "cpu"
    width = 2 if config.model.dtype == "bfloat16" else 4
    micro = training.micro_batch_size or resolved_micro_batch(common_batch_size(config))
    micro = min(micro, math.ceil(training.batch_size / fleet.workers_per_group))
    fuse = training.fuse if training.fuse != "auto" and training.method == "lora" else 1
    n_tokens = fuse * micro * training.max_tokens
    model, host, step = float(shapes.n_parameters * width), PROCESS_GIB[device] * GIB, 0.0
    weights = model
    if training.method == "lora":
        adapted = _adapted(config, shapes)
        n_trained = sum(training.rank * (n_in + n_out) for _, n_in, n_out in adapted)
        states: float = fuse * n_trained * _BYTES_PER_ADAPTER_WEIGHT
        per_token = _lora_bytes(config, shapes, adapted, width)
    else:
        n_trained = shapes.n_parameters
        zero = _zero_bytes(config, n_trained, width)
        weights, states, step = zero.weights, zero.states, zero.step
        host += zero.host
        per_token = shapes.n_layers * _block_bytes(shapes, width, inputs=_distinct_inputs(shapes) + 2 * shapes.hidden)
    kept_bytes = per_token * _HEAP[device]
    if training.gradient_checkpointing:
        between = shapes.n_layers * shapes.hidden * width + per_token / shapes.n_layers
        kept_bytes = per_token * _CPU_CHECKPOINTED if device == "cpu" else between * _HEAP[device]
    logits = n_tokens * shapes.vocabulary * _BYTES_PER_LOGIT
    n_measured = getattr(config.feedback, "batch_size", 1) * training.max_tokens
    return MemoryEstimate(
        n_parameters=shapes.n_parameters,
        n_trained=n_trained,
        weights_gib=weights / GIB,
        states_gib=states / GIB,
        activations_gib=n_tokens * kept_bytes / GIB,
        logits_gib=logits / GIB,
        step_gib=step / GIB,
        feedback_gib=(model + n_measured * (shapes.vocabulary * _BYTES_PER_LOGIT + per_token / shapes.n_layers)) / GIB,
        host_gib=host / GIB,
        micro_batch_size=micro,
        fuse=fuse,
        device=device,
        method=training.method,
        searched=_said(config),
    )


def _said(config: StudyConfig) -> str:
    """The searched settings that have a part in the memory, with the values that they have here."""
    keys = ("rank", "dropout", "target_modules", "layers", "batch_size")
    paths = [(SECTION + key, getattr(config.training, key)) for key in keys]
    return ", ".join(f"{path} {'all' if v is None else v}" for path, v in paths if path in config.search.also)


def _lora_bytes(config: StudyConfig, shapes: _Shapes, adapted: list[tuple[str, int, int]], width: int) -> float:
    """Bytes per token that all layers keep with adapters on a frozen base."""
    training = config.training
    inputs = sum(n_in for _, n_in, _ in adapted)
    if width == 4 and training.dropout == 0:
        # Layers with the same input share it. In bfloat16 each adapter has a copy of its own, cast from float32.
        inputs = min(inputs, shapes.n_layers * _distinct_inputs(shapes))
    device = "cuda" if config.fleet.gpus_per_worker > 0 else "cpu"
    dropped = _BYTES_PER_DROPPED[device] * inputs if training.dropout else 0
    inner = width * training.rank * len(adapted)
    return shapes.n_layers * _block_bytes(shapes, width, inputs=0) + width * inputs + dropped + inner


def _block_bytes(shapes: _Shapes, width: int, *, inputs: int) -> float:
    """Bytes per token that a block keeps: gate, its activation and up; queries, keys, values (repeated to all heads)
    and the attention's output; both normalisations' float32 input; and `inputs` numbers for its linear layers."""
    return width * (3 * shapes.wide + 4 * shapes.heads + inputs) + 4 * 2 * shapes.hidden


def _distinct_inputs(shapes: _Shapes) -> int:
    """Numbers per token that a block's linear layers are given: to the attention and the feed-forward part, to their
    output layers."""
    return 2 * shapes.hidden + shapes.heads + shapes.wide


@dataclass(frozen=True, kw_only=True)
class _Zero:
    """Bytes of one worker of a group that trains every weight."""

    weights: float
    states: float
    step: float
    host: float


def _zero_bytes(config: StudyConfig, n_parameters: int, width: int) -> _Zero:
    """ZeRO (Rajbhandari et al. 2020): float32 master weights and two moments, and gradients summed in float32.

    Stage 1 splits master weights and moments over the workers, stage 2 the gradients too, stage 3 the weights too. The
    step works with two more float32 numbers a weight. A copy of the base waits in host memory.
    """
    zero, n_workers = config.training.zero, config.fleet.workers_per_group
    weights = n_parameters * width / (n_workers if zero.stage == 3 else 1)
    gradients = n_parameters * 4 / (n_workers if zero.stage >= 2 else 1)
    optimizer, step = n_parameters * 12 / n_workers, n_parameters * 8 / n_workers
    copy = n_parameters * width
    # A GPU gives a buffer all its memory at once; a CPU only what is written to.
    bucket = _BUCKET if config.fleet.gpus_per_worker > 0 else min(_BUCKET, n_parameters)
    gradients += bucket * (4 if zero.stage == 1 else width)
    weights += min(_GATHERED, n_parameters) * width if zero.stage == 3 else 0
    if zero.offload_optimizer:
        return _Zero(weights=weights, states=gradients, step=0.0, host=copy + optimizer + step)
    return _Zero(weights=weights, states=gradients + optimizer, step=step, host=copy)


def _adapted(config: StudyConfig, shapes: _Shapes) -> list[tuple[str, int, int]]:
    targets = config.training.target_modules
    adapted = list(shapes.linears)
    if targets != "all-linear":
        endings = tuple(f".{name}" for name in targets)
        adapted = [one for one in adapted if one[0] in targets or one[0].endswith(endings)]
    if not adapted:
        kinds = sorted({name.rsplit(".", 1)[-1] for name, _, _ in shapes.linears})
        message = f"no linear layer is called {', '.join(targets)}; there are: {', '.join(kinds)}"
        raise ConfigError([Problem(path="training.target_modules", message=message)])
    inside = set(in_blocks((name for name, _, _ in adapted), config.training.layers))
    return [one for one in adapted if one[0] in inside]


def _gpu_gib() -> float | None:
    """The memory of the smallest GPU that is visible from here; None when there is none."""
    import torch

    if not torch.cuda.is_available():
        return None
    return min(torch.cuda.mem_get_info(index)[1] for index in range(torch.cuda.device_count())) / GIB


def _lacking(config: StudyConfig, estimate: MemoryEstimate, gpu_gib: float | None) -> str | None:
    """What is needed and what there is, where that is less."""
    fleet = config.fleet
    host_gib, n_workers = psutil.virtual_memory().available / GIB, fleet.groups * fleet.workers_per_group
    if gpu_gib is not None:
        each = min(1.0, fleet.gpus_per_worker)
        need = estimate.device_gib / each
        if need > gpu_gib:
            sharing = f" by the {1 / each:g} workers that share it" if each < 1 else ""
            return f"memory: {need:.1f} GiB may be needed{sharing} and this GPU has {gpu_gib:.1f}"
        if estimate.host_gib * n_workers > host_gib:
            need = estimate.host_gib * n_workers
            return f"memory: {need:.1f} GiB of host memory may be needed and this machine has {host_gib:.1f}"
        return None
    need = estimate.total_gib * n_workers
    if need <= host_gib:
        return None
    return f"memory: {need:.1f} GiB may be needed by {n_workers} workers and this machine has {host_gib:.1f}"


Change = Callable[[StudyConfig], StudyConfig]


def _remedies(config: StudyConfig, estimate: MemoryEstimate) -> list[list[tuple[str, Change]]]:
    """For each setting to change, those first that cost least, its values in the same order: (text, change)."""
    training, fleet, is_full = config.training, config.fleet, config.training.method == "full"

    def trained(**changes: Any) -> Change:
        return lambda config: _with_training(config, **changes)

    def in_zero(**changes: Any) -> Change:
        return lambda config: _with_training(config, zero=config.training.zero.model_copy(update=changes))

    def in_groups(n: int) -> Change:
        return lambda config: config.model_copy(update={"fleet": config.fleet.model_copy(update={"groups": n})})

    def halved(config: StudyConfig) -> StudyConfig:
        return config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bfloat16"})})

    fuse, micro, groups = estimate.fuse, estimate.micro_batch_size, fleet.groups
    sizes = [n for n in range(micro - 1, 0, -1) if training.batch_size % n == 0]
    stages = range(training.zero.stage + 1, 4) if is_full and fleet.workers_per_group > 1 else ()
    offloads = is_full and fleet.gpus_per_worker > 0 and not training.zero.offload_optimizer
    return [
        [(f"lower training.fuse (now {fuse}) to {n}", trained(fuse=n)) for n in range(fuse - 1, 0, -1)],
        [(f"lower training.micro_batch_size (now {micro}) to {n}", trained(micro_batch_size=n)) for n in sizes],
        [(f"lower fleet.groups (now {groups}) to {n}", in_groups(n)) for n in range(groups - 1, 0, -1)],
        [(f"set training.zero.stage: {n}", in_zero(stage=n)) for n in stages],
        [("set training.zero.offload_optimizer: true", in_zero(offload_optimizer=True))] if offloads else [],
        [("set training.gradient_checkpointing: true", trained(gradient_checkpointing=True))]
        if not training.gradient_checkpointing
        else [],
        [("set model.dtype: bfloat16", halved)] if config.model.dtype == "float32" else [],
        [("set training.method: lora", trained(method="lora"))] if is_full else [],
    ]


def _with_training(config: StudyConfig, **changes: Any) -> StudyConfig:
    return config.model_copy(update={"training": config.training.model_copy(update=changes)})


def _pass_seconds(config: StudyConfig, n_layers: int, n_rows: int, n_tokens: int, device: str) -> float:
    """The shortest of a few forward and backward passes through the model's first layers, made of constant weights."""
    import torch

    from duet_ray.likelihood import Batch, autocast, token_nll
    from duet_ray.training.lora import attach_adapter, private_generators, training_mode

    # Some of the blocks alone may be adapted, and here are the first ones only: all of these are.
    training, model_config = config.training.model_copy(update={"layers": None}), config.model
    about = _about(config.model_path, model_config.revision, model_config.trust_remote_code)
    text = about.get_text_config()
    text.num_hidden_layers = n_layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:n_layers]
    with torch.device("meta"):
        base = _from_config(about, model_config.trust_remote_code)
    base = base.to(getattr(torch, model_config.dtype)).to_empty(device=device)
    for tensor in (*base.parameters(), *base.buffers()):
        tensor.data.fill_(0.01 if tensor.is_floating_point() else 0)
    n_threads = torch.get_num_threads()
    is_lora = training.method == "lora"
    with private_generators(0, torch.device(device)):
        model = attach_adapter(base.requires_grad_(False), training).to(device) if is_lora else base
    ids = torch.ones(n_rows, n_tokens, dtype=torch.int64, device=device)
    batch = Batch(ids, ids, ids.bool() & (torch.arange(n_tokens, device=device) > 0))
    shortest, until = math.inf, time.perf_counter() + _SECONDS_PER_PACE
    try:
        torch.set_num_threads(max(1, int(config.fleet.cpus_per_worker)))
        with training_mode(model, training):
            for number in range(8):
                started = time.perf_counter()
                with autocast(model):
                    loss = token_nll(model, batch).sum()
                loss.backward()
                if device == "cuda":
                    torch.cuda.synchronize()
                model.zero_grad(set_to_none=True)
                ended = time.perf_counter()
                # The first pass has to warm up.
                shortest = min(shortest, ended - started) if number else shortest
                if number and ended > until:
                    break
    finally:
        torch.set_num_threads(n_threads)
    return shortest


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


@lru_cache(maxsize=8)
def _shapes(path: str, revision: str | None, trust_remote_code: bool) -> _Shapes:
    import torch
    from transformers.pytorch_utils import Conv1D

    about = _about(path, revision, trust_remote_code)
    try:
        with torch.device("meta"):
            model = _from_config(about, trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable(path, error) from None
    text, head = about.get_text_config(), model.get_output_embeddings()
    linears = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            linears.append((name, module.in_features, module.out_features))
        elif isinstance(module, Conv1D):  # the linear layer of GPT-2
            linears.append((name, *module.weight.shape))
    hidden, n_heads = text.hidden_size, text.num_attention_heads
    experts = getattr(text, "num_experts_per_tok", None) or 1
    return _Shapes(
        n_parameters=sum(p.numel() for p in model.parameters()),
        n_layers=text.num_hidden_layers,
        hidden=hidden,
        wide=experts * (getattr(text, "intermediate_size", None) or 4 * hidden),
        heads=n_heads * (getattr(text, "head_dim", None) or hidden // n_heads),
        vocabulary=text.vocab_size,
        linears=tuple(linears),
    )


def _about(path: str, revision: str | None, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable(path, error) from None


def _from_config(about: Any, trust_remote_code: bool) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(about, trust_remote_code=trust_remote_code)


def _unreadable(path: str, error: Exception) -> ConfigError:
    message = f"{path}: cannot be read as a causal language model: {reason_of(error)}"
    return ConfigError([Problem(path="model.path", message=message)])
