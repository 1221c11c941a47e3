"""A record that the broker will never take stops the run that it is about, and nobody else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import harness
import pytest
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource
from durably import step, workflow
from durably.errors import RunBlockedError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.kafka


@step(queue="other")
async def refused_echo(text: str) -> int:
    return len(text)


@workflow
async def refused_run(size: int) -> int:
    return await refused_echo("x" * size)


def set_limit(kafka: str, topic: str, size: int) -> None:
    """How large a record of the topic may be, in bytes."""
    entry = ConfigEntry("max.message.bytes", str(size), incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ConfigResource.Type.TOPIC, topic, incremental_configs=[entry])
    admin = AdminClient({"bootstrap.servers": kafka})  # it must outlive what it was asked for
    for future in admin.incremental_alter_configs([resource]).values():
        future.result(20)


@pytest.fixture
def system(kafka: str, namespace: str, tmp_path: Path) -> Iterator[harness.System]:
    """One whose queue `other` takes only small records."""
    system = harness.System(f"kafka://{kafka}", namespace, tmp_path)
    set_limit(kafka, system.catalogue.requests("other"), 4_000)
    system.start_worker()
    yield system
    system.close()


@pytest.mark.timeout(180)
@pytest.mark.parametrize("dispatch", ["early", "committed"])
def test_a_request_that_kafka_refuses_for_good_blocks_its_run_alone(system, kafka, dispatch):
    running = system.start_processor(dispatch=dispatch)
    assert system.client.start(refused_run, 1).result(60) == 1
    too_large = system.client.start(refused_run, 10_000)
    others = [system.client.start(refused_run, n) for n in range(12)]
    assert [run.result(60) for run in others] == list(range(12))
    with pytest.raises(RunBlockedError, match=r"max\.message\.bytes"):
        too_large.result(60)
    set_limit(kafka, system.catalogue.requests("other"), 1_000_000)
    system.stop_processor(running)
    system.start_processor(dispatch=dispatch)
    harness.until(lambda: too_large.status() == "completed", timeout=60)
    assert too_large.result(60) == 10_000
    assert system.violations() == []
