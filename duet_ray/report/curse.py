"""The winner's curse, measured: what the search promised of a ratio, and what fresh seeds made of it.

Two ratios are named after a search. The *naive best* is the one with the best observation, which is what a table of
results invites one to take; the *recommended* one has the best mean under the search's model, which has weighed every
observation against its neighbours. Where they were measured again, the observation minus the fresh mean is how much
luck had added:

    too good by  = observation − fresh mean,      ± t s / √n        (n − 1 degrees of freedom)

The observation is one number and taken as it is; the error is that of the fresh mean alone. An observation that is the
best of k samples is also better than a typical sample by construction, and that is part of the difference: the model
that one would hand over is one of the k, the fresh mean is what one more training gives.
"""

from dataclasses import dataclass
from typing import Literal

from duet_ray.records import Trial
from duet_ray.report.summary import (
    Measurement,
    StudySummary,
    best_trial,
    chosen_trial,
    confirmation_of,
    is_anywhere,
    recommended_trial,
    value_format,
)
from duet_ray.report.welch import mean_reach
from duet_ray.report.wording import ValueFormat, join_words

Role = Literal["naive best", "recommended", "confirmed"]


@dataclass(frozen=True, kw_only=True)
class Promise:
    """One ratio: what was promised of it, and what became of that."""

    trial: Trial
    roles: tuple[Role, ...]
    observed: float | None
    """None for a ratio that was only trained to confirm it."""
    expected: tuple[float, float] | None
    """Mean and standard deviation under the search's model."""
    again: Measurement | None
    too_good: float | None
    """By how much the observation was better than the fresh mean; negative where it was worse."""
    reach: float | None
    """Of its 95 % interval, each way; None where nothing is known of it."""

    @property
    def interval(self) -> tuple[float, float] | None:
        if self.too_good is None or self.reach is None:
            return None
        return self.too_good - self.reach, self.too_good + self.reach


def promises(summary: StudySummary) -> tuple[Promise, ...]:
    """The naive best, the recommended and the confirmed ratio; one that is several of these stands once."""
    again = chosen_trial(summary)
    confirmed = again if again is not None and confirmation_of(summary, again.name) is not None else None
    named: list[tuple[Role, Trial | None]] = [
        ("naive best", best_trial(summary)),
        ("recommended", recommended_trial(summary)),
        ("confirmed", confirmed),
    ]
    roles: dict[int, list[Role]] = {}
    trials: dict[int, Trial] = {}
    for role, trial in named:
        if trial is not None:
            roles.setdefault(trial.number, []).append(role)
            trials[trial.number] = trial
    return tuple(_promise(summary, trials[number], tuple(found)) for number, found in roles.items())


def curse_sentences(summary: StudySummary) -> list[str]:
    """What the table says, in words; empty before there is a posterior or a confirmation."""
    found = promises(summary)
    if not found or not (summary.posterior or any(p.again for p in found)):
        return []
    values = value_format(summary)
    naive, recommended = found[0], next(p for p in found if "recommended" in p.roles)
    if naive is recommended:
        said = [f"The naive best and the recommended ratio are the same: {naive.trial.name}."]
    else:
        said = [
            f"The best observation is {naive.trial.name}'s; the search's model, which weighs every observation against "
            f"its neighbours, recommends {recommended.trial.name}."
        ]
    named = [naive] if naive is recommended else [naive, recommended]
    return said + [_sentence(p, values) for p in named if p.too_good is not None]


def roles_text(promise: Promise) -> str:
    """`naive best and recommended`."""
    return join_words(promise.roles)


def _promise(summary: StudySummary, trial: Trial, roles: tuple[Role, ...]) -> Promise:
    again = confirmation_of(summary, trial.name)
    # A ratio that was only trained to confirm it has no observation that luck could have chosen.
    observed = trial.observation.value if trial.observation and not is_anywhere(trial) else None
    too_good = None
    if observed is not None and again is not None:
        too_good = summary.direction.to_loss(again.mean) - summary.direction.to_loss(observed)
    return Promise(
        trial=trial,
        roles=roles,
        observed=observed,
        expected=summary.posterior.get(trial.number),
        again=again,
        too_good=too_good,
        reach=mean_reach(again) if again is not None else None,
    )


def _sentence(promise: Promise, values: ValueFormat) -> str:
    assert promise.again is not None, "there is something to compare"
    assert promise.observed is not None
    assert promise.too_good is not None
    start = f"{promise.trial.name} was observed at {values(promise.observed)} and has {values(promise.again.mean)} with"
    start += " fresh seeds"
    interval = promise.interval
    if interval is None:
        by = values.difference(promise.too_good)
        return f"{start}: {by} {'worse' if promise.too_good > 0 else 'better'}, from too few repeats for an interval."
    low, high = interval
    span = f"95 % interval {_signed(low, values)} to {_signed(high, values)}"
    if low > 0:
        return f"{start}: the observation was too good by {values.difference(promise.too_good)} ({span})."
    if high < 0:
        return (
            f"{start}: the observation was not too good, but worse by {values.difference(promise.too_good)} ({span})."
        )
    return f"{start}: too good by {_signed(promise.too_good, values)} ({span}), which may be chance."


def _signed(value: float, values: ValueFormat) -> str:
    return f"{'−' if value < 0 else ''}{values.difference(value)}"
