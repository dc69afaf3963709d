"""A domain and a model that are made in memory, in seconds: what the benchmarks of data selection work on."""

import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from duet_ray.records import TokenRow


@dataclass(frozen=True)
class MemoryRows:
    """Rows in memory, with what the selection methods ask of a `duet_ray.domains.RowSet`."""

    items: Sequence[TokenRow]

    @cached_property
    def n_tokens(self) -> np.ndarray:
        return np.array([len(row) for row in self.items], dtype=np.int32)

    def __len__(self) -> int:
        return len(self.items)

    def row(self, i: int) -> TokenRow:
        return self.items[i]

    def rows(self, ids: Sequence[int]) -> list[TokenRow]:
        return [self.items[i] for i in ids]


@dataclass(frozen=True)
class MemoryDomain:
    """Stands in for a `duet_ray.domains.Domain`."""

    name: str
    train: MemoryRows
    validation: MemoryRows
    fingerprint: str
    index: int = 0


def tiny_llama(vocab_size: int, seed: int, *, n_layers: int = 2, hidden_size: int = 64) -> LlamaForCausalLM:
    """A Llama with random weights, in eval mode. The global generator is left as it was."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        initializer_range=0.1,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def repeating_rows(
    n_rows: int, vocab_size: int, n_tokens: tuple[int, int], generator: np.random.Generator
) -> MemoryRows:
    """Rows that repeat eight tokens over and over, a tenth of them replaced; the second half is what is learned.

    Args:
        n_tokens: the shortest and the longest row.
    """
    rows = []
    for _ in range(n_rows):
        length = int(generator.integers(n_tokens[0], n_tokens[1], endpoint=True))
        ids = np.resize(generator.integers(3, vocab_size, size=8), length)
        noise = generator.random(length) < 0.1
        ids[noise] = generator.integers(3, vocab_size, size=int(noise.sum()))
        rows.append(TokenRow(ids.astype(np.int32), np.arange(length) >= length // 2))
    return MemoryRows(rows)


def machine(*packages: str) -> str:
    """One line that says where and with what a table was measured."""
    found = []
    for name in packages:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} not installed")
    where = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    return f"{time.strftime('%Y-%m-%d')}, {where}; {', '.join(found)}"
