"""Streams without Kafka: handles, chunks, writers, readers that are interrupted, and iterators among arguments."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from itertools import islice
from typing import Any

import msgspec
import pytest
from durably import chunks, payload_codec, payloads
from durably.authoring import workflow
from durably.broker.port import TP, Message
from durably.chunks import OCTETS, PIECE
from durably.client import AsyncClient, AsyncRun, Client, Run, connection, feeds, stream
from durably.client.stream import ChunkOrder, StreamInfo, StreamReader
from durably.client.tail import follow_events
from durably.errors import (
    BrokerError,
    BrokerUnreachable,
    DurablyError,
    RunNotFoundError,
    SerializationError,
    UnknownTopic,
)
from durably.runtime import StepContext, step_context
from durably.settings import SHORTEST_RETENTION_MS
from durably.streams import Readable, Writable, bound_run, bound_to, checked_namespace, get_writable
from durably.worker import writers as writers_module
from durably.worker.clock import SystemClock
from durably.worker.writers import UNACKNOWLEDGED_BYTES, StepWriters, StreamTopic, drain, drain_sync
from durably_schemas import Catalogue, Codec
from durably_schemas.catalogue import partition_for
from durably_schemas.events import RunStarted, StepCompleted
from durably_schemas.records import Payload, StartRun, StreamChunk, StreamWritten
from fake_broker import FakeBroker
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.scripted_broker import ScriptedBroker, ScriptedProcessor

CODEC = Codec()
CATALOGUE = Catalogue(partitions=3)
RUN = "run-1"


@workflow
async def consume(name: str, source: Any = None, *, other: Any = None) -> None:
    """Started only."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_TICK", 0.01)
    monkeypatch.setattr(stream, "REOPEN", 0.001)


def until(condition: Any) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.002)


def later(action: Any, *args: Any) -> None:
    threading.Timer(0.05, action, args).start()


# handles


def test_a_handle_is_its_two_texts() -> None:
    out = Writable(RUN, "log")
    assert out.readable == Readable(RUN, "log")
    assert out != Writable(RUN, "other")
    assert len({Readable(RUN, "log"), Readable(RUN, "log"), Readable("b", "log"), out}) == 3
    assert repr(out.readable) == "Readable(run_id='run-1', namespace='log')"


@pytest.mark.parametrize("namespace", ["a b", "zusätzlich", "日本 語/\n", "x" * 256])
def test_a_namespace_may_be_any_text(namespace: str) -> None:
    assert checked_namespace(namespace) == namespace


@pytest.mark.parametrize("namespace", ["", "x" * 257, 7, "\ud800"])
def test_what_is_no_namespace_is_refused_for_writing_and_for_reading(namespace: Any, client: Client) -> None:
    with pytest.raises(DurablyError, match="a stream's namespace"):
        get_writable(namespace)
    with pytest.raises(DurablyError, match="a stream's namespace"):
        list(client.get_run("a").stream(namespace))


def test_a_stream_is_read_in_steps_and_outside_of_runs_but_not_in_workflow_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("durably.streams.workflow_context", object)
    for read in (Readable(RUN, "log").read, Readable(RUN, "log").read_sync, Writable(RUN, "log").__aiter__):
        with pytest.raises(DurablyError, match=r"stream 'log' of run run-1 cannot be read in workflow code.*to a step"):
            read()


class Services:
    """As a worker offers them."""

    def __init__(self, sync: Client, tasks: AsyncClient) -> None:
        self.sync_client, self.client = lambda: sync, lambda: tasks


def in_step(writers: Any, services: Any) -> StepContext:
    return StepContext(
        run_id=RUN, workflow_name="w", workflow_started_at=0, step_id="s1", step_name="s", attempt=1, execution=1,
        started_at=0, writers=writers, services=services,
    )  # fmt: skip


def test_a_step_reads_with_the_clients_of_its_worker(
    broker: ScriptedBroker, processor: ScriptedProcessor, client: Client
) -> None:
    processor.start("a")
    processor.chunk("a", "log", 0, "x")
    processor.chunk("a", "log", 1, "y")
    processor.chunk("a", "log", 2, end=True)
    handle = Readable("a", "log")

    async def go() -> None:
        async with AsyncClient(broker, timeout=5) as tasks:
            token = step_context.set(in_step(None, Services(client, tasks)))
            try:
                assert [value async for value in handle] == ["x", "y"]
                assert [value async for value in handle.read(start_index=-1)] == ["y"]
                assert await asyncio.to_thread(list, handle) == ["x", "y"]
                assert await asyncio.to_thread(lambda: list(handle.read_sync(1))) == ["y"]
            finally:
                step_context.reset(token)

    asyncio.run(go())


def test_what_a_client_loads_is_read_with_that_client(processor: ScriptedProcessor, client: Client) -> None:
    processor.start("a")
    processor.chunk("a", "log", 0, "x")
    processor.chunk("a", "log", 1, end=True)
    with bound_to(client._connection, Run):
        handle, out = Readable("a", "log"), Writable("a", "log")
        assert list(out) == ["x"]
    assert list(handle) == ["x"]
    assert Readable("a", "log")._connection is None


@pytest.mark.parametrize("kind", [Run, AsyncRun])
def test_a_run_that_a_client_loads_is_of_the_clients_kind(kind: Any, client: Client) -> None:
    assert bound_run("a") is None
    with bound_to(client._connection, kind):
        run = bound_run("a")
    assert type(run) is kind
    assert (run.id, run._connection) == ("a", client._connection)


# writers


def make_writers(broker: FakeBroker) -> StepWriters:
    broker.create(CATALOGUE.topics())
    topic = StreamTopic(
        CATALOGUE.streams,
        partitions=lambda: 3,
        producer=broker.producer(),
        codec=CODEC,
        max_bytes=broker.max_record_bytes,
        clock=SystemClock(),
    )
    return StepWriters(topic, RUN, "s1/1/1")


@pytest.fixture
def log() -> FakeBroker:
    return FakeBroker()


@pytest.fixture
def writers(log: FakeBroker) -> Iterator[StepWriters]:
    made = make_writers(log)
    token = step_context.set(in_step(made, None))
    yield made
    step_context.reset(token)


def written(log: FakeBroker, namespace: str = "default") -> list[StreamChunk]:
    found = [CODEC.decode_as(StreamChunk, m.value) for m in log.records(CATALOGUE.streams)]
    return [chunk for chunk in found if chunk.namespace == namespace]


@pytest.mark.parametrize("value", [b"raw", bytearray(b"raw"), memoryview(b"_raw_")[1:4]])
def test_bytes_are_written_as_they_are(value: Any, log: FakeBroker, writers: StepWriters) -> None:
    get_writable().write_sync(value)
    (chunk,) = written(log)
    assert chunk.payload == Payload(content_type=OCTETS, data=b"raw")


@pytest.fixture
def gzip() -> Iterator[None]:
    payload_codec.install(payload_codec.Gzip(above=10))
    yield
    payload_codec.install()


@pytest.mark.usefixtures("gzip")
def test_bytes_go_through_the_codec_as_all_values_do(log: FakeBroker, writers: StepWriters) -> None:
    for value in (b"x" * 1000, {"x": "y" * 1000}):
        get_writable().write_sync(value)
    raw, other = [chunk.payload for chunk in written(log) if chunk.payload]
    assert raw.content_type == f"{OCTETS};codec=gzip"
    assert len(raw.data) < 100
    assert [chunks.load(raw), chunks.load(other)] == [b"x" * 1000, {"x": "y" * 1000}]


def test_a_stream_of_bytes_takes_any_length_and_nothing_else(log: FakeBroker, writers: StepWriters) -> None:
    whole = bytes(range(256)) * (PIECE // 100)
    out = get_writable(type=bytes)
    out.write_sync(whole)
    out.write_sync(b"")
    parts = [chunk.payload.data for chunk in written(log) if chunk.payload]
    assert b"".join(parts) == whole
    assert max(map(len, parts)) == PIECE
    with pytest.raises(TypeError, match="opened with type=bytes, and 'text'"):
        out.write_sync("text")
    with pytest.raises(TypeError, match="type=<class 'str'>"):
        get_writable(type=str)  # type: ignore[arg-type]


def test_writing_waits_while_too_many_bytes_are_unacknowledged(log: FakeBroker, writers: StepWriters) -> None:
    log.muted = True
    data = b"x" * PIECE

    async def write_all() -> None:
        for _ in range(40):
            await get_writable().write(data)
        await get_writable().flush()

    async def go() -> None:
        writing = asyncio.create_task(write_all())
        await asyncio.sleep(0.1)
        assert UNACKNOWLEDGED_BYTES <= len(written(log)) * PIECE <= UNACKNOWLEDGED_BYTES + PIECE
        log.muted = False
        await writing
        assert len(written(log)) == 40
        assert writers.settled()

    asyncio.run(go())


def test_a_chunk_that_kafka_does_not_take_fails_the_step_whatever_the_step_ignores(
    log: FakeBroker, writers: StepWriters
) -> None:
    log.failing = BrokerError("disk full")
    get_writable().write_sync("lost")
    log.failing = None
    for fails in (get_writable().flush_sync, writers.settle_sync, lambda: get_writable().write_sync("next")):
        with pytest.raises(DurablyError, match=r"could not be written: disk full"):
            fails()


def test_a_plain_function_may_write_from_an_event_loop_of_its_own(log: FakeBroker, writers: StepWriters) -> None:
    log.muted = True

    async def write_all(name: str) -> None:
        out = get_writable(name)
        for i in range(writers_module.UNACKNOWLEDGED):
            await out.write(i)
        await out.flush()

    threads = [threading.Thread(target=_in_context(lambda n=n: asyncio.run(write_all(n)))) for n in "ab"]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    log.muted = False
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()
    for name in "ab":
        assert [chunk.n for chunk in written(log, name)] == list(range(1, writers_module.UNACKNOWLEDGED + 1))


def test_an_event_loop_that_ends_while_it_waits_is_not_kept(
    log: FakeBroker, writers: StepWriters, monkeypatch: pytest.MonkeyPatch
) -> None:
    log.muted = True
    monkeypatch.setattr(writers_module, "ROUND", 60)

    async def cut_off() -> None:
        await get_writable().write("x")
        async with asyncio.timeout(0):
            await get_writable().flush()

    with pytest.raises(TimeoutError):
        asyncio.run(cut_off())
    assert not writers._topic.acknowledgements._rounds
    log.muted = False
    monkeypatch.setattr(writers_module, "ROUND", 0.001)
    asyncio.run(get_writable().flush())
    assert writers.settled()


def test_nothing_is_written_once_an_execution_is_over_however_soon_before(
    log: FakeBroker, writers: StepWriters
) -> None:
    sending, go_on, refused = threading.Event(), threading.Event(), []
    encode = CODEC.encode

    class Slow:
        def encode(self, record: Any) -> bytes:
            sending.set()
            go_on.wait(5)
            return encode(record)

    writers._topic.codec = Slow()  # type: ignore[assignment]

    def write_twice() -> None:
        get_writable().write_sync("in time")
        try:
            get_writable().write_sync("late")
        except DurablyError as e:
            refused.append(str(e))

    writing = threading.Thread(target=_in_context(write_twice))
    writing.start()
    sending.wait(5)
    shutting = threading.Thread(target=writers.shut)
    shutting.start()
    shutting.join(0.05)
    assert shutting.is_alive()  # the chunk that is on its way is of this execution yet
    go_on.set()
    for thread in (shutting, writing):
        thread.join(5)
        assert not thread.is_alive()
    kept = [chunk.n for chunk in written(log)]
    assert kept in ([1], [1, 2])  # the second may have come before the end
    assert len(kept) + len(refused) == 2
    assert all("is over, and nothing can be written behind its result" in reason for reason in refused)


def _in_context(run: Any) -> Any:
    from contextvars import copy_context

    context = copy_context()
    return lambda: context.run(run)


# iterators in results


async def three(error: Exception | None = None) -> AsyncIterator[int]:
    for i in range(3):
        yield i
    if error is not None:
        raise error


def three_sync() -> Iterator[int]:
    yield from range(3)


def values(log: FakeBroker, namespace: str) -> list[Any]:
    return [payloads.load(c.payload) if c.payload else c.kind for c in written(log, namespace)]


def test_iterators_in_a_result_become_streams(log: FakeBroker, writers: StepWriters) -> None:
    async def go() -> None:
        assert await drain(writers, three()) == Readable(RUN, "result-s1/1/1")
        assert await drain(writers, {"n": 3, "it": three_sync()}) == {"n": 3, "it": Readable(RUN, "result-s1/1/1-2")}
        assert await drain(writers, (three(), [1])) == (Readable(RUN, "result-s1/1/1-3"), [1])
        await writers.settle()

    asyncio.run(go())
    for namespace in ("result-s1/1/1", "result-s1/1/1-2", "result-s1/1/1-3"):
        assert values(log, namespace) == [0, 1, 2, "END"]


def test_a_plain_function_may_return_either_kind(log: FakeBroker, writers: StepWriters) -> None:
    async def go() -> None:
        loop = asyncio.get_running_loop()
        for value in (three(), three_sync(), [three(), three_sync()]):
            await asyncio.to_thread(drain_sync, writers, value, loop)
        await writers.settle()

    asyncio.run(go())
    for suffix in ("", "-2", "-3", "-4"):
        assert values(log, f"result-s1/1/1{suffix}") == [0, 1, 2, "END"]


@pytest.mark.parametrize("value", [None, 7, "text", [1, 2], {"a": 1}, (1,), {1}, range(3), Readable(RUN, "x")])
def test_other_results_stay_what_they_are(value: Any, log: FakeBroker, writers: StepWriters) -> None:
    async def go() -> None:
        loop = asyncio.get_running_loop()
        assert await drain(writers, value) is value
        assert drain_sync(writers, value, loop) is value

    asyncio.run(go())
    assert log.records(CATALOGUE.streams) == []


def test_what_an_iterator_raises_is_the_steps_and_its_stream_stays_unfinished(
    log: FakeBroker, writers: StepWriters
) -> None:
    with pytest.raises(ValueError, match="broke off"):
        asyncio.run(drain(writers, three(ValueError("broke off"))))
    assert values(log, "result-s1/1/1") == [0, 1, 2]


def test_a_thread_that_draws_for_a_step_that_was_given_up_writes_nothing_more(
    log: FakeBroker, writers: StepWriters
) -> None:
    go_on, closed = threading.Event(), threading.Event()

    def blocks() -> Iterator[int]:
        try:
            yield 1
            go_on.wait(5)
            yield 2
        finally:
            closed.set()

    async def go() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await drain(writers, blocks())
        go_on.set()
        await asyncio.to_thread(closed.wait, 5)

    asyncio.run(go())
    assert closed.is_set()
    assert values(log, "result-s1/1/1") == [1]


# readers that are interrupted


class Flaky(ScriptedBroker):
    """Readers of the stream lose what they took, and break, whenever ``faults`` says so."""

    def __init__(self) -> None:
        super().__init__(CATALOGUE)
        self.faults: Iterator[bool] = iter(())
        self.opened: list[dict[TP, int]] = []
        self.error: BrokerError = BrokerUnreachable("gone")
        self.limits: list[int] = []

    def reader(self, positions, *, committed=True):
        made = super().reader(positions, committed=committed)
        if any(tp.topic == CATALOGUE.streams for tp in positions):
            self.opened.append(dict(positions))
            take = made.poll

            def poll(timeout, limit=500):
                self.limits.append(limit)
                tp = next(tp for tp in made.positions if tp.topic == CATALOGUE.streams)
                start = made.positions[tp]
                found = take(0.01, limit)
                if next(self.faults, False):
                    raise self.error
                kept = found[: max(1, min(limit, 3))]  # a few at a time, so that faults strike in the middle
                if len(kept) < len(found):
                    left = [item for item in found[len(kept) :] if isinstance(item, Message)]
                    for item in left:
                        tp = TP(item.topic, item.partition)
                        made.positions[tp] = min(made.positions[tp], item.offset)
                        made.exhausted.pop(tp, None)
                assert made.positions[tp] >= start
                return kept

            made.poll = poll
        return made


@given(
    written=st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 6)), max_size=30),
    faults=st.lists(st.booleans(), max_size=30),
    start=st.integers(-8, 8),
)
@settings(deadline=None, max_examples=60)
def test_a_reader_that_breaks_is_replaced_without_loss_or_repetition(
    written: list[tuple[str, int]], faults: list[bool], start: int
) -> None:
    broker = Flaky()
    processor = ScriptedProcessor(broker)
    processor.start("a")
    order, expected = ChunkOrder("default"), []
    begun = [pair for pair in (("a", 1), ("b", 1)) if any(writer == pair[0] for writer, _ in written)]
    for i, (writer, n) in enumerate([*begun, *written]):
        processor.chunk("a", "default", n, i, writer=writer)
        record = StreamChunk(
            run_id="a", namespace="default", writer=writer, n=n, kind="DATA", at=0, payload=payloads.dump(i, "i")
        )
        if order.accept(record) is not None:
            expected.append(i)
    processor.chunk("a", "", 0, writer="end", end=True)
    broker.faults = iter(faults)
    with Client(broker, timeout=5) as client:
        assert list(client.get_run("a").stream(start_index=start)) == expected[start:]
        assert client.get_run("a").stream_info() == StreamInfo(len(expected) - 1, done=True)


def test_a_reader_whose_broker_stays_away_says_so_in_the_end() -> None:
    broker = Flaky()
    ScriptedProcessor(broker).start("a")
    broker.faults = iter(lambda: True, False)
    with Client(broker, timeout=0.2) as client, pytest.raises(BrokerUnreachable, match="gone"):
        list(client.get_run("a").stream())
    assert len(broker.opened) > 3


def test_a_missing_topic_is_no_passing_failure() -> None:
    broker = Flaky()
    ScriptedProcessor(broker).start("a")
    broker.error, broker.faults = UnknownTopic("streams"), iter([True])
    with Client(broker, timeout=5) as client, pytest.raises(UnknownTopic):
        list(client.get_run("a").stream())


def test_a_reader_that_retention_has_overtaken_raises_instead_of_renumbering(
    broker: ScriptedBroker, processor: ScriptedProcessor, client: Client
) -> None:
    processor.start("a")
    for n in range(6):
        processor.chunk("a", "default", n, n)
    tp = TP(CATALOGUE.streams, partition_for(b"a", 3))
    long_ago = [m._replace(timestamp=m.timestamp - 60_000) for m in broker.logs[tp]]
    reader = StreamReader(client._connection, "a", None, 0, Run)
    reader._tail = tail = reader._open()
    assert reader.next_batch() == list(range(6))
    # Offsets 6 and 7 are taken by a transaction, which is no loss; the next gap is one.
    broker.logs[tp] += [m._replace(offset=m.offset + 8, value=_chunk(m.offset + 6)) for m in long_ago[:2]]
    assert reader.next_batch() == [6, 7]
    assert tail.position(CATALOGUE.streams) == 10
    broker.logs[tp] += [m._replace(offset=m.offset + 20, value=_chunk(m.offset + 8)) for m in long_ago[:2]]
    broker.heads[tp] = 20
    with pytest.raises(DurablyError, match=r"deleted before they were read for run a: 10 was the next, and 20 is now"):
        reader.next_batch()
    reader.close()


@pytest.mark.parametrize("end", [False, True])
def test_a_writer_whose_first_chunks_are_not_there_is_an_error_and_no_renumbering(
    end: bool, processor: ScriptedProcessor, client: Client
) -> None:
    run = client.start(consume, "x")
    processor.chunk(run.id, "default", 1, "a")
    processor.chunk(run.id, "log", 9, "another stream", writer="w2")
    processor.chunk(run.id, "default", 3, "c", writer="w2", end=end)
    processor.complete(run.id, None)
    gone = r"'default' of run .* is gone: of what w2 has written, the first .* is number 3; raise .*LogAppendTime"
    with pytest.raises(DurablyError, match=gone):
        list(run.stream())
    with pytest.raises(DurablyError, match=gone):
        run.stream_info()


def test_a_search_by_time_that_was_misled_past_all_chunks_is_told(
    broker: ScriptedBroker, processor: ScriptedProcessor, client: Client
) -> None:
    processor.start("a")
    for n in (1, 2):
        processor.chunk("a", "default", n, n)
    partition = partition_for(b"a", 3)
    tp = TP(CATALOGUE.streams, partition)
    broker.logs[tp] = [m._replace(timestamp=m.timestamp - 30_000) for m in broker.logs[tp]]
    written = StreamWritten(namespace="default", writer="w", partition=partition, first_offset=0, chunks=2)
    done = StepCompleted(attempt=1, result=payloads.dump(None, "result"), streams=(written,))
    processor.event("a", done, "step_1")
    processor.complete("a", None)
    gone = r"is gone: it was at offset 0 of durably.streams, which is read from 2 on; raise"
    with pytest.raises(DurablyError, match=gone):
        list(client.get_run("a").stream())
    with pytest.raises(DurablyError, match=gone):
        client.get_run("a").stream_info()
    assert list(client.get_run("a").stream("log")) == []


def test_a_chunk_that_cannot_be_read_is_raised_when_it_is_its_turn(
    broker: ScriptedBroker, processor: ScriptedProcessor, client: Client
) -> None:
    run = client.start(consume, "x")
    for n in range(6):
        processor.chunk(run.id, "default", n, n)
    log = broker.logs[TP(CATALOGUE.streams, partition_for(run.id.encode(), 3))]
    broken = Payload(content_type="application/msgpack", data=b"\xc1")
    chunk = CODEC.decode_as(StreamChunk, log[3].value)
    log[3] = log[3]._replace(value=CODEC.encode(msgspec.structs.replace(chunk, payload=broken)))
    processor.complete(run.id, None)

    async def go() -> None:
        async with AsyncClient(broker, timeout=5) as tasks:
            values = tasks.get_run(run.id).stream()
            assert [await anext(values) for _ in range(3)] == [0, 1, 2]
            with pytest.raises(SerializationError):
                await anext(values)

    asyncio.run(go())
    for start, before in ((0, [0, 1, 2]), (-4, [2]), (3, [])):
        values = run.stream(start_index=start)
        assert [next(values) for _ in before] == before
        with pytest.raises(SerializationError) as caught:
            next(values)
        assert "chunk 3 of 'default': start_index=4 begins behind it" in caught.value.__notes__[-1]
    assert list(run.stream(start_index=4)) == [4, 5]


@pytest.mark.parametrize("dropped", [0, 3, 99])
def test_the_log_of_a_run_is_followed_from_its_beginning_however_little_of_events_is_left(
    dropped: int, broker: ScriptedBroker, processor: ScriptedProcessor, client: Client
) -> None:
    tp = TP(CATALOGUE.events, partition_for(b"a", 3))
    processor.start("a")
    processor.complete("a", None)
    del processor.runs["a"]  # purged: what is left of it on the topic is of another run
    processor.start("a")
    for _ in range(2):
        processor.event("a", RunStarted())
    processor.page = 2
    broker.heads[tp] = min(dropped, len(broker.logs[tp]))
    followed: list[int] = []
    for events in islice(follow_events(client._connection, "a"), 9):
        followed += [event.seq for event in events]
        if len(followed) == 3:
            processor.event("a", RunStarted())
            processor.complete("a", None)
    assert followed == [1, 2, 3, 4, 5]


def test_a_stream_has_nothing_of_an_older_run_that_was_purged_after_the_shortest_retention(
    broker: ScriptedBroker, processor: ScriptedProcessor, client: Client
) -> None:
    tp = TP(CATALOGUE.streams, partition_for(b"a", 3))
    for value in ("old", "new"):
        broker.logs[tp] = [m._replace(timestamp=m.timestamp - SHORTEST_RETENTION_MS) for m in broker.logs[tp]]
        processor.runs.pop("a", None)
        processor.start("a")
        processor.chunk("a", "default", 1, value)
        processor.chunk("a", "", 0, writer="", end=True)
        processor.complete("a", None)
        assert list(client.get_run("a").stream()) == [value]


def _chunk(n: int) -> bytes:
    return CODEC.encode(
        StreamChunk(run_id="a", namespace="default", writer="w", n=n, kind="DATA", at=0, payload=payloads.dump(n, "n"))
    )


def test_a_reader_takes_fewer_records_at_once_the_larger_they_are() -> None:
    broker = Flaky()
    processor = ScriptedProcessor(broker)
    processor.start("a")
    for n in range(20):
        processor.chunk("a", "default", n, "x" * (500_000 if n < 10 else 10))
    processor.chunk("a", "default", 20, end=True)
    with Client(broker, timeout=5) as client:
        assert len(list(client.get_run("a").stream())) == 20
    assert min(broker.limits) * 500_000 <= stream.BATCH_BYTES
    assert broker.limits[0] == broker.limits[-1] == stream.BATCH


def test_the_state_of_a_stream(processor: ScriptedProcessor, client: Client) -> None:
    with pytest.raises(RunNotFoundError):
        client.get_run("a").stream_info()
    processor.start("a")
    run = client.get_run("a")
    assert run.stream_info() == StreamInfo(-1, done=False)
    for n in (0, 1, 1):
        processor.chunk("a", "log", n, n)
    assert run.stream_info("log") == StreamInfo(1, done=False)
    assert run.stream_info() == StreamInfo(-1, done=False)
    processor.chunk("a", "log", 2, end=True)
    processor.chunk("a", "log", 3, "ignored")
    assert run.stream_info("log") == StreamInfo(1, done=True)
    assert run.stream_info() == StreamInfo(-1, done=False)
    processor.complete("a", None)
    assert run.stream_info() == StreamInfo(-1, done=True)


# iterators among arguments


def chunks_of(broker: ScriptedBroker, handle: Readable) -> list[StreamChunk]:
    return [r for r in broker.sent if isinstance(r, StreamChunk) and r.namespace == handle.namespace]


def handles(broker: ScriptedBroker) -> tuple[list[Any], dict[str, Any]]:
    (command,) = (record for record in broker.sent if isinstance(record, StartRun))
    args, kwargs = payloads.load(command.input)
    return args, kwargs


@pytest.mark.parametrize("source", [three, three_sync, lambda: map(int, "012")])
def test_an_iterator_among_the_arguments_reaches_the_run_as_a_stream(
    source: Any, broker: ScriptedBroker, processor: ScriptedProcessor, client: Client
) -> None:
    run = client.start(consume, "x", source(), other=source())
    args, kwargs = handles(broker)
    assert args[0] == "x"
    for handle in (args[1], kwargs["other"]):
        assert isinstance(handle, Readable)
        assert handle.run_id == run.id
        assert handle.namespace.startswith("arg-")
        assert list(run.stream(handle.namespace)) == [0, 1, 2]
        (writer,) = {chunk.writer for chunk in chunks_of(broker, handle)}
        assert writer.startswith("client-")


@pytest.mark.parametrize("source", [three, three_sync])
def test_the_same_for_tasks(source: Any, broker: ScriptedBroker, processor: ScriptedProcessor) -> None:
    async def go() -> None:
        async with AsyncClient(broker, timeout=5) as client:
            run = await client.start(consume, "x", source())
            (_, handle), _ = handles(broker)
            assert [value async for value in run.stream(handle.namespace)] == [0, 1, 2]
            assert await run.stream_info(handle.namespace) == StreamInfo(2, done=True)

    asyncio.run(go())


class Declined(Exception):
    """Of the user's own."""


def test_the_error_of_an_iterator_reaches_the_readers(
    broker: ScriptedBroker, processor: ScriptedProcessor, client: Client
) -> None:
    def fails(error: BaseException) -> Iterator[int]:
        yield 1
        raise error

    run = client.start(consume, "x", fails(Declined("card")), other=fails(KeyboardInterrupt()))
    (_, first), kwargs = handles(broker)
    values = run.stream(first.namespace)
    assert next(values) == 1
    with pytest.raises(Declined, match="card"):
        next(values)
    with pytest.raises(DurablyError, match="KeyboardInterrupt"):
        list(run.stream(kwargs["other"].namespace))
    assert run.stream_info(first.namespace) == StreamInfo(0, done=True)


def test_an_iterator_waits_while_too_much_of_it_is_unacknowledged(
    broker: ScriptedBroker, processor: ScriptedProcessor, client: Client
) -> None:
    drawn = []

    def many() -> Iterator[int]:
        for i in range(2 * feeds.UNACKNOWLEDGED):
            if i == 1:
                broker.acknowledges = False
            drawn.append(i)
            yield i

    run = client.start(consume, "x", many())
    until(lambda: len(drawn) >= feeds.UNACKNOWLEDGED)
    time.sleep(0.05)
    assert len(drawn) <= feeds.UNACKNOWLEDGED + 1
    broker.acknowledges = True
    (_, handle), _ = handles(broker)
    assert list(run.stream(handle.namespace)) == list(range(2 * feeds.UNACKNOWLEDGED))


def test_closing_a_client_waits_for_its_iterators(broker: ScriptedBroker, processor: ScriptedProcessor) -> None:
    def slow() -> Iterator[int]:
        for i in range(5):
            time.sleep(0.02)
            yield i

    async def slow_too() -> AsyncIterator[int]:
        for i in range(5):
            await asyncio.sleep(0.02)
            yield i

    with Client(broker, timeout=5) as client:
        client.start(consume, "x", slow(), other=slow_too())
    (_, first), kwargs = handles(broker)
    for handle in (first, kwargs["other"]):
        assert [chunk.kind for chunk in chunks_of(broker, handle)] == ["DATA"] * 5 + ["END"]

    async def go() -> None:
        async with AsyncClient(broker, timeout=5) as client:
            await client.options(run_id="second").start(consume, "x", slow_too())

    asyncio.run(go())
    assert [r.kind for r in broker.sent if isinstance(r, StreamChunk) and r.run_id == "second"] == ["DATA"] * 5 + [
        "END"
    ]


def test_an_iterator_that_does_not_end_is_cut_off_when_its_client_closes(
    broker: ScriptedBroker, processor: ScriptedProcessor
) -> None:
    ever = threading.Event()

    def blocks() -> Iterator[int]:
        yield 1
        ever.wait(10)
        yield 2

    async def sleeps() -> AsyncIterator[int]:
        yield 1
        await asyncio.sleep(60)

    with Client(broker, timeout=0.1) as client:
        client.start(consume, "x", blocks(), other=sleeps())
    ever.set()
    (_, first), kwargs = handles(broker)
    with Client(broker, timeout=5) as client:
        for handle in (first, kwargs["other"]):
            assert [chunk.kind for chunk in chunks_of(broker, handle)] == ["DATA", "END"]
            with pytest.raises(DurablyError, match="cut off: the client that wrote it closed"):
                list(client.get_run(handle.run_id).stream(handle.namespace))


def test_an_iterator_is_drawn_no_further_when_its_run_has_ended(
    broker: ScriptedBroker, processor: ScriptedProcessor
) -> None:
    closed = []

    def endless() -> Iterator[int]:
        try:
            while True:
                time.sleep(0.001)
                yield 1
        finally:
            closed.append("thread")

    async def endless_too() -> AsyncIterator[int]:
        try:
            while True:
                await asyncio.sleep(0.001)
                yield 1
        finally:
            closed.append("task")

    async def go() -> None:
        async with AsyncClient(broker, timeout=5) as client:
            run = await client.start(consume, "x", endless(), other=endless_too())
            later(processor.complete, run.id, None)
            await run.result(timeout=5)
            begun = time.monotonic()
        assert time.monotonic() - begun < 1

    asyncio.run(go())
    until(lambda: sorted(closed) == ["task", "thread"])


def test_closing_a_client_does_not_wait_for_an_iterator_whose_stream_is_over(
    broker: ScriptedBroker, processor: ScriptedProcessor
) -> None:
    ever = threading.Event()

    def blocks() -> Iterator[int]:
        yield 1
        ever.wait(10)
        yield 2

    with Client(broker, timeout=5) as client:
        run = client.start(consume, "x", blocks())
        (_, handle), _ = handles(broker)
        until(lambda: chunks_of(broker, handle))
        processor.complete(run.id, None)
        run.result(timeout=5)
        until(lambda: not client._feeds._live)
        begun = time.monotonic()
    assert time.monotonic() - begun < 2
    ever.set()
    assert [chunk.kind for chunk in chunks_of(broker, handle)] == ["DATA", "END"]


def test_an_iterator_of_what_cannot_travel_ends_its_stream_with_the_reason(
    broker: ScriptedBroker, processor: ScriptedProcessor, client: Client
) -> None:
    run = client.start(consume, "x", iter([object()]))
    (_, handle), _ = handles(broker)
    with pytest.raises(TypeError, match=f"a chunk for stream '{handle.namespace}'.*cannot travel"):
        list(run.stream(handle.namespace))


def test_a_start_that_fails_draws_nothing(broker: ScriptedBroker, client: Client) -> None:
    source = three_sync()
    with pytest.raises(TypeError, match="nmae"):
        client.start(consume, source, nmae=1)  # type: ignore[call-arg]
    assert list(source) == [0, 1, 2]
    assert broker.sent == []
