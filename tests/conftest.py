"""Brokers and installations for the tests. A test that needs Kafka and finds none fails; it is never skipped."""

from __future__ import annotations

import os
import uuid
from typing import TYPE_CHECKING

import harness
import kafka_cluster
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytest_plugins = ["durably_pytest"]
"""Its entry point says the same, once it is installed."""


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
    return _url(request.param, request, tmp_path)


@pytest.fixture
def namespace() -> str:
    """A prefix for topics and groups that no other test uses."""
    return _namespace()


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((broker, mode), id=f"{broker}-{mode}", marks=[pytest.mark.kafka] if broker == "kafka" else [])
        for broker in ("embedded", "kafka")
        for mode in harness.MODES
    ],
)
def _system(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[harness.System]:
    broker, mode = request.param
    folder = tmp_path_factory.mktemp("system")
    system = harness.System(_url(broker, request, folder), _namespace(), folder)
    try:
        system.begin(mode)
        yield system
        system.calm_down()
        system.check()
        assert (system.restarts > 0) == (mode == "restart"), "a mode that does not do what it says"
        assert system.violations() == [], system
    finally:
        system.close()


@pytest.fixture
def system(_system: harness.System) -> Iterator[harness.System]:
    """An installation at work, on each broker and in each mode; it is shared by the tests of a module.

    So every test names its runs and tokens by `harness.System.fresh`, and lets its runs end, unless it declares them by
    `harness.System.leaves`: when the module is through, `checker.violations` must find nothing in the logs of all.
    """
    print(_system)  # shown where the test fails
    yield _system
    _system.check()


@pytest.fixture
def lone_system(broker_url: str, namespace: str, tmp_path: Path) -> Iterator[harness.System]:
    """An installation of the test's own, on each broker, where nothing is started yet."""
    system = harness.System(broker_url, namespace, tmp_path)
    yield system
    system.close()


def _url(broker: str, request: pytest.FixtureRequest, folder: Path) -> str:
    return f"embedded:{folder}/broker" if broker == "embedded" else f"kafka://{request.getfixturevalue('kafka')}"


def _namespace() -> str:
    return f"t{uuid.uuid4().hex[:10]}"
