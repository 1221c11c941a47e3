"""docs/parity.md leaves no row out, and every test that it names exists."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "parity.md"

LAST = {
    "A": 25, "B": 20, "C": 16, "D": 20, "E": 10, "F": 26, "G": 9, "H": 18, "I": 11, "J": 9, "K": 25, "L": 13, "O": 3,
    "S": 17, "X": 16, "Y": 8, "Z": 24, "3.4.": 18,
}  # fmt: skip
"""The last row of each table of behaviours. Table E begins with 0, the types of events."""
EXPECTED = [f"{table}{n}" for table, last in LAST.items() for n in range(0 if table == "E" else 1, last + 1)]
PROVED = {"works", "better"}
EXPLAINED = {"better", "not yet", "no counterpart"}


class Row(NamedTuple):
    """One row of the page: its id, the behaviour, how it stands, why, and the tests."""

    id: str
    behaviour: str
    status: str
    why: str
    tests: list[str]


def rows() -> list[Row]:
    found = []
    for line in PAGE.read_text().splitlines():
        if not re.match(r"\| ([A-Z]|3\.4\.)\d", line):
            continue
        id_, behaviour, here, tests = (cell.strip() for cell in line.strip("|").split(" | "))
        status, _, why = here.partition(":")
        found.append(Row(id_, behaviour, status.strip(), why.strip(), re.findall(r"`([^`]*)`", tests)))
    return found


@cache
def functions_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return {function.name for function in functions}


def test_no_row_is_left_out_and_none_stands_twice() -> None:
    assert [row.id for row in rows()] == EXPECTED


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.id)
def test_a_row_says_how_it_stands_and_names_tests_that_exist(row: Row) -> None:
    assert row.status in PROVED | EXPLAINED
    assert row.behaviour
    assert row.why or row.status not in EXPLAINED
    assert row.tests or row.status not in PROVED
    for test in row.tests:
        path, _, name = test.partition("::")
        name, _, parameter = name.partition("[")
        assert (TESTS / path).is_file(), test
        assert name.startswith("test_"), test
        assert name in functions_of(TESTS / path), test
        if parameter:
            assert known_parameter(path, parameter.removesuffix("]")), test


def known_parameter(path: str, name: str) -> bool:
    """Whether a parametrised test runs for an example or a page of this name."""
    root = TESTS.parent
    folder, suffix = {
        "acceptance/test_examples.py": (root / "examples" / "patterns", ".py"),
        "acceptance/test_docs.py": (root / "docs", ".md"),
    }[path]
    return (folder / f"{name}{suffix}").is_file()
