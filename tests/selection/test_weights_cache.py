import json

import numpy as np
import pytest

from duet_ray.config import StudyConfig, WeightingConfig, config_from
from duet_ray.selection import load_weights, model_identity, save_weights, weights_key
from duet_ray.selection.base import RowWeights
from duet_ray.selection.weighting import weigh
from tests.selection.toy_domain import toy_domain
from tests.tiny_model import write_tiny_model

DOMAIN = toy_domain(4, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("study")
    write_tiny_model(place / "model")
    return place


def study(folder, *, seed: int = 0, training=None, model=None, mixture=None, **selection) -> StudyConfig:
    data = {
        "name": "s",
        "seed": seed,
        "model": {"path": "model", **(model or {})},
        "domains": [{"name": "letters", "source": "a.jsonl"}],
        "selection": {"method": "influence", **selection},
        "mixture": mixture or {},
        "training": training or {},
        "feedback": {"kind": "heldout_loss", "file": "task.jsonl"},
    }
    return config_from(data, folder=folder)


def scored(weighting: WeightingConfig | None = None, scores=(0.1, -2.0, 3.0, 0.7), notes=()) -> RowWeights:
    values = np.array(scores)
    probabilities, more = weigh(values, weighting or WeightingConfig(), "letters")
    return RowWeights(scores=values, probabilities=probabilities, notes=(*notes, *more), details={"damping": 0.1 + 0.2})


def assert_same(a: RowWeights | None, b: RowWeights) -> None:
    assert a is not None
    for name in ("scores", "probabilities", "order"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert (a.notes, a.details) == (b.notes, b.details)


def test_what_is_saved_is_loaded_to_the_last_bit(folder, tmp_path):
    key, weights = weights_key(DOMAIN, study(folder)), scored(notes=("a note",))
    assert load_weights(tmp_path, key) is None
    place = save_weights(tmp_path, key, weights)
    assert place.parent == tmp_path / "weights"
    assert place.name.startswith("letters-")
    assert_same(load_weights(tmp_path, key), weights)


def test_uniform_weights_and_orders_are_stored_too(folder, tmp_path):
    key = weights_key(DOMAIN, study(folder, method="uniform"))
    save_weights(tmp_path, key, RowWeights(probabilities=np.full(4, 0.25)))
    assert_same(load_weights(tmp_path, key), RowWeights(probabilities=np.full(4, 0.25)))
    ordered = RowWeights(order=np.array([2, 0, 3, 1]))
    key = weights_key(DOMAIN, study(folder))
    save_weights(tmp_path, key, ordered)
    assert_same(load_weights(tmp_path, key), ordered)


def test_another_weighting_reweighs_the_stored_scores(folder, tmp_path):
    sharp = WeightingConfig(kind="softmax", temperature=0.3)
    save_weights(tmp_path, weights_key(DOMAIN, study(folder)), scored(notes=("a note",)))
    for weighting in (sharp, WeightingConfig(kind="shift")):
        key = weights_key(DOMAIN, study(folder, weighting=weighting.model_dump()))
        assert_same(load_weights(tmp_path, key), scored(weighting, notes=("a note",)))


def test_methods_that_use_the_same_scores_share_what_is_stored(folder, tmp_path):
    save_weights(tmp_path, weights_key(DOMAIN, study(folder)), scored())
    values = scored().scores
    dropped = load_weights(tmp_path, weights_key(DOMAIN, study(folder, method="remove_harmful", harmful_fraction=0.5)))
    assert dropped.probabilities.tolist() == [0, 0, 0.5, 0.5]
    best = load_weights(tmp_path, weights_key(DOMAIN, study(folder, method="top_n")))
    assert best.order.tolist() == np.argsort(-values).tolist()
    assert best.probabilities is None
    ranked = load_weights(tmp_path, weights_key(DOMAIN, study(folder, weighting={"kind": "rank"})))
    np.testing.assert_allclose(ranked.probabilities, [0.2, 0.1, 0.4, 0.3])
    save_weights(tmp_path, weights_key(DOMAIN, study(folder, method="less")), scored())
    assert len(list((tmp_path / "weights").iterdir())) == 2, "other scores have a place of their own"


def test_weights_that_come_without_scores_have_one_use(folder, tmp_path):
    key = weights_key(DOMAIN, study(folder, method="logdet", weighting={"kind": "rank"}))
    assert key == weights_key(DOMAIN, study(folder, method="logdet"))
    assert key.endswith("-plain")


def test_the_note_of_a_weighting_is_not_doubled(folder, tmp_path):
    equal = scored(scores=(1.0, 1.0), notes=("a note",))
    save_weights(tmp_path, weights_key(DOMAIN, study(folder)), equal)
    key = weights_key(DOMAIN, study(folder, weighting={"kind": "shift"}))
    assert load_weights(tmp_path, key).notes == equal.notes


@pytest.mark.parametrize("damage", ["cut", "flip", "no json", "no arrays", "bad json"])
def test_what_is_damaged_is_never_read_and_is_replaced(folder, tmp_path, damage):
    key = weights_key(DOMAIN, study(folder))
    place = save_weights(tmp_path, key, scored())
    arrays = place / "weights.npz"
    if damage == "cut":
        arrays.write_bytes(arrays.read_bytes()[:-10])
    elif damage == "flip":
        data = bytearray(arrays.read_bytes())
        data[len(data) // 2] ^= 1
        arrays.write_bytes(data)
    elif damage == "bad json":
        (place / "weights.json").write_text(json.dumps([1]))
    else:
        (place / ("weights.json" if damage == "no json" else "weights.npz")).unlink()
    assert load_weights(tmp_path, key) is None
    save_weights(tmp_path, key, scored())
    assert_same(load_weights(tmp_path, key), scored())


def test_a_writer_that_dies_leaves_nothing_that_is_read(folder, tmp_path, monkeypatch):
    from duet_ray.selection import weights_cache

    key = weights_key(DOMAIN, study(folder))

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(weights_cache.Path, "rename", die)
    with pytest.raises(KeyboardInterrupt):
        save_weights(tmp_path, key, scored())
    assert load_weights(tmp_path, key) is None
    assert list((tmp_path / "weights").iterdir()) == []


def test_a_second_writer_keeps_what_is_there(folder, tmp_path):
    key = weights_key(DOMAIN, study(folder))
    save_weights(tmp_path, key, scored())
    save_weights(tmp_path, key, scored(scores=(0.0, 1.0)))
    assert_same(load_weights(tmp_path, key), scored())
    assert len(list((tmp_path / "weights").iterdir())) == 1


def test_the_key_changes_with_what_changes_the_scores(folder):
    same = [
        study(folder),
        study(folder, batch_size=4),
        study(folder, cg_iterations=3),
        study(folder, lissa_depth=3),
        study(folder, embedding_model="model"),
        study(folder, shard_rows=2),
        study(folder, min_rank_correlation=0.5),
        study(folder, epochs=1),
        study(folder, training={"micro_batch_size": 1}),
    ]
    other = [
        study(folder, seed=1),
        study(folder, solver="cg"),
        study(folder, solver="cg", cg_iterations=3),
        study(folder, solver="lissa"),
        study(folder, solver="lissa", lissa_depth=3),
        study(folder, solver="lissa", curvature="hessian"),
        study(folder, n_exact_rows=32),
        study(folder, n_exact_rows=32, min_rank_correlation=0.5),
        study(folder, n_exact_rows=32, embedding_model="model"),
        study(folder, surrogate={"path": "owner/small"}),
        study(folder, method="less"),
        study(folder, method="less", projection=64),
        study(folder, method="less", epochs=1),
        study(folder, method="tracin"),
        study(folder, method="logdet"),
        study(folder, method="logdet", pool=2.0, mixture={"n_rows": 1}),
        study(folder, method="indicators"),
        study(folder, method="indicators", indicators=["length"]),
        study(folder, damping=0.2),
        study(folder, n_fit_rows=10),
        study(folder, epochs=3),
        study(folder, training={"rank": 4}),
        study(folder, model={"dtype": "float32"}),
        study(folder, method="uniform"),
    ]
    assert len({weights_key(DOMAIN, c) for c in same}) == 1
    assert len({weights_key(DOMAIN, c) for c in [same[0], *other]}) == 1 + len(other)
    assert weights_key(toy_domain(5, 2), same[0]) != weights_key(DOMAIN, same[0])


def test_the_content_of_the_examples_is_in_the_key(folder, tmp_path):
    (folder / "few.jsonl").write_text("{}")
    first = weights_key(DOMAIN, study(folder, method="indicators", examples="few.jsonl"))
    (folder / "few.jsonl").write_text("{ }")
    assert weights_key(DOMAIN, study(folder, method="indicators", examples="few.jsonl")) != first


def test_uniform_weights_depend_on_the_domain_alone(folder):
    keys = {weights_key(DOMAIN, study(folder, method="uniform", seed=s, training={"rank": 2 + s})) for s in range(3)}
    assert len(keys) == 1


def test_a_model_is_known_by_its_content_and_not_by_its_place(tmp_path):
    for name, seed in (("a/model", 0), ("b/model", 0), ("c/model", 1)):
        write_tiny_model(tmp_path / name, seed=seed)
    a, b, c = (model_identity(study(tmp_path / n)) for n in "abc")
    assert a == b != c


def test_a_hub_model_is_known_by_id_and_revision(tmp_path):
    hub = {"path": "owner/name", "revision": "abc"}
    assert model_identity(study(tmp_path, model=hub)) == "owner/name@abc:bfloat16"


def test_a_study_that_trains_otherwise_finds_the_scores_by_naming_their_settings(folder):
    """`selection.fit` is what `training` is in the study that scored: the same key, and else another one."""
    lora = {"rank": 8, "alpha": 4, "dropout": 0.1, "learning_rate": 1e-3, "batch_size": 4, "schedule": "constant"}
    scored_by = weights_key(DOMAIN, study(folder, training=lora))
    full = {"method": "full", "epochs": 3, "learning_rate": 1e-5, "batch_size": 32, "weight_decay": 0.1}
    fit = {**lora, "weight_decay": 0.0}
    assert weights_key(DOMAIN, study(folder, training=full, fit=fit, epochs=1)) == scored_by
    for name in fit:
        less = {key: value for key, value in fit.items() if key != name}
        assert weights_key(DOMAIN, study(folder, training=full, fit=less, epochs=1)) != scored_by, name
    assert weights_key(DOMAIN, study(folder, training=full, fit=fit)) != scored_by, "three epochs"
    assert weights_key(DOMAIN, study(folder, training=lora, fit={"rank": 8})) == scored_by
