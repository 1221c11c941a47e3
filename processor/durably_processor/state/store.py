"""One partition's RocksDB: the logs of its runs, and what is derived from them.

    e | run | seq         an Event, as it is on the topic; or several that follow each other, under the seq of the last
    r | run               the run's Header; empty where recovery found the run's whole log, and left it to be derived
    o | run | id          an open item
    t | due | run | id    its timer
    b | run               the run is blocked
    m | run | hook | resume id   the hook has received the resume
    k | token             who holds the custom token, and which resumes came before
    z | run               which of the run's events are copied to ``snapshots``
    y | token             the holder whose claim is copied to ``snapshots``
    a | run               activations that were begun and have not ended (see `Store.begin_activation`)
    c                     the checkpoint: the next offset of ``events``
    d                     the next offset of ``snapshots``
    i                     the identity of ``events``

RocksDB is a cache of the topic. It is written only after Kafka's transaction has been committed, in one batch with
the checkpoint; whatever is lost of it is read again from the topic, and so is all of it where its files are damaged.
"""

from __future__ import annotations

import logging
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import NamedTuple, NoReturn, TypeVar

import msgspec
from durably.errors import ConfigurationError
from durably_schemas import Codec
from durably_schemas.codec import MARKER
from durably_schemas.records import Event
from rocksdict import AccessType, Options, Rdict, ReadOptions, WriteBatch, WriteOptions

from durably_processor.engine.state import Header, OpenItem, RunState, created

Changes = dict[bytes, bytes | None]
"""Keys to put, or with None to delete."""

log = logging.getLogger("durably.processor")

T = TypeVar("T")

CHECKPOINT = b"c"
SNAPSHOTS = b"d"
_TOPIC = b"i"
_IN_USE = re.compile(r"IO error: (While lock file|lock hold)")
_encode = msgspec.msgpack.Encoder().encode
_header = msgspec.msgpack.Decoder(Header).decode
_item: msgspec.msgpack.Decoder[OpenItem] = msgspec.msgpack.Decoder(OpenItem)
_several = msgspec.msgpack.Decoder(list[bytes]).decode
_codec = Codec()


class StoreError(Exception):
    """RocksDB cannot read or write: the disk is full, or fails. No fault of whatever asked for it."""


class StoreDamaged(StoreError):
    """What RocksDB has written is not what it reads. The folder at ``path`` can be deleted: it is a cache."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"{path} is damaged: {why}")
        self.path = path


class Holder(msgspec.Struct, frozen=True, array_like=True):
    """The hook that holds a custom token."""

    run_id: str
    hook_id: str


class Token(msgspec.Struct, frozen=True):
    """A custom token: who holds it, or held it last, and which resumes earlier holders have received, oldest first.

    ``at``: when it was claimed or released.
    """

    holder: Holder | None = None
    last: Holder | None = None
    resumes: dict[str, Holder] = {}
    at: int = 0


class Copied(msgspec.Struct, frozen=True, array_like=True):
    """A run's events up to ``to_seq`` are on ``snapshots`` too, in records that begin with these seqs."""

    to_seq: int
    begins: tuple[int, ...]


class Lived(NamedTuple):
    """When a run began, and ended if it has, in milliseconds since the epoch; and its latest seq."""

    run_id: str
    created_at: int
    ended_at: int | None
    seq: int


_token = msgspec.msgpack.Decoder(Token).decode
_copied = msgspec.msgpack.Decoder(Copied).decode
_holder = msgspec.msgpack.Decoder(Holder).decode


class Timer(NamedTuple):
    """The timer of an open item; ordered by its time."""

    due: int
    run_id: str
    correlation_id: str


def _prefixed(text: str) -> bytes:
    data = text.encode()
    return len(data).to_bytes(2, "big") + data


def event_key(run_id: str, seq: int) -> bytes:
    """Of one event."""
    return b"e" + _prefixed(run_id) + seq.to_bytes(8, "big")


def several(values: list[bytes]) -> bytes:
    """Events that follow each other, as they are stored under one key: that of the last."""
    return _encode(values) if len(values) > 1 else values[0]


def folded(values: Iterable[bytes]) -> RunState:
    """The state that a log from its first event on leads to."""
    state: RunState | None = None
    for value in values:
        event = _codec.decode_as(Event, value)
        state = state or created(event)
        state.apply(event)
    assert state is not None, "a log has a first event"
    state.touched.clear()
    return state


def timer_key(due: int, run: bytes, correlation_id: str) -> bytes:
    """Of one timer; ``run`` is prefixed."""
    return b"t" + due.to_bytes(8, "big") + run + correlation_id.encode()


def resume_key(run_id: str, hook_id: str, resume_id: str) -> bytes:
    """Of one resume that a hook has received."""
    return b"m" + _prefixed(run_id) + _prefixed(hook_id) + resume_id.encode()


def token_key(token: str) -> bytes:
    """Of one custom token."""
    return b"k" + token.encode()


def copied_key(run_id: str) -> bytes:
    """Of what is copied of a run."""
    return b"z" + _prefixed(run_id)


def copied_claim_key(token: str) -> bytes:
    """Of the holder of a custom token whose claim is copied."""
    return b"y" + token.encode()


def encode_copied(copied: Copied | Holder) -> bytes:
    """As it is stored."""
    return _encode(copied)


def encode_token(token: Token) -> bytes:
    """As it is stored."""
    return _encode(token)


def _timer_of(key: bytes) -> Timer:
    length = int.from_bytes(key[9:11], "big")
    return Timer(int.from_bytes(key[1:9], "big"), key[11 : 11 + length].decode(), key[11 + length :].decode())


class Stored:
    """What the store holds of a run's open items, so that a change writes only what differs.

    Args:
        run_id: the run.
        state: as the store has it; None where it has nothing.
    """

    __slots__ = ("_dues", "_event", "_header", "_item", "_run", "blocked")

    def __init__(self, run_id: str, state: RunState | None = None) -> None:
        self.blocked = state.header.blocked if state else False
        self._dues: dict[str, int | None] = {i: item.due for i, item in state.items.items()} if state else {}
        self._run = run = _prefixed(run_id)
        self._header, self._item, self._event = b"r" + run, b"o" + run, b"e" + run

    def event_key(self, seq: int) -> bytes:
        """Of one of its events."""
        return self._event + seq.to_bytes(8, "big")

    def changes(self, state: RunState, into: Changes, created: set[bytes]) -> list[Timer]:
        """Adds what has changed in ``state`` since the last call; returns the timers that are new.

        ``created`` takes the keys that no earlier call has given a value.
        """
        into[self._header] = _encode(state.header)
        timers: list[Timer] = []
        dues = self._dues
        for correlation_id in state.touched:
            item = state.items.get(correlation_id)
            known = correlation_id in dues
            before = dues.pop(correlation_id, None)
            if before is not None and (item is None or item.due != before):
                into[timer_key(before, self._run, correlation_id)] = None
            if item is not None:
                key = self._item + correlation_id.encode()
                into[key] = _encode(item)
                if not known:
                    created.add(key)
                due = dues[correlation_id] = item.due
                if due is not None and due != before:
                    timer = timer_key(due, self._run, correlation_id)
                    into[timer] = b""
                    created.add(timer)
                    timers.append(Timer(due, state.header.run_id, correlation_id))
            elif known:
                into[self._item + correlation_id.encode()] = None
        state.touched.clear()
        return timers


def header_key(run_id: str) -> bytes:
    """Of a run's header."""
    return b"r" + _prefixed(run_id)


def activations_key(run_id: str) -> bytes:
    """Of what is known of a run's activations that did not end: see `Store.begin_activation`."""
    return b"a" + _prefixed(run_id)


def blocked_key(run_id: str) -> bytes:
    """Of a blocked run."""
    return b"b" + _prefixed(run_id)


class Store:
    """An open partition. Reads may come from any thread; writes come from one at a time.

    Files that are found damaged here are deleted, and the store begins empty. What is found later is raised.

    Raises:
        ConfigurationError: another process has it open.
        StoreError, StoreDamaged: from any method.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._closed = False
        self._flushed = True  # nothing that was written is in memory alone
        self._unlogged = WriteOptions()
        self._unlogged.disable_wal = True  # type: ignore[method-assign, assignment]  # a property, whatever its stub says
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._db = self._open()
        except StoreDamaged as e:
            log.warning("%s; it is rebuilt", e)
            shutil.rmtree(path)
            self._db = self._open()

    def _open(self) -> Rdict:
        options = Options(raw_mode=True)
        options.create_if_missing(True)
        options.set_write_buffer_size(16 * 1024 * 1024)
        options.set_max_write_buffer_number(3)
        options.set_keep_log_file_num(2)
        try:
            return Rdict(str(self.path), options, access_type=AccessType.read_write())
        except Exception as e:
            if not _IN_USE.match(str(e)):
                self._fail(e)
            raise ConfigurationError(
                f"{self.path} is open in another process: give each processor a data directory of its own "
                "(DURABLY_DATA_DIR)"
            ) from e

    def _fail(self, e: Exception) -> NoReturn:
        """Raises one of RocksDB's errors as ours: it knows them by the first word of their text."""
        if str(e).startswith("Corruption"):
            raise StoreDamaged(self.path, str(e)) from e
        raise StoreError(f"{self.path}: {e}") from e

    def _do(self, act: Callable[..., T], *args: object) -> T:
        try:
            return act(*args)
        except Exception as e:
            self._fail(e)

    def write(self, changes: Mapping[bytes, bytes | None], *, logged: bool = True) -> None:
        """Writes all of it or nothing.

        ``logged=False``: without RocksDB's own log, for much that can be read again. A crash then takes back the last
        such writes together, and what is derived of them: so they are flushed before the next write that is logged.
        """
        batch = WriteBatch(raw_mode=True)
        put = batch.put
        for key, value in changes.items():
            if value is None:
                batch.delete(key)
            else:
                put(key, value)
        with self._lock:
            if self._closed:  # a commit thread that was given up comes back late
                return
            if logged and not self._flushed:
                self.flush()
            self._flushed = logged
            self._do(self._db.write, batch, None if logged else self._unlogged)

    def flush(self) -> None:
        """What was written is on disk when this returns."""
        self._do(self._db.flush)
        self._flushed = True

    @property
    def closed(self) -> bool:
        """It takes nothing more, and has nothing to tell."""
        return self._closed

    def close(self) -> None:
        """Closes the files; they are kept."""
        with self._lock:
            self._closed = True
            try:
                self._db.close()
            except Exception as e:  # what it could not flush is on the topic
                log.warning("%s was not closed cleanly: %s", self.path, e)

    def belongs_to(self, topic: str) -> bool:
        """Whether what it holds came from the topic with this identity; a new store belongs to whoever asks first."""
        if self._get(CHECKPOINT) is None:
            self._do(self._db.put, _TOPIC, topic.encode())
        return self._get(_TOPIC) == topic.encode()

    def clear(self) -> None:
        """Forgets everything: it will be read from the topic again."""
        batch = WriteBatch(raw_mode=True)
        batch.delete_range(b"", b"\xff")
        self._do(self._db.write, batch)

    # -- reading ---------------------------------------------------------------------------------------------------

    @property
    def checkpoint(self) -> int:
        """The next offset of ``events`` to read."""
        return self._offset(CHECKPOINT)

    @property
    def snapshots(self) -> int:
        """The next offset of ``snapshots`` to read."""
        return self._offset(SNAPSHOTS)

    def _offset(self, key: bytes) -> int:
        value = self._get(key)
        return int.from_bytes(value, "big") if value else 0

    def state(self, run_id: str) -> RunState | None:
        """A run's state; None where there is no such run."""
        run = _prefixed(run_id)
        value = self._get(b"r" + run)
        if value is None:
            return None
        prefix = b"o" + run
        if not value:
            return folded(self.events(run_id))
        items = {key[len(prefix) :].decode(): _item.decode(data) for key, data in self._scan(prefix)}
        return RunState(_header(value), items)

    def received(self, run_id: str, hook_id: str, resume_id: str) -> bool:
        """Whether the hook has received this resume."""
        return self._get(resume_key(run_id, hook_id, resume_id)) is not None

    def token(self, token: str) -> Token:
        """A custom token."""
        value = self._get(token_key(token))
        return Token() if value is None else _token(value)

    def event(self, run_id: str, seq: int) -> bytes | None:
        """One event, encoded."""
        return next(self.events(run_id, seq), None)

    def events(self, run_id: str, from_seq: int = 1) -> Iterator[bytes]:
        """A run's log in order, encoded."""
        for key, value in self._scan(b"e" + _prefixed(run_id), start=event_key(run_id, from_seq)):
            if value[:2] == MARKER:
                yield value
            else:  # a key names the last of its events: the first group may begin before from_seq
                values = _several(value)
                yield from values[max(0, len(values) - 1 - int.from_bytes(key[-8:], "big") + from_seq) :]

    def copied(self, run_id: str) -> Copied | None:
        """What of a run is on ``snapshots``; None: nothing."""
        value = self._get(copied_key(run_id))
        return None if value is None else _copied(value)

    def copied_claim(self, token: str) -> Holder | None:
        """The holder of a custom token whose claim is on ``snapshots``."""
        value = self._get(copied_claim_key(token))
        return None if value is None else _holder(value)

    def lives(self, after: str | None, limit: int) -> list[Lived]:
        """The next runs behind one, in an order of their own; fewer than ``limit``: there are no more."""
        start = b"r" if after is None else header_key(after) + b"\0"
        return [self._lived(key, value) for key, value in islice(self._scan(b"r", start), limit)]

    def _lived(self, key: bytes, value: bytes) -> Lived:
        if value:
            header = _header(value)
            return Lived(header.run_id, header.created_at, header.completed_at, header.seq)
        # It has ended, or its header would not be left to be derived: its last event says when.
        iterator = self._db.iter()
        iterator.seek_for_prev(b"e" + key[1:] + b"\xff" * 8)
        self._do(iterator.status)
        found = iterator.value()
        assert isinstance(found, bytes)  # raw mode
        last = _codec.decode_as(Event, found if found[:2] == MARKER else _several(found)[-1])
        return Lived(last.run_id, last.at, last.at, last.seq)

    def tokens(self, after: str | None, limit: int) -> list[tuple[str, Token]]:
        """The next custom tokens behind one; fewer than ``limit``: there are no more."""
        start = b"k" if after is None else token_key(after) + b"\0"
        return [(key[1:].decode(), _token(value)) for key, value in islice(self._scan(b"k", start), limit)]

    def keys_of(self, run_id: str) -> list[bytes]:
        """All keys of a run."""
        run = _prefixed(run_id)
        keys = [kind + run for kind in (b"r", b"b", b"a", b"z")]
        keys += [key for kind in (b"e", b"m") for key, _ in self._scan(kind + run)]
        for key, data in self._scan(b"o" + run):
            keys.append(key)
            due = _item.decode(data).due
            if due is not None:
                keys.append(timer_key(due, run, key[1 + len(run) :].decode()))
        return keys

    def timers(self, since: int, until: int) -> list[Timer]:
        """All timers that are due from ``since`` on and before ``until``, in order."""
        start, end = b"t" + since.to_bytes(8, "big"), b"t" + until.to_bytes(8, "big")
        return [_timer_of(key) for key, _ in self._scan(b"t", start, end)]

    def blocked(self) -> list[str]:
        """The runs that wait for other code."""
        return [key[3:].decode() for key, _ in self._scan(b"b")]

    def _scan(
        self, prefix: bytes, start: bytes | None = None, end: bytes | None = None
    ) -> Iterable[tuple[bytes, bytes]]:
        options = ReadOptions()
        if prefix or end:
            options.set_iterate_upper_bound(end or _after(prefix))
        last = begin = start or prefix
        for key, value in self._do(lambda: self._db.items(from_key=begin, read_opt=options)):
            assert isinstance(key, bytes)  # raw mode
            yield key, value
            last = key
        # An iterator ends in silence where it cannot read on: whoever asks for what comes next is told.
        beyond = self._db.iter(options)
        beyond.seek(last + b"\0")
        self._do(beyond.status)

    def _get(self, key: bytes) -> bytes | None:
        value: bytes | None = self._do(self._db.get, key)
        return value

    # -- runs that kill their processor ----------------------------------------------------------------------------

    def begin_activation(self, run_id: str, seq: int) -> int:
        """Notes, before it, that an activation of a log with ``seq`` events begins; returns how many never ended.

        Written around activations that follow a crash, so that the owner after next does not die of the same run.
        """
        at, unfinished = self._unfinished(run_id)
        self._note_unfinished(run_id, max(at, seq), unfinished + 1)
        return unfinished

    def end_activation(self, run_id: str, seq: int) -> None:
        """It has ended, however it did, and the log has ``seq`` events: what began before that is over as well.

        Those that did not end there or further on still count: what led to them was perhaps not committed, and is done
        again; and what did not get on with the log, as a worker's question about a step, has not come past them.
        """
        at, unfinished = self._unfinished(run_id)
        self._note_unfinished(run_id, at, unfinished - 1 if at >= seq else 0)

    def _unfinished(self, run_id: str) -> tuple[int, int]:
        """The furthest point in its log where an activation did not end, and how many did not."""
        value = self._get(activations_key(run_id))
        return (int.from_bytes(value[:8], "big"), int.from_bytes(value[8:], "big")) if value else (0, 0)

    def _note_unfinished(self, run_id: str, seq: int, times: int) -> None:
        key = activations_key(run_id)
        if times:
            self._do(self._db.put, key, seq.to_bytes(8, "big") + min(times, 0xFFFF).to_bytes(2, "big"))
        else:
            self._do(self._db.delete, key)


def _after(prefix: bytes) -> bytes:
    """The first key behind all that begin with this prefix."""
    return prefix[:-1] + bytes([prefix[-1] + 1]) if prefix[-1] < 255 else _after(prefix[:-1])
