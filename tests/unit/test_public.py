"""What ``import durably`` offers is what it says it offers."""

import subprocess
import sys

import durably
import durably.errors
import durably_schemas


def test_every_public_name_is_there_and_listed_in_order():
    for module in (durably, durably_schemas):
        assert module.__all__ == sorted(module.__all__)
        assert all(getattr(module, name) is not None for name in module.__all__)


def test_names_that_are_imported_late_are_listed_for_completion():
    assert set(durably.__all__) <= set(dir(durably))


TYPED = """
import asyncio
from durably import create_hook, define_hook, start, step, workflow

@step
async def charge(order: str, cents: int) -> str: ...
@step
def ship(order: str) -> int: ...
@workflow
async def fulfil(order: str) -> list[int]:
    reveal_type(await charge(order, 1))
    reveal_type(await asyncio.gather(charge(order, 1), ship(order)))
    reveal_type(await (await start(fulfil, order)).result())
    reveal_type(await define_hook(int).create())
    await charge(order, "1")
    await start(fulfil, 7)
    return [await ship(order)]
"""


def test_calls_are_checked_and_results_have_types(tmp_path):
    (tmp_path / "typed.py").write_text(TYPED)
    command = [sys.executable, "-m", "mypy", "--strict", "--no-incremental", "--config-file", "", "typed.py"]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False).stdout
    revealed = [line.partition('type is "')[2].rstrip('"') for line in told.splitlines() if "Revealed" in line]
    assert revealed == ["str", "tuple[str, int]", "list[int]", "int"], told
    wrong = [line for line in told.splitlines() if "arg-type" in line or "call-overload" in line]
    assert [line.rpartition(": error")[0] for line in wrong] == ["typed.py:15", "typed.py:16"], told


def test_every_error_is_public_and_drawn_in_the_tree():
    errors = {
        name
        for name, value in vars(durably.errors).items()
        if isinstance(value, type) and issubclass(value, Exception) and not name.startswith("_")
    }
    assert errors <= set(durably.__all__)
    assert all(name in (durably.errors.__doc__ or "") for name in errors)
