"""Feedback from a file of held-out text: how well the model predicts the completions, or the right answers, in it.

Let NLL_i be −Σ_t log p(y_it | x_i, y_i,<t) over the n_i tokens of row i's completion.

- A file of completions (any format of a domain): the value is Σ NLL_i / Σ n_i, the mean NLL per completion token. Its
  standard error is that of a ratio of two means, √(n/(n−1) Σ (NLL_i − v n_i)²) / Σ n_i (Cochran 1977, ch. 6).
- `multiple_choice` with `metric: loss`: the mean over items of the right answer's NLL, summed over its tokens. Only
  the right answers are scored, which makes it a quarter of the work of accuracy, and it moves long before accuracy
  does: on a small model and a hundred items the better feedback.
- `multiple_choice` with `metric: accuracy`: all choices are scored; an item counts when its right answer has the
  lowest NLL per byte (lm-eval's `acc_norm`; a sum would favour short choices). The loss stands among the metrics.

The end-of-turn token after an answer belongs to a completion (stopping is part of it) but not to a choice, as in
lm-eval. Rows are rendered as training rows are, with the chat template if the study uses one, and measured in full:
`training.max_tokens` does not cut them, and a row longer than the model's context is an error.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from duet_ray.config import HeldoutLossConfig, StudyConfig
from duet_ray.domains import BadRow, EncodeSettings, ParsedRow, encode_rows, read_rows
from duet_ray.domains.encode import special_tokens
from duet_ray.domains.formats import Message
from duet_ray.errors import DataError, FeedbackError
from duet_ray.feedback.multiple_choice import Item, bad_rows, read_items
from duet_ray.feedback.value import checked
from duet_ray.likelihood import autocast, collate, length_groups, pad_id, row_nll
from duet_ray.records import Direction, Feedback, TokenRow

_UNCUT = 1 << 30
_Row = TypeVar("_Row", ParsedRow, Item)


class HeldoutLoss:
    """Measures a model on the rows of a file. See `feedback.base.FeedbackSource` for the contract."""

    def __init__(self, config: StudyConfig, section: HeldoutLossConfig) -> None:
        self._section = section
        self._file = config.resolve_path(section.file)
        self._encoding = EncodeSettings(max_tokens=_UNCUT, chat_template=config.model.chat_template)
        self._rows: list[ParsedRow] | None = None
        self._items: list[Item] | None = None

    def check(self) -> list[str]:
        """Read the whole file.

        Raises:
            FeedbackError: no such file, a row that cannot be used, or no row at all.
        """
        n_rows = len(self._read_items()) if self._is_choice else len(self._read_rows())
        notes = []
        if self._section.limit is not None and self._section.limit > n_rows:
            notes.append(f"{self._file.name} has {n_rows} rows, fewer than feedback.limit = {self._section.limit}")
        if self._section.metric == "loss" and self._section.direction is Direction.MAXIMIZE:
            notes.append("loss is better when lower, but feedback.direction is maximize")
        return notes

    def measure(self, model: Any, tokenizer: Any, *, seed: int) -> Feedback:
        """Score the rows. Nothing is random here, so that `seed` has no part in it."""
        if not self._is_choice:
            feedback = self._completions(model, tokenizer)
        elif self._section.metric == "accuracy":
            feedback = self._accuracy(model, tokenizer)
        else:
            feedback = self._right_answers(model, tokenizer)
        return checked(feedback, f"feedback.file {self._file.name}")

    def task_texts(self) -> Iterable[str]:
        """The questions, or the prompts with their completions: the task's text is this file."""
        if self._is_choice:
            yield from (item.question for item in self._read_items())
        else:
            yield from (f"{row.prompt} {row.completion}".strip() for row in self._read_rows())

    @property
    def _is_choice(self) -> bool:
        return self._section.format == "multiple_choice"

    # Reading

    def _read_rows(self) -> list[ParsedRow]:
        if self._rows is None:
            assert self._section.format != "multiple_choice"
            try:
                rows = list(
                    read_rows(
                        [self._existing()], self._section.format, self._section.columns, setting="feedback.columns"
                    )
                )
            except DataError as error:
                raise FeedbackError(f"feedback.file: {error}") from error
            if bad := [row for row in rows if isinstance(row, BadRow)]:
                raise FeedbackError(bad_rows(self._file, bad))
            self._rows = self._limited([row for row in rows if isinstance(row, ParsedRow)])
        return self._rows

    def _read_items(self) -> list[Item]:
        if self._items is None:
            try:
                items = read_items(self._existing(), self._section.columns)
            except DataError as error:
                raise FeedbackError(f"feedback.file: {error}") from error
            self._items = self._limited(items)
        return self._items

    def _existing(self) -> Path:
        if not self._file.is_file():
            raise FeedbackError(f"feedback.file: no such file: {self._file}")
        return self._file

    def _limited(self, rows: list[_Row]) -> list[_Row]:
        if not rows:
            raise FeedbackError(f"feedback.file: {self._file} has no rows: there is nothing to measure")
        return rows[: self._section.limit]

    # Measuring

    def _completions(self, model: Any, tokenizer: Any) -> Feedback:
        rows = self._encode(self._read_rows(), tokenizer)
        nll = self._score(model, tokenizer, rows)
        n_tokens = np.array([row.loss_mask[1:].sum() for row in rows], dtype=np.float64)
        value = float(nll.sum() / n_tokens.sum())
        spread = float(np.square(nll - value * n_tokens).sum())
        n = len(rows)
        stderr = math.sqrt(n / (n - 1) * spread) / float(n_tokens.sum()) if n > 1 else None
        return Feedback(value=value, stderr=stderr)

    def _right_answers(self, model: Any, tokenizer: Any) -> Feedback:
        pairs = [_pair(item, item.choices[item.answer]) for item in self._read_items()]
        nll = self._score(model, tokenizer, self._encode_choices(pairs, tokenizer))
        return Feedback(value=float(nll.mean()), stderr=_standard_error(nll))

    def _accuracy(self, model: Any, tokenizer: Any) -> Feedback:
        items = self._read_items()
        pairs = [_pair(item, choice) for item in items for choice in item.choices]
        nll = self._score(model, tokenizer, self._encode_choices(pairs, tokenizer))
        n_bytes = np.array([len(choice.strip().encode()) for item in items for choice in item.choices])
        ends = np.cumsum([len(item.choices) for item in items])
        first = ends - [len(item.choices) for item in items]
        answers = np.array([item.answer for item in items])
        chosen = np.array([int(np.argmin((nll / n_bytes)[a:b])) for a, b in zip(first, ends, strict=True)])
        right = (chosen == answers).astype(np.float64)
        loss = float(nll[first + answers].mean())
        return Feedback(value=float(right.mean()), stderr=_standard_error(right), metrics={"loss": loss})

    def _encode(self, rows: Sequence[ParsedRow], tokenizer: Any) -> list[TokenRow]:
        encoded = encode_rows(rows, tokenizer, self._encoding)
        if bad := [row for row in encoded if isinstance(row, BadRow)]:
            raise FeedbackError(bad_rows(self._file, bad))
        return [row.tokens for row in encoded if not isinstance(row, BadRow)]

    def _encode_choices(self, pairs: Sequence[ParsedRow], tokenizer: Any) -> list[TokenRow]:
        """Questions with one choice each, without the end-of-turn token."""
        ends = np.array(tokenizer.convert_tokens_to_ids(list(special_tokens(tokenizer))), dtype=np.int64)
        return [TokenRow(row.input_ids, _without_end(row, ends)) for row in self._encode(pairs, tokenizer)]

    def _score(self, model: Any, tokenizer: Any, rows: Sequence[TokenRow]) -> np.ndarray:
        """The summed NLL of every row: `(n_rows,)` float64, in the order of `rows`."""
        self._check_lengths(model, rows)
        padding = pad_id(tokenizer)
        device = next(model.parameters()).device
        nll = np.empty(len(rows), dtype=np.float64)
        with torch.inference_mode(), autocast(model):
            for group in length_groups([len(row) for row in rows], self._section.batch_size):
                batch = collate([rows[index] for index in group], padding, device)
                nll[group] = row_nll(model, batch).double().cpu().numpy()
        return nll

    def _check_lengths(self, model: Any, rows: Sequence[TokenRow]) -> None:
        longest = max(len(row) for row in rows)
        context = getattr(model.config, "max_position_embeddings", None)
        if context is not None and longest > context:
            raise FeedbackError(
                f"feedback.file: a row of {self._file} has {longest} tokens, the model's context has {context}"
            )


def _pair(item: Item, choice: str) -> ParsedRow:
    messages = (Message("user", item.question), Message("assistant", choice))
    return ParsedRow(file=item.file, line=item.line, form="pair", messages=messages)


def _without_end(row: TokenRow, ends: np.ndarray) -> np.ndarray:
    """The row's loss mask without the special tokens at its end, if anything is left."""
    mask = row.loss_mask.copy()
    for place in range(len(mask) - 1, 0, -1):
        if mask[place] and not np.isin(row.input_ids[place], ends):
            return mask
        mask[place] = False
    return row.loss_mask


def _standard_error(values: np.ndarray) -> float | None:
    """That of the mean of independent items; None for a single one."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
