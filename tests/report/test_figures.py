"""The figures: valid PNGs for every shape of study, and axes that do not mislead."""

import io

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from duet_ray.report import figures
from duet_ray.report.figures import draw_all
from duet_ray.report.palette import domain_look
from tests.report.summaries import gallery, scored, study, weights_of


@pytest.fixture
def axes_drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Collects the figures instead of only their bytes."""
    drawn: list[Figure] = []
    original = figures._picture

    def keep(figure: Figure, **rest: str) -> figures.Picture:
        drawn.append(figure)
        return original(figure, **rest)

    monkeypatch.setattr(figures, "_picture", keep)
    return drawn


@pytest.mark.parametrize("name", list(gallery()))
def test_every_figure_is_a_valid_png(name: str) -> None:
    for picture in draw_all(gallery()[name]):
        image = Image.open(io.BytesIO(picture.png))
        image.load()
        assert image.format == "PNG"
        assert image.width == figures.WIDTH * figures.DPI
        assert round(image.info["dpi"][0]) == 150
        assert np.asarray(image.convert("L")).std() > 5, "an empty picture"
        assert picture.alt
        assert picture.title


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("empty", []),
        ("base only", []),
        ("all failed", ["mixtures"]),
        ("one trial, k=1", ["best_so_far", "mixtures"]),
        ("unfinished", ["best_so_far", "mixtures", "samples"]),
        ("confirmed", ["best_so_far", "confirm", "mixtures", "samples"]),
        ("confirm failed", ["best_so_far", "confirm", "mixtures", "samples"]),
    ],
)
def test_only_figures_that_have_something_to_show(name: str, expected: list[str]) -> None:
    assert [p.name for p in draw_all(gallery()[name])] == expected


def test_the_same_study_gives_the_same_bytes() -> None:
    first, second = draw_all(gallery()["all failed"]), draw_all(gallery()["all failed"])
    assert [p.png for p in first] == [p.png for p in second]


def test_the_axis_says_which_direction_is_better(axes_drawn: list[Figure]) -> None:
    figures.best_so_far(gallery()["maximised"])
    figures.best_so_far(gallery()["confirmed"])
    assert "higher is better" in axes_drawn[0].axes[0].get_ylabel()
    assert "lower is better" in axes_drawn[1].axes[0].get_ylabel()


def test_an_outlier_goes_to_the_edge_and_is_counted(axes_drawn: list[Figure]) -> None:
    values = [[2.0 + 0.01 * i, 2.05] for i in range(12)]
    values[3][1] = 40.0
    figures.samples(study(values, base=None))
    figure = axes_drawn[0]
    assert figure.axes[0].get_ylim()[1] < 3
    assert "1 above the axis" in [t.get_text() for t in figure.legends[0].get_texts()]


def test_a_far_base_leaves_the_axis_but_not_the_legend(axes_drawn: list[Figure]) -> None:
    figures.best_so_far(study([[2.0 + 0.01 * i] for i in range(10)], base=9.0))
    figure = axes_drawn[0]
    assert figure.axes[0].get_ylim()[1] < 3
    assert any("untouched model (9.0000) ↑ above the axis" in t.get_text() for t in figure.legends[0].get_texts())


def test_the_best_so_far_line_is_the_running_best(axes_drawn: list[Figure]) -> None:
    figures.best_so_far(study([[2.5], [None], [2.7], [2.1]]))
    line = next(line for line in axes_drawn[0].axes[0].lines if line.get_drawstyle() == "steps-post")
    assert list(line.get_ydata()) == [2.5, 2.5, 2.5, 2.1]


def test_many_trials_are_columns_that_stand_where_bars_would(axes_drawn: list[Figure]) -> None:
    summary = study([[2.5], [None], [2.4]] * 80, n_domains=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "MOST_BARS", 240)
        figures.mixtures(summary)
    figures.mixtures(summary)
    bars, columns = (figure.axes[0] for figure in axes_drawn)
    assert len(columns.patches) == 2 * 3
    expected = {(round(b.get_x() + b.get_width() / 2), b.get_y(), b.get_height(), b.get_alpha()) for b in bars.patches}
    found = set()
    for shape in columns.patches:
        for corners in shape.get_path().to_polygons():
            (x0, y0), (x1, y1) = corners.min(axis=0), corners.max(axis=0)
            found.add((round((x0 + x1) / 2), y0, y1 - y0, shape.get_alpha()))
    key = [sorted((x, round(y, 9), round(h, 9), alpha) for x, y, h, alpha in some) for some in (expected, found)]
    assert key[0] == key[1]
    assert len(found) > 240


def test_stacked_bars_sum_to_one(axes_drawn: list[Figure]) -> None:
    figures.mixtures(study([[2.5], [2.4], [2.3]], n_domains=20))
    tops: dict[int, float] = {}
    for bar in axes_drawn[0].axes[0].patches:
        x = round(bar.get_x() + bar.get_width() / 2)
        tops[x] = max(tops.get(x, 0), bar.get_y() + bar.get_height())
    assert tops == {x: pytest.approx(1.0) for x in range(3)}


def test_samples_are_ordered_by_observation(axes_drawn: list[Figure]) -> None:
    figures.samples(study([[2.5, 2.6], [2.9, 2.4], [2.7, 2.8]]))
    labels = [t.get_text() for t in axes_drawn[0].axes[0].get_xticklabels()]
    assert labels == ["t0001", "t0000", "t0002"]


def test_a_winning_uniform_ratio_is_named_once(axes_drawn: list[Figure]) -> None:
    figures.confirmed(gallery()["uniform wins"])
    labels = [t.get_text() for t in axes_drawn[0].axes[0].get_yticklabels()]
    assert labels == ["untouched model", "uniform ratio (t0000), the best", "finalist t0002", "finalist t0001"]


def test_dollar_signs_do_not_become_formulas() -> None:
    summary = study([[2.5], [2.4]], names=["cost$a$", "b"])
    assert draw_all(summary)


def test_forty_domains_look_different() -> None:
    looks = [domain_look(i) for i in range(40)]
    assert len({(d.colour, d.hatch) for d in looks}) == 40
    assert len({(d.colour, d.glyph) for d in looks}) == 40
    assert len({d.css for d in looks}) == 40
    assert len({d.letter for d in looks}) == 40


def test_a_panel_for_every_domain_with_scores(axes_drawn: list[Figure]) -> None:
    summary = scored(study([[2.5]], names=["a$x$", "b", "c"]), weights_of([0, 1, 2, 3, 4, 5, 6, 7, 8]))
    assert figures.scores(summary) is not None
    panels = [axes for axes in axes_drawn[0].axes if axes.has_data()]
    assert [axes.get_title() for axes in panels] == [r"a\$x\$"]
    assert [bar.get_height() for bar in panels[0].patches] == [3, 3, 3]
    assert panels[0].get_xlim() == (0, 8)
    assert [t.get_text() for t in panels[0].texts] == ["", ""], "no row lies beyond"


def test_rows_beyond_a_panel_are_counted_on_it(axes_drawn: list[Figure]) -> None:
    figures.scores(scored(study([[2.5]]), weights_of([-1e9] * 4 + list(range(992)) + [1e9] * 4)))
    panel = axes_drawn[0].axes[0]
    assert panel.get_xlim() == pytest.approx((0, 991))
    assert [t.get_text() for t in panel.texts] == ["← 4", "4 →"]


@pytest.mark.parametrize("name", ["confirmed", "in order", "uniform rows"])
def test_no_panels_without_scores(name: str) -> None:
    assert figures.scores(gallery()[name]) is None
