"""The pytest plugin, as a project of somebody else has it."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[2]

APP = """
from durably import sleep, step, workflow

@step
async def plug_pay(n: int) -> int:
    return n

chosen = []

@workflow
async def plug_shop(n: int) -> int:
    await sleep("30d")
    return await plug_pay(n)

@workflow
async def plug_chancy() -> None:
    chosen.append(1)
    for _ in chosen:
        await plug_pay(len(chosen))
"""
TESTS = """
import app, pytest
from datetime import datetime, timezone

async def test_a_run(durably_env):
    durably_env.replace(app.plug_pay, lambda n: n + 1)
    assert await (await durably_env.start(app.plug_shop, 1)).result() == 2

def test_a_plain_one(durably_env):
    assert durably_env.skip_time

@pytest.mark.durably(skip_time=False, now=datetime(2030, 1, 1, tzinfo=timezone.utc))
async def test_a_marked_one(durably_env, tmp_path):
    assert (durably_env.skip_time, durably_env.now.year) == (False, 2030)

async def test_a_chancy_one(durably_env):
    await (await durably_env.start(app.plug_chancy)).result()

async def test_one_that_fails(durably_env):
    assert await (await durably_env.start(app.plug_shop, 1)).result() == 2
"""


def run_pytest(folder: Path, *arguments: str) -> str:
    """What pytest says in a project that has no plugin but ours."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "durably_pytest", "-p", "no:cacheprovider", "-q", "--rootdir", ".",
         "--strict-markers", *arguments],
        cwd=folder, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    return done.stdout + done.stderr


def test_its_entry_point_leads_to_it() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (target,) = project["entry-points"]["pytest11"].values()
    assert import_module(target).durably_env
    assert "testcontainers" in " ".join(project["optional-dependencies"]["testing"])


def test_async_tests_need_no_other_plugin_and_options_reach_them(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(APP)
    (tmp_path / "test_app.py").write_text(TESTS)
    said = run_pytest(tmp_path)
    assert "1 failed, 4 passed" in said, said
    assert "FAILED test_app.py::test_one_that_fails - assert 1 == 2" in said, said
    strict = run_pytest(tmp_path, "--durably-always-replay")
    assert "2 failed, 3 passed" in strict, strict
    assert "does not do what its log says" in strict, strict


def test_it_costs_nothing_where_nobody_asks_for_it(tmp_path: Path) -> None:
    (tmp_path / "test_nothing.py").write_text(
        "import sys\ndef test_nothing():\n    assert not [name for name in sys.modules if name.split('.')[0] == 'durably']\n"
    )
    assert "1 passed" in run_pytest(tmp_path)


def test_its_fixtures_say_what_they_are(tmp_path: Path) -> None:
    said = run_pytest(tmp_path, "--fixtures")
    for name in ("durably_env", "durably_kafka", "durably_kafka_broker"):
        assert f"{name} " in said, said


def test_the_example_passes_its_own_tests() -> None:
    said = run_pytest(ROOT / "examples" / "testing")
    assert "9 passed" in said, said
