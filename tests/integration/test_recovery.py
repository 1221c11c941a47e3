"""Recovery and retention on a real Kafka, and with a broker between processes that come and go."""

from __future__ import annotations

import harness
import pytest
from durably import create_hook, step, workflow
from durably.broker.port import TP
from durably.client import Run
from durably.errors import RunNotFoundError
from durably_processor import processor, standby
from durably_processor.restore import Restore
from durably_schemas.catalogue import partition_for

KEPT = 3_000


@step
async def recovery_echo(n: int) -> int:
    return n


@workflow
async def recovery_short(n: int) -> int:
    return await recovery_echo(n)


@workflow
async def recovery_long(token: str) -> list[object]:
    async with create_hook(token=token) as hook:
        first = await recovery_echo(1)
        return [first, await hook, await recovery_echo(2)]


@pytest.mark.timeout(180)
def test_a_run_outlives_the_events_that_it_began_with(lone_system):
    system = lone_system
    before = system.start_processor("before", retention=KEPT)
    system.start_worker()
    long = system.client.start(recovery_long, "recovery-token")
    assert system.hook("recovery-token").run_id == long.id
    shorts = [system.client.start(recovery_short, n) for n in range(12)]
    assert [run.result(30) for run in shorts] == list(range(12))

    mine = TP(system.catalogue.events, partition_for(long.id.encode(), harness.PARTITIONS))
    end = system.broker.end_offsets([mine])[mine]
    harness.until(lambda: all(is_gone(run) for run in shorts), 60)
    # The embedded broker drops whole batches, and never the last one; on Kafka a transaction's marker stays behind.
    spare = 30 if system.url.startswith("embedded:") else 2
    harness.until(lambda: system.broker.start_offsets([mine])[mine] >= max(1, end - spare), 60)

    system.stop_processor(before)
    system.start_processor("after", retention=KEPT)
    assert [e.type for e in long.events()][:2] == ["run_created", "run_started"]
    system.client.resume_hook("recovery-token", "go on")
    assert long.result(30) == [1, "go on", 2]
    assert [e.seq for e in long.events()] == list(range(1, 1 + len(long.events())))


@pytest.mark.timeout(180)
def test_a_successor_with_a_copy_reads_the_tail_alone(lone_system, monkeypatch):
    system = lone_system
    begun: list[Restore] = []

    class Noted(Restore):
        def __init__(self, *args) -> None:
            super().__init__(*args)
            begun.append(self)

    monkeypatch.setattr(processor, "Restore", Noted)
    monkeypatch.setattr(standby, "PAUSE", 0.2)
    first = system.start_processor("first")
    system.start_worker()
    for results in range(2):
        runs = [system.client.start(recovery_short, n) for n in range(40)]
        assert [run.result(60) for run in runs] == list(range(40)), results
    second = system.start_processor("second", standby=True)._processor
    harness.until(lambda: not second._restoring and second._partitions)
    mine = set(second._partitions)
    ends = system.broker.end_offsets([TP(system.catalogue.events, n) for n in range(harness.PARTITIONS)])

    def copied() -> bool:
        stores = dict(second._standby._stores)
        return all(tp.partition in mine or stores[tp.partition].checkpoint >= end for tp, end in ends.items())

    harness.until(lambda: len(second._standby._stores) == harness.PARTITIONS - len(mine), 60)
    harness.until(copied, 60)
    tail = [system.client.start(recovery_short, n).result(60) for n in range(2)]
    begun.clear()
    system.processors.remove(first)
    first.crash(committed=False)
    harness.until(lambda: len(second._partitions) == harness.PARTITIONS and not second._restoring, 60)
    assert len(begun) == harness.PARTITIONS - len(mine)
    assert sum(restore.count for restore in begun) <= 7 * len(tail) + 5, "of some 300 that there are"
    assert not second._standby._stores
    assert system.client.start(recovery_short, 7).result(30) == 7
    assert system.client.get_run(runs[0].id).result(30) == 0


def is_gone(run: Run) -> bool:
    try:
        run.describe()
    except RunNotFoundError:
        return True
    return False
