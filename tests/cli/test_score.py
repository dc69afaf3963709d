"""`duet score` as its user meets it. Nothing is trained: the scores are given by hand and lie in the store already."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from duet_ray.cli import score
from duet_ray.cli.app import app
from duet_ray.config import StudyConfig, load_config
from duet_ray.execution.study_run import Paused
from duet_ray.preflight import preflight
from duet_ray.selection import save_weights
from duet_ray.selection.base import RowWeights
from duet_ray.selection.weighting import from_scores
from duet_ray.study import Study
from tests.toy_study import write_toy_study

NOTE = "conjugate gradients stopped at a residual of 0.5"


def scored_study(folder: Path, **changes: Any) -> tuple[Path, list[RowWeights]]:
    """The toy study with stored weights: row i of the first domain has the score i, the others have equal scores."""
    path = write_toy_study(folder, selection={"method": "influence", **changes})
    ready = preflight(load_config(path))
    made = []
    for index, (domain, key) in enumerate(zip(ready.domains, ready.weights_keys, strict=True)):
        scores = np.arange(len(domain.train)) * float(index == 0)
        weights = from_scores(scores, ready.config.selection, domain.name)
        if index == 0:
            weights = RowWeights(
                scores=weights.scores, probabilities=weights.probabilities, order=weights.order, notes=(NOTE,),
                details={"damping": 0.25, "prepare_seconds": 61.0, "measure_seconds": 2.0},
            )  # fmt: skip
        save_weights(ready.weights_folder, key, weights)
        made.append(weights)
    return path, made


def duet(*arguments: object) -> Any:
    return CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)


def test_stored_weights_are_shown_and_not_computed(tmp_path: Path) -> None:
    path, _ = scored_study(tmp_path)
    ended = duet("score", path)
    assert ended.exit_code == 0
    assert "already scored: nothing was computed" in ended.stderr
    apples, bricks = (next(line for line in ended.stdout.splitlines() if name in line) for name in ("apples", "bricks"))
    # Ranks 1 … 54 are worth (Σr)² / Σr² = 54 · 55 / 2 · 3 / 109 = 40.9 rows.
    assert apples.split()[:3] == ["apples", "54", "41"]
    assert apples.split()[3:6] == ["0", "26.5", "53"]
    assert apples.split()[-4:] == ["1", "min", "3", "s"]
    assert bricks.split() == ["bricks", "54", "54", "0", "0", "0", "–", "–"]
    assert f"apples: {NOTE}" in ended.stdout
    assert "bricks: all 54 scores are equal (0): uniform weights" in ended.stdout


def test_everything_is_in_the_json(tmp_path: Path) -> None:
    path, made = scored_study(tmp_path)
    ended = duet("score", path, "--json")
    data = json.loads(ended.stdout)
    assert data["method"] == "influence"
    apples = data["domains"][0]
    assert {name: apples[name] for name in ("domain", "computed", "n_rows", "lowest", "median", "highest")} == {
        "domain": "apples", "computed": False, "n_rows": 54, "lowest": 0.0, "median": 26.5, "highest": 53.0,
    }  # fmt: skip
    assert apples["effective_sample_size"] == made[0].effective_sample_size
    assert apples["details"] == {"damping": 0.25, "prepare_seconds": 61.0, "measure_seconds": 2.0}
    assert apples["seconds"] == 63.0
    assert sum(apples["histogram"]["counts"]) == 54
    assert [row["row"] for row in apples["best"]] == [*range(53, 43, -1)]
    assert [row["row"] for row in apples["worst"]] == [*range(10)]
    assert apples["best"][0]["prompt"].startswith("say ")
    assert apples["notes"] == [NOTE]


def test_a_study_keeps_what_its_report_shows(tmp_path: Path) -> None:
    path, _ = scored_study(tmp_path, method="top_n")
    duet("score", path)
    study = Study(load_config(path))
    scores = study.summary().domains[0].scores
    assert scores is not None
    # A mixture of 24 rows takes 24 of a domain at most, the highest scores first.
    assert [row["row"] for row in scores["best"]] == [*range(53, 43, -1)]
    assert [row["row"] for row in scores["worst"]] == [*range(30, 40)]
    html = study.write_report().read_text(encoding="utf-8")
    assert "The last 10 of the 24 that can be drawn" in html
    assert "apples.jsonl:" in html


def test_uniform_has_nothing_to_score(tmp_path: Path) -> None:
    ended = duet("score", write_toy_study(tmp_path))
    assert "selection.method is uniform: there is nothing to score" in ended.stderr
    apples = next(line for line in ended.stdout.splitlines() if "apples" in line)
    assert apples.split() == ["apples", "54", "54", "–", "–", "–", "–", "0", "s"]


def test_only_what_was_not_computed_is_named(tmp_path: Path) -> None:
    config: StudyConfig = load_config(write_toy_study(tmp_path, selection={"method": "influence"}))
    assert score.already(config, {"bricks"}) == "already scored, not computed again: apples, clouds"
    assert score.already(config, {"apples", "bricks", "clouds"}) is None


def test_a_pause_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pause(*_: object) -> None:
        raise Paused("study toy is paused")

    monkeypatch.setattr(Study, "score", pause)
    ended = duet("score", write_toy_study(tmp_path))
    assert ended.exit_code == 130
    assert "paused; the rows measured so far are kept" in ended.stderr


@pytest.mark.parametrize(("encoding", "bars", "none"), [("utf-8", " ▁▄█▂", "–"), ("ascii", " .=@:", "-")])
def test_a_table_in_both_kinds_of_terminal(
    monkeypatch: pytest.MonkeyPatch, encoding: str, bars: str, none: str
) -> None:
    shown = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(score, "out", Console(file=shown, force_terminal=True, width=80, color_system=None))
    row = {
        "n_rows": 12345, "effective_sample_size": 678.9, "lowest": -1.71e-8, "median": 2.2e-10, "highest": 5.4e-9,
        "histogram": {"counts": [0, 1, 4, 8, 2]}, "seconds": 63.2, "notes": ["[bold]a note[/]"],
    }  # fmt: skip
    nothing = dict.fromkeys(("lowest", "median", "highest", "histogram", "seconds"))
    score.show([{"domain": "apples", **row}, {"domain": "bricks", **row, **nothing, "notes": []}])
    shown.seek(0)
    lines = [line.rstrip() for line in shown.read().splitlines()]
    assert lines[1] == f"apples  12,345    679  -1.71e-08  2.2e-10  5.4e-09  {bars:<9}  1 min 3 s"
    assert lines[2].split() == ["bricks", "12,345", "679", *[none] * 5]
    assert lines[-1] == "apples: [bold]a note[/]"
