"""What the search's model has learned of a stored study: the insight of the page, kept beside it.

The model is the searcher's own, made of the same trials by the same functions. Fitting and reading it costs seconds and
loads torch, so the insight is kept as `insight.json` under a digest of everything it was made of; whatever does not
match, or cannot be read, is made again.
"""

import hashlib
import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from duet_ray.errors import DuetError
from duet_ray.files import write_json
from duet_ray.records import Point, Trial
from duet_ray.report.summary import StudySummary, base_trial, chosen_trial, is_whole, searched
from duet_ray.report.wording import plural
from duet_ray.search.insight import Insight, insight
from duet_ray.search.proposer import Proposer
from duet_ray.search.simplex import SimplexSpace
from duet_ray.search.told import Told, metric_losses, told_of, told_of_run

FILE = "insight.json"
VERSION = 1
"""Of what is computed: raised when the same study would have another insight."""
FEWEST = 3
"""Observations; with fewer there is nothing to learn from."""


@dataclass(frozen=True, kw_only=True)
class Learned:
    """An insight, or why there is none."""

    insight: Insight | None
    why_not: str = ""


def learned(summary: StudySummary, folder: Path) -> Learned | None:
    """The insight of a study in its folder; None for a summary that no store has made."""
    if summary.config is None:
        return None
    told = told_from(summary)
    if len(told) < FEWEST:
        there = f"there {'is' if len(told) == 1 else 'are'} {plural(len(told), 'observation')}"
        return Learned(insight=None, why_not=f"A model of the ratios needs at least {FEWEST} observations; {there}.")
    try:
        digest = _digest(summary, told)
        if (kept := _kept(folder / FILE, digest)) is not None:
            return Learned(insight=kept)
        found = insight_of(summary)
    except DuetError as error:
        return Learned(insight=None, why_not=f"No model could be made of the observations: {error}")
    write_json(folder / FILE, {"digest": digest, "insight": found.to_json()})
    return Learned(insight=found)


def insight_of(summary: StudySummary) -> Insight:
    """Fit the study's model to all its trials and past runs, and read it.

    Raises:
        DuetError: there is no observation yet, or the study's data no longer fit its bounds.
    """
    config = summary.config
    assert config is not None, "a stored study has a config"
    n_train = _n_train(summary)
    space = SimplexSpace.of(config, n_train)
    proposer = Proposer.of(config, space, n_train, _base_losses(summary))
    return insight(proposer, told_from(summary), direction=summary.direction, recommended=_recommended(summary))


def told_from(summary: StudySummary) -> list[Told]:
    """Everything that the study's search knows now: its trials in order of number, then past runs."""
    config = summary.config
    assert config is not None, "a stored study has a config"
    trials = [told_of(trial, config) for trial in searched(summary)]
    return [*(one for one in trials if one is not None), *(told_of_run(run, config) for run in summary.past_runs)]


def _recommended(summary: StudySummary) -> Point | None:
    chosen: Trial | None = chosen_trial(summary)
    return chosen.point if chosen is not None and chosen.ratio is not None and is_whole(chosen) else None


def _n_train(summary: StudySummary) -> list[int]:
    by_name = {domain.name: domain.n_train for domain in summary.domains}
    if missing := [name for name in summary.domain_names if name not in by_name]:
        raise DuetError(f"the store does not say how many rows there are of {', '.join(missing)}")
    return [by_name[name] for name in summary.domain_names]


def _base_losses(summary: StudySummary) -> Mapping[str, float]:
    base, config = base_trial(summary), summary.config
    if base is None or config is None:
        return {}
    found = [metric_losses(sample, config) for sample in base.samples]
    return {name: statistics.fmean(f[name] for f in found if name in f) for name in {n for f in found for n in f}}


def _digest(summary: StudySummary, told: list[Told]) -> str:
    config, recommended = summary.config, _recommended(summary)
    assert config is not None, "a stored study has a config"
    parts: dict[str, Any] = {
        "version": VERSION,
        "seed": config.seed,
        "search": config.search.model_dump(mode="json"),
        "domains": [domain.model_dump(mode="json") for domain in config.domains],
        "mixture": config.mixture.model_dump(mode="json"),
        "training": config.training.model_dump(mode="json") if config.search.also else None,
        "n_train": _n_train(summary),
        "direction": summary.direction.value,
        "recommended": asdict(recommended) if recommended is not None else None,
        "told": [asdict(one) for one in told],
        "libraries": {name: version(name) for name in ("botorch", "gpytorch", "torch")},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _kept(path: Path, digest: str) -> Insight | None:
    """The insight in a file, if it is sound and of the same digest."""
    try:
        data = json.loads(path.read_bytes())
        return Insight.from_json(data["insight"]) if data["digest"] == digest else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
