"""Bringing a store up to date from the events topic. Runs no user code."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

from durably.broker.port import TP, Broker, End, Message
from durably_schemas import Catalogue, Codec

from durably_processor.rebuild import Stretch
from durably_processor.state.store import CHECKPOINT, Changes, Store

log = logging.getLogger("durably.processor")

POLLED = 2_000
"""Events that are taken from the reader at a time."""
AT_ONCE, AT_ONCE_BYTES = 200_000, 32 * 1024 * 1024
"""What is applied to the store together: the more, the fewer runs are open at its end, and a run that begins and ends
within it costs least."""
UNLOGGED = 20_000
"""Events from which on the store is written without RocksDB's own log, and flushed at the end."""
TOLD_EVERY = 5.0
"""Seconds between two lines that say how far it is."""


class Restore:
    """Reads one partition of ``events`` from the store's checkpoint to its high watermark.

    The high watermark, not the last stable offset: that may lie below events that are already committed.

    Attributes:
        count: how many events were read.
    """

    def __init__(self, number: int, store: Store, broker: Broker, catalogue: Catalogue, codec: Codec) -> None:
        self.number = number
        self.count = 0
        self._store = store
        self._tp = TP(catalogue.events, number)
        self._target = broker.end_offsets([self._tp])[self._tp]
        topic = broker.identity(catalogue.events)
        if store.checkpoint > self._target or not store.belongs_to(topic):
            log.warning("partition %s: the store is not of this topic, which was made anew: it is rebuilt", number)
            store.clear()
            store.belongs_to(topic)
        self._position = max(store.checkpoint, broker.start_offsets([self._tp])[self._tp])
        self._left = max(0, self._target - self._position)
        self._logged = self._left < UNLOGGED
        self._begun = self._told = time.monotonic()
        self._stretch = Stretch(store, codec, cut=False)
        self._events = self._bytes = 0  # that wait to be applied
        self._applying: Iterator[Changes] | None = None
        self._reader = None if self._position >= self._target else broker.reader({self._tp: self._position})

    def step(self, seconds: float) -> bool:
        """Restores for about this long; True when everything is there."""
        if self._reader is None:
            return True
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if self._applying is not None:
                self._apply(self._applying)
            elif self._position >= self._target and not self._events:
                self._end()
                return True
            elif self._position < self._target and self._events < AT_ONCE and self._bytes < AT_ONCE_BYTES:
                self._take(self._reader.poll(left, POLLED))
            else:
                self._applying = self._stretch.pieces()
        return False

    def _end(self) -> None:
        changes: Changes = {CHECKPOINT: self._position.to_bytes(8, "big")}
        self._store.write(changes, logged=self._logged)
        if not self._logged:
            self._store.flush()
        took = time.monotonic() - self._begun
        log.info("partition %s: %s events restored in %.2f s", self.number, f"{self.count:,}", took)
        self.close()

    def close(self) -> None:
        """Stops reading; what was applied is kept."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _take(self, messages: list[Message | End]) -> None:
        logs = self._stretch.logs
        size = 0
        for message in messages:
            try:
                value: bytes = message[5]  # type: ignore[misc, assignment]  # an End has none; an event always has
            except IndexError:
                self._position = max(self._position, message[2])
                self._events -= 1
                continue
            logs[message[4]].append(value)  # type: ignore[misc, index]
            size += len(value)
        if messages:
            last = messages[-1]
            self._position = max(self._position, last[2] + (len(last) != 3))
            self._events += len(messages)
            self._bytes += size

    def _apply(self, pieces: Iterator[Changes]) -> None:
        changes = next(pieces, None)
        if changes is not None:
            self._store.write(changes, logged=self._logged)
            return
        self._store.write({CHECKPOINT: self._position.to_bytes(8, "big")}, logged=self._logged)
        self._applying = None
        self.count += self._events
        self._events = self._bytes = 0
        self._tell()

    def _tell(self) -> None:
        now = time.monotonic()
        if now - self._told < TOLD_EVERY:
            return
        self._told = now
        done = self._left - (self._target - self._position)
        rate = done / (now - self._begun)
        log.info(
            "partition %s: restoring %s of %s events, %.0f %%, %s/s, %.0f s left",
            self.number,
            f"{done:,}",
            f"{self._left:,}",
            100 * done / self._left,
            f"{rate:,.0f}",
            (self._left - done) / rate,
        )
