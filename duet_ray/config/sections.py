"""What a study file may hold: a closed schema, section by section, in the order of the file and of the data's path.

Defaults and descriptions stand here and nowhere else; `duet init` writes a file that shows them.
"""

import json
import math
import os
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl, urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator

from duet_ray.errors import ConfigError
from duet_ray.records import Direction

SLUG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
ROWS = r"^\d{0,12}:\d{0,12}(:[1-9]\d{0,11})?$"
"""Every second row is `::2`, the others `1::2`."""


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


DataFormat = Literal["prompt_completion", "messages", "alpaca", "sharegpt", "text", "multiple_choice"]


class DomainConfig(Section):
    name: str
    source: str | list[str] = Field(description="file, glob, several of them, or hf:owner/name")
    subset: str | None = Field(None, description="hub only: configuration name")
    split: str = Field("train", description="hub only: split to train on")
    revision: str | None = Field(None, description="hub only: revision to pin")
    format: DataFormat = "prompt_completion"
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="our column -> the column in your file, a path in it (answer.value), or a text with columns in it",
    )
    rows: str | None = Field(
        None, pattern=r"^\d*:\d*(:[1-9]\d*)?$", description="which rows of the source, as start:stop:step; null = all"
    )
    max_bad_rows: int | float | None = Field(None, ge=0, description="null = data.max_bad_rows")
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
    max_repeats: float | None = Field(
        None, ge=1, description="with when_short: repeat: how often a domain's rows may be used at most; null = any"
    )
    replacement: bool = Field(False, description="draw rows with replacement")


class WeightingConfig(Section):
    kind: Literal["rank", "softmax", "shift"] = Field(
        "rank", description="rank: no heavy tails; softmax: sharper; shift: as the paper's Algorithm 2"
    )
    temperature: float = Field(1.0, gt=0, description="softmax only: lower is sharper; 1 = one standard deviation")


Indicator = Literal["length", "perplexity", "difficulty", "diversity", "reasoning", "richness"]
INDICATORS: tuple[Indicator, ...] = ("length", "perplexity", "difficulty", "diversity", "reasoning", "richness")


class FitConfig(Section):
    """How a domain's model is fine-tuned for scoring. Every key is that of `training` where it is null."""

    rank: int | None = Field(None, ge=1)
    alpha: float | None = Field(None, gt=0)
    dropout: float | None = Field(None, ge=0, lt=1)
    target_modules: Literal["all-linear"] | list[str] | None = None
    learning_rate: float | None = Field(None, gt=0)
    schedule: Literal["constant", "linear", "cosine"] | None = None
    warmup_ratio: float | None = Field(None, ge=0, lt=1)
    batch_size: int | None = Field(None, ge=1)
    max_grad_norm: float | None = Field(None, gt=0)
    weight_decay: float | None = Field(None, ge=0)

    @property
    def given(self) -> dict[str, Any]:
        """The keys that differ from `training` on purpose."""
        return {name: value for name in type(self).model_fields if (value := getattr(self, name)) is not None}


class SelectionConfig(Section):
    method: Literal[
        "uniform", "influence", "less", "tracin", "remove_harmful", "top_n", "logdet", "coreset", "indicators"
    ] = "uniform"
    solver: Literal["ekfac", "cg", "lissa"] = Field("ekfac", description="influence: how H⁻¹v is computed")
    curvature: Literal["gauss_newton", "hessian"] = Field("gauss_newton", description="cg, lissa: the matrix H")
    damping: float = Field(0.1, gt=0, description="influence: added to the Hessian, relative to its mean eigenvalue")
    cg_iterations: int = Field(20, ge=1, description="influence with cg: iteration cap")
    cg_tolerance: float = Field(1e-3, gt=0, description="influence with cg: relative residual to stop at")
    lissa_depth: int = Field(100, ge=1, description="influence with lissa: terms of the series")
    lissa_scale: float | None = Field(
        None, gt=0, description="influence with lissa: must exceed the largest eigenvalue; null = 1.5 times it"
    )
    n_fit_rows: int | None = Field(
        None, ge=1, description="rows to fine-tune a domain's model on; null = all (less, tracin: 5 %, at least 256)"
    )
    n_hessian_rows: int | None = Field(256, ge=1, description="rows the Hessian is estimated on; null = all")
    epochs: int | None = Field(
        None, ge=1, description="epochs of a domain's model; null = training.epochs (less, tracin: 4)"
    )
    target_modules: Literal["all-linear"] | list[str] | None = Field(
        None, description="layers of a domain's model that are adapted and scored by; null = training.target_modules"
    )
    fit: FitConfig = Field(FitConfig(), description="training settings of a domain's model that are not the samples'")
    surrogate: ModelConfig | None = Field(None, description="a smaller model to score with; null = the study's model")
    projection: int | None = Field(
        None, ge=1, description="less, tracin: dimensions of a random projection; null = exact products"
    )
    harmful_fraction: float = Field(0.2, gt=0, lt=1, description="remove_harmful: share of rows that are dropped")
    pool: float = Field(1.0, ge=1, description="top_n, logdet, coreset: draw among the first pool × quota rows")
    embedding_model: str | None = Field(
        None, description="sentence-embedding model, folder or hub id; null = the base model's mean hidden state"
    )
    indicators: list[Indicator] = Field(list(INDICATORS), min_length=1, description="indicators: those that are used")
    n_prompts: int = Field(48, ge=8, description="indicators: prompts whose effect is measured")
    n_demonstrations: int = Field(4, ge=1, description="indicators: rows in a prompt")
    examples: str | None = Field(
        None, description="indicators: a file of a few task examples (prompt, completion); null = validation rows"
    )
    n_exact_rows: int | None = Field(
        None, ge=32, description="score so many rows of a domain exactly and predict the others; null = all exactly"
    )
    min_rank_correlation: float = Field(
        0.3, ge=-1, le=1, description="with n_exact_rows: refuse predictions that do worse on held-out rows"
    )
    batch_size: int = Field(8, ge=1, description="rows scored at once")
    shard_rows: int = Field(2048, ge=1, description="rows of a task of the fleet")
    weighting: WeightingConfig = WeightingConfig()


class AlsoConfig(Section):
    """The values of one training setting that is searched: exactly one of the three."""

    choices: list[Any] | None = Field(None, min_length=2, description="one of these values")
    range: tuple[float, float] | None = Field(None, description="[low, high], searched evenly")
    log: tuple[float, float] | None = Field(None, description="[low, high], searched evenly in its logarithm")

    @model_validator(mode="after")
    def _one_of_three(self) -> "AlsoConfig":
        given = [name for name in ("choices", "range", "log") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"must be exactly one of choices, range, log; got {', '.join(given) or 'none'}")
        if self.choices is not None and len({json.dumps(c) for c in self.choices}) < len(self.choices):
            raise ValueError(f"the choices must differ, got {self.choices}")
        for name in ("range", "log"):
            ends = getattr(self, name)
            if ends is not None and not (ends[0] < ends[1] and (name == "range" or ends[0] > 0)):
                positive = " and low > 0" if name == "log" else ""
                raise ValueError(f"{name} must be [low, high] with low < high{positive}, got {list(ends)}")
        return self


class FidelityConfig(Section):
    rows: list[float] = Field(
        [0.25], min_length=1, description="cheap trials train on such a share of mixture.n_rows; the whole always may"
    )

    @field_validator("rows")
    @classmethod
    def _shares(cls, rows: list[float]) -> list[float]:
        if not all(0 < r < 1 for r in rows) or any(a >= b for a, b in pairwise(rows)):
            raise ValueError(f"must be rising shares between 0 and 1, got {rows}")
        return rows


class ObjectiveConfig(Section):
    """What is searched for, where it is more than the feedback's one number. Names are those of the tables."""

    weights: dict[str, float] | None = Field(
        None, description="metric -> weight > 0: the sum of these is made best (each in its own direction)"
    )
    pareto: list[str] | None = Field(None, min_length=2, description="metrics that are traded off: a front, not a best")
    require: list[str] = Field(
        default_factory=list, description='such as "safety >= base - 0.01" or "loss_chat <= 2.5"; base: untouched model'
    )


class SearchConfig(Section):
    n_trials: int = Field(10, ge=0, description="Bayesian trials (the paper's T), after the start design")
    n_start: int = Field(10, ge=1, description="ratios of the start design; the uniform one is the first")
    acquisition: Literal["lcb", "qlognei", "ei", "kg", "thompson"] = Field(
        "lcb", description="lcb: lower confidence bound; ei, qlognei: expected improvement; kg: knowledge gradient"
    )
    beta: Annotated[float, Field(ge=0)] | Literal["theory"] = Field(
        2.0, description="lcb: factor on σ, 0.5 in the paper; theory: as the regret bound (Chowdhury & Gopalan 2017)"
    )
    rkhs_norm: float = Field(1.0, gt=0, description="beta: theory: bound B on the norm of the standardised loss")
    delta: float = Field(0.1, gt=0, lt=1, description="beta: theory: the bound holds with probability 1 − δ")
    kernel: Literal["se", "matern", "ard", "compositional", "auto"] = Field(
        "compositional",
        description="se: isotropic squared exponential, maximum likelihood (the paper's); compositional: on square "
        "roots of the shares, with a trend; auto: the best by leave-one-out",
    )
    noise: Literal["inferred", "theory"] = Field(
        "inferred", description="theory: from the spread of the k samples, where Theorem 3.2's law fits it"
    )
    vertices: bool = Field(False, description="the start design includes every domain alone")
    prior: Literal["sizes"] | dict[str, float] | None = Field(
        None, description="a second ratio to start with: by the domains' sizes, or domain -> share"
    )
    constraints: list[str] = Field(default_factory=list, description='over domains: "code + maths >= 0.2"')
    optimize: Literal["data", "model", "both"] = Field(
        "data", description="the ratio, the training settings in `also` (at the uniform or prior ratio), or both"
    )
    also: dict[str, AlsoConfig] = Field(default_factory=dict, description="training settings to search: path -> values")
    objective: ObjectiveConfig | None = None
    fidelity: FidelityConfig | None = Field(None, description="cheap trials on fewer rows; null = all are whole")
    recommend: Literal["trained", "anywhere"] = Field(
        "trained", description="the posterior's best among trained ratios, or anywhere (it is trained to confirm it)"
    )
    concurrent_trials: int = Field(1, ge=1)

    @property
    def n_start_trials(self) -> int:
        """Trials of the start design. With fidelities it has `n_start` whole trials' worth of rows: the first trial is
        whole, the others are as cheap as may be."""
        cheapest = self.fidelity.rows[0] if self.fidelity is not None else 1.0
        return 1 + math.floor((self.n_start - 1) / cheapest + 1e-9)


class RacingConfig(Section):
    at: list[float] = Field([0.25, 0.5], min_length=1, description="shares of the steps to compare at")
    keep: float = Field(0.5, gt=0, lt=1, description="share of a trial's samples that goes on each time")
    limit: int | None = Field(None, ge=1, description="the feedback's `limit` in a comparison; null = as it is")

    @field_validator("at")
    @classmethod
    def _rising(cls, at: list[float]) -> list[float]:
        if not all(0 < a < 1 for a in at) or any(a >= b for a, b in pairwise(at)):
            raise ValueError(f"must be rising shares between 0 and 1, got {at}")
        return at


class SamplingConfig(Section):
    k: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        1, description="samples per ratio; the observation is the best of them; auto: more where it matters"
    )
    k_bounds: tuple[int, int] = Field((1, 4), description="k: auto: the fewest and the most samples of a ratio")
    min_samples: int = Field(1, ge=1, description="fewer finished samples than this fail the trial")
    max_retries: int = Field(3, ge=0, description="retries of a sample whose worker died")
    racing: RacingConfig | None = Field(None, description="stop samples that are behind early")

    @property
    def k_most(self) -> int:
        """The most samples that a trial can have."""
        return self.k_bounds[1] if self.k == "auto" else self.k

    @field_validator("k_bounds")
    @classmethod
    def _rising_bounds(cls, bounds: tuple[int, int]) -> tuple[int, int]:
        if not 1 <= bounds[0] <= bounds[1]:
            raise ValueError(f"must be [fewest, most] with 1 <= fewest <= most, got {list(bounds)}")
        return bounds


class ZeroConfig(Section):
    stage: Literal[1, 2, 3] = Field(2, description="split over workers: 1 optimizer, 2 gradients, 3 weights")
    offload_optimizer: bool = Field(False, description="keep optimizer states in host memory")


class TrainingConfig(Section):
    method: Literal["lora", "full"] = Field("lora", description="full: every weight, with DeepSpeed ZeRO")
    fuse: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto", description="lora: samples of a trial that a group trains in one pass; auto = from memory and fleet"
    )
    zero: ZeroConfig = ZeroConfig()
    checkpoint_minutes: float | None = Field(
        None, gt=0, description="save a sample's training so often, so that a retry goes on from there; null = never"
    )
    rank: int = Field(16, ge=1)
    alpha: float = Field(32, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    layers: list[Annotated[int, Field(ge=0)]] | None = Field(
        None, min_length=1, description="lora: numbers of the transformer blocks to adapt; null = all"
    )
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

    @property
    def shown_name(self) -> str:
        """How it is called in tables: its given name, else its kind and metric."""
        return self._called(" ")

    @property
    def metric_key(self) -> str:
        """The same as the key of a sample's metric: stored, so it must not change."""
        return self._called("_")

    def _called(self, separator: str) -> str:
        kind, metric = getattr(self, "kind", ""), getattr(self, "metric", None)
        if isinstance(metric, dict):
            metric = "+".join(dict.fromkeys(metric.values()))
        return self.name or (f"{kind}{separator}{metric}" if metric else kind)


class HeldoutLossConfig(FeedbackBase):
    kind: Literal["heldout_loss"]
    file: str = Field(description="jsonl, json, csv or parquet; relative to the study file")
    format: DataFormat = "prompt_completion"
    columns: dict[str, str] = Field(default_factory=dict)
    limit: int | None = Field(None, ge=1, description="use the first `limit` rows")
    batch_size: int = Field(8, ge=1)
    metric: Literal["loss", "accuracy"] = Field("loss", description="accuracy: multiple_choice only")
    direction: Direction = Direction.MINIMIZE


class LmEvalConfig(FeedbackBase):
    kind: Literal["lm_eval"]
    tasks: dict[str, float] = Field(min_length=1, description="task name -> weight")
    tasks_folder: str | None = Field(None, description="folder of your own task files (YAML), local data")
    rows: dict[str, Annotated[str, Field(pattern=ROWS)]] = Field(
        default_factory=dict,
        description="task -> which of its items, as start:stop:step; a task that is not named: all",
    )
    metric: str | dict[str, str] = Field(
        "acc,none", description="metric,filter as lm-eval prints it; or task -> metric, where tasks have different ones"
    )
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
FEEDBACK_KINDS: Mapping[str, type[FeedbackBase]] = {
    "heldout_loss": HeldoutLossConfig,
    "lm_eval": LmEvalConfig,
    "function": FunctionConfig,
}


class FleetConfig(Section):
    groups: int = Field(1, ge=1, description="samples trained at the same time")
    min_groups: int | None = Field(
        None, ge=1, description="start with room for so many; the others join with their nodes; null = all of them"
    )
    workers_per_group: int = Field(1, ge=1, description="processes that train one sample together")
    gpus_per_worker: float = Field(0, ge=0)
    cpus_per_worker: float = Field(1, gt=0, description="also the threads of a worker")
    max_task_minutes: float | None = Field(
        None,
        gt=0,
        description="a task that takes longer hangs, and is given away; null = a day, or 10 × the longest so far",
    )
    wait_minutes: float = Field(5.0, ge=0, description="on a cluster: how long to wait for its nodes at the start")

    @property
    def groups_at_start(self) -> int:
        """Groups that there must be room for before the study starts."""
        return self.groups if self.min_groups is None else self.min_groups


class ConfirmConfig(Section):
    finalists: int = Field(1, ge=0, description="best ratios to train and measure again; 0 = none")
    repeats: int = Field(3, ge=1, description="fresh seeds per finalist")
    limit: int | None = Field(None, ge=1, description="the feedback's `limit` here: a larger look; null = as it is")


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
    storage: str = Field("./studies", description="folder of studies; on a cluster one that every node sees")
    store: str | None = Field(
        None,
        description="postgresql+psycopg://user@host/database, or sqlite:////file; null = SQLite in the study's folder",
    )
    artifacts: str | None = Field(
        None, description="fsspec URL (s3://bucket/folder) for trained models; null = the study's folder"
    )
    keep_best: int = Field(3, ge=1, description="models kept on disk")

    _folder: Path = PrivateAttr(default_factory=Path.cwd)

    @field_validator("name")
    @classmethod
    def _slug(cls, name: str) -> str:
        return slug(name)

    @field_validator("store")
    @classmethod
    def _sound_store(cls, url: str | None) -> str | None:
        return None if url is None else store_url(url)

    @field_validator("artifacts")
    @classmethod
    def _sound_artifacts(cls, url: str | None) -> str | None:
        return None if url is None else artifacts_url(url)

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
        """An absolute path for a path in the study file.

        Raises:
            ConfigError: nothing can have such a path.
        """
        try:
            return (self._folder / Path(path).expanduser()).resolve()
        except (OSError, RuntimeError, ValueError) as error:  # a ring of links, nobody's home, a NUL
            raise ConfigError(f"{path!r} is not a path that can be looked up: {error}") from None

    @property
    def model_path(self) -> str:
        """`place_of` the study's model."""
        return self.place_of(self.model.path)

    def place_of(self, path: str) -> str:
        """A model's local folder if there is one at that path, else the hub id unchanged."""
        local = self.resolve_path(path)
        return str(local) if os.path.isdir(local) else path  # not `Path.is_dir`: it raises for a name that is too long

    def placed_in(self, folder: Path) -> "StudyConfig":
        """The same study, its relative paths taken from `folder`."""
        copy = self.model_copy()
        copy._folder = Path(folder).resolve()
        return copy

    @property
    def for_scoring(self) -> "StudyConfig":
        """The study with the model that scores rows in the place of its own: itself, unless there is a surrogate."""
        if self.selection.surrogate is None:
            return self
        return self.model_copy(update={"model": self.selection.surrogate}).placed_in(self._folder)

    @property
    def folder(self) -> Path:
        """The folder that relative paths are taken from."""
        return self._folder

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)


def n_finishing(k: int, racing: RacingConfig | None) -> int:
    """Of k samples none of which fails, those that run to the end."""
    for _ in racing.at if racing else ():
        k = n_kept(k, racing.keep) if racing and k > 1 else k
    return k


def n_kept(n: int, keep: float) -> int:
    """Of n samples that are compared, those that go on: at least one."""
    return math.ceil(keep * n - 1e-9)


def slug(name: str) -> str:
    if not SLUG.fullmatch(name):
        raise ValueError(f"must be 1 to 64 letters, digits, '-' or '_', starting with a letter or digit, got {name!r}")
    return name


def store_url(url: str) -> str:
    """A database's URL, without a password: that comes from the environment, or from the database's own file."""
    parts = urlsplit(url)
    if parts.scheme == "sqlite":
        if not url.startswith("sqlite:////") or len(parts.path) < 3:
            raise ValueError(f"must name a file by its whole path, sqlite:////folder/study.db, got {url!r}")
    elif parts.scheme != "postgresql+psycopg":
        raise ValueError(f"must start with postgresql+psycopg:// or sqlite:////, got {_without_password(url)!r}")
    elif len(parts.path) < 2 or parts.fragment:
        raise ValueError(f"must be postgresql+psycopg://user@host:port/database, got {_without_password(url)!r}")
    if parts.password is not None or "password" in dict(parse_qsl(parts.query)):
        raise ValueError("take the password out of the URL, and set PGPASSWORD or write it into ~/.pgpass (mode 0600)")
    return url


def artifacts_url(url: str) -> str:
    """An fsspec URL, without credentials: these come from the environment."""
    parts = urlsplit(url)
    if not re.fullmatch(r"[a-z][a-z0-9+.-]*", parts.scheme) or "://" not in url:
        raise ValueError(f"must be a URL such as s3://bucket/folder, got {_without_password(url)!r}")
    if parts.password is not None:
        raise ValueError("take the password out of the URL, and set it in the environment as its storage wants it")
    if ".." in parts.path.split("/") or not parts.netloc + parts.path.strip("/"):
        raise ValueError(f"must name a place of its own without '..', got {_without_password(url)!r}")
    return url.rstrip("/")


def _without_password(url: str) -> str:
    return re.sub(r":[^:/@]*@", ":…@", url)
