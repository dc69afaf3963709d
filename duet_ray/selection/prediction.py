"""Scores for very large domains: some rows exactly, the others predicted from their embeddings (DUET, App. A.3).

A seeded subset of `selection.n_exact_rows` rows is scored by the method itself. A ridge regression on the embeddings
and the log length of these rows then predicts the scores of all others; exact rows keep their exact scores.

Influence scores have heavy tails, which least squares would follow. So what is fitted are normal scores (each score's
rank as a quantile of the normal distribution), and what is predicted is mapped back through the exact scores' own
quantiles. As a regression does, it shrinks: a predicted score lies nearer to the median than an exact one, by as
much as the embedding fails to tell, and never outside the exact ones' range.

Whether it can be trusted is measured: over five folds of the exact rows, each predicted from the other four, the mean
rank correlation of predicted and exact scores. Below `selection.min_rank_correlation` the domain is refused.

On influence scores of two real domains (SmolLM2-135M, its own hidden states, 320 of 400 rows exact) the correlation
with the other rows is 0.44 and 0.36; nearest neighbours reach 0.35 and 0.28, boosted trees 0.31 and 0.28, RBF kernels
what ridge does.

What it saves: with the base model's hidden states a row still costs a forward pass, about a third of a gradient
score. A small `selection.embedding_model` costs far less.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import norm, rankdata, spearmanr

from duet_ray.errors import SelectionError
from duet_ray.selection.base import Findings, RowWeights, SelectionContext, Selector
from duet_ray.selection.embeddings import embed
from duet_ray.selection.fitting import EXACT_ROWS, domain_seed, subset
from duet_ray.selection.weighting import all_equal

N_FOLDS = 5
PENALTIES = np.logspace(0, 6, 13)
"""Ridge penalties to choose among by leave-one-out error; features are standardised."""

_BLOCK_ROWS = 16384

Regression = Callable[[np.ndarray], np.ndarray]
"""`(n, d)` features → `(n,)` float64 scores."""


class Predicted:
    """Another method, asked for some of the rows only. Domains of at most `n_exact_rows` rows are its own matter."""

    def __init__(self, inner: Selector) -> None:
        self.inner = inner
        self.name = inner.name

    def prepare(self, domain: Any, context: SelectionContext, folder: Path) -> Findings:
        return self.inner.prepare(domain, context, folder)

    def measure(self, domain: Any, rows: np.ndarray, context: SelectionContext, folder: Path) -> np.ndarray:
        """Per row a record (`score`, NaN where it is to be predicted; `embedding`): a score keeps its 64 bits, and
        embeddings, the bulk, their 32."""
        exact = _exact_rows(domain, context)
        if len(exact) == len(domain.train):
            return self.inner.measure(domain, rows, context, folder)
        embeddings = embed(domain, rows, context)
        record = np.dtype([("score", np.float64), ("embedding", np.float32, embeddings.shape[1:])])
        measured = np.empty(len(rows), dtype=record)
        measured["embedding"] = embeddings
        measured["score"] = np.nan
        chosen = np.isin(rows, exact)
        if chosen.any():
            measured["score"][chosen] = self.inner.measure(domain, rows[chosen], context, folder)
        return measured

    def weigh(self, domain: Any, measured: np.ndarray, context: SelectionContext, folder: Path) -> RowWeights:
        exact = _exact_rows(domain, context)
        if len(exact) == len(domain.train):
            return self.inner.weigh(domain, measured, context, folder)
        scores = measured["score"][exact]
        if not np.isfinite(scores).all():
            self.inner.weigh(domain, scores, context, folder)  # raises: the method knows what to do about it
            raise SelectionError(f"some of the {len(exact)} exact scores are not finite")
        completed, notes, details = _complete(domain, measured, exact, context)
        weights = self.inner.weigh(domain, completed, context, folder)
        return replace(weights, notes=(*notes, *weights.notes), details={**details, **weights.details})


def _exact_rows(domain: Any, context: SelectionContext) -> np.ndarray:
    return subset(context, domain, context.settings.n_exact_rows, EXACT_ROWS)


def _complete(
    domain: Any, measured: np.ndarray, exact: np.ndarray, context: SelectionContext
) -> tuple[np.ndarray, tuple[str, ...], dict[str, float]]:
    """The scores of all rows, notes and details."""
    scores, lengths = measured["score"][exact], domain.train.n_tokens
    details = {"exact_rows": float(len(exact))}
    if all_equal(scores):
        completed = np.full(len(measured), scores[0])
        completed[exact] = scores
        note = f"all {len(exact)} rows that were scored exactly have one score: it is taken for the others' too"
        return completed, (note,), details
    features = _features(measured["embedding"][exact], lengths[exact])
    correlation = held_out_correlation(features, scores, domain_seed(context, domain, EXACT_ROWS))
    wanted = context.settings.min_rank_correlation
    if correlation < wanted:
        raise SelectionError(
            f"scores predicted from embeddings have a rank correlation of {correlation:.2f} with exact ones on rows "
            f"held out of {len(exact)}, and selection.min_rank_correlation is {wanted:g}; raise "
            "selection.n_exact_rows, set it to null to score all rows exactly, or set another "
            "selection.embedding_model"
        )
    predict = fit(features, scores)
    completed = np.empty(len(measured))
    for start in range(0, len(measured), _BLOCK_ROWS):
        block = slice(start, start + _BLOCK_ROWS)
        completed[block] = predict(_features(measured["embedding"][block], lengths[block]))
    completed[exact] = scores
    note = (
        f"{len(exact)} of {len(measured)} rows are scored exactly, the others by prediction "
        f"(rank correlation on held-out rows: {correlation:.2f})"
    )
    return completed, (note,), {**details, "rank_correlation": correlation}


def _features(embeddings: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    return np.column_stack([embeddings, np.log(np.maximum(lengths, 1))]).astype(np.float64)


def fit(features: np.ndarray, scores: np.ndarray) -> Regression:
    """A ridge regression of the scores' normal scores, mapped back to the scale of the scores."""
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    normal = norm.ppf((rankdata(scores) - 0.5) / len(scores))  # equal scores share the mean of their ranks
    model = make_pipeline(StandardScaler(), RidgeCV(alphas=PENALTIES)).fit(features, normal)
    levels, places = np.unique(normal, return_index=True)

    def predict(new: np.ndarray) -> np.ndarray:
        return np.interp(model.predict(new), levels, scores[places])

    return predict


def held_out_correlation(features: np.ndarray, scores: np.ndarray, seed: int) -> float:
    """The rank correlation of exact scores with those predicted from the other folds: the mean over the folds.

    Folds are compared one by one: predictions of different folds differ by their training rows' means as well, which
    says nothing of the rows.
    """
    folds = np.array_split(np.random.default_rng([seed, N_FOLDS]).permutation(len(scores)), N_FOLDS)
    found = []
    for fold in folds:
        others = np.setdiff1d(np.arange(len(scores)), fold)
        found.append(rank_correlation(fit(features[others], scores[others])(features[fold]), scores[fold]))
    return float(np.mean(found))


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's; 0 where one of the two is constant and ranks nothing."""
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return 0.0
    return float(spearmanr(first, second).statistic)
