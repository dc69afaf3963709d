"""The figures of what the search has learned: valid, described, and with axes that do not mislead."""

import io
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from duet_ray.records import Direction
from duet_ray.report import figures, insight_figures
from duet_ray.report.insight_figures import MOST_SLICES, draw_insight
from duet_ray.report.learned import Learned
from duet_ray.report.page import render
from duet_ray.search.insight import Calibration, Insight, Sensitivity, Slice, Ternary
from tests.report.summaries import study


def made(n: int, *, constant: bool = False, n_told: int = 8) -> Insight:
    """An insight of `n` domains, written down: domain i has the total effect 1 / (i + 2)."""
    names = tuple(f"domain-{i}" for i in range(n))
    shares = tuple(np.linspace(0, 1, 9).tolist())
    mean = tuple(2.0 if constant else 2 + s for s in shares)
    found = [
        Sensitivity(
            domain=name, shares=(0.0, 1.0), change=0.5 - i, change_interval=(0.25 - i, 0.75 - i),
            total=1 / (i + 2), total_interval=(0.5 / (i + 2), min(1.0, 1.5 / (i + 2))),
        )
        for i, name in enumerate(names)
    ]  # fmt: skip
    slices = [
        Slice(domain=n, shares=shares, mean=mean, low=tuple(m - 0.1 for m in mean), high=tuple(m + 0.1 for m in mean))
        for n in names
    ]
    grid = [(i / 8, j / 8, (8 - i - j) / 8) for i in range(9) for j in range(9 - i)]
    values = tuple(2.0 if constant else a for a, _, _ in grid)
    residuals = tuple(np.linspace(-2.5, 2.5, n_told).tolist())
    return Insight(
        n_told=n_told, domains=names, recommended=(1.0, *[0.0] * (n - 1)), kernel="se",
        length_scales=dict.fromkeys(names, 0.5), noise_sd=0.1,
        sensitivities=tuple(found) if n > 1 else (), slices=tuple(slices) if n > 1 else (),
        ternary=Ternary(shares=tuple(grid), mean=values, sd=values) if n == 3 else None,
        calibration=Calibration(
            observed=residuals, predicted=(0.0,) * n_told, sd=(1.0,) * n_told, residuals=residuals, inside_50=0.25,
            inside_95=0.75, rank_correlation=None, trust="none",
        ),
        notes=("a note on what there is not",),
    )  # fmt: skip


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    kept: list[Figure] = []
    original = figures._picture

    def keep(figure: Figure, **rest: str) -> figures.Picture:
        kept.append(figure)
        return original(figure, **rest)

    monkeypatch.setattr(insight_figures, "_picture", keep)
    return kept


@pytest.mark.parametrize(("n", "constant"), [(1, False), (2, False), (3, False), (3, True), (9, False), (40, False)])
def test_every_figure_is_a_valid_png_with_words(n: int, constant: bool) -> None:
    summary = study([[2.5], [2.4], [2.2]], n_domains=n)
    pictures = draw_insight(summary, made(n, constant=constant))
    names = [p.name for p in pictures]
    assert names == {
        1: ["calibration"],
        3: ["sensitivity", "slices", "ternary", "calibration"],
    }.get(n, ["sensitivity", "slices", "calibration"])
    for picture in pictures:
        image = Image.open(io.BytesIO(picture.png))
        image.load()
        assert image.width == figures.WIDTH * figures.DPI
        assert picture.alt
        assert picture.title


def test_the_most_sensitive_domain_stands_on_top_and_the_rest_is_named(drawn: list[Figure]) -> None:
    summary = study([[2.5], [2.4]], n_domains=14)
    insight = made(14)
    draw_insight(summary, insight)
    bars = drawn[0].axes[0]
    by_height = sorted(zip(bars.get_yticks(), bars.get_yticklabels(), strict=True), key=lambda pair: -pair[0])
    assert [label.get_text() for _, label in by_height] == [f"domain-{i}" for i in range(14)]
    assert bars.get_xlim() == (0.0, 1.0)
    titles = [axes.get_title() for axes in drawn[1].axes if axes.get_title()]
    assert titles == [f"domain-{i}" for i in range(MOST_SLICES)]
    html = render(summary, [{"title": "t", "alt": "a", "name": "slices", "source": "x"}], Learned(insight=insight))
    assert "not drawn: domain-12, domain-13." in html


def test_slices_share_one_scale_that_holds_all_bands(drawn: list[Figure]) -> None:
    draw_insight(study([[2.5]], n_domains=4), made(4))
    limits = {axes.get_ylim() for axes in drawn[1].axes if axes.get_title()}
    assert len(limits) == 1
    ((low, high),) = limits
    assert low < 1.9
    assert high > 3.1


def test_axes_say_which_side_is_better(drawn: list[Figure]) -> None:
    draw_insight(study([[2.5]], n_domains=3, direction=Direction.MAXIMIZE), made(3))
    assert "higher is better" in drawn[0].axes[1].get_xlabel()
    assert "higher is better" in drawn[1]._supylabel.get_text()


def test_light_is_the_better_side_in_either_direction(drawn: list[Figure]) -> None:
    for direction in Direction:
        draw_insight(study([[2.5]], n_domains=3, direction=direction), made(3))
    maps = [figure.axes[0].collections[0].get_cmap().name for figure in drawn if len(figure.axes) == 4]
    assert maps == ["cividis_r", "cividis"]


def test_the_same_insight_gives_the_same_bytes() -> None:
    summary = study([[2.5], [2.4]], n_domains=3)
    assert draw_insight(summary, made(3)) == draw_insight(summary, made(3))


def test_names_with_dollars_are_no_formulas() -> None:
    names = ("a$b$", "c", "d")
    summary = study([[2.5]], names=names)
    insight = made(3)
    renamed = replace(
        insight,
        domains=names,
        sensitivities=tuple(replace(s, domain=n) for s, n in zip(insight.sensitivities, names, strict=True)),
        slices=tuple(replace(s, domain=n) for s, n in zip(insight.slices, names, strict=True)),
    )
    assert len(draw_insight(summary, renamed)) == 4


def test_a_status_needs_neither_torch_nor_matplotlib() -> None:
    code = (
        "import sys\n"
        "import duet_ray.report.from_store, duet_ray.report.plain, duet_ray.report.status, duet_ray.report.page\n"
        "print(sorted({'torch', 'botorch', 'ax', 'matplotlib'} & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"
