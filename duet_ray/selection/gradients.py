"""Gradients over the LoRA linears: the validation gradient, and every row's dot product with a vector.

The ghost dot product: the gradient of a row's loss with respect to the weight of a linear layer is Σ_t δ_t x_tᵀ, with
x the layer's inputs and δ the loss's gradients at its outputs. Its dot product with a matrix V of the weight's shape
is therefore Σ_t δ_tᵀ V x_t, which one forward and one backward pass give for a whole batch of rows: no row's gradient
is ever formed, nor is any weight's. Rows padded on the right need no mask, since δ is zero on padding.

Vectors over the parameters are lists of float32 tensors, one per linear, in the order of `AdaptedModel.linears`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from duet_ray.errors import SelectionError
from duet_ray.likelihood import Batch, autocast, collate, length_groups, token_nll
from duet_ray.records import TokenRow

Vector = list[torch.Tensor]
"""One tensor per LoRA linear, of its weight's shape."""

OnPair = Callable[[int, torch.Tensor, torch.Tensor], None]
"""Called with (index of the linear, its inputs `(b, t, in)`, its output gradients `(b, t, out)`), both float32."""

OnDelta = Callable[[torch.Tensor], None]
"""Called with a linear's output gradients, in the model's arithmetic, in the backward pass."""

OnInput = Callable[[int, torch.Tensor], OnDelta]
"""Called with (index of the linear, its inputs) in the forward pass: what it holds on to is held until the backward."""


class Rows(Protocol):
    """Tokenised rows that may lie on disk: a domain's training or validation set."""

    @property
    def n_tokens(self) -> np.ndarray: ...

    def __len__(self) -> int: ...

    def rows(self, ids: Sequence[int]) -> list[TokenRow]: ...


@dataclass(frozen=True)
class RowList:
    """Rows in memory, as `Rows`."""

    items: Sequence[TokenRow]

    @property
    def n_tokens(self) -> np.ndarray:
        return np.array([len(row) for row in self.items])

    def __len__(self) -> int:
        return len(self.items)

    def rows(self, ids: Sequence[int]) -> list[TokenRow]:
        return [self.items[i] for i in ids]


@dataclass(frozen=True)
class RowView:
    """Some rows of a larger set, read when they are asked for."""

    source: Rows
    ids: np.ndarray

    @property
    def n_tokens(self) -> np.ndarray:
        return self.source.n_tokens[self.ids]

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, ids: Sequence[int]) -> list[TokenRow]:
        return self.source.rows([int(self.ids[i]) for i in ids])


@dataclass(frozen=True)
class AdaptedModel:
    """A model with LoRA adapters attached, in eval mode, and how to feed it."""

    model: Any
    names: tuple[str, ...]
    linears: tuple[nn.Linear, ...]
    """Every A and every B, in module order."""
    pad_id: int
    batch_size: int

    @classmethod
    def of(cls, model: Any, *, pad_id: int, batch_size: int) -> "AdaptedModel":
        """Find the LoRA linears.

        Raises:
            SelectionError: the adapters are not all on linear layers.
        """
        found: dict[str, Any] = {
            f"{name}.{kind}.{adapter}": linear
            for name, layer in model.named_modules()
            if isinstance(layer, LoraLayer)
            for kind, adapters in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B))
            for adapter, linear in adapters.items()
        }
        ours = {id(linear.weight) for linear in found.values() if isinstance(linear, nn.Linear)}
        others = [n for n, p in model.named_parameters() if "lora_" in n and id(p) not in ours]
        if others or not found:
            raise SelectionError(
                f"influence scores need adapters on linear layers only, found {', '.join(others[:3]) or 'none'}; "
                "set training.target_modules: all-linear"
            )
        return cls(model, tuple(found), tuple(found.values()), pad_id, batch_size)

    @property
    def device(self) -> torch.device:
        return self.linears[0].weight.device

    @property
    def weights(self) -> list[torch.Tensor]:
        return [linear.weight for linear in self.linears]

    @property
    def n_parameters(self) -> int:
        return sum(w.numel() for w in self.weights)

    def batches(self, rows: Rows) -> Iterator[tuple[list[int], Batch]]:
        """All rows, alike in length within a batch: (positions in `rows`, the batch)."""
        for ids in length_groups(rows.n_tokens.tolist(), self.batch_size):
            yield ids, collate(rows.rows(ids), self.pad_id, self.device)

    def token_nll(self, batch: Batch) -> torch.Tensor:
        """`likelihood.token_nll` in the arithmetic of training."""
        with autocast(self.model):
            return token_nll(self.model, batch)


@contextmanager
def trainable(adapted: AdaptedModel) -> Iterator[None]:
    """Let gradients reach the LoRA weights (an adapter that was loaded, not trained, is frozen)."""
    before = [w.requires_grad for w in adapted.weights]
    for weight in adapted.weights:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight, flag in zip(adapted.weights, before, strict=True):
            weight.requires_grad_(flag)


def add_to(total: Vector, part: Sequence[torch.Tensor]) -> None:
    """total += part, in place."""
    for t, p in zip(total, part, strict=True):
        t.add_(p)


def mean_gradient(adapted: AdaptedModel, rows: Rows) -> tuple[float, Vector]:
    """The mean NLL per completion token over all rows, and its gradient.

    Raises:
        SelectionError: the rows have no completion token.
    """
    total, n_loss_tokens = 0.0, 0
    gradient = [torch.zeros_like(w, dtype=torch.float32) for w in adapted.weights]
    with trainable(adapted):
        for _, batch in adapted.batches(rows):
            if batch.n_loss_tokens == 0:
                continue
            loss = adapted.token_nll(batch).sum()
            add_to(gradient, torch.autograd.grad(loss, adapted.weights))
            total += float(loss.detach())
            n_loss_tokens += batch.n_loss_tokens
    if n_loss_tokens == 0:
        raise SelectionError(f"none of the {len(rows)} rows has a completion token")
    return total / n_loss_tokens, [g / n_loss_tokens for g in gradient]


def ghost_products(
    adapted: AdaptedModel, rows: Rows, vector: Vector, on_rows: Callable[[int], None] | None = None
) -> np.ndarray:
    """Every row's gradient, dot `vector`.

    The loss of a row is the sum of NLL over its completion tokens: what the row adds to the training loss when it is
    drawn. So a long row has a score of larger size than a short one, of either sign.

    Args:
        on_rows: called after each batch with the number of rows done.

    Returns:
        `(n_rows,)` float64.
    """
    products = np.zeros(len(rows))
    done = 0
    for ids, batch in adapted.batches(rows):
        # One of the two sides of every linear has the width of the adapter's rank: the product is taken there, nothing
        # wider waits for the backward pass, and one sum at the end serves all linears.
        lefts: list[torch.Tensor] = []
        rights: list[torch.Tensor] = []

        def on_input(
            index: int, x: torch.Tensor, lefts: list[torch.Tensor] = lefts, rights: list[torch.Tensor] = rights
        ) -> OnDelta:
            v = vector[index]
            n_out, n_in = v.shape
            left = _float_product(x, v.T) if n_out < n_in else x

            def on_delta(delta: torch.Tensor) -> None:
                lefts.append(left.float())
                rights.append(delta.float() if n_out < n_in else delta.float() @ v)

            return on_delta

        _backward(adapted, batch, adapted.token_nll, on_input)
        if lefts:
            sums = (torch.cat(lefts, dim=-1) * torch.cat(rights, dim=-1)).sum(dim=(1, 2))
            products[ids] = sums.double().cpu().numpy()
        done += len(ids)
        if on_rows is not None:
            on_rows(done)
    return products


def _float_product(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """x @ matrix in float32, also where the model computes in less."""
    if not torch.is_autocast_enabled(x.device.type):
        return x.float() @ matrix
    with torch.autocast(x.device.type, enabled=False):
        return x.float() @ matrix


def backward_pairs(
    adapted: AdaptedModel, batch: Batch, losses: Callable[[Batch], torch.Tensor], on_pair: OnPair
) -> None:
    """Run one batch forward and backward, and hand over every linear's (inputs, output gradients).

    The backward pass ends at the embeddings and computes no weight's gradient.

    Args:
        losses: batch → any number of losses; their sum is what is differentiated.
    """

    def on_input(index: int, x: torch.Tensor) -> OnDelta:
        return lambda delta: on_pair(index, x.float(), delta.float())

    _backward(adapted, batch, losses, on_input)


def _backward(adapted: AdaptedModel, batch: Batch, losses: Callable[[Batch], torch.Tensor], on_input: OnInput) -> None:
    if batch.n_loss_tokens == 0:
        return
    with _tapped(adapted, tuple(batch.input_ids.shape), on_input) as embedded:
        total = losses(batch).sum()
        torch.autograd.grad(total, embedded)


@contextmanager
def _tapped(adapted: AdaptedModel, shape: tuple[int, ...], on_input: OnInput) -> Iterator[list[torch.Tensor]]:
    """Hooks on every linear; yields the list that will hold the embeddings, where the backward pass ends."""
    embedded: list[torch.Tensor] = []

    def keep_embeddings(_module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.requires_grad_(True))
        return output

    def tap(index: int) -> Callable[..., None]:
        def forward_hook(_module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            x = args[0].detach()
            if x.shape[:-1] != shape:
                raise SelectionError(
                    f"{adapted.names[index]} sees inputs of shape {tuple(x.shape)}, not (rows, tokens, width): "
                    "its rows cannot be told apart; leave it out of training.target_modules"
                )
            output.register_hook(on_input(index, x))

        return forward_hook

    handles = [linear.register_forward_hook(tap(index)) for index, linear in enumerate(adapted.linears)]
    handles.append(adapted.model.get_input_embeddings().register_forward_hook(keep_embeddings))
    try:
        with torch.enable_grad():
            yield embedded
    finally:
        for handle in handles:
            handle.remove()
