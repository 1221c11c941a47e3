"""Owners that die, and owners that only seemed to: real processes, real Kafka, and a checker that reads the topics."""

from __future__ import annotations

import signal
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import checker
import pytest
from installation import SESSION, Installation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MODULE = Path(__file__).with_name("faulted.py")
RUNS = 60
EXPECTED = [n + 3 * 3 + 3 for n in range(RUNS)]


def run(installation: Installation, disturb: Callable[[], object]) -> list[str]:
    """Lets orders come true while something disturbs them; returns the ids of their runs."""
    runs = [installation.client.options(run_id=f"order-{n}").start("order", n) for n in range(RUNS)]
    time.sleep(0.7)
    disturb()
    assert [run.result(timeout=90) for run in runs] == EXPECTED
    return [run.id for run in runs]


@pytest.fixture
def installation(kafka, namespace, tmp_path) -> Iterator[Installation]:
    ledger = {"LEDGER": str(tmp_path / "ledger")}
    installation = Installation(kafka, namespace, tmp_path, MODULE, environment=ledger)
    yield installation
    installation.close()


@pytest.mark.kafka
@pytest.mark.timeout(180)
def test_a_killed_owner_is_succeeded_and_nothing_is_lost_or_doubled(installation):
    first = installation.start("processor", "p1")
    installation.start("processor", "p2")
    installation.start("worker", "w")

    started = run(installation, first.kill)
    assert checker.violations(installation.broker, installation.catalogue, started) == []


@pytest.mark.kafka
@pytest.mark.timeout(180)
def test_an_owner_that_stood_still_wakes_up_as_no_owner(installation):
    first = installation.start("processor", "p1")
    installation.start("processor", "p2")
    installation.start("worker", "w")

    def stand_still() -> None:
        first.send_signal(signal.SIGSTOP)
        time.sleep(SESSION + 4)
        first.send_signal(signal.SIGCONT)

    started = run(installation, stand_still)
    time.sleep(2)  # the one that woke up would write now, if it could
    assert checker.violations(installation.broker, installation.catalogue, started) == []
    assert first.poll() is None, "it goes on as a member"


@pytest.mark.kafka
@pytest.mark.timeout(180)
def test_owners_that_come_and_go_in_peace_make_no_step_run_twice(installation):
    installation.start("processor", "p1")
    worker = installation.start("worker", "w1")

    def come_and_go() -> None:
        second = installation.start("processor", "p2")
        installation.start("worker", "w2")
        second.terminate()
        second.wait(20)
        worker.terminate()
        worker.wait(20)

    started = run(installation, come_and_go)
    assert checker.violations(installation.broker, installation.catalogue, started) == []
    executions = Counter((installation.folder / "ledger").read_text().splitlines())
    assert set(executions.values()) == {1}
