"""The study file: a closed schema, read once, with every problem reported at once.

A typo in a YAML file costs a night of GPU time when it is silently ignored, so unknown keys are errors with a
suggestion, every message carries the YAML path and the line, and nothing starts before the whole file is sound.
Keys that are planned but not built yet are refused by name (`LATER`), never accepted and ignored.

All relative paths in a study file are relative to the folder of that file, so that a study gives the same result
from whatever folder it is started.
"""

import difflib
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator, model_validator

from duet_ray.errors import ConfigError, Problem
from duet_ray.records import Direction

SLUG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_SECRET = re.compile(
    r"(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|AKIA[0-9A-Z]{16}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY)"
)

LATER: Mapping[str, str] = {
    "search.also": "searching training settings beside the ratio is not built yet: set them under `training`",
    "search.constraints": "linear constraints over domains are not built yet: use `bounds` on a domain",
    "search.fidelity": "multi-fidelity search is not built yet",
    "search.asynchronous": "asynchronous search is not built yet: use `concurrent_trials`",
    "sampling.racing": "racing is not built yet: every sample runs to its end",
    "training.fuse": "fused LoRA is not built yet: every sample trains in a process of its own",
    "store": "only SQLite in the study's folder is built yet: remove `store`",
}
"""Keys of later versions: refused with a reason, so that nobody thinks they had an effect."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, protected_namespaces=())


class ModelConfig(Section):
    path: str = Field(min_length=1, description="local folder or hub id of a causal language model")
    revision: str | None = Field(None, description="hub revision (a commit) to pin")
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="type of the frozen base weights")
    trust_remote_code: bool = Field(False, description="run code that comes with the model")
    chat_template: Literal["auto", "none"] = Field(
        "auto", description="auto: use the tokenizer's chat template, if any"
    )


DataFormat = Literal["prompt_completion", "messages", "alpaca", "sharegpt", "text"]


class DomainConfig(Section):
    name: str
    source: str | list[str] = Field(description="file, glob, several of them, or hf:owner/name")
    subset: str | None = Field(None, description="hub only: configuration name")
    split: str = Field("train", description="hub only: split to train on")
    revision: str | None = Field(None, description="hub only: revision to pin")
    format: DataFormat = "prompt_completion"
    columns: dict[str, str] = Field(default_factory=dict, description="our column -> the column in your file")
    bounds: tuple[float, float] = Field((0.0, 1.0), description="smallest and largest share of the mixture")

    @field_validator("name")
    @classmethod
    def _slug(cls, name: str) -> str:
        return slug(name)

    @field_validator("bounds")
    @classmethod
    def _ordered(cls, bounds: tuple[float, float]) -> tuple[float, float]:
        if not (0 <= bounds[0] <= bounds[1] <= 1 and bounds[1] > 0):
            raise ValueError(f"must be 0 <= low <= high <= 1 with high > 0, got {list(bounds)}")
        return bounds

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,) if isinstance(self.source, str) else tuple(self.source)


class DataConfig(Section):
    validation_fraction: float = Field(0.1, ge=0, lt=0.5, description="share of every domain held out for selection")
    max_bad_rows: int | float = Field(
        0.01, ge=0, description="per domain: a number of rows (1, 2, …) or a share (0.01); more is an error"
    )
    overlap: Literal["warn", "error", "off"] = Field("warn", description="training rows that stand in the task's text")


class MixtureConfig(Section):
    n_rows: int = Field(10_000, ge=1, description="rows in a mixture (the paper's M)")
    when_short: Literal["cap", "repeat", "error"] = Field(
        "cap", description="a domain smaller than its share: limit the share, repeat rows, or stop"
    )
    replacement: bool = Field(False, description="draw rows with replacement")


class WeightingConfig(Section):
    kind: Literal["shift", "softmax"] = "softmax"
    temperature: float = Field(1.0, gt=0, description="softmax only: lower is sharper; 1 = one standard deviation")


class SelectionConfig(Section):
    method: Literal["uniform", "influence"] = "uniform"
    solver: Literal["ekfac", "cg"] = Field("ekfac", description="influence: how H⁻¹v is computed")
    damping: float = Field(0.1, gt=0, description="influence: added to the Hessian, relative to its mean eigenvalue")
    cg_iterations: int = Field(20, ge=1, description="influence with cg: iteration cap")
    cg_tolerance: float = Field(1e-3, gt=0, description="influence with cg: relative residual to stop at")
    n_fit_rows: int | None = Field(None, ge=1, description="rows to fine-tune a domain's model on; null = all")
    n_hessian_rows: int | None = Field(256, ge=1, description="rows the Hessian is estimated on; null = all")
    epochs: int | None = Field(None, ge=1, description="epochs of a domain's model; null = training.epochs")
    batch_size: int = Field(8, ge=1, description="rows scored at once")
    weighting: WeightingConfig = WeightingConfig()


class SearchConfig(Section):
    n_trials: int = Field(10, ge=0, description="Bayesian trials (the paper's T), after the start design")
    n_start: int = Field(10, ge=1, description="ratios of the start design; the uniform one is the first")
    acquisition: Literal["lcb", "qlognei"] = "lcb"
    beta: float = Field(0.5, ge=0, description="lcb: factor on σ")
    kernel: Literal["se"] = Field("se", description="isotropic squared exponential, maximum likelihood")
    vertices: bool = Field(False, description="the start design includes every domain alone")
    concurrent_trials: int = Field(1, ge=1)


class SamplingConfig(Section):
    k: int = Field(1, ge=1, description="samples per ratio; the observation is the best of them")
    min_samples: int = Field(1, ge=1, description="fewer finished samples than this fail the trial")
    max_retries: int = Field(3, ge=0, description="retries of a sample whose worker died")


class TrainingConfig(Section):
    method: Literal["lora"] = "lora"
    rank: int = Field(16, ge=1)
    alpha: float = Field(32, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    learning_rate: float = Field(1e-4, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup_ratio: float = Field(0.0, ge=0, lt=1)
    epochs: int = Field(1, ge=1)
    batch_size: int = Field(16, ge=1, description="rows per optimizer step")
    micro_batch_size: int | None = Field(None, ge=1, description="rows per forward pass; null = chosen once")
    max_tokens: int = Field(512, ge=8, description="longer rows are cut")
    max_grad_norm: float = Field(1.0, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    loss_on: Literal["completion", "all"] = "completion"
    gradient_checkpointing: bool = False


class FeedbackBase(Section):
    name: str | None = Field(None, description="how it is called in tables")

    @field_validator("name")
    @classmethod
    def _slug(cls, name: str | None) -> str | None:
        return None if name is None else slug(name)


class HeldoutLossConfig(FeedbackBase):
    kind: Literal["heldout_loss"]
    file: str = Field(description="jsonl, json, csv or parquet; relative to the study file")
    format: DataFormat | Literal["multiple_choice"] = "prompt_completion"
    columns: dict[str, str] = Field(default_factory=dict)
    limit: int | None = Field(None, ge=1, description="use the first `limit` rows")
    batch_size: int = Field(8, ge=1)
    metric: Literal["loss", "accuracy"] = Field("loss", description="accuracy: multiple_choice only")
    direction: Direction = Direction.MINIMIZE


class LmEvalConfig(FeedbackBase):
    kind: Literal["lm_eval"]
    tasks: dict[str, float] = Field(min_length=1, description="task name -> weight")
    tasks_folder: str | None = Field(None, description="folder of your own task files (YAML), local data")
    metric: str = Field("acc,none", description="metric,filter as lm-eval prints it")
    direction: Direction
    n_shot: int | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0)
    limit: int | None = Field(None, ge=1)
    batch_size: int = Field(8, ge=1)


class FunctionConfig(FeedbackBase):
    kind: Literal["function"]
    function: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$", description="module:callable(model, tokenizer)")
    arguments: dict[str, Any] = Field(default_factory=dict, description="keyword arguments for the callable")
    direction: Direction


AnyFeedback = Annotated[HeldoutLossConfig | LmEvalConfig | FunctionConfig, Field(discriminator="kind")]


class FleetConfig(Section):
    groups: int = Field(1, ge=1, description="samples trained at the same time")
    workers_per_group: Literal[1] = 1
    gpus_per_worker: float = Field(0, ge=0)
    cpus_per_worker: float = Field(1, gt=0, description="also the threads of a worker")


class ConfirmConfig(Section):
    finalists: int = Field(1, ge=0, description="best ratios to train and measure again; 0 = none")
    repeats: int = Field(2, ge=1, description="fresh seeds per finalist")


class StudyConfig(Section):
    """A whole study file. Field order is the order of the file and of the data's path."""

    name: str
    seed: int = Field(0, ge=0)
    model: ModelConfig
    domains: list[DomainConfig] = Field(min_length=1)
    data: DataConfig = DataConfig()
    mixture: MixtureConfig = MixtureConfig()
    selection: SelectionConfig = SelectionConfig()
    search: SearchConfig = SearchConfig()
    sampling: SamplingConfig = SamplingConfig()
    training: TrainingConfig = TrainingConfig()
    feedback: AnyFeedback
    also: list[AnyFeedback] = Field(default_factory=list, description="measured beside the feedback, shown, never told")
    fleet: FleetConfig = FleetConfig()
    confirm: ConfirmConfig = ConfirmConfig()
    storage: str = "./studies"
    keep_best: int = Field(3, ge=1, description="adapters kept on disk")

    _folder: Path = PrivateAttr(default_factory=Path.cwd)

    @field_validator("name")
    @classmethod
    def _slug(cls, name: str) -> str:
        return slug(name)

    @field_validator("domains")
    @classmethod
    def _sound_domains(cls, domains: list[DomainConfig]) -> list[DomainConfig]:
        names = [d.name for d in domains]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise ValueError(f"domain names must differ, {', '.join(twice)} stands more than once")
        low, high = math.fsum(d.bounds[0] for d in domains), math.fsum(d.bounds[1] for d in domains)
        if low > 1 + 1e-9 or high < 1 - 1e-9:
            raise ValueError(
                f"no ratio fits the bounds: the lower ones sum to {low:g} (must be <= 1), "
                f"the upper ones to {high:g} (must be >= 1)"
            )
        return domains

    @model_validator(mode="after")
    def _sound_together(self) -> Self:
        if self.sampling.min_samples > self.sampling.k:
            raise ValueError(
                f"sampling.min_samples: must be <= sampling.k = {self.sampling.k}, got {self.sampling.min_samples}"
            )
        micro = self.training.micro_batch_size
        if micro is not None and (micro > self.training.batch_size or self.training.batch_size % micro):
            raise ValueError(
                f"training.micro_batch_size: must divide training.batch_size = {self.training.batch_size}, got {micro}"
            )
        if self.selection.method == "influence" and self.data.validation_fraction == 0:
            raise ValueError("data.validation_fraction: must be > 0 with selection.method: influence, got 0")
        return self

    @property
    def direction(self) -> Direction:
        return self.feedback.direction

    @property
    def domain_names(self) -> tuple[str, ...]:
        return tuple(d.name for d in self.domains)

    @property
    def n_planned_trials(self) -> int:
        """Start design and Bayesian trials together."""
        return self.search.n_start + self.search.n_trials

    @property
    def study_folder(self) -> Path:
        return self.resolve_path(self.storage) / self.name

    def resolve_path(self, path: str) -> Path:
        """An absolute path for a path in the study file."""
        return (self._folder / Path(path).expanduser()).resolve()

    @property
    def model_path(self) -> str:
        """The model's local folder if there is one at that path, else the hub id unchanged."""
        local = self.resolve_path(self.model.path)
        return str(local) if local.is_dir() else self.model.path

    def placed_in(self, folder: Path) -> "StudyConfig":
        """The same study, its relative paths taken from `folder`."""
        copy = self.model_copy()
        copy._folder = Path(folder).resolve()
        return copy

    @property
    def folder(self) -> Path:
        """The folder that relative paths are taken from."""
        return self._folder

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)


MAY_CHANGE: tuple[str, ...] = ("fleet", "storage", "keep_best", "confirm", "sampling.max_retries", "search.n_trials")
"""What a resume may change: nothing here alters a ratio or a row. `search.n_trials` may only grow."""


def slug(name: str) -> str:
    if not SLUG.fullmatch(name):
        raise ValueError(f"must be 1 to 64 letters, digits, '-' or '_', starting with a letter or digit, got {name!r}")
    return name


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> StudyConfig:
    """Read a study file.

    Args:
        path: the YAML file.
        overrides: `"search.n_trials=20"` and the like, as `--set` takes them; lists by index (`domains[0].name=a`).

    Raises:
        ConfigError: with every problem found: unknown keys (with a suggestion), wrong types, contradictions.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such study file; `duet init {file}` writes one to start from") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from None
    data, lines = _parse(text, file.name)
    for override in overrides:
        _set(data, override)
    return config_from(data, folder=file.resolve().parent, file=file.name, lines=lines)


def config_from(
    data: Mapping[str, Any], *, folder: Path, file: str | None = None, lines: Mapping[str, int] | None = None
) -> StudyConfig:
    """Check a study given as plain data; `load_config` without the file. Raises `ConfigError` as it does."""
    lines = lines or {}
    problems = [
        Problem(path=p, message=m, file=file, line=_line(lines, p)) for p, m in [*_later(data), *_secrets(data)]
    ]
    later = {p.path for p in problems}
    try:
        config = StudyConfig.model_validate(data)
    except ValidationError as error:
        for item in error.errors():
            where, message = _explain(item, data)
            if where not in later:
                problems.append(Problem(path=where, message=message, file=file, line=_line(lines, where)))
    if problems:
        raise ConfigError(sorted(problems, key=lambda p: (p.line or 0, p.path)))
    return config.placed_in(folder)


def differences(stored: StudyConfig, given: StudyConfig) -> list[str]:
    """What in `given` forbids resuming `stored`: lines like `training.rank: 16 -> 32`; empty when it may resume."""
    old, new = dict(_leaves(stored.model_dump(mode="json"))), dict(_leaves(given.model_dump(mode="json")))
    found = []
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) == new.get(key):
            continue
        if key == "search.n_trials" and new[key] >= old[key]:
            continue
        if key != "search.n_trials" and any(key == m or key.startswith(m + ".") for m in MAY_CHANGE):
            continue
        found.append(f"{key}: {old.get(key)!r} -> {new.get(key)!r}")
    return found


def fingerprint(data: Any) -> str:
    """A short SHA-256 over plain data: equal data, equal fingerprint, on any machine."""
    text = json.dumps(data, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _parse(text: str, file: str) -> tuple[dict[str, Any], dict[str, int]]:
    """YAML text to plain data, and the line of every path in it."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else None
        message = f"not valid YAML: {getattr(error, 'problem', None) or error}"
        raise ConfigError([Problem(path="", message=message, file=file, line=line)]) from None
    except RecursionError:
        raise ConfigError([Problem(path="", message="nested too deeply", file=file)]) from None
    if not isinstance(data, dict) or not isinstance(node, yaml.MappingNode):
        raise ConfigError([Problem(path="", message="a study file is a mapping of keys to values", file=file, line=1)])
    lines: dict[str, int] = {}
    twice: list[Problem] = []
    _collect_lines(node, "", file, lines, twice)
    if twice:
        raise ConfigError(twice)
    return data, lines


def _collect_lines(node: yaml.Node, path: str, file: str, lines: dict[str, int], twice: list[Problem]) -> None:
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key_node, value_node in node.value:
            inner = f"{path}.{key_node.value}" if path else str(key_node.value)
            line = key_node.start_mark.line + 1
            if inner in seen:
                twice.append(Problem(path=inner, message="stands twice; keep one", file=file, line=line))
            seen.add(inner)
            lines[inner] = line
            _collect_lines(value_node, inner, file, lines, twice)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            inner = f"{path}[{index}]"
            lines[inner] = item.start_mark.line + 1
            _collect_lines(item, inner, file, lines, twice)


def _line(lines: Mapping[str, int], path: str) -> int | None:
    """The line of a path, or of the nearest path above it that stands in the file."""
    while path:
        if path in lines:
            return lines[path]
        path = re.sub(r"(\.[^.\[\]]+|\[\d+\]|^[^.\[\]]+)$", "", path)
    return None


def _explain(item: Any, data: Any) -> tuple[str, str]:
    """One pydantic error as (YAML path, message that says what is wrong and what is right)."""
    location = _real_location(item["loc"], data)
    where = _join(location)
    kind, given = item["type"], item.get("input")
    if kind == "extra_forbidden":
        choices = _keys_at(item["loc"][:-1])
        close = difflib.get_close_matches(str(location[-1]), choices, n=1, cutoff=0.6)
        hint = f"did you mean `{close[0]}`?" if close else f"known here: {', '.join(sorted(choices))}"
        return where, f"unknown key; {hint}"
    if kind == "missing":
        return where, "is required and missing"
    if kind == "union_tag_not_found":
        return where, "needs `kind`: one of heldout_loss, lm_eval, function"
    if kind == "union_tag_invalid":
        tag = item.get("ctx", {}).get("tag")
        if tag == "deferred":
            return f"{where}.kind", "`deferred` feedback is not built yet"
        choices = ["heldout_loss", "lm_eval", "function"]
        return f"{where}.kind", f"must be one of {', '.join(choices)}, got {tag!r}{_close(tag, choices)}"
    if kind in ("literal_error", "enum"):
        expected = str(item.get("ctx", {}).get("expected", ""))
        choices = re.findall(r"'([^']*)'", expected)
        return where, f"must be {expected}, got {given!r}{_close(given, choices)}{_not_yet(where, given)}"
    if kind == "value_error":
        message = str(item["ctx"]["error"])
        named = re.match(r"^([a-z_]+(?:\.[a-z_]+)+): (.*)$", message, re.DOTALL)
        return (named[1], named[2]) if named else (where, message)
    message = item["msg"].replace("Input should be", "must be").replace("Input", "it")
    return where, f"{message}, got {_short(given)}"


def _not_yet(where: str, given: Any) -> str:
    planned = {
        "selection.method": ("less", "tracin", "remove_harmful", "top_n", "logdet", "coreset", "indicators"),
        "selection.solver": ("lissa",),
        "selection.weighting.kind": ("rank",),
        "training.method": ("full",),
        "search.acquisition": ("ei", "kg", "thompson"),
        "search.kernel": ("matern", "ard", "auto", "compositional"),
    }
    return f" ({given} is planned and not built yet)" if given in planned.get(where, ()) else ""


def _close(given: Any, choices: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(given), choices, n=1, cutoff=0.6)
    return f"; did you mean `{close[0]}`?" if close else ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _real_location(location: Sequence[int | str], data: Any) -> list[int | str]:
    """Pydantic's location without the tags of unions, which do not stand in the file."""
    kept: list[int | str] = []
    for position, part in enumerate(location):
        last = position == len(location) - 1
        in_list = isinstance(data, list) and isinstance(part, int) and part < len(data)
        if in_list or (isinstance(data, Mapping) and part in data):
            data, keep = data[part], True
        else:
            keep = last and isinstance(data, Mapping)
        if keep:
            kept.append(part)
    return kept


def _keys_at(location: Sequence[int | str]) -> list[str]:
    """The keys that the schema knows at a location as pydantic reports it (union tags included)."""
    tags: dict[str, type[Section]] = {
        "heldout_loss": HeldoutLossConfig, "lm_eval": LmEvalConfig, "function": FunctionConfig,
    }  # fmt: skip
    model: type[BaseModel] = StudyConfig
    for part in location:
        if isinstance(part, int):
            continue
        if part in tags:
            model = tags[part]
        elif part in model.model_fields:
            inner = _section_of(model.model_fields[part].annotation)
            model = inner or model
    return list(model.model_fields)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        if found := _section_of(inner):
            return found
    return None


def _join(parts: Sequence[int | str]) -> str:
    text = ""
    for part in parts:
        text += f"[{part}]" if isinstance(part, int) else (f".{part}" if text else str(part))
    return text


def _leaves(data: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(data, Mapping) and data:
        for key, value in data.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    elif isinstance(data, list) and data:
        for index, value in enumerate(data):
            yield from _leaves(value, f"{path}[{index}]")
    else:
        yield path, data


def _later(data: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for path, message in LATER.items():
        inner: Any = data
        for part in path.split("."):
            inner = inner.get(part) if isinstance(inner, Mapping) else None
        if inner is not None:
            yield path, message


def _secrets(data: Any) -> Iterator[tuple[str, str]]:
    for path, value in _leaves(data):
        if isinstance(value, str) and _SECRET.search(value):
            yield path, "looks like a secret; take it out and set it in the environment (HF_TOKEN and the like)"


def _set(data: dict[str, Any], override: str) -> None:
    """Apply one `path=value`."""
    path, separator, text = override.partition("=")
    parts: list[int | str] = [int(p[1:-1]) if p.startswith("[") else p for p in re.findall(r"[^.\[\]]+|\[\d+\]", path)]
    if not separator or not parts:
        raise ConfigError(f"--set {override}: must be path=value, e.g. --set search.n_trials=20")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not valid YAML: {error}") from None
    here: Any = data
    for position, part in enumerate(parts[:-1]):
        try:
            if isinstance(here, dict) and isinstance(part, str):
                here = here.setdefault(part, {})
            else:
                here = here[part]
        except (KeyError, IndexError, TypeError):
            raise ConfigError(
                f"--set {override}: there is no `{_join(parts[: position + 1])}` in the study file"
            ) from None
    try:
        here[parts[-1]] = value
    except (IndexError, TypeError):
        raise ConfigError(f"--set {override}: there is no `{path}` in the study file") from None
