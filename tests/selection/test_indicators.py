"""The method as a whole: on planted rewards, on a model that learns in context, and where nothing is to be learned."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from duet_ray.config import INDICATORS, SelectionConfig, TrainingConfig
from duet_ray.errors import SelectionError
from duet_ray.records import TokenRow
from duet_ray.selection import indicators
from duet_ray.selection import select as select_rows
from duet_ray.selection.base import RowWeights, SelectionContext
from duet_ray.selection.embeddings import embed
from duet_ray.selection.indicators import Indicators, standardise
from tests.selection.toy_domain import ToyDomain, ToyRows, toy_domain
from tests.tiny_model import VOCAB_SIZE, tiny_llama, tiny_tokenizer

TRAINING = TrainingConfig(max_tokens=16)
NO_TEXT = ["length", "perplexity", "difficulty", "diversity"]


def context(
    *, seed: int = 0, model=None, examples: tuple[TokenRow, ...] = (), on_progress=None, training=TRAINING, **settings
) -> SelectionContext:
    chosen = {"n_prompts": 8, "n_demonstrations": 2, "batch_size": 16, "indicators": NO_TEXT, **settings}
    model = model if model is not None else tiny_llama()
    return SelectionContext(
        settings=SelectionConfig(**{"method": "indicators", **chosen}),
        training=training,
        seed=seed,
        load_base=lambda: (model, tiny_tokenizer()),
        on_progress=on_progress,
        examples=examples,
    )


def select(domain: ToyDomain, **options) -> RowWeights:
    return select_rows(domain, context(**options))


def varied(n_train: int = 60, n_validation: int = 4, *, seed: int = 0) -> ToyDomain:
    """Rows of letters whose completions differ in length."""
    generator = np.random.default_rng(seed)

    def rows(n: int) -> ToyRows:
        lengths = generator.integers(2, 8, size=(n, 2))
        ids = [(generator.integers(10, 40, size=p + c).astype(np.int32), p) for p, c in lengths]
        return ToyRows([TokenRow(i, np.arange(len(i)) >= p) for i, p in ids])

    return ToyDomain(rows(n_train), rows(n_validation), np.zeros(n_train, dtype=bool), fingerprint=f"varied-{seed}")


def plant(monkeypatch, domain: ToyDomain, effect: np.ndarray, noise: float) -> None:
    """Rewards become the mean effect of the rows in the prompt, and noise."""
    places = {id(row): i for i, row in enumerate(domain.train.items)}

    def rewards(reader, rows_of_set, n_sets, examples, on_set=None):
        generator = np.random.default_rng(9)
        ids = [[places[id(row)] for row in rows_of_set(i)] for i in range(n_sets)]
        return np.array([effect[i].mean() for i in ids]) + noise * generator.normal(size=n_sets)

    monkeypatch.setattr(indicators, "measure_rewards", rewards)


def raw_indicators(domain: ToyDomain, ctx: SelectionContext) -> np.ndarray:
    measured = Indicators().measure(domain, np.arange(len(domain.train)), ctx, None)
    return indicators._with_diversity(measured, indicators.used(ctx.settings), [0])


@pytest.mark.parametrize("sign", [1, -1])
def test_the_sign_and_size_of_planted_weights_are_found(monkeypatch, sign):
    domain, planted = varied(), sign * np.array([0.0, 0.6, 0.0, -0.3])
    settings = {"n_prompts": 96, "n_demonstrations": 4}
    z = np.column_stack([standardise(c) for c in raw_indicators(domain, context(**settings)).T])
    plant(monkeypatch, domain, z @ planted, noise=0.1)
    weights = select(domain, **settings)
    found = np.array([weights.details[f"weight_{name}"] for name in NO_TEXT])
    np.testing.assert_allclose(found, planted, atol=0.12)
    np.testing.assert_allclose(weights.scores, z @ found, rtol=1e-4, atol=1e-5)
    assert np.corrcoef(weights.scores, z @ planted)[0, 1] > 0.95
    assert weights.details["p_value"] < 0.01
    assert weights.details["rank_correlation"] > 0.8
    assert not weights.notes


def test_rewards_without_any_pattern_give_uniform_weights_and_say_so(monkeypatch):
    domain = varied()
    plant(monkeypatch, domain, np.zeros(60), noise=1.0)
    weights = select(domain, n_prompts=48)
    assert weights.details["p_value"] > 0.05
    np.testing.assert_allclose(weights.probabilities, 1 / 60)
    assert [weights.details[f"weight_{name}"] for name in NO_TEXT] == [0] * 4
    assert "explains nothing here" in weights.notes[0]
    assert "all 60 scores are equal (0): uniform weights" in weights.notes[1]


def test_diversity_is_taken_of_embeddings_without_the_mean_of_the_domain():
    domain, ctx = varied(30), context(indicators=["diversity", "length"])
    vectors = embed(domain, np.arange(30), ctx).astype(np.float64)
    vectors -= vectors.mean(axis=0)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    distances = 1 - vectors @ vectors.T
    np.fill_diagonal(distances, np.inf)
    expected = np.sort(distances, axis=1)[:, :10].mean(axis=1)
    np.testing.assert_allclose(raw_indicators(domain, ctx)[:, 1], expected, atol=2e-5)


class Cache(torch.nn.Module):
    """A model that learns in context and nothing else: a token is as likely as it was frequent so far."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=512))
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, attention_mask, use_cache):
        seen = torch.nn.functional.one_hot(input_ids, VOCAB_SIZE).float().cumsum(dim=1)
        return SimpleNamespace(logits=torch.log(seen + 0.1) + self.weight)


def test_rows_that_help_in_context_are_drawn_more():
    # The task's letters are eight. Half of the rows are made of them too, and so repeat themselves: their perplexity
    # is low. The others are made of eighty letters. All have the same length.
    generator = np.random.default_rng(0)

    def row(n_letters: int) -> TokenRow:
        return TokenRow(generator.integers(10, 10 + n_letters, size=14).astype(np.int32), np.arange(14) >= 5)

    near = np.arange(60) % 2 == 0
    domain = ToyDomain(ToyRows([row(8 if n else 80) for n in near]), ToyRows([row(8) for _ in range(6)]), ~near)
    weights = select(domain, model=Cache(), indicators=["length", "perplexity"], n_prompts=24)
    assert weights.details["weight_perplexity"] < 0
    assert weights.details["weight_length"] == 0
    assert (weights.scores[near][:, None] > weights.scores[~near][None]).mean() > 0.98
    # By ranks, the upper half of 60 rows has (31 + … + 60) / (1 + … + 60) = 0.746 of the draws.
    assert weights.probabilities[near].sum() > 0.73
    assert weights.details["mean_reward"] > 0
    assert any("length is 2.197 for (nearly) every row: it has no say" in note for note in weights.notes)


def test_examples_of_the_task_take_the_place_of_validation_rows(monkeypatch):
    domain, seen = varied(20, 4), []

    def rewards(reader, rows_of_set, n_sets, examples, on_set=None):
        seen.append(examples)
        return np.arange(n_sets, dtype=float)

    monkeypatch.setattr(indicators, "measure_rewards", rewards)
    examples = tuple(varied(3, seed=1).train.items)
    select(domain, examples=examples)
    select(domain)
    without = ToyDomain(domain.train, ToyRows([]), domain.corrupted)
    select(without, examples=examples)
    assert [[id(row) for row in rows] for rows in seen] == [
        [id(row) for row in rows] for rows in (examples, domain.validation.items, examples)
    ]


def test_without_validation_rows_and_examples_there_is_nothing_to_learn_from():
    domain = varied(12, 0)
    with pytest.raises(SelectionError, match="domain letters: indicators needs validation rows"):
        select(domain)


def test_shards_and_batches_do_not_change_the_result(monkeypatch):
    domain = varied(30, 4)
    plant(monkeypatch, domain, raw_indicators(domain, context()) @ [0.0, 1.0, 0.0, 1.0], noise=0.01)
    whole = select(domain, n_prompts=16, batch_size=64)
    parts = select(domain, n_prompts=16, batch_size=1, shard_rows=7)
    np.testing.assert_allclose(parts.scores, whole.scores, rtol=1e-3, atol=1e-3 * np.ptp(whole.scores))
    assert np.ptp(whole.scores) > 0


def test_rewards_do_not_depend_on_the_batch_size():
    domain = varied(20, 5)
    one, many = (select(domain, batch_size=size).details for size in (1, 64))
    assert one.keys() == many.keys()
    for name in ("mean_reward", "reward_spread", "r_squared"):
        assert one[name] == pytest.approx(many[name], rel=1e-3, abs=1e-5)


def test_the_result_follows_from_the_seed_and_the_content():
    domain = varied(30, 20)
    torch.manual_seed(1)
    first = select(domain)
    torch.manual_seed(2)
    again, other = select(domain), select(domain, seed=1)
    numbers = {name: value for name, value in first.details.items() if "seconds" not in name}
    assert numbers == {name: value for name, value in again.details.items() if "seconds" not in name}
    np.testing.assert_array_equal(first.scores, again.scores)
    assert first.details["mean_reward"] != other.details["mean_reward"]


def test_some_indicators_are_measured_and_no_others():
    domain = toy_domain(12, 4)
    measured = Indicators().measure(domain, np.array([1, 4, 5]), context(indicators=["richness", "length"]), None)
    assert measured.shape == (3, 2)
    weights = select(domain, indicators=["perplexity"])
    assert [name for name in weights.details if name.startswith("weight_")] == ["weight_perplexity"]
    every = select(domain, indicators=list(INDICATORS))
    assert [name for name in every.details if name.startswith("weight_")] == [f"weight_{name}" for name in INDICATORS]


def test_where_rows_differ_in_nothing_no_prompt_is_tried(monkeypatch):
    monkeypatch.setattr(indicators, "measure_rewards", None)
    one = toy_domain(1).train.items[0]
    domain = ToyDomain(ToyRows([one] * 12), ToyRows([one]), np.zeros(12, dtype=bool))
    weights = select(domain, indicators=list(INDICATORS))
    np.testing.assert_allclose(weights.probabilities, 1 / 12)
    assert sum("for (nearly) every row: it has no say" in note for note in weights.notes) == 6


def test_a_domain_of_two_rows_has_prompts_of_one():
    weights = select(varied(2, 2), n_demonstrations=4)
    assert weights.details["demonstrations"] == 1
    assert any("a prompt has 1 demonstrations, not 4" in note for note in weights.notes)


def test_rows_that_do_not_fit_into_a_prompt_are_no_demonstrations(monkeypatch):
    domain, lengths = varied(40, 6), set()

    def rewards(reader, rows_of_set, n_sets, examples, on_set=None):
        lengths.update(len(row) for i in range(n_sets) for row in (*rows_of_set(i), *examples))
        return np.arange(n_sets, dtype=float)

    monkeypatch.setattr(indicators, "measure_rewards", rewards)
    weights = select(domain, model=tiny_llama(max_tokens=30))  # two demonstrations and an example: ten tokens each
    assert max(lengths) == 10
    n_short = int((domain.train.n_tokens <= 10).sum())
    assert any(f"{n_short} of 40 rows that have at most 10 tokens" in note for note in weights.notes)
    with pytest.raises(SelectionError, match=r"domain letters: .*lower selection\.n_demonstrations"):
        select(domain, model=tiny_llama(max_tokens=30), n_demonstrations=9)


def test_progress_is_told_by_stage():
    told: dict[str, list[tuple[int, int]]] = {}
    select(varied(12, 2), on_progress=lambda stage, done, total: told.setdefault(stage, []).append((done, total)))
    assert set(told) == {"score", "embed", "prompts"}
    assert told["score"][-1] == (12, 12)
    assert told["prompts"] == [(i, 8) for i in range(1, 9)]


def test_the_model_keeps_its_mode():
    model = tiny_llama().train()
    select(varied(12, 2), model=model, indicators=["perplexity"])
    assert model.training


def test_standardised_values_have_mean_zero_and_variance_one_and_drawn_in_tails():
    values = np.append(np.random.default_rng(0).normal(5, 2, size=999), 1e6)
    z = standardise(values)
    assert z.mean() == pytest.approx(0, abs=1e-12)
    assert z.std() == pytest.approx(1)
    assert np.abs(z).max() < 3
    assert standardise(np.full(9, 0.3)) is None
    assert standardise(1 + 1e-8 * np.arange(9)) is None
    assert standardise(np.zeros(9)) is None
