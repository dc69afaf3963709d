"""The insight of a stored study: made once, kept, and made again when it no longer fits."""

import json
from pathlib import Path

import pytest

from duet_ray.records import Direction, PastRun
from duet_ray.report import learned as module
from duet_ray.report.learned import FILE, insight_of, learned, told_from
from duet_ray.report.page import render, write_report
from duet_ray.search.insight import Insight
from tests.report.stored import Written, plain_study, ratio_at
from tests.report.summaries import gallery
from tests.report.test_page import read


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often an insight was made."""
    made: list[int] = []
    monkeypatch.setattr(module, "insight_of", lambda summary: (made.append(1), insight_of(summary))[1])
    return made


def test_what_is_told_is_every_observation_and_every_past_run(tmp_path: Path) -> None:
    written = plain_study(tmp_path, n=3).past(PastRun(counts=(24, 0, 0), value=1.5, sem=0.1, source="runs.csv:2"))
    written.confirm(1, [2.0, 2.1])
    told = told_from(written.summary)
    assert [one.ratio for one in told[:3]] == [ratio_at(i) for i in range(3)]
    assert (told[3].loss, told[3].sem, told[3].ratio.counts) == (1.5, 0.1, (24, 0, 0))
    assert len(told) == 4


def test_an_insight_is_kept_until_something_new_is_told(tmp_path: Path, counted: list[int]) -> None:
    written = plain_study(tmp_path)
    first = learned(written.summary, tmp_path)
    assert first is not None
    assert first.insight is not None
    assert learned(written.summary, tmp_path) == first
    assert len(counted) == 1
    written.trial(8, [1.9, 2.0])
    again = learned(written.summary, tmp_path)
    assert again is not None
    assert again.insight is not None
    assert again.insight.n_told == 9
    assert len(counted) == 2


@pytest.mark.parametrize("damage", [b"", b"{}", b"[]", b"\xff\xfe", b'{"digest": 1, "insight": {}}'])
def test_a_damaged_file_is_made_again(tmp_path: Path, counted: list[int], damage: bytes) -> None:
    written = plain_study(tmp_path, n=4)
    (tmp_path / FILE).write_bytes(damage)
    found = learned(written.summary, tmp_path)
    assert found is not None
    assert found.insight is not None
    assert len(counted) == 1
    assert Insight.from_json(json.loads((tmp_path / FILE).read_bytes())["insight"]) == found.insight


@pytest.mark.parametrize("n", [0, 1, 2])
def test_too_few_observations_are_said_so(tmp_path: Path, n: int) -> None:
    summary = plain_study(tmp_path, n=n).summary
    found = learned(summary, tmp_path)
    assert found is not None
    assert found.insight is None
    assert f"{n} observation" in found.why_not
    assert not (tmp_path / FILE).exists()
    html = render(summary, [], found)
    assert "<h2>What the search learned</h2>" in html
    assert "at least 3 observations" in " ".join(read(html).text)


def test_without_a_store_there_is_no_section(tmp_path: Path) -> None:
    summary = gallery()["confirmed"]
    assert learned(summary, tmp_path) is None
    assert "What the search learned" not in render(summary, [])


def test_the_page_shows_what_was_learned(tmp_path: Path) -> None:
    written = plain_study(tmp_path)
    html = write_report(written.summary, tmp_path).read_text(encoding="utf-8")
    text = " ".join(" ".join(read(html).text).split())
    section = text.split("What the search learned")[1].split("All trials")[0]
    assert "8 observations" in section
    assert html.split("<h2>What the search learned</h2>")[1].split("<h2>All trials</h2>")[0].count("<img") == 4
    for name in ("sensitivity", "slices", "ternary", "calibration"):
        assert (tmp_path / "figures" / f"{name}.png").is_file()


def test_a_maximised_study_is_told_losses_and_read_in_its_own_units(tmp_path: Path) -> None:
    low = plain_study(tmp_path / "low", n=7)
    function = {"kind": "function", "function": "score:model", "direction": "maximize"}
    high = plain_study(tmp_path / "high", n=7, feedback=function)
    assert high.summary.direction is Direction.MAXIMIZE
    assert [t.loss for t in told_from(high.summary)] == pytest.approx([t.loss for t in told_from(low.summary)])
    a, b = insight_of(low.summary), insight_of(high.summary)
    for x, y in zip(a.slices, b.slices, strict=True):
        assert y.mean == pytest.approx([-v for v in x.mean])


def test_fidelities_settings_and_adaptive_k_are_shown(tmp_path: Path) -> None:
    also = {"training.rank": {"choices": [4, 8]}, "training.learning_rate": {"log": [1e-5, 3e-4]}}
    written = Written(
        tmp_path, search__fidelity={"rows": [0.25]}, search__also=also, search__optimize="both", sampling__k="auto"
    )
    settings = (("training.rank", 8), ("training.learning_rate", 2e-4))
    written.base(3.0).trial(0, [2.5], settings=settings, k=1)
    for number in range(1, 5):
        written.trial(number, [2.0 + number / 10] * 2, settings=settings, fidelity=0.25, k=2)
    summary = written.summary
    text = " ".join(" ".join(read(render(summary, [], None)).text).split())
    assert "rank 8, lr 2e-4" in text
    assert "rank 8, lr 2e-4, on 25 % of the rows" in text
    assert "Trials 2 of 5 whole trials (5 trials)" in text
    assert "Samples per trial (k) 1 to 4" in text
    found = learned(summary, tmp_path)
    assert found is not None
    assert found.insight is not None
    assert found.insight.n_told == 5
