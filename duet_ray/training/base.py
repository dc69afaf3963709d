"""The contract of a trainer: rows → a fine-tuned model in memory, always from the same base.

A trainer is made once per worker around the loaded base model and then asked for one sample after the other. It must
leave no trace of one sample in the next.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from duet_ray.records import TokenRow


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """What a training run says of itself; stored with the sample and shown."""

    n_rows: int
    n_steps: int
    n_tokens: int
    """Tokens processed over all epochs, without padding."""
    first_loss: float
    """Mean NLL per completion token of the first optimizer step."""
    last_loss: float
    micro_batch_size: int
    """As used in the end; half the one asked for after an out-of-memory."""
    seconds: float

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


class Trainer(Protocol):
    """Fine-tunes the base on a sample's rows."""

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
        on_step: Callable[[int, int], None] | None = None,
        on_epoch: Callable[[Checkpoint], None] | None = None,
    ) -> TrainReport:
        """Fine-tune a fresh copy of the base.

        Args:
            rows: the mixture, in any order; shuffled by `seed`.
            seed: seeds the adapter's start, the order of rows and dropout. Same rows and seed, same model.
            on_step: called after each optimizer step with (steps done, steps in all).
            on_epoch: called at the end of each epoch, with the model in eval mode; may call `save`.

        Raises:
            SampleFailed: the loss is not finite, memory ran out twice, or training left the adapter untouched.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write the fine-tuned weights (safetensors) into a new folder."""
        ...

    def load(self, folder: Path) -> None:
        """Take fine-tuned weights that `save` wrote."""
        ...
