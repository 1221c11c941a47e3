"""A reader that follows one run: on each topic, the one partition that the run's key maps to."""

from __future__ import annotations

import time
from itertools import chain
from typing import TYPE_CHECKING

from durably_schemas import CodecError
from durably_schemas.catalogue import partition_for
from durably_schemas.events import RunCancelled, RunCompleted, RunFailed
from durably_schemas.records import Event, Record

from durably.broker.port import TP, End, Message, Reader
from durably.client.log import log_pages
from durably.errors import DurablyError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from durably.client.connection import Connection

_MAY_BE_GONE = 10.0  # seconds that a record of a topic lives at the very least
_POLL = 0.25  # seconds; a tail is closed by the thread that polls it, between two polls


class Tail:
    """The decoded records of one run, in the order of each partition. Belongs to one thread.

    Args:
        connection: whose broker is read.
        run_id: the key.
        positions: for each topic, the offset to begin at.
        whole: the topic of which nothing may be missed.
    """

    def __init__(
        self, connection: Connection, run_id: str, positions: Mapping[str, int], *, whole: str | None = None
    ) -> None:
        self._connection = connection
        self._codec = connection.codec
        self._run_id = run_id
        self._key = run_id.encode()
        self._at = dict(positions)
        self._whole = whole
        self._reader: Reader | None = self._opened()

    def poll(self, limit: int = 500) -> list[tuple[int, Record]]:
        """Waits a moment for records, about ``limit`` of all runs', each with its offset.

        One that cannot be decoded is left out.

        Raises:
            DurablyError: the topic that is to be read whole has lost records that were not read yet.
            BrokerError: the reader is broken, and another can go on: `reopen`.
        """
        records = []
        if self._reader is None:
            self._reader = self._opened()
        items = self._reader.poll(_POLL, limit)
        self._check_gap(items)
        for item in items:
            if not isinstance(item, Message):
                self._at[item.topic] = max(self._at[item.topic], item.offset)
                continue
            self._at[item.topic] = max(self._at[item.topic], item.offset + 1)
            if item.key == self._key:
                try:
                    records.append((item.offset, self._codec.decode(item.value)))
                except CodecError:
                    continue
        return records

    def position(self, topic: str) -> int:
        """Everything below this offset has been returned by `poll`."""
        return self._at[topic]

    def reopen(self) -> None:
        """Drops the reader; the next `poll` makes a new one, which goes on from where this one was."""
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()

    def close(self) -> None:
        """Closes the reader."""
        if self._reader is not None:
            self._reader.close()

    def _opened(self) -> Reader:
        return self._connection.broker.reader(
            {partition_of(self._connection, self._run_id, topic): offset for topic, offset in self._at.items()}
        )

    def _check_gap(self, items: list[Message | End]) -> None:
        """Looks whether retention has overtaken the reader, which the broker then moves on without a word.

        Transactions leave gaps between offsets too; so the broker is asked, but only about records so old that they
        can have been deleted.
        """
        if self._whole is None:
            return
        position = self._at[self._whole]
        old = (time.time() - _MAY_BE_GONE) * 1000
        for item in items:
            if item.topic == self._whole:
                if item.offset > position and isinstance(item, Message) and item.timestamp < old:
                    tp = TP(item.topic, item.partition)
                    head = self._connection.broker.start_offsets([tp])[tp]
                    if head > position:
                        raise DurablyError(
                            f"records of {tp.topic} [{tp.partition}] were deleted before they were read for run "
                            f"{self._run_id}: {position} was the next, and {head} is now the first; raise the topic's "
                            f"retention.ms, or read faster"
                        )
                    return
                position = item.offset + isinstance(item, Message)


def partition_of(connection: Connection, run_id: str, topic: str) -> TP:
    """Where the records of a run are. Raises `ConfigurationError` where the topic is missing."""
    return TP(topic, partition_for(run_id.encode(), connection.partitions(topic)))


def end_of(connection: Connection, run_id: str, topic: str) -> int:
    """The end of the run's partition just now."""
    tp = partition_of(connection, run_id, topic)
    return connection.broker.end_offsets([tp])[tp]


def follow_events(connection: Connection, run_id: str) -> Iterator[list[Event]]:
    """A run's log from its first event on, then each event as it is committed; ends with the run.

    An empty list is yielded where nothing came for a moment, so that the caller can look at its clock.

    Raises:
        RunNotFoundError: there is no such run.
        TimeoutError: no processor answered.
    """
    tp = partition_of(connection, run_id, connection.catalogue.events)
    # What is committed by now is the processor's to tell: `events` may have lost its beginning, and may still hold an
    # older run with this ID. What comes later lies behind this end, which is taken first.
    end = connection.broker.end_offsets([tp], committed=True)[tp]
    tail = Tail(connection, run_id, {tp.topic: end})
    seen = 0
    try:
        for events in chain(log_pages(connection, run_id), _polled(tail, run_id)):
            new = [e for e in events if e.seq > seen]
            if new:
                seen = new[-1].seq
            yield new
            if any(isinstance(e.data, RunCompleted | RunFailed | RunCancelled) for e in new):
                return
    finally:
        tail.close()


def _polled(tail: Tail, run_id: str) -> Iterator[list[Event]]:
    while True:
        # Events of custom tokens have keys that look the same.
        yield [e for _, e in tail.poll() if isinstance(e, Event) and e.run_id == run_id]
