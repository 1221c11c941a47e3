"""Bringing a store up to date from the topics of its partition. Runs no user code.

snapshots   first: what of the logs that are still needed ``events`` has lost
events      then, from the store's checkpoint, or from where the topic begins
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Iterator

from durably.broker.port import TP, Broker, End, Message, Reader
from durably_schemas import Catalogue, Codec
from durably_schemas import events as ev
from durably_schemas.records import Event, Snapshot

from durably_processor.rebuild import Stretch
from durably_processor.state.store import CHECKPOINT, SNAPSHOTS, Changes, Holder, Store

log = logging.getLogger("durably.processor")

POLLED = 2_000
"""Records that are taken from the reader at a time."""
AT_ONCE, AT_ONCE_BYTES = 200_000, 32 * 1024 * 1024
"""What is applied to the store together: the more, the fewer runs are open at its end, and a run that begins and ends
within it costs least."""
UNLOGGED = 20_000
"""Records from which on the store is written without RocksDB's own log, and flushed at the end."""
TOLD_EVERY = 5.0
"""Seconds between two lines that say how far it is."""


class _Topic:
    """What is to be read of one topic: from ``position`` to ``target``."""

    def __init__(self, broker: Broker, tp: TP, checkpoint: bytes, position: int, start: int, target: int) -> None:
        self._broker = broker
        self._reader: Reader | None = None
        self.tp = tp
        self.checkpoint = checkpoint
        self.position = max(position, start)
        self.target = target

    @property
    def left(self) -> int:
        """Offsets that are still to be passed."""
        return max(0, self.target - self.position)

    def poll(self, timeout: float) -> list[Message | End]:
        if self._reader is None:
            self._reader = self._broker.reader({self.tp: self.position})
        return self._reader.poll(timeout, POLLED)

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None


class Restore:
    """Reads one partition of ``snapshots`` and ``events`` from the store's checkpoints to their high watermarks.

    The high watermark, not the last stable offset: that may lie below events that are already committed.

    Args:
        number: of the partition.
        store: open, and not written by anybody else.
        broker, catalogue, codec: of the topics.
        what: how the log calls it.

    Attributes:
        count: how many records were read.
    """

    def __init__(
        self,
        number: int,
        store: Store,
        broker: Broker,
        catalogue: Catalogue,
        codec: Codec,
        what: str = "partition",
    ) -> None:
        self._what = f"{what} {number}"
        self.count = 0
        self._store = store
        self._codec = codec
        snapshots, events = (TP(topic, number) for topic in (catalogue.snapshots, catalogue.events))
        targets = broker.end_offsets([snapshots, events])
        starts = broker.start_offsets([snapshots, events])
        self._make_sure(broker.identity(catalogue.events), starts[events], targets[events])
        self._topics = [
            _Topic(broker, snapshots, SNAPSHOTS, store.snapshots, starts[snapshots], targets[snapshots]),
            _Topic(broker, events, CHECKPOINT, store.checkpoint, starts[events], targets[events]),
        ]
        self._all = sum(topic.left for topic in self._topics)
        self._logged = self._all < UNLOGGED
        self._begun = self._told = time.monotonic()
        self._stretch = Stretch(store, codec, cut=starts[events] > 0)
        self._records = self._bytes = 0  # that wait to be applied
        self._applying: Iterator[Changes] | None = None

    def _make_sure(self, identity: str, start: int, end: int) -> None:
        """Empties a store that cannot be brought up to date."""
        checkpoint = self._store.checkpoint
        if checkpoint > end or not self._store.belongs_to(identity):
            why = "not of this topic, which was made anew"
        elif 0 < checkpoint < start:
            why = f"of offset {checkpoint:,}, and events begin at {start:,} by now"
        else:
            return
        log.warning("%s: the store is %s: it is rebuilt", self._what, why)
        self._store.clear()
        self._store.belongs_to(identity)

    @property
    def ratio(self) -> float:
        """How much of it is done, 0 to 1. May be asked from any thread."""
        return 1 - sum(topic.left for topic in self._topics.copy()) / self._all if self._all else 1.0

    def step(self, seconds: float) -> bool:
        """Restores for about this long; True when everything is there."""
        # What is gathered lives until it is written: looking for garbage among it, again and again, finds none.
        collecting = gc.isenabled()
        gc.disable()
        try:
            return self._advance(time.monotonic() + seconds)
        finally:
            if collecting:
                gc.enable()

    def _advance(self, end: float) -> bool:
        while self._topics and (left := end - time.monotonic()) > 0:
            topic = self._topics[0]
            if self._applying is not None:
                self._apply(topic, self._applying)
            elif topic.left and self._records < AT_ONCE and self._bytes < AT_ONCE_BYTES:
                take = self._take_events if topic.checkpoint == CHECKPOINT else self._take_snapshots
                take(topic, topic.poll(left))
            elif self._records:
                self._applying = self._stretch.pieces()
            else:
                self._end(topic)
        return not self._topics

    def close(self) -> None:
        """Stops reading; what was applied is kept."""
        for topic in self._topics:
            topic.close()
        self._topics = []

    def _end(self, topic: _Topic) -> None:
        self._store.write({topic.checkpoint: topic.position.to_bytes(8, "big")}, logged=self._logged)
        topic.close()
        del self._topics[0]
        if self._topics:
            return
        if not self._logged:
            self._store.flush()
        if self._all:
            took = time.monotonic() - self._begun
            log.info("%s: %s events restored in %.2f s", self._what, f"{self.count:,}", took)

    def _take_events(self, topic: _Topic, messages: list[Message | End]) -> None:
        logs = self._stretch.logs
        size = 0
        for message in messages:
            try:
                value: bytes = message[5]  # type: ignore[misc, assignment]  # an End has none; an event always has
            except IndexError:
                topic.position = max(topic.position, message[2])
                self._records -= 1
                continue
            logs[message[4]].append(value)  # type: ignore[misc, index]
            size += len(value)
        if messages:
            last = messages[-1]
            topic.position = max(topic.position, last[2] + isinstance(last, Message))
            self._records += len(messages)
            self._bytes += size

    def _take_snapshots(self, topic: _Topic, messages: list[Message | End]) -> None:
        for message in messages:
            if isinstance(message, End):
                topic.position = max(topic.position, message.offset)
                continue
            topic.position = message.offset + 1
            self._records += 1
            assert message.key is not None, message
            if message.value is None:
                self._write_all()  # what it takes back may be among these, and its id used again by those that follow
                self._stretch.taken_back(message.key)
                self._write_all()
            else:
                self._take_snapshot(self._codec.decode_as(Snapshot, message.value))
                self._bytes += len(message.value)

    def _take_snapshot(self, snapshot: Snapshot) -> None:
        first = self._codec.decode_as(Event, snapshot.events[0]).data
        if isinstance(first, ev.TokenClaimed):
            self._stretch.logs[first.token.encode()] += snapshot.events
            self._stretch.copied_claim(first.token, Holder(first.run_id, first.hook_id))
        else:
            self._stretch.logs[snapshot.run_id.encode()] += snapshot.events
            self._stretch.copied(snapshot.run_id, snapshot.from_seq, snapshot.to_seq)

    def _write_all(self) -> None:
        for piece in self._stretch.pieces():
            self._store.write(piece, logged=self._logged)

    def _apply(self, topic: _Topic, pieces: Iterator[Changes]) -> None:
        changes = next(pieces, None)
        if changes is not None:
            self._store.write(changes, logged=self._logged)
            return
        self._store.write({topic.checkpoint: topic.position.to_bytes(8, "big")}, logged=self._logged)
        self._applying = None
        self.count += self._records
        self._records = self._bytes = 0
        self._tell()

    def _tell(self) -> None:
        now = time.monotonic()
        if now - self._told < TOLD_EVERY:
            return
        self._told = now
        left = sum(topic.left for topic in self._topics)
        done = self._all - left
        rate = done / (now - self._begun)
        log.info(
            "%s: restoring %s of %s events, %.0f %%, %s/s, %.0f s left",
            self._what,
            f"{done:,}",
            f"{self._all:,}",
            100 * done / self._all,
            f"{rate:,.0f}",
            left / rate,
        )
