"""What a method made of a domain's rows, as plain data: the scores' spread, and the rows at both ends.

A number per row says little by itself; the ten best and the ten worst rows say at a glance what a method likes. All of
it is computed where weights and rows are at hand, and kept in the study's store, since a report reads nothing else.

Scores have heavy tails: over their whole range a histogram would be a single bar. It is therefore drawn over the
middle 99 %, and says how many rows lie beyond.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

import numpy as np

from duet_ray.config import SelectionConfig, StudyConfig
from duet_ray.report.wording import clipped
from duet_ray.selection.base import RowWeights
from duet_ray.selection.methods import method_of, n_drawn, settings_read
from duet_ray.selection.weighting import all_equal

MAX_BINS = 40
N_SHOWN = 10
"""Rows shown at either end."""
TAIL = 0.005
"""The share of rows at either end that the histogram may leave out."""
TEXT_CHARACTERS = 1000
"""Of a prompt or a completion; more of it is cut, for the store is no copy of the data."""
QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)

_BLOCKS = " ▁▂▃▄▅▆▇█"
_LETTERS = " .:-=+*#@"

Texts = Callable[[Sequence[int]], Sequence[Mapping[str, Any]]]
"""Row ids → rows as people read them, like `duet_ray.domains.RowSet.texts`."""


class Histogram(TypedDict):
    edges: list[float]
    """One more than there are counts."""
    counts: list[int]
    n_below: int
    """Rows below the first edge, and above the last."""
    n_above: int


class ShownRow(TypedDict):
    """One row, to be looked at."""

    row: int
    score: float | None
    times_uniform: float | None
    """Its probability × the number of rows: 1 is the uniform draw, 0 is never drawn; None where rows have an order."""
    place: int | None
    """Its place in an order, 1 for the first; None where rows have probabilities."""
    source: str
    line: int
    prompt: str
    completion: str


class ScoreSummary(TypedDict):
    """One domain's weights, as JSON has them: no NaN, no arrays."""

    method: str
    """In words: `influence (ekfac), softmax weighting at temperature 1`."""
    n_rows: int
    n_drawable: int
    """Rows with a probability above 0, or at the front of the order where a mixture may take them."""
    effective_sample_size: float
    has_order: bool
    quantiles: list[float] | None
    """Of the scores, at `QUANTILES`; None where the method has no scores."""
    histogram: Histogram | None
    """None where there are no scores, or all are equal."""
    best: list[ShownRow]
    """The best first; empty where no row is better than another."""
    worst: list[ShownRow]
    """The worst first; of an order, the last that can be drawn."""
    details: dict[str, float | None]
    """The method's own numbers; None for one that is not finite."""
    notes: list[str]


def domain_scores(config: StudyConfig, domain: Any, weights: RowWeights) -> ScoreSummary:
    """The summary of one domain of a study. `domain`: a `duet_ray.domains.Domain`."""
    return score_summary(
        weights,
        domain.train.texts,
        method=method_text(config.selection),
        n_drawn=n_drawn(config, domain.index, len(domain.train)),
    )


def score_summary(
    weights: RowWeights, texts: Texts, *, method: str, n_drawn: int | None = None, n_shown: int = N_SHOWN
) -> ScoreSummary:
    """What people want to know of a domain's weights.

    Args:
        weights: of all training rows.
        texts: called once, with the ids of the rows at both ends.
        method: the method in words.
        n_drawn: as `SelectionContext.n_drawn`: an order means nothing beyond. None: all rows.
        n_shown: rows at either end. Of fewer than twice as many, each row stands at one end only.
    """
    scores, probabilities = weights.scores, weights.probabilities
    ranked = _ranked(weights, n_drawn)
    n_best, n_worst = min(n_shown, -(-len(ranked) // 2)), min(n_shown, len(ranked) // 2)
    best, worst = ranked[:n_best], ranked[len(ranked) - n_worst :][::-1]
    places = dict(zip(ranked.tolist(), range(1, len(ranked) + 1), strict=True)) if weights.order is not None else {}
    shown = [
        ShownRow(
            row=row,
            score=None if scores is None else _finite(scores[row]),
            times_uniform=None if probabilities is None else _finite(probabilities[row] * weights.n_rows),
            place=places.get(row),
            source=visible(str(text["source"])),
            line=int(text["line"]),
            prompt=_cut(visible(text["prompt"])),
            completion=_cut(visible(text["completion"])),
        )
        for row, text in _with_texts([*best.tolist(), *worst.tolist()], texts)
    ]
    return ScoreSummary(
        method=method,
        n_rows=weights.n_rows,
        n_drawable=_n_drawable(weights, n_drawn),
        effective_sample_size=weights.effective_sample_size,
        has_order=weights.order is not None,
        quantiles=None if scores is None else np.quantile(scores, QUANTILES).tolist(),
        histogram=None if scores is None else histogram(scores),
        best=shown[:n_best],
        worst=shown[n_best:],
        details={name: _finite(value) for name, value in weights.details.items()},
        notes=list(weights.notes),
    )


def histogram(scores: np.ndarray) -> Histogram | None:
    """Counts over the middle 99 % of the scores in about √n bins of one width; None where all scores are equal.

    Where more than 99 % are equal, so that the middle has no width, the bins are over the whole range.

    Args:
        scores: `(n_rows,)`, finite.
    """
    if all_equal(scores):
        return None
    size = np.abs(scores).max()
    scaled = scores / size  # the smallest of scores, and the largest, make bins as any others do
    low, high = np.quantile(scaled, TAIL, method="lower"), np.quantile(scaled, 1 - TAIL, method="higher")
    if all_equal(np.array([low, high])):
        low, high = scaled.min(), scaled.max()
    n_bins = min(MAX_BINS, math.ceil(math.sqrt(len(scores))))
    counts, edges = np.histogram(scaled, bins=n_bins, range=(low, high))
    return Histogram(
        edges=(edges * size).tolist(),
        counts=counts.tolist(),
        n_below=int((scaled < low).sum()),
        n_above=int((scaled > high).sum()),
    )


def sparkline(counts: Sequence[int], *, width: int = 16, unicode: bool = True) -> str:
    """A histogram in one line of text: a space for nothing, the tallest letter for the fullest bin.

    `counts` of more bins than `width` are put together.
    """
    groups = np.array_split(np.asarray(counts), min(width, len(counts)))
    heights = np.array([group.mean() for group in groups])  # of bins: the groups differ in their number by one
    letters = _BLOCKS if unicode else _LETTERS
    steps = np.ceil(heights / heights.max() * (len(letters) - 1)).astype(int)
    return "".join(letters[step] for step in steps)


def method_text(settings: SelectionConfig) -> str:
    """The method with what decides its result, in words: `influence (ekfac), softmax weighting at temperature 1`."""
    method = method_of(settings)
    text = f"{settings.method} ({settings.solver})" if "solver" in settings_read(settings) else settings.method
    if method.needs_model and settings.surrogate is not None and "surrogate" in method.settings:
        text += f" by {settings.surrogate.path}"
    if settings.method == "remove_harmful":
        return f"{text}, the lowest {settings.harmful_fraction:.0%} never drawn"
    if settings.method == "top_n" or method.gives == "order":
        pool = f", drawn from the first {settings.pool:g} × quota" if settings.pool > 1 else ""
        return f"{text}, rows in order{pool}"
    if method.gives != "scores":
        return text
    weighting = settings.weighting
    at = f" at temperature {weighting.temperature:g}" if weighting.kind == "softmax" else ""
    return f"{text}, {weighting.kind} weighting{at}"


def shortened(prompt: str, completion: str, *, width: int = 160) -> str:
    """A row in one line: `What is …? → The answer`. A long prompt leaves the answer at least a third of the line."""
    prompt, completion = (" ".join(text.split()) for text in (prompt, completion))
    if not prompt:
        return clipped(completion, width)
    room = width - len(" → ")
    answer = clipped(completion, max(room - len(prompt), room // 3))
    return f"{clipped(prompt, room - len(answer))} → {answer}"


def seconds_spent(details: Mapping[str, float | None]) -> float | None:
    """What the domain's scores cost, over all workers; None where nothing was computed for them."""
    parts = [details.get(name) for name in ("prepare_seconds", "measure_seconds", "weigh_seconds")]
    known = [part for part in parts if part is not None]
    return sum(known) if known else None


def visible(text: str) -> str:
    """The text with its control characters shown instead of obeyed, those that turn the direction of writing too."""
    return text.replace("\r\n", "\n").translate(_CONTROLS)


_CONTROLS = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
_CONTROLS |= {0x7F: 0x2421} | dict.fromkeys(
    [*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD
)


def _ranked(weights: RowWeights, n_drawn: int | None) -> np.ndarray:
    """Row ids, the best first, as far as they can be told apart; none where all rows are alike."""
    if weights.order is not None:
        return weights.order[:n_drawn]
    values = weights.probabilities if weights.scores is None else weights.scores
    assert values is not None
    return np.zeros(0, np.int64) if all_equal(values) else np.argsort(-values, kind="stable")


def _n_drawable(weights: RowWeights, n_drawn: int | None) -> int:
    if weights.probabilities is not None:
        return int(np.count_nonzero(weights.probabilities))
    return weights.n_rows if n_drawn is None else min(n_drawn, weights.n_rows)


def _with_texts(rows: list[int], texts: Texts) -> list[tuple[int, Mapping[str, Any]]]:
    return list(zip(rows, texts(rows), strict=True)) if rows else []


def _cut(text: str) -> str:
    if len(text) <= TEXT_CHARACTERS:
        return text
    return f"{text[:TEXT_CHARACTERS]}… ({len(text) - TEXT_CHARACTERS:,} more characters)"


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
