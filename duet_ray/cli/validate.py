"""`duet validate`: find in seconds what would otherwise fail after an hour."""

from typing import Any

from rich.table import Table

from duet_ray.cli.console import AsJson, Overrides, StudyFile, open_study, out, print_json, say
from duet_ray.cli.live import LogWatcher


def command(study: StudyFile, set_: Overrides = None, as_json: AsJson = False) -> None:
    """Read every source, check the task, the model, the memory and the resources."""
    opened = open_study(study, set_)
    ready = opened.validate(LogWatcher())
    resources = _resource_problems(ready.config)
    estimate = _time_estimate(ready)
    if as_json:
        print_json(_to_json(ready, resources, estimate))
        return
    out.print(_domain_table(ready))
    say(f"model: {ready.memory.describe()}")
    if ready.config.training.fuse not in ("auto", 1):
        say(f"fuse: {ready.config.training.fuse} samples of a trial are trained in one pass")
    for note in (*ready.notes, *resources):
        say(f"note: {note}")
    config = ready.config
    n_samples = config.n_planned_trials * config.sampling.k
    say(
        f"plan: ({config.search.n_start} start ratios + {config.search.n_trials} Bayesian trials) × k = "
        f"{config.sampling.k} make {n_samples} trainings of {config.mixture.n_rows} rows, "
        f"{config.fleet.groups} at a time"
    )
    say(f"time: {estimate.describe()}" if estimate else "time: not known, since what it will run on is not here")
    say(f"{config.name} is ready: duet run {study}")


def _resource_problems(config: Any) -> list[str]:
    """What this machine lacks. Only a note: the study may run on a cluster."""
    import os

    import torch

    from duet_ray.errors import ResourceError
    from duet_ray.execution.fleet import check_resources

    try:
        check_resources(config, {"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())})
    except ResourceError as error:
        return [f"this machine is not enough: {line}" for line in str(error).splitlines()]
    return []


def _time_estimate(ready: Any) -> Any:
    """How long the trainings take on a device like the one here, in rows of the mean length of the domains."""
    from duet_ray.training.estimate import estimate_time

    reports = [domain.report for domain in ready.domains]
    means = [report.n_tokens / max(1, report.n_train + report.n_validation) for report in reports]
    return estimate_time(ready.config, sum(means) / len(means))


def _domain_table(ready: Any) -> Table:
    table = Table("domain", "training rows", "validation", "tokens", "cut", "bad", "duplicates", "may take")
    for column in table.columns[1:]:
        column.justify = "right"
    space = ready.space
    for index, domain in enumerate(ready.domains):
        report = domain.report
        low, high = space.lower[index] / space.n_rows, space.upper[index] / space.n_rows
        table.add_row(
            domain.name,
            f"{report.n_train:,}",
            f"{report.n_validation:,}",
            f"{report.n_tokens:,}",
            f"{report.n_cut:,}",
            f"{report.n_bad:,}",
            f"{report.n_duplicates:,}",
            f"{low:.0%} to {high:.0%}",
        )
    return table


def _to_json(ready: Any, resources: list[str], estimate: Any) -> dict[str, Any]:
    return {
        "ok": True,
        "name": ready.config.name,
        "domains": [{"name": d.name, **d.report.to_json()} for d in ready.domains],
        "memory_gib": ready.memory.total_gib,
        "host_memory_gib": ready.memory.host_gib,
        "training_hours": estimate.seconds / 3600 if estimate else None,
        "notes": [*ready.notes, *resources],
    }
