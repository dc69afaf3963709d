"""Training settings that differ between trials: `search.also`.

A trial's settings overrule the study's `training` for all its samples, and only here is it said how. What must be
known before any trial (how much memory a worker needs, which micro-batch divides every batch) is known from the values
that the study file allows.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from duet_ray.config import StudyConfig, TrainingConfig
from duet_ray.errors import ConfigError, Problem
from duet_ray.records import Settings

SECTION = "training."


def training_of(config: StudyConfig, settings: Settings) -> TrainingConfig:
    """The training settings of a trial.

    Args:
        settings: of the trial; empty: the study's own.

    Raises:
        ConfigError: one of the values is none that the study file could hold.
    """
    if not settings:
        return config.training
    own = config.training.model_dump(mode="json")
    given = {path.removeprefix(SECTION): list(v) if isinstance(v, tuple) else v for path, v in settings}
    assert given.keys() <= own.keys(), "settings are checked when the study file is read"
    try:
        return TrainingConfig.model_validate({**own, **given})
    except ValidationError as error:
        problems = [Problem(path=SECTION + ".".join(map(str, e["loc"])), message=e["msg"]) for e in error.errors()]
        raise ConfigError(problems) from None


def values_of(config: StudyConfig, key: str) -> list[Any]:
    """The values that a key of `training` has in this study's trials; of a range, its ends."""
    also = config.search.also.get(SECTION + key)
    if also is None:
        return [getattr(config.training, key)]
    ends = also.choices or also.range or also.log or ()
    whole = TrainingConfig.model_fields[key].annotation is int
    return [int(value) if whole else value for value in ends]


def common_batch_size(config: StudyConfig) -> int:
    """The greatest number that divides every batch size of the study; of a range, its ends."""
    return math.gcd(config.training.batch_size, *values_of(config, "batch_size"))


_MORE_IS_DEARER = ("rank", "dropout", "batch_size", "epochs")
_EITHER_WAY = ("target_modules", "layers")


def dearest(config: StudyConfig) -> Iterator[StudyConfig]:
    """The study with such searched settings that no others need more memory or time: one of those yielded does."""
    most = {key: max(values_of(config, key)) for key in _MORE_IS_DEARER if SECTION + key in config.search.also}
    open_keys = [key for key in _EITHER_WAY if SECTION + key in config.search.also]
    for values in itertools.product(*(values_of(config, key) for key in open_keys)):
        changes = {**most, **dict(zip(open_keys, values, strict=True))}
        training = config.training.model_copy(update=changes) if changes else config.training
        yield config.model_copy(update={"training": training})
