"""Preparing a domain and looking for the task's text in it hold a chunk of rows at a time, however many there are."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from duet_ray.domains import find_overlap, overlap, prepare, prepare_domains, rows
from tests.domains.domain_toys import write_jsonl

BYTES_OF_TEXT = 1500
"""In every row: its tokens and its text take more than this in memory, as Python objects or as Arrow."""
BYTES_PER_ROW = 300
"""What a row may add to the peak: the hash of its content with what is made of it, and how full the last chunks are."""


def _peak(step: Callable[[], Any]) -> int:
    """The most that Python, NumPy and Arrow hold at any time of a step."""
    usual, counting = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(counting)
    tracemalloc.start()
    try:
        step()
        return tracemalloc.get_traced_memory()[1] + counting.max_memory()
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(usual)


def _peaks(folder: Path, n_rows: int, study: Any, tokenizer: Any) -> tuple[int, int]:
    """Of the preparation, and of the search for overlaps."""
    words = "two plus two is four and how are you "
    text = (words * (BYTES_OF_TEXT // len(words) + 1))[:BYTES_OF_TEXT]
    name = f"d{n_rows}"
    write_jsonl(folder / f"{name}.jsonl", [{"prompt": f"{i} {text}", "completion": "fine"} for i in range(n_rows)])
    config = study({"name": name, "source": f"{name}.jsonl"}, training={"max_tokens": 4096})
    domains: list[Any] = []
    preparing = _peak(lambda: domains.extend(prepare_domains(config, tokenizer)))
    assert len(domains[0].train) + len(domains[0].validation) == n_rows
    return preparing, _peak(lambda: find_overlap(domains, ["how are you and how are they"]))


def test_memory_does_not_grow_with_rows(tmp_path, study, plain_tokenizer, monkeypatch):
    for module, name in ((rows, "BATCH_ROWS"), (prepare, "BATCH_ROWS"), (overlap, "_CHUNK_ROWS")):
        monkeypatch.setattr(module, name, 64)  # Many chunks of few rows.
    few, many = 400, 2800
    _peaks(tmp_path, few + 1, study, plain_tokenizer)  # What is imported and cached once.
    for small, large in zip(*(_peaks(tmp_path, n, study, plain_tokenizer) for n in (few, many)), strict=True):
        assert large - small < (many - few) * BYTES_PER_ROW
