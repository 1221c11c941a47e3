"""The fixture ``durably_kafka``: a real installation, in a namespace of the test's own."""

from __future__ import annotations

import pytest
from confluent_kafka.admin import AdminClient
from durably import create_hook, step, workflow
from durably.testing.kafka import IMAGE, Installation, KafkaContainer
from kafka_cluster import IMAGE as TESTED
from kafka_cluster import KAFKA_VERSION

pytestmark = pytest.mark.kafka


@step
async def kitk_double(n: int) -> int:
    return 2 * n


@workflow
async def kitk_asks(token: str) -> int:
    return await kitk_double(await create_hook(token=token))


@pytest.fixture(scope="session")
def durably_kafka_broker(kafka: str) -> str:
    """As a project does that has a broker of its own."""
    return kafka


async def test_a_run_on_kafka(durably_kafka: Installation) -> None:
    async with durably_kafka.async_client() as client:
        run = await client.start(kitk_asks, "kitk-1")
        while not await run.hooks():
            pass
        await client.resume_hook("kitk-1", 21)
        assert await run.result(timeout=60) == 42


def test_each_test_has_a_namespace_of_its_own(durably_kafka: Installation) -> None:
    with durably_kafka.client() as client:
        assert client.runs() == []


def test_the_container_is_a_broker_that_answers() -> None:
    assert IMAGE.partition(":")[2] == KAFKA_VERSION, "what users get is what is tested"
    with KafkaContainer(TESTED) as container:
        assert len(AdminClient({"bootstrap.servers": container.bootstrap}).list_topics(timeout=10).brokers) == 1
