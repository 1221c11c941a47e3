"""What the dashboard says of queues and dead letters, on each broker."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from durably import step, workflow
from durably.client.connection import Connection
from durably_connectors.http.dashboard import letters
from durably_connectors.http.dashboard.queues import Queue, queues
from durably_connectors.http.problems import Problem
from durably_schemas.records import StartRun
from harness import System, until

if TYPE_CHECKING:
    from collections.abc import Callable


@step(name="dashq.ends")
async def ends(n: int) -> int:
    return n


@step(name="dashq.waits", queue="other")
async def waits(n: int) -> int:
    return n


@workflow(name="dashq.several")
async def several(n: int) -> list[int]:
    return await asyncio.gather(*(ends(i) for i in range(n)))


@workflow(name="dashq.stuck")
async def stuck(n: int) -> list[int]:
    return await asyncio.gather(*(waits(i) for i in range(n)))


def test_queues_have_the_lag_that_they_have_and_the_members_that_live(lone_system: System) -> None:
    system = lone_system

    def seen(true: Callable[[dict[str, Queue]], Any]) -> dict[str, Queue]:
        def look() -> dict[str, Queue] | None:
            found = {queue.name: queue for queue in queues(system.broker, system.catalogue)}
            assert [queue.problem for queue in found.values()] == [None, None, None]
            return found if true(found) else None

        return until(look, 60)  # type: ignore[return-value]

    system.start_processor()
    worker = system.start_worker(("default",))
    assert system.client.start(several, 5).result(60) == list(range(5))
    blocked = system.client.start(stuck, 4)
    found = seen(lambda q: (q["other"].lag, q["default"].lag, q["processors"].lag) == (4, 0, 0))
    assert [len(found[name].members) for name in ("processors", "default", "other")] == [1, 1, 0]
    assert {p.tp.partition for p in found["default"].partitions} == {0, 1, 2}
    (member,) = found["default"].members
    assert sorted(tp.partition for tp in member.partitions) == [0, 1, 2]
    worker.stop()
    worker.join()
    system.workers.remove(worker)
    seen(lambda q: not q["default"].members)
    system.start_worker(("other",))
    assert blocked.result(60) == list(range(4))
    assert len(seen(lambda q: q["other"].lag == 0)["other"].members) == 1


def test_a_dead_letter_is_found_and_its_record_comes_again(lone_system: System) -> None:
    system = lone_system
    system.start_processor()
    connection = Connection(system.broker, system.catalogue)
    try:
        producer = system.broker.producer()
        producer.send(system.catalogue.commands, b"\xc3\x01 nothing", key=b"dashq-1")
        assert producer.flush(10) == 0
        producer.close()
        (letter,) = until(lambda: letters.latest(connection).found)
        assert (letter.sort, letter.fixed) == ("Unreadable record", None)
        assert letter.letter is not None
        assert letter.letter.key == b"dashq-1"
        found = letters.letter_at(connection, letter.partition, letter.offset)
        assert found == letter
        letters.send_again(connection, found)
        again = until(lambda: len(both := letters.latest(connection).found) == 2 and both)
        assert {one.letter.value for one in again if one.letter} == {b"\xc3\x01 nothing"}
        assert not any(isinstance(one.record, StartRun) for one in again)
        with pytest.raises(Problem, match="no longer kept"):
            letters.letter_at(connection, letter.partition, letter.offset + 100)
    finally:
        connection.close()
