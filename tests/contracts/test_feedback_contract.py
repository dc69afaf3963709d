"""The contract of `duet_ray.feedback.base.FeedbackSource`, over every implementation."""

import math
import random

import numpy as np
import pytest
import torch

from duet_ray.errors import FeedbackError
from duet_ray.feedback import FEEDBACKS, make_feedback
from duet_ray.records import Direction, Feedback
from tests.feedback.studies import ITEMS, PAIRS, study, write_jsonl, write_task
from tests.tiny_model import tiny_llama, tiny_tokenizer

SECTIONS = {
    "heldout_loss": {"kind": "heldout_loss", "file": "pairs.jsonl"},
    "heldout_loss-choice": {"kind": "heldout_loss", "file": "items.jsonl", "format": "multiple_choice"},
    "heldout_loss-accuracy": {
        "kind": "heldout_loss",
        "file": "items.jsonl",
        "format": "multiple_choice",
        "metric": "accuracy",
        "direction": "maximize",
    },
    "lm_eval": {"kind": "lm_eval", "tasks": {"toy_task": 1.0}, "tasks_folder": "tasks", "direction": "maximize"},
    "function": {"kind": "function", "function": "contract_scorer:score", "direction": "minimize"},
}

SCORER = """
import torch

def score(model, tokenizer, seed):
    ids = torch.tensor([tokenizer("the cat sat")["input_ids"]])
    with torch.no_grad():
        return model(ids, labels=ids).loss + 0.1 * torch.randn((), generator=torch.Generator().manual_seed(seed))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("contract")
    write_jsonl(folder / "pairs.jsonl", PAIRS)
    write_jsonl(folder / "items.jsonl", ITEMS)
    write_task(folder / "tasks")
    (folder / "contract_scorer.py").write_text(SCORER, encoding="utf-8")
    return folder


@pytest.fixture(scope="module", params=SECTIONS)
def source(request, folder):
    return make_feedback(study(folder, SECTIONS[request.param]))


@pytest.fixture
def model():
    return tiny_llama(seed=1)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def test_every_kind_is_covered():
    assert {section["kind"] for section in SECTIONS.values()} == set(FEEDBACKS)


def test_check_needs_no_model_and_returns_notes(source):
    notes = source.check()
    assert isinstance(notes, list)
    assert all(isinstance(note, str) for note in notes)


def test_a_value_is_a_finite_float(source, model, tokenizer):
    measured = source.measure(model, tokenizer, seed=0)
    assert isinstance(measured, Feedback)
    assert type(measured.value) is float
    assert math.isfinite(measured.value)
    assert measured.stderr is None or (type(measured.stderr) is float and measured.stderr >= 0)
    assert all(type(number) is float for number in measured.metrics.values())


def test_same_model_and_seed_same_value(source, model, tokenizer):
    first = source.measure(model, tokenizer, seed=7)
    source.measure(tiny_llama(seed=2), tokenizer, seed=8)
    assert source.measure(model, tokenizer, seed=7) == first


def test_large_seeds(source, model, tokenizer):
    source.measure(model, tokenizer, seed=2**63 - 1)


def test_the_model_is_not_changed(source, model, tokenizer):
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    flags = [weight.requires_grad for weight in model.parameters()]
    source.measure(model, tokenizer, seed=0)
    assert not model.training
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert [weight.requires_grad for weight in model.parameters()] == flags
    assert all(weight.grad is None for weight in model.parameters())


def test_the_model_can_still_be_trained(source, model, tokenizer):
    source.measure(model, tokenizer, seed=0)
    ids = torch.tensor([[5, 6, 7]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.lm_head.weight.grad.any()


def test_global_generators_are_left_as_they_were(source, model, tokenizer):
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    expected = random.random(), np.random.random(), float(torch.rand(()))  # noqa: NPY002
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    source.check()
    source.measure(model, tokenizer, seed=3)
    assert (random.random(), np.random.random(), float(torch.rand(()))) == expected  # noqa: NPY002


def test_task_texts_are_texts(source):
    texts = list(source.task_texts())
    assert all(isinstance(text, str) and text for text in texts)
    assert texts == list(source.task_texts())


def test_a_lora_model_is_measured_with_its_adapter(source, tokenizer):
    from peft import LoraConfig, get_peft_model

    plain = source.measure(tiny_llama(seed=1), tokenizer, seed=0)
    torch.manual_seed(0)
    adapted = get_peft_model(tiny_llama(seed=1), LoraConfig(r=4, target_modules="all-linear")).eval()
    assert source.measure(adapted, tokenizer, seed=0).value == pytest.approx(plain.value, rel=1e-5)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=1.0)
    measured = source.measure(adapted, tokenizer, seed=0)
    assert (measured.value, measured.metrics) != (plain.value, plain.metrics)
    assert isinstance(adapted.base_model.model, type(tiny_llama()))


def test_what_is_measured_beside_comes_from_its_own_section(folder):
    config = study(folder, SECTIONS["heldout_loss"], also=[SECTIONS["heldout_loss-accuracy"]])
    assert config.also[0].direction is Direction.MAXIMIZE
    beside = make_feedback(config, config.also[0])
    assert list(beside.task_texts()) == [item["question"] for item in ITEMS]
    assert list(make_feedback(config).task_texts()) != list(beside.task_texts())


def test_an_unknown_kind_lists_the_known_ones(folder):
    config = study(folder, SECTIONS["heldout_loss"])
    section = config.feedback.model_copy(update={"kind": "deferred"})
    with pytest.raises(FeedbackError, match="must be one of heldout_loss, lm_eval, function, got 'deferred'"):
        make_feedback(config, section)


def test_a_broken_model_has_no_value(folder, tokenizer):
    broken = tiny_llama()
    broken.lm_head.weight.data.fill_(float("nan"))
    for name in ("heldout_loss", "heldout_loss-choice", "function"):
        with pytest.raises(FeedbackError, match="must be finite, got nan"):
            make_feedback(study(folder, SECTIONS[name])).measure(broken, tokenizer, seed=0)
