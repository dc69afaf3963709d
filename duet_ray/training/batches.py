"""Which rows go into which optimizer step, how a step is cut into micro-batches, and at what learning rate.

Effective batches are a plain seeded shuffle, so that every step sees a fair draw of the mixture: sorting a whole
epoch by length, as is usual, would fill steps with a single domain. Only inside an effective batch are the rows put
in order of length and cut into micro-batches. The loss is a sum over the effective batch, so this changes the padding
and nothing else.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from duet_ray.config import TrainingConfig

TOKENS_PER_PASS = {"cuda": 8192, "cpu": 1024}
"""Padded tokens in one forward pass when `micro_batch_size` is null; a CPU gains nothing from more."""

SHORT = 64
"""Rows up to this length share a pass whatever their lengths are: another pass costs more than the padding."""


def effective_batches(n_rows: int, training: TrainingConfig, seed: int) -> list[np.ndarray]:
    """The rows of every optimizer step over all epochs: every row once an epoch, shuffled anew for each."""
    generator = np.random.default_rng(seed)
    size = training.batch_size
    orders = [generator.permutation(n_rows) for _ in range(training.epochs)]
    return [order[first : first + size] for order in orders for first in range(0, n_rows, size)]


def micro_batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Cut one effective batch into forward passes of at most `size` rows, longest rows first.

    A pass also ends where the next row is less than half as long as its longest, so that under half of it is padding.

    Yields:
        Positions in `lengths`; every position exactly once.
    """
    for (group,) in common_micro_batches([lengths], size):
        yield group


def common_micro_batches(lengths: Sequence[Sequence[int]], size: int) -> Iterator[list[list[int]]]:
    """Cut several effective batches, which share their forward passes, at the same places.

    Batches of as many rows have as many rows in every pass, whatever the lengths of their own rows are.

    Args:
        lengths: of the rows of every batch.
        size: rows of each batch in one pass, at most.

    Yields:
        For every batch, its positions in the pass: as `micro_batches` cuts a batch that has the longest row of all at
        every place; none where its rows have run out.
    """
    orders = [sorted(range(len(own)), key=lambda i: (-own[i], i)) for own in lengths]
    n_places = max(map(len, orders), default=0)
    longest = [
        max(own[order[place]] for own, order in zip(lengths, orders, strict=True) if place < len(order))
        for place in range(n_places)
    ]
    first = 0
    for place in range(1, n_places + 1):
        is_end = place == n_places or place - first == size
        if is_end or (longest[first] > SHORT and 2 * longest[place] < longest[first]):
            yield [order[first:place] for order in orders]
            first = place


def micro_batch_size(training: TrainingConfig, longest: int, device_type: str) -> int:
    """Rows per forward pass: as configured, else what `TOKENS_PER_PASS` allows for rows of `longest` tokens.

    It follows from the rows and the kind of device alone, never from the memory that happens to be free, so that a
    repeat gives the same floats.
    """
    if training.micro_batch_size is not None:
        return training.micro_batch_size
    budget = TOKENS_PER_PASS.get(device_type, TOKENS_PER_PASS["cuda"])
    return max(1, min(training.batch_size, budget // max(1, longest)))


def learning_rate(step: int, n_steps: int, training: TrainingConfig) -> float:
    """The learning rate of optimizer step `step` (from 0) of `n_steps`: linear warm-up, then the schedule.

    No step has rate 0: warm-up starts at 1 / n_warmup, and decay would reach 0 only at step `n_steps`.
    """
    n_warmup = math.ceil(training.warmup_ratio * n_steps)
    if step < n_warmup:
        return training.learning_rate * (step + 1) / n_warmup
    done = (step - n_warmup) / max(1, n_steps - n_warmup)
    if training.schedule == "linear":
        return training.learning_rate * (1 - done)
    if training.schedule == "cosine":
        return training.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
    return training.learning_rate


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """What one process's generator is seeded with at an optimizer step: dropout depends on nothing that came before.

    So a training that is taken up in the middle, or a step that is repeated with smaller passes, draws what it would
    have drawn.
    """
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def n_steps_until(share: float, n_steps: int) -> int:
    """Optimizer steps in a share of `n_steps`: at least one, all of them only for a share of 1."""
    return n_steps if share >= 1 else min(max(1, round(share * n_steps)), max(1, n_steps - 1))
