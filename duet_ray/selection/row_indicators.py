"""Cheap indicators of a row's quality: what they are, and how each is measured.

All are read off the base model as it is, nothing is fine-tuned. "Completion" means the tokens that are learned: with
`training.loss_on: all` that is the whole row. None of them is good or bad in itself: which way it counts, and how
much, is learned per domain and model (`indicators`).

- `length`: the natural logarithm of the number of completion tokens.
- `perplexity`: the mean NLL of a completion token given all before it, in nats: log-perplexity under the base model.
- `difficulty`: instruction-following difficulty (Li et al. 2024, "From Quantity to Quality", IFD), the NLL of the
  completion given its prompt over the NLL of the completion alone. Near 1 or above, the prompt does not help to
  predict the answer. "Alone" is the BOS token (EOS where a tokenizer has no BOS) and the completion tokens, those of
  all turns in a row. A row without a prompt has a difficulty of exactly 1.
- `diversity`: the mean cosine distance of a row's embedding to its `N_NEAREST` nearest rows of the domain: small where
  a row repeats others. It needs all rows, so embeddings are what is measured (`embeddings`), and distances are taken
  afterwards, once the mean of the domain is known and off.
- `reasoning`: logical complexity, as markers of reasoning steps per word of the completion: `REASONING`. The words
  are English, whatever the language of the row; digits and signs work in any.
- `richness`: lexical richness of the completion as the moving-average type-token ratio (MATTR; Covington & McFall
  2010): the mean share of distinct words in a window of `WINDOW_WORDS` words. Unlike the plain ratio, it does not fall
  with length; a text shorter than the window has its plain ratio.

The texts of `reasoning` and `richness` are decoded from the completion tokens, so that they are what is learned: cut
to `training.max_tokens`, without the frame of a chat template.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from duet_ray.config import INDICATORS, Indicator, SelectionConfig
from duet_ray.errors import SelectionError
from duet_ray.likelihood import autocast, collate, length_groups, pad_id, row_nll
from duet_ray.records import TokenRow
from duet_ray.selection.base import SelectionContext
from duet_ray.selection.gradients import Rows

N_NEAREST = 10
"""Neighbours that `diversity` looks at."""

N_REFERENCE = 20_000
"""Rows that neighbours are looked for among: all of a smaller domain, a seeded choice of a larger one. It bounds the
time: 200,000 rows of width 384 take 3e12 operations, not 3e13."""

WINDOW_WORDS = 25
"""Answers in instruction data are often shorter than the 50 words and more that MATTR is used with elsewhere."""

REASONING = (
    # conclusions and reasons
    r"\b(?:therefore|thus|hence|consequently|accordingly|so that|as a result|it follows|we get|we have|which means)\b",
    r"\b(?:because|since|due to|given that|implies|in order to)\b",
    # conditions and contrasts
    r"\b(?:if|then|suppose|assume|assuming|unless|otherwise|however|although|whereas|on the other hand)\b",
    # sequence
    r"\b(?:step|steps|first|firstly|second|secondly|third|thirdly|next|finally|lastly|in conclusion)\b",
    # numbered lines
    r"^[ \t]*(?:\d+[.)]|\(\d+\))(?=\s)",
    # derivations: =, ==, =>, ⇒, →, ∴
    r"=+>?|[⇒→∴]",
)
"""What counts as a marker of a reasoning step, in upper or lower case."""

_MARKER = re.compile("|".join(REASONING), re.IGNORECASE | re.MULTILINE)
_SMALLEST_NLL = 1e-6
"""Nats a token: below it, a model is certain of a completion, and the ratio of two such numbers is rounding."""


def used(settings: SelectionConfig) -> tuple[Indicator, ...]:
    """The indicators in `selection.indicators`, each once, in the order of `INDICATORS`."""
    return tuple(name for name in INDICATORS if name in settings.indicators)


@dataclass(frozen=True)
class Reader:
    """The base model to read rows with."""

    model: Any
    tokenizer: Any
    batch_size: int

    @property
    def bos_id(self) -> int | None:
        bos: int | None = self.tokenizer.bos_token_id
        return bos

    @property
    def max_tokens(self) -> int | None:
        """The longest input the model takes, where it says so."""
        longest: int | None = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return longest

    def nll(self, rows: Sequence[TokenRow]) -> np.ndarray:
        """The mean NLL of a completion token of each row, all in one batch.

        Returns:
            `(n_rows,)` float64, in nats.

        Raises:
            SelectionError: one is not finite.
        """
        batch = collate(rows, pad_id(self.tokenizer), next(self.model.parameters()).device)
        with autocast(self.model):
            sums = row_nll(self.model, batch)
        n_tokens = batch.loss_mask.sum(dim=1)
        assert bool((n_tokens > 0).all()), "a row that was encoded has something to predict"
        found = (sums.double() / n_tokens).cpu().numpy()
        if bad := int((~np.isfinite(found)).sum()):
            raise SelectionError(
                f"the base model's loss is not finite on {bad} of {len(rows)} rows; set model.dtype: float32, "
                "or check the model's files"
            )
        return np.asarray(found, dtype=np.float64)


@contextmanager
def reading(context: SelectionContext) -> Iterator[Reader]:
    """The base model, in eval mode and without gradients."""
    model, tokenizer = context.load_base()
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield Reader(model, tokenizer, context.settings.batch_size)
    finally:
        model.train(was_training)


def measure_indicators(
    reader: Reader, rows: Rows, indicators: Sequence[Indicator], on_rows: Callable[[int], None] | None = None
) -> np.ndarray:
    """Every row's indicators, but for `diversity`, which no row has by itself.

    Args:
        on_rows: called after each batch with the number of rows done.

    Returns:
        `(n_rows, n)` float64, in the order of `indicators` without `diversity`.

    Raises:
        SelectionError: a loss is not finite, or the tokenizer has neither BOS nor EOS (`difficulty`).
    """
    names = [name for name in indicators if name != "diversity"]
    found = np.zeros((len(rows), len(names)))
    done = 0
    for ids in length_groups(rows.n_tokens.tolist(), reader.batch_size):
        batch = rows.rows(ids)
        given = reader.nll(batch) if {"perplexity", "difficulty"} & {*names} else np.zeros(len(ids))
        texts = (
            [completion_text(reader.tokenizer, row) for row in batch] if {"reasoning", "richness"} & {*names} else []
        )
        for column, name in enumerate(names):
            if name == "length":
                found[ids, column] = [np.log(_learned(row).sum()) for row in batch]
            elif name == "perplexity":
                found[ids, column] = given
            elif name == "difficulty":
                found[ids, column] = _difficulty(reader, batch, given)
            elif name == "reasoning":
                found[ids, column] = [reasoning(text) for text in texts]
            else:
                found[ids, column] = [richness(text) for text in texts]
        done += len(ids)
        if on_rows is not None:
            on_rows(done)
    return found


def completion_text(tokenizer: Any, row: TokenRow) -> str:
    """The completion tokens as text, without special tokens."""
    text: str = tokenizer.decode(row.input_ids[_learned(row)].tolist(), skip_special_tokens=True)
    return text


def reasoning(text: str) -> float:
    """Markers of reasoning steps per word (words are what white space parts); 0 for an empty text."""
    n_words = len(text.split())
    return sum(1 for _ in _MARKER.finditer(text)) / n_words if n_words else 0.0


def richness(text: str) -> float:
    """The moving-average type-token ratio, in (0, 1]; 0 for a text without words."""
    words = re.findall(r"\w+", text.casefold())
    if len(words) <= WINDOW_WORDS:
        return len({*words}) / len(words) if words else 0.0
    counts = Counter(words[:WINDOW_WORDS])
    total = len(counts)
    for left, entered in zip(words, words[WINDOW_WORDS:], strict=False):
        counts[left] -= 1
        if not counts[left]:
            del counts[left]
        counts[entered] += 1
        total += len(counts)
    return total / (WINDOW_WORDS * (len(words) - WINDOW_WORDS + 1))


def nearest_distance(
    embeddings: np.ndarray, seed: int | Sequence[int], *, n_reference: int = N_REFERENCE
) -> np.ndarray:
    """The mean cosine distance of every row to its nearest rows, itself apart.

    Args:
        embeddings: `(n_rows, width)`, of norm 1 (or 0: at a distance of 1 to all); at least two rows.
        seed: chooses the reference rows where there are more than `n_reference`.

    Returns:
        `(n_rows,)` float64 in [0, 2].
    """
    n_rows = len(embeddings)
    reference = np.arange(n_rows)
    if n_rows > n_reference:
        reference = np.sort(np.random.default_rng(seed).choice(n_rows, size=n_reference, replace=False))
    place = np.full(n_rows, -1)
    place[reference] = np.arange(len(reference))
    others = np.ascontiguousarray(embeddings[reference].T)
    n_nearest = min(N_NEAREST, len(reference) - 1)
    distances = np.empty(n_rows)
    for first in range(0, n_rows, _BLOCK_ROWS):
        block = np.arange(first, min(first + _BLOCK_ROWS, n_rows))
        similarity = embeddings[block] @ others
        itself = place[block] >= 0
        similarity[itself, place[block][itself]] = -np.inf
        nearest = np.partition(similarity, -n_nearest, axis=1)[:, -n_nearest:]
        distances[block] = 1 - nearest.mean(axis=1, dtype=np.float64)
    return np.round(distances, _DIGITS)


_BLOCK_ROWS = 1024
_DIGITS = 5
"""Of distances: what is left between copies of one row is rounding, and must not look like diversity."""


def _learned(row: TokenRow) -> np.ndarray:
    """`(n_tokens,)` bool: the completion tokens. The first token of a row is never predicted."""
    learned = row.loss_mask.astype(bool)
    learned[0] = False
    return learned


def _difficulty(reader: Reader, rows: Sequence[TokenRow], given: np.ndarray) -> np.ndarray:
    """`(n_rows,)` NLL given the prompt over NLL alone; `given` is the former."""
    start = reader.bos_id if reader.bos_id is not None else reader.tokenizer.eos_token_id
    if start is None:
        raise SelectionError(
            "the tokenizer has neither a BOS nor an EOS token to put before a completion that stands alone; "
            "take difficulty out of selection.indicators"
        )
    ratios = np.ones(len(rows))
    prompted = [i for i, row in enumerate(rows) if not _learned(row)[1:].all()]
    if prompted:
        alone = reader.nll([_alone(rows[i], start) for i in prompted])
        ratios[prompted] = np.maximum(given[prompted], _SMALLEST_NLL) / np.maximum(alone, _SMALLEST_NLL)
    return ratios


def _alone(row: TokenRow, start: int) -> TokenRow:
    """The completion tokens with `start` in front."""
    ids = np.concatenate([[start], row.input_ids[_learned(row)]]).astype(np.int32)
    return TokenRow(ids, np.arange(len(ids)) > 0)
