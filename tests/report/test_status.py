"""The terminal view: fits its width, names what happens, and lines for logs."""

import json

import pytest
from rich.console import Console

from duet_ray.records import Ratio
from duet_ray.report.plain import to_json
from duet_ray.report.status import cells, log_line, trial_table
from tests.report.summaries import gallery, study


def shown(summary, *, width: int = 80, colour: bool = False, **rest) -> str:
    system = "truecolor" if colour else None
    console = Console(width=width, force_terminal=colour, color_system=system)  # type: ignore[arg-type]
    with console.capture() as capture:
        console.print(trial_table(summary, **rest))
    return capture.get()


@pytest.mark.parametrize("name", list(gallery()))
@pytest.mark.parametrize("width", [60, 80, 120])
def test_every_shape_fits_its_width(name: str, width: int) -> None:
    text = shown(gallery()[name], width=width)
    assert all(len(line) <= width for line in text.splitlines())
    assert "None" not in text


def test_nothing_is_cut_at_80_columns() -> None:
    text = shown(gallery()["20 domains, 60 trials"])
    for word in ("best so far", "observed", "values (k = 4)", "t0005", "mean 2.04"):
        assert word in text
    for i in range(20):
        assert f"domain-{i}" in text
    bars = [line for line in text.splitlines() if line.startswith("t00")]
    assert len(bars) == 60


def test_stages_in_flight_are_beside_their_trial_and_others_below() -> None:
    text = shown(
        gallery()["unfinished"],
        width=120,
        in_flight={"t0003-s0": "training 40 %", "t0003-s1": "waiting for a worker", "base-s1": "measuring", "x": "y"},
        seconds_left=185.0,
    )
    lines = text.splitlines()
    assert any(line.startswith("t0003") and "s0 training 40 %, s1 waiting for a worker" in line for line in lines)
    assert any(line.startswith("base ") and "s1 measuring" in line for line in lines)
    assert any(line.startswith("t0004") and "waiting" in line for line in lines)
    assert "now: x y" in text
    assert "3 of 9 trials · untouched model 3.000 · uniform ratio 2.500 · about 3 min 5 s left" in text


def test_t0001_is_not_taken_for_t00010() -> None:
    summary = study([[2.5]] * 9, n_pending=3)
    text = shown(summary, width=120, in_flight={"t0010-s0": "training"})
    assert [line.split()[0] for line in text.splitlines() if "training" in line] == ["t0010"]


def test_the_newest_trials_and_the_best_survive_a_row_limit() -> None:
    values = [[2.5 + 0.01 * i] for i in range(20)]
    values[3] = [2.0]
    text = shown(study(values), max_rows=6)
    rows = [line.split()[0] for line in text.splitlines() if line.startswith("t0")]
    assert rows == ["t0003", "t0016", "t0017", "t0018", "t0019"]
    assert "16 more trials" in text


def test_markup_in_names_is_text() -> None:
    text = shown(study([[2.5], [2.4]], name="[bold]x[/bold]", names=["[red]a", "b"]))
    assert "[bold]x[/bold]" in text
    assert "[red]a" in text


def test_bar_cells_by_largest_remainder() -> None:
    # 10 cells of 1/3, 1/3, 1/3: 3.33 each, the first gets the one left over
    assert cells(Ratio(counts=(4, 4, 4)), 10) == (4, 3, 3)
    assert cells(Ratio(counts=(0, 7, 0)), 5) == (0, 5, 0)
    assert sum(cells(Ratio(counts=tuple(range(1, 21))), 12)) == 12


def test_a_bar_has_letters_without_colours_and_blocks_with() -> None:
    summary = study([[2.5]], names=["a", "b"])
    assert "AAAAAA" in shown(summary)
    assert "██" in shown(summary, colour=True)


def test_what_is_marked_and_named_at_the_end_is_what_is_handed_over() -> None:
    text = shown(gallery()["uniform wins"])
    assert "to take: t0000, mean 2.510 with fresh seeds, domain-0 33 %" in text
    assert [line.split()[0] for line in text.splitlines() if "★" in line] == ["t0000"]
    assert to_json(gallery()["uniform wins"])["best"]["name"] == "t0000"
    assert "best so far: t0001 2.400" in shown(gallery()["confirm failed"])


def test_json_of_a_comparison_without_an_interval() -> None:
    data = to_json(gallery()["random feedback"])
    assert data["feedback_is_random"] is True
    assert data["base"]["standard_error"] is None
    assert data["verdict"]["versus_base"]["outcome"] == "ahead"
    assert data["verdict"]["versus_base"]["interval"] is None
    assert to_json(gallery()["uniform wins"])["verdict"]["versus_finalist"]["outcome"] == "beats"


def test_log_lines() -> None:
    summary = gallery()["confirmed"]
    base, first, _, best, again, uniform = summary.trials
    assert log_line(summary, base) == "base untouched model | heldout_loss 3.000"
    assert log_line(summary, first) == (
        "t0000 start uniform | domain-0 33 %, domain-1 33 %, domain-2 33 % | heldout_loss 2.500 (best of 2: 2.500 "
        "2.600) | best so far t0000 2.500 | 1/3"
    )
    assert log_line(summary, best).endswith("(best of 2: 2.200 2.300) | best so far t0002 2.200 | 3/3")
    assert log_line(summary, again).endswith("t0002 again: heldout_loss mean 2.260 ± 0.010 (of 2: 2.250 2.270)")
    assert "t0000 again: heldout_loss mean 2.520 ± 0.020" in log_line(summary, uniform)


def test_log_lines_of_failures_stay_one_line() -> None:
    summary = study([[None, None], [2.4, None]], reason="CUDA out of memory\nTraceback")
    lost, half = summary.trials[1:3]
    assert "FAILED: 2 samples failed: CUDA out of memory | 1/2" in log_line(summary, lost)
    assert "(best of 1: 2.400); 1 sample failed: CUDA out of memory | best so far t0001" in log_line(summary, half)
    for trial in summary.trials:
        assert "\n" not in log_line(summary, trial)


@pytest.mark.parametrize("name", list(gallery()))
def test_json_is_plain_data(name: str) -> None:
    summary = gallery()[name]
    data = json.loads(json.dumps(to_json(summary), allow_nan=False))
    assert data["study"] == "toy"
    assert len(data["trials"]) == len(summary.trials)
    assert data["verdict"]["headline"]


def test_json_has_the_numbers() -> None:
    data = to_json(gallery()["confirmed"])
    assert data["best"]["name"] == "t0002"
    assert data["best"]["observation"] == 2.2
    assert data["best"]["adapter"] == "artifacts/t0002/0/adapter"
    assert sum(data["best"]["ratio"].values()) == pytest.approx(1)
    assert data["confirmed"]["t0002"]["mean"] == pytest.approx(2.26)
    assert data["verdict"]["versus_uniform"]["outcome"] == "beats"
    assert data["verdict"]["versus_uniform"]["difference"] == pytest.approx(-0.26)
    low, high = data["verdict"]["versus_base"]["interval"]
    assert (low, high) == pytest.approx((-0.86706, -0.61294), abs=1e-5)
    assert data["verdict"]["versus_base"]["degrees_of_freedom"] == 1
    assert data["verdict"]["versus_base"]["confidence"] == 0.95
    assert data["verdict"]["versus_finalist"] is None
    assert data["feedback_is_random"] is False
    assert data["base"]["mean"] == 3.0
