"""The table of faults in tests/README.md: every line names tests, and they exist."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
_NAMED = re.compile(r"`([\w/]+\.py)(?:::(\w+))?`")


def lines() -> list[list[str]]:
    text = (TESTS / "README.md").read_text(encoding="utf-8").partition("## Faults")[2]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:1] == "|"]
    return rows[2:]


@cache
def functions(file: str) -> frozenset[str]:
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def test_the_table_is_there() -> None:
    assert len(lines()) > 25
    assert all(len(row) == 3 for row in lines())


@pytest.mark.parametrize("row", lines(), ids=lambda row: row[0])
def test_a_fault_has_tests(row: list[str]) -> None:
    named = [found for found in _NAMED.findall(row[2]) if not found[0].startswith("benchmarks/")]
    assert named, "a fault without a test"
    for file, test in named:
        assert (TESTS / file).is_file(), file
        assert not test or test in functions(file), f"{file} has no {test}"
