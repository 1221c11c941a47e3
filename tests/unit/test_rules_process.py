"""Rules of correctness of Python's own making: what depends on a process must not reach workflow code."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

FLOW = """
import asyncio
from durably import workflow

@workflow
async def rules_flow() -> None: ...
"""
SCRIPT = """
import os, sys
from durably_processor.process import prepare
prepare([sys.argv[1]])
print(os.environ["PYTHONHASHSEED"], os.environ["TZ"], hash("order"), [*{f"name-{i}" for i in range(20)}])
"""


@pytest.fixture
def module(tmp_path: Path) -> Path:
    path = tmp_path / "rules_flow.py"
    path.write_text(FLOW)
    return path


def prepared(module: Path, **environment: str) -> str:
    """What a processor's interpreter sees that was started in this environment."""
    inherited = {name: value for name, value in os.environ.items() if name not in {"PYTHONHASHSEED", "TZ"}}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(module)],
        env=inherited | environment, capture_output=True, text=True, check=True, timeout=100,
    )  # fmt: skip
    return done.stdout


def test_every_processor_has_the_same_hash_seed_and_time_zone_whatever_it_was_started_with(module):
    seen = {
        prepared(module),
        prepared(module, PYTHONHASHSEED="7", TZ="Asia/Kathmandu"),
        prepared(module, PYTHONHASHSEED="0", TZ="UTC"),
    }
    assert len(seen) == 1, seen
    assert seen.pop().startswith("0 UTC ")
