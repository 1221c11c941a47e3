"""Owners that die, and owners that only seemed to: real processes, real Kafka, and a checker that reads the topics."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import checker
import pytest
from durably.broker import connect
from durably.client import Client
from durably_schemas import Catalogue

if TYPE_CHECKING:
    from collections.abc import Iterator

MODULE = Path(__file__).with_name("faulted.py")
DURABLY = Path(sys.executable).parent / "durably"
PARTITIONS = 4
RUNS = 60
EXPECTED = [n + 3 * 3 + 3 for n in range(RUNS)]
SESSION = 6.0


class Installation:
    """Processes of the command line on a namespace of their own."""

    def __init__(self, kafka: str, namespace: str, folder: Path) -> None:
        self.folder = folder
        self.url = f"kafka://{kafka}"
        self.namespace = namespace
        self.catalogue = Catalogue(namespace, PARTITIONS)
        self.broker = connect(self.url)
        self.broker.create(self.catalogue.topics())
        self.client = Client(self.url, namespace=namespace)
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, role: str, name: str) -> subprocess.Popen[bytes]:
        environment = os.environ | {
            "DURABLY_URL": self.url,
            "DURABLY_NAMESPACE": self.namespace,
            "DURABLY_PARTITIONS": str(PARTITIONS),
            "DURABLY_DATA_DIR": str(self.folder / name),
            "DURABLY_KAFKA_SESSION_TIMEOUT_MS": str(int(SESSION * 1000)),
            "LEDGER": str(self.folder / "ledger"),
        }
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen([DURABLY, role, str(MODULE)], env=environment, stdout=log, stderr=log)
        self.processes.append(process)
        deadline = time.monotonic() + 60
        while b"ready" not in (self.folder / f"{name}.log").read_bytes():
            assert process.poll() is None, (self.folder / f"{name}.log").read_text()
            assert time.monotonic() < deadline, f"{name} is not ready"
            time.sleep(0.05)
        return process

    def run(self, disturb) -> list[str]:
        runs = [self.client.options(run_id=f"order-{n}").start("order", n) for n in range(RUNS)]
        time.sleep(0.7)
        disturb()
        assert [run.result(timeout=90) for run in runs] == EXPECTED
        return [run.id for run in runs]

    def executions(self) -> Counter[str]:
        return Counter((self.folder / "ledger").read_text().splitlines())

    def close(self) -> None:
        self.client.close()
        for process in self.processes:
            process.send_signal(signal.SIGCONT)
            process.terminate()
        for process in self.processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
        self.broker.close()
        for log in sorted(self.folder.glob("*.log")):
            print(log.name, log.read_text()[-4000:], sep="\n")  # shown when the test fails


@pytest.fixture
def installation(kafka, namespace, tmp_path) -> Iterator[Installation]:
    installation = Installation(kafka, namespace, tmp_path)
    yield installation
    installation.close()


@pytest.mark.kafka
@pytest.mark.timeout(180)
def test_a_killed_owner_is_succeeded_and_nothing_is_lost_or_doubled(installation):
    first = installation.start("processor", "p1")
    installation.start("processor", "p2")
    installation.start("worker", "w")

    started = installation.run(first.kill)
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

    started = installation.run(stand_still)
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

    started = installation.run(come_and_go)
    assert checker.violations(installation.broker, installation.catalogue, started) == []
    assert set(installation.executions().values()) == {1}
