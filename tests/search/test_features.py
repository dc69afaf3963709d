"""What the model sees of a point: there and back, and never outside what a study file can hold."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duet_ray.config import AlsoConfig, FidelityConfig, SearchConfig, TrainingConfig
from duet_ray.errors import RatioError
from duet_ray.records import Point, Ratio, settings_from
from duet_ray.search.features import Knob, PointSpace
from duet_ray.search.simplex import SimplexSpace

SIMPLEX = SimplexSpace(names=("a", "b", "c"), n_rows=10, lower=(0, 2, 0), upper=(10, 2, 10))

KNOBS = {
    "training.rank": AlsoConfig(choices=[128, 8, 32]),
    "training.schedule": AlsoConfig(choices=["linear", "constant", "cosine"]),
    "training.layers": AlsoConfig(choices=[None, [0, 1], [2, 3]]),
    "training.learning_rate": AlsoConfig(log=(1.2345678e-5, 3.1415967e-4)),
    "training.dropout": AlsoConfig(range=(0.0, 0.123456789)),
    "training.epochs": AlsoConfig(range=(1, 4)),
    "training.batch_size": AlsoConfig(log=(1, 512)),
}


def space(paths=tuple(KNOBS), simplex: SimplexSpace = SIMPLEX, **more) -> PointSpace:
    also = {path: KNOBS[path] for path in paths}
    return PointSpace.of(simplex, SearchConfig(also=also, optimize="both" if also else "data", **more))


def knob(path: str) -> Knob:
    return Knob.of(path, KNOBS[path])


# By hand -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value", "features"),
    [
        ("training.rank", 8, [0.0]),
        ("training.rank", 32, [0.5]),
        ("training.rank", 128, [1.0]),
        ("training.schedule", "constant", [0.0, 1.0, 0.0]),
        ("training.layers", None, [1.0, 0.0, 0.0]),
        ("training.layers", (2, 3), [0.0, 0.0, 1.0]),
        ("training.epochs", 2, [1 / 3]),
        ("training.batch_size", 512, [1.0]),
        ("training.batch_size", 8, [1 / 3]),
        ("training.dropout", 0.0, [0.0]),
    ],
)
def test_features_by_hand(path, value, features):
    found = knob(path)
    assert found.encode(value) == pytest.approx(features)
    assert found.n_features == len(features)
    decoded = found.decode(np.array(features))
    assert decoded == value
    assert type(decoded) is type(value)


def test_a_point_is_free_shares_then_settings_then_fidelity():
    s = space(("training.rank", "training.epochs"), fidelity=FidelityConfig(rows=[0.1, 0.5]))
    assert s.free == (0, 2)
    assert s.n_features == 5
    point = Point(ratio=Ratio(counts=(3, 2, 5)), settings=(("training.rank", 32), ("training.epochs", 4)), fidelity=0.5)
    (row,) = s.encode([point])
    assert row == pytest.approx([0.3, 0.5, 0.5, 1.0, math.log(0.5) / math.log(0.1)])
    whole = Point(ratio=point.ratio)
    assert s.encode([whole], point.settings)[0] == pytest.approx([0.3, 0.5, 0.5, 1.0, 0.0])


@pytest.mark.parametrize(("fidelity", "feature"), [(1.0, 0.0), (0.1, 1.0), (0.01, 2.0), (10**-0.5, 0.5)])
def test_the_fidelity_is_even_in_the_logarithm_of_the_rows(fidelity, feature):
    s = space((), fidelity=FidelityConfig(rows=[0.1, 0.5]))
    assert s.fidelities == (0.1, 0.5, 1.0)
    assert s.encode_fidelity(fidelity) == pytest.approx(feature)


def test_without_anything_searched_there_is_one_point():
    fixed = SimplexSpace(names=("a", "b"), n_rows=4, lower=(1, 3), upper=(1, 3))
    assert space((), fixed).is_single
    assert space((), SimplexSpace(names=("a",), n_rows=4, lower=(0,), upper=(4,))).is_single
    assert not space((), SIMPLEX).is_single
    assert not space(("training.rank",), fixed).is_single
    assert not space((), fixed, fidelity=FidelityConfig()).is_single


def test_the_ratio_of_optimize_model_is_the_prior_or_the_uniform_one():
    asked = SearchConfig(also={"training.rank": KNOBS["training.rank"]}, optimize="model")
    prior = Ratio(counts=(1, 2, 7))
    assert PointSpace.of(SIMPLEX, asked).fixed_ratio == SIMPLEX.uniform()
    assert PointSpace.of(SIMPLEX, asked, prior).fixed_ratio == prior
    assert PointSpace.of(SIMPLEX, asked, prior).free == ()
    assert PointSpace.of(SIMPLEX, SearchConfig(), prior).fixed_ratio is None


# There and back ------------------------------------------------------------------------------------------------------


def allowed(path: str, value) -> bool:
    """Whether the value lies in what was asked for, and the study file takes it."""
    asked = KNOBS[path]
    plain = json.loads(json.dumps(value))
    if asked.choices is not None:
        inside = plain in asked.choices
    else:
        low, high = asked.range or asked.log
        inside = low <= value <= high
    trained = TrainingConfig.model_validate({path.removeprefix("training."): plain})
    return inside and trained.model_dump(mode="json")[path.removeprefix("training.")] == plain


@settings(max_examples=60, deadline=None)
@given(st.data())
@pytest.mark.parametrize("path", KNOBS)
def test_whatever_the_features_the_value_is_allowed_and_snapping_is_idempotent(path, data):
    found = knob(path)
    numbers = st.floats(-3, 4, allow_nan=False)
    features = np.array(data.draw(st.lists(numbers, min_size=found.n_features, max_size=found.n_features)))
    value = found.decode(features)
    assert allowed(path, value), value
    assert found.allows(value)
    hash(value)
    assert settings_from(json.loads(json.dumps([[path, value]]))) == ((path, value),), "as the store keeps it"
    encoded = np.array(found.encode(value))
    assert encoded.min() >= 0
    assert encoded.max() <= 1
    assert found.decode(encoded) == value


def test_the_ends_of_a_range_are_reached_and_never_passed():
    """Six digits would round 3.1415967e-4 up and 1.2345678e-5 stays; both ends are values."""
    rate, dropout = knob("training.learning_rate"), knob("training.dropout")
    assert rate.decode(np.array([1.0])) == pytest.approx(3.1415967e-4, rel=1e-5)
    assert rate.decode(np.array([1.0])) <= 3.1415967e-4
    assert rate.decode(np.array([0.0])) >= 1.2345678e-5
    assert dropout.decode(np.array([1.0])) <= 0.123456789
    assert rate.decode(np.array([0.5])) == pytest.approx(math.sqrt(1.2345678e-5 * 3.1415967e-4), rel=1e-5)


def test_snapping_points_twice_changes_nothing():
    s = space()
    random = np.random.default_rng(0).random((40, s.n_settings))
    once = s.snap_settings(random)
    assert np.array_equal(s.snap_settings(once), once)
    assert once.shape == random.shape


def test_every_combination_is_listed_while_they_are_few():
    s = space(("training.rank", "training.epochs"))
    every = s.all_settings()
    assert len(every) == len(set(every)) == 12
    assert {dict(combination)["training.epochs"] for combination in every} == {1, 2, 3, 4}
    assert space(("training.learning_rate",)).all_settings() is None
    assert space(("training.rank", "training.batch_size")).all_settings() is None, "512 batch sizes are too many"


# Start and own settings ----------------------------------------------------------------------------------------------


def test_start_settings_differ_are_reproduced_and_do_not_depend_on_each_other():
    s = space()
    drawn = [s.start_settings(trial, seed=7) for trial in range(16)]
    assert len(set(drawn)) == 16
    assert s.start_settings(11, seed=7) == drawn[11]
    assert s.start_settings(11, seed=8) != drawn[11]
    assert all(allowed(path, value) for one in drawn for path, value in one)
    assert space(()).start_settings(3, seed=7) == ()


def test_start_settings_fill_a_range_evenly():
    """Sobol draws: of 32, 8 in each quarter of the logarithm."""
    s = space(("training.learning_rate",))
    features = [s.encode_settings(s.start_settings(trial, seed=0))[0] for trial in range(32)]
    assert np.histogram(features, bins=4, range=(0, 1))[0].tolist() == [8, 8, 8, 8]


@pytest.mark.parametrize(
    ("path", "given", "own"),
    [
        ("training.rank", 32, 32),
        ("training.rank", 100, 128),
        ("training.rank", 16, 8),
        ("training.schedule", "cosine", "cosine"),
        ("training.layers", [0, 1], (0, 1)),
        ("training.layers", [5], None),
        ("training.learning_rate", 1e-4, 1e-4),
        ("training.learning_rate", 1.0, 3.1415967e-4),
        ("training.learning_rate", 1e-9, 1.2345678e-5),
        ("training.epochs", 3, 3),
        ("training.epochs", 9, 4),
    ],
)
def test_own_settings_are_the_nearest_allowed(path, given, own):
    s = space((path,))
    ((named, value),) = s.own_settings(TrainingConfig.model_validate({path.removeprefix("training."): given}))
    assert named == path
    assert value == (pytest.approx(own, rel=1e-5) if isinstance(own, float) else own)
    assert allowed(path, value)


def test_points_from_elsewhere_are_refused():
    s = space(("training.rank", "training.epochs"))
    ratio = Ratio(counts=(3, 2, 5))
    sound = (("training.rank", 8), ("training.epochs", 2))
    s.refuse_outside([Point(ratio=ratio), Point(ratio=ratio, settings=sound), Point(ratio=ratio, fidelity=0.01)])
    for wrong in (
        Point(ratio=Ratio(counts=(3, 3, 4)), settings=sound),
        Point(ratio=ratio, settings=sound[:1]),
        Point(ratio=ratio, settings=sound[::-1]),
        Point(ratio=ratio, settings=(("training.rank", 9), ("training.epochs", 2))),
        Point(ratio=ratio, settings=(("training.rank", 8), ("training.epochs", 5))),
    ):
        with pytest.raises(RatioError, match=r"\(rows per domain\) lies outside the space of this study: 10 rows"):
            s.refuse_outside([wrong])
