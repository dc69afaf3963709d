"""A fifth of the training rows is spoilt on purpose: what share of a method's lowest-scored fifth is that?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from corrupted_texts import CORRUPTIONS
from facts import Facts
from learners import Learner, Texts
from method_scores import available, scores_of_all
from small_domain import MemoryDomain, MemoryRows


@dataclass(frozen=True, kw_only=True)
class Spoilt:
    """A domain of which a fifth of the training rows is spoilt."""

    domain: MemoryDomain
    spoilt: np.ndarray
    """`(n_rows,)` bool."""


def a_fifth(n_rows: int, generator: np.random.Generator) -> np.ndarray:
    spoilt = np.zeros(n_rows, dtype=bool)
    spoilt[generator.choice(n_rows, size=n_rows // 5, replace=False)] = True
    return spoilt


def spoil_texts(learner: Learner, texts: Texts, kind: str, n_rows: int, n_validation: int, seed: int) -> Spoilt:
    generator = np.random.default_rng([seed, 2])
    good = [texts.domain[i] for i in generator.permutation(len(texts.domain))]
    train, validation = good[:n_rows], good[n_rows : n_rows + n_validation]
    spoilt = a_fifth(n_rows, generator)
    places = np.flatnonzero(spoilt)
    for place, text in zip(places, CORRUPTIONS[kind]([train[i] for i in places], generator, good), strict=True):
        train[place] = text
    return Spoilt(domain=learner.domain(train, validation), spoilt=spoilt)


def spoil_facts(facts: Facts, n_rows: int, seed: int) -> Spoilt:
    generator = np.random.default_rng([seed, 4])
    spoilt = a_fifth(n_rows, generator)
    subjects = [int(subject) for subject in facts.asked(n_rows, generator)]
    train = [
        facts.wrong_row(subject, generator) if wrong else facts.row(subject, generator)
        for subject, wrong in zip(subjects, spoilt, strict=True)
    ]
    validation = MemoryRows(facts.asked_rows(128, generator))
    return Spoilt(domain=MemoryDomain("facts", MemoryRows(train), validation, f"spoilt-{seed}"), spoilt=spoilt)


def share_found(scores: np.ndarray, spoilt: np.ndarray) -> float:
    """The spoilt share of the lowest fifth; rows with equal scores at its border count in proportion."""
    n_lowest = len(scores) // 5
    border = np.sort(scores)[n_lowest - 1]
    below, level = scores < border, scores == border
    open_places = n_lowest - int(below.sum())
    return float((spoilt[below].sum() + open_places * spoilt[level].mean()) / n_lowest)


def spoilt_rows_table(
    learner: Learner,
    title: str,
    cases: Mapping[str, Sequence[Spoilt]],
    methods: Sequence[str],
    n_processes: int,
) -> None:
    """One table: a column for each of `cases`, which hold one domain a seed."""
    names, missing = available(methods)
    all_cases = [case for found in cases.values() for case in found]
    n_seeds, n_rows = len(all_cases) // len(cases), len(all_cases[0].spoilt)
    scores = scores_of_all(learner, [case.domain for case in all_cases], names, n_processes)
    print(f"\n### Spoilt rows, {title}: {all_cases[0].spoilt.sum()} of {n_rows} rows, {n_seeds} seeds\n")
    columns = [*cases, "all"] if len(cases) > 1 else list(cases)
    print("| share of spoilt rows in the lowest fifth |", " | ".join(columns), "|\n|---|" + "---|" * len(columns))
    rows = []
    for name, found in scores.items():
        shares = np.array([share_found(s, case.spoilt) for s, case in zip(found, all_cases, strict=True)])
        table = [*shares.reshape(len(cases), n_seeds), shares][: len(columns)]
        rows.append((shares.mean(), f"| {name} | {' | '.join(map(_with_error, table))} |"))
    print("| perfect | " + " | ".join(["1.00"] * len(columns)) + " |")
    for _, line in sorted(rows, key=lambda row: -row[0]):
        print(line)
    print("| chance | " + " | ".join(["0.20"] * len(columns)) + " |")
    for name in missing:
        print(f"| {name} | not there yet |" + " |" * (len(columns) - 1))
    print("", flush=True)


def _with_error(values: np.ndarray) -> str:
    """The mean and its standard error over domains."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{values.mean():.2f} ± {values.std(ddof=1) / len(values) ** 0.5:.2f}"
