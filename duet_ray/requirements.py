"""Requirements on metrics: "not worse than the untouched model on safety", as a study file says it.

A requirement compares one metric, in the user's own units and direction, with a number or with what the untouched
model has: `safety >= base - 0.01`, `loss_chat <= 2.5`, `accuracy >= 95 % base`.
"""

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from duet_ray.errors import RatioError

_NUMBER = r"[0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?"
_FORM = re.compile(
    rf"\s*(?P<metric>[^\s<>=]+)\s*(?P<sense><=|>=)\s*"
    rf"(?:(?P<number>[+-]?{_NUMBER})|(?:(?P<percent>{_NUMBER})\s*%\s*)?base(?:\s*(?P<sign>[+-])\s*(?P<margin>{_NUMBER}))?)"
    r"\s*"
)


@dataclass(frozen=True, kw_only=True)
class Requirement:
    """`metric sense share · base + offset`; without `base` the share is 0."""

    metric: str
    sense: Literal["<=", ">="]
    offset: float
    share: float = 0.0
    text: str = ""

    @property
    def needs_base(self) -> bool:
        return self.share != 0

    def bound(self, base: float | None) -> float:
        """The number that the metric is compared with.

        Args:
            base: the untouched model's metric; needed where the requirement names it.
        """
        if not self.needs_base:
            return self.offset
        assert base is not None, "a requirement against the base needs the base's metric"
        return self.share * base + self.offset

    def margin(self, value: float, base: float | None) -> float:
        """By how much `value` is on the right side; negative where the requirement is broken."""
        difference = value - self.bound(base)
        return difference if self.sense == ">=" else -difference


def parse_requirement(text: str, metrics: Sequence[str]) -> Requirement:
    """Read one requirement.

    Raises:
        RatioError: it is not of the form, or names an unknown metric.
    """
    match = _FORM.fullmatch(text)
    if match is None:
        raise RatioError(f'{text!r} is no requirement: write "metric >= number" or "metric <= base + number"')
    metric = match["metric"]
    if metric not in metrics:
        close = difflib.get_close_matches(metric, metrics, n=1, cutoff=0.6)
        hint = f"did you mean {close[0]!r}?" if close else f"metrics here: {', '.join(metrics)}"
        raise RatioError(f"there is no metric {metric!r}; {hint}")
    sense: Literal["<=", ">="] = "<=" if match["sense"] == "<=" else ">="
    if not all(math.isfinite(float(match[part] or 0)) for part in ("number", "percent", "margin")):
        raise RatioError(f"{text!r}: the number is not finite")
    if match["number"] is not None:
        return Requirement(metric=metric, sense=sense, offset=float(match["number"]), text=text)
    share = float(match["percent"]) / 100 if match["percent"] else 1.0
    margin = float(match["margin"] or 0) * (-1 if match["sign"] == "-" else 1)
    return Requirement(metric=metric, sense=sense, offset=margin, share=share, text=text)
