"""The Tune trial: ask the broker for the k samples of one ratio, wait until they have ended. It trains nothing itself.

The samples' results go from the broker to the driver, which stores them and reduces what it has stored: an observation
can never disagree with the samples under it.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from duet_ray.execution.broker import Outcome, Task
from duet_ray.records import Ratio, SampleResult, SampleSpec, TrialKind

POLL_SECONDS = 0.1


def sample_tasks(trial: int, kind: TrialKind, ratio: Ratio | None, samples: Sequence[int]) -> list[Task]:
    """The tasks of a trial's samples, keyed so that asking twice is asking once."""
    specs = [SampleSpec(trial=trial, sample=s, kind=kind, ratio=ratio) for s in samples]
    return [Task(key=spec.key, kind="sample", spec=spec) for spec in specs]


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


def run_trial(config: Mapping[str, Any], *, broker_name: str, namespace: str) -> None:
    """The function trainable of a Tune trial.

    Args:
        config: `trial`, `kind`, `counts` and `missing`, the samples to make, as the searcher suggested them.
    """
    import ray
    from ray import tune

    broker = ray.get_actor(broker_name, namespace=namespace)
    ratio = Ratio(counts=tuple(config["counts"]))
    tasks = sample_tasks(config["trial"], config["kind"], ratio, config["missing"])
    ray.get(broker.submit.remote(tasks))
    while ray.get(broker.outcomes.remote([task.key for task in tasks])) is None:
        time.sleep(POLL_SECONDS)
    tune.report({"ended": 1})
