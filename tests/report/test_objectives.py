"""Several metrics: fronts, requirements and weighted sums by hand."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from duet_ray.report.figures import front
from duet_ray.report.objectives import gives_up_least, judged, metric_values, on_front, parts
from duet_ray.report.page import render
from duet_ray.report.plain import to_json
from duet_ray.report.summary import base_metrics, chosen_trial, metrics_of, recommended_trial
from duet_ray.report.verdict import verdict
from tests.report.stored import Written
from tests.report.test_curse import words

LOSS = "heldout_loss_loss"
SAFETY = [{"kind": "function", "function": "score:safety", "direction": "maximize", "name": "safety"}]


def written(folder: Path, **objective: Any) -> Written:
    return Written(folder, also=SAFETY, search__objective=objective, search__acquisition="qlognei", sampling__k=1).base(
        3.0, {"safety": 0.8}
    )


def test_the_front_has_whoever_is_not_beaten_in_everything(tmp_path: Path) -> None:
    config = written(tmp_path, pareto=[LOSS, "safety"]).config
    values = [
        {LOSS: 2.0, "safety": 0.5},
        {LOSS: 2.5, "safety": 0.7},
        {LOSS: 2.5, "safety": 0.6},
        {LOSS: 2.2},
        {LOSS: 2.9, "safety": 0.9},
    ]
    assert on_front(config, values) == [True, True, False, False, True]
    # regrets from best to worst on the front: (0, 1), (5/9, 1/2), …, (1, 0)
    assert gives_up_least(config, values) == 1


def test_requirements_are_judged_by_the_untouched_model(tmp_path: Path) -> None:
    config = written(tmp_path, require=["safety >= base - 0.1", f"{LOSS} <= 2.4"]).config
    base = {"safety": 0.8, LOSS: 3.0}
    kept, broken = judged(config, {"safety": 0.75, LOSS: 2.5}, base)
    assert (kept.bound, kept.margin, kept.kept) == (pytest.approx(0.7), pytest.approx(0.05), True)
    assert (broken.bound, broken.margin, broken.kept) == (2.4, pytest.approx(-0.1), False)
    unknown, _ = judged(config, {"safety": 0.75}, {})
    assert (unknown.bound, unknown.kept) == (None, None)


def test_the_parts_of_a_sum_add_up(tmp_path: Path) -> None:
    config = Written(tmp_path, also=SAFETY, search__objective={"weights": {LOSS: 1.0, "safety": 2.0}}).config
    found = parts(config, {LOSS: 2.5, "safety": 0.75})
    assert [part.of_sum for part in found] == [2.5, -1.5]
    assert [part.value for part in found] == [2.5, 0.75]


def test_metrics_are_the_fresh_means_or_those_of_the_best_sample(tmp_path: Path) -> None:
    study = written(tmp_path, pareto=[LOSS, "safety"])
    study.trial(0, [2.5], metrics={"safety": 0.5}).confirm(0, [2.6, 2.8], {"safety": 0.4})
    summary = study.summary
    trial = next(t for t in summary.trials if t.number == 0)
    assert metrics_of(summary, trial, fresh=False) == {LOSS: 2.5, "safety": 0.5}
    assert metrics_of(summary, trial, fresh=True) == {LOSS: pytest.approx(2.7), "safety": pytest.approx(0.4)}
    assert base_metrics(summary) == {LOSS: 3.0, "safety": 0.8}
    assert metric_values(study.config, []) == {}


def test_a_ratio_that_breaks_a_requirement_is_not_taken_where_another_keeps_it(tmp_path: Path) -> None:
    study = written(tmp_path, require=["safety >= base - 0.1"])
    study.trial(0, [2.6], metrics={"safety": 0.8}).trial(1, [2.0], metrics={"safety": 0.5})
    study.trial(2, [2.4], metrics={"safety": 0.72})
    assert recommended_trial(study.summary).number == 2
    study.confirm(1, [2.1, 2.1], {"safety": 0.5}).confirm(2, [2.4, 2.5], {"safety": 0.71})
    study.confirm(0, [2.6, 2.7], {"safety": 0.8})
    summary = study.summary
    assert chosen_trial(summary).number == 2
    text = words(render(summary, []))
    assert "t0001 safety >= base - 0.1 0.5 0.7 −0.2 0.8 broken" in text
    assert "t0002 ★ safety >= base - 0.1 0.71 0.7 +0.01 0.8 kept" in text
    assert any("t0002 keeps the requirement" in s for s in verdict(summary).sentences)


def test_where_no_ratio_keeps_a_requirement_it_is_said(tmp_path: Path) -> None:
    study = written(tmp_path, require=["safety >= base"])
    study.trial(0, [2.6], metrics={"safety": 0.7}).trial(1, [2.0], metrics={"safety": 0.5})
    assert chosen_trial(study.summary).number == 1
    assert any("breaks the requirement" in s for s in verdict(study.summary).sentences)


def test_a_front_has_a_table_a_figure_and_a_compromise(tmp_path: Path) -> None:
    study = written(tmp_path, pareto=[LOSS, "safety"])
    assert front(study.summary) is None
    for number, (loss, safety) in enumerate([(2.6, 0.9), (2.0, 0.5), (2.1, 0.75), (2.7, 0.4)]):
        study.trial(number, [loss], metrics={"safety": safety})
    summary = study.summary
    assert recommended_trial(summary).number == 2
    text = words(render(summary, []))
    assert "3 of 4 trials are on the front" in text
    assert "no best ratio but a front" in text
    picture = front(summary)
    assert picture is not None
    assert "t0001, t0002" not in picture.alt.split("front are")[0]
    assert picture.alt.endswith("t0000, t0001 and t0002.")
    Image.open(io.BytesIO(picture.png)).load()
    told = to_json(summary)
    json.dumps(told, allow_nan=False)
    assert told["objective"]["front"] == ["t0000", "t0001", "t0002"]


def test_a_weighted_sum_shows_its_parts(tmp_path: Path) -> None:
    study = Written(tmp_path, also=SAFETY, search__objective={"weights": {LOSS: 1.0, "safety": 2.0}}, sampling__k=1)
    study.base(3.0 - 1.6, {LOSS: 3.0, "safety": 0.8})
    study.trial(0, [2.5 - 1.4], metrics={LOSS: 2.5, "safety": 0.7})
    text = words(render(study.summary, []))
    assert "1 × heldout_loss_loss (lower is better) 2 × safety (higher is better) sum (lower is better)" in text
    assert "t0000 2.5 0.7 1.1" in text
    assert "untouched model 3 0.8 1.4" in text
    assert study.summary.feedback_name == "weighted sum"
