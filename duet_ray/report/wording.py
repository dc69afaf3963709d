"""Numbers, times and ratios as text, the same on the page, in the figures, in the terminal and in the log."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from duet_ray.records import Direction, Ratio, Settings

MAX_DECIMALS = 8


@dataclass(frozen=True)
class ValueFormat:
    """Writes every value of a study with the same number of decimals, so that a column can be compared by eye."""

    decimals: int

    def __call__(self, value: float) -> str:
        return f"{value:.{self.decimals}f}" if abs(value) < 1e9 else f"{value:.4g}"

    def difference(self, value: float) -> str:
        """The size of a difference or of an error, never shortened to zero."""
        size = abs(value)
        if size == 0 or round(size, self.decimals) >= 10**-self.decimals:
            return self(size)
        return f"{size:.1g}"


def decimals_for(values: Sequence[float]) -> int:
    """Decimals that show three digits of the values' spread (between quartiles, so that no outlier decides)."""
    if not values:
        return 3
    low, high = np.quantile(np.asarray(values), [0.25, 0.75])
    spread = high - low or max(values) - min(values)
    if spread > 0 and math.isfinite(spread):
        return int(np.clip(2 - math.floor(math.log10(spread)), 0, MAX_DECIMALS))
    size = abs(values[0])
    return int(np.clip(3 - math.floor(math.log10(size)), 0, MAX_DECIMALS)) if size > 0 else 3


def better_is(direction: Direction) -> str:
    return "lower is better" if direction is Direction.MINIMIZE else "higher is better"


def plural(n: int, one: str, many: str | None = None) -> str:
    """`1 trial`, `2 trials`, `1,000 trials`."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def share(count: int, total: int) -> str:
    """`33 %`; a share that is there but rounds to nothing is `<1 %`."""
    percent = 100 * count / total
    return "<1 %" if 0 < percent < 0.5 else f"{percent:.0f} %"


def ratio_text(ratio: Ratio, names: Sequence[str], *, most: int | None = None) -> str:
    """`maths 60 %, chats 40 %`: the domains in use, largest first; after `most` of them `+ 3 more`."""
    used = sorted((i for i in range(ratio.n_domains) if ratio.counts[i]), key=lambda i: (-ratio.counts[i], i))
    shown = used if most is None or len(used) <= most else used[:most]
    text = ", ".join(f"{names[i]} {share(ratio.counts[i], ratio.n_rows)}" for i in shown)
    return text if len(shown) == len(used) else f"{text}, + {len(used) - len(shown)} more"


_SHORT = {"learning_rate": "lr", "target_modules": "modules", "batch_size": "batch", "warmup_ratio": "warm-up"}


def settings_text(settings: Settings) -> str:
    """`rank 32, lr 2e-4`: a trial's own training settings; empty where it has none."""
    return ", ".join(f"{_setting_name(path)} {_setting_value(value)}" for path, value in settings)


def _setting_name(path: str) -> str:
    name = path.removeprefix("training.")
    return _SHORT.get(name, name.replace("_", " "))


def _setting_value(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return "none" if value is None else "on" if value else "off"
    if isinstance(value, list | tuple):
        numbers = [v for v in value if isinstance(v, int)]
        if len(numbers) == len(value) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
            return f"{numbers[0]}–{numbers[-1]}"
        return " + ".join(str(v) for v in value)
    if isinstance(value, float):
        if value == 0 or 1e-3 <= abs(value) < 1e4:
            return f"{value:.4g}"
        mantissa, _, exponent = f"{value:.3e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return str(value)


def fidelity_text(fidelity: float) -> str:
    """`on 25 % of the rows`; empty for a whole trial."""
    return "" if fidelity == 1 else f"on {100 * fidelity:.3g} % of the rows"


def number(value: float) -> str:
    """`12`, `3.25`: a count that need not be whole, without trailing zeros."""
    return f"{value:,.2f}".rstrip("0").rstrip(".")


def duration(seconds: float) -> str:
    """`42 s`, `3 min 5 s`, `2 h 10 min`, `3 d 4 h`."""
    whole = max(0, round(seconds))
    minutes, s = divmod(whole, 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days} d {h} h"
    if hours:
        return f"{hours} h {m} min"
    return f"{minutes} min {s} s" if minutes else f"{s} s"


def first_line(text: str, *, width: int = 160) -> str:
    """The first line with text in it, cut to `width` characters."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return clipped(line, width)


def clipped(text: str, width: int) -> str:
    """The text, cut to `width` characters, an ellipsis the last of them."""
    return text if len(text) <= width else text[: width - 1].rstrip() + "…"


def join_words(parts: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
