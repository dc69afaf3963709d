"""Each indicator against arithmetic by hand or a computation row by row."""

import math

import numpy as np
import pytest
import torch

from duet_ray.config import INDICATORS, SelectionConfig, TrainingConfig
from duet_ray.errors import SelectionError
from duet_ray.records import TokenRow
from duet_ray.selection.base import SelectionContext
from duet_ray.selection.gradients import RowList
from duet_ray.selection.row_indicators import (
    WINDOW_WORDS,
    completion_text,
    measure_indicators,
    nearest_distance,
    reading,
    reasoning,
    richness,
    used,
)
from tests.selection.toy_domain import toy_domain
from tests.tiny_model import tiny_llama, tiny_tokenizer

BOS, EOS = 1, 2


def text_row(prompt: str, completion: str) -> TokenRow:
    tokenizer = tiny_tokenizer()
    ids = tokenizer(prompt + completion)["input_ids"]
    return TokenRow(np.array([*ids, EOS], dtype=np.int32), np.arange(len(ids) + 1) >= max(len(prompt), 1))


def measure(rows, *names, batch_size=3, model=None, tokenizer=None) -> np.ndarray:
    settings = SelectionConfig(method="indicators", indicators=[*names], batch_size=batch_size)
    model, tokenizer = model or tiny_llama(), tokenizer or tiny_tokenizer()
    context = SelectionContext(
        settings=settings, training=TrainingConfig(), seed=0, load_base=lambda: (model, tokenizer)
    )
    with reading(context) as reader:
        return measure_indicators(reader, RowList(rows), used(settings))


def nll(model, ids, first: int) -> float:
    """The mean NLL of the tokens from `first` on, from the definition."""
    with torch.no_grad():
        logs = torch.log_softmax(model(torch.tensor([list(map(int, ids))])).logits[0].double(), dim=-1)
    return -sum(float(logs[t - 1, ids[t]]) for t in range(first, len(ids))) / (len(ids) - first)


def test_length_is_the_logarithm_of_the_completion_tokens():
    everything = TokenRow(np.arange(10, 17, dtype=np.int32), np.ones(7, dtype=bool))  # the first is never predicted
    found = measure([text_row("ab", "cdef"), text_row("abc", "d"), everything], "length")
    np.testing.assert_allclose(found[:, 0], [math.log(5), math.log(2), math.log(6)])  # with EOS


@pytest.mark.parametrize("batch_size", [1, 5])
def test_perplexity_and_difficulty_are_what_a_row_alone_gives(batch_size):
    model, rows = tiny_llama(), toy_domain(7).train.items
    found = measure(rows, "perplexity", "difficulty", batch_size=batch_size, model=model)
    for row, (perplexity, difficulty) in zip(rows, found, strict=True):
        given = nll(model, row.input_ids, int(row.loss_mask.argmax()))
        alone = nll(model, [BOS, *row.input_ids[row.loss_mask]], 1)
        assert perplexity == pytest.approx(given, rel=1e-5)
        assert difficulty == pytest.approx(given / alone, rel=1e-5)


def test_the_turns_of_a_conversation_are_one_completion():
    model = tiny_llama()
    row = TokenRow(np.arange(10, 20, dtype=np.int32), np.array([0, 0, 1, 1, 0, 0, 1, 1, 1, 0], dtype=bool))
    perplexity, difficulty = measure([row], "perplexity", "difficulty", model=model)[0]
    with torch.no_grad():
        logs = torch.log_softmax(model(torch.arange(10, 20)[None]).logits[0], dim=-1)
    assert perplexity == pytest.approx(-np.mean([float(logs[t - 1, 10 + t]) for t in (2, 3, 6, 7, 8)]), rel=1e-5)
    assert perplexity / difficulty == pytest.approx(nll(model, [BOS, 12, 13, 16, 17, 18], 1), rel=1e-5)


def test_a_row_without_a_prompt_has_a_difficulty_of_one():
    row = text_row("", "some text")
    assert not row.loss_mask[0]
    assert row.loss_mask[1:].all()
    assert measure([row, text_row("ab", "cd")], "difficulty")[0, 0] == 1


def test_without_bos_the_eos_token_stands_in_front_of_a_completion_alone():
    model, tokenizer, row = tiny_llama(), tiny_tokenizer(), text_row("ab", "cd")
    tokenizer.bos_token = None
    difficulty = measure([row], "difficulty", model=model, tokenizer=tokenizer)[0, 0]
    ids = row.input_ids
    assert difficulty == pytest.approx(nll(model, ids, 2) / nll(model, [EOS, *ids[2:]], 1), rel=1e-5)
    tokenizer.eos_token = None
    with pytest.raises(SelectionError, match=r"neither a BOS nor an EOS.*selection\.indicators"):
        measure([row], "difficulty", model=model, tokenizer=tokenizer)


def test_a_loss_that_is_not_finite_is_an_error():
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    with pytest.raises(SelectionError, match="not finite on 1 of 1 rows"):
        measure([text_row("ab", "cd")], "perplexity", model=model)


@pytest.mark.parametrize(
    ("text", "n_markers", "n_words"),
    [
        ("It rains, therefore I am wet", 1, 6),
        ("BECAUSE it rains. Hence wet!", 2, 5),
        ("x = 3 so that 2x == 6 => done", 4, 10),
        ("1. Take it\n 2) Give it\n(3) Stop 4. or 1.5", 3, 11),
        ("Step 1: first add, then stop", 3, 6),
        ("On the other hand, in conclusion", 2, 6),
        ("stepped thirsty secondary iffy", 0, 4),
        ("", 0, 0),
    ],
)
def test_reasoning_counts_markers_per_word(text, n_markers, n_words):
    assert reasoning(text) == pytest.approx(n_markers / n_words if n_words else 0)


def test_richness_of_a_short_text_is_its_share_of_distinct_words():
    assert richness("The cat, the dog") == 3 / 4
    assert richness("!?") == 0


def test_richness_of_a_long_text_is_the_mean_over_all_windows():
    words = [f"w{i}" for i in np.random.default_rng(0).integers(40, size=120)]
    windows = [words[i : i + WINDOW_WORDS] for i in range(len(words) - WINDOW_WORDS + 1)]
    assert richness(" ".join(words)) == pytest.approx(np.mean([len(set(w)) / WINDOW_WORDS for w in windows]))
    # Twice the text is no poorer: the plain ratio would halve.
    distinct = " ".join(f"w{i}" for i in range(WINDOW_WORDS))
    assert richness(f"{distinct} {distinct}") == richness(distinct) == 1


def test_texts_are_the_completions_without_special_tokens():
    row = text_row("Why? Because if then = ", "it is so, it is")
    assert completion_text(tiny_tokenizer(), row) == "it is so, it is"
    np.testing.assert_allclose(measure([row], "reasoning", "richness")[0], [0, 3 / 5])


def test_columns_are_the_indicators_in_their_own_order():
    rows = toy_domain(4).train.items
    every = measure(rows, *INDICATORS[::-1], "length")
    assert every.shape == (4, 5)  # diversity is none of a row's own
    names = [name for name in INDICATORS if name != "diversity"]
    for column, name in enumerate(names):
        np.testing.assert_array_equal(every[:, column], measure(rows, name)[:, 0])


def test_diversity_is_the_mean_distance_to_the_nearest_rows():
    vectors = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    found = nearest_distance(vectors, 0)
    for i in range(40):
        others = sorted(1 - float(vectors[i] @ vectors[j]) for j in range(40) if j != i)
        assert found[i] == pytest.approx(np.mean(others[:10]), abs=1e-5)
    np.testing.assert_allclose(nearest_distance(vectors[:2], 0), 1 - vectors[0] @ vectors[1], atol=1e-5)


def test_copies_of_a_row_are_not_diverse():
    one = np.random.default_rng(0).normal(size=64)
    copies = np.tile((one / np.linalg.norm(one)).astype(np.float32), (12, 1))
    assert nearest_distance(copies, 0).tolist() == [0.0] * 12


def test_in_a_large_domain_neighbours_are_looked_for_in_a_seeded_part():
    vectors = np.random.default_rng(0).normal(size=(60, 6)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    chosen = np.sort(np.random.default_rng(3).choice(60, size=20, replace=False))
    found = nearest_distance(vectors, 3, n_reference=20)
    for i in range(60):
        others = sorted(1 - float(vectors[i] @ vectors[j]) for j in chosen if j != i)
        assert found[i] == pytest.approx(np.mean(others[:10]), abs=1e-5)
