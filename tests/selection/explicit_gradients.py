"""The reference for LESS and TracIn: the warm-up again, and one backward pass by autograd for every row."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from duet_ray.config import SelectionConfig, TrainingConfig
from duet_ray.likelihood import collate, row_nll
from duet_ray.records import TokenRow
from duet_ray.selection.base import SelectionContext
from duet_ray.selection.fitting import FIT, domain_seed
from duet_ray.selection.projection import CountSketch
from duet_ray.training import Checkpoint
from duet_ray.training.lora import LoraTrainer
from tests.selection.toy_domain import ToyDomain
from tests.tiny_model import tiny_llama, tiny_tokenizer

TRAINING = TrainingConfig(
    rank=4, alpha=8, learning_rate=2e-2, batch_size=8, max_tokens=16, target_modules=["q_proj", "v_proj", "down_proj"]
)


def context_of(model: Any = None, *, on_progress=None, training: TrainingConfig = TRAINING, **settings):
    model = model if model is not None else tiny_llama()
    return SelectionContext(
        settings=SelectionConfig(**{"batch_size": 16, **settings}),
        training=training,
        seed=0,
        load_base=lambda: (model, tiny_tokenizer()),
        on_progress=on_progress,
    )


@dataclass(frozen=True)
class Moment:
    """One checkpoint, all parameters in one float64 vector, in the order of the model."""

    train: torch.Tensor
    """`(n_rows, n)`: each row's gradient of its summed NLL."""
    validation: torch.Tensor
    m: torch.Tensor
    v: torch.Tensor
    learning_rate: float


def moments_by_hand(domain: ToyDomain, context: SelectionContext, epochs: int) -> list[Moment]:
    """Train on all rows of `domain` and look at every row's gradient at the end of every epoch."""
    trainer = LoraTrainer(tiny_llama(), tiny_tokenizer(), context.training.model_copy(update={"epochs": epochs}))
    found: list[Moment] = []

    def keep(checkpoint: Checkpoint) -> None:
        weights = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
        assert list(weights) == list(checkpoint.moments)
        m, v = (flat([pair[i] for pair in checkpoint.moments.values()]) for i in (0, 1))

        def gradients(rows: Sequence[TokenRow]) -> torch.Tensor:
            losses = (row_nll(trainer.model, collate([row], 0)).sum() for row in rows)
            return torch.stack([flat(torch.autograd.grad(loss, list(weights.values()))) for loss in losses])

        train, validation = gradients(domain.train.items), gradients(domain.validation.items)
        found.append(Moment(train, validation, m, v, checkpoint.learning_rate))

    trainer.train(domain.train.items, seed=domain_seed(context, domain, FIT), on_epoch=keep)
    return found


def flat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.detach().double().flatten() for t in tensors])


def n_loss_tokens(rows: Sequence[TokenRow]) -> torch.Tensor:
    return torch.tensor([float(row.loss_mask.sum()) for row in rows], dtype=torch.float64)


def dense(sketch: CountSketch) -> torch.Tensor:
    """The projection as a matrix, `(size, n)` float64."""
    buckets = torch.cat(sketch.buckets).long()
    matrix = torch.zeros(sketch.size, len(buckets), dtype=torch.float64)
    matrix[buckets % sketch.size, torch.arange(len(buckets))] = torch.where(buckets < sketch.size, 1.0, -1.0).double()
    return matrix


def recorded(monkeypatch, module: Any, name: str) -> list[Any]:
    """Note what a function of `module` returns, from now on."""
    original: Callable[..., Any] = getattr(module, name)
    results: list[Any] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        results.append(original(*args, **kwargs))
        return results[-1]

    monkeypatch.setattr(module, name, call)
    return results
