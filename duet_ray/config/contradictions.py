"""Keys that are sound each, and not together, or of which one cannot have the effect that it asks for.

Nothing in a study file is accepted and ignored where that could cost somebody a night: what cannot work together is
refused before anything starts, all of it at once. Each function yields (path, message).
"""

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence

from pydantic import ValidationError

from duet_ray.config.sections import (
    AlsoConfig,
    LmEvalConfig,
    SamplingConfig,
    StudyConfig,
    TrainingConfig,
    ZeroConfig,
    n_finishing,
)
from duet_ray.errors import ConfigError, RatioError
from duet_ray.linear import parse_constraints
from duet_ray.records import Direction
from duet_ray.requirements import parse_requirement


def contradictions(config: StudyConfig) -> Iterator[tuple[str, str]]:
    """Keys that are sound each, and not together: (path, message)."""
    sampling, training = config.sampling, config.training
    least = sampling.k_bounds[0] if sampling.k == "auto" else sampling.k
    if sampling.min_samples > least:
        where = "the lower end of sampling.k_bounds" if sampling.k == "auto" else "sampling.k"
        yield "sampling.min_samples", f"must be <= {where} = {least}, got {sampling.min_samples}"
    yield from _contradictions_at_scale(config)
    micro = training.micro_batch_size
    if micro is not None and training.batch_size % micro:
        yield "training.micro_batch_size", f"must divide training.batch_size = {training.batch_size}, got {micro}"
    yield from _selection_contradictions(config)
    yield from _search_contradictions(config)
    yield from _objective_contradictions(config)
    kinds = [config.feedback, *config.also]
    for index, feedback in enumerate(kinds):
        if feedback.kind == "heldout_loss" and feedback.metric == "accuracy":
            path = "feedback" if index == 0 else f"also[{index - 1}]"
            if feedback.format != "multiple_choice":
                yield f"{path}.metric", f"accuracy needs format: multiple_choice, got {feedback.format}"
            if feedback.direction is not Direction.MAXIMIZE:
                yield f"{path}.direction", "accuracy is to be maximized, got minimize"
        if feedback.kind == "lm_eval":
            yield from _task_contradictions(feedback, "feedback" if index == 0 else f"also[{index - 1}]")


def _task_contradictions(feedback: LmEvalConfig, path: str) -> Iterator[tuple[str, str]]:
    """Settings by task: each names a task that is there, and every task has its metric."""
    known = f"tasks here: {', '.join(feedback.tasks)}"
    by_task = [("rows", feedback.rows), ("metric", feedback.metric if isinstance(feedback.metric, dict) else {})]
    for key, named in by_task:
        for task in named:
            if task not in feedback.tasks:
                yield f"{path}.{key}.{task}", f"there is no such task; {known}"
    if isinstance(feedback.metric, dict) and (without := [t for t in feedback.tasks if t not in feedback.metric]):
        yield f"{path}.metric", f"has none for {', '.join(without)}: give one metric for all tasks, or one for each"


def _contradictions_at_scale(config: StudyConfig) -> Iterator[tuple[str, str]]:
    """Samples that race, or train in one pass, or are trained by several workers."""
    sampling, training, fleet = config.sampling, config.training, config.fleet
    racing = sampling.racing
    if sampling.k != "auto" and sampling.k_bounds != SamplingConfig.model_fields["k_bounds"].default:
        yield "sampling.k_bounds", f"is read with sampling.k: auto, not with {sampling.k}: remove it"
    if racing is not None:
        if sampling.k == "auto":
            yield (
                "sampling.racing",
                "needs a number as sampling.k: with auto a ratio's samples are not trained together",
            )
        elif sampling.k == 1:
            yield "sampling.racing", "needs sampling.k > 1: one sample has nobody to race with"
        elif sampling.min_samples > (n := n_finishing(sampling.k, racing)):
            message = f"must be <= {n}, the samples that sampling.racing leaves, got {sampling.min_samples}"
            yield "sampling.min_samples", message
        if racing.limit is not None and not hasattr(config.feedback, "limit"):
            yield "sampling.racing.limit", f"feedback.kind: {config.feedback.kind} has no limit: remove it"
        limit = getattr(config.feedback, "limit", None)
        if racing.limit is not None and limit is not None and racing.limit >= limit:
            yield "sampling.racing.limit", f"must be < feedback.limit = {limit}, or comparing saves nothing"
    if training.method == "lora" and training.zero != ZeroConfig():
        yield "training.zero", "is read by training.method: full, not by lora: remove it"
    if training.method == "full" and config.selection.method in ("uniform", "logdet", "coreset"):
        for key in ("rank", "alpha", "dropout", "target_modules"):
            if getattr(training, key) != TrainingConfig.model_fields[key].default:
                yield f"training.{key}", "is of an adapter, and nothing here trains one: remove it"
    if training.fuse != "auto" and training.fuse > 1:
        if training.method != "lora":
            yield "training.fuse", f"only adapters train in one pass, not training.method: {training.method}; remove it"
        if fleet.workers_per_group > 1:
            yield "training.fuse", f"must be 1 with fleet.workers_per_group = {fleet.workers_per_group}"
        if training.fuse > sampling.k_most:
            yield "training.fuse", f"must be <= sampling.k = {sampling.k_most}, got {training.fuse}"
    if fleet.workers_per_group > 1 and 0 < fleet.gpus_per_worker < 1:
        message = (
            f"must be 0 or >= 1 with fleet.workers_per_group = {fleet.workers_per_group}, got {fleet.gpus_per_worker:g}"
        )
        yield "fleet.gpus_per_worker", f"{message}: NCCL takes no two processes on one GPU"
    if fleet.groups_at_start > fleet.groups:
        yield "fleet.min_groups", f"must be <= fleet.groups = {fleet.groups}, got {fleet.min_groups}"
    if fleet.workers_per_group > training.batch_size:
        yield (
            "fleet.workers_per_group",
            f"must be <= training.batch_size = {training.batch_size}, got {fleet.workers_per_group}",
        )


def _selection_contradictions(config: StudyConfig) -> Iterator[tuple[str, str]]:
    selection = config.selection
    compares = {"influence", "less", "tracin", "remove_harmful", "top_n", "indicators"}
    if selection.method in compares and config.data.validation_fraction == 0 and selection.examples is None:
        yield "data.validation_fraction", f"must be > 0 with selection.method: {selection.method}, got 0"
    if selection.examples is not None and selection.method != "indicators":
        yield "selection.examples", f"is read by selection.method: indicators, not by {selection.method}"
    if selection.n_exact_rows is not None and selection.method not in compares - {"indicators"}:
        yield "selection.n_exact_rows", f"{selection.method} scores no rows that could be predicted: remove it"
    if selection.surrogate is not None and selection.method in ("uniform", "logdet", "coreset"):
        yield "selection.surrogate", f"{selection.method} fine-tunes no model: remove it"
    if config.mixture.replacement and selection.method in ("top_n", "logdet", "coreset"):
        yield "mixture.replacement", f"must be false with selection.method: {selection.method}, which orders rows"
    if selection.fit.given and selection.method in ("uniform", "logdet", "coreset", "indicators"):
        yield "selection.fit", f"{selection.method} fine-tunes no model: remove it"
    if selection.fit.target_modules is not None and selection.target_modules is not None:
        yield "selection.fit.target_modules", "says the same as selection.target_modules: remove one of them"
    if len(set(selection.indicators)) < len(selection.indicators):
        yield "selection.indicators", "each indicator stands at most once"


SEARCHABLE: tuple[str, ...] = (
    "rank",
    "alpha",
    "dropout",
    "target_modules",
    "layers",
    "learning_rate",
    "schedule",
    "warmup_ratio",
    "epochs",
    "batch_size",
    "max_grad_norm",
    "weight_decay",
    "loss_on",
)
"""The keys of `training` that `search.also` may search: nothing that changes how a model is handed over."""
_OF_AN_ADAPTER = ("rank", "alpha", "dropout", "target_modules", "layers")


def _search_contradictions(config: StudyConfig) -> Iterator[tuple[str, str]]:
    search, mixture = config.search, config.mixture
    names = config.domain_names
    if search.beta == "theory" and search.acquisition != "lcb":
        yield "search.beta", f"theory is the factor of search.acquisition: lcb, not of {search.acquisition}"
    if search.beta == "theory" and search.kernel not in ("se", "matern"):
        yield "search.beta", f"theory is about kernels of unit variance: set search.kernel: se, not {search.kernel}"
    if mixture.max_repeats is not None and mixture.when_short != "repeat":
        yield "mixture.max_repeats", f"is read with when_short: repeat, not with {mixture.when_short}: remove it"
    if isinstance(search.prior, dict):
        yield from _prior_contradictions(search.prior, names)
    for index, text in enumerate(search.constraints):
        try:
            parse_constraints([text], names)
        except ConfigError as error:
            yield f"search.constraints[{index}]", "; ".join(problem.message for problem in error.problems)
    if search.optimize == "data" and search.also:
        yield "search.optimize", "must be both or model with search.also: data searches the ratio alone"
    if search.optimize != "data" and not search.also:
        yield "search.also", f"is required with search.optimize: {search.optimize}: name the settings to search"
    for path, values in search.also.items():
        yield from _also_contradictions(config, path, values)
    if search.fidelity is not None and search.fidelity.rows[0] * mixture.n_rows < 1:
        yield "search.fidelity.rows", f"{search.fidelity.rows[0]:g} of mixture.n_rows = {mixture.n_rows} is no row"
    if search.prior is not None and search.n_start == 1 and search.optimize != "model":
        yield "search.n_start", "must be >= 2 with search.prior: the first ratio is the uniform one"
    if search.noise == "theory" and config.sampling.k == 1:
        yield "search.noise", "theory needs sampling.k > 1: one sample a ratio says nothing of the noise"
    if search.recommend == "anywhere" and search.objective is not None and not search.objective.weights:
        yield "search.recommend", "anywhere is of one number: it cannot stand beside search.objective pareto or require"
    if config.confirm.finalists == 0:
        if search.recommend == "anywhere":
            yield "search.recommend", "anywhere needs confirm.finalists > 0: its ratio is trained to confirm it"
        if config.confirm.limit is not None:
            yield "confirm.limit", "is read with confirm.finalists > 0: remove it"
    limit = getattr(config.feedback, "limit", None)
    if config.confirm.limit is not None and limit is None:
        if not hasattr(config.feedback, "limit"):
            yield "confirm.limit", f"feedback.kind: {config.feedback.kind} has no limit: remove it"
        else:
            yield "confirm.limit", "the feedback has no limit, so it looks at everything already: remove it"
    elif config.confirm.limit is not None and limit is not None and config.confirm.limit < limit:
        yield "confirm.limit", f"must be >= feedback.limit = {limit}: a confirmation looks closer, not less closely"


def _prior_contradictions(prior: Mapping[str, float], names: Sequence[str]) -> Iterator[tuple[str, str]]:
    for name in prior:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
            hint = f"did you mean `{close[0]}`?" if close else f"domains here: {', '.join(names)}"
            yield f"search.prior.{name}", f"there is no such domain; {hint}"
    if any(share < 0 for share in prior.values()):
        yield "search.prior", f"shares must be >= 0, got {list(prior.values())}"
    elif abs(math.fsum(prior.values()) - 1) > 0.01:
        yield "search.prior", f"shares must sum to 1 (domains left out have 0), got {math.fsum(prior.values()):g}"


def _also_contradictions(config: StudyConfig, path: str, values: AlsoConfig) -> Iterator[tuple[str, str]]:
    """Whether the setting may be searched, and the study file could hold each of the values."""
    key, field = f"search.also.{path}", path.removeprefix("training.")
    known = [f"training.{name}" for name in SEARCHABLE]
    if path not in known:
        close = difflib.get_close_matches(path, known, n=1, cutoff=0.6)
        hint = f"did you mean `{close[0]}`?" if close else f"known here: {', '.join(known)}"
        yield key, f"cannot be searched; {hint}"
        return
    if config.training.method == "full" and field in _OF_AN_ADAPTER:
        yield key, "is of an adapter, and training.method: full trains none: remove it"
        return
    if field == "loss_on" and config.training.loss_on == "all":
        yield key, "needs training.loss_on: completion as the study's own, from which the other can be made"
    training = config.training.model_dump(mode="json")
    ends = values.choices or values.range or values.log or ()
    if values.choices is None and not isinstance(training[field], int | float):
        yield key, "has no range: give choices"
        return
    is_sound = True
    for value in ends:
        try:
            read = TrainingConfig.model_validate({**training, field: value}, strict=None).model_dump(mode="json")[field]
        except ValidationError as error:
            yield key, f"{value!r} is no value of it: {error.errors()[0]['msg'].replace('Input should', 'it should')}"
            is_sound = False
        else:
            if isinstance(value, bool) or (isinstance(value, str) and not isinstance(read, str)):
                yield key, f"{value!r} must be written as {read!r}"
                is_sound = False
    if not is_sound:
        return
    micro = config.training.micro_batch_size
    if field == "batch_size" and micro is not None and any(int(value) % micro for value in ends):
        yield key, f"every value must be a multiple of training.micro_batch_size = {micro}"
    elif field == "batch_size" and micro is not None and micro > 1 and values.choices is None:
        yield key, f"has values that training.micro_batch_size = {micro} does not divide: give choices"
    if field == "batch_size" and min(map(int, ends)) < config.fleet.workers_per_group:
        yield key, f"every value must be >= fleet.workers_per_group = {config.fleet.workers_per_group}"


def _objective_contradictions(config: StudyConfig) -> Iterator[tuple[str, str]]:
    objective = config.search.objective
    if objective is None:
        return
    metrics = [feedback.metric_key for feedback in (config.feedback, *config.also)]
    known = f"metrics here: {', '.join(metrics)}"
    if objective.weights is not None and objective.pareto is not None:
        yield "search.objective.pareto", "cannot stand beside weights: a sum has a best, a front has none"
    if not (objective.weights or objective.pareto or objective.require):
        yield "search.objective", "needs weights, pareto or require; without any of them remove it"
    for where, named in (("weights", objective.weights or {}), ("pareto", objective.pareto or [])):
        for name in named:
            if name not in metrics:
                yield f"search.objective.{where}", f"there is no metric {name!r}; {known}"
    if objective.pareto and len(set(objective.pareto)) < len(objective.pareto):
        yield "search.objective.pareto", "each metric stands at most once"
    if objective.weights and not all(weight > 0 for weight in objective.weights.values()):
        yield "search.objective.weights", "must be > 0: each metric has a direction of its own"
    directions = {feedback.metric_key: feedback.direction for feedback in (config.feedback, *config.also)}
    for index, text in enumerate(objective.require):
        path = f"search.objective.require[{index}]"
        try:
            required = parse_requirement(text, metrics)
        except RatioError as error:
            yield path, str(error)
        else:
            direction = directions[required.metric]
            if (required.sense == ">=") != (direction is Direction.MAXIMIZE):
                wanted = f"direction: {direction}"
                yield path, f"{text!r} asks for a worse value than it names ({wanted}); turn the sign round"
    if twice := sorted({name for name in metrics if metrics.count(name) > 1}):
        yield "also", f"metrics of search.objective need names of their own, {', '.join(twice)} stands more than once"
    if (objective.pareto or objective.require) and config.search.acquisition != "qlognei":
        what = "a front" if objective.pareto else "a requirement"
        yield (
            "search.acquisition",
            f"must be qlognei with {what} (search.objective), got {config.search.acquisition}",
        )
    if config.search.fidelity is not None and (objective.pareto or objective.require):
        yield "search.fidelity", "cannot stand beside search.objective with pareto or require"
