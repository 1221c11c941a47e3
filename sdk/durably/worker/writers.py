"""What one execution of a step writes to streams."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

from durably_schemas.catalogue import partition_for
from durably_schemas.records import StreamChunk, StreamWritten

from durably import payloads
from durably.errors import DurablyError, RecordTooLarge

if TYPE_CHECKING:
    from collections.abc import Callable

    from durably_schemas import Codec
    from durably_schemas.records import ChunkKind, Payload

    from durably.broker.port import Producer
    from durably.worker.clock import Clock

UNACKNOWLEDGED = 256  # chunks of one execution that may be under way; more make it wait
ROUND = 0.0005  # seconds between two looks at the acknowledgements, while an async step waits for one
LOOK = 0.01  # seconds that a thread waits for one, before it looks whether another thread was told


class Acknowledgements:
    """Lets async steps wait for the producer's acknowledgements: one poll serves all that wait."""

    def __init__(self, producer: Producer) -> None:
        self._producer = producer
        self._round: asyncio.Future[None] | None = None

    async def until(self, done: Callable[[], bool]) -> None:
        """Waits on the worker's loop."""
        while not done():
            if self._round is None:
                loop = asyncio.get_running_loop()
                self._round = loop.create_future()
                loop.call_later(ROUND, self._serve)
            await asyncio.shield(self._round)

    def until_sync(self, done: Callable[[], bool]) -> None:
        """Waits on a thread."""
        while not done():
            self._producer.poll(LOOK)

    def _serve(self) -> None:
        self._producer.poll(0)
        served, self._round = self._round, None
        assert served is not None
        served.set_result(None)


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

    __slots__ = ("_acknowledged", "_error", "_lock", "_over", "_sent", "_streams", "_topic", "run_id", "writer")

    def __init__(self, topic: StreamTopic, run_id: str, writer: str) -> None:
        self.run_id = run_id
        self.writer = writer
        self._topic = topic
        self._streams: dict[str, _Stream] | None = None  # most steps write none
        self._lock: threading.RLock | None = None
        self._sent = 0
        self._acknowledged = 0
        self._error: Exception | None = None
        self._over = False

    async def write(self, namespace: str, value: Any) -> None:
        """Sends a chunk; waits while too many are unacknowledged."""
        if not self._room():
            await self._topic.acknowledgements.until(self._room)
        self._send(namespace, "DATA", payloads.dump(value, f"a chunk for stream {namespace!r}"))

    def write_sync(self, namespace: str, value: Any) -> None:
        """The same, blocking."""
        self._topic.acknowledgements.until_sync(self._room)
        self._send(namespace, "DATA", payloads.dump(value, f"a chunk for stream {namespace!r}"))

    def end(self, namespace: str) -> None:
        """Sends the end of a stream, once."""
        if self._streams is None or namespace not in self._streams or not self._streams[namespace].ended:
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
        """The execution is over: a thread that goes on all the same writes nothing more."""
        self._over = True

    def written(self) -> tuple[StreamWritten, ...]:
        """What to tell the processor. To be asked when everything is settled."""
        if self._streams is None:
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

    def _room(self) -> bool:
        return self._sent - self._acknowledged < UNACKNOWLEDGED or self._error is not None

    def _check(self) -> None:
        if self._error is not None:
            raise DurablyError(f"a chunk of a stream could not be written: {self._error}") from self._error

    def _send(self, namespace: str, kind: ChunkKind, payload: Payload | None) -> None:
        self._check()
        if self._over:
            raise DurablyError(f"stream {namespace!r}: this execution of the step is over")
        if self._streams is None:
            self._streams, self._lock = {}, threading.RLock()
        assert self._lock is not None
        with self._lock:  # a step may write from several threads; n and the order in the log must agree
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
            if len(value) > topic.max_bytes:
                raise RecordTooLarge(
                    f"a chunk for stream {namespace!r} has {len(value)} bytes, and a record {topic.max_bytes} at most: "
                    f"write smaller chunks"
                )
            topic.producer.send(
                topic.name,
                value,
                key=self.run_id.encode(),
                on_ack=lambda error, offset: self._on_ack(stream, error, offset),
            )
            stream.n += 1
            stream.chunks += kind == "DATA"
            stream.ended = kind == "END"
            self._sent += 1

    def _on_ack(self, stream: _Stream, error: Exception | None, offset: int) -> None:
        assert self._lock is not None
        with self._lock:
            if error is not None:
                self._error = error
            elif stream.first_offset < 0 or offset < stream.first_offset:
                stream.first_offset = offset
            self._acknowledged += 1
