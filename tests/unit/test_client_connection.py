"""A client's connection while it is made, and the records that it refuses to send."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from durably.client import AsyncClient, Client, connection, default
from durably.client.connection import Connection
from durably.errors import BrokerUnreachable, ConfigurationError, DurablyError, SerializationError
from durably_schemas import Catalogue
from unit.scripted_broker import ScriptedBroker, ScriptedProcessor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_TICK", 0.01)


@pytest.fixture
def broker() -> ScriptedBroker:
    return ScriptedBroker(Catalogue(partitions=3))


@pytest.fixture
def made(broker: ScriptedBroker) -> Iterator[Connection]:
    connection = Connection(broker, broker.catalogue, timeout=5)
    yield connection
    connection.close()


def slowly(broker: ScriptedBroker, monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> list[str]:
    """Lets the broker take its time to say how many partitions there are, or fail; notes what it is asked."""
    asked: list[str] = []
    count = broker.partitions

    def partitions(topic: str, timeout: float = 10.0) -> int:
        asked.append(topic)
        time.sleep(0.2)
        if error is not None:
            raise error
        return count(topic)

    monkeypatch.setattr(broker, "partitions", partitions)
    return asked


@pytest.mark.parametrize("how", [Connection.listen, lambda made: made.listening().result()])
def test_all_who_come_at_once_share_one_attempt(
    how: Callable[[Connection], int], made: Connection, broker: ScriptedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = slowly(broker, monkeypatch, None)
    with ThreadPoolExecutor(20) as pool:
        assert len(set(pool.map(lambda _: how(made), range(20)))) == 1
    assert asked == [broker.catalogue.commands, broker.catalogue.replies]
    assert made.is_listening


def test_all_who_come_at_once_share_its_error_and_the_next_tries_again(
    made: Connection, broker: ScriptedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = slowly(broker, monkeypatch, BrokerUnreachable("nobody answers"))

    async def all_at_once() -> list[object]:
        tried = (asyncio.wrap_future(made.listening()) for _ in range(50))
        return await asyncio.gather(*tried, return_exceptions=True)

    assert {str(error) for error in asyncio.run(all_at_once())} == {"nobody answers"}
    assert len(asked) == 1
    monkeypatch.undo()
    made.listen()


def test_who_no_longer_waits_takes_the_attempt_from_nobody(
    made: Connection, broker: ScriptedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowly(broker, monkeypatch, None)

    async def one_gives_up() -> int:
        first, second = (asyncio.wrap_future(made.listening()) for _ in range(2))
        first.cancel()
        return await second

    assert asyncio.run(one_gives_up()) == made.listen()


def test_a_connection_that_is_closed_while_it_is_made_leaves_nothing_open(
    made: Connection, broker: ScriptedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowly(broker, monkeypatch, None)
    before = set(threading.enumerate())
    attempt = made.listening()
    made.close()
    with pytest.raises(DurablyError, match="this client is closed"):
        attempt.result(5)
    assert not made.is_open
    begun = set(threading.enumerate()) - before
    assert not [thread for thread in begun if thread.name in ("durably-acks", "durably-replies")]


def test_a_record_that_cannot_be_written_is_refused_with_its_value(broker: ScriptedBroker) -> None:
    processor = ScriptedProcessor(broker)
    processor.start("r1")

    async def all_refused() -> None:
        async with AsyncClient(broker) as client:
            for options in ({"attributes": {"a": "\ud800"}}, {"attributes": {"\ud800": "a"}}, {"delay": 1e300}):
                with pytest.raises((DurablyError, ValueError)) as refused:
                    await client.options(run_id="r2", **options).start("greet")
                assert type(refused.value).__module__ in ("durably.errors", "builtins")
            with pytest.raises(SerializationError, match="this CancelRun for r1 cannot be written"):
                await client.get_run("r1").cancel("\ud800")

    asyncio.run(all_refused())
    with Client(broker) as client, pytest.raises(SerializationError, match="this CancelRun for r1"):
        client.get_run("r1").cancel("\ud800")
    assert not broker.sent


def test_a_workflow_needs_a_name(broker: ScriptedBroker) -> None:
    with Client(broker) as client, pytest.raises(ConfigurationError, match="the workflow's name is empty"):
        client.start("")

    async def start() -> None:
        async with AsyncClient(broker) as client:
            await client.start("")

    with pytest.raises(ConfigurationError, match="the workflow's name is empty"):
        asyncio.run(start())
    assert not broker.sent


def test_without_a_url_the_functions_of_the_module_name_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DURABLY_URL", raising=False)
    monkeypatch.setattr(default, "_client", None)
    with pytest.raises(ConfigurationError, match=r"set DURABLY_URL, to kafka://.*or use a client of your own"):
        asyncio.run(default.start("greet"))
