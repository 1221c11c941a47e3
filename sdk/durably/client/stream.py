"""Reading a run's stream: a plain reader on the one partition of ``streams`` that the run's key maps to."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from durably_schemas.records import TERMINAL, Payload, RunSummary, StreamChunk

from durably import chunks, failures
from durably.client.exchange import answer, query
from durably.client.log import read_log, streams_written
from durably.client.outcome import summary_of
from durably.client.tail import Tail, end_of, partition_of
from durably.errors import BrokerError, DurablyError, RunNotFoundError, SerializationError, UnknownTopic
from durably.streams import bound_to, checked_namespace

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from durably.client.connection import Connection
    from durably.client.run import AsyncRun, Run

    Kind = type[Run[Any] | AsyncRun[Any]]

logger = logging.getLogger("durably.client")

BATCH_BYTES = 4 * 1024 * 1024  # of payloads that one poll is to bring, as far as the last ones tell
BATCH = 1_000  # records that it may bring
REOPEN = 0.05  # seconds before a reader that failed is made anew; doubles with each failure in a row
LONGEST_REOPEN = 2.0
CLOCK_SKEW_MS = 10_000
"""How far the clocks of brokers may differ, which stamp the records: a search by time begins this much earlier."""
_KEEP = "raise the topic's retention.ms, and see that its message.timestamp.type is LogAppendTime"


@dataclass(frozen=True, slots=True)
class StreamInfo:
    """How far a stream is.

    Attributes:
        tail_index: the index of its last chunk; -1 where nothing is written.
        done: whether nothing can follow: it was closed, or its run has ended.
    """

    tail_index: int
    done: bool


class ChunkOrder:
    """Which chunks of one stream count, in log order, so that every reader counts alike. Without I/O.

    A chunk whose n is not above the last one of its writer is a copy, by a producer's or a worker's repetition. The
    first END closes, whether of this stream or, with an empty namespace, of all the run's; what follows is ignored.
    Each writer counts from 1, so who first appears with more has written what the reader does not see.

    Attributes:
        count: how many chunks have counted: the index of the next one.
        ended: whether the END has been.
        error: what it carries, where an error ended the stream.
    """

    def __init__(self, namespace: str) -> None:
        self.count = 0
        self.ended = False
        self.error: Payload | None = None
        self._namespace = namespace
        self._last: dict[str, int] = {}

    def accept(self, chunk: StreamChunk) -> Payload | None:
        """The chunk's payload, where it is the stream's next. Raises `DurablyError` where earlier ones are missing."""
        if self.ended or chunk.namespace not in (self._namespace, ""):
            return None
        if chunk.namespace == self._namespace and chunk.n > 1 and chunk.writer not in self._last:
            raise DurablyError(
                f"the beginning of stream {self._namespace!r} of run {chunk.run_id} is gone: of what {chunk.writer} has "
                f"written, the first record that is still there is number {chunk.n}; {_KEEP}"
            )
        if chunk.kind == "END":
            self.ended = True
            self.error = chunk.payload
            return None
        if chunk.namespace != self._namespace or chunk.n <= self._last.get(chunk.writer, -1):
            return None
        self._last[chunk.writer] = chunk.n
        self.count += 1
        return chunk.payload


class StreamReader:
    """Reads one stream of one run in batches. Belongs to one thread.

    The stream ends at its END. A run that wrote nothing gets none, and neither does one whose only writer died; so
    it ends as well when the run has ended and all that lay in the partition by then is read: a step's chunks are
    durable before its result counts. The end of the run is learned from the topic ``runs``, so nothing polls.

    What a broken reader of the broker's has not returned is read by a new one, from the offsets that were reached: the
    count and the last n of each writer stay, so nothing is lost or repeated.

    Args:
        connection: whose broker is read, and who asks since when the run exists.
        run_id: the run; it need not have been started yet.
        namespace: the stream; None is the default one.
        start_index: the first chunk to return, from 0; negative: counted from the end as it is now.
        kind: what handles of runs among the values are to be.

    Raises:
        DurablyError: no stream may have this name.
    """

    def __init__(
        self, connection: Connection, run_id: str, namespace: str | None, start_index: int, kind: Kind
    ) -> None:
        self._connection = connection
        self._kind = kind
        self._run_id = run_id
        self._namespace = checked_namespace(namespace)
        self._streams, self._runs = connection.catalogue.streams, connection.catalogue.runs
        self._order = ChunkOrder(self._namespace)
        self._skip = max(0, start_index)
        self._held: deque[Payload] = deque(maxlen=max(0, -start_index))
        self._hold_until = -1
        self._start = 0
        self._known = False
        self._run_over = False
        self._last_offset: int | None = None
        self._tail: Tail | None = None
        self._limit = BATCH
        self._failures = 0
        self._failing_since = 0.0
        self._unreadable: Exception | None = None

    def next_batch(self) -> list[Any] | None:
        """The next values; empty where none came for a moment; None when the stream has ended.

        Raises:
            DurablyError: the beginning of the stream is no longer retained, or the broker stays away.
            SerializationError: the next value cannot be read; all before it have been returned.
            TimeoutError: no processor answered.
            Exception: what ended the stream, where its writer was an iterator that failed.
        """
        if self._unreadable is not None:
            raise self._unreadable
        if self._tail is None:
            self._tail = self._open()
        try:
            found = None if self._finished(self._tail) else self._accepted(self._tail)
        except BrokerError as e:
            self._reopen(self._tail, e)
            return []
        self._failures = 0
        if found is None:
            self._check_empty()
            self._raise_error()
            return None
        skipped = min(self._skip, len(found))
        self._skip -= skipped
        return self._loaded(found[skipped:])

    def info(self) -> StreamInfo:
        """How far the stream is now. Raises `RunNotFoundError`, and what `next_batch` does."""
        self._tail = self._open()
        if not self._known:
            raise RunNotFoundError(f"there is no run {self._run_id}", self._run_id)
        end = end_of(self._connection, self._run_id, self._streams)
        while not self._order.ended and self._tail.position(self._streams) < end:
            try:
                self._accepted(self._tail)
                self._failures = 0
            except BrokerError as e:
                self._reopen(self._tail, e)
        self._check_empty()
        return StreamInfo(self._order.count - 1, self._order.ended or self._run_over)

    def close(self) -> None:
        """Closes the reader. May be called twice."""
        if self._tail is not None:
            self._tail.close()
            self._tail = None
            self._order.ended = True

    def _accepted(self, tail: Tail) -> list[Payload]:
        """The payloads that count, of the next poll."""
        found: list[Payload] = []
        records = tail.poll(self._limit)
        size = 0
        for offset, record in records:
            if isinstance(record, StreamChunk):
                payload = self._order.accept(record)
                if payload is not None:
                    size += len(payload.data)
                    (self._held if offset < self._hold_until else found).append(payload)
            elif isinstance(record, RunSummary):
                self._note(record)
        if size:
            self._limit = max(1, min(BATCH, BATCH_BYTES * len(records) // size))
        if self._held and (tail.position(self._streams) >= self._hold_until or self._order.ended):
            found = [*self._held, *found]
            self._held.clear()
        return found

    def _loaded(self, payloads: list[Payload]) -> list[Any]:
        """The values, up to the first that cannot be read: that is raised when it is its turn."""
        values: list[Any] = []
        with bound_to(self._connection, self._kind):
            for left, payload in zip(range(len(payloads), 0, -1), payloads, strict=True):
                try:
                    values.append(chunks.load(payload))
                except Exception as e:
                    index = self._order.count - left
                    failures.add_note(
                        e, f"it is chunk {index} of {self._namespace!r}: start_index={index + 1} begins behind it"
                    )
                    if not values:
                        raise
                    self._unreadable = e
                    break
        return values

    def _finished(self, tail: Tail) -> bool:
        if self._order.ended:
            return True
        if self._run_over and self._last_offset is None:
            self._last_offset = end_of(self._connection, self._run_id, self._streams)
        return self._last_offset is not None and tail.position(self._streams) >= self._last_offset

    def _raise_error(self) -> None:
        if self._order.error is not None:
            error, self._order.error = self._order.error, None  # it is raised once
            raise chunks.load_error(error)

    def _note(self, summary: RunSummary) -> None:
        self._run_over = self._run_over or summary.status in TERMINAL

    def _reopen(self, tail: Tail, error: BrokerError) -> None:
        """Waits a moment and reads on with a new reader; raises the error where that has not helped for long."""
        now = time.monotonic()
        if self._failures == 0:
            self._failing_since = now
        if isinstance(error, UnknownTopic) or now - self._failing_since > self._connection.timeout:
            raise error
        logger.info("reading stream %r of run %s again: %s", self._namespace, self._run_id, error)
        time.sleep(min(REOPEN * 2 ** min(self._failures, 6), LONGEST_REOPEN))
        self._failures += 1
        tail.reopen()

    def _open(self) -> Tail:
        # Both ends are taken before the question is sent: whatever the answer does not tell lies behind them.
        connection, run_id = self._connection, self._run_id
        end, runs_end = (end_of(connection, run_id, topic) for topic in (self._streams, self._runs))
        if self._held.maxlen:
            self._hold_until = end
        reply = answer(connection, run_id, query(run_id, "SUMMARY"))
        try:
            summary = summary_of(reply, run_id)
        except RunNotFoundError:
            start = end
        else:
            tp = partition_of(connection, run_id, self._streams)
            start = connection.broker.offsets_at([tp], summary.created_at - CLOCK_SKEW_MS)[tp]
            head = connection.broker.start_offsets([tp])[tp]
            if start <= head and head > 0:
                self._check_retained(head)
            self._known = True
            self._note(summary)
        self._start = start
        return Tail(connection, run_id, {self._streams: start, self._runs: runs_end}, whole=self._streams)

    def _check_empty(self) -> None:
        """Raises `DurablyError` where a run that is over wrote the stream, and reading began behind all of it."""
        if self._order.count == 0 and self._known and self._run_over and self._start > 0:
            self._check_retained(self._start)

    def _check_retained(self, begin: int) -> None:
        """Raises `DurablyError` where the log says that chunks lay below the offset at which reading begins."""
        for written in streams_written(read_log(self._connection, self._run_id)):
            if written.namespace == self._namespace and written.first_offset < begin:
                raise DurablyError(
                    f"the beginning of stream {self._namespace!r} of run {self._run_id} is gone: it was at offset "
                    f"{written.first_offset} of {self._streams}, which is read from {begin} on; {_KEEP}"
                )


class ShownReader(StreamReader):
    """As `StreamReader`, for people to look at: a value that cannot be read here comes as its `Payload`."""

    def _loaded(self, payloads: list[Payload]) -> list[Any]:
        with bound_to(self._connection, self._kind):
            return [_shown(payload) for payload in payloads]


def _shown(payload: Payload) -> Any:
    try:
        return chunks.load(payload)
    except SerializationError:
        return payload


def read(connection: Connection, run_id: str, namespace: str | None, start_index: int, kind: Kind) -> Iterator[Any]:
    """The values of a stream, then each new one as it comes, to the stream's end."""
    return _read(StreamReader(connection, run_id, namespace, start_index, kind))


def _read(reader: StreamReader) -> Iterator[Any]:
    try:
        while (batch := reader.next_batch()) is not None:
            yield from batch
    finally:
        reader.close()


def read_async(
    connection: Connection, run_id: str, namespace: str | None, start_index: int, kind: Kind
) -> AsyncIterator[Any]:
    """As `read`, on a thread of its own: many streams may be read at once, and each at its reader's pace."""
    return _read_async(StreamReader(connection, run_id, namespace, start_index, kind))


async def _read_async(reader: StreamReader) -> AsyncIterator[Any]:
    thread = ThreadPoolExecutor(1, thread_name_prefix="durably-stream")
    loop = asyncio.get_running_loop()
    try:
        while (batch := await loop.run_in_executor(thread, reader.next_batch)) is not None:
            for value in batch:
                yield value
    finally:
        thread.submit(reader.close)
        thread.shutdown(wait=False)


def shown(connection: Connection, run_id: str, namespace: str | None, start_index: int, kind: Kind) -> Iterator[Any]:
    """As `read`, but by a `ShownReader`."""
    return _read(ShownReader(connection, run_id, namespace, start_index, kind))


def shown_async(
    connection: Connection, run_id: str, namespace: str | None, start_index: int, kind: Kind
) -> AsyncIterator[Any]:
    """As `read_async`, but by a `ShownReader`."""
    return _read_async(ShownReader(connection, run_id, namespace, start_index, kind))


def info(connection: Connection, run_id: str, namespace: str | None, kind: Kind) -> StreamInfo:
    """How far a stream is now. Raises `RunNotFoundError`, or `TimeoutError`."""
    reader = StreamReader(connection, run_id, namespace, 0, kind)
    try:
        return reader.info()
    finally:
        reader.close()
