"""What every selection method promises. A new one is added to `METHODS`, and has its tests."""

import numpy as np
import pytest
import torch

from duet_ray.config import SelectionConfig, TrainingConfig
from duet_ray.errors import ConfigError, SelectionError
from duet_ray.selection import METHODS as TABLE
from duet_ray.selection import make_selector, method_of
from duet_ray.selection import select as select_rows
from duet_ray.selection.base import RowWeights, SelectionContext
from tests.selection.toy_domain import ToyDomain, toy_domain
from tests.tiny_model import tiny_llama, tiny_tokenizer

METHODS = [
    SelectionConfig(method="uniform"),
    SelectionConfig(method="influence", solver="ekfac", n_hessian_rows=8),
    SelectionConfig(method="influence", solver="cg", n_hessian_rows=8, cg_iterations=2),
    SelectionConfig(method="influence", solver="cg", n_hessian_rows=8, cg_iterations=2, curvature="hessian"),
    SelectionConfig(method="influence", solver="lissa", n_hessian_rows=8, lissa_depth=2),
    SelectionConfig(method="remove_harmful", n_hessian_rows=8),
    SelectionConfig(method="top_n", n_hessian_rows=8),
    SelectionConfig(method="influence", n_hessian_rows=8, n_exact_rows=32, min_rank_correlation=-1),
    SelectionConfig(method="logdet"),
    SelectionConfig(method="coreset"),
    SelectionConfig(method="less", epochs=2),
    SelectionConfig(method="less", epochs=2, projection=32),
    SelectionConfig(method="tracin", epochs=2),
    SelectionConfig(method="tracin", epochs=2, projection=32),
    SelectionConfig(method="indicators", n_prompts=8, n_demonstrations=2),
]
TRAINING = TrainingConfig(rank=2, learning_rate=1e-2, batch_size=8, max_tokens=16, target_modules=["q_proj"])


@pytest.fixture(params=METHODS, ids=lambda s: f"{s.method}-{s.solver}" if "influence" in s.method else s.method)
def settings(request) -> SelectionConfig:
    return request.param


@pytest.fixture
def domain(settings) -> ToyDomain:
    """A few rows, and yet more than are scored exactly."""
    return toy_domain(10 if settings.n_exact_rows is None else 36, 4)


def select(settings: SelectionConfig, domain: ToyDomain, model=None, seed: int = 0) -> RowWeights:
    model = model if model is not None else tiny_llama()
    context = SelectionContext(
        settings=settings, training=TRAINING, seed=seed, load_base=lambda: (model, tiny_tokenizer())
    )
    return select_rows(domain, context)


def test_every_method_has_its_contract_tests():
    assert {s.method for s in METHODS} == set(TABLE)


def test_the_name_is_the_one_in_the_study_file(settings):
    assert make_selector(settings).name == settings.method


def test_one_weight_for_every_row(settings, domain):
    weights = select(settings, domain)
    if weights.probabilities is not None:
        assert weights.probabilities.shape == (len(domain.train),)
        assert weights.probabilities.dtype == np.float64
        assert (weights.probabilities >= 0).all()
        assert weights.probabilities.sum() == pytest.approx(1, abs=1e-9)
    else:
        assert sorted(weights.order) == list(range(len(domain.train)))
    if weights.scores is not None:
        assert weights.scores.shape == (len(domain.train),)
        assert np.isfinite(weights.scores).all()
    assert 1 <= weights.effective_sample_size <= len(domain.train) + 1e-9


def test_better_scores_are_never_drawn_less(settings, domain):
    weights = select(settings, domain)
    if weights.scores is not None and weights.probabilities is not None:
        assert (np.diff(weights.probabilities[np.argsort(weights.scores)]) >= 0).all()


def test_the_result_follows_from_the_inputs_and_the_global_generators_are_left_alone(settings, domain):
    first = select(settings, domain)
    torch.manual_seed(4)
    np.random.seed(4)  # noqa: NPY002 (the global generator is the point)
    states = torch.random.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    again = select(settings, domain)
    np.testing.assert_array_equal(first.probabilities, again.probabilities)
    np.testing.assert_array_equal(first.order, again.order)
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]  # noqa: NPY002


def test_the_base_model_is_untouched(settings, domain):
    model, ids = tiny_llama(), torch.arange(4, 20)[None]
    before, names = model(ids).logits, [n for n, _ in model.named_parameters()]
    select(settings, domain, model)
    assert torch.equal(model(ids).logits, before)
    assert [n for n, _ in model.named_parameters()] == names


def test_a_method_that_needs_no_model_loads_none(settings):
    def load():
        raise AssertionError("the model was loaded")

    if not method_of(settings).needs_model:
        select_rows(toy_domain(4), SelectionContext(settings=settings, training=TRAINING, seed=0, load_base=load))


def test_a_domain_of_one_row_works(settings):
    weights = select(settings, toy_domain(1, 4))
    assert weights.probabilities is None or weights.probabilities.tolist() == [1.0]


def test_an_empty_domain_is_an_error_that_names_it(settings):
    with pytest.raises(SelectionError, match="domain letters"):
        select(settings, toy_domain(0, 4))


def test_an_unknown_method_lists_the_known_ones():
    unknown = SelectionConfig.model_construct(method="magic")
    with pytest.raises(ConfigError, match=r"selection\.method: .*'magic'; there are: coreset, .*influence, .*uniform"):
        make_selector(unknown)
