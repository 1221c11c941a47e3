"""The embedded broker's log: topics, partitions and group offsets in one RocksDB.

Layout of the keys (numbers are big-endian, names are preceded by their length in two bytes, so scans are in order):

    t name                          a topic: its `TopicState`
    r topic partition(4) offset(8)  a batch of records: a list of `Message`; ``offset`` is that of its last record
    g group topic partition(4)      a group's `Committed`
    c topic partition(4)            `Clean`: how far a compacted partition is clean

A batch is found by seeking to the first offset that is wanted, because the key names the last one.
"""

from __future__ import annotations

import struct
import threading
import uuid
from bisect import bisect_left
from time import time_ns
from typing import TYPE_CHECKING, NamedTuple

import msgspec
from rocksdict import DBCompressionType, Options, Rdict, RdictIter, WriteBatch

from durably.broker.port import TP, Committed, Message, TopicState
from durably.errors import BrokerError, ConfigurationError, UnknownTopic

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from durably_schemas.catalogue import Topic

    from durably.broker.embedded_cursor import Cursor
    from durably.broker.port import Headers

STAGED = 64  # records that may lie in memory before a send writes them itself
BATCH = 64  # records under one key
TAIL_RECORDS = 2_000  # what a partition keeps in memory for its readers, at most
TAIL_BYTES = 2_000_000
BUFFER_BYTES = 32 << 20

_number = struct.Struct(">I").pack
_offset = struct.Struct(">Q")
_encode = msgspec.msgpack.Encoder().encode
_new = tuple.__new__  # half the time of Message(), in the hottest place
_batch = msgspec.msgpack.Decoder(list[Message])


IDENTITY = "identity"  # a file on the path


class PathLocked(ConfigurationError):
    """Another process has this path open."""


class Clean(NamedTuple):
    """Below ``end`` a compacted partition holds each key once; those are ``records`` records."""

    end: int
    records: int


def identity_of(folder: Path, topic: str) -> str:
    """Of a topic on this path: the path's own, given to it when it was first opened."""
    return f"{(folder / IDENTITY).read_text(errors='backslashreplace')}/{topic}"


def _name(text: str) -> bytes:
    data = text.encode()
    return len(data).to_bytes(2, "big") + data


def _names(key: bytes, count: int) -> tuple[list[str], bytes]:
    """The names after a key's first byte, and what follows them."""
    out, at = [], 1
    for _ in range(count):
        end = at + 2 + int.from_bytes(key[at : at + 2], "big")
        out.append(key[at + 2 : end].decode())
        at = end
    return out, key[at:]


class Partition:
    """One partition.

    Records ``[start, end)`` are written and readable; ``[end, next)`` are staged. ``tail`` holds ``[tail_start, end)``
    without a gap: only compaction makes gaps, and it runs before the first record enters the tail.
    """

    __slots__ = (
        "cursors", "end", "next", "number", "prefix", "staged", "start", "tail", "tail_bytes", "tail_start", "topic",
    )  # fmt: skip

    def __init__(self, topic: str, number: int) -> None:
        self.topic = topic
        self.number = number
        self.prefix = b"r" + _name(topic) + _number(number)
        self.start = self.end = self.next = self.tail_start = 0
        self.staged: list[Message] = []
        self.tail: list[Message] = []
        self.tail_bytes = 0
        self.cursors: list[Cursor] = []

    def grow(self, size: int) -> None:
        """What was staged has been written, as ``size`` bytes."""
        self.tail += self.staged
        self.tail_bytes += size
        self.staged = []
        self.end = self.next
        while len(self.tail) > TAIL_RECORDS or (self.tail_bytes > TAIL_BYTES and self.tail):
            half = (len(self.tail) + 1) // 2
            del self.tail[:half]
            self.tail_start += half
            self.tail_bytes = sum([len(m.value or b"") for m in self.tail])
        for cursor in self.cursors:
            cursor.reading.arrived(cursor)

    def awaited(self) -> bool:
        """Somebody sleeps until a record comes."""
        for cursor in self.cursors:  # noqa: SIM110 - a generator would cost more than all else in a send
            if cursor.reading.waiting and not cursor.paused:
                return True
        return False


class Log:
    """The log at a path.

    Everything is guarded by ``lock``. Records are staged and then written as one RocksDB batch, so that what is staged
    under one hold of the lock together is in the log together or not at all. A batch goes through RocksDB's
    write-ahead log without fsync: it survives the death of the process at any moment, not the loss of power.

    Attributes:
        path: the folder.
        lock: guards all of it, and the groups and cursors that hang on it.
        closed: true from `close` on.
        topics: what exists.
        partitions: the partitions of each topic.
        holders: how many have called `hold` and not released it.
        on_idle: called without the lock when the last holder lets go.

    Raises:
        PathLocked: another process has the path open.
        ConfigurationError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = threading.RLock()
        self.closed = False
        self._db = self._open()
        self._failure: BrokerError | None = None
        self._clock = 0
        self._dirty: list[Partition] = []
        self._staged = 0
        self._staged_offsets: dict[bytes, Committed] = {}
        self._offsets: dict[str, dict[TP, Committed]] = {}
        self.topics: dict[str, TopicState] = {}
        self.partitions: dict[str, list[Partition]] = {}
        self.holders = 0
        self.on_idle: Callable[[], None] = self.close
        try:
            self._load()
        except Exception as error:  # RocksDB's, or of what was found
            self._db.close()
            raise ConfigurationError(f"embedded:{path} cannot be read: {error}") from error
        if not (path / IDENTITY).exists():
            new = path / f"{IDENTITY}.new"
            new.write_text(uuid.uuid4().hex)
            new.replace(path / IDENTITY)  # whole, or not there

    def _open(self) -> Rdict:
        options = Options(raw_mode=True)
        options.create_if_missing(True)
        options.set_compression_type(DBCompressionType.lz4())
        options.set_write_buffer_size(BUFFER_BYTES)
        options.set_keep_log_file_num(2)
        options.set_max_open_files(256)
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            return Rdict(str(self.path / "log"), options)
        except Exception as error:
            if "/LOCK:" in str(error):
                raise PathLocked(
                    f"embedded:{self.path} is open in another process: stop that process, or use another path"
                ) from None
            raise ConfigurationError(f"embedded:{self.path} cannot be opened: {error}") from error

    def _load(self) -> None:
        for key, value in self._scan(b"t"):
            (name,), _ = _names(key, 1)
            self._add(name, msgspec.msgpack.decode(value, type=TopicState))
        for key, value in self._scan(b"g"):
            (group, topic), rest = _names(key, 2)
            committed = msgspec.msgpack.decode(value, type=Committed)
            self._offsets.setdefault(group, {})[TP(topic, int.from_bytes(rest, "big"))] = committed
        for name, state in self.topics.items():
            for partition in self.partitions[name]:
                if "compact" in state.config.get("cleanup.policy", "delete"):
                    self._compact(partition)
                elif (retention := int(state.config.get("retention.ms", -1))) >= 0:
                    self._expire(partition, time_ns() // 1_000_000 - retention)

    def _add(self, name: str, state: TopicState) -> None:
        self.topics[name] = state
        self.partitions[name] = [Partition(name, number) for number in range(state.partitions)]
        for partition in self.partitions[name]:
            first = next(self._batches(partition), None)
            if first is None:
                continue
            partition.start = first[0].offset
            iterator = self._db.iter()
            iterator.seek_for_prev(partition.prefix + b"\xff" * 8)
            self._check_end(iterator)
            last = _batch.decode(iterator.value())[-1]
            partition.end = partition.next = partition.tail_start = last.offset + 1
            self._clock = max(self._clock, last.timestamp)

    def _scan(self, prefix: bytes, start: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        iterator = self._db.iter()
        iterator.seek(prefix + start)
        while iterator.valid():
            key = iterator.key()
            if not key.startswith(prefix):
                return
            yield key, iterator.value()
            iterator.next()
        self._check_end(iterator)

    def _check_end(self, iterator: RdictIter) -> None:
        """Raises `BrokerError` where an iterator has stopped at a damaged block, and not for want of more."""
        try:
            iterator.status()
        except Exception as error:
            raise BrokerError(f"embedded:{self.path} is damaged: {error}") from error

    def _batches(self, partition: Partition, offset: int = 0) -> Iterator[list[Message]]:
        for _, value in self._scan(partition.prefix, _offset.pack(offset)):
            yield _batch.decode(value)

    def _expire(self, partition: Partition, before: int) -> None:
        """Drops the batches that are older."""
        self._drop(partition, lambda last: last.timestamp < before)

    def truncate(self, partition: Partition, offset: int) -> None:
        """Drops the batches that end below an offset. The caller holds the lock."""
        self._drop(partition, lambda last: last.offset < offset)
        gone = bisect_left(partition.tail, partition.start, key=lambda message: message.offset)
        del partition.tail[:gone]
        partition.tail_start += gone

    def _drop(self, partition: Partition, old: Callable[[Message], bool]) -> None:
        """Drops the first batches whose last record is ``old``, save the last one of all, which remembers the end."""
        for batch in self._batches(partition):
            last = batch[-1]
            if not old(last) or last.offset + 1 == partition.end:
                partition.start = batch[0].offset
                return
            self._db.delete(partition.prefix + _offset.pack(last.offset))

    def _compact(self, partition: Partition) -> None:
        """Drops the records that have a later one with their key, once these may be half of all."""
        marker = b"c" + partition.prefix[1:]
        found = self._db.get(marker)
        clean = msgspec.msgpack.decode(found, type=Clean) if found else Clean(0, 0)
        if partition.end - clean.end <= clean.records:
            return
        latest = {m.key: m.offset for batch in self._batches(partition) for m in batch}
        partition.start = min(latest.values())
        for batch in self._batches(partition):
            kept = [m for m in batch if latest[m.key] == m.offset]
            if len(kept) == len(batch):
                continue
            change = WriteBatch(raw_mode=True)
            change.delete(partition.prefix + _offset.pack(batch[-1].offset))
            if kept:
                change.put(partition.prefix + _offset.pack(kept[-1].offset), _encode(kept))
            self._db.write(change)
        self._db.put(marker, _encode(Clean(partition.end, len(latest))))

    def create(self, topics: Iterable[Topic]) -> None:
        """Creates the topics that are missing."""
        with self.lock:
            self.check()
            for topic in topics:
                if topic.name not in self.topics:
                    state = TopicState(topic.partitions, dict(topic.config))
                    self._db.put(b"t" + _name(topic.name), _encode(state))
                    self._add(topic.name, state)

    def check(self) -> None:
        """Raises `BrokerError` when the log is closed or has failed."""
        if self.closed:
            raise BrokerError(f"embedded:{self.path} is closed")
        if self._failure:
            raise self._failure

    def partition(self, tp: TP) -> Partition:
        """Raises `UnknownTopic`."""
        found = self.partitions.get(tp.topic)
        if found is None:
            raise UnknownTopic(f"embedded:{self.path} has no topic {tp.topic!r}: create it first")
        if not 0 <= tp.partition < len(found):
            raise UnknownTopic(f"topic {tp.topic!r} has {len(found)} partitions, {tp.partition} is none of them")
        return found[tp.partition]

    def now(self) -> int:
        """The time of the records staged next: the clock's, but never earlier than an earlier record's."""
        self._clock = max(self._clock, time_ns() // 1_000_000)
        return self._clock

    def stage(
        self, partition: Partition, key: bytes | None, value: bytes | None, headers: Headers, timestamp: int
    ) -> int:
        """Gives a record its offset; `write` makes it durable and readable. The caller holds the lock."""
        offset = partition.next
        if not partition.staged:
            self._dirty.append(partition)
        fields = (partition.topic, partition.number, offset, timestamp, key, value, list(headers) if headers else [])
        partition.staged.append(_new(Message, fields))
        partition.next = offset + 1
        self._staged += 1
        return offset

    def due(self, partition: Partition) -> bool:
        """Staged records should be written now: somebody waits for them, or there are many."""
        return self._staged >= STAGED or partition.awaited()

    def stage_offsets(self, group: str, offsets: Mapping[TP, Committed]) -> None:
        """Stages a group's offsets. The caller holds the lock."""
        known = self._offsets.setdefault(group, {})
        for tp, committed in offsets.items():
            known[tp] = committed
            self._staged_offsets[b"g" + _name(group) + _name(tp.topic) + _number(tp.partition)] = committed

    def committed(self, group: str, tp: TP) -> Committed:
        """A group's offset."""
        return self._offsets.get(group, {}).get(tp) or Committed(-1, "")

    def write(self) -> None:
        """Writes all that is staged, as one.

        A failure is final: offsets have been given out that will never be, so the log refuses everything from then on.
        """
        if not self._dirty and not self._staged_offsets:
            return
        self.check()
        changes: list[tuple[bytes, bytes]] = []
        sizes = []
        for partition in self._dirty:
            staged, size = partition.staged, 0
            for at in range(0, len(staged), BATCH):
                chunk = staged[at : at + BATCH] if len(staged) > BATCH else staged
                data = _encode(chunk)
                size += len(data)
                changes.append((partition.prefix + _offset.pack(chunk[-1].offset), data))
            sizes.append(size)
        for key, committed in self._staged_offsets.items():
            changes.append((key, _encode(committed)))
        try:
            if len(changes) == 1:
                self._db.put(*changes[0])
            else:
                batch = WriteBatch(raw_mode=True)
                for key, data in changes:
                    batch.put(key, data)
                self._db.write(batch)
        except Exception as error:
            self._failure = BrokerError(f"embedded:{self.path} cannot be written, open it anew: {error}")
            raise self._failure from error
        dirty, self._dirty = self._dirty, []
        self._staged = 0
        self._staged_offsets.clear()
        for partition, size in zip(dirty, sizes, strict=True):
            partition.grow(size)

    def read(self, partition: Partition, position: int, limit: int) -> tuple[list[Message], int]:
        """Records from ``position`` on, and the position after them. The caller holds the lock."""
        if position < partition.tail_start:
            self.check()
            records: list[Message] = []
            for batch in self._batches(partition, position):
                records += (
                    batch if records or batch[0].offset >= position else [m for m in batch if m.offset >= position]
                )
                if len(records) >= limit:
                    break
            if records:
                del records[limit:]
                return records, records[-1].offset + 1
            position = partition.tail_start
        at = position - partition.tail_start
        records = partition.tail[at : at + limit]
        return records, position + len(records)

    def offset_at(self, partition: Partition, timestamp: int) -> int:
        """The first offset that is not older; timestamps never fall along a partition."""
        low, high = partition.start, partition.end
        while low < high:
            middle = (low + high) // 2
            found, _ = self.read(partition, middle, 1)
            if not found or found[0].timestamp >= timestamp:
                high = middle
            else:
                low = found[0].offset + 1
        found, _ = self.read(partition, low, 1)
        return found[0].offset if found else partition.end

    def hold(self) -> Callable[[], None]:
        """Keeps the log open until the returned function is called; when nobody holds it, ``on_idle`` runs."""
        with self.lock:
            self.check()
            self.holders += 1
        held = True

        def release() -> None:
            nonlocal held
            with self.lock:
                idle = held and self.holders == 1
                self.holders -= held
                held = False
            if idle:
                self.on_idle()

        return release

    def close(self) -> None:
        """Writes what is staged and lets go of the path."""
        with self.lock:
            if self.closed:
                return
            try:
                if self._failure is None:
                    self.write()
            finally:
                self.closed = True
                self._db.close()
