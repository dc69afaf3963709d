"""What the model sees of a point: free shares, training settings scaled to [0, 1], and the fidelity.

A point of the search is a ratio, where asked for some training settings (`search.also`), and where asked a fidelity. As
a row of features it is

    [shares of the free domains | settings | fidelity]

Shares stay what they are. A setting on a range, or a logarithm, is scaled to [0, 1]; choices that are numbers are put
in their order on [0, 1], so that between rank 8 and 128 there is a 32; other choices have a feature each, 1 for the one
that is taken. The fidelity feature is 0 for a whole trial and 1 for the cheapest, evenly in the logarithm of the rows.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from duet_ray.config import AlsoConfig, SearchConfig, TrainingConfig
from duet_ray.errors import RatioError
from duet_ray.records import Point, Ratio, Settings
from duet_ray.search.simplex import SimplexSpace

_LISTED = 64
"""Up to so many combinations of settings are all tried at the best ratio."""


@dataclass(frozen=True, kw_only=True)
class Knob:
    """One training setting that is searched."""

    path: str
    """In the study file: `training.rank`."""
    choices: tuple[Any, ...] | None = None
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    whole: bool = False
    """Whole numbers only."""

    @classmethod
    def of(cls, path: str, values: AlsoConfig) -> "Knob":
        if values.choices is not None:
            return cls(path=path, choices=tuple(tuple(c) if isinstance(c, list) else c for c in values.choices))
        ends = values.log or values.range
        assert ends is not None, "exactly one of the three is given"
        annotation = TrainingConfig.model_fields[path.removeprefix("training.")].annotation
        return cls(path=path, low=ends[0], high=ends[1], log=values.log is not None, whole=annotation is int)

    @property
    def is_ordered(self) -> bool:
        """Whether one feature tells the values apart: numbers."""
        return self.choices is None or all(isinstance(c, int | float) and not isinstance(c, bool) for c in self.choices)

    @property
    def n_features(self) -> int:
        return 1 if self.is_ordered else len(self.choices or ())

    def encode(self, value: Any) -> list[float]:
        """The features of a value."""
        if self.choices is None:
            low, high, at = self._scaled(self.low), self._scaled(self.high), self._scaled(float(value))
            return [(at - low) / (high - low)]
        if not self.is_ordered:
            return [float(value == choice) for choice in self.choices]
        return [sorted(self.choices).index(value) / (len(self.choices) - 1)]

    def decode(self, features: np.ndarray) -> Any:
        """The value that is nearest to `(n_features,)` features, whatever they are."""
        if self.choices is not None:
            if not self.is_ordered:
                return self.choices[int(np.argmax(features))]
            last = len(self.choices) - 1
            return sorted(self.choices)[int(np.clip(np.floor(features[0] * last + 0.5), 0, last))]
        at = self._scaled(self.low) + float(np.clip(features[0], 0, 1)) * (
            self._scaled(self.high) - self._scaled(self.low)
        )
        value = float(np.clip(math.exp(at) if self.log else at, self.low, self.high))
        if self.whole:
            return int(np.clip(round(value), math.ceil(self.low), math.floor(self.high)))
        # Six digits: the value stands in tables and files, and is exactly what is trained with.
        return float(np.clip(float(f"{value:.6g}"), self.low, self.high))

    def allows(self, value: Any) -> bool:
        """Whether a trial of this study may have the value."""
        if self.choices is not None:
            return value in self.choices
        return isinstance(value, int | float) and self.low <= value <= self.high

    def nearest(self, value: Any) -> Any:
        """The allowed value that is nearest to a value of the setting; the first choice where none is near."""
        if self.choices is None:
            return self.decode(np.array(self.encode(float(np.clip(value, self.low, self.high)))))
        if value in self.choices:
            return value
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return min(self.choices, key=lambda c: abs(c - value)) if self.is_ordered and is_number else self.choices[0]

    def values(self) -> Sequence[Any] | None:
        """All values, where they can be listed."""
        if self.choices is not None:
            return self.choices
        if self.whole and self.high - self.low < _LISTED:
            return range(math.ceil(self.low), math.floor(self.high) + 1)
        return None

    def _scaled(self, value: float) -> float:
        return math.log(value) if self.log else value


@dataclass(frozen=True, kw_only=True)
class PointSpace:
    """All points of a search."""

    simplex: SimplexSpace
    knobs: tuple[Knob, ...] = ()
    fidelities: tuple[float, ...] = (1.0,)
    """Rising; the last is 1."""
    fixed_ratio: Ratio | None = None
    """With `search.optimize: model` the one ratio of all trials."""

    @classmethod
    def of(cls, simplex: SimplexSpace, settings: SearchConfig, prior: Ratio | None = None) -> "PointSpace":
        """The points of a study.

        Args:
            prior: the ratio of `search.prior`, where there is one.
        """
        cheap = settings.fidelity.rows if settings.fidelity is not None else []
        return cls(
            simplex=simplex,
            knobs=tuple(Knob.of(path, values) for path, values in settings.also.items()),
            fidelities=(*cheap, 1.0),
            fixed_ratio=(prior or simplex.uniform()) if settings.optimize == "model" else None,
        )

    @cached_property
    def free(self) -> tuple[int, ...]:
        """The domains whose share is searched."""
        if self.fixed_ratio is not None:
            return ()
        least, most = self.simplex.tightest()
        return tuple(int(d) for d in np.flatnonzero(least < most))

    @property
    def n_settings(self) -> int:
        """Features of settings."""
        return sum(knob.n_features for knob in self.knobs)

    @property
    def has_fidelities(self) -> bool:
        return len(self.fidelities) > 1

    @property
    def n_features(self) -> int:
        return len(self.free) + self.n_settings + self.has_fidelities

    @property
    def is_single(self) -> bool:
        """Whether there is one point only."""
        return self.n_features == 0

    def contains(self, point: Point) -> bool:
        """Whether a study may train this point; that of another study's fidelity may be told, and is contained too."""
        named = tuple(path for path, _ in point.settings) == tuple(knob.path for knob in self.knobs)
        return self.simplex.contains(point.ratio) and (
            not point.settings
            or (named and all(k.allows(v) for k, (_, v) in zip(self.knobs, point.settings, strict=True)))
        )

    def encode(self, points: Sequence[Point], missing: Settings = ()) -> np.ndarray:
        """Points as `(n_points, n_features)` features.

        Args:
            missing: the settings of points that have none: the study's own.
        """
        rows = [
            [
                *point.ratio.values[list(self.free)],
                *self.encode_settings(point.settings or missing),
                *([self.encode_fidelity(point.fidelity)] if self.has_fidelities else []),
            ]
            for point in points
        ]
        return np.array(rows, dtype=np.float64).reshape(len(points), self.n_features)

    def encode_settings(self, settings: Settings) -> list[float]:
        given: Mapping[str, Any] = dict(settings)
        return [feature for knob in self.knobs for feature in knob.encode(given[knob.path])]

    def encode_fidelity(self, fidelity: float) -> float:
        """0 for a whole trial, 1 for the cheapest of the study; more for a cheaper one from elsewhere."""
        return math.log(fidelity) / math.log(self.fidelities[0])

    def decode_settings(self, features: np.ndarray) -> Settings:
        """The settings nearest to `(n_settings,)` features."""
        found, start = [], 0
        for knob in self.knobs:
            found.append((knob.path, knob.decode(features[start : start + knob.n_features])))
            start += knob.n_features
        return tuple(found)

    def snap_settings(self, features: np.ndarray) -> np.ndarray:
        """`(n_points, n_settings)` features moved to the nearest ones that a trial can have."""
        snapped = [self.encode_settings(self.decode_settings(row)) for row in features]
        return np.array(snapped, dtype=np.float64).reshape(features.shape)

    def start_settings(self, trial: int, seed: int, first: Settings = ()) -> Settings:
        """The settings of a trial of the start design: scrambled Sobol draws, in the order of the trials.

        Where the ratio is always the same, no draw is taken twice, nor `first`, as long as there are others.

        Args:
            trial: the first, 0, has `first` instead.
            first: the study's own.
        """
        if not self.knobs:
            return ()
        import torch

        n_draws = trial if self.free else 16 * trial + _LISTED
        sobol = torch.quasirandom.SobolEngine(self.n_settings, scramble=True, seed=seed)
        drawn = [self.decode_settings(row) for row in sobol.draw(n_draws + 1, dtype=torch.float64).numpy()]
        if self.free:
            return drawn[trial]
        distinct = list(dict.fromkeys([first, *drawn[1:]]))
        return distinct[trial] if trial < len(distinct) else drawn[trial]

    def all_settings(self) -> list[Settings] | None:
        """Every combination of settings, or None where they are too many to list."""
        values = [knob.values() for knob in self.knobs]
        if any(v is None for v in values) or math.prod(len(v) for v in values if v is not None) > _LISTED:
            return None
        paths = [knob.path for knob in self.knobs]
        combinations = itertools.product(*(v for v in values if v is not None))
        return [tuple(zip(paths, combination, strict=True)) for combination in combinations]

    def own_settings(self, training: TrainingConfig) -> Settings:
        """The study's own values of the settings that are searched, as near as the search can come."""
        plain: dict[str, Any] = training.model_dump(mode="json")
        found = []
        for knob in self.knobs:
            value: Any = plain[knob.path.removeprefix("training.")]
            found.append((knob.path, knob.nearest(tuple(value) if isinstance(value, list) else value)))
        return tuple(found)

    def refuse_outside(self, points: Sequence[Point]) -> None:
        """Raise `RatioError` for a point that is not of this study."""
        for point in points:
            if not self.contains(point):
                raise RatioError(
                    f"the ratio {point.ratio.counts} (rows per domain) lies outside the space of this study: "
                    f"{self.simplex.n_rows} rows, from {self.simplex.lower} to {self.simplex.upper}"
                    + (f"; its settings are {dict(point.settings)}" if point.settings else "")
                )
