"""What a study's trials cost, and when its budget is spent.

The budget, `search.n_start + search.n_trials`, counts whole trials. A trial on a share of the rows (`search.fidelity`)
costs that share of one, so a study may have more trials than that; a failed trial costs as much as any. All of it
follows from what was proposed, never from the clock, so a resume ends where an uninterrupted run does.
"""

import math
from collections.abc import Sequence

from duet_ray.config import StudyConfig
from duet_ray.records import Trial

_ROUNDING = 1e-9


def spent(trials: Sequence[Trial], *, ended: bool = False) -> float:
    """The trials of the start design and the search, in whole trials: of `StudyConfig.n_planned_trials`.

    Args:
        ended: count only those that are over.
    """
    return math.fsum(t.fidelity for t in searched(trials) if not ended or t.status != "pending")


def is_spent(trials: Sequence[Trial], config: StudyConfig) -> bool:
    """Whether no further trial is to be proposed: what is left does not pay for the cheapest one."""
    return config.n_planned_trials - spent(trials) < cheapest(config) - _ROUNDING


def n_left(trials: Sequence[Trial], config: StudyConfig) -> int:
    """Trials of the search that have not ended: exactly where all are whole, else at most so many."""
    open_trials = sum(t.status == "pending" for t in searched(trials))
    to_propose = (config.n_planned_trials - spent(trials)) / cheapest(config)
    return open_trials + max(0, math.floor(to_propose + _ROUNDING))


def cheapest(config: StudyConfig) -> float:
    """The smallest share of a whole trial's rows that a trial of this study may have."""
    return config.search.fidelity.rows[0] if config.search.fidelity is not None else 1.0


def searched(trials: Sequence[Trial]) -> list[Trial]:
    """The trials of the start design and the search, without the untouched model and confirmations."""
    return [t for t in trials if t.kind in ("start", "search")]


def n_samples(trial: Trial, config: StudyConfig) -> int:
    """The samples that a trial has once all have ended."""
    if trial.ratio is None:
        return 1
    return config.confirm.repeats if trial.kind == "confirm" else trial.k or config.sampling.k_most


def n_confirmations(config: StudyConfig) -> int:
    """Models that are trained to confirm: the finalists and the uniform ratio, and with `anywhere` one more ratio.

    The best observed ratio, where the model prefers others to it, comes on top.
    """
    confirm = config.confirm
    if confirm.finalists == 0:
        return 0
    return confirm.repeats * (confirm.finalists + 1 + (config.search.recommend == "anywhere"))
