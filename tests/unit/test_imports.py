"""Imports go one way: schemas <- sdk <- processor, schemas <- sdk <- connectors, sdk <- the pytest plugin."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPONENTS = {
    "durably_schemas": ("schemas", set()),
    "durably": ("sdk", {"durably_schemas"}),
    "durably_pytest": ("sdk", {"durably"}),
    "durably_processor": ("processor", {"durably_schemas", "durably"}),
    "durably_connectors": ("connectors", {"durably_schemas", "durably"}),
}


def imported(source: str) -> set[str]:
    """The top-level names of all modules that a source imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(str(node.module).partition(".")[0])
    return names


@pytest.mark.parametrize("package", COMPONENTS)
def test_a_component_imports_only_what_stands_below_it(package: str) -> None:
    folder, below = COMPONENTS[package]
    sources = sorted((ROOT / folder / package).rglob("*.py"))
    assert sources
    wrong = {
        str(path.relative_to(ROOT)): sorted(upward)
        for path in sources
        if (upward := imported(path.read_text()) & (COMPONENTS.keys() - below - {package}))
    }
    assert not wrong


def test_every_top_level_package_has_its_place_in_the_order() -> None:
    found = {path.parent.name for path in ROOT.glob("*/durably*/py.typed")}
    assert found == COMPONENTS.keys()


@pytest.mark.parametrize(
    "source", ["import durably.client", "from durably.client import Client", "def f():\n    import durably as d"]
)
def test_no_form_of_import_is_overlooked(source: str) -> None:
    assert imported(source) == {"durably"}


def test_relative_imports_stay_within_their_package() -> None:
    assert imported("from . import records") == set()
