import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from duet_ray.errors import SelectionError
from duet_ray.selection.base import SelectionContext
from duet_ray.selection.checkpoints import (
    n_warm_up_rows,
    save_directions,
    saved_checkpoints,
    sum_over_checkpoints,
    warm_up,
    warming_model,
)
from tests.selection.explicit_gradients import TRAINING, context_of, flat, moments_by_hand
from tests.selection.toy_domain import toy_domain

DOMAIN = toy_domain(20, 4)


@pytest.fixture(scope="module")
def context() -> SelectionContext:
    return context_of(method="less", epochs=3)


@pytest.fixture(scope="module")
def folder(context, tmp_path_factory):
    folder = tmp_path_factory.mktemp("warm-up")
    with warming_model(context) as scoring:
        warm_up(scoring, DOMAIN, context, folder, with_moments=True)
    return folder


def test_the_warm_up_takes_a_twentieth_but_enough_and_never_more_than_there_is():
    assert n_warm_up_rows(100_000, None) == 5000
    assert n_warm_up_rows(10_001, None) == 501
    assert n_warm_up_rows(5000, None) == 256
    assert n_warm_up_rows(255, None) == 255
    assert n_warm_up_rows(5000, 12) == 12
    assert n_warm_up_rows(10, 12) == 10


@pytest.mark.parametrize(("asked_for", "n"), [(None, 4), (1, 1)])
def test_the_epochs_are_its_own(asked_for, n, tmp_path):
    training = TRAINING.model_copy(update={"epochs": 2})
    context = context_of(method="less", epochs=asked_for, training=training)
    with warming_model(context) as scoring:
        details = warm_up(scoring, toy_domain(9, 2), context, tmp_path, with_moments=False)
    assert details["checkpoints"] == n
    assert len(saved_checkpoints(tmp_path)) == n
    # Two steps an epoch, the rate falling linearly to zero over all of them.
    rates = TRAINING.learning_rate * (1 - np.arange(2 * n) / (2 * n))
    np.testing.assert_allclose([c.learning_rate for c in saved_checkpoints(tmp_path)], rates.reshape(n, 2).mean(axis=1))


def test_files_are_plain_and_the_moments_only_where_they_are_needed(folder, context, tmp_path):
    assert {f.suffix for f in folder.rglob("*") if f.is_file()} == {".json", ".safetensors"}
    assert all((folder / str(epoch) / "moments.safetensors").is_file() for epoch in range(3))
    with warming_model(context) as scoring:
        warm_up(scoring, DOMAIN, context, tmp_path, with_moments=False)
    assert not list(tmp_path.rglob("moments.safetensors"))
    assert load_file(folder / "2/adapter/adapter_model.safetensors").keys()
    for name, tensor in load_file(folder / "2/adapter/adapter_model.safetensors").items():
        assert torch.equal(tensor, load_file(tmp_path / "2/adapter/adapter_model.safetensors")[name])


def test_a_checkpoint_is_what_training_had_at_the_end_of_its_epoch(folder, context):
    expected = moments_by_hand(DOMAIN, context, epochs=3)
    with warming_model(context) as scoring:
        for saved, moment in zip(saved_checkpoints(folder), expected, strict=True):
            adapted = saved.load(scoring)
            m, v = saved.moments(adapted)
            assert torch.equal(flat(m), moment.m)
            assert torch.equal(flat(v), moment.v)
            assert saved.learning_rate == moment.learning_rate
    assert not torch.equal(expected[0].m, expected[1].m)


def test_a_seeded_part_of_the_domain_is_trained_on(tmp_path):
    losses = []
    for seed in (0, 0, 1):
        context = context_of(method="less", epochs=1, n_fit_rows=6)
        context = SelectionContext(**{**vars(context), "seed": seed})
        with warming_model(context) as scoring:
            details = warm_up(scoring, DOMAIN, context, tmp_path / str(len(losses)), with_moments=False)
        assert details["fit_rows"] == 6
        losses.append(details["fit_loss"])
    assert losses[0] == losses[1] != losses[2]


def test_scores_are_summed_with_the_learning_rates(folder, context):
    weights = []

    def score(_checkpoint, adapted, on_rows):
        weights.append(flat(adapted.weights))
        on_rows(2)
        return np.array([1.0, 10.0 ** len(weights)])

    stages: list[tuple[str, int, int]] = []
    context = SelectionContext(**{**vars(context), "on_progress": lambda *args: stages.append(args)})
    rates = json.loads((folder / "checkpoints.json").read_text())["learning_rates"]
    total = sum_over_checkpoints(context, folder, 2, score)
    np.testing.assert_allclose(total, [sum(rates), 10 * rates[0] + 100 * rates[1] + 1000 * rates[2]])
    assert stages == [("score", 2, 6), ("score", 4, 6), ("score", 6, 6)]
    assert not torch.equal(weights[0], weights[1])  # each at an adapter of its own
    assert not torch.equal(weights[1], weights[2])


def test_a_direction_that_is_not_finite_is_an_error_with_a_remedy(folder, context):
    with (
        warming_model(context) as scoring,
        pytest.raises(SelectionError, match=r"validation loss is not finite after epoch 1 .*training\.learning_rate"),
    ):
        save_directions(scoring, context, folder, lambda _: [torch.ones(2), torch.tensor([1.0, torch.inf])])


def test_directions_come_back_in_order(folder, context):
    kept = [torch.arange(12.0).view(3, 4), *(torch.full((1,), float(i)) for i in range(11))]
    with warming_model(context) as scoring:
        save_directions(scoring, context, folder, lambda _: kept)
        saved = saved_checkpoints(folder)[1]
        found = saved.direction(saved.load(scoring))
    assert len(found) == 12
    assert all(torch.equal(a, b) for a, b in zip(found, kept, strict=True))
