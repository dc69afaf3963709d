"""Linear constraints over domains, as a study file writes them: `code + maths >= 0.2`, `wikitext <= 40 %`.

A constraint compares two sums of domains, shares and multiples with `<=`, `>=` or `=`; a chain (`0.1 <= code <= 0.3`)
is two constraints. A domain's name may hold `-`, so names are read first and longest first: where there is a domain
`code-maths`, that text is the domain and the difference is `code - maths`. Brackets and division are left out: a
study needs a handful of such lines, and every one must be read the same way by everybody.

Everything becomes Σ a_d r_d <= bound over the ratio r. Mixtures have whole rows, which may meet an equality by no
mixture at all, so an equality is two constraints that may each be missed by half a row (see `slack_rows`).
"""

import difflib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from duet_ray.errors import ConfigError, Problem

GRAMMAR = 'write for instance "wikitext <= 0.4", "code + maths >= 20 %", "2*code - maths <= 0.1" or "code = maths"'

_NUMBER = re.compile(r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
_COMPARISON = re.compile(r"<=|>=|==?|≤|≥")
_WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
_SENSES = {"<=": -1, "≤": -1, ">=": 1, "≥": 1, "=": 0, "==": 0}


@dataclass(frozen=True, kw_only=True)
class LinearConstraint:
    """Σ a_d r_d <= bound, over the shares r of a mixture."""

    coefficients: tuple[float, ...]
    """`(n_domains,)` a_d, in the study's domain order; at least one is not 0."""
    bound: float
    text: str
    """As the user wrote it; the constraints of an equality or a chain share it."""
    slack_rows: float = 0.0
    """In whole rows the bound may be missed by so many rows of the domain with the largest |a_d|: 0.5 for each side
    of an equality (the nearest whole row), otherwise 0."""


def parse_constraints(texts: Sequence[str], names: Sequence[str]) -> tuple[LinearConstraint, ...]:
    """Read the constraints of a study.

    Args:
        texts: `search.constraints`.
        names: the domains' names, in the study's order.

    Raises:
        ConfigError: with a problem per text that cannot be read, names no known domain, or can never hold or fail to
            hold because a percentage was written as a whole number.
    """
    found: list[LinearConstraint] = []
    problems = []
    for index, text in enumerate(texts):
        try:
            found.extend(_constraints_in(text, names))
        except _Unreadable as error:
            problems.append(Problem(path=f"search.constraints[{index}]", message=f"{text!r}: {error}"))
    if problems:
        raise ConfigError(problems)
    return tuple(found)


class _Unreadable(Exception):
    """Why a text is no constraint."""


@dataclass
class _Sum:
    """Σ a_d r_d + constant."""

    coefficients: list[float]
    constant: float = 0.0
    whole: list[float] = field(default_factory=list)
    """Constants above 1, written without %: no share is that large."""


def _constraints_in(text: str, names: Sequence[str]) -> Iterator[LinearConstraint]:
    tokens = list(_tokens(text, names))
    comparisons = [i for i, (kind, _) in enumerate(tokens) if kind == "comparison"]
    if not comparisons:
        raise _Unreadable(f"compares nothing: it needs <=, >= or =; {GRAMMAR}")
    edges = [-1, *comparisons, len(tokens)]
    sums = [_sum(tokens[a + 1 : b], len(names)) for a, b in pairwise(edges)]
    for at, (left, right) in zip(comparisons, pairwise(sums), strict=True):
        yield from _compared(left, _SENSES[str(tokens[at][1])], right, text)


def _compared(left: _Sum, sense: int, right: _Sum, text: str) -> Iterator[LinearConstraint]:
    coefficients = [a - b for a, b in zip(left.coefficients, right.coefficients, strict=True)]
    bound = right.constant - left.constant
    if not all(math.isfinite(x) for x in (*coefficients, bound)):
        raise _Unreadable("its numbers are too large")
    if not any(coefficients):
        raise _Unreadable(
            "no domain is left in it; it must name a domain on one side (a domain whose name is a number cannot stand "
            "in a constraint)"
        )
    whole = [*left.whole, *right.whole]
    meant = f"; did you mean {whole[0]:g} %?" if whole else ""
    # On the simplex a weighted sum of shares lies between the smallest and the largest weight.
    low, high = min(coefficients), max(coefficients)
    never = (sense <= 0 and bound < low - 1e-9) or (sense >= 0 and bound > high + 1e-9)
    always = (sense < 0 and bound >= high) or (sense > 0 and bound <= low)
    if never or (always and whole):
        raise _Unreadable(
            f"can {'never' if never else 'only'} hold: shares are between 0 and 1 and sum to 1{meant}"
            f"{'' if meant else '; ' + GRAMMAR}"
        )
    slack = 0.5 if sense == 0 else 0.0
    if sense <= 0:
        yield LinearConstraint(coefficients=_plain(coefficients, 1), bound=bound + 0.0, text=text, slack_rows=slack)
    if sense >= 0:
        yield LinearConstraint(coefficients=_plain(coefficients, -1), bound=-bound + 0.0, text=text, slack_rows=slack)


def _plain(values: Sequence[float], sign: int) -> tuple[float, ...]:
    """Times `sign`, without a negative zero."""
    return tuple(sign * value + 0.0 for value in values)


def _sum(tokens: Sequence[tuple[str, str | float]], n_domains: int) -> _Sum:
    """`[sign] term {sign term}`; a term is numbers and at most one domain, times each other."""
    total = _Sum([0.0] * n_domains)
    position = 0
    while position == 0 or position < len(tokens):
        sign = 1.0
        if position < len(tokens) and tokens[position][0] == "sign":
            sign = -1.0 if tokens[position][1] == "-" else 1.0
            position += 1
        elif position > 0:
            raise _Unreadable(f"a +, - or * is missing before {_shown(tokens[position])}; {GRAMMAR}")
        factor, domain, plain = sign, None, False
        while True:
            if position >= len(tokens):
                raise _Unreadable(f"a share or a domain is missing after {_shown(tokens[-1])}" if tokens else GRAMMAR)
            kind, value = tokens[position]
            if kind == "domain" and domain is None:
                domain = int(value)
            elif kind == "domain":
                raise _Unreadable("domains can be added, not multiplied with each other")
            elif kind in ("number", "percent"):
                factor, plain = factor * float(value), kind == "number"
            else:
                raise _Unreadable(f"a share or a domain is missing before {_shown(tokens[position])}; {GRAMMAR}")
            position += 1
            if position >= len(tokens) or tokens[position][0] != "times":
                break
            position += 1
        if domain is not None:
            total.coefficients[domain] += factor
        else:
            total.constant += factor
            if plain and abs(factor) > 1:
                total.whole.append(abs(factor))
    return total


def _shown(token: tuple[str, str | float]) -> str:
    kind, value = token
    return "a domain" if kind == "domain" else f"{value:g}" if isinstance(value, float) else f"{value!r}"


def _tokens(text: str, names: Sequence[str]) -> Iterator[tuple[str, str | float]]:
    """(kind, value): a domain's index, a number, a percentage (as a share), a sign, `*`, a comparison."""
    position = 0
    while position < len(text):
        if text[position].isspace():
            position += 1
            continue
        name = max((n for n in names if _is_at(text, position, n)), key=len, default="")
        number = _NUMBER.match(text, position)
        if number and number.end() < len(text) and (text[number.end()].isalpha() or text[number.end()] == "_"):
            number = None
        comparison = _COMPARISON.match(text, position)
        if name and len(name) > (len(number[0]) if number else 0):
            yield "domain", float(names.index(name))
            position += len(name)
        elif number:
            position = number.end()
            rest = text[position:].lstrip()
            if rest.startswith("%"):
                yield "percent", float(number[0]) / 100
                position = len(text) - len(rest) + 1
            else:
                yield "number", float(number[0])
        elif comparison:
            yield "comparison", comparison[0]
            position = comparison.end()
        elif text[position] in "+-−":
            yield "sign", "+" if text[position] == "+" else "-"
            position += 1
        elif text[position] in "*·":
            yield "times", "*"
            position += 1
        elif word := _WORD.match(text, position):
            raise _Unreadable(_unknown(word[0], names))
        else:
            hint = "write <= or >=" if text[position] in "<>" else GRAMMAR
            raise _Unreadable(f"{text[position]!r} cannot stand here; {hint}")


def _is_at(text: str, position: int, name: str) -> bool:
    """Whether the domain stands there, and not a longer word; a `-` after it may be a minus."""
    end = position + len(name)
    return text.startswith(name, position) and not (end < len(text) and (text[end].isalnum() or text[end] == "_"))


def _unknown(word: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f"unknown domain {word!r}; " + (f"did you mean `{close[0]}`?" if close else f"known: {', '.join(names)}")
