"""In-context learning as a cheap stand-in for fine-tuning: what training rows do to a task when they are in its prompt.

A set of training rows is put before an example of the task as demonstrations, and the base model reads both:

    reward(set) = mean over examples of [ NLL(example) − NLL(example | demonstrations) ],

with NLL the mean per completion token of the example. So a reward is positive where the demonstrations help. Every
set meets the same examples, so that what makes an example hard is in all rewards alike.

The form of a prompt: the token rows one behind the other, as they were encoded (template, completion, EOS or end of
turn), then the example. Only a BOS token is kept once, at the front: in the middle it would tell the model that what
came before is over.

It takes n_sets × n_examples forward passes of about (n_demonstrations + 1) rows' length.
"""

from collections.abc import Callable, Sequence

import numpy as np

from duet_ray.errors import SelectionError
from duet_ray.records import TokenRow
from duet_ray.selection.gradients import Rows
from duet_ray.selection.row_indicators import Reader

N_EXAMPLES = 16
"""The tiny validation set is no larger than this."""

_POOL_SHARE = 0.1
"""A directed set is drawn among this share of rows, those that lie furthest in its direction."""

_DIGITS = 3


def row_allowance(reader: Reader, max_tokens: int, n_demonstrations: int) -> int:
    """The longest row that may be part of a prompt, so that every prompt fits into the model; at most `max_tokens`."""
    whole = max_tokens * (n_demonstrations + 1)
    if reader.max_tokens is not None:
        whole = min(whole, reader.max_tokens)
    return whole // (n_demonstrations + 1)


def tiny_set(examples: Rows, allowance: int, seed: int | Sequence[int]) -> list[TokenRow]:
    """At most `N_EXAMPLES` seeded examples that are no longer than `allowance` tokens.

    Raises:
        SelectionError: there is none.
    """
    short = np.flatnonzero(examples.n_tokens <= allowance)
    if len(short) == 0:
        raise SelectionError(
            f"none of the {len(examples)} validation rows or examples is short enough to stand behind demonstrations "
            f"(at most {allowance} tokens, so that the whole prompt fits into the model); "
            "lower selection.n_demonstrations, or give shorter selection.examples"
        )
    if len(short) > N_EXAMPLES:
        short = np.sort(np.random.default_rng(seed).choice(short, size=N_EXAMPLES, replace=False))
    return examples.rows(short.tolist())


def draw_sets(indicators: np.ndarray, n_sets: int, size: int, seed: int | Sequence[int]) -> np.ndarray:
    """Sets of rows whose indicators differ: half of them directed, half of them at random.

    A mean over random rows hardly moves, and an effect that hardly moves is lost in the noise. So half the sets are
    drawn from the extreme tenth of the rows along random directions of the space of indicators, each direction with
    its opposite; the others keep the average row in sight.

    Args:
        indicators: `(n_rows, n_indicators)`, standardised; `size` ≤ n_rows.

    Returns:
        `(n_sets, size)` row positions; within a set no row twice, in random order.
    """
    generator = np.random.default_rng(seed)
    n_rows, n_indicators = indicators.shape
    n_pool = min(n_rows, max(2 * size, int(np.ceil(_POOL_SHARE * n_rows))))
    sets: list[np.ndarray] = []
    for _ in range(n_sets // 4):
        along = indicators @ generator.normal(size=n_indicators)
        # Rounded, and the pool sorted: the last digits of an indicator must not decide which rows are drawn.
        order = np.argsort(np.round(along, _DIGITS), kind="stable")
        for pool in (order[-n_pool:], order[:n_pool]):
            sets.append(generator.choice(np.sort(pool), size=size, replace=False))
    while len(sets) < n_sets:
        sets.append(generator.choice(n_rows, size=size, replace=False))
    return np.stack(sets)


def with_demonstrations(demonstrations: Sequence[TokenRow], example: TokenRow, bos_id: int | None) -> TokenRow:
    """The example with demonstrations before it. What is predicted is what is predicted of the example alone."""
    predicted = example.loss_mask.astype(bool)
    predicted[:1] = False
    parts: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    for row, mask in [*((d, np.zeros(len(d), dtype=bool)) for d in demonstrations), (example, predicted)]:
        skip = int(bool(parts) and bos_id is not None and row.input_ids[0] == bos_id)
        parts.append(row.input_ids[skip:])
        masks.append(mask[skip:])
    return TokenRow(np.concatenate(parts), np.concatenate(masks))


def measure_rewards(
    reader: Reader,
    rows_of_set: Callable[[int], Sequence[TokenRow]],
    n_sets: int,
    examples: Sequence[TokenRow],
    on_set: Callable[[int], None] | None = None,
) -> np.ndarray:
    """What every set of demonstrations does to the examples.

    Args:
        rows_of_set: index of a set → its rows, in the order in which they stand in the prompt.
        on_set: called after each set with the number of sets done.

    Returns:
        `(n_sets,)` float64, nats per completion token of an example; positive = helps.

    Raises:
        SelectionError: a loss is not finite.
    """
    alone = _nll(reader, examples, reader.batch_size)
    rewards = np.zeros(n_sets)
    for index in range(n_sets):
        demonstrations = rows_of_set(index)
        prompts = [with_demonstrations(demonstrations, example, reader.bos_id) for example in examples]
        # So many tokens at once as when rows are read one by one: a prompt is several rows long.
        at_once = max(1, reader.batch_size // (len(demonstrations) + 1))
        rewards[index] = (alone - _nll(reader, prompts, at_once)).mean()
        if on_set is not None:
            on_set(index + 1)
    return rewards


def _nll(reader: Reader, rows: Sequence[TokenRow], at_once: int) -> np.ndarray:
    return np.concatenate([reader.nll(rows[i : i + at_once]) for i in range(0, len(rows), at_once)])
