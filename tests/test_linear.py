"""Reading linear constraints: every form a study file may use, and what is said about the others."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duet_ray.errors import ConfigError
from duet_ray.linear import LinearConstraint, parse_constraints

NAMES = ("wikitext", "code", "maths", "code-maths", "2wiki", "7")


def read(text: str) -> list[tuple[dict[str, float], float]]:
    """Each constraint as (domain → coefficient, bound)."""
    return [
        ({name: a for name, a in zip(NAMES, c.coefficients, strict=True) if a}, c.bound)
        for c in parse_constraints([text], NAMES)
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("wikitext <= 0.4", [({"wikitext": 1}, 0.4)]),
        ("wikitext ≤ 40 %", [({"wikitext": 1}, 0.4)]),
        ("wikitext<=40%", [({"wikitext": 1}, 0.4)]),
        ("code + maths >= 0.2", [({"code": -1, "maths": -1}, -0.2)]),
        ("2*code - maths <= 0.1", [({"code": 2, "maths": -1}, 0.1)]),
        ("code*2 - .5 * maths <= 1e-1", [({"code": 2, "maths": -0.5}, 0.1)]),
        ("code >= maths", [({"code": -1, "maths": 1}, 0)]),
        ("0.4 >= wikitext", [({"wikitext": 1}, 0.4)]),
        ("-code <= -10 %", [({"code": -1}, -0.1)]),
        ("code + 0.1 <= maths + 0.3", [({"code": 1, "maths": -1}, pytest.approx(0.2))]),
        ("code + code <= 0.5", [({"code": 2}, 0.5)]),
        ("code = maths", [({"code": 1, "maths": -1}, 0), ({"code": -1, "maths": 1}, 0)]),
        ("code == 0.3", [({"code": 1}, 0.3), ({"code": -1}, -0.3)]),
        ("0.1 <= code <= 0.3", [({"code": -1}, -0.1), ({"code": 1}, 0.3)]),
        # Names are read longest first, and as names before they are read as numbers.
        ("code-maths <= 0.4", [({"code-maths": 1}, 0.4)]),
        ("code - maths <= 0.4", [({"code": 1, "maths": -1}, 0.4)]),
        ("code-wikitext <= 0.4", [({"code": 1, "wikitext": -1}, 0.4)]),
        ("code-2*maths <= 0.4", [({"code": 1, "maths": -2}, 0.4)]),
        ("2*2wiki <= 0.4", [({"2wiki": 2}, 0.4)]),
        ("code <= 1", [({"code": 1}, 1)]),
    ],
)
def test_what_a_text_means(text, expected):
    assert read(text) == expected


def test_only_an_equality_may_be_missed():
    below, above, plain = parse_constraints(["code = 0.3", "code <= 0.3"], NAMES)
    assert (below.slack_rows, above.slack_rows, plain.slack_rows) == (0.5, 0.5, 0)
    assert below.text == above.text == "code = 0.3"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wiki-text <= 0.1", "unknown domain 'wiki-text'; did you mean `wikitext`"),
        ("code - mths <= 0.1", "unknown domain 'mths'; did you mean `maths`"),
        ("poetry <= 0.1", "unknown domain 'poetry'; known: wikitext, code, maths, code-maths, 2wiki, 7"),
        ("codes <= 0.1", "unknown domain 'codes'; did you mean `code`"),
        ("2code <= 0.1", "unknown domain '2code'; did you mean `code`"),
        ("code <= 40", "can only hold.*did you mean 40 %"),
        ("code >= 40", "can never hold.*did you mean 40 %"),
        ("code = 40", "can never hold.*did you mean 40 %"),
        ("code <= -0.1", "can never hold"),
        ("code + maths >= 1.5", "can never hold"),
        ("code < 0.1", "'<' cannot stand here; write <= or >="),
        ("(code) <= 0.1", r"'\(' cannot stand here; write for instance"),
        ("code / 2 <= 0.1", "'/' cannot stand here"),
        ("code", "compares nothing"),
        ("", "compares nothing"),
        ("code <=", "write for instance"),
        ("code + <= 0.1", r"missing after '\+'"),
        ("code maths <= 0.1", r"a \+, - or \* is missing before a domain"),
        ("code * <= 0.1", r"missing after '\*'"),
        ("code * * 2 <= 0.1", r"missing before '\*'"),
        ("code * maths <= 0.1", "not multiplied with each other"),
        ("0.1 <= 0.2", "no domain is left in it"),
        ("7 <= 0.2", "a domain whose name is a number"),
        ("code - code <= 0.1", "no domain is left in it"),
        ("1e999*code <= 0.1", "too large"),
    ],
)
def test_what_cannot_be_read_says_why(text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse_constraints(["code <= 0.5", text], NAMES)
    assert [p.path for p in caught.value.problems] == ["search.constraints[1]"]
    assert repr(text) in str(caught.value)


def test_all_problems_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        parse_constraints(["cod <= 0.1", "code <= 0.5", "maths < 0.1"], NAMES)
    assert [p.path for p in caught.value.problems] == ["search.constraints[0]", "search.constraints[2]"]


def test_no_text_no_constraint():
    assert parse_constraints([], NAMES) == ()


numbers = st.floats(-2, 2).map(lambda x: round(x, 3))


@given(st.lists(numbers, min_size=6, max_size=6), numbers, st.sampled_from(["<=", ">="]), st.booleans())
def test_what_is_written_is_what_is_read(coefficients, bound, comparison, spaces):
    space = " " if spaces else ""
    signed = [("-" if a < 0 else "+", abs(a), name) for a, name in zip(coefficients, NAMES[:5], strict=False)]
    terms = "".join(f" {sign} {a}{space}*{space}{name}" for sign, a, name in signed)
    low, high = min([*coefficients[:5], 0.0]), max([*coefficients[:5], 0.0])
    if not any(coefficients[:5]) or not low < bound < high:
        return
    (found,) = parse_constraints([f"{terms} {comparison} {bound}"], NAMES)
    sign = 1 if comparison == "<=" else -1
    assert found == LinearConstraint(
        coefficients=tuple(sign * a + 0.0 for a in [*coefficients[:5], 0.0]), bound=sign * bound, text=found.text
    )


@given(st.text("code maths<>=+-*%0123456789._()ab", max_size=30))
def test_any_text_is_read_or_refused(text):
    try:
        found = parse_constraints([text], NAMES)
    except ConfigError:
        return
    assert found
    assert all(any(c.coefficients) for c in found)
