"""Everything that can be known before anything is trained, in seconds rather than after an hour.

`duet validate` prints it; `duet run` does the same checks and goes on with what they made: prepared domains, the
space of ratios, the keys of the weights, and a study file with every `auto` resolved once.
"""

import hashlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from duet_ray.config import StudyConfig
from duet_ray.domains import Domain, Overlap, find_overlap, prepare_domains
from duet_ray.errors import ConfigError, DataError, DataErrors, DuetError, Problem, ResourceError
from duet_ray.feedback import make_feedback
from duet_ray.kept_models import KeptModels
from duet_ray.search import SimplexSpace
from duet_ray.selection import (
    RowWeights,
    SelectionContext,
    load_weights,
    method_of,
    model_identity,
    n_drawable,
    save_weights,
    select,
    weights_key,
)
from duet_ray.selection.examples import read_examples
from duet_ray.training import check_installed, load_tokenizer
from duet_ray.training.estimate import (
    GIB,
    MemoryEstimate,
    estimate_memory,
    memory_problem,
    resolved_fuse,
    resolved_micro_batch,
)
from duet_ray.training.searched import common_batch_size

OnStage = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """A study that is ready to run."""

    config: StudyConfig
    """With every `auto` resolved."""
    domains: list[Domain]
    scoring_domains: list[Domain]
    """The same rows, tokenised for the model that scores them; the same objects where that is the study's model."""
    overlaps: list[Overlap] | None
    """None where the task's text is not at hand, or nobody wants to know."""
    space: SimplexSpace
    memory: MemoryEstimate
    weights_folder: Path
    weights_keys: tuple[str, ...]
    inputs: dict[str, Any]
    """Fingerprints of what the study is made of: a resume with others is refused."""
    notes: tuple[str, ...]
    """Things the user should know, none of which stops the study."""

    @property
    def unscored(self) -> list[int]:
        """Domains without stored weights."""
        return [i for i, key in enumerate(self.weights_keys) if load_weights(self.weights_folder, key) is None]

    def weights(self) -> list[RowWeights | None]:
        return [load_weights(self.weights_folder, key) for key in self.weights_keys]


def preflight(
    config: StudyConfig,
    *,
    known: Mapping[str, Any] = MappingProxyType({}),
    on_stage: OnStage = lambda _: None,
    keeps_models: bool = True,
) -> Preflight:
    """Check a study and make its data ready.

    Args:
        known: what `auto` stood for when the study was started: it stands for that as long as the study lives.
        on_stage: told what is being done.
        keeps_models: models are to be written, so the place for them is tried.

    Raises:
        DuetError: the first kind of trouble, with all of that kind: the model, the task, the data, the ratio's bounds.
    """
    check_installed(config.training)
    if keeps_models:
        KeptModels.of(config).check()
    on_stage("reading the model's configuration")
    tokenizer = load_tokenizer(config)
    config, resolved_notes = resolved(config, known)
    memory = estimate_memory(config)
    on_stage("checking the feedback")
    sources = [make_feedback(config), *(make_feedback(config, which) for which in config.also)]
    notes = [*resolved_notes, *(note for source in sources for note in source.check())]
    on_stage("reading the domains")
    domains = prepare_domains(config, tokenizer, on_progress=lambda name, n: on_stage(f"reading {name}: {n:,} rows"))
    overlaps, overlap_notes = _overlaps(config, domains, sources[0], on_stage)
    space = SimplexSpace.of(config, [n_drawable(config.selection, len(domain.train)) for domain in domains])
    identity = model_identity(config)
    scoring_domains, scorer = domains, identity
    if config.selection.surrogate is not None:
        on_stage("reading the domains for the surrogate model")
        scoring_domains, scorer = _surrogate_domains(config, domains), model_identity(config.for_scoring)
    read_examples(config, tokenizer)
    keys = tuple(weights_key(domain, config, scorer) for domain in scoring_domains)
    weights_folder = config.resolve_path(config.storage) / "cache"
    _weigh_without_model(config, domains, weights_folder, keys)
    if problem := memory_problem(config, memory):
        notes.append(problem)
    _check_disk(config, memory)
    notes += [
        f"{d.name}: {d.report.n_bad} bad rows left out, the first: {d.report.bad[0]}" for d in domains if d.report.bad
    ]
    notes += [f"{d.name}: {d.report.n_duplicates} duplicate rows" for d in domains if d.report.n_duplicates]
    return Preflight(
        config=config,
        domains=domains,
        scoring_domains=scoring_domains,
        overlaps=overlaps,
        space=space,
        memory=memory,
        weights_folder=weights_folder,
        weights_keys=keys,
        inputs={
            "model": identity,
            "domains": {domain.name: domain.fingerprint for domain in domains},
            "task": _task_digest(config),
        },
        notes=(*notes, *overlap_notes),
    )


RESOLVED = ("training.micro_batch_size", "training.fuse")
"""What `auto` and null are replaced by something, once in a study's life."""


def resolved(config: StudyConfig, known: Mapping[str, Any] = MappingProxyType({})) -> tuple[StudyConfig, list[str]]:
    """The study with every `auto` replaced by what it stands for, and what there is to say of it.

    Raises:
        ConfigError: what it stood for at the start does not go with the fleet of today.
    """
    training = config.training
    found: dict[str, Any] = {}
    notes: list[str] = []
    if training.micro_batch_size is None:
        found["micro_batch_size"] = resolved_micro_batch(common_batch_size(config))
    if training.fuse == "auto":
        if "training.fuse" in known:
            found["fuse"] = known["training.fuse"]
            if found["fuse"] > 1 and config.fleet.workers_per_group > 1:
                message = f"must stay 1: training.fuse: auto was {found['fuse']} when this study was started"
                raise ConfigError([Problem(path="fleet.workers_per_group", message=message)])
        else:
            found["fuse"], notes = resolved_fuse(config)
    if found:
        folder = config.folder
        config = config.model_copy(update={"training": training.model_copy(update=found)}).placed_in(folder)
    return config, notes


def resolved_values(config: StudyConfig) -> dict[str, Any]:
    """Of a resolved study, the values of `RESOLVED`."""
    return {path: getattr(config.training, path.removeprefix("training.")) for path in RESOLVED}


def _check_disk(config: StudyConfig, memory: MemoryEstimate) -> None:
    """Room for the models that are kept and those in the making.

    Raises:
        ResourceError: says need and have.
    """
    folder = config.resolve_path(config.storage)
    folder.mkdir(parents=True, exist_ok=True)
    n_models = config.keep_best + config.confirm.finalists + config.fleet.groups + config.sampling.k_most
    # An adapter is float32, a whole model has the base's type.
    full = config.training.method == "full"
    what, width = ("models", 2 if config.model.dtype == "bfloat16" else 4) if full else ("adapters", 4)
    n_bytes = width * memory.n_trained * n_models
    if n_states := _n_states(config):
        what += f" and the states of {n_states} trainings"
        n_bytes += 12 * memory.n_trained * n_states  # float32 weights, and Adam's two moments of each
    need, free = n_bytes / GIB + 0.1, shutil.disk_usage(folder).free / GIB
    if free < need:
        raise ResourceError(
            f"storage: {n_models} {what} need {need:.1f} GiB and {folder} has {free:.1f} GiB free; "
            f"make room, lower keep_best, or choose another storage"
        )


def _n_states(config: StudyConfig) -> int:
    """Trainings that are written down at the same time, at most."""
    if config.sampling.racing is not None:
        return config.sampling.k_most * config.search.concurrent_trials
    fuse = config.training.fuse
    n_at_once = config.fleet.groups * (fuse if fuse != "auto" else 1)
    return n_at_once if config.training.checkpoint_minutes is not None else 0


def _overlaps(
    config: StudyConfig, domains: list[Domain], feedback: Any, on_stage: OnStage
) -> tuple[list[Overlap] | None, list[str]]:
    if config.data.overlap == "off":
        return None, []
    texts = list(feedback.task_texts())
    if not texts:
        return None, []
    on_stage("looking for the task's text in the training rows")
    overlaps = find_overlap(domains, texts)
    found = [
        f"{o.domain}: {o.n_overlapping_rows} of {o.n_rows} training rows overlap with the task, e.g. {o.examples[0]}"
        for o in overlaps
        if o.n_overlapping_rows
    ]
    if found and config.data.overlap == "error":
        raise DataErrors([DataError(f"{line}; remove them, or set data.overlap: warn") for line in found])
    return overlaps, found


def _surrogate_domains(config: StudyConfig, domains: list[Domain]) -> list[Domain]:
    """The domains as the surrogate's tokenizer has them, row for row the same.

    Raises:
        ConfigError: the surrogate cannot be loaded, or rows that are sound for one tokenizer are not for the other.
    """
    scoring = config.for_scoring
    try:
        found = prepare_domains(scoring, load_tokenizer(scoring))
    except ConfigError as error:
        moved = [replace(p, path=f"selection.surrogate{p.path.removeprefix('model')}") for p in error.problems]
        raise ConfigError(moved) from error
    unlike = [d.name for d, s in zip(domains, found, strict=True) if not d.train.same_rows(s.train)]
    if unlike:
        message = (
            f"{', '.join(unlike)}: not the same rows as for the study's model, since some are empty or cut off for one "
            "tokenizer alone; raise training.max_tokens, or choose a surrogate with the study's tokenizer"
        )
        raise ConfigError([Problem(path="selection.surrogate", message=message)])
    return found


def _weigh_without_model(config: StudyConfig, domains: list[Domain], folder: Path, keys: tuple[str, ...]) -> None:
    """Methods that need no model are quick, and are done here rather than on the fleet."""
    if method_of(config.selection).needs_model:
        return

    def no_model() -> tuple[Any, Any]:
        raise AssertionError("this method needs no model")

    context = SelectionContext(
        settings=config.selection, training=config.training, seed=config.seed, load_base=no_model
    )
    for domain, key in zip(domains, keys, strict=True):
        if load_weights(folder, key) is None:
            save_weights(folder, key, select(domain, context))


def _task_digest(config: StudyConfig) -> str | None:
    """SHA-256 of the task's own files, where there are any: another task is another study.

    These are `file`, everything under `tasks_folder`, and the module of `function` where it lies beside the study file.
    """
    feedback = config.feedback
    files: list[Path] = []
    if feedback.kind == "heldout_loss":
        files = [config.resolve_path(feedback.file)]
    elif feedback.kind == "lm_eval" and feedback.tasks_folder is not None:
        files = sorted(p for p in config.resolve_path(feedback.tasks_folder).rglob("*") if p.is_file())
    elif feedback.kind == "function":
        module = config.folder / (feedback.function.split(":")[0].replace(".", "/") + ".py")
        files = [module] if module.is_file() else []
    if not files:
        return None
    digest = hashlib.sha256()
    try:
        for file in files:
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    except OSError as error:
        raise DuetError(f"feedback: {error.filename} cannot be read: {error.strerror}") from None
    return digest.hexdigest()[:16]
