"""What a stretch of one partition's log makes of its store. Runs no user code, and does no I/O but through the store.

Recovery is bound by what it does for each event, so most are never decoded: events are grouped by run, a look at a few
bytes says which follow which and of what type they are, and then

    a run that begins and ends within the stretch    its log is stored; whoever asks derives its state (`Store.state`)
    a step or wait that opens and closes within it   leaves no trace in the state: its events are stored unread
    anything else                                    is decoded, and applied by `RunState.apply`, as when it happened

What does not look as this version writes it takes the last way, event by event.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from durably_schemas import Codec
from durably_schemas import events as ev
from durably_schemas.codec import MARKER, fingerprint_of, schema_of
from durably_schemas.compiled import read_long, varint
from durably_schemas.records import TERMINAL, Event

from durably_processor.engine.state import RunState, created
from durably_processor.state.store import (
    Changes,
    Copied,
    Holder,
    Store,
    Stored,
    Token,
    blocked_key,
    copied_claim_key,
    copied_key,
    encode_copied,
    encode_token,
    event_key,
    header_key,
    resume_key,
    several,
    token_key,
)
from durably_processor.tokens import applied

LARGEST = 200
"""Events of an ended run whose state is left to be derived: whoever asks for it does not wait long."""
A_GROUP, GROUP_BYTES = 64, 64 * 1024
"""What is stored under one key at most, but for single events: a page of a log should not cost much more than it holds."""

A_PIECE = 10_000
"""Events that are written to the store together; what else the thread has to do waits for no more."""
MOST_KNOWN = 10_000
"""Open runs whose states stay in memory until their next events come, beyond those of a piece."""

_PREFIX = MARKER + fingerprint_of(schema_of("Event"))
_SEQS = [varint(n) for n in range(8_192)]
_SYMBOLS = next(f["type"]["symbols"] for f in schema_of("Event")["fields"] if f["name"] == "type")


def _codes(*types: str) -> frozenset[int]:
    """How event types begin on the wire: by an index, zig-zag, in one byte."""
    return frozenset(2 * _SYMBOLS.index(name) for name in types)


_ENDS = _codes(*(f"run_{status}" for status in TERMINAL))
(_RECEIVED,) = _codes("hook_received")
(_COMPLETED,) = _codes("step_completed")
_CLOSING = _codes("step_completed", "step_failed", "step_cancelled", "wait_completed")
_OPEN = _codes("step_created", "step_started", "step_scheduled", "step_retrying", "wait_created") | _CLOSING
_CREATING = _codes("step_created", "wait_created")


class Stretch:
    """Events in the order of the log, until `pieces` are asked for; then the next ones.

    Args:
        store: what it is applied to. Only read from: the caller writes the changes before it asks for more.
        cut: the log has lost its beginning, and with it that of runs which were purged: what is left of those is passed
            over.
    """

    def __init__(self, store: Store, codec: Codec, *, cut: bool) -> None:
        self._store = store
        self._codec = codec
        self._cut = cut
        self._logs: defaultdict[bytes, list[bytes]] = defaultdict(list)
        self._known: dict[bytes, tuple[RunState, Stored]] = {}  # the open runs of these events, and of those before
        self._touched: dict[bytes, None] = {}
        self._tokens: dict[str, Token] = {}
        self._copied: dict[str, Copied] = {}
        self._changes: Changes = {}

    @property
    def logs(self) -> defaultdict[bytes, list[bytes]]:
        """Encoded events by the key of their records: whoever reads the topic appends to these."""
        return self._logs

    def pieces(self) -> Iterator[Changes]:
        """What the events appended since the last call change in the store, to be written one after the other.

        When only some have been written, the same events may be appended again.

        Raises:
            LookupError: an event is missing before one of these.
        """
        logs, self._logs = self._logs, defaultdict(list)
        earlier, self._known = self._known, {}
        count = 0
        for key, values in logs.items():
            if (known := earlier.get(key)) is not None:
                self._known[key] = known
            self._take(key, values)
            count += len(values)
            if count >= A_PIECE:
                yield self._piece()
                count = 0
        last = self._piece()
        for name, token in self._tokens.items():
            last[token_key(name)] = encode_token(token)
        self._tokens.clear()
        for run_id, copied in self._copied.items():
            last[copied_key(run_id)] = encode_copied(copied)
        self._copied.clear()
        yield last

    def _piece(self) -> Changes:
        changes, self._changes = self._changes, {}
        for key in self._touched:
            state, stored = self._known[key]
            stored.changes(state, changes, set())
            if state.header.blocked:
                changes[blocked_key(state.header.run_id)] = b""
            elif stored.blocked:
                changes[blocked_key(state.header.run_id)] = None
            stored.blocked = state.header.blocked
            if state.terminal:
                del self._known[key]
        self._touched.clear()
        if len(self._known) > MOST_KNOWN:
            self._known.clear()  # the store has them by the time they are asked for
        return changes

    def copied(self, run_id: str, from_seq: int, to_seq: int) -> None:
        """The events appended last came from ``snapshots``."""
        known = self._copied.get(run_id) or self._store.copied(run_id)
        begins = known.begins if known is not None else ()
        if from_seq not in begins:
            self._copied[run_id] = Copied(to_seq, (*begins, from_seq))

    def copied_claim(self, token: str, holder: Holder) -> None:
        """As `copied`, of the claim of a token."""
        self._changes[copied_claim_key(token)] = encode_copied(holder)

    def taken_back(self, key: bytes) -> None:
        """The record of ``snapshots`` with this key has been taken back. All pieces have been written."""
        log_id, _, from_seq = key.decode().rpartition("|")
        if "|" in log_id:
            token, run_id, hook_id = log_id.removeprefix("token|").rsplit("|", 2)
            holder = Holder(run_id, hook_id)
            if self._store.copied_claim(token) == holder:
                self._changes[copied_claim_key(token)] = None
            if self._store.token(token).holder == holder:
                self._changes[token_key(token)] = None  # whether it was released since, its log will say
        elif (copied := self._store.copied(log_id)) is not None and int(from_seq) in copied.begins:
            self.forget(log_id)

    def forget(self, run_id: str) -> None:
        """Removes a run."""
        run = header_key(run_id)[1:]
        for key in [key for key in self._changes if key[:1] in b"eorbmaz" and key[1 : 1 + len(run)] == run]:
            del self._changes[key]
        self._changes.update(dict.fromkeys(self._store.keys_of(run_id)))
        self._copied.pop(run_id, None)
        self._known.pop(run_id.encode(), None)
        self._touched.pop(run_id.encode(), None)

    # -- by the log ------------------------------------------------------------------------------------------------

    def _take(self, key: bytes, values: list[bytes]) -> None:
        prefix = _PREFIX + varint(len(key)) + key
        if not values[0].startswith(prefix):
            self._one_by_one(values)  # of a token, or written by another version
            return
        first, at = read_long(values[0], len(prefix))
        types = _types(values, prefix, first, at)
        if types is None:
            self._one_by_one(values)
            return
        run_id = key.decode()
        known = self._run(run_id)
        decoded: dict[int, Event] = {}  # by their place among the values
        if known is None and first == 1:
            if types[-1] in _ENDS and len(values) <= LARGEST:
                self._store_log(run_id, first, values)
                self._changes[header_key(run_id)] = b""
                if _RECEIVED in types:
                    self._note_resumes(types, values)
                return
            decoded[0] = self._decoded(values[0])
            known = self._begin(run_id, decoded[0])
        if known is None or first != known[0].header.seq + 1:
            self._one_by_one(values)
            return
        end = len(values) - 1
        last = decoded[end] = decoded.get(end) or self._decoded(values[end])
        if last.at < known[0].header.created_at:
            return  # of an earlier run with this id, which was purged
        self._store_log(run_id, first, values)
        # Where seqs become a byte longer, types stand at several places: rare enough to decode them all.
        same = len(varint(first)) == len(varint(last.seq))
        passed = _passed(types, values, at) if same else [None] * len(values)
        state = known[0]
        for place, (kind, value, skip) in enumerate(zip(types, values, passed, strict=True)):
            if skip is None:  # it leaves a trace: open at the end, or not about a step or wait
                event = decoded.get(place) or self._decoded(value)
                state.apply(event)
                if kind == _RECEIVED:
                    self._note_resume(event)
        state.header.seq, state.header.at = last.seq, last.at
        self._touched[key] = None

    def _note_resumes(self, types: bytes, values: list[bytes]) -> None:
        for kind, value in zip(types, values, strict=True):
            if kind == _RECEIVED:
                self._note_resume(self._decoded(value))

    def _note_resume(self, event: Event) -> None:
        assert isinstance(event.data, ev.HookReceived), event
        assert event.correlation_id is not None, event
        self._changes[resume_key(event.run_id, event.correlation_id, event.data.resume_id)] = b""

    def _store_log(self, run_id: str, first: int, values: list[bytes]) -> None:
        for start in range(0, len(values), A_GROUP):
            group = values[start : start + A_GROUP]
            if sum(map(len, group)) <= GROUP_BYTES:
                self._changes[event_key(run_id, first + start + len(group) - 1)] = several(group)
            else:
                for n, value in enumerate(group, first + start):
                    self._changes[event_key(run_id, n)] = value

    # -- event by event --------------------------------------------------------------------------------------------

    def _one_by_one(self, values: list[bytes]) -> None:
        for value in values:
            event = self._decoded(value)
            data = event.data
            if isinstance(data, ev.TokenClaimed | ev.TokenReleased):
                token = self._tokens.get(data.token) or self._store.token(data.token)
                self._tokens[data.token] = applied(token, data, event.at)
            elif (state := self._next(event)) is not None:
                state.apply(event)
                self._changes[event_key(event.run_id, event.seq)] = value
                self._touched[event.run_id.encode()] = None
                if isinstance(data, ev.HookReceived):
                    self._note_resume(event)

    def _next(self, event: Event) -> RunState | None:
        """The state that an event is to be applied to; None for one that is not to be applied."""
        known = self._run(event.run_id)
        if known is None:
            if isinstance(event.data, ev.RunCreated):
                return self._begin(event.run_id, event)[0]
            if self._cut:
                return None  # what is left of a run that was purged
            raise LookupError(f"the log of run {event.run_id} begins with seq {event.seq}: {event.type}")
        header = known[0].header
        if event.at < header.created_at:
            return None  # of an earlier run with this id, which was purged
        if event.seq == 1 and event.at > header.created_at and known[0].terminal:
            self.forget(event.run_id)  # it was purged, and its id used again
            return self._begin(event.run_id, event)[0]
        if event.seq <= header.seq:
            return None  # applied before, but the process ended before its checkpoint was written
        if event.seq != header.seq + 1:
            raise LookupError(f"run {event.run_id}: seq {header.seq} is followed by {event.seq}")
        return known[0]

    def _run(self, run_id: str) -> tuple[RunState, Stored] | None:
        key = run_id.encode()
        known = self._known.get(key)
        if known is None:
            state = self._store.state(run_id)
            if state is None:
                return None
            known = self._known[key] = (state, Stored(run_id, state))
        return known

    def _begin(self, run_id: str, first: Event) -> tuple[RunState, Stored]:
        known = self._known[run_id.encode()] = (created(first), Stored(run_id))
        return known

    def _decoded(self, value: bytes) -> Event:
        return self._codec.decode_as(Event, value)


def _types(values: list[bytes], prefix: bytes, first: int, at: int) -> bytes | None:
    """The types of these events, as their codes; None where they are not all of one run, one following the other.

    Args:
        values: encoded events.
        prefix: how an event of the run begins, up to its seq.
        first: the first one's seq.
        at: where that ends.
    """
    seqs = _SEQS[first : first + len(values)]
    if len(seqs) != len(values):
        seqs = [varint(n) for n in range(first, first + len(values))]
    begins = [prefix + seq for seq in seqs]
    if len(begins[-1]) == at:
        if [value[:at] for value in values] != begins:
            return None
        return bytes([value[at] for value in values])
    if not all(map(bytes.startswith, values, begins)):  # seqs become a byte longer at 64, 8,192 ...
        return None
    return bytes([value[len(begin)] for value, begin in zip(values, begins, strict=True)])


def _passed(types: bytes, values: list[bytes], at: int) -> list[bytes | None]:
    """For each event the step or wait that it is about, where that opens and closes among these; else None."""
    about: list[bytes | None] = [
        _about(value, at) if kind in _OPEN else None for kind, value in zip(types, values, strict=True)
    ]
    opened = {name for kind, name in zip(types, about, strict=True) if kind in _CREATING}
    closed = {
        name
        for kind, name, value in zip(types, about, values, strict=True)
        if kind in _CLOSING and not (kind == _COMPLETED and _wrote_streams(value, at))
    }
    whole = (opened & closed) - {None}
    return [name if name in whole else None for name in about]


def _about(value: bytes, at: int) -> bytes | None:
    """The correlation id of an event whose type stands at a place."""
    size = value[at + 2]
    return value[at + 3 : at + 3 + (size >> 1)] if value[at + 1] == 2 and size < 0x80 else None


def _wrote_streams(value: bytes, at: int) -> bool:
    """Whether a step_completed tells of streams, which the run's header names."""
    place = at + 3 + (value[at + 2] >> 1)
    _, place = read_long(value, place)  # at
    _, place = read_long(value, place)  # which kind of data
    _, place = read_long(value, place)  # attempt
    for _ in ("content_type", "data"):
        size, place = read_long(value, place)
        place += size
    return value[place] != 0
