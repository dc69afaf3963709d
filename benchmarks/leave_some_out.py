"""Against ground truth: what happens to the held-out loss if a group of training rows is left out?

The training rows are split into groups that differ in what they hold. Every group is left out once and the model
fine-tuned on the rest, with several seeds; the effect of a group is how much the loss on held-out rows of the domain
rises without it. A method is judged by the rank correlation of its groups' summed scores with the effects: on test
rows, that no method saw, and on the validation rows that most methods compare with.

The effects are noisy themselves: the correlation between two halves of the seeds, corrected to all of them, is their
reliability, and its square root is about the most that a method can reach.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from corrupted_texts import CORRUPTIONS
from facts import Facts
from learners import Learner, Texts, mean_loss
from method_scores import available, done, scores_of_all
from scipy.stats import spearmanr
from small_domain import MemoryDomain, MemoryRows

from duet_ray.training import make_trainer

KINDS = ("good", "other domain", "shuffled words", "wrong answers", "noisy letters")
"""What a group of texts is made of."""


@dataclass(frozen=True, kw_only=True)
class Grouping:
    """Training rows in groups, and rows to judge the fine-tuned model by."""

    domain: MemoryDomain
    groups: np.ndarray
    """`(n_rows,)`: the group of each row."""
    test: MemoryRows


def group_texts(learner: Learner, texts: Texts, n_groups: int, group_rows: int, seed: int) -> Grouping:
    generator = np.random.default_rng([seed, 1])
    good = [texts.domain[i] for i in generator.permutation(len(texts.domain))]
    n_rows = n_groups * group_rows
    if len(good) < n_rows + texts.n_validation + texts.n_test:
        raise SystemExit(f"{len(good)} texts are too few for {n_groups} groups of {group_rows} rows")
    train, validation, test = good[:n_rows], good[n_rows : n_rows + texts.n_validation], good[-texts.n_test :]
    mixed = []
    for first in range(0, n_rows, group_rows):
        kinds = generator.choice(KINDS, size=group_rows, p=generator.dirichlet(np.full(len(KINDS), 0.3)))
        for kind, text in zip(kinds, train[first : first + group_rows], strict=True):
            if kind == "other domain":
                mixed.append(texts.others[int(generator.integers(len(texts.others)))])
            else:
                mixed += CORRUPTIONS[kind]([text], generator, train) if kind in CORRUPTIONS else [text]
    return Grouping(
        domain=learner.domain(mixed, validation),
        groups=np.repeat(np.arange(n_groups), group_rows),
        test=learner.encode(test),
    )


def group_facts(facts: Facts, n_groups: int, group_rows: int, seed: int) -> Grouping:
    generator = np.random.default_rng([seed, 3])
    rows = [row for _ in range(n_groups) for row in facts.group(group_rows, generator)]
    validation, test = (MemoryRows(facts.asked_rows(n, generator)) for n in (128, 512))
    return Grouping(
        domain=MemoryDomain("facts", MemoryRows(rows), validation, f"facts-{seed}"),
        groups=np.repeat(np.arange(n_groups), group_rows),
        test=test,
    )


def losses_without(learner: Learner, grouping: Grouping, group: int, seed: int) -> tuple[float, float]:
    """(validation, test) loss after fine-tuning without a group; with all rows for group −1."""
    kept = np.flatnonzero(grouping.groups != group)
    trainer = make_trainer(learner.training, learner.model, learner.tokenizer)
    try:
        trainer.train(grouping.domain.train.rows(kept.tolist()), seed=seed)
        return mean_loss(trainer.model, grouping.domain.validation), mean_loss(trainer.model, grouping.test)
    finally:
        trainer.reset()


def reliability(effects: np.ndarray, generator: np.random.Generator) -> float:
    """Rank correlation of two halves of the seeds, corrected to all of them (Spearman-Brown).

    Args:
        effects: `(n_seeds, n_groups)`.
    """
    found = []
    for _ in range(50):
        order = generator.permutation(len(effects))
        a, b = effects[order[::2]].mean(axis=0), effects[order[1::2]].mean(axis=0)
        found.append(spearmanr(a, b).statistic)
    half = float(np.mean(found))
    return 2 * half / (1 + half)


def leave_some_out_table(
    learner: Learner,
    title: str,
    groupings: Sequence[Grouping],
    n_seeds: int,
    methods: Sequence[str],
    n_processes: int,
) -> None:
    """Retrain, score, and print the table."""
    n_groups = int(groupings[0].groups.max()) + 1
    names, missing = available(methods)
    retrain = [
        partial(losses_without, learner, grouping, group, seed)
        for grouping in groupings
        for seed in range(n_seeds)
        for group in range(-1, n_groups)
    ]
    losses = np.array(done(retrain, n_processes, "retraining"))
    losses = losses.reshape(len(groupings), n_seeds, n_groups + 1, 2)
    effects = losses[:, :, 1:] - losses[:, :, :1]
    scores = scores_of_all(learner, [g.domain for g in groupings], names, n_processes)
    generator = np.random.default_rng(0)
    print(
        f"\n### Leave some out, {title}: {n_groups} groups of {len(groupings[0].groups) // n_groups} rows, "
        f"{n_seeds} seeds, {len(groupings)} groupings\n"
    )
    spread, noise = effects[..., 1].mean(axis=1).std(axis=1).mean(), effects[..., 1].std(axis=1, ddof=1).mean()
    base = np.mean([mean_loss(learner.model, grouping.test) for grouping in groupings])
    print(f"Test loss: {base:.3f} of the base model, {losses[:, :, 0, 1].mean():.3f} with all rows. Effects of groups:")
    print(f"standard deviation {spread:.4f} over groups, standard error {noise / n_seeds**0.5:.4f}.")
    reliable = [float(np.mean([reliability(e[..., column], generator) for e in effects])) for column in (1, 0)]
    most = [max(value, 0.0) ** 0.5 for value in reliable]
    print("\n| | test loss | 95 % interval | validation loss |\n|---|---|---|---|")
    print(f"| reliability of the effects themselves | {reliable[0]:.2f} | | {reliable[1]:.2f} |")
    print(f"| the most that a method can reach | {most[0]:.2f} | | {most[1]:.2f} |")
    rows = []
    for name in scores:
        sums = np.array([np.bincount(g.groups, weights=s) for g, s in zip(groupings, scores[name], strict=True)])
        test, validation = (mean_rank(sums, effects.mean(axis=1)[..., column]) for column in (1, 0))
        low, high = interval(sums, effects.mean(axis=1)[..., 1], generator)
        alike = "" if np.ptp(sums, axis=1).all() else " (all rows alike)"
        rows.append((test, f"| {name}{alike} | {test:.2f} | {low:.2f} to {high:.2f} | {validation:.2f} |"))
    for _, line in sorted(rows, key=lambda row: -row[0]):
        print(line)
    for name in missing:
        print(f"| {name} | not there yet | | |")


def mean_rank(sums: np.ndarray, effects: np.ndarray) -> float:
    """The mean over groupings of the rank correlation; 0 where all scores are equal.

    Args:
        sums, effects: `(n_groupings, n_groups)`.
    """
    return float(
        np.mean([spearmanr(a, b).statistic if np.ptp(a) > 0 else 0.0 for a, b in zip(sums, effects, strict=True)])
    )


def interval(sums: np.ndarray, effects: np.ndarray, generator: np.random.Generator) -> tuple[float, float]:
    """Of `mean_rank`, by drawing groups again within each grouping."""
    n_groupings, n_groups = sums.shape
    found = []
    for _ in range(500):
        drawn = generator.integers(n_groups, size=(n_groupings, n_groups))
        found.append(mean_rank(np.take_along_axis(sums, drawn, 1), np.take_along_axis(effects, drawn, 1)))
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)
