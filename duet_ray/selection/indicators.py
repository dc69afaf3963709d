"""Multi-indicator weights: which kind of row helps this model on this task, learned from in-context learning.

After "Learning Multi-Indicator Weights for Data Selection" (2026), which combines quality indicators with
weights that are learned per task and model, and takes in-context learning on a tiny validation set for a proxy of
fine-tuning. The score of a row is

    score = w · z(row),

z its indicators (`row_indicators`), winsorised and standardised over the domain. For w, some sets of training rows are
put into the prompt as demonstrations, the change of loss on a few examples is the reward (`demonstrations`), and
rewards are regressed on the indicators (`indicator_weights`). The examples are `selection.examples` where the user has
some of the task, else validation rows of the domain itself.

What to expect: the regression is linear and sees `n_prompts` noisy rewards, so it finds broad tendencies ("easy rows
help, long ones do not"), no single bad row; a weight means little on its own where indicators go together. Where
rewards are predicted no better than shuffled ones would be, that is said, and all rows count alike: a weighting would
blow up even the smallest weights to full size.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from duet_ray.config import Indicator
from duet_ray.errors import SelectionError
from duet_ray.selection.base import Findings, RowWeights, SelectionContext
from duet_ray.selection.demonstrations import draw_sets, measure_rewards, row_allowance, tiny_set
from duet_ray.selection.embeddings import centred, embed
from duet_ray.selection.fitting import PROMPTS, domain_seed, rows_of
from duet_ray.selection.gradients import RowList, RowView
from duet_ray.selection.indicator_weights import LearnedWeights, learn_weights
from duet_ray.selection.row_indicators import measure_indicators, nearest_distance, reading, used
from duet_ray.selection.weighting import from_scores

TAIL = 0.01
"""Share of rows at either end whose indicator is drawn in to the quantile, so that one odd row is not the scale."""

_EQUAL = 1e-5
"""An indicator whose range is below this share of its size differs by rounding only."""

SIGNIFICANT = 0.05
"""Weights are used where rewards without any effect of the indicators would look as good less often than this."""

_EXAMPLES, _SETS, _SHUFFLES, _NEIGHBOURS = range(4)
"""Streams of the seed for prompts."""


class Indicators:
    """Quality indicators with weights learned from in-context rewards."""

    name = "indicators"

    def prepare(self, domain: Any, context: SelectionContext, folder: Path) -> Findings:
        return Findings()

    def measure(self, domain: Any, rows: np.ndarray, context: SelectionContext, folder: Path) -> np.ndarray:
        """`(n_rows, n)` float32: the indicators but for `diversity`, then the embedding if that is one of them."""
        names, view = used(context.settings), RowView(domain.train, rows)
        with reading(context) as reader:
            parts = [measure_indicators(reader, view, names, context.progress("score", len(rows)))]
        if "diversity" in names:
            parts.append(embed(domain, rows, context))
        return np.concatenate(parts, axis=1, dtype=np.float32)

    def weigh(self, domain: Any, measured: np.ndarray, context: SelectionContext, folder: Path) -> RowWeights:
        names = used(context.settings)
        raw = _with_diversity(measured, names, _seed(context, domain, _NEIGHBOURS))
        scaled = [standardise(column) for column in raw.T]
        varying = [i for i, column in enumerate(scaled) if column is not None]
        notes = tuple(
            f"{name} is {np.median(raw[:, i]):.4g} for (nearly) every row: it has no say"
            for i, name in enumerate(names)
            if scaled[i] is None
        )
        weights, details = np.zeros(len(names)), {}
        scores = np.zeros(len(raw))
        if varying:
            z = np.column_stack([column for column in scaled if column is not None])
            learned = _Learning(domain, context, z).run()
            details, notes = learned.details, notes + learned.notes
            weights[varying] = learned.weights
            scores = z @ learned.weights
        details = {**{f"weight_{name}": float(w) for name, w in zip(names, weights, strict=True)}, **details}
        found = from_scores(scores, context.settings, domain.name)
        return replace(found, notes=(*notes, *found.notes), details={**found.details, **details})


def standardise(values: np.ndarray) -> np.ndarray | None:
    """Mean 0 and variance 1 after both tails are drawn in; None where all values but the
    tails are equal.

    Args:
        values: `(n_rows,)`, finite.
    """
    low, high = np.quantile(values, [TAIL, 1 - TAIL])
    if high - low <= _EQUAL * max(abs(low), abs(high)):
        return None
    kept = np.clip(values, low, high)
    return np.asarray((kept - kept.mean()) / kept.std())


def _seed(context: SelectionContext, domain: Any, stream: int) -> list[int]:
    return [domain_seed(context, domain, PROMPTS), stream]


def _with_diversity(measured: np.ndarray, names: tuple[Indicator, ...], seed: list[int]) -> np.ndarray:
    """`(n_rows, len(names))` float64: what was measured, with distances in the place of embeddings."""
    n_plain = len(names) - ("diversity" in names)
    raw = measured[:, :n_plain].astype(np.float64)
    if "diversity" in names:
        distances = nearest_distance(centred(measured[:, n_plain:]), seed)
        raw = np.insert(raw, names.index("diversity"), distances, axis=1)
    return raw


@dataclass(frozen=True)
class _Verdict:
    weights: np.ndarray
    details: dict[str, float]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Learning:
    """One domain's weights, from its standardised indicators `z`, `(n_rows, n_varying)`."""

    domain: Any
    context: SelectionContext
    z: np.ndarray

    def run(self) -> _Verdict:
        settings = self.context.settings
        notes: list[str] = []
        with reading(self.context) as reader:
            allowance = row_allowance(reader, self.context.training.max_tokens, settings.n_demonstrations)
            examples = tiny_set(self._examples(), allowance, self._seed(_EXAMPLES))
            eligible = self._eligible(allowance, notes)
            size = min(settings.n_demonstrations, len(eligible) // 2)
            if size < settings.n_demonstrations:
                notes.append(f"a prompt has {size} demonstrations, not {settings.n_demonstrations}: there are few rows")
            sets = eligible[draw_sets(self.z[eligible], settings.n_prompts, size, self._seed(_SETS))]
            rewards = measure_rewards(
                reader,
                lambda index: rows_of(self.domain, sets[index]),
                len(sets),
                examples,
                self.context.progress("prompts", len(sets)),
            )
        n_tokens = self.domain.train.n_tokens[sets].sum(axis=1)
        learned = learn_weights(self.z[sets].mean(axis=1), rewards, np.log(n_tokens), self._seed(_SHUFFLES))
        details = {
            "rank_correlation": learned.rank_correlation,
            "r_squared": learned.r_squared,
            "p_value": learned.p_value,
            "effective_indicators": learned.n_effective,
            "mean_reward": float(rewards.mean()),
            "reward_spread": float(rewards.std(ddof=1)),
            "prompts": float(len(sets)),
            "demonstrations": float(size),
            "examples": float(len(examples)),
        }
        return self._judge(learned, details, notes)

    def _judge(self, learned: LearnedWeights, details: dict[str, float], notes: list[str]) -> _Verdict:
        """Weights that chance would give as well become none."""
        if learned.p_value <= SIGNIFICANT and learned.weights.any():
            return _Verdict(learned.weights, details, tuple(notes))
        notes.append(
            "the in-context signal explains nothing here: the indicators predict the rewards of "
            f"{details['prompts']:.0f} prompts no better than they predict shuffled ones (leave-one-out rank "
            f"correlation {learned.rank_correlation:.2f}, p = {learned.p_value:.2f}), so none of them has a say. Raise "
            "selection.n_prompts or selection.n_demonstrations, give selection.examples, or use another method"
        )
        return _Verdict(np.zeros_like(learned.weights), details, tuple(notes))

    def _examples(self) -> Any:
        return RowList(self.context.examples) if self.context.examples else self.domain.validation

    def _eligible(self, allowance: int, notes: list[str]) -> np.ndarray:
        """Ids of the rows that are short enough to be demonstrations."""
        lengths = self.domain.train.n_tokens
        eligible = np.flatnonzero(lengths <= allowance)
        if len(eligible) < 2:
            raise SelectionError(
                f"{len(eligible)} of {len(lengths)} rows have the at most {allowance} tokens that leave room for "
                f"{self.context.settings.n_demonstrations} demonstrations in the model's longest input; "
                "lower selection.n_demonstrations"
            )
        if len(eligible) < len(lengths):
            notes.append(
                f"weights are learned from the {len(eligible)} of {len(lengths)} rows that have at most {allowance} "
                "tokens: longer ones do not fit into a prompt"
            )
        return eligible

    def _seed(self, stream: int) -> list[int]:
        return _seed(self.context, self.domain, stream)
