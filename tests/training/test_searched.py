"""Settings of a trial over those of the study."""

from pathlib import Path
from typing import Any

import pytest

from duet_ray.config import StudyConfig, config_from
from duet_ray.errors import ConfigError
from duet_ray.training.searched import common_batch_size, dearest, training_of, values_of
from tests.toy_study import toy_data


def study(also: dict[str, Any] | None = None, **changes: Any) -> StudyConfig:
    searched = {"search__also": also, "search__optimize": "both"} if also else {}
    return config_from(toy_data(**searched, **changes), folder=Path())


def test_a_trial_overrules_the_study_and_nothing_else() -> None:
    config = study()
    assert training_of(config, ()) is config.training
    settings = (("training.rank", 32), ("training.target_modules", ("q_proj", "v_proj")), ("training.layers", None))
    found = training_of(config, settings)
    assert (found.rank, found.target_modules, found.layers) == (32, ["q_proj", "v_proj"], None)
    changes = {"rank": 32, "target_modules": ["q_proj", "v_proj"]}
    assert found == config.training.model_copy(update=changes)


def test_a_value_that_no_study_file_could_hold_is_refused_by_path() -> None:
    with pytest.raises(ConfigError, match=r"training\.rank: .*greater than or equal to 1"):
        training_of(study(), (("training.rank", 0),))


def test_values_are_those_of_the_trials() -> None:
    dropout = {"range": [0, 0.5]}
    also = {"training.rank": {"choices": [2, 8]}, "training.epochs": {"range": [1, 3]}, "training.dropout": dropout}
    config = study(also)
    assert values_of(config, "rank") == [2, 8], "the study's own, 4, is none of them"
    assert values_of(config, "epochs") == [1, 3]
    assert values_of(config, "dropout") == [0, 0.5]
    assert values_of(config, "batch_size") == [8]


def test_one_micro_batch_divides_every_batch() -> None:
    assert common_batch_size(study()) == 8
    assert common_batch_size(study({"training.batch_size": {"choices": [4, 12]}})) == 4
    assert common_batch_size(study({"training.batch_size": {"choices": [6, 8]}})) == 2


def test_the_dearest_settings() -> None:
    config = study()
    assert [one.training for one in dearest(config)] == [config.training]
    also = {
        "training.rank": {"choices": [2, 32, 8]},
        "training.layers": {"choices": [[0], None]},
        "training.target_modules": {"choices": ["all-linear", ["q_proj"]]},
        "training.learning_rate": {"log": [1e-4, 1e-2]},
    }
    found = [(one.training.rank, one.training.target_modules, one.training.layers) for one in dearest(study(also))]
    assert found == [(32, targets, layers) for targets in ("all-linear", ["q_proj"]) for layers in ([0], None)]
    assert {one.training.learning_rate for one in dearest(study(also))} == {config.training.learning_rate}
