"""What one execution of a step writes to streams."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any, cast

from durably_schemas.catalogue import partition_for
from durably_schemas.records import StreamChunk, StreamWritten

from durably import chunks
from durably.errors import DurablyError, RecordTooLarge
from durably.streams import LONGEST_NAMESPACE, Readable

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from durably_schemas import Codec
    from durably_schemas.records import ChunkKind, Payload

    from durably.broker.port import Producer
    from durably.worker.clock import Clock

UNACKNOWLEDGED = 1_000  # chunks of one execution that may be under way; more make it wait
UNACKNOWLEDGED_BYTES = 8 * 1024 * 1024  # as many of theirs; the last one may lie above
ROUND = 0.0005  # seconds between two looks at the acknowledgements, while an async step waits for one
_ITERATORS = (AsyncIterator, Iterator)
LOOK = 0.01  # seconds that a thread waits for one, before it looks whether another thread was told


class Acknowledgements:
    """Lets async steps wait for the producer's acknowledgements: one poll serves all that wait."""

    def __init__(self, producer: Producer) -> None:
        self._producer = producer
        # The worker's loop is one; a plain function that calls asyncio.run() brings another.
        self._rounds: dict[asyncio.AbstractEventLoop, asyncio.Future[None]] = {}

    async def until(self, done: Callable[[], bool]) -> None:
        """Waits on the running loop."""
        loop = asyncio.get_running_loop()
        while not done():
            waiting = self._rounds.get(loop)
            if waiting is None:
                waiting = self._rounds[loop] = loop.create_future()
                loop.call_later(ROUND, self._serve, loop, waiting)
            try:
                await asyncio.shield(waiting)
            finally:  # also where it is cancelled because its loop closes, which nothing serves then
                self._forget(loop, waiting)

    def until_sync(self, done: Callable[[], bool]) -> None:
        """Waits on a thread."""
        while not done():
            self._producer.poll(LOOK)

    def _serve(self, loop: asyncio.AbstractEventLoop, waiting: asyncio.Future[None]) -> None:
        self._producer.poll(0)
        self._forget(loop, waiting)
        waiting.set_result(None)

    def _forget(self, loop: asyncio.AbstractEventLoop, waiting: asyncio.Future[None]) -> None:
        if self._rounds.get(loop) is waiting:
            del self._rounds[loop]


class StreamTopic:
    """Where chunks go, and what every execution of the worker needs for sending them."""

    def __init__(
        self,
        name: str,
        *,
        partitions: Callable[[], int],
        producer: Producer,
        codec: Codec,
        max_bytes: int,
        clock: Clock,
    ) -> None:
        self.name = name
        self.partitions = partitions
        self.producer = producer
        self.acknowledgements = Acknowledgements(producer)
        self.codec = codec
        self.max_bytes = max_bytes
        self.clock = clock


class _Stream:
    """One namespace: what was sent, and where the first of it lies."""

    __slots__ = ("chunks", "ended", "first_offset", "n")

    def __init__(self) -> None:
        self.n = 0
        self.chunks = 0
        self.first_offset = -1
        self.ended = False


class StepWriters:
    """The streams of one execution.

    A chunk counts as written when Kafka has acknowledged it; the result of the step goes out after the last one.
    Acknowledgements arrive on any thread that polls the producer, within a `send` too: the lock is reentrant.
    """

    __slots__ = (
        "_acknowledged", "_bytes", "_drained", "_error", "_lock", "_over", "_sent", "_streams", "_topic", "run_id",
        "writer",
    )  # fmt: skip

    def __init__(self, topic: StreamTopic, run_id: str, writer: str) -> None:
        self.run_id = run_id
        self.writer = writer
        self._topic = topic
        self._streams: dict[str, _Stream] = {}
        self._lock = threading.RLock()
        self._sent = 0
        self._acknowledged = 0
        self._bytes = 0  # sent and not acknowledged
        self._drained = 0
        self._error: Exception | None = None
        self._over = False

    async def write(self, namespace: str, value: Any) -> None:
        """Sends a chunk; waits while too many are unacknowledged."""
        if not self._room():
            await self._topic.acknowledgements.until(self._room)
        self._send(namespace, "DATA", chunks.dump(value, namespace))

    def write_sync(self, namespace: str, value: Any) -> None:
        """The same, blocking."""
        self._topic.acknowledgements.until_sync(self._room)
        self._send(namespace, "DATA", chunks.dump(value, namespace))

    def end(self, namespace: str) -> None:
        """Sends the end of a stream, once."""
        stream = self._streams.get(namespace)
        if stream is None or not stream.ended:
            self._send(namespace, "END", None)

    def settled(self) -> bool:
        """Whether everything sent is acknowledged, or has failed."""
        return self._acknowledged == self._sent

    async def settle(self) -> None:
        """Waits until everything is acknowledged. Raises what went wrong."""
        await self._topic.acknowledgements.until(self.settled)
        self._check()

    def settle_sync(self) -> None:
        """The same, blocking."""
        self._topic.acknowledgements.until_sync(self.settled)
        self._check()

    def shut(self) -> None:
        """The execution is over: a thread or task that goes on all the same writes nothing more, as of now."""
        with self._lock:
            self._over = True

    def written(self) -> tuple[StreamWritten, ...]:
        """What to tell the processor. To be asked when everything is settled."""
        if not self._streams:
            return ()
        partition = partition_for(self.run_id.encode(), self._topic.partitions())
        return tuple(
            StreamWritten(
                namespace=namespace,
                writer=self.writer,
                partition=partition,
                first_offset=stream.first_offset,
                chunks=stream.chunks,
            )
            for namespace, stream in self._streams.items()
            if stream.first_offset >= 0
        )

    def new_result_stream(self) -> Readable:
        """A stream for an iterator in the result: of this execution alone, so that no attempt reads another's chunks."""
        self._drained += 1
        name = f"result-{self.writer}" if self._drained == 1 else f"result-{self.writer}-{self._drained}"
        return Readable(self.run_id, name[:LONGEST_NAMESPACE])

    def _room(self) -> bool:
        return self._error is not None or (
            self._sent - self._acknowledged < UNACKNOWLEDGED and self._bytes < UNACKNOWLEDGED_BYTES
        )

    def _check(self) -> None:
        if self._error is not None:
            raise DurablyError(f"a chunk of a stream could not be written: {self._error}") from self._error

    def _send(self, namespace: str, kind: ChunkKind, payload: Payload | None) -> None:
        self._check()
        with self._lock:  # a step may write from several threads; n and the order in the log must agree
            if self._over:
                raise DurablyError(
                    f"stream {namespace!r}: this execution of the step is over, and nothing can be written behind its "
                    f"result: await what writes before the step returns"
                )
            stream = self._streams.setdefault(namespace, _Stream())
            if stream.ended:
                raise DurablyError(f"stream {namespace!r} was closed by this step; nothing can follow")
            topic = self._topic
            chunk = StreamChunk(
                run_id=self.run_id,
                namespace=namespace,
                writer=self.writer,
                n=stream.n + 1,
                kind=kind,
                at=topic.clock.now(),
                payload=payload,
            )
            value = topic.codec.encode(chunk)
            size = len(value)
            if size > topic.max_bytes:
                raise RecordTooLarge.of(f"a chunk for stream {namespace!r}", size, topic.max_bytes)
            topic.producer.send(
                topic.name,
                value,
                key=self.run_id.encode(),
                on_ack=lambda error, offset: self._on_ack(stream, size, error, offset),
            )
            stream.n += 1
            stream.chunks += kind == "DATA"
            stream.ended = kind == "END"
            self._sent += 1
            self._bytes += size

    def _on_ack(self, stream: _Stream, size: int, error: Exception | None, offset: int) -> None:
        with self._lock:
            if error is not None:
                self._error = error
            elif stream.first_offset < 0 or offset < stream.first_offset:
                stream.first_offset = offset
            self._acknowledged += 1
            self._bytes -= size


async def drain(writers: StepWriters, value: Any) -> Any:
    """The result of an async step, with handles of streams in the place of iterators.

    An iterator, async or not, that is the result, or an item of the list, tuple or dict that it is, is written to its
    end to a stream of its own. What an iterator raises is raised here.
    """
    if isinstance(value, AsyncIterator):
        return await _drain(writers, value)
    if isinstance(value, Iterator):
        try:
            return await asyncio.to_thread(_drain_sync, writers, value)
        except asyncio.CancelledError:
            writers.shut()  # the thread goes on to its next write
            raise
    items = _items(value)
    if not any(isinstance(item, _ITERATORS) for item in items):
        return value
    return _rebuilt(value, [await drain(writers, i) if isinstance(i, _ITERATORS) else i for i in items])


def drain_sync(writers: StepWriters, value: Any, loop: asyncio.AbstractEventLoop) -> Any:
    """As `drain`, for a plain function on its thread; async iterators are drawn from on the worker's loop."""
    if isinstance(value, AsyncIterator):
        return asyncio.run_coroutine_threadsafe(_drain(writers, value), loop).result()
    if isinstance(value, Iterator):
        return _drain_sync(writers, value)
    items = _items(value)
    if not any(isinstance(item, _ITERATORS) for item in items):
        return value
    return _rebuilt(value, [drain_sync(writers, i, loop) if isinstance(i, _ITERATORS) else i for i in items])


async def _drain(writers: StepWriters, values: AsyncIterator[Any]) -> Readable:
    handle = writers.new_result_stream()
    try:
        async for value in values:
            await writers.write(handle.namespace, value)
    finally:
        if (close := getattr(values, "aclose", None)) is not None:
            await close()
    writers.end(handle.namespace)
    return handle


def _drain_sync(writers: StepWriters, values: Iterator[Any]) -> Readable:
    handle = writers.new_result_stream()
    try:
        for value in values:
            writers.write_sync(handle.namespace, value)
    finally:
        if (close := getattr(values, "close", None)) is not None:
            close()
    writers.end(handle.namespace)
    return handle


def _items(value: Any) -> Collection[Any]:
    kind = type(value)
    if kind is dict:
        return cast("dict[Any, Any]", value).values()
    return value if kind is list or kind is tuple else ()


def _rebuilt(value: Any, items: list[Any]) -> Any:
    return dict(zip(value, items, strict=True)) if type(value) is dict else type(value)(items)
