"""Which trials are trained and measured again, and the order behind that choice.

The best of T noisy observations is the one that was lucky (the winner's curse), so finalists are the best by the
posterior of the search's model, which shares what neighbouring points have seen. The best observed trial is measured
again too, to show by how much it had flattered, and so is the uniform ratio, to have something to compare with.

The order is stored together with the trials that it was made of. So a resume finds the same finalists, and a finished
study is known to be finished without a model.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

from duet_ray.budget import searched
from duet_ray.config import StudyConfig
from duet_ray.records import (
    CONFIRM_ANYWHERE,
    CONFIRM_BASE,
    CONFIRM_FIRST,
    PastRun,
    Point,
    Settings,
    Trial,
)
from duet_ray.search import Proposer, Told
from duet_ray.search.told import told_of, told_of_run
from duet_ray.store import Store

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Order:
    """What the model says of the observed trials."""

    posterior: dict[int, tuple[float, float | None]]
    """Trial → (mean, standard deviation) in the user's direction; no deviation where the observation itself ranks."""
    ranking: list[int]
    """Whole trials of different points, best first."""
    anywhere: Point | None = None
    """The best point of all, where no trial has it."""


def order_of(
    trials: Sequence[Trial], past_runs: Sequence[PastRun], proposer: Proposer, config: StudyConfig, *, anywhere: bool
) -> Order:
    """Put the observed trials in order by the search's model, or where it fails by their observations.

    Args:
        anywhere: look for the best point beyond the trials, too.
    """
    past = [told_of_run(run, config) for run in past_runs]
    pairs = [(trial.number, told) for trial in trials if (told := told_of(trial, config)) is not None]
    numbers, own = [number for number, _ in pairs], [told for _, told in pairs]
    if not own:
        return Order(posterior={}, ranking=[])
    try:
        return _by_model(numbers, own, past, proposer, config, anywhere=anywhere)
    except Exception:  # Whatever a fit may fail of: the trainings are done, and are worth a finalist.
        log.warning("the search's model failed, so the observations rank", exc_info=True)
        by_observation = [trial.number for trial in best_trials(trials, config, len(own))]
        values = {n: (config.direction.to_value(told.loss), None) for n, told in pairs}
        return Order(posterior=dict(values), ranking=by_observation)


def _by_model(
    numbers: Sequence[int],
    own: Sequence[Told],
    past: Sequence[Told],
    proposer: Proposer,
    config: StudyConfig,
    *,
    anywhere: bool,
) -> Order:
    from duet_ray.search import recommend

    told = [*past, *own]
    standing = recommend.standings(proposer, told)[len(past) :]
    has_model = len(told) >= recommend.FEWEST and not proposer.points.is_single
    posterior: dict[int, tuple[float, float | None]] = {}
    for number, one in zip(numbers, standing, strict=True):
        is_known = has_model and math.isfinite(one.sd)
        posterior[number] = config.direction.to_value(one.mean), one.sd if is_known else None
    best = recommend.anywhere(proposer, told) if anywhere and has_model else None
    if best is not None and best in {one.point for one in own}:
        best = None
    ranking = [numbers[i] for i in recommend.ranking(own, standing)]
    return Order(posterior=posterior, ranking=ranking, anywhere=best)


def store_order(store: Store, config: StudyConfig, proposer: Proposer, *, is_over: bool) -> None:
    """See that the store has the order of all trials that are observed, and with the search over its one point more.

    Nothing is computed where that is so already.
    """
    trials = store.trials()
    observed = {trial.number for trial in trials if told_of(trial, config) is not None}
    wanted = is_over and config.search.recommend == "anywhere" and config.confirm.finalists > 0
    if observed == store.ranking()[1] and not (wanted and not _elsewhere(trials)):
        return
    order = order_of(trials, store.past_runs(), proposer, config, anywhere=wanted)
    if order.anywhere is not None:
        known = {trial.point for trial in _elsewhere(trials)}
        if order.anywhere not in known:
            point = order.anywhere
            number = CONFIRM_ANYWHERE + len(known)
            store.add_trial(number, "confirm", point.ratio, "confirm:anywhere", settings=point.settings)
    # Last: with this the order is taken for complete.
    store.set_posterior(order.posterior, order.ranking)


def to_confirm(store: Store, config: StudyConfig) -> list[Trial]:
    """The confirmations that the study is to have, as they are stored or, without samples, as they will be."""
    if config.confirm.finalists == 0:
        return []
    trials = store.trials()
    known = {trial.number: trial for trial in trials}
    wanted = [
        _confirmation(CONFIRM_FIRST + trial.number, f"confirm:{trial.name}", trial)
        for trial in finalists(trials, store.ranking()[0], config)
    ]
    if config.search.recommend == "anywhere":
        wanted += _elsewhere(trials)[-1:]
    if config.confirm.limit is not None:
        wanted.append(_confirmation(CONFIRM_BASE, "confirm:base", None))
    return [known.get(trial.number, trial) for trial in wanted]


def _confirmation(number: int, method: str, trial: Trial | None) -> Trial:
    settings: Settings = trial.settings if trial is not None else ()
    ratio = trial.ratio if trial is not None else None
    return Trial(number=number, kind="confirm", ratio=ratio, status="pending", method=method, settings=settings)


def finalists(trials: Sequence[Trial], ranking: Sequence[int], config: StudyConfig) -> list[Trial]:
    """The trials to measure again: the best of the ranking, the best observed one and the uniform ratio, each once.

    Args:
        ranking: trials, best first; empty: the observations rank.
    """
    by_number = {trial.number: trial for trial in trials}
    ranked = [by_number[number] for number in ranking if number in by_number]
    n = config.confirm.finalists
    found = (ranked or best_trials(trials, config, n))[:n]
    for more in (*best_trials(trials, config, 1), *(t for t in trials if t.number == 0)):
        if more.point not in [trial.point for trial in found]:
            found.append(more)
    return found


def best_trials(trials: Sequence[Trial], config: StudyConfig, n: int) -> list[Trial]:
    """The `n` best observed whole trials that have different points, best first."""
    observed = [
        (config.direction.to_loss(t.observation.value), t.number, t)
        for t in searched(trials)
        if t.observation is not None and t.fidelity == 1
    ]
    best: dict[Point, Trial] = {}
    for _, _, trial in sorted(observed, key=lambda one: one[:2]):
        best.setdefault(trial.point, trial)
    return list(best.values())[:n]


def _elsewhere(trials: Sequence[Trial]) -> list[Trial]:
    """The confirmations of points that no trial had."""
    return [trial for trial in trials if trial.number >= CONFIRM_ANYWHERE]
