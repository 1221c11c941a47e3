"""docs/rules.md leaves no rule out, and every test that it names exists."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest
from acceptance.test_parity import TESTS, functions_of

PAGE = TESTS.parent / "docs" / "rules.md"
EXPECTED = [
    "K1", "K2", "K3", "K4", "K5a", "K5b", "K5c", "K5d", "K6", "K7", "K8", "K9", "K10",
    *(f"{table}{n}" for table, last in {"T": 7, "F": 4, "O": 7, "A": 5, "P": 4, "H": 6, "S": 5, "I": 9}.items()
      for n in range(1, last + 1)),
]  # fmt: skip


class Rule(NamedTuple):
    """One row of the page."""

    id: str
    text: str
    tests: list[str]


def rules() -> list[Rule]:
    found = []
    for line in PAGE.read_text().splitlines():
        if re.match(r"\| [A-Z]\d", line):
            id_, text, tests = (cell.strip() for cell in line.strip("|").split(" | "))
            found.append(Rule(id_, text, re.findall(r"`([^`]*)`", tests)))
    return found


def test_no_rule_is_left_out_and_none_stands_twice() -> None:
    assert [rule.id for rule in rules()] == EXPECTED


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule.id)
def test_a_rule_names_tests_that_exist(rule: Rule) -> None:
    assert rule.text.endswith(".")
    assert rule.tests
    for test in rule.tests:
        path, _, name = test.partition("::")
        assert (TESTS / path).is_file(), test
        assert name.startswith("test_"), test
        assert name in functions_of(TESTS / path), test
