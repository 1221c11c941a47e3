"""The pytest plugin: the fixtures ``durably_env`` and ``durably_kafka``.

A package of its own, since pytest imports it at every start: importing ``durably`` waits until a test asks for it.
"""

from __future__ import annotations

import asyncio
import inspect
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from durably.testing import WorkflowEnvironment
    from durably.testing.kafka import Installation

FIXTURES = frozenset({"durably_env", "durably_kafka"})


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the options."""
    group = parser.getgroup("durably")
    group.addoption(
        "--durably-always-replay",
        action="store_true",
        help="durably_env replays each run from its log for each of its events",
    )
    group.addoption(
        "--durably-kafka",
        metavar="HOST:PORT",
        help="durably_kafka uses this broker, instead of one in a container",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Declares the marker."""
    config.addinivalue_line(
        "markers",
        "durably(always_replay=False, skip_time=True, now=None): how the durably_env of a test is made",
    )


@pytest.hookimpl
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Runs an ``async def`` test that asks for one of the fixtures, where no other plugin does so."""
    test = pyfuncitem.obj
    if not inspect.iscoroutinefunction(test) or FIXTURES.isdisjoint(pyfuncitem.fixturenames):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in inspect.signature(test).parameters}
    asyncio.run(test(**arguments))
    return True


@pytest.fixture
def durably_env(request: pytest.FixtureRequest) -> Iterator[WorkflowEnvironment]:
    """Runs of workflows without broker, processes or waiting: a `durably.testing.WorkflowEnvironment`.

    ``@pytest.mark.durably(always_replay=True)`` sets its options for a test, ``--durably-always-replay`` for all.
    """
    from durably.testing import WorkflowEnvironment

    marker = request.node.get_closest_marker("durably")
    options: dict[str, Any] = dict(marker.kwargs) if marker is not None else {}
    if request.config.getoption("durably_always_replay"):
        options["always_replay"] = True
    with WorkflowEnvironment(**options) as environment:
        yield environment


@pytest.fixture(scope="session")
def durably_kafka_broker(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a Kafka broker: that of ``--durably-kafka``, else one in a container, for the whole session.

    Override it to bring one of your own.
    """
    given: str | None = request.config.getoption("durably_kafka")
    if given is not None:
        yield given
        return
    from durably.testing.kafka import KafkaContainer

    with KafkaContainer() as container:
        yield container.bootstrap


@pytest.fixture
def durably_kafka(durably_kafka_broker: str, tmp_path: Any) -> Iterator[Installation]:
    """A processor and a worker on Kafka, in a namespace of the test's own: a `durably.testing.kafka.Installation`."""
    from durably.testing.kafka import Installation

    with Installation(f"kafka://{durably_kafka_broker}", tmp_path) as installation:
        yield installation
