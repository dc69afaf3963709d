"""Which samples a trial asks for, in which bundles, and who goes on in a race; without Ray."""

import json
from pathlib import Path

import pytest

from duet_ray.config import RacingConfig, n_finishing
from duet_ray.execution.artifacts import Comparison, read_comparisons, sample_folder
from duet_ray.execution.broker import Outcome, Task
from duet_ray.execution.trial import (
    TrialPlan,
    _trial,
    as_config,
    going_on,
    judged,
    leave_failed_comparison,
    sample_tasks,
)
from duet_ray.records import Direction, Ratio, SampleResult, Trial

TRIAL = Trial(
    number=0,
    kind="start",
    ratio=Ratio(counts=(3, 1)),
    status="pending",
    method="random",
    settings=(("training.rank", 8), ("training.target_modules", ("q_proj",))),
    fidelity=0.5,
    k=4,
)


def plan(direction: Direction = Direction.MINIMIZE, keep: float = 0.5) -> TrialPlan:
    return TrialPlan(fuse=1, racing=RacingConfig(at=[0.25], keep=keep), direction=direction)


def compared(values: dict[int, float | None]) -> list[Outcome]:
    outcomes = []
    for task in sample_tasks(TRIAL, list(values), until=0.25):
        assert task.spec is not None
        value = values[task.spec.sample]
        result = {
            "share": 0.25,
            "value": value,
            "reason": "the loss is nan" if value is None else None,
            "train_seconds": 2.0,
            "feedback_seconds": 1.0,
        }
        outcomes.append(Outcome(task=task, status="done", result=result))
    return outcomes


def verdict(
    values: dict[int, float | None], earlier: Comparison | None = None
) -> tuple[dict[str, SampleResult], list[int]]:
    outcomes = compared(values)
    known = {
        o.task.spec.sample: [*([earlier] if earlier else []), Comparison(**o.result)] for o in outcomes if o.task.spec
    }
    ended, kept = judged(outcomes, known, plan())
    return {task.key: result for task, result in ended}, kept


def samples_of(task: Task) -> list[int]:
    return [spec.sample for spec in task.bundle]


def test_bundles_depend_on_all_samples_and_not_on_those_that_are_missing() -> None:
    tasks = sample_tasks(TRIAL, [1, 4], of=range(5), fuse=2)
    assert [(t.key, samples_of(t)) for t in tasks] == [("t0000-s1", [0, 1]), ("t0000-s4", [])]
    assert [samples_of(t) for t in sample_tasks(TRIAL, range(3), fuse=3)] == [[0, 1, 2]] * 3
    assert not sample_tasks(TRIAL, [], of=[], fuse=2)


def test_a_trial_passes_through_tune_as_plain_data() -> None:
    config = json.loads(json.dumps(as_config(TRIAL, 4)))
    assert (config["trial"], config["k"], config["missing"]) == (0, 4, [0, 1, 2, 3])
    assert sample_tasks(_trial(config), range(4), fuse=2) == sample_tasks(TRIAL, range(4), fuse=2)


def test_a_comparison_is_another_task_than_the_sample() -> None:
    [first] = sample_tasks(TRIAL, [2], until=0.25)
    [second] = sample_tasks(TRIAL, [2], until=0.5)
    [end] = sample_tasks(TRIAL, [2])
    assert [t.key for t in (first, second, end)] == ["t0000-s2@0.25", "t0000-s2@0.5", "t0000-s2"]
    assert [t.kind for t in (first, second, end)] == ["compare", "compare", "sample"]


@pytest.mark.parametrize(
    ("direction", "keep", "expected"),
    [
        (Direction.MINIMIZE, 0.5, [1, 3]),
        (Direction.MAXIMIZE, 0.5, [0, 2]),
        (Direction.MINIMIZE, 0.01, [1]),
        (Direction.MINIMIZE, 0.51, [0, 1, 3]),
    ],
)
def test_the_better_ones_go_on(direction: Direction, keep: float, expected: list[int]) -> None:
    assert going_on({0: 3.0, 1: 1.0, 2: 4.0, 3: 2.0}, keep, direction) == expected


def test_those_that_failed_have_no_part_in_the_share() -> None:
    assert going_on({0: None, 1: 1.0, 2: None, 3: 2.0}, 0.5, Direction.MINIMIZE) == [1]
    assert going_on({0: None, 1: None}, 0.5, Direction.MINIMIZE) == []
    assert going_on({0: 1.0, 1: 1.0}, 0.5, Direction.MINIMIZE) == [0], "the earlier of two equals"


def test_who_is_out_has_its_reason_and_is_no_failure() -> None:
    results, kept = verdict({0: 3.0, 1: 1.0, 2: None, 3: 2.0})
    assert kept == [1, 3]
    assert set(results) == {"t0000-s0", "t0000-s2"}
    stopped, failed = results["t0000-s0"], results["t0000-s2"]
    assert stopped.was_stopped
    assert not stopped.failed
    assert stopped.reason == "stopped after 25 % of its steps with 3; going on: 1, 2"
    assert stopped.train_seconds == 2.0
    assert failed.failed
    assert failed.reason == "the loss is nan"


def test_what_a_stopped_sample_cost_is_all_its_stages() -> None:
    earlier = Comparison(share=0.1, value=9.0, reason=None, train_seconds=40.0, feedback_seconds=30.0)
    results, _ = verdict({0: 3.0, 1: 1.0}, earlier)
    assert (results["t0000-s0"].train_seconds, results["t0000-s0"].feedback_seconds) == (42.0, 31.0)


def test_a_comparison_that_no_worker_survived_is_final(tmp_path: Path) -> None:
    """It stands on disk, so that a resume judges the race as it was judged."""
    [task] = sample_tasks(TRIAL, [1], until=0.25)
    assert task.spec is not None
    outcome = Outcome(task=task, status="failed", reason="its worker died after 3 retries")
    leave_failed_comparison(tmp_path, outcome)
    leave_failed_comparison(tmp_path, outcome)
    [found] = read_comparisons(sample_folder(tmp_path, task.spec))
    assert (found.share, found.value, found.reason) == (0.25, None, "its worker died after 3 retries")


@pytest.mark.parametrize(("k", "keep", "n"), [(8, 0.5, 2), (3, 0.5, 1), (2, 0.9, 2), (1, 0.5, 1), (10, 0.3, 1)])
def test_how_many_run_to_the_end(k: int, keep: float, n: int) -> None:
    assert n_finishing(k, RacingConfig(at=[0.25, 0.5], keep=keep)) == n
