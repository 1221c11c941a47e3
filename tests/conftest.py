"""Brokers for the tests. A test that needs Kafka and finds none fails; it is never skipped."""

from __future__ import annotations

import os
import uuid
from typing import TYPE_CHECKING

import kafka_cluster
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def _start() -> kafka_cluster.KafkaCluster:
    try:
        return kafka_cluster.start()
    except kafka_cluster.Unavailable as error:
        pytest.fail(str(error), pytrace=False)


@pytest.fixture(scope="session")
def kafka() -> Iterator[str]:
    """The address of the session's broker, started for the first test that asks."""
    if named := os.environ.get("DURABLY_TEST_KAFKA"):
        yield named
        return
    cluster = _start()
    yield cluster.bootstrap
    cluster.stop()


@pytest.fixture
def own_kafka() -> Iterator[kafka_cluster.KafkaCluster]:
    """A broker of the test's own, to kill, restart and pause."""
    cluster = _start()
    yield cluster
    cluster.stop()


@pytest.fixture(params=["embedded", pytest.param("kafka", marks=pytest.mark.kafka)])
def broker_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a broker: each test runs on the embedded one and on Kafka."""
    if request.param == "embedded":
        return f"embedded:{tmp_path}/embedded"
    return f"kafka://{request.getfixturevalue('kafka')}"


@pytest.fixture
def namespace() -> str:
    """A prefix for topics and groups that no other test uses."""
    return f"t{uuid.uuid4().hex[:10]}"
