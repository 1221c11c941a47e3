"""What several unit tests share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from durably.client import Client, connection
from durably_connectors.http import projection
from durably_processor.engine import guards
from durably_schemas import Catalogue
from partition_lab import Lab
from unit.scripted_broker import ScriptedBroker, ScriptedProcessor

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def broker() -> ScriptedBroker:
    """A broker that keeps what was sent."""
    return ScriptedBroker(Catalogue(partitions=3))


@pytest.fixture
def processor(broker: ScriptedBroker) -> ScriptedProcessor:
    """Whoever answers on it."""
    return ScriptedProcessor(broker)


@pytest.fixture
def client(broker: ScriptedBroker) -> Iterator[Client]:
    """A client on it."""
    with Client(broker, timeout=5) as made:
        yield made


@pytest.fixture
def quick_gateway(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway looks for what is new without letting a test wait."""
    monkeypatch.setattr(connection, "_TICK", 0.01)
    monkeypatch.setattr(projection, "_POLL", 0.02)


@pytest.fixture
def guarded():
    """Workflow code runs as in a processor."""
    guards.install()
    yield
    guards.uninstall()


@pytest.fixture
def lab(tmp_path, guarded):
    """A partition driven by hand."""
    lab = Lab(tmp_path)
    yield lab
    lab.partition.drop()
    lab.store.close()
