"""The negative log-likelihood of completions: the one loss behind training, influence scores and held-out feedback.

For a row x with loss mask m, the loss is Σ_t m_t · −log p(x_t | x_<t), summed over the row's completion tokens. It
is kept as a sum with its token count, and divided only by whoever knows the whole: an optimizer step divides by the
completion tokens of the effective batch, so that accumulation, halving and data parallelism do not change it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from duet_ray.records import TokenRow


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right to one length."""

    input_ids: torch.Tensor
    """`(n_rows, n_tokens)` int64."""
    attention_mask: torch.Tensor
    """`(n_rows, n_tokens)` int64, 0 on padding."""
    loss_mask: torch.Tensor
    """`(n_rows, n_tokens)` bool; column 0 and padding are False."""

    @property
    def n_loss_tokens(self) -> int:
        return int(self.loss_mask.sum())


def pad_id(tokenizer: Any) -> int:
    """What rows are padded with: any token will do, since no padding is looked at."""
    found = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return int(found or 0)


def collate(rows: Sequence[TokenRow], pad_id: int, device: torch.device | str = "cpu") -> Batch:
    """Pad rows on the right to the longest of them."""
    n_tokens = max(len(row) for row in rows)
    input_ids = torch.full((len(rows), n_tokens), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros((len(rows), n_tokens), dtype=torch.int64)
    loss_mask = torch.zeros((len(rows), n_tokens), dtype=torch.bool)
    for index, row in enumerate(rows):
        input_ids[index, : len(row)] = torch.from_numpy(row.input_ids.astype("int64"))
        attention_mask[index, : len(row)] = 1
        loss_mask[index, : len(row)] = torch.from_numpy(row.loss_mask.astype(bool))
    loss_mask[:, 0] = False
    return Batch(input_ids.to(device), attention_mask.to(device), loss_mask.to(device))


def autocast(model: torch.nn.Module) -> torch.autocast:
    """bfloat16 arithmetic where the model's base is bfloat16 (its adapters are float32); no change otherwise."""
    weight = next(model.parameters())
    return torch.autocast(weight.device.type, dtype=torch.bfloat16, enabled=weight.dtype == torch.bfloat16)


def token_nll(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """The NLL of every predicted token.

    Returns:
        `(batch.n_loss_tokens,)` float32, row by row. Logits are made float32 only where a token is predicted, since
        the vocabulary is the widest tensor of a small model.
    """
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    predicted = batch.loss_mask[:, 1:]
    return F.cross_entropy(logits[:, :-1][predicted].float(), batch.input_ids[:, 1:][predicted], reduction="none")


def row_nll(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """The summed NLL of every row: `(n_rows,)` float32."""
    losses = token_nll(model, batch)
    owner = batch.loss_mask[:, 1:].nonzero()[:, 0]
    return torch.zeros(len(batch.input_ids), dtype=losses.dtype, device=losses.device).index_add(0, owner, losses)


def length_groups(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices in groups of at most `size`, alike in length, so that little is padded. For evaluation: order is free."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    for first in range(0, len(order), size):
        yield order[first : first + size]
