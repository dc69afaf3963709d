"""A domain in memory: learnable rows (a letter is answered with the next three), some of them with wrong answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from duet_ray.records import TokenRow

FIRST = 10
"""Token ids from here on are the letters."""


@dataclass(frozen=True)
class ToyRows:
    items: list[TokenRow]

    @property
    def n_tokens(self) -> np.ndarray:
        return np.array([len(row) for row in self.items], dtype=np.int32)

    def __len__(self) -> int:
        return len(self.items)

    def row(self, i: int) -> TokenRow:
        return self.items[i]

    def rows(self, ids: Sequence[int]) -> list[TokenRow]:
        return [self.items[i] for i in ids]

    def texts(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        """Token `FIRST` is an "a"."""
        return [{"row": i, "text": "".join(chr(ord("a") + t - FIRST) for t in self.items[i].input_ids)} for i in ids]


@dataclass(frozen=True)
class ToyDomain:
    train: ToyRows
    validation: ToyRows
    corrupted: np.ndarray
    """`(n_train,)` bool."""
    name: str = "letters"
    index: int = 0
    fingerprint: str = "toy-0"


def toy_row(generator: np.random.Generator, *, corrupted: bool, n_letters: int = 16) -> TokenRow:
    """Some letters, the last of which is answered with the next three of the alphabet; wrong if corrupted."""
    prompt = generator.integers(n_letters, size=generator.integers(2, 6))
    answer = (prompt[-1] + np.arange(1, 4)) % n_letters
    if corrupted:
        answer = (answer + generator.integers(3, n_letters - 3, size=3)) % n_letters
    ids = FIRST + np.concatenate([prompt, answer])
    return TokenRow(ids.astype(np.int32), np.arange(len(ids)) >= len(prompt))


def toy_domain(n_train: int = 48, n_validation: int = 16, *, corrupted: float = 0.0, seed: int = 0) -> ToyDomain:
    """A domain with a share of corrupted training rows; the validation rows are all clean."""
    generator = np.random.default_rng(seed)
    wrong = generator.random(n_train) < corrupted
    train = [toy_row(generator, corrupted=bool(w)) for w in wrong]
    validation = [toy_row(generator, corrupted=False) for _ in range(n_validation)]
    return ToyDomain(ToyRows(train), ToyRows(validation), wrong, fingerprint=f"toy-{seed}-{n_train}-{corrupted}")
