"""Streams from end to end, on the embedded broker and on Apache Kafka alike."""

from __future__ import annotations

import asyncio
import hashlib
import re
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import confluent_kafka
import harness
import pytest
from durably import RunFailedError, get_step_metadata, get_writable, payloads, sleep, step, workflow
from durably.broker.port import TP, Message
from durably.client import AsyncClient
from durably.client.starting import StartOptions
from durably.client.stream import StreamInfo
from durably.client.tail import follow_events
from durably.streams import Readable, Writable
from durably_schemas import Codec
from durably_schemas.catalogue import partition_for
from durably_schemas.records import StreamChunk

CHUNKS = 200


class Declined(Exception):
    """Of the user's own."""


@step
async def count(out: Writable, name: str, n: int, pause: float = 0) -> int:
    for i in range(n):
        await out.write([name, i])
        await asyncio.sleep(pause)
    return n


@step
def count_in_a_thread(out: Writable, name: str, n: int) -> int:
    for i in range(n):
        out.write_sync([name, i])
    out.flush_sync()
    return n


@step
async def count_twice(name: str, n: int) -> int:
    first, second = get_writable(name), get_writable(name)

    async def write(out: Writable, who: str) -> None:
        for i in range(n):
            await out.write([who, i])

    await asyncio.gather(write(first, "first"), write(second, "second"))
    return 2 * n


@step
async def close(out: Writable) -> None:
    async with out:
        await out.write("last words")


@step
async def count_to_the_end(n: int, pause: float) -> int:
    async with get_writable() as out:
        for i in range(n):
            await out.write(["x", i])
            await asyncio.sleep(pause)
    return n


@step
async def write_pdf(n: int) -> str:
    data = bytes(i % 251 for i in range(n))
    out = get_writable("pdf", type=bytes)
    await out.write(memoryview(data)[: n // 2])
    await out.write(data[n // 2 :])
    return hashlib.sha256(data).hexdigest()


@step(max_retries=0)
async def total(source: Any) -> int:
    return sum([value async for value in source])


@step(max_retries=0)
def total_in_a_thread(source: Any) -> int:
    return sum(source)


@step
async def last(source: Readable, n: int) -> list[Any]:
    return [value async for value in source.read(start_index=-n)]


@step(backoff="10ms")
async def numbers(n: int, failures: int = 0) -> AsyncIterator[int]:
    for i in range(n):
        yield i
        if i == n // 2 and get_step_metadata().attempt <= failures:
            raise ConnectionError("broke off")


@step
def letters(n: int) -> Iterator[str]:
    yield from "abcdefgh"[:n]


@step
def squares(n: int) -> Any:
    return {"n": n, "squares": (i * i for i in range(n))}


@workflow
async def many_writers(n: int) -> int:
    out = get_writable("zusätzlich: 日本")
    await asyncio.gather(
        count(out, "a", n), count_in_a_thread(out, "b", n), count(out, "c", n), count_twice(out.namespace, n)
    )
    return n


@workflow
async def slow_writer(n: int, pause: float) -> int:
    return await count(get_writable(), "x", n, pause)


@workflow
async def writes_to_the_end(n: int, pause: float) -> int:
    return await count_to_the_end(n, pause)


@workflow
async def closes_by_hand() -> None:
    out = get_writable()
    await close(out)
    await count(out, "too late", 3)
    await sleep("1h")


@workflow
async def writes_bytes(n: int) -> str:
    return await write_pdf(n)


@workflow
async def adds_up(source: Any, *, more: Any) -> list[int]:
    return await asyncio.gather(total(source), total_in_a_thread(more))


@workflow
async def passes_on(n: int, failures: int = 0) -> dict[str, Any]:
    made, nested = await numbers(n, failures), await squares(n)
    sums = await asyncio.gather(total(made), total_in_a_thread(nested["squares"]), total(made))
    return {
        "letters": await letters(n),
        "made": made,
        "squares": nested["squares"],
        "sums": sums,
        "last": await last(made, 2),
    }


@workflow
async def hands_out(n: int) -> Any:
    out = get_writable("out")
    await count(out, "x", n)
    return out.readable


@workflow
async def reads_itself() -> list[Any]:
    return [value async for value in get_writable().readable]


@pytest.fixture
def system(broker_url, namespace, tmp_path):
    system = harness.System(broker_url, namespace, tmp_path)
    yield system
    system.close()


@pytest.fixture
def running(system):
    system.start_processor()
    system.start_worker()
    return system


def by_name(values: list[Any]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for name, i in values:
        found.setdefault(name, []).append(i)
    return found


def collect(values: Iterator[Any]) -> tuple[threading.Thread, list[Any]]:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.extend(values))
    thread.start()
    return thread, found


def test_several_writers_share_a_stream_in_the_order_of_the_log_and_every_reader_counts_alike(running):
    run = running.client.options(run_id="many").start(many_writers, CHUNKS)
    namespace = "zusätzlich: 日本"
    threads = [collect(run.stream(namespace)) for _ in range(3)]
    early = next(running.client.get_run("many").stream(namespace))
    assert run.result(60) == CHUNKS
    for thread, _ in threads:
        thread.join(30)
    whole, *others = [found for _, found in threads]
    assert all(found == whole for found in others)
    assert whole[0] == early
    assert by_name(whole) == {name: list(range(CHUNKS)) for name in ("a", "b", "c", "first", "second")}
    assert list(run.stream(namespace, 700)) == whole[700:]
    assert list(run.stream(namespace, -3)) == whole[-3:]
    assert list(run.stream(namespace, 5 * CHUNKS)) == []
    assert run.stream_info(namespace) == StreamInfo(5 * CHUNKS - 1, done=True)
    assert run.streams() == [namespace]


def test_a_stream_may_be_read_before_its_run_exists_and_while_it_is_written(running):
    run = running.client.get_run("later")
    thread, found = collect(run.stream())
    time.sleep(0.3)
    running.client.options(run_id="later").start(slow_writer, 20, 0.02)
    while len(found) < 5:
        time.sleep(0.01)
    info = run.stream_info()
    assert 3 <= info.tail_index < 20
    thread.join(30)
    assert [i for _, i in found] == list(range(20))


def test_a_stream_is_closed_by_hand_while_its_run_goes_on(running):
    run = running.client.start(closes_by_hand)
    assert list(run.stream()) == ["last words"]
    while len([e for e in run.events() if e.type == "step_completed"]) < 2:
        time.sleep(0.02)
    assert list(run.stream()) == ["last words"]
    assert run.stream_info() == StreamInfo(0, done=True)
    assert run.status() == "running"
    run.cancel()


def test_a_stream_of_bytes_is_raw_for_every_consumer_and_bytes_for_readers(running):
    run = running.client.start(writes_bytes, 3_000_000)
    digest = run.result(30)
    parts = list(run.stream("pdf"))
    assert {type(part) for part in parts} == {bytes}
    assert hashlib.sha256(b"".join(parts)).hexdigest() == digest
    chunks = [c for c in chunks_of(running, run.id) if c.kind == "DATA"]
    assert {c.payload.content_type for c in chunks} == {"application/octet-stream"}
    assert b"".join(c.payload.data for c in chunks) == b"".join(parts)


def chunks_of(system, run_id: str) -> list[StreamChunk]:
    topic = system.catalogue.streams
    tp = TP(topic, partition_for(run_id.encode(), system.broker.partitions(topic)))
    end = system.broker.end_offsets([tp])[tp]
    reader, found, position = system.broker.reader({tp: 0}), [], 0
    while position < end:
        for item in reader.poll(1):
            position = item.offset + 1
            if isinstance(item, Message):
                found.append(system.client._connection.codec.decode(item.value))
            else:
                position = item.offset
    reader.close()
    return [c for c in found if c.run_id == run_id]


def test_iterators_among_the_arguments_are_read_by_steps(running):
    async def numbers_() -> AsyncIterator[int]:
        for i in range(CHUNKS):
            yield i

    run = running.client.start(adds_up, numbers_(), more=iter(range(10)))
    assert run.result(30) == [sum(range(CHUNKS)), 45]

    async def go() -> list[int]:
        async with AsyncClient(running.url, namespace=running.namespace) as client:
            run = await client.start(adds_up, numbers_(), more=(i for i in range(4)))
            return await run.result(30)

    assert asyncio.run(go()) == [sum(range(CHUNKS)), 6]


def test_the_error_of_an_iterator_reaches_the_step_that_reads_it(running):
    def fails() -> Iterator[int]:
        yield 1
        raise Declined("card")

    run = running.client.start(adds_up, iter(()), more=fails())
    with pytest.raises(RunFailedError, match="card") as failed:
        run.result(30)
    assert isinstance(failed.value.cause, Declined)


def test_streams_that_steps_return_are_passed_on_and_are_live_in_the_result(running):
    result = running.client.start(passes_on, 10, 1).result(30)
    assert result["sums"] == [45, sum(i * i for i in range(10)), 45], "what the failed attempt wrote is not read"
    assert result["last"] == [8, 9]
    assert "".join(result["letters"]) == "abcdefgh"
    assert list(result["made"]) == list(range(10))
    assert list(result["squares"]) == [i * i for i in range(10)]

    async def go() -> list[int]:
        async with AsyncClient(running.url, namespace=running.namespace) as client:
            run = await client.start(hands_out, 5)
            return [i async for _, i in await run.result(30)]

    assert asyncio.run(go()) == list(range(5))


def test_workflow_code_cannot_read_a_stream(running):
    with pytest.raises(RunFailedError, match="cannot be read in workflow code"):
        running.client.start(reads_itself).result(30)


def test_a_reader_does_not_notice_that_a_processor_is_replaced(system):
    processor = system.start_processor()
    system.start_worker()
    run = system.client.start(slow_writer, 100, 0.02)
    thread, found = collect(run.stream())
    while len(found) < 10:
        time.sleep(0.01)
    system.stop_processor(processor)
    system.start_processor()
    thread.join(30)
    assert [i for _, i in found] == list(range(100))
    assert run.result(30) == 100


def test_what_another_worker_writes_again_comes_again_and_nothing_is_lost(system):
    system.start_processor()
    worker = system.start_worker()
    run = system.client.start(slow_writer, 60, 0.02)
    thread, found = collect(run.stream())
    while len(found) < 10:
        time.sleep(0.01)
    worker.stop(0)
    worker.join()
    system.start_worker()
    thread.join(60)
    seen = [i for _, i in found]
    begun = len(seen) - 60
    assert seen == [*range(begun), *range(60)]
    assert 10 <= begun < 60
    assert len({c.writer for c in chunks_of(system, run.id) if c.kind == "DATA"}) == 2


@pytest.mark.kafka
def test_a_run_is_read_from_its_beginning_whatever_the_clock_of_its_client_says(kafka, namespace, tmp_path):
    system = harness.System(f"kafka://{kafka}", namespace, tmp_path)
    try:
        system.start_processor()
        system.start_worker()
        command = (
            StartOptions(run_id="fast").named().command(writes_to_the_end.name, payloads.dump([[5, 0], {}], "input"))
        )
        sent_at = time.time()
        producer = confluent_kafka.Producer({"bootstrap.servers": kafka})
        producer.produce(
            system.catalogue.commands,
            Codec().encode(command),
            b"fast",
            partition_for(b"fast", harness.PARTITIONS),
            timestamp=round((sent_at + 60) * 1000),
        )
        assert producer.flush(30) == 0
        run = system.client.get_run("fast")
        assert [i for _, i in run.stream()] == list(range(5))
        harness.until(lambda: run.status() == "completed")
        assert [i for _, i in run.stream()] == list(range(5))
        assert abs(run.describe().created_at / 1000 - sent_at) < 30
        followed = [e.seq for events in follow_events(system.client._connection, "fast") for e in events]
        assert followed == list(range(1, len(followed) + 1))
    finally:
        system.close()


GUIDE = Path(__file__).parents[2] / "docs" / "streams.md"


def test_the_guide_says_what_is_so(running, monkeypatch):
    monkeypatch.setenv("DURABLY_URL", running.url)
    monkeypatch.setenv("DURABLY_NAMESPACE", running.namespace)
    blocks = re.findall(r"^```python\n(.*?)^```$", GUIDE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) > 5
    names: dict[str, Any] = {"__name__": "guide"}
    for block in blocks:
        exec(compile(block, str(GUIDE), "exec"), names)


@pytest.mark.kafka
def test_readers_and_writers_outlive_the_death_of_the_broker(own_kafka, namespace, tmp_path):
    system = harness.System(f"kafka://{own_kafka.bootstrap}", namespace, tmp_path)
    try:
        processor = system.start_processor()
        system.start_worker()
        run = system.client.start(writes_to_the_end, 300, 0.02)
        thread, found = collect(run.stream())
        harness.until(lambda: len(found) >= 20)
        system.stop_processor(processor)  # so that what is seen is the worker's and the reader's own doing
        own_kafka.kill()
        own_kafka.restart()
        thread.join(60)
        assert [i for _, i in found] == list(range(300))
    finally:
        system.close()
