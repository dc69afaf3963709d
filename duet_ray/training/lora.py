"""LoRA fine-tuning: a fresh low-rank adapter per sample over one frozen base (Hu et al. 2022), through PEFT.

The base is loaded once per worker; a sample attaches an adapter, trains it and leaves it attached for the feedback,
and `reset` takes it off again, which costs milliseconds and leaves the base bit for bit as it was. A plain loop is
used and not a framework's trainer: it is as quick, it starts no processes and its imports are seconds, not tens.

The loss of an optimizer step is Σ NLL over the completion tokens of its effective batch, divided by their number, so
that the micro-batch size has no part in it. The base may be bfloat16; adapters and their Adam moments are float32.

All randomness (adapter start, order of rows, dropout) follows from the sample's seed. Global generators are forked
for the time of training and put back as they were.

With several workers in a group (`ranks`), each takes its part of every effective batch and the adapters' gradients
are added: adapters are small, so one message a step does it.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from transformers.pytorch_utils import Conv1D

from duet_ray.config import TrainingConfig
from duet_ray.errors import ConfigError, Problem, SampleFailed, StoreError
from duet_ray.likelihood import autocast, collate, pad_id, token_nll
from duet_ray.records import TokenRow
from duet_ray.training.base import Checkpoint, Halt, TrainReport
from duet_ray.training.batches import (
    effective_batches,
    learning_rate,
    micro_batch_size,
    micro_batches,
    n_steps_until,
    step_seed,
)
from duet_ray.training.blocks import in_blocks
from duet_ray.training.halted import Progress, TrainingState, one_step_on, read_state, write_state
from duet_ray.training.memory import free_memory, is_out_of_memory
from duet_ray.training.ranks import (
    OutOfStep,
    add_over_ranks,
    end_if_stopped,
    n_ranks,
    on_all_ranks_the_same,
    on_any_rank,
    rank,
)

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
"""PEFT's layout: what `save` writes and `load` needs."""


class LoraTrainer:
    """Trains one adapter after the other on the same frozen base. See `training.base.Trainer` for the contract."""

    artifact = "adapter"

    def __init__(self, model: Any, tokenizer: Any, training: TrainingConfig) -> None:
        """Take a base model in memory. It is frozen and put in eval mode; its weights are never written to."""
        self._base = model.requires_grad_(False).eval()
        self._pad_id = pad_id(tokenizer)
        self._training = training
        self._adapted: PeftModel | None = None

    @property
    def model(self) -> Any:
        return self._base if self._adapted is None else self._adapted

    def reset(self) -> None:
        if self._adapted is not None:
            self._base = self._adapted.unload().eval()
            self._adapted = None

    def train(
        self,
        rows: Sequence[TokenRow],
        *,
        seed: int,
        training: TrainingConfig | None = None,
        on_step: Callable[[int, int], None] | None = None,
        on_epoch: Callable[[Checkpoint], None] | None = None,
        halt: Halt | None = None,
    ) -> TrainReport:
        self.reset()
        training = training or self._training
        try:
            with private_generators(seed, self._device):
                return self._train(rows, seed, training, on_step, on_epoch, halt)
        except (RuntimeError, MemoryError) as error:
            self.reset()
            if not is_out_of_memory(error):
                raise
            reason = f"out of memory for the adapter (training.rank = {training.rank})"
            # Outside the passes the workers do not meet: the others wait for one that has failed alone.
            raise (SampleFailed if n_ranks() == 1 else OutOfStep)(reason) from error
        except BaseException:
            self.reset()
            raise

    def save(self, folder: Path) -> None:
        """Write `ADAPTER_FILES` into `folder`, which `PeftModel.from_pretrained` and vLLM load."""
        assert self._adapted is not None, "nothing is trained or loaded"
        write_adapter(self._adapted, folder)

    def load(self, folder: Path) -> None:
        """Attach an adapter that `save` wrote.

        Raises:
            StoreError: `folder` holds no adapter, a damaged one, or one of another model.
        """
        self.reset()
        if missing := [name for name in ADAPTER_FILES if not (folder / name).is_file()]:
            raise StoreError(f"{folder} holds no adapter: {' and '.join(missing)} not found")
        try:
            with private_generators(0, self._device):
                adapted = PeftModel.from_pretrained(self._base, str(folder), torch_device=str(self._device))
        except (RuntimeError, ValueError, SafetensorError) as error:
            strip_adapter(self._base)
            raise StoreError(f"the adapter in {folder} is damaged, or of another base model: {error}") from error
        self._adapted = adapted.eval()

    @property
    def _device(self) -> torch.device:
        return next(self._base.parameters()).device

    def _train(
        self,
        rows: Sequence[TokenRow],
        seed: int,
        training: TrainingConfig,
        on_step: Callable[[int, int], None] | None,
        on_epoch: Callable[[Checkpoint], None] | None,
        halt: Halt | None,
    ) -> TrainReport:
        if not rows:
            raise SampleFailed("a sample needs at least one row to train on, got none")
        started = written = time.perf_counter()
        batches = effective_batches(len(rows), training, seed)
        n_stop = n_steps_until(halt.after, len(batches)) if halt else len(batches)
        micro = micro_batch_size(training, max(map(len, rows)), self._device.type)
        self._adapted = attach_adapter(self._base, training)
        passes = _Passes(self._adapted, self._pad_id, min(micro, math.ceil(training.batch_size / n_ranks())))
        weights = {name: p for name, p in passes.model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(weights.values(), lr=0.0, weight_decay=training.weight_decay)
        state = read_state(halt.folder) if halt else None
        if not on_all_ranks_the_same(state.progress.n_done if state else 0, self._device):
            raise OutOfStep(f"the workers of the group do not find the same state in {halt and halt.folder}")
        progress = state.progress if state else None
        if state is not None:
            _take_up(state, weights, optimizer)
            passes.size = state.progress.micro_batch_size
        per_epoch = len(batches) // training.epochs
        with training_mode(passes.model, training):
            for step in range(progress.n_done if progress else 0, n_stop):
                end_if_stopped(self._device)
                rate = learning_rate(step, len(batches), training)
                loss = passes.backward([rows[i] for i in batches[step]], optimizer, step_seed(seed, step, rank()))
                norm = float(torch.nn.utils.clip_grad_norm_(weights.values(), training.max_grad_norm))
                check_finite(loss, norm, step, len(batches), rate)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                progress = one_step_on(progress, loss, passes.size)
                if on_step is not None:
                    on_step(step + 1, len(batches))
                if on_epoch is not None and (step + 1) % per_epoch == 0:
                    passes.model.eval()
                    on_epoch(_checkpoint(passes.model, optimizer, training, step + 1, len(batches)))
                    passes.model.train()
                if halt and is_due(halt, written, step + 1, n_stop, len(batches)):
                    if rank() == 0:
                        write_state(halt.folder, _state(progress, weights, optimizer))
                    written = time.perf_counter()
        assert progress is not None
        if progress.n_done == len(batches):
            check_trained([p for name, p in weights.items() if "lora_B" in name], training)
        return progress.report(rows, training.epochs, time.perf_counter() - started)


def _checkpoint(
    model: PeftModel, optimizer: torch.optim.Optimizer, training: TrainingConfig, n_done: int, n_steps: int
) -> Checkpoint:
    """The optimizer after `n_done` steps, which end an epoch."""
    per_epoch = n_steps // training.epochs
    rates = [learning_rate(step, n_steps, training) for step in range(n_done - per_epoch, n_done)]
    moments = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            # Adam has no state of a parameter that no gradient reached: a layer that the forward pass leaves out.
            state = optimizer.state.get(p) or {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            moments[name] = state["exp_avg"], state["exp_avg_sq"]
    return Checkpoint(
        epoch=n_done // per_epoch - 1, learning_rate=sum(rates) / per_epoch, n_steps=n_done, moments=moments
    )


def attach_adapter(base: Any, training: TrainingConfig) -> PeftModel:
    """A fresh adapter on the base, its start drawn from the generator as seeded by the caller; B is zero.

    Raises:
        ConfigError: the base has no layer that `training.target_modules` names, or no block of `training.layers`.
    """
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=training.rank,
        lora_alpha=training.alpha,  # type: ignore[arg-type]  # a float works: it is divided by r
        lora_dropout=training.dropout,
        target_modules=_targets(base, training),
        bias="none",
    )
    try:
        return get_peft_model(base, settings)
    except ValueError as error:
        strip_adapter(base)
        linears = sorted({n.rsplit(".", 1)[-1] for n, m in base.named_modules() if isinstance(m, torch.nn.Linear)})
        message = f"{error} The linear layers of this model are called: {', '.join(linears)}"
        raise ConfigError([Problem(path="training.target_modules", message=message)]) from error
    except BaseException:
        strip_adapter(base)
        raise


def _targets(base: Any, training: TrainingConfig) -> str | list[str]:
    """What is adapted, as PEFT takes it; in some blocks only, by whole names.

    PEFT's own `layers_to_transform` takes no "all-linear", and the number of an expert for that of a block.
    """
    if training.layers is None:
        return training.target_modules
    if training.target_modules == "all-linear":
        head = base.get_output_embeddings()
        named = [n for n, m in base.named_modules() if isinstance(m, torch.nn.Linear | Conv1D) and m is not head]
    else:
        endings = tuple(training.target_modules)
        named = [n for n, _ in base.named_modules() if n in endings or n.endswith(tuple(f".{e}" for e in endings))]
    # Where nothing has such a name at all, PEFT says so and what there is.
    return in_blocks(named, training.layers) if named else list(training.target_modules)


def strip_adapter(base: Any) -> None:
    """Take a half-attached adapter off the base after PEFT refused it or was interrupted."""
    for name, module in list(base.named_modules()):
        if isinstance(module, BaseTunerLayer):
            base.set_submodule(name, module.get_base_layer())
    if hasattr(base, "peft_config"):
        del base.peft_config


def write_adapter(adapted: PeftModel, folder: Path) -> None:
    """Write `ADAPTER_FILES` into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    # False, not PEFT's "auto": that would ask the hub whether the vocabulary of the base had grown.
    adapted.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)


@contextmanager
def private_generators(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators, and put them back as they were in the end."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def training_mode(model: Any, training: TrainingConfig) -> Iterator[None]:
    """A model, with an adapter or without, as it is trained; in eval mode in the end."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    model.train()
    if training.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        if training.gradient_checkpointing:
            base.gradient_checkpointing_disable()
            base.disable_input_require_grads()  # a hook on the embeddings, which transformers leaves behind
        model.eval()


def count_loss_tokens(rows: Sequence[TokenRow]) -> int:
    """The completion tokens of an effective batch.

    Raises:
        SampleFailed: there is none.
    """
    n_loss_tokens = sum(int(row.loss_mask[1:].sum()) for row in rows)
    if n_loss_tokens == 0:
        raise SampleFailed(f"an effective batch of {len(rows)} rows has no completion token to learn from")
    return n_loss_tokens


class _Passes:
    """The forward and backward passes of one sample, and their micro-batch size: halved once, if memory runs out."""

    def __init__(self, model: PeftModel, pad_id: int, size: int) -> None:
        self.model = model
        self.size = size
        self._pad_id = pad_id
        self._first_size = size
        self._device = next(model.parameters()).device

    def backward(self, rows: Sequence[TokenRow], optimizer: torch.optim.Optimizer, seed: int) -> float:
        """Leave the gradients of one effective batch in the weights.

        Only the step in which memory runs out is repeated: nothing was written to the weights in it.

        Args:
            rows: of the whole effective batch; each worker of the group takes its own.
            seed: of this worker's dropout in this step.

        Returns:
            The mean NLL per completion token of the effective batch.

        Raises:
            SampleFailed: memory ran out twice, or `rows` have no completion token.
        """
        n_loss_tokens = count_loss_tokens(rows)
        own = rows[rank() :: n_ranks()]
        while on_any_rank((loss := self._try(own, n_loss_tokens, seed)) is None, self._device):
            optimizer.zero_grad(set_to_none=True)
            free_memory()
            longest = max(map(len, rows))
            if self.size == 1 or self.size < self._first_size:
                sizes = f"{self.size} x {longest} tokens" + (
                    f", and before with {self._first_size} x {longest}" if self.size < self._first_size else ""
                )
                raise SampleFailed(
                    f"out of memory on {self._device} with a micro-batch of {sizes}; set a smaller "
                    "training.micro_batch_size, training.max_tokens or training.gradient_checkpointing: true"
                )
            self.size //= 2
        assert loss is not None
        if n_ranks() > 1:
            weights = [p for group in optimizer.param_groups for p in group["params"]]
            for p in weights:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            add_over_ranks([loss, *(p.grad for p in weights)])
        return float(loss)

    def _try(self, rows: Sequence[TokenRow], n_loss_tokens: int, seed: int) -> torch.Tensor | None:
        """The loss of these rows, with their gradients left in the weights; None if memory ran out.

        The error is dropped here: its frames hold the tensors.
        """
        total = torch.zeros((), device=self._device)
        torch.manual_seed(seed)
        try:
            for group in micro_batches([len(row) for row in rows], self.size):
                batch = collate([rows[i] for i in group], self._pad_id, self._device)
                with autocast(self.model):
                    loss = token_nll(self.model, batch).sum() / n_loss_tokens
                loss.backward()
                total += loss.detach()
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                return None
            raise
        return total


def is_due(halt: Halt, written: float, n_done: int, n_stop: int, n_steps: int) -> bool:
    """Whether the state is to be written after a step: at a stop before the end, and every so often before it."""
    if n_done == n_stop:
        return n_stop < n_steps
    return halt.every_seconds is not None and time.perf_counter() - written >= halt.every_seconds


def _state(
    progress: Progress, weights: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> TrainingState:
    adam = {name: optimizer.state[p] for name, p in weights.items() if p in optimizer.state}
    moments = {name: (of["exp_avg"], of["exp_avg_sq"]) for name, of in adam.items()}
    return TrainingState(progress=progress, weights=weights, moments=moments)


def _take_up(state: TrainingState, weights: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Go back to where the state was written."""
    with torch.no_grad():
        for name, p in weights.items():
            p.copy_(state.weights[name])
            if name in state.moments:
                mean, square = (moment.to(p.device) for moment in state.moments[name])
                step = torch.tensor(float(state.progress.n_done))
                optimizer.state[p] = {"step": step, "exp_avg": mean, "exp_avg_sq": square}


def check_finite(loss: float, norm: float, step: int, n_steps: int, rate: float) -> None:
    """Refuse a step whose loss or gradient norm is not finite; `step` is from 0.

    Raises:
        SampleFailed: one of them is not.
    """
    for what, value in (("loss", loss), ("gradient norm", norm)):
        if not math.isfinite(value):
            raise SampleFailed(
                f"the {what} is {value} at step {step + 1} of {n_steps} (learning rate {rate:g}); "
                "try a smaller training.learning_rate"
            )


def check_trained(started_at_zero: Sequence[torch.Tensor], training: TrainingConfig) -> None:
    """LoRA's B starts at zero, and an adapter with B = 0 is the base: such a sample has learned nothing.

    Raises:
        SampleFailed: all of them are still zero.
    """
    if started_at_zero and not any(bool(p.any()) for p in started_at_zero):
        raise SampleFailed(
            "training left the adapter untouched: every LoRA B is still zero after the last step "
            f"(training.learning_rate = {training.learning_rate:g})"
        )
