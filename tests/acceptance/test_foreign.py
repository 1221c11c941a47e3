"""A program that knows only Kafka, Avro and MessagePack starts a run, runs its step and resumes its hook."""

from __future__ import annotations

import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from durably import Client
from foreign import FOREIGN, environment_of

if TYPE_CHECKING:
    from collections.abc import Iterator

FOLDER = Path(__file__).parents[2] / "examples" / "foreign"
DURABLY = Path(sys.executable).with_name("durably")


@pytest.fixture
def processor(kafka: str, namespace: str, tmp_path: Path) -> Iterator[str]:
    """A processor as a process, and no worker."""
    environment = environment_of(kafka, namespace, tmp_path / "data")
    subprocess.run([DURABLY, "topics", "create", "--queue", "payments"], env=environment, check=True, timeout=60)
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [DURABLY, "processor", FOLDER / "payments.py"], env=environment, stdout=log, stderr=log
        )
    yield environment["DURABLY_URL"]
    process.terminate()
    process.wait(30)
    print((tmp_path / "log").read_text())  # shown when the test fails


@pytest.mark.kafka
def test_a_foreign_program_starts_answers_and_resumes(processor: str, kafka: str, namespace: str) -> None:
    arguments = [FOLDER / "foreign.py", kafka, str(files("durably_schemas") / "avro"), "7", "1250"]
    result = subprocess.run(
        [sys.executable, "-c", FOREIGN, *arguments, "--namespace", namespace],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout == "pay-7 is paid\n"
    with Client(processor, namespace=namespace) as client:
        run = client.get_run("pay-7")
        assert run.result(timeout=60) == {"receipt": "receipt for 7", "confirmed_by": "the bank"}
        assert "hook_received" in [event.type for event in run.events()]
