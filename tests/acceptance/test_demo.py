"""The demo is the first thing that a user runs: it must pass, and say so."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[2] / "examples" / "orders" / "demo.py"


def run_demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DURABLY_")}
    return subprocess.run(
        [sys.executable, DEMO, *arguments],
        env=environment, capture_output=True, text=True, timeout=170, check=False,
    )  # fmt: skip


@pytest.mark.timeout(180)
def test_400_orders_survive_a_kill_of_the_embedded_process() -> None:
    demo = run_demo()
    assert demo.returncode == 0, demo.stdout + demo.stderr
    assert "kill -9 durably dev" in demo.stdout
    assert "The books agree." in demo.stdout


@pytest.mark.kafka
@pytest.mark.timeout(180)
def test_400_orders_survive_a_kill_of_the_processor_on_kafka(kafka: str) -> None:
    demo = run_demo("--url", f"kafka://{kafka}")
    assert demo.returncode == 0, demo.stdout + demo.stderr
    assert "kill -9 durably processor" in demo.stdout
    assert "The books agree." in demo.stdout
