"""The contract of a trainer: rows → a fine-tuned model in memory, always from the same base.

A trainer is made once per worker around the loaded base model and then asked for one sample after the other. It must
leave no trace of one sample in the next.

A group may have several workers (`ranks`): each has a trainer, and all make the same calls of `train` with the same
arguments. What a sample is does not depend on their number: each takes its part of every effective batch. All of them
get the same report, or the same error. Afterwards the first worker's trainer has the whole model; `save`, `load`,
`reset` and the feedback are the first worker's alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from duet_ray.config import TrainingConfig
from duet_ray.records import TokenRow


class Stopped(BaseException):
    """What is under way is to end at once. Not an `Exception`, so that no feedback takes it for its own."""


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """What a training run says of itself; stored with the sample and shown."""

    n_rows: int
    n_steps: int
    """Optimizer steps from the start of the sample; below the planned number when it was stopped before its end."""
    n_tokens: int
    """Tokens processed over all epochs, without padding."""
    first_loss: float
    """Mean NLL per completion token of the first optimizer step."""
    last_loss: float
    micro_batch_size: int
    """As used in the end; half the one asked for after an out-of-memory."""
    seconds: float
    """In this process; what an earlier one did before it died is not in it."""
    n_skipped: int = 0
    """Optimizer steps that changed no weight, because the gradients had overflown."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The optimizer at the end of an epoch; the weights are those in memory at that moment."""

    epoch: int
    """From 0."""
    learning_rate: float
    """Mean over the epoch's steps."""
    n_steps: int
    """Optimizer steps so far."""
    moments: Mapping[str, tuple[Any, Any]]
    """Name of a trained parameter → Adam's running means (m, v) of its gradient and its square, not bias-corrected.
    The optimizer's own tensors: to be copied or written down before the call ends."""


@dataclass(frozen=True, kw_only=True)
class Halt:
    """Where a sample's training can leave off, and be taken up again with the same result.

    The state in `folder` is of one sample's rows, seed and settings; whoever gives the folder sees to that, and removes
    it in the end.
    """

    folder: Path
    """Holds the state of the training, if it was begun; taken up from there."""
    every_seconds: float | None = None
    """Write the state so often."""
    after: float = 1.0
    """Share of the steps to stop after, writing the state; 1 is the end, where no state is written."""


class Trainer(Protocol):
    """Fine-tunes the base on a sample's rows."""

    artifact: str
    """What `save` writes, and the name of its folder: `adapter` in PEFT's layout, or `model`, a whole one."""

    @property
    def model(self) -> Any:
        """The model in memory: fine-tuned after `train` or `load`, the untouched base after `reset`. In eval mode."""
        ...

    def reset(self) -> None:
        """Back to the untouched base."""
        ...

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
        """Fine-tune a fresh copy of the base.

        Args:
            rows: the mixture, in any order; shuffled by `seed`.
            seed: seeds the adapter's start, the order of rows and dropout. Same rows, seed and settings, same model.
            training: settings of this sample, of the trainer's own method; None: those the trainer was made with.
            on_step: called after each optimizer step with (steps done, steps in all).
            on_epoch: called at the end of each epoch, with the model in eval mode; may call `save`.
            halt: where to leave off and take up; None trains from the start to the end.

        Raises:
            SampleFailed: the loss is not finite, memory ran out twice, or training left the weights untouched.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write the fine-tuned weights (safetensors) into a new folder."""
        ...

    def load(self, folder: Path) -> None:
        """Take fine-tuned weights that `save` wrote."""
        ...
