"""Processors on a real Kafka whose answers are lost or late, and that rebalance at the worst moments.

Each processor has a proxy of its own; clients, workers and the checker go straight to the broker.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any

import harness
import pytest
from durably import get_writable, sleep, step, workflow
from durably.broker import connect
from durably.broker.port import TP, Committed, Message
from durably.client import Client
from durably.errors import BrokerUnreachable
from durably_processor import committer, processor
from durably_processor.processor import Processor
from durably_schemas import Catalogue
from fault_proxy import FaultProxy
from harness import until

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from durably.broker.port import Broker

pytestmark = pytest.mark.kafka

QUICK = {"heartbeat.interval.ms": "200", "session.timeout.ms": "6000"}


@step
async def faults_add(n: int, more: int) -> int:
    return n + more


@workflow
async def faults_order(n: int) -> int:
    total = await faults_add(n, 1)
    for _ in range(4):
        total += sum(await asyncio.gather(faults_add(0, 1), faults_add(0, 2)))
        await sleep("150ms")
    return total


@workflow
async def faults_nap(seconds: float) -> str:
    await sleep(seconds)
    return "rested"


class Scene:
    """An installation whose processors are each behind a proxy."""

    def __init__(self, kafka: str, namespace: str, folder: Path) -> None:
        self.kafka = kafka
        self.system = harness.System(f"kafka://{kafka}", namespace, folder, kafka=QUICK)
        self.stack = ExitStack()
        self.ids: list[str] = []

    def processor(
        self, name: str, *, wait: bool = True, lost: Sequence[str] = ()
    ) -> tuple[harness.RunningProcessor, FaultProxy]:
        """A processor and its proxy. ``lost``: APIs whose answers are lost from the beginning."""
        proxy = self.stack.enter_context(FaultProxy(self.kafka))
        for api in lost:
            proxy.drop_answers(api, math.inf)
        broker = self.stack.enter_context(closing(connect(f"kafka://{proxy.bootstrap}", QUICK)))
        return self.system.start_processor(name, broker=broker, wait=wait), proxy

    def owned(self, running: harness.RunningProcessor) -> set[int]:
        """The partitions that a processor advances."""
        return set(running._processor._partitions)

    def orders(self, count: int) -> Orders:
        return Orders(self.system, count)

    def settle(self) -> None:
        self.system.check()
        assert self.system.violations() == []

    def close(self) -> None:
        self.system.close()
        self.stack.close()


class Orders:
    """Runs that go on while something happens to their processors."""

    def __init__(self, system: harness.System, count: int) -> None:
        self.runs = [system.client.start(faults_order, n) for n in range(count)]

    def come_out_right(self) -> None:
        assert [run.result(100) for run in self.runs] == [n + 13 for n in range(len(self.runs))]


@pytest.fixture
def scene(kafka: str, namespace: str, tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(kafka, namespace, tmp_path)
    scene.system.start_worker()
    yield scene
    scene.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit is given up after two seconds, as otherwise after ten."""
    monkeypatch.setattr(committer, "COMMIT_BOUND", 2.0)
    monkeypatch.setattr(committer, "OVERDUE", 3.0)


# -- answers that do not come ------------------------------------------------------------------------------------------

TRANSACTIONAL = ["AddPartitionsToTxn", "AddOffsetsToTxn", "TxnOffsetCommit", "EndTxn", "Produce"]


@pytest.mark.timeout(240)
@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("lost", ["answers", "requests"])
@pytest.mark.parametrize("api", TRANSACTIONAL)
def test_a_transaction_of_unknown_outcome_replaces_the_producer_and_loses_and_doubles_nothing(scene, api, lost):
    _, proxy = scene.processor("p")
    scene.orders(2).come_out_right()
    orders = scene.orders(20)
    before = proxy.seen["InitProducerId"]
    (proxy.drop_answers if lost == "answers" else proxy.drop_requests)(api)
    proxy.wait_struck(api)
    until(lambda: proxy.seen["InitProducerId"] > before, timeout=30)
    orders.come_out_right()
    scene.settle()


@pytest.mark.timeout(240)
@pytest.mark.usefixtures("impatient")
def test_a_silent_group_coordinator_is_noticed_within_the_budget_of_a_commit(scene):
    _, proxy = scene.processor("p")
    orders = scene.orders(20)
    before = proxy.seen["InitProducerId"]
    proxy.drop_answers("TxnOffsetCommit", math.inf)
    proxy.wait_struck("TxnOffsetCommit")
    began = time.monotonic()
    until(lambda: proxy.seen["InitProducerId"] > before, timeout=60)
    noticed = time.monotonic() - began
    proxy.heal()
    orders.come_out_right()
    # librdkafka alone would wait for the transaction's timeout of 15 s (librdkafka#5456).
    assert noticed < 12
    scene.settle()


def test_a_commit_of_offsets_that_nobody_answers_is_given_up(kafka, namespace):
    catalogue = Catalogue(namespace, 1)
    with FaultProxy(kafka) as proxy, closing(connect(f"kafka://{proxy.bootstrap}")) as broker:
        broker.create(catalogue.topics())
        assert broker.properties.consumer("group", None)["socket.timeout.ms"] == "10000"  # of each of three tries
        broker.properties._user["socket.timeout.ms"] = "1000"
        owned: list[int] = []
        consumer = broker.consumer(f"{namespace}.silent", catalogue.commands, Listening(owned))
        with closing(consumer):
            until(lambda: consumer.poll(0.1) is not None and owned)
            proxy.drop_answers("OffsetCommit", math.inf)
            began = time.monotonic()
            with pytest.raises(BrokerUnreachable, match="while committing offsets"):
                consumer.commit({TP(catalogue.commands, 0): Committed(0, "")}, wait=True)
            assert time.monotonic() - began < 30  # librdkafka's own default is a minute for each
            proxy.heal()


class Listening:
    """A group's listener that notes what is assigned."""

    def __init__(self, owned: list[int]) -> None:
        self.on_assigned = owned.extend
        self.on_revoked = self.on_lost = lambda _: None


# -- one transaction does not become part of the next ------------------------------------------------------------------


@pytest.fixture
def wires(kafka: str, namespace: str) -> Iterator[tuple[FaultProxy, Broker, TP]]:
    """A proxy, a connection through it, and a partition to write to."""
    with FaultProxy(kafka) as proxy, closing(connect(f"kafka://{proxy.bootstrap}")) as broker:
        catalogue = Catalogue(namespace, 1)
        broker.create(catalogue.topics())
        yield proxy, broker, TP(catalogue.events, 0)


def written(broker: Broker, tp: TP) -> list[bytes | None]:
    """What a reader sees up to the high watermark, when no transaction is open any more."""
    until(lambda: broker.end_offsets([tp], committed=True) == broker.end_offsets([tp]))
    end = broker.end_offsets([tp])
    reader = broker.reader({tp: 0})
    found: list[Any] = []
    while not found or (isinstance(found[-1], Message) and found[-1].offset + 1 < end[tp]):
        found += reader.poll(1)
    reader.close()
    return [record.value for record in found if isinstance(record, Message)]


def test_a_late_end_of_one_transaction_does_not_end_the_next(wires):
    proxy, broker, tp = wires
    first = broker.transactions(tp.topic)
    first.init(20)
    first.begin()
    first.send(tp.topic, b"N", partition=0)
    proxy.delay_requests("EndTxn", 3)
    with pytest.raises(BrokerUnreachable):
        first.commit({}, None, 1)
    first.close()
    second = broker.transactions(tp.topic)
    second.init(20)
    second.begin()
    second.send(tp.topic, b"N+1", partition=0)
    second._client.flush(10)
    time.sleep(4)  # the commit of N arrives while N+1 is open
    assert broker.end_offsets([tp], committed=True)[tp] < broker.end_offsets([tp])[tp], "N+1 is open"
    second.close()
    assert written(broker, tp) == []


def test_a_transaction_whose_commit_was_not_answered_is_there_once_and_the_next_has_only_its_own(wires):
    proxy, broker, tp = wires
    for value in (b"N", b"N+1"):
        producer = broker.transactions(tp.topic)
        producer.init(20)
        producer.begin()
        producer.send(tp.topic, value, partition=0)
        if value == b"N":
            proxy.drop_answers("EndTxn")
            with pytest.raises(BrokerUnreachable):
                producer.commit({}, None, 1)
        else:
            producer.commit({}, None, 20)
        producer.close()
    assert written(broker, tp) == [b"N", b"N+1"]


# -- rebalances --------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(240)
def test_a_rebalance_during_a_restore_takes_what_is_not_restored_yet_and_loses_nothing(scene):
    first, _ = scene.processor("p1")
    scene.orders(20).come_out_right()
    scene.system.stop_processor(first)
    second, proxy = scene.processor("p2", wait=False, lost=["Fetch"])  # it can restore nothing
    until(lambda: set(second._processor._restoring) == {0, 1, 2})
    orders = scene.orders(20)
    third, _ = scene.processor("p3", wait=False)
    until(lambda: scene.owned(third))
    restoring = set(second._processor._restoring)
    assert restoring == {0, 1, 2} - scene.owned(third), "what was taken away had not been restored"
    assert restoring
    proxy.heal()
    proxy.cut()  # who waits for a lost answer asks again
    orders.come_out_right()
    until(lambda: scene.owned(second) == restoring)
    scene.settle()


@pytest.mark.timeout(240)
@pytest.mark.parametrize("drain", [5.0, 0.2], ids=["awaited", "given-up"])
def test_a_rebalance_during_a_commit_neither_loses_nor_doubles_it(scene, monkeypatch, drain):
    monkeypatch.setattr(processor, "DRAIN", drain)
    busy: list[bool] = []
    on_revoked = Processor.on_revoked

    def noting(self: Processor, partitions: Sequence[int]) -> None:
        if self._committer is not None:
            until(lambda: self._committer is None or self._committer._busy)
            busy.append(True)
        on_revoked(self, partitions)

    _, proxy = scene.processor("p1")
    scene.orders(2).come_out_right()
    monkeypatch.setattr(Processor, "on_revoked", noting)
    orders = scene.orders(20)
    proxy.delay("EndTxn", 0.6, math.inf)
    scene.processor("p2")
    proxy.heal()
    assert busy
    orders.come_out_right()
    scene.settle()
    monkeypatch.setattr(Processor, "on_revoked", on_revoked)


@pytest.mark.timeout(240)
def test_a_rebalance_during_a_revoke_leaves_each_partition_one_owner(scene, monkeypatch):
    joined: list[tuple[harness.RunningProcessor, FaultProxy]] = []
    starting = threading.Lock()
    on_revoked = Processor.on_revoked

    def disturbed(self: Processor, partitions: Sequence[int]) -> None:
        if starting.acquire(blocking=False):
            joined.append(scene.processor("p3", wait=False))
            until(lambda: joined[0][1].seen["JoinGroup"])
        on_revoked(self, partitions)

    first, _ = scene.processor("p1")
    monkeypatch.setattr(Processor, "on_revoked", disturbed)
    orders = scene.orders(20)
    second, _ = scene.processor("p2", wait=False)
    orders.come_out_right()
    until(lambda: joined)
    owners = [first, second, joined[0][0]]
    until(lambda: [len(scene.owned(p)) for p in owners] == [1, 1, 1])
    assert set.union(*map(scene.owned, owners)) == {0, 1, 2}
    scene.settle()
    monkeypatch.setattr(Processor, "on_revoked", on_revoked)


@pytest.mark.timeout(240)
def test_a_new_generation_with_the_same_assignment_takes_nothing_from_anybody(scene, monkeypatch):
    """What is being committed just then may be refused, and is then made good; nobody loses a partition."""
    owners = [scene.processor("p1", wait=True)]
    owners += [scene.processor(f"p{n}", wait=False) for n in (2, 3)]
    until(lambda: [len(scene.owned(p)) for p, _ in owners] == [1, 1, 1])
    before = [scene.owned(p) for p, _ in owners]
    synced = [proxy.seen["SyncGroup"] for _, proxy in owners]
    let_go: list[Sequence[int]] = []
    monkeypatch.setattr(Processor, "on_revoked", lambda _, partitions: let_go.append(partitions))
    orders = scene.orders(20)
    scene.processor("p4", wait=False)
    until(lambda: all(proxy.seen["SyncGroup"] > n for (_, proxy), n in zip(owners, synced, strict=True)))
    orders.come_out_right()
    scene.orders(10).come_out_right()
    assert not let_go
    monkeypatch.undo()
    until(lambda: [scene.owned(p) for p, _ in owners] == before)
    scene.settle()


# -- owners that are none any more -------------------------------------------------------------------------------------


def entries(running: harness.RunningProcessor) -> list[Any]:
    """The runs that a processor has in memory."""
    return [entry for partition in running._processor._partitions.values() for entry in partition._runs.values()]


@pytest.mark.timeout(240)
def test_what_only_a_timer_wrote_is_refused_when_the_partition_has_another_owner(scene):
    first, proxy = scene.processor("p1")
    runs = [scene.system.client.start(faults_nap, 8) for _ in range(12)]
    until(lambda: all("wait_created" in scene.system.types(run.id) for run in runs))
    committing = first._processor._committer
    proxy.pause()  # the timers fire, no input comes, and what they write hangs in the proxy
    assert all(entry.run.state.waits for entry in entries(first)), "none has fired yet"
    until(lambda: all(not entry.run.state.waits for entry in entries(first)))
    second, _ = scene.processor("p2", wait=False)
    until(lambda: len(scene.owned(second)) == 3, timeout=60)
    assert [run.result(60) for run in runs] == ["rested"] * 12
    proxy.resume()
    until(lambda: first._processor._committer is not committing, timeout=60)
    until(lambda: len(scene.owned(first) | scene.owned(second)) == 3, timeout=60)
    scene.orders(6).come_out_right()
    scene.settle()


# -- a client's stream -------------------------------------------------------------------------------------------------

CHUNKS = 60


@step(timeout="120s")
async def faults_write() -> int:
    writer = get_writable()
    for n in range(CHUNKS):
        await writer.write(n)
        await asyncio.sleep(0.1)
    return CHUNKS


@workflow
async def faults_streaming() -> int:
    return await faults_write()


@pytest.mark.timeout(240)
def test_a_stream_is_taken_up_at_an_index_across_a_rebalance_without_loss_doubling_or_disorder(scene):
    scene.processor("p1")
    run = scene.system.client.start(faults_streaming)
    with FaultProxy(scene.kafka) as proxy:
        taken: list[int] = []
        for part in range(3):
            with Client(f"kafka://{proxy.bootstrap}", namespace=scene.system.namespace) as client:
                stream = client.get_run(run.id).stream(start_index=len(taken))
                for n in range(10):
                    taken.append(next(stream))
                    if n == 3:
                        proxy.cut()  # the reader's connection
                    if n == 5 and part == 0:
                        scene.processor(f"q{part}")  # the owner of the run may change
                    if n == 5 and part == 1:
                        scene.system.start_worker()  # and so may the worker that writes
        with Client(f"kafka://{proxy.bootstrap}", namespace=scene.system.namespace) as client:
            taken += client.get_run(run.id).stream(start_index=len(taken))
    whole = list(scene.system.client.get_run(run.id).stream())
    assert taken == whole
    assert taken[:CHUNKS] == list(range(CHUNKS)), "only a second execution would write again"
    assert run.result(60) == CHUNKS
    scene.settle()
