"""`duet validate`: find in seconds what would otherwise fail after an hour."""

import math
from typing import Annotated, Any

import typer
from rich.table import Table

from duet_ray.budget import cheapest
from duet_ray.cli.console import AsJson, Overrides, StudyFile, open_study, out, print_json, say
from duet_ray.cli.live import LogWatcher
from duet_ray.config import AlsoConfig, StudyConfig


def command(
    study: StudyFile,
    set_: Overrides = None,
    as_json: AsJson = False,
    offline: Annotated[
        bool, typer.Option("--offline", help="Only what needs no hub, network or device; says what was not checked.")
    ] = False,
) -> None:
    """Read every source, check the task, the model, the memory and the resources."""
    opened = open_study(study, set_)
    if offline:
        _offline(opened.config, as_json)
        return
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
    for line in _plan(config):
        say(f"plan: {line}")
    say(f"time: {estimate.describe()}" if estimate else "time: not known, since what it will run on is not here")
    say(f"{config.name} is ready: duet run {study}")


def _offline(config: StudyConfig, as_json: bool) -> None:
    from duet_ray.offline import check_offline

    found = check_offline(config)
    if as_json:
        print_json(
            {
                "ok": True,
                "name": config.name,
                "plan": _plan(config),
                "checked": list(found.checked),
                "not_checked": list(found.not_checked),
            }
        )
        return
    for line in found.checked:
        say(f"checked: {line}")
    for line in _plan(config):
        say(f"plan: {line}")
    for line in found.not_checked:
        say(f"not checked: {line}")
    say(f"{config.name} is well-formed; `duet validate` without --offline checks the rest where the hub can be reached")


def _plan(config: StudyConfig) -> list[str]:
    """How many trainings the study is, and what is searched beside the ratio."""
    search, sampling = config.search, config.sampling
    k, trials = str(sampling.k), f"({search.n_start} start ratios + {search.n_trials} Bayesian trials)"
    at_most = ""
    if sampling.k == "auto":
        k, at_most = f"{sampling.k_bounds[0]} to {sampling.k_bounds[1]}", "at most "
    n_samples = config.n_planned_trials * sampling.k_most
    lines = [
        f"{trials} × k = {k} make {at_most}{n_samples} trainings of {config.mixture.n_rows} rows, "
        f"{config.fleet.groups} at a time"
    ]
    if search.fidelity is not None:
        shares = ", ".join(f"{share:g}" for share in search.fidelity.rows)
        most = 1 + math.floor((config.n_planned_trials - 1) / cheapest(config) + 1e-9)
        lines.append(
            f"cheap trials train on {shares} of these rows and count as much of one: there may be up to {most} trials"
        )
    if search.also:
        what = "searched at one ratio" if search.optimize == "model" else "searched with the ratio"
        lines.append(f"{what}: {', '.join(f'{path} {_said(values)}' for path, values in search.also.items())}")
    return lines


def _said(values: AlsoConfig) -> str:
    if values.choices is not None:
        return " or ".join("all" if choice is None else str(choice) for choice in values.choices)
    low, high = values.log or values.range or (0.0, 0.0)
    return f"{low:g} to {high:g}"


def _resource_problems(config: Any) -> list[str]:
    """What this machine lacks. Only a note: the study may run on a cluster."""
    import os

    import torch

    from duet_ray.errors import ResourceError
    from duet_ray.execution.ray_session import check_resources

    try:
        check_resources(config, [{"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())}])
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
