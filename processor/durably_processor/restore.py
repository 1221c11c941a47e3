"""Bringing a store up to date from the events topic. Runs no user code."""

from __future__ import annotations

import logging
import time

from durably.broker.port import TP, Broker, End, Message
from durably_schemas import Catalogue, Codec

from durably_processor.rebuild import Stretch
from durably_processor.state.store import CHECKPOINT, Store

log = logging.getLogger("durably.processor")

POLLED = 2_000
"""Events that are taken from the reader at a time."""
AT_ONCE, AT_ONCE_BYTES = 50_000, 32 * 1024 * 1024
"""What is applied to the store in one piece: the more, the fewer runs are open at the end of a piece, and a run that
begins and ends within one costs least."""
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
        self._reader = None if self._position >= self._target else broker.reader({self._tp: self._position})

    def step(self, seconds: float) -> bool:
        """Restores for about this long; True when everything is there."""
        end = time.monotonic() + seconds
        while self._position < self._target:
            assert self._reader is not None
            left = end - time.monotonic()
            if left <= 0:
                return False
            self._take(self._reader.poll(left, POLLED))
            if self._events >= AT_ONCE or self._bytes >= AT_ONCE_BYTES:
                self._apply()
                self._tell()
        if self._reader is not None:
            self._apply()
            if not self._logged:
                self._store.flush()
            took = time.monotonic() - self._begun
            log.info("partition %s: %s events restored in %.2f s", self.number, f"{self.count:,}", took)
        self.close()
        return True

    def close(self) -> None:
        """Stops reading; what was applied is kept."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _take(self, messages: list[Message | End]) -> None:
        logs = self._stretch.logs
        size = 0
        for message in messages:
            if len(message) == 3:  # an End; quicker than to ask for its class
                self._position = max(self._position, message[2])
                self._events -= 1
                continue
            value = message[5]
            logs[message[4]].append(value)  # type: ignore[index,arg-type]  # events have both
            size += len(value)  # type: ignore[arg-type]
        if messages:
            last = messages[-1]
            self._position = max(self._position, last[2] + (len(last) != 3))
            self._events += len(messages)
            self._bytes += size

    def _apply(self) -> None:
        changes = self._stretch.changes()
        changes[CHECKPOINT] = self._position.to_bytes(8, "big")
        self._store.write(changes, logged=self._logged)
        self.count += self._events
        self._events = self._bytes = 0

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
