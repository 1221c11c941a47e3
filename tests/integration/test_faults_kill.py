"""A killed owner, measured: how long until another one has gone on, though its transaction was open when it died."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import checker
import pytest
from fault_proxy import FaultProxy
from harness import until
from installation import SESSION, Installation
from integration.test_takeover import MODULE, RUNS

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.kafka

TRANSACTION = 90.0
"""Seconds after which the broker ends what a dead owner has left open, if nobody does before; 15 by default."""
SLOW = 60.0
"""Seconds that even a busy machine does not need for what is left to do."""


@pytest.fixture
def installation(kafka, namespace, tmp_path) -> Iterator[Installation]:
    installation = Installation(kafka, namespace, tmp_path, MODULE, environment={"LEDGER": str(tmp_path / "ledger")})
    yield installation
    installation.close()


PATIENT = {"DURABLY_KAFKA_TRANSACTION_TIMEOUT_MS": str(int(TRANSACTION * 1000))}


@pytest.mark.timeout(240)
@pytest.mark.parametrize("which", ["its-first", "a-later"])
def test_an_owner_killed_in_a_transaction_is_succeeded_before_that_would_time_out(
    installation, kafka, which, record_property
):
    installation.start("worker", "w")
    with FaultProxy(kafka) as proxy:
        if which == "its-first":
            proxy.drop_requests("EndTxn", math.inf)
        first = installation.start("processor", "p1", url=f"kafka://{proxy.bootstrap}", environment=PATIENT)
        if which == "a-later":
            warm = installation.client.options(run_id="warm").start("order", 0)
            assert warm.result(60) == 12
            proxy.drop_requests("EndTxn", math.inf)
        runs = [installation.client.options(run_id=f"order-{n}").start("order", n) for n in range(RUNS)]
        proxy.wait_struck("EndTxn")
        first.kill()
        killed = time.monotonic()
        first.wait(10)
    installation.start("processor", "p2")
    advanced = until(lambda: time.monotonic() if runs[0].status() != "pending" else 0, timeout=120) - killed
    assert [run.result(200) for run in runs] == [n + 12 for n in range(RUNS)]
    record_property("seconds_from_the_kill_until_the_next_owner_answers", round(advanced, 2))
    print(f"{advanced:.1f} s after the kill the next owner answers; the session lasts {SESSION} s")
    assert advanced < SESSION + SLOW, "the successor waited for the transaction timeout"
    ids = [run.id for run in runs] + ["warm"] * (which == "a-later")
    assert checker.violations(installation.broker, installation.catalogue, ids) == []
