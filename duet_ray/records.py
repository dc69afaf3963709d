"""The nouns of a study: what flows from the search to the trainer and back.

All are frozen and keyword-only. A ratio is kept as whole rows per domain, `counts`, because that lattice point is
what is scored, trained, stored and told to the search: one and the same everywhere, with no rounding in between.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

import numpy as np

from duet_ray.errors import RatioError


class Direction(StrEnum):
    """Whether the user's feedback is to be made small or large. The only code that flips a sign is here."""

    MINIMIZE = "minimize"
    MAXIMIZE = "maximize"

    def to_loss(self, value: float) -> float:
        """Turn a value as the user gave it into "lower is better", on the way into the search."""
        return value if self is Direction.MINIMIZE else -value

    def to_value(self, loss: float) -> float:
        """Turn "lower is better" back into the user's own units, on the way out."""
        return loss if self is Direction.MINIMIZE else -loss

    def better(self, a: float, b: float) -> bool:
        """Whether `a` is strictly better than `b`, both as the user gave them."""
        return self.to_loss(a) < self.to_loss(b)


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """A point on the simplex of domains, on the lattice of whole rows: `counts / n_rows`."""

    counts: tuple[int, ...]
    """`(n_domains,)` rows per domain, in the study's domain order."""

    def __post_init__(self) -> None:
        if not self.counts or min(self.counts) < 0 or sum(self.counts) <= 0:
            raise RatioError(f"a ratio needs one count >= 0 per domain and at least one row, got {self.counts}")

    @property
    def n_rows(self) -> int:
        """Rows in the whole mixture (the paper's M)."""
        return sum(self.counts)

    @property
    def n_domains(self) -> int:
        return len(self.counts)

    @property
    def values(self) -> np.ndarray:
        """`(n_domains,)` float64 in [0, 1]; the entries sum to 1 within 1e-15 and zeros are exact."""
        return np.asarray(self.counts, dtype=np.float64) / self.n_rows

    def describe(self, names: Sequence[str]) -> str:
        """`"maths 60 %, chats 40 %"`: the domains in use, largest first."""
        order = sorted(range(len(self.counts)), key=lambda i: (-self.counts[i], i))
        return ", ".join(f"{names[i]} {100 * self.counts[i] / self.n_rows:.0f} %" for i in order if self.counts[i])


Settings = tuple[tuple[str, Any], ...]
"""Training settings of a trial that are not the study's: (path in the study file, value), in the order of
`search.also`. Values are plain and hashable; a list is a tuple here."""


def settings_from(pairs: Sequence[Sequence[Any]]) -> Settings:
    """Settings as JSON keeps them: pairs are lists there, and so are values that are tuples here."""
    return tuple((str(path), tuple(value) if isinstance(value, list) else value) for path, value in pairs)


@dataclass(frozen=True, kw_only=True)
class Point:
    """What a trial tries: a ratio, and where they are searched too, training settings and how much to train on."""

    ratio: Ratio
    settings: Settings = ()
    fidelity: float = 1.0
    """The share of the mixture's rows that is really drawn and trained on; below 1 the trial is a cheap look."""

    def __post_init__(self) -> None:
        if not 0 < self.fidelity <= 1:
            raise RatioError(f"a fidelity is a share of the rows above 0 and up to 1, got {self.fidelity}")


@dataclass(frozen=True)
class Mixture:
    """The rows actually drawn for a ratio: one of the k samples of a trial."""

    rows: tuple[np.ndarray, ...]
    """Per domain, `(counts[d],)` int64 row ids into its training set, in the order drawn."""

    def __len__(self) -> int:
        return sum(len(r) for r in self.rows)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """(domain index, row id), domain by domain."""
        for domain, rows in enumerate(self.rows):
            for row in rows:
                yield domain, int(row)


@dataclass(frozen=True)
class TokenRow:
    """One training, validation or task row, tokenised and cut to `max_tokens`."""

    input_ids: np.ndarray
    """`(n_tokens,)` int32."""
    loss_mask: np.ndarray
    """`(n_tokens,)` bool: True where the token is predicted for the loss (completions). Entry 0 is never predicted."""

    def __len__(self) -> int:
        return len(self.input_ids)


TrialKind = Literal["base", "start", "search", "confirm"]
"""`base`: the untouched model; `start`: the start design; `search`: a Bayesian proposal; `confirm`: a second look."""


@dataclass(frozen=True, kw_only=True)
class SampleSpec:
    """Names one model to train and measure. Everything random in it follows from this and the root seed."""

    trial: int
    """Trial number: -1 for the base model, 0 … for start and search, `CONFIRM_BASE` … for confirmations."""
    sample: int
    """0 … k − 1."""
    kind: TrialKind
    ratio: Ratio | None
    """None only for the base model, which is measured and not trained."""
    settings: Settings = ()
    """Training settings that overrule the study's."""
    fidelity: float = 1.0
    """The share of the ratio's rows that is drawn."""

    @property
    def key(self) -> str:
        """`"t0003-s1"`: the name of the sample's folder and of its task."""
        return f"{trial_name(self.trial)}-s{self.sample}"

    def to_json(self) -> dict[str, Any]:
        return {
            "trial": self.trial,
            "sample": self.sample,
            "kind": self.kind,
            "counts": list(self.ratio.counts) if self.ratio else None,
            **({"settings": [list(pair) for pair in self.settings]} if self.settings else {}),
            **({"fidelity": self.fidelity} if self.fidelity != 1 else {}),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "SampleSpec":
        ratio = Ratio(counts=tuple(data["counts"])) if data["counts"] is not None else None
        return cls(
            trial=data["trial"],
            sample=data["sample"],
            kind=data["kind"],
            ratio=ratio,
            settings=settings_from(data.get("settings", ())),
            fidelity=data.get("fidelity", 1.0),
        )


BASE_TRIAL = -1
CONFIRM_FIRST = 1_000_000
"""Confirmations are numbered from here, so that a study whose `n_trials` grows never collides with them."""
CONFIRM_BASE = CONFIRM_FIRST - 1
"""The untouched model, measured again as the finalists are."""
CONFIRM_ANYWHERE = CONFIRM_FIRST + 900_000
"""A ratio that no trial had before it was confirmed; the next number where the search has gone on since."""


def trial_name(trial: int) -> str:
    """`base`, `t0007`, `c0000` or `cbase`: a trial's name in folders, tables and figures."""
    if trial == BASE_TRIAL:
        return "base"
    if trial == CONFIRM_BASE:
        return "cbase"
    if trial >= CONFIRM_FIRST:
        return f"c{trial - CONFIRM_FIRST:04d}"
    return f"t{trial:04d}"


@dataclass(frozen=True, kw_only=True)
class Feedback:
    """What one evaluation of one model returned, as the user gave it."""

    value: float
    stderr: float | None = None
    """The evaluation's own standard error (the sampling of its items): shown, never told to the search."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Other numbers, measured beside the value and shown only."""


@dataclass(frozen=True, kw_only=True)
class SampleResult:
    """How one sample ended: with a value, or with a reason and no value."""

    spec: SampleSpec
    value: float | None
    """In the user's own direction; None exactly when the sample failed."""
    reason: str | None = None
    stderr: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    """Steps, tokens, first and last loss, skipped steps: what the trainer reports."""
    train_seconds: float = 0.0
    feedback_seconds: float = 0.0
    rows_digest: str | None = None
    """SHA-256 of the drawn row ids: two runs that trained on the same rows have the same digest."""
    adapter: str | None = None
    """Path of the trained model, relative to the study's folder."""
    lease: int = 0
    n_retries: int = 0
    """How often the infrastructure died under this sample. Never changes `k_used`."""

    def __post_init__(self) -> None:
        assert (self.value is None) == (self.reason is not None), "a sample has a value or a reason"
        assert self.value is None or math.isfinite(self.value), "a value is finite"

    @property
    def ok(self) -> bool:
        return self.value is not None

    @property
    def failed(self) -> bool:
        return not self.ok and not self.was_stopped

    @property
    def was_stopped(self) -> bool:
        """Whether it was behind in its trial's race and stopped early: no value, and no failure."""
        return "stopped_after" in self.train

    def to_json(self) -> dict[str, Any]:
        data = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "spec"}
        return {"spec": self.spec.to_json(), **data}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "SampleResult":
        rest = {name: data[name] for name in cls.__dataclass_fields__ if name != "spec" and name in data}
        return cls(spec=SampleSpec.from_json(data["spec"]), **rest)


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What the reducer makes of k values: the first order statistic (DUET, Eq. 5)."""

    value: float
    """In the user's own direction."""
    k: int
    k_used: int
    """How many of the k samples have a value: the minimum of 3 is not the minimum of 4."""
    best_sample: int
    sem: float | None = None
    """Standard error of `value` where one is known from repeats; None lets the GP infer the noise."""


@dataclass(frozen=True, kw_only=True)
class PastRun:
    """One experiment from before the study, told to its search: `duet import-runs`."""

    counts: tuple[int, ...]
    """Rows per domain on the study's lattice, in its domain order."""
    value: float
    """In the user's own direction."""
    sem: float | None = None
    """Standard error of `value` where it is known."""
    fidelity: float = 1.0
    source: str = ""
    """Where it was read: `runs.csv:7`."""

    @property
    def ratio(self) -> Ratio:
        return Ratio(counts=self.counts)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One ratio with its k samples, as the store holds it."""

    number: int
    kind: TrialKind
    ratio: Ratio | None
    status: Literal["pending", "done", "failed"]
    method: str
    """Where the ratio came from: `uniform`, `random`, `bayesian:lcb`, `confirm:t0003`, …"""
    samples: tuple[SampleResult, ...] = ()
    observation: Observation | None = None
    reason: str | None = None
    """Why a failed trial has no observation."""
    settings: Settings = ()
    fidelity: float = 1.0
    k: int | None = None
    """How many samples it was given, where that differs between trials; None: `sampling.k`."""

    @property
    def point(self) -> Point:
        assert self.ratio is not None, "the untouched model is no point of the search"
        return Point(ratio=self.ratio, settings=self.settings, fidelity=self.fidelity)

    def spec(self, sample: int) -> SampleSpec:
        """The name of one of its samples."""
        return SampleSpec(
            trial=self.number,
            sample=sample,
            kind=self.kind,
            ratio=self.ratio,
            settings=self.settings,
            fidelity=self.fidelity,
        )

    @property
    def name(self) -> str:
        return trial_name(self.number)
