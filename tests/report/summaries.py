"""Synthetic studies for the tests of the report: every number in them is given by hand."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np

from duet_ray.records import (
    BASE_TRIAL,
    CONFIRM_FIRST,
    Direction,
    Observation,
    Ratio,
    SampleResult,
    SampleSpec,
    Trial,
    TrialKind,
    trial_name,
)
from duet_ray.report.scores import score_summary
from duet_ray.report.summary import DomainSummary, StudySummary
from duet_ray.selection.base import RowWeights

N_ROWS = 120


def ratio_of(n_domains: int, favourite: int | None = None) -> Ratio:
    """The even ratio of `N_ROWS` rows, or one with two thirds of them in one domain."""
    weights = (
        [1.0] * n_domains if favourite is None else [2.0 * (i == favourite) + 1 / n_domains for i in range(n_domains)]
    )
    counts = [int(N_ROWS * w / sum(weights)) for w in weights]
    counts[0 if favourite is None else favourite] += N_ROWS - sum(counts)
    return Ratio(counts=tuple(counts))


def trial(
    number: int,
    values: Sequence[float | None],
    *,
    kind: TrialKind = "start",
    ratio: Ratio | None = None,
    method: str = "random",
    direction: Direction = Direction.MINIMIZE,
    pending: bool = False,
    k: int | None = None,
    reason: str = "loss is not finite",
) -> Trial:
    """A trial with one sample a value; None is a failed sample."""
    samples = []
    for index, value in enumerate(values):
        spec = SampleSpec(trial=number, sample=index, kind=kind, ratio=ratio)
        adapter = None if value is None or kind == "base" else f"artifacts/{trial_name(number)}/{index}/adapter"
        samples.append(
            SampleResult(
                spec=spec,
                value=value,
                reason=reason if value is None else None,
                adapter=adapter,
                metrics={} if value is None else {"accuracy": 0.25},
                train_seconds=30.0,
                feedback_seconds=6.0,
            )
        )
    good = [s for s in samples if s.value is not None]
    seen = None
    if good and kind in ("start", "search") and not pending:
        best = min(good, key=lambda s: direction.to_loss(s.value))
        seen = Observation(value=best.value, k=k or len(values), k_used=len(good), best_sample=best.spec.sample)
    status = "pending" if pending else "done" if good else "failed"
    return Trial(
        number=number, kind=kind, ratio=ratio, status=status, method=method, samples=tuple(samples), observation=seen
    )  # fmt: skip


def study(
    trials: Sequence[Sequence[float | None]],
    *,
    base: float | None = 3.0,
    confirm: Mapping[int, Sequence[float | None]] | None = None,
    n_start: int = 2,
    n_planned: int | None = None,
    n_pending: int = 0,
    n_domains: int = 3,
    names: Sequence[str] | None = None,
    direction: Direction = Direction.MINIMIZE,
    k: int | None = None,
    name: str = "toy",
    reason: str = "loss is not finite",
    feedback_is_random: bool = False,
) -> StudySummary:
    """A study: trial 0 has the uniform ratio; `confirm` maps a trial's number to its fresh values."""
    names = tuple(names or (f"domain-{i}" for i in range(n_domains)))
    k = k or max((len(t) for t in trials), default=1)
    made = []
    if base is not None:
        made.append(trial(BASE_TRIAL, [base], kind="base", method="base"))
    ratios = [ratio_of(len(names), None if i == 0 else i % len(names)) for i in range(len(trials) + n_pending)]
    for i in range(len(trials) + n_pending):
        kind: TrialKind = "start" if i < n_start else "search"
        method = "uniform" if i == 0 else "random" if kind == "start" else "bayesian:lcb"
        made.append(
            trial(
                i, trials[i] if i < len(trials) else [], kind=kind, ratio=ratios[i], method=method,
                direction=direction, pending=i >= len(trials), k=k, reason=reason,
            )
        )  # fmt: skip
    for i, (number, values) in enumerate((confirm or {}).items()):
        made.append(
            trial(
                CONFIRM_FIRST + i, values, kind="confirm", ratio=ratios[number],
                method=f"confirm:{trial_name(number)}", direction=direction,
            )
        )  # fmt: skip
    domains = tuple(
        DomainSummary(
            name=n, source=f"data/{n}.jsonl", n_train=900, n_validation=100, n_bad=i, n_duplicates=2, n_overlap=None,
            effective_sample_size=450.0 if i else None, notes=("weights are even",) if i == 0 else (),
        )
        for i, n in enumerate(names)
    )  # fmt: skip
    return StudySummary(
        name=name,
        direction=direction,
        domain_names=names,
        n_rows=N_ROWS,
        k=k,
        n_planned=len(trials) + n_pending if n_planned is None else n_planned,
        feedback_name="heldout_loss",
        trials=tuple(made),
        domains=domains,
        config_yaml=f"name: {name}\nsampling: {{k: {k}}}\n",
        started=datetime(2026, 3, 1, 9, 30, tzinfo=UTC),
        seconds=754.0,
        versions={"duet_ray": "0.1.0"},
        notes=("one note",),
        feedback_is_random=feedback_is_random,
    )


def scored(summary: StudySummary, *weights: RowWeights, text: str = "question {row}", **changes: int) -> StudySummary:
    """The study with these weights of its first domains, whose rows read `text → answer`."""

    def texts(rows: Sequence[int]) -> list[dict[str, str | int]]:
        return [
            {"source": "data/rows.jsonl", "line": r + 1, "prompt": text.format(row=r), "completion": f"answer {r}"}
            for r in rows
        ]

    found = [score_summary(w, texts, method="influence (ekfac), rank weighting", **changes) for w in weights]
    domains = [replace(d, scores=s) for d, s in zip(summary.domains, found, strict=False)]
    return replace(summary, domains=(*domains, *summary.domains[len(domains) :]))


def weights_of(scores: Sequence[float]) -> RowWeights:
    """Row i's probability is its share of the sum of 1 … n, by its place in `scores` from below."""
    ranks = np.argsort(np.argsort(scores)) + 1.0
    return RowWeights(
        scores=np.array(scores, dtype=float),
        probabilities=ranks / ranks.sum(),
        details={"cg_residual": 0.00125, "prepare_seconds": 60.0, "measure_seconds": 65.0},
    )


def gallery() -> dict[str, StudySummary]:
    """Studies of every shape that a report has to survive."""
    many = [[2.0 + 0.01 * ((7 * i) % 13) + 0.005 * s for s in range(4)] for i in range(60)]
    many[7] = [None] * 4
    many[9] = [2.05, None, 40.0, 2.07]
    return {
        "empty": study([], base=None, n_planned=4),
        "base only": study([], n_planned=4),
        "all failed": study([[None, None], [None, None]]),
        "all failed, no base": study([[None, None]], base=None, n_planned=5),
        "one trial, k=1": study([[2.5]], n_domains=1, n_start=1),
        "one domain, confirmed": study([[2.5, 2.6]], n_domains=1, confirm={0: [2.55, 2.57]}),
        "unfinished": study([[2.5, 2.6], [None, 2.4], [None, None]], n_pending=2, n_planned=9),
        "one repeat": study([[2.5], [2.4]], confirm={1: [2.45], 0: [2.5]}),
        "equal values": study([[2.0, 2.0], [2.0, 2.0]], base=2.0, confirm={1: [2.0, 2.0], 0: [2.0, 2.0]}),
        "zeros": study([[0.0, 0.0], [0.0, 0.0]], base=0.0, direction=Direction.MAXIMIZE),
        "confirmed": study([[2.5, 2.6], [2.4, 2.45], [2.2, 2.3]], confirm={2: [2.25, 2.27], 0: [2.5, 2.54]}),
        "confirm failed": study([[2.5, 2.6], [2.4, 2.45]], confirm={1: [None, None], 0: [2.5, 2.54]}),
        "uniform wins": study(
            [[2.5, 2.6], [2.4, 2.45], [2.45, 2.5]], confirm={1: [2.60, 2.62], 2: [2.70, 2.72], 0: [2.50, 2.52]}
        ),
        "random feedback": study(
            [[2.5, 2.6], [2.4, 2.45]], confirm={1: [2.40, 2.42], 0: [2.50, 2.52]}, feedback_is_random=True
        ),
        "maximised": study([[0.3, 0.4], [0.5, 0.6]], base=0.2, direction=Direction.MAXIMIZE),
        "20 domains, 60 trials": study(
            many, n_domains=20, n_start=20, confirm={5: [2.03, 2.05, 2.04], 0: [2.06, 2.07, 2.05]}
        ),
        "scored": scored(
            study([[2.5, 2.6], [2.4, 2.45]]),
            weights_of([((7 * i) % 50) ** 2 for i in range(50)]),
            RowWeights(scores=np.zeros(40), probabilities=np.full(40, 1 / 40), notes=("all 40 scores are equal",)),
        ),
        "in order": scored(study([[2.5]]), *[RowWeights(order=np.arange(60)[::-1])] * 3, n_drawn=30),
        "uniform rows": scored(study([[2.5]]), *[RowWeights(probabilities=np.full(40, 1 / 40))] * 3),
        "45 domains": study([[2.5, 2.6], [2.4, 2.45]], n_domains=45),
    }
