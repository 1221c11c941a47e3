"""Positions in partitions, and the wait for what comes next."""

from __future__ import annotations

import threading
from time import monotonic
from typing import TYPE_CHECKING

from durably.broker.port import TP, End, Message
from durably.errors import BrokerError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from durably.broker.embedded_log import Log, Partition


class Cursor:
    """How far one reader has come in one partition.

    ``told`` is true from an `End` until the next record, so that each exhaustion is told once.
    """

    __slots__ = ("partition", "paused", "position", "reading", "told")

    def __init__(self, reading: Reading, partition: Partition, position: int, *, paused: bool) -> None:
        self.reading = reading
        self.partition = partition
        self.position = position
        self.paused = paused
        self.told = False


class Reading:
    """A set of cursors that are read together by one thread.

    Every field is guarded by the log's lock. ``ready`` holds the cursors that may have something to deliver, in the
    order of their turns, so that a poll costs nothing for partitions where nothing happens. ``waiting`` is true while
    the thread sleeps on the gate; whoever sets it to false has released the gate, exactly once.
    """

    def __init__(self, log: Log) -> None:
        self._log = log
        self.cursors: dict[TP, Cursor] = {}
        self.ready: dict[Cursor, None] = {}
        self.waiting = False
        self._gate = threading.Lock()
        self._gate.acquire()
        self._poked = False

    def add(self, tp: TP, position: int, *, paused: bool = False) -> None:
        """Reads this partition too, or from elsewhere."""
        with self._log.lock:
            cursor = self.cursors.get(tp)
            if cursor is None:
                partition = self._log.partition(tp)
                cursor = self.cursors[tp] = Cursor(self, partition, position, paused=paused)
                partition.cursors.append(cursor)
            cursor.position = max(position, 0)
            cursor.paused = paused
            cursor.told = False
            if not paused:
                self.ready[cursor] = None

    def remove(self, tps: Iterable[TP]) -> None:
        """Reads these no more."""
        with self._log.lock:
            for tp in tps:
                if cursor := self.cursors.pop(tp, None):
                    cursor.partition.cursors.remove(cursor)
                    self.ready.pop(cursor, None)

    def pause(self, tps: Iterable[TP], *, paused: bool) -> None:
        """Begins or ends a pause; a partition that is not read is passed over."""
        with self._log.lock:
            for tp in tps:
                if cursor := self.cursors.get(tp):
                    cursor.paused = paused
                    if not paused:
                        self.ready[cursor] = None

    def arrived(self, cursor: Cursor) -> None:
        """The cursor's partition has grown. The caller holds the lock."""
        if not cursor.paused:
            self.ready[cursor] = None
            if self.waiting:
                self._open()

    def poke(self) -> None:
        """Ends the wait, or the next one, although no record came."""
        with self._log.lock:
            self._poked = True
            if self.waiting:
                self._open()

    def _open(self) -> None:
        self.waiting = False
        self._gate.release()

    def take(self, limit: int) -> list[Message | End]:
        """What is there, up to ``limit`` records, without waiting."""
        out: list[Message | End] = []
        with self._log.lock:
            self._log.write()
            for cursor in list(self.ready):
                room = limit - len(out)
                if room <= 0:
                    break
                del self.ready[cursor]
                if cursor.paused:
                    continue
                partition = cursor.partition
                records, position = self._log.read(partition, cursor.position, room)
                if records:
                    out += records
                    cursor.position = position
                    cursor.told = False
                if position < partition.end:
                    self.ready[cursor] = None
                elif not cursor.told:
                    cursor.told = True
                    out.append(End(partition.topic, partition.number, partition.end))
        return out

    def wait(self, deadline: float) -> bool:
        """Waits until there may be something to take; false when the deadline (monotonic) has passed."""
        with self._log.lock:
            if self._log.closed:
                raise BrokerError("the embedded broker is closed")
            if self.ready or self._poked:
                self._poked = False
                return True
            timeout = deadline - monotonic()
            if timeout <= 0:
                return False
            self.waiting = True
        opened = False
        try:
            opened = self._gate.acquire(timeout=min(timeout, threading.TIMEOUT_MAX))
        finally:
            if not opened:
                with self._log.lock:
                    if self.waiting:
                        self.waiting = False
                    else:
                        opened = self._gate.acquire()
        return opened

    def poll(self, timeout: float, limit: int) -> list[Message | End]:
        """As `Reader.poll`; also empty when poked."""
        out = self.take(limit)
        if out or timeout <= 0 or not self.wait(monotonic() + timeout):
            return out
        return self.take(limit)

    def close(self) -> None:
        """Reads nothing any more."""
        self.remove(list(self.cursors))
