"""The page: self-contained, escaped, well-formed, and with the numbers in it."""

import base64
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from duet_ray import files
from duet_ray.report import figures
from duet_ray.report.figures import Picture
from duet_ray.report.page import render, write_report
from duet_ray.report.verdict import verdict
from duet_ray.selection.base import RowWeights
from tests.report.summaries import gallery, scored, study, weights_of

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Reader(HTMLParser):
    """Checks that every tag is closed in order, and collects attributes and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text.append(data)


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    return reader


@pytest.mark.parametrize("name", list(gallery()))
def test_every_shape_gives_a_well_formed_page(name: str) -> None:
    summary = gallery()[name]
    reader = read(render(summary, []))
    text = " ".join(" ".join(reader.text).split())
    assert " ".join(verdict(summary).headline.split()) in text
    assert "Undefined" not in text
    assert "None" not in text


def test_the_page_asks_for_nothing_from_outside(tmp_path: Path) -> None:
    html = write_report(gallery()["confirmed"], tmp_path).read_text(encoding="utf-8")
    reader = read(html)
    assert not {"script", "link", "iframe", "object", "embed"} & set(reader.tags)
    sources = [value for _, name, value in reader.attributes if name in ("src", "href", "srcset", "action")]
    assert len(sources) == 4
    assert all(value.startswith("data:image/png;base64,") for value in sources)
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)
    assert style
    assert "@import" not in style[1]
    assert "url(" not in html
    assert not re.search(r"https?://", html)
    assert ("meta", "content", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in reader.attributes


def test_the_embedded_figures_are_the_files_beside_the_page(tmp_path: Path) -> None:
    html = write_report(gallery()["confirmed"], tmp_path).read_text(encoding="utf-8")
    embedded = {base64.b64decode(d) for d in re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", html)}
    files = {p.name: p.read_bytes() for p in (tmp_path / "figures").iterdir()}
    assert sorted(files) == ["best_so_far.png", "confirm.png", "mixtures.png", "samples.png"]
    assert embedded == set(files.values())


def test_names_and_reasons_are_escaped() -> None:
    evil = '<script>alert("x")</script>'
    summary = study([[2.5, None], [2.4, 2.3]], name=evil, names=[evil, "b&c"], reason=f"{evil}\nmore {evil}")
    html = render(summary, [])
    assert "<script" not in html
    reader = read(html)
    assert "script" not in reader.tags
    assert any(evil in piece for piece in reader.text)


def test_a_quote_in_a_name_does_not_leave_its_attribute() -> None:
    reader = read(render(study([[2.5], [2.4]], names=['a" onload="x', "b"]), []))
    assert not [name for _, name, _ in reader.attributes if name.startswith("on")]


def test_best_ratio_table_by_hand() -> None:
    # trial 2 of three domains: weights 1/3, 1/3, 2 + 1/3 of 3 -> 13, 13 and the rest of 120 rows, 94
    reader = read(render(gallery()["confirmed"], []))
    text = " ".join(" ".join(reader.text).split())
    assert "domain-2 78 %, domain-0 11 %, domain-1 11 %" in text
    assert "domain-2 78 % 94 40 900" in text
    assert "artifacts/t0002/0/adapter" in text
    widths = [
        v for _, name, v in reader.attributes if name == "style" and v == "width:78.333%;background-color:#009E73"
    ]
    assert len(widths) == 3  # the table of shares, the trial and its confirmation


def test_failures_show_their_reason_once_and_the_rest_on_demand() -> None:
    html = render(study([[None, None], [2.4, 2.3]], reason="out of memory\n  batch of 8 x 512 tokens"), [])
    reader = read(html)
    assert html.count("2 samples failed: out of memory") == 1
    assert "details" in reader.tags
    assert "batch of 8 x 512 tokens" in html


def test_a_winning_uniform_ratio_is_the_best_ratio_of_the_page() -> None:
    reader = read(render(gallery()["uniform wins"], []))
    text = " ".join(" ".join(reader.text).split())
    assert "The best ratio: t0000, the uniform one" in text
    assert "t0000 ★" in text
    assert "artifacts/t0000/0/adapter" in text
    assert "metric untouched model uniform ratio accuracy 0.25 0.25" in text
    assert "95 % interval 0.039 to 0.161" in text


def test_an_adapter_that_is_gone_is_said_so() -> None:
    summary = study([[2.5]])
    sample = replace(summary.trials[1].samples[0], adapter=None)
    trial = replace(summary.trials[1], samples=(sample,))
    html = render(replace(summary, trials=(summary.trials[0], trial)), [])
    assert "is not on disk" in html


@pytest.fixture
def one_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares the drawing where the test is about the writing."""
    monkeypatch.setattr(figures, "draw_all", lambda _: (Picture(name="samples", title="t", alt="a", png=b"png"),))


@pytest.mark.usefixtures("one_picture")
def test_a_report_is_replaced_whole_and_leaves_no_temporary_files(tmp_path: Path) -> None:
    first = write_report(gallery()["unfinished"], tmp_path).read_bytes()
    second = write_report(gallery()["confirmed"], tmp_path).read_bytes()
    assert first != second
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.usefixtures("one_picture")
def test_a_failed_write_keeps_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = write_report(gallery()["unfinished"], tmp_path).read_bytes()

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_report(gallery()["confirmed"], tmp_path)
    assert (tmp_path / "report.html").read_bytes() == old
    assert not list(tmp_path.rglob(".*"))


# Selection ----------------------------------------------------------------------------------------------------------


def selection_of(html: str) -> str:
    """The words of the section, in one line."""
    words = " ".join(" ".join(read(html).text).split())
    assert "How rows were chosen inside a domain" in words
    return words[words.index("How rows were chosen inside a domain") :].split(" Notes ")[0]


def test_the_best_and_worst_rows_by_hand() -> None:
    # Ranks 2, 1, 4, 3 of 10: probabilities 0.2, 0.1, 0.4, 0.3, that is 0.8, 0.4, 1.6 and 1.2 × uniform.
    said = selection_of(render(scored(study([[2.5]]), weights_of([2.0, -1.0, 40.0, 3.0])), []))
    assert "inside a domain: influence (ekfac), rank weighting." in said
    assert "domain-0 3 (75 %) -1 2.5 40 2 min 5 s cg residual 0.00125" in said
    assert "The 2 best 2 40 1.6 rows.jsonl:3 question 2 → answer 2 3 3 1.2 rows.jsonl:4 question 3" in said
    assert "The 2 worst, the lowest first 1 -1 0.4 rows.jsonl:2 question 1 → answer 1 0 2 0.8 rows.jsonl:1" in said


def test_ten_rows_at_either_end() -> None:
    html = render(gallery()["scored"], [])
    assert "The 10 best" in html
    assert "The 10 worst" in html
    assert html.count("rows.jsonl:") == 20
    assert "domain-1: no row is better than another" in " ".join(" ".join(read(html).text).split())


def test_an_order_shows_places_and_what_can_be_drawn() -> None:
    said = selection_of(render(gallery()["in order"], []))
    assert "domain-0 30 of 60 – – – –" in said
    assert "The first 10 of the order 59 – 1 rows.jsonl:60" in said
    assert "The last 10 of the 30 that can be drawn 30 – 30 rows.jsonl:31" in said
    assert "× uniform" not in said
    assert "effective sample size" not in said


def test_rows_that_are_never_drawn_say_so() -> None:
    weights = RowWeights(scores=np.array([1.0, 2.0]), probabilities=np.array([0.0, 1.0]))
    assert "0 1 never rows.jsonl:1" in selection_of(render(scored(study([[2.5]]), weights), []))


def test_uniform_selection_is_one_sentence() -> None:
    said = selection_of(render(gallery()["uniform rows"], []))
    assert said.endswith("No row was preferred to another.")


def test_without_scores_there_is_no_section() -> None:
    html = render(gallery()["confirmed"], [])
    assert "<h2>Selection</h2>" not in html


def test_the_texts_of_rows_are_escaped_and_shown_whole_on_demand() -> None:
    evil = '</bdi></td><script>alert("x")</script>\x1b[2J\u202e <img src=x onerror=y> {{ 7 * 7 }} ' + "long " * 60
    html = render(scored(study([[2.5]]), weights_of([1.0, 2.0]), text=evil.replace("{", "{{").replace("}", "}}")), [])
    reader = read(html)
    assert {"script", "img"}.isdisjoint(reader.tags)
    assert not [name for _, name, _ in reader.attributes if name.startswith("on")]
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202a-\u202e]", html)
    full = next(piece for piece in reader.text if piece.count("long") == 60)
    assert full.startswith('</bdi></td><script>alert("x")</script>␛[2J')
    assert "{{ 7 * 7 }}" in full
    assert full.endswith("→ answer 1")
    short = next(piece for piece in reader.text if "…" in piece and piece.startswith("</bdi>"))
    assert 155 < len(short) <= 160


def test_the_histograms_stand_in_their_section(tmp_path: Path) -> None:
    html = write_report(gallery()["scored"], tmp_path).read_text(encoding="utf-8")
    before, section = html.split("<h2>Selection</h2>")
    assert before.count("<img") == 3
    assert section.count("<img") == 1
    assert (tmp_path / "figures" / "scores.png").is_file()
