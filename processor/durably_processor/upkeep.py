"""Retention: what has ended is purged after a while, what goes on is copied, and ``events`` loses its beginning.

A *sweep* passes over all runs and tokens of a partition, a few at a time between its turns:

    a run that ended a retention ago                         purged
    a run whose oldest event that is not copied is older     that and the later ones copied to ``snapshots``
      than a retention and a quarter
    a token that was claimed so long ago, and is held        its claim copied
    a token that was released a retention ago                purged

The quarter is why runs that live for less than it are never copied. When all of that is committed, ``events`` is
truncated: up to a quarter of a retention before the oldest event that is needed still, by the records' times, and never
beyond what the store had applied when the sweep began. So nothing that is neither purged nor copied is ever lost,
however long processors were down, and however their clocks differ from the brokers', up to that quarter.

A purge is no event. Its only traces are the records of ``snapshots`` and ``runs`` that it takes back; one that a crash
undoes in the store is done again by the next sweep.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from durably.broker.port import TP, Broker
from durably.errors import BrokerError
from durably_schemas import Catalogue, Codec
from durably_schemas import events as ev
from durably_schemas.records import Event, Snapshot

from durably_processor.state.store import (
    Changes,
    Copied,
    Holder,
    Lived,
    Store,
    Token,
    copied_claim_key,
    copied_key,
    encode_copied,
    token_key,
)
from durably_processor.tokens import Tokens, holding
from durably_processor.turn import Part, Turn

log = logging.getLogger("durably.processor")

SPARE = 4
"""What part of the retention runs may be older than it before they are copied."""
SWEEPS = 20
"""Sweeps that begin within a retention, unless that is so long that an hour is shorter."""
LONGEST_PAUSE_MS = 3_600_000
SLICE, BETWEEN = 0.005, 0.05
"""Seconds that a sweep takes of a turn at most, and seconds until it takes more: it costs a tenth of the thread."""
A_BATCH = 100
SNAPSHOT_BYTES = 512 * 1024
COPIED_AT_ONCE = 8
"""Snapshots of one run in one sweep; what is left is copied in the next."""


class Retention(NamedTuple):
    """How long ended runs are kept, in milliseconds, and what to do about ``events``.

    ``truncate`` is called with a partition, an instant, and an offset, and drops the events that are older and below.
    """

    ms: int
    truncate: Callable[[int, int, int], None]


class Upkeep:
    """Of one partition.

    Args:
        number: of the partition.
        store: its store, which alone decides: what is not committed yet is left to the next sweep.
        tokens: its custom tokens.
        codec: of the topics.
        retention: None: everything is kept for ever.
        now: the clock, in milliseconds.
        let_go: forgets a run that is in memory; False where a turn after the one given, the last that is acknowledged,
            has changed it.
    """

    def __init__(
        self,
        number: int,
        store: Store,
        tokens: Tokens,
        codec: Codec,
        retention: Retention | None,
        now: Callable[[], int],
        let_go: Callable[[str, int], bool],
    ) -> None:
        self._number = number
        self._store = store
        self._tokens = tokens
        self._codec = codec
        self._retention = retention
        self._now = now
        self._let_go = let_go
        self._purged: dict[str, int] = {}  # with the turn that did, until the store knows
        self._sweep: Iterator[None] | None = None
        self._due = 0
        self._resting = 0.0
        self._turn = Turn(0, 0)
        self._changed = 0  # the last turn that has something from here

    def is_purged(self, run_id: str) -> bool:
        """The store still has this run, but will not when what is under way is committed."""
        return run_id in self._purged

    def turn(self, turn: Turn) -> None:
        """Does some of a sweep, where one is due."""
        if self._retention is None:
            return
        for run_id in [run_id for run_id, number in self._purged.items() if number <= turn.acked]:
            del self._purged[run_id]
        self._turn = turn
        if self._sweep is None:
            if self._now() < self._due:
                return
            self._due = self._now() + min(self._retention.ms // SWEEPS, LONGEST_PAUSE_MS)
            self._sweep = self._sweeping(self._retention)
        began = time.monotonic()
        if began < self._resting:
            return
        for _ in self._sweep:
            if time.monotonic() - began > SLICE:
                self._resting = time.monotonic() + BETWEEN
                return
        self._sweep = None

    def _sweeping(self, retention: Retention) -> Iterator[None]:
        """A sweep; pauses wherever it may be interrupted."""
        began, applied = self._now(), self._store.checkpoint
        old, too_old = began - retention.ms, began - retention.ms - retention.ms // SPARE
        needed = began  # the time of the oldest event that is still needed
        last_run: str | None = None
        while lives := self._store.lives(last_run, A_BATCH):
            for life in lives:
                needed = min(needed, self._after_run(life, old, too_old))
                yield
            last_run = lives[-1].run_id
        last_token: str | None = None
        while tokens := self._store.tokens(last_token, A_BATCH):
            for name, token in tokens:
                needed = min(needed, self._after_token(name, token, old, too_old))
                yield
            last_token = tokens[-1][0]
        while self._turn.acked < self._changed:
            self._resting = time.monotonic() + BETWEEN
            yield
        retention.truncate(self._number, needed - retention.ms // SPARE, applied)

    # -- runs ------------------------------------------------------------------------------------------------------

    def _after_run(self, life: Lived, old: int, too_old: int) -> int:
        """Purges or copies a run where it is time; returns the time of the oldest event of it that must stay."""
        if life.ended_at is not None and life.ended_at <= old:
            if not self._let_go(life.run_id, self._turn.acked):
                return life.created_at
            self._purge(life.run_id)
            return self._now()
        if life.created_at > too_old:
            return life.created_at  # the most by far
        copied = self._store.copied(life.run_id)
        first = 1 if copied is None else copied.to_seq + 1
        base = self._time_of(life.run_id, first)
        if base is None or base > too_old:
            return self._now() if base is None else base
        self._copy(life.run_id, first, () if copied is None else copied.begins)
        return base

    def _time_of(self, run_id: str, seq: int) -> int | None:
        value = self._store.event(run_id, seq)
        return None if value is None else self._codec.decode_as(Event, value).at

    def _purge(self, run_id: str) -> None:
        part = self._part()
        changes: Changes = dict.fromkeys(self._store.keys_of(run_id))
        part.change(changes, set(), changes)
        part.summaries[run_id.encode()] = None
        copied = self._store.copied(run_id)
        if copied is not None:
            part.copies += [(_key(run_id, seq), None) for seq in copied.begins]
        self._purged[run_id] = self._turn.number

    def _copy(self, run_id: str, first: int, begins: tuple[int, ...]) -> None:
        part = self._part()
        copies = 0
        batch: list[bytes] = []
        size = 0
        for value in self._store.events(run_id, first):
            if batch and size + len(value) > SNAPSHOT_BYTES:
                self._write(part, run_id, first, batch)
                begins, first, batch, size = (*begins, first), first + len(batch), [], 0
                copies += 1
                if copies == COPIED_AT_ONCE:
                    break
            batch.append(value)
            size += len(value)
        if batch:
            self._write(part, run_id, first, batch)
            begins, first = (*begins, first), first + len(batch)
        part.change({copied_key(run_id): encode_copied(Copied(first - 1, begins))}, set(), ())

    def _write(self, part: Part, log_id: str, first: int, events: list[bytes]) -> None:
        snapshot = Snapshot(run_id=log_id, from_seq=first, to_seq=first + len(events) - 1, events=tuple(events))
        part.copies.append((_key(log_id, first), self._codec.encode(snapshot)))

    # -- tokens ----------------------------------------------------------------------------------------------------

    def _after_token(self, name: str, token: Token, old: int, too_old: int) -> int:
        """As `_after_run`, of a custom token."""
        if not self._tokens.is_settled(name):
            return token.at
        copied = self._store.copied_claim(name)
        if copied is not None and copied != token.holder:  # released since
            part = self._part()
            part.change({copied_claim_key(name): None}, set(), [copied_claim_key(name)])
            part.copies.append((_key(holding(name, copied), 1), None))
            copied = None
        if token.holder is None:
            if token.at > old:
                return token.at
            self._part().change({token_key(name): None}, set(), [token_key(name)])
            return self._now()
        if copied is not None:
            return self._now()
        if token.at <= too_old:
            self._copy_claim(name, token.holder, token.at)
        return token.at

    def _copy_claim(self, name: str, holder: Holder, at: int) -> None:
        part = self._part()
        log_id = holding(name, holder)
        claimed = ev.TokenClaimed(token=name, run_id=holder.run_id, hook_id=holder.hook_id)
        self._write(part, log_id, 1, [self._codec.encode(ev.event(log_id, 1, at, claimed, holder.hook_id))])
        part.change({copied_claim_key(name): encode_copied(holder)}, set(), ())

    def _part(self) -> Part:
        self._changed = self._turn.number
        return self._turn.part(self._number, self._store)


def _key(log_id: str, from_seq: int) -> bytes:
    return f"{log_id}|{from_seq}".encode()


class Truncation:
    """Truncates ``events``, on threads of its own: the broker may take its time."""

    def __init__(self, broker: Broker, catalogue: Catalogue) -> None:
        self._broker = broker
        self._topic = catalogue.events

    def __call__(self, partition: int, before: int, offset: int) -> None:
        """Begins to drop the events that are older than an instant, below an offset."""
        args = (TP(self._topic, partition), before, offset)
        threading.Thread(target=self._truncate, args=args, name="durably-truncate", daemon=True).start()

    def _truncate(self, tp: TP, before: int, offset: int) -> None:
        try:
            offset = min(offset, self._broker.offsets_at([tp], before)[tp])
            if offset > self._broker.start_offsets([tp])[tp]:
                self._broker.truncate({tp: offset})
                log.info("partition %s: events begin at offset %s by now", tp.partition, f"{offset:,}")
        except BrokerError as e:  # the next sweep tries again
            log.warning("partition %s: events could not be truncated: %s", tp.partition, e)
