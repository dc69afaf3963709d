"""A trial, as Ray Tune runs it: ask the broker for the k samples of one ratio, and wait until they have ended.

The samples' results go from the broker to the driver, which stores them and reduces what it has stored: an observation
can never disagree with the samples under it.

With `sampling.racing` the samples run to the end in stages. After each share of the steps all that are still in the
race are measured quickly, and the worse ones stop (successive halving: Jamieson & Talwalkar 2016, Karnin et al. 2013).
Each stage waits for all of its samples, and what a sample measured is on disk: so who stops does not depend on which
group was quicker, nor on an interruption.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from duet_ray.config import RacingConfig, n_kept
from duet_ray.execution.artifacts import Comparison, leave_comparisons, read_comparisons, sample_folder
from duet_ray.execution.broker import Outcome, Task, ask_actor
from duet_ray.records import Direction, SampleResult, SampleSpec, Trial

POLL_SECONDS, MOST_SECONDS = 0.1, 5.0
"""Between two questions of a trial whether its samples have ended."""


@dataclass(frozen=True, kw_only=True)
class TrialPlan:
    """How the samples of a trial are made: the same for all trials of a study. Plain data."""

    fuse: int
    """Samples that train in one pass."""
    racing: RacingConfig | None
    direction: Direction


def sample_tasks(
    trial: Trial,
    samples: Sequence[int],
    *,
    of: Sequence[int] | None = None,
    fuse: int = 1,
    until: float = 1.0,
) -> list[Task]:
    """The tasks of a trial's samples, keyed so that asking twice is asking once.

    Args:
        of: the samples that are trained at this stage, also those that are done; they are cut into bundles of `fuse`,
            which depend on nothing else.
        until: below 1: train until this share of the steps, and compare.
    """
    specs = {s: trial.spec(s) for s in (of or samples)}
    bundles = [tuple(bundle) for bundle in _cut(list(specs.values()), fuse)]
    bundle_of = {spec: bundle for bundle in bundles if len(bundle) > 1 for spec in bundle}
    tasks = []
    for spec in (specs[s] for s in samples):
        bundle = bundle_of.get(spec, ())
        if until < 1:
            tasks.append(Task(key=f"{spec.key}@{until:g}", kind="compare", spec=spec, bundle=bundle, until=until))
        else:
            tasks.append(Task(key=spec.key, kind="sample", spec=spec, bundle=bundle))
    return tasks


def scoring_tasks(domain: int, name: str, n_shards: int) -> list[list[Task]]:
    """The tasks that weigh a domain: those in one list may be done side by side, the lists one after the other."""
    return [
        [Task(key=f"prepare-{name}", kind="prepare", domain=domain)],
        [Task(key=f"score-{name}-{s}", kind="score", domain=domain, shard=s) for s in range(n_shards)],
        [Task(key=f"weigh-{name}", kind="weigh", domain=domain)],
    ]


def sample_result(outcome: Outcome) -> SampleResult | None:
    """A sample as its outcome tells it; None when the study was stopped before it ended."""
    assert outcome.task.spec is not None
    if outcome.status == "stopped":
        return None
    if outcome.status == "failed":
        return SampleResult(spec=outcome.task.spec, value=None, reason=outcome.reason, n_retries=outcome.n_retries)
    return replace(SampleResult.from_json(outcome.result), n_retries=outcome.n_retries)


def going_on(compared: Mapping[int, float | None], keep: float, direction: Direction) -> list[int]:
    """The samples of a race that go on: the better ones, at least one; none where none has a value.

    Args:
        compared: sample → value of its quick feedback; None where it failed.
        keep: share of those with a value.
    """
    losses = sorted((direction.to_loss(value), sample) for sample, value in compared.items() if value is not None)
    return sorted(sample for _, sample in losses[: n_kept(len(losses), keep)])


def as_config(trial: Trial, k: int) -> dict[str, Any]:
    """A trial as the config of its Tune trial: plain data.

    Args:
        k: samples that it has in the end; `missing` are those to make.
    """
    known = {sample.spec.sample for sample in trial.samples}
    return {
        "trial": trial.number,
        "spec": trial.spec(0).to_json(),
        "k": k,
        "missing": [sample for sample in range(k) if sample not in known],
    }


def _trial(config: Mapping[str, Any]) -> Trial:
    """What `as_config` was given, as far as the samples' names need it."""
    spec = SampleSpec.from_json(config["spec"])
    return Trial(
        number=spec.trial,
        kind=spec.kind,
        ratio=spec.ratio,
        status="pending",
        method="",
        settings=spec.settings,
        fidelity=spec.fidelity,
    )


def run_in_tune(config: Mapping[str, Any], *, broker_name: str, namespace: str, plan: TrialPlan) -> None:
    """`run_trial` as the function trainable of Ray Tune."""
    import ray
    from ray import tune

    broker = ray.get_actor(broker_name, namespace=namespace)
    run_trial(config, partial(ask_actor, broker), plan)
    tune.report({"ended": 1})


def run_trial(config: Mapping[str, Any], ask: Callable[..., Any], plan: TrialPlan) -> None:
    """Have the samples of a trial made, and wait until they have ended.

    Args:
        config: as `as_config` makes it.
        ask: calls a method of the broker.
    """
    trial = _trial(config)

    def done(samples: Sequence[int], of: Sequence[int], until: float = 1.0) -> list[Outcome]:
        tasks = sample_tasks(trial, samples, of=of, fuse=plan.fuse, until=until)
        ask("submit", tasks)
        keys = [task.key for task in tasks]
        started = time.monotonic()
        while (outcomes := ask("outcomes", keys)) is None:
            # What takes long is asked for less often: that costs it a hundredth of its time.
            time.sleep(min(MOST_SECONDS, max(POLL_SECONDS, 0.01 * (time.monotonic() - started))))
        return list(outcomes)

    racing = list(range(config["k"]))
    compared: dict[int, list[Comparison]] = {sample: [] for sample in racing}
    for until in plan.racing.at if plan.racing else ():
        if len(racing) > 1:
            outcomes = done(racing, racing, until)
            if any(outcome.status == "stopped" for outcome in outcomes):
                break  # The study is stopped, and no task is taken any more; a resume finds what was compared.
            for outcome in outcomes:
                assert outcome.task.spec is not None
                compared[outcome.task.spec.sample].append(_comparison(outcome))
            stopped, racing = judged(outcomes, compared, plan)
            for task, result in stopped:
                ask("settle", task, result.to_json())
    done([sample for sample in config["missing"] if sample in racing], racing)


def judged(
    outcomes: Sequence[Outcome], compared: Mapping[int, Sequence[Comparison]], plan: TrialPlan
) -> tuple[list[tuple[Task, SampleResult]], list[int]]:
    """The samples whose race ends here, with their results, and those that go on.

    Args:
        outcomes: of the comparisons of this stage.
        compared: sample → all its comparisons so far.
    """
    assert plan.racing is not None
    specs = [outcome.task.spec for outcome in outcomes if outcome.task.spec is not None]
    kept = going_on({s.sample: compared[s.sample][-1].value for s in specs}, plan.racing.keep, plan.direction)
    best = ", ".join(f"{compared[sample][-1].value:.6g}" for sample in kept)
    out = [spec for spec in specs if spec.sample not in kept]
    return [
        (Task(key=spec.key, kind="sample", spec=spec), _stopped(spec, compared[spec.sample], best)) for spec in out
    ], kept


def leave_failed_comparison(study_folder: Path, outcome: Outcome) -> None:
    """Leave in its sample's folder that a comparison failed for good: a resume must not try it again."""
    assert outcome.task.spec is not None
    folder = sample_folder(study_folder, outcome.task.spec)
    earlier = read_comparisons(folder)
    if all(c.share != outcome.task.until for c in earlier):
        folder.mkdir(parents=True, exist_ok=True)
        leave_comparisons(folder, [*earlier, _comparison(outcome)])


def _comparison(outcome: Outcome) -> Comparison:
    if outcome.status == "failed":
        share, reason = outcome.task.until, outcome.reason
        return Comparison(share=share, value=None, reason=reason, train_seconds=0.0, feedback_seconds=0.0)
    return Comparison(**outcome.result)


def _stopped(spec: SampleSpec, compared: Sequence[Comparison], best: str) -> SampleResult:
    """The end of a sample that is out of the race.

    Args:
        best: the values of those that go on.
    """
    last = compared[-1]
    reason, train = last.reason, {}
    if last.value is not None:
        reason = f"stopped after {100 * last.share:g} % of its steps with {last.value:.6g}; going on: {best}"
        train = {"stopped_after": last.share}
    return SampleResult(
        spec=spec,
        value=None,
        reason=reason,
        train=train,
        train_seconds=sum(c.train_seconds for c in compared),
        feedback_seconds=sum(c.feedback_seconds for c in compared),
    )


def _cut(specs: Sequence[SampleSpec], size: int) -> list[Sequence[SampleSpec]]:
    return [specs[first : first + size] for first in range(0, len(specs), size)]
