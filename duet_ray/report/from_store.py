"""A study's store → the `StudySummary` that everything in this folder reads. Safe while a driver writes."""

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from duet_ray.config import StudyConfig, config_from
from duet_ray.errors import StoreError
from duet_ray.report.summary import DomainSummary, StudySummary
from duet_ray.store import open_folder, open_store


def read_summary(folder: Path, config: StudyConfig | None = None) -> StudySummary:
    """Read the study in a folder.

    Args:
        config: the study file, whose `store` says where the study is kept; without one the folder says so.

    Raises:
        StoreError: there is no study in the folder, or it has not started.
    """
    store = open_folder(folder) if config is None else open_store(folder, config.store)
    try:
        record = store.study()
        trials, posterior = store.trials(), store.posterior()
        (ranking, _), past_runs = store.ranking(), store.past_runs()
    finally:
        store.close()
    if record is None:
        raise StoreError(f"{folder}: the study has not started yet")
    config = config_from(record.config, folder=Path(record.inputs.get("folder", folder)))
    feedback, objective = config.feedback, config.search.objective
    return StudySummary(
        name=record.name,
        direction=config.direction,
        domain_names=config.domain_names,
        n_rows=config.mixture.n_rows,
        k=config.sampling.k_most,
        n_planned=config.n_planned_trials,
        feedback_name="weighted sum" if objective is not None and objective.weights else feedback.shown_name,
        trials=tuple(trials),
        domains=tuple(_domain(domain) for domain in record.domains),
        config_yaml=yaml.safe_dump(record.config, sort_keys=False, allow_unicode=True, width=110),
        started=datetime.fromtimestamp(record.created),
        seconds=record.seconds or None,
        versions=record.versions,
        model_path=config.model_path,
        feedback_is_random=feedback.kind == "function" or bool(getattr(feedback, "temperature", None)),
        posterior=posterior,
        ranking=tuple(ranking),
        past_runs=tuple(past_runs),
        k_bounds=config.sampling.k_bounds if config.sampling.k == "auto" else None,
        config=config,
    )


def _domain(record: Mapping[str, Any]) -> DomainSummary:
    """One domain as another version of duet_ray may have stored it: with keys missing, or with some of its own."""
    known = {name: record[name] for name in DomainSummary.__dataclass_fields__ if name in record}
    return DomainSummary(**{**known, "notes": tuple(record.get("notes", ()))})
