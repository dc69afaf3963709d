import math

import numpy as np
import pytest
import torch

from duet_ray.errors import SelectionError
from duet_ray.records import TokenRow
from duet_ray.selection.demonstrations import (
    N_EXAMPLES,
    draw_sets,
    measure_rewards,
    row_allowance,
    tiny_set,
    with_demonstrations,
)
from duet_ray.selection.gradients import RowList
from duet_ray.selection.row_indicators import Reader
from tests.selection.toy_domain import toy_domain
from tests.tiny_model import tiny_llama, tiny_tokenizer

BOS = 1


def row(*ids: int, n_prompt: int = 1) -> TokenRow:
    return TokenRow(np.array(ids, dtype=np.int32), np.arange(len(ids)) >= n_prompt)


def reader(batch_size: int = 4, max_tokens: int = 256) -> Reader:
    return Reader(tiny_llama(max_tokens=max_tokens), tiny_tokenizer(), batch_size)


def nll(model, ids, n_last: int) -> float:
    """The mean NLL of the last tokens, from the definition."""
    with torch.no_grad():
        logs = torch.log_softmax(model(torch.tensor([list(map(int, ids))])).logits[0].double(), dim=-1)
    return -sum(float(logs[t - 1, ids[t]]) for t in range(len(ids) - n_last, len(ids))) / n_last


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_a_reward_is_what_the_prompt_takes_off_the_mean_loss(batch_size):
    domain, read = toy_domain(6, 3), reader(batch_size)
    sets = [domain.train.rows([0, 1]), domain.train.rows([5, 3])]
    told: list[int] = []
    with torch.no_grad():
        rewards = measure_rewards(read, lambda i: sets[i], 2, domain.validation.items, told.append)
    for demonstrations, reward in zip(sets, rewards, strict=True):
        front = [int(i) for d in demonstrations for i in d.input_ids]
        changes = [
            nll(read.model, example.input_ids, 3) - nll(read.model, [*front, *example.input_ids], 3)
            for example in domain.validation.items  # a toy completion has three tokens
        ]
        assert reward == pytest.approx(np.mean(changes), abs=2e-5)
    assert told == [1, 2]


def test_rows_are_joined_as_they_are_with_one_bos():
    prompt = with_demonstrations([row(BOS, 10, 11), row(BOS, 12, 13)], row(BOS, 14, 15, 16, n_prompt=2), BOS)
    assert prompt.input_ids.tolist() == [BOS, 10, 11, 12, 13, 14, 15, 16]
    assert prompt.loss_mask.tolist() == [False] * 6 + [True] * 2


def test_without_a_bos_nothing_is_left_out():
    prompt = with_demonstrations([row(10, 11)], row(10, 14), None)
    assert prompt.input_ids.tolist() == [10, 11, 10, 14]


def test_the_first_token_of_an_example_is_predicted_neither_alone_nor_behind_others():
    prompt = with_demonstrations([row(10, 11)], TokenRow(np.array([12, 13], dtype=np.int32), np.ones(2, bool)), None)
    assert prompt.loss_mask.tolist() == [False, False, False, True]


@pytest.mark.parametrize(("longest", "expected"), [(256, 16), (60, 12), (80, 16)])
def test_every_prompt_fits_into_the_model(longest, expected):
    assert row_allowance(reader(max_tokens=longest), max_tokens=16, n_demonstrations=4) == expected


def test_the_tiny_set_is_a_seeded_choice_of_the_short_examples():
    rows = RowList([row(*range(10, 10 + 2 + i % 5)) for i in range(60)])
    chosen = tiny_set(rows, 4, seed=1)
    assert len(chosen) == N_EXAMPLES
    assert max(len(r) for r in chosen) == 4
    assert [id(r) for r in chosen] == [id(r) for r in tiny_set(rows, 4, seed=1)]
    assert [id(r) for r in chosen] != [id(r) for r in tiny_set(rows, 4, seed=2)]
    assert len(tiny_set(RowList(rows.items[:7]), 99, seed=1)) == 7
    with pytest.raises(SelectionError, match=r"none of the 60 .*at most 1 tokens.*selection\.n_demonstrations"):
        tiny_set(rows, 1, seed=1)


def test_sets_have_no_row_twice_and_half_of_them_lie_at_opposite_ends():
    z = np.random.default_rng(0).normal(size=(100, 3))
    sets = draw_sets(z, 80, 4, seed=5)
    assert sets.shape == (80, 4)
    assert all(len({*s}) == 4 for s in sets.tolist())
    means = z[sets].mean(axis=1)
    # A mean of four random rows has a variance of 1/4 in each direction; rows of an extreme tenth lie at 1.75.
    assert np.square(means[40:]).sum(axis=1).mean() == pytest.approx(3 / 4, rel=0.4)
    assert np.square(means[:40]).sum(axis=1).mean() > 2.5
    cosines = [a @ b / math.sqrt((a @ a) * (b @ b)) for a, b in zip(means[:40:2], means[1:40:2], strict=True)]
    assert np.mean(cosines) < -0.8


def test_sets_do_not_depend_on_the_last_digits_of_the_indicators():
    generator = np.random.default_rng(0)
    z = np.repeat(generator.normal(size=(25, 3)), 4, axis=0)  # each row four times, a copy as good as another
    noise = 3e-5 * generator.normal(size=z.shape)
    np.testing.assert_array_equal(draw_sets(z, 16, 4, seed=5), draw_sets(z + noise, 16, 4, seed=5))
    assert not np.array_equal(draw_sets(z, 16, 4, seed=5), draw_sets(z, 16, 4, seed=6))


def test_there_may_be_as_few_rows_as_a_set_has():
    assert sorted(draw_sets(np.zeros((3, 1)), 8, 3, seed=0)[0]) == [0, 1, 2]
