"""The study file: a closed schema, read once, with every problem reported at once.

A typo in a YAML file costs a night of GPU time when it is silently ignored, so unknown keys are errors with a
suggestion, every message carries the YAML path and the line, and nothing starts before the whole file is sound.
Keys that are planned but not built yet are refused by name, never accepted and ignored (`study_file.py`).

`sections` says what a file may hold, `contradictions` what in it cannot stand together, `reading` reads it.

All relative paths in a study file are relative to the folder of that file, so that a study gives the same result
from whatever folder it is started.
"""

from duet_ray.config.contradictions import (
    SEARCHABLE,
)
from duet_ray.config.reading import (
    config_from,
    differences,
    fingerprint,
    load_config,
)
from duet_ray.config.sections import (
    INDICATORS,
    AlsoConfig,
    AnyFeedback,
    DataFormat,
    FidelityConfig,
    FunctionConfig,
    HeldoutLossConfig,
    Indicator,
    LmEvalConfig,
    ObjectiveConfig,
    RacingConfig,
    SearchConfig,
    SelectionConfig,
    StudyConfig,
    TrainingConfig,
    WeightingConfig,
    ZeroConfig,
    n_finishing,
    n_kept,
)

__all__ = [
    "INDICATORS",
    "SEARCHABLE",
    "AlsoConfig",
    "AnyFeedback",
    "DataFormat",
    "FidelityConfig",
    "FunctionConfig",
    "HeldoutLossConfig",
    "Indicator",
    "LmEvalConfig",
    "ObjectiveConfig",
    "RacingConfig",
    "SearchConfig",
    "SelectionConfig",
    "StudyConfig",
    "TrainingConfig",
    "WeightingConfig",
    "ZeroConfig",
    "config_from",
    "differences",
    "fingerprint",
    "load_config",
    "n_finishing",
    "n_kept",
]
