"""Reading a run's stream: a plain reader on the one partition of ``streams`` that the run's key maps to."""

from __future__ import annotations

import asyncio
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from durably_schemas.records import TERMINAL, Payload, RunSummary, StreamChunk

from durably import payloads
from durably.client.exchange import answer, query
from durably.client.log import read_log, streams_written
from durably.client.outcome import summary_of
from durably.client.tail import CLOCK_SKEW_MS, Tail, end_of, partition_of
from durably.errors import DurablyError, RunNotFoundError
from durably.streams import DEFAULT_NAMESPACE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from durably.client.connection import Connection


class ChunkOrder:
    """Which chunks of one stream count, in log order, so that every reader counts alike. Without I/O.

    A chunk whose n is not above the last one of its writer is a copy, by a producer's or a worker's repetition. The
    first END closes, whether of this stream or, with an empty namespace, of all the run's; what follows is ignored.
    """

    def __init__(self, namespace: str) -> None:
        self.ended = False
        self._namespace = namespace
        self._last: dict[str, int] = {}

    def accept(self, chunk: StreamChunk) -> Payload | None:
        """The chunk's payload, where it is the stream's next."""
        if self.ended or chunk.namespace not in (self._namespace, ""):
            return None
        if chunk.kind == "END":
            self.ended = True
            return None
        if chunk.namespace != self._namespace or chunk.n <= self._last.get(chunk.writer, -1):
            return None
        self._last[chunk.writer] = chunk.n
        return chunk.payload


class StreamReader:
    """Reads one stream of one run in batches. Belongs to one thread.

    The stream ends at its END. A run that wrote nothing gets none, and neither does one whose only writer died; so
    it ends as well when the run has ended and all that lay in the partition by then is read: a step's chunks are
    durable before its result counts. The end of the run is learned from the topic ``runs``, so nothing polls.

    Args:
        connection: whose broker is read, and who asks since when the run exists.
        run_id: the run; it need not have been started yet.
        namespace: the stream; None is the default one.
        start_index: the first chunk to return, from 0; negative: counted from the end as it is now.
    """

    def __init__(self, connection: Connection, run_id: str, namespace: str | None, start_index: int) -> None:
        self._connection = connection
        self._run_id = run_id
        self._namespace = DEFAULT_NAMESPACE if namespace is None else namespace
        self._streams, self._runs = connection.catalogue.streams, connection.catalogue.runs
        self._order = ChunkOrder(self._namespace)
        self._skip = max(0, start_index)
        self._held: deque[Payload] = deque(maxlen=max(0, -start_index))
        self._hold_until = -1
        self._last_offset: int | None = None
        self._tail: Tail | None = None

    def next_batch(self) -> list[Any] | None:
        """The next values; empty where none came for a moment; None when the stream has ended.

        Raises:
            DurablyError: the beginning of the stream is no longer retained.
            TimeoutError: no processor answered.
        """
        if self._tail is None:
            self._tail = self._open()
        elif self._finished(self._tail):
            return None
        found: list[Payload] = []
        for offset, record in self._tail.poll():
            if isinstance(record, StreamChunk):
                payload = self._order.accept(record)
                if payload is not None:
                    (self._held if offset < self._hold_until else found).append(payload)
            elif isinstance(record, RunSummary):
                self._note(record)
        if self._tail.position(self._streams) >= self._hold_until or self._order.ended:
            found = [*self._held, *found]
            self._held.clear()
        skipped = min(self._skip, len(found))
        self._skip -= skipped
        return [payloads.load(payload) for payload in found[skipped:]]

    def close(self) -> None:
        """Closes the reader. May be called twice."""
        if self._tail is not None:
            self._tail.close()
            self._tail = None
            self._order.ended = True

    def _finished(self, tail: Tail) -> bool:
        return self._order.ended or (
            self._last_offset is not None and tail.position(self._streams) >= self._last_offset
        )

    def _note(self, summary: RunSummary) -> None:
        if summary.status in TERMINAL and self._last_offset is None:
            self._last_offset = end_of(self._connection, self._run_id, self._streams)

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
            self._note(summary)
        return Tail(connection, run_id, {self._streams: start, self._runs: runs_end})

    def _check_retained(self, head: int) -> None:
        """Raises `DurablyError` where the log says that chunks lay below the first offset still there."""
        for written in streams_written(read_log(self._connection, self._run_id)):
            if written.namespace == self._namespace and written.first_offset < head:
                raise DurablyError(
                    f"the beginning of stream {self._namespace!r} of run {self._run_id} is gone: it was at offset "
                    f"{written.first_offset} of {self._streams}, which now begins at {head}; raise its retention.ms"
                )


def read(connection: Connection, run_id: str, namespace: str | None, start_index: int) -> Iterator[Any]:
    """The values of a stream, then each new one as it comes, to the stream's end."""
    reader = StreamReader(connection, run_id, namespace, start_index)
    try:
        while (batch := reader.next_batch()) is not None:
            yield from batch
    finally:
        reader.close()


async def read_async(
    connection: Connection, run_id: str, namespace: str | None, start_index: int
) -> AsyncIterator[Any]:
    """As `read`, on a thread of its own: many streams may be read at once, and each at its reader's pace."""
    reader = StreamReader(connection, run_id, namespace, start_index)
    thread = ThreadPoolExecutor(1, thread_name_prefix="durably-stream")
    loop = asyncio.get_running_loop()
    try:
        while (batch := await loop.run_in_executor(thread, reader.next_batch)) is not None:
            for value in batch:
                yield value
    finally:
        thread.submit(reader.close)
        thread.shutdown(wait=False)
