"""From a store to what the report reads."""

from pathlib import Path
from typing import Any

import pytest

from duet_ray.config import config_from
from duet_ray.errors import StoreError
from duet_ray.report.from_store import read_summary
from duet_ray.store import Store
from tests.toy_study import toy_data

LM_EVAL = {"kind": "lm_eval", "tasks": {"piqa": 1.0}, "direction": "maximize"}


@pytest.mark.parametrize(
    ("feedback", "is_random"),
    [
        ({"kind": "heldout_loss", "file": "data/task.jsonl"}, False),
        (LM_EVAL, False),
        ({**LM_EVAL, "temperature": 0.0}, False),
        ({**LM_EVAL, "temperature": 0.75}, True),
        ({"kind": "function", "function": "score:model", "direction": "minimize"}, True),
    ],
)
def test_which_feedback_is_taken_for_random(tmp_path: Path, feedback: dict[str, Any], is_random: bool) -> None:
    config = config_from(toy_data(feedback=feedback), folder=tmp_path)
    with Store(tmp_path, create=True).writing() as store:
        store.create_study(name="toy", config=config.model_dump(mode="json"), versions={})
    assert read_summary(tmp_path).feedback_is_random is is_random


def test_a_study_that_has_not_started_is_said_so(tmp_path: Path) -> None:
    Store(tmp_path, create=True).close()
    with pytest.raises(StoreError, match="the study has not started yet"):
        read_summary(tmp_path)
