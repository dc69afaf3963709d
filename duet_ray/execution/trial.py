"""The Tune trial: ask the broker for the k samples of one ratio, wait, reduce, report. It trains nothing itself."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from duet_ray.execution.broker import Outcome, Task
from duet_ray.records import Direction, Ratio, SampleResult, SampleSpec, TrialKind
from duet_ray.reduce import failure_reason, reduce_samples

POLL_SECONDS = 0.1


def sample_tasks(trial: int, kind: TrialKind, ratio: Ratio | None, samples: Sequence[int]) -> list[Task]:
    """The tasks of a trial's samples, keyed so that asking twice is asking once."""
    specs = [SampleSpec(trial=trial, sample=s, kind=kind, ratio=ratio) for s in samples]
    return [Task(key=spec.key, kind="sample", spec=spec) for spec in specs]


def sample_result(outcome: Outcome) -> SampleResult | None:
    """A sample as its outcome tells it; None when the study was stopped before it ended."""
    assert outcome.task.spec is not None
    if outcome.status == "stopped":
        return None
    if outcome.status == "failed":
        return SampleResult(spec=outcome.task.spec, value=None, reason=outcome.reason, n_retries=outcome.n_retries)
    return replace(SampleResult.from_json(outcome.result), n_retries=outcome.n_retries)


def run_trial(
    config: Mapping[str, Any], *, broker_name: str, namespace: str, k: int, direction: str, min_samples: int
) -> None:
    """The function trainable of a Tune trial.

    Args:
        config: `trial`, `kind` and `counts`, as the searcher suggested them, and `known`: samples that a resumed
            study has already, as plain data.

    Reports one of `observation` (as JSON text, since Tune flattens what is nested), `failed` (the reason, when too few
    samples have a value) and `stopped`.
    """
    import ray
    from ray import tune

    broker = ray.get_actor(broker_name, namespace=namespace)
    known = {data["spec"]["sample"]: SampleResult.from_json(data) for data in config["known"]}
    missing = [sample for sample in range(k) if sample not in known]
    tasks = sample_tasks(config["trial"], config["kind"], Ratio(counts=tuple(config["counts"])), missing)
    ray.get(broker.submit.remote(tasks))
    while (outcomes := ray.get(broker.outcomes.remote([task.key for task in tasks]))) is None:
        time.sleep(POLL_SECONDS)
    results = dict(known)
    for outcome in outcomes:
        result = sample_result(outcome)
        if result is None:
            tune.report({"stopped": True})
            return
        results[result.spec.sample] = result
    in_order = [results[sample] for sample in range(k)]
    observation = reduce_samples(in_order, Direction(direction), min_samples=min_samples)
    if observation is not None:
        tune.report({"observation": json.dumps(asdict(observation))})
    else:
        tune.report({"failed": failure_reason(in_order) or "too few samples have a value"})
