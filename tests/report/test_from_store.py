"""From a store to what the report reads."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from duet_ray.config import config_from
from duet_ray.errors import StoreError
from duet_ray.report.from_store import read_summary
from duet_ray.report.page import render
from duet_ray.report.plain import to_json
from duet_ray.report.summary import DomainSummary
from duet_ray.store import Store
from tests.report.summaries import gallery, study
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


@pytest.mark.parametrize(
    ("feedback", "shown", "key"),
    [
        ({"kind": "heldout_loss", "file": "data/task.jsonl"}, "heldout_loss loss", "heldout_loss_loss"),
        (LM_EVAL, "lm_eval acc,none", "lm_eval_acc,none"),
        ({"kind": "function", "function": "score:model", "direction": "minimize"}, "function", "function"),
        ({**LM_EVAL, "name": "exam"}, "exam", "exam"),
    ],
)
def test_what_the_feedback_is_called(tmp_path: Path, feedback: dict[str, Any], shown: str, key: str) -> None:
    config = config_from(toy_data(feedback=feedback), folder=tmp_path)
    with Store(tmp_path, create=True).writing() as store:
        store.create_study(name="toy", config=config.model_dump(mode="json"), versions={})
    assert read_summary(tmp_path).feedback_name == shown
    assert config.feedback.metric_key == key, "stored with every sample: it must not change"


RECORD = {
    "name": "apples", "source": "data/apples.jsonl", "n_train": 54, "n_validation": 6, "n_bad": 0, "n_duplicates": 1,
    "n_overlap": None, "effective_sample_size": None, "notes": ["a note"],
}  # fmt: skip


def stored(folder: Path, record: dict[str, Any]) -> DomainSummary:
    """A domain's record on its way through a store."""
    config = config_from(toy_data(), folder=folder)
    with Store(folder, create=True).writing() as store:
        store.create_study(name="toy", config=config.model_dump(mode="json"), versions={})
        store.update_study(domains=[record])
    return read_summary(folder).domains[0]


def test_a_store_of_an_older_or_a_newer_version_opens(tmp_path: Path) -> None:
    domain = stored(tmp_path, {**RECORD, "of_the_future": 1})
    assert (domain.n_train, domain.notes, domain.scores) == (54, ("a note",), None)
    summary = replace(study([[2.5]]), domains=(domain,))
    assert "<h2>Selection</h2>" not in render(summary, [])
    assert to_json(summary)["domains"] == [{**RECORD, "scores": None}]


def test_scores_come_back_from_the_store_as_they_were(tmp_path: Path) -> None:
    scores = gallery()["scored"].domains[0].scores
    domain = stored(tmp_path, {**RECORD, "scores": scores})
    assert domain.scores == scores
    told = to_json(replace(study([[2.5]]), domains=(domain,)))["domains"][0]["scores"]
    assert scores is not None
    assert told["histogram"] == scores["histogram"]
    assert "best" not in told, "a status holds no texts of rows"
