"""Bringing a store up to date from the events topic. Runs no user code."""

from __future__ import annotations

import logging
import time

from durably.broker.port import TP, Broker, End, Message
from durably_schemas import Catalogue, Codec
from durably_schemas import events as ev
from durably_schemas.records import Event

from durably_processor.engine.state import RunState, created
from durably_processor.state.store import (
    CHECKPOINT,
    Changes,
    Store,
    Stored,
    Token,
    blocked_key,
    encode_token,
    event_key,
    resume_key,
    token_key,
)
from durably_processor.tokens import applied

log = logging.getLogger("durably.processor")

_CHUNK = 2_000


class Restore:
    """Reads one partition of ``events`` from the store's checkpoint to its high watermark.

    The high watermark, not the last stable offset: that may lie below events that are already committed.
    """

    def __init__(self, number: int, store: Store, broker: Broker, catalogue: Catalogue, codec: Codec) -> None:
        self.number = number
        self._store = store
        self._codec = codec
        self._tp = TP(catalogue.events, number)
        self._target = broker.end_offsets([self._tp])[self._tp]
        topic = broker.identity(catalogue.events)
        if store.checkpoint > self._target or not store.belongs_to(topic):
            log.warning("partition %s: the store is not of this topic, which was made anew: it is rebuilt", number)
            store.clear()
            store.belongs_to(topic)
        self._position = max(store.checkpoint, broker.start_offsets([self._tp])[self._tp])
        self._begun = time.monotonic()
        self._count = 0
        self._states: dict[str, tuple[RunState, Stored]] = {}
        self._tokens: dict[str, Token] = {}
        self._reader = None if self._position >= self._target else broker.reader({self._tp: self._position})

    def step(self, seconds: float) -> bool:
        """Restores for about this long; True when everything is there."""
        end = time.monotonic() + seconds
        while self._position < self._target:
            assert self._reader is not None
            left = end - time.monotonic()
            if left <= 0:
                return False
            self._take(self._reader.poll(left, _CHUNK))
        self.close()
        if self._count:
            took = time.monotonic() - self._begun
            log.info("partition %s: %s events restored in %.2f s", self.number, self._count, took)
        return True

    def close(self) -> None:
        """Stops reading; what was restored is kept."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _take(self, messages: list[Message | End]) -> None:
        changes: Changes = {}
        for message in messages:
            if isinstance(message, End):
                self._position = max(self._position, message.offset)
                continue
            self._position = message.offset + 1
            event = self._codec.decode_as(Event, message.value)
            self._count += 1
            data = event.data
            if isinstance(data, ev.TokenClaimed | ev.TokenReleased):
                token = self._tokens.get(data.token) or self._store.token(data.token)
                self._tokens[data.token] = applied(token, data)
            elif self._apply(event):
                assert message.value is not None
                changes[event_key(event.run_id, event.seq)] = message.value
                if isinstance(data, ev.HookReceived):
                    assert event.correlation_id is not None, event
                    changes[resume_key(event.run_id, event.correlation_id, data.resume_id)] = b""
        if not messages:
            return
        for run_id, (state, stored) in self._states.items():
            stored.changes(state, changes, set())
            if state.header.blocked:
                changes[blocked_key(run_id)] = b""
            elif stored.blocked:
                changes[blocked_key(run_id)] = None
        self._states.clear()
        for name, token in self._tokens.items():
            changes[token_key(name)] = encode_token(token)
        self._tokens.clear()
        changes[CHECKPOINT] = self._position.to_bytes(8, "big")
        self._store.write(changes)

    def _apply(self, event: Event) -> bool:
        known = self._states.get(event.run_id)
        if known is None:
            state = self._store.state(event.run_id)
            if state is None:
                if not isinstance(event.data, ev.RunCreated):
                    raise LookupError(f"the log of run {event.run_id} begins with seq {event.seq}: {event.type}")
                state = created(event)
            known = self._states[event.run_id] = (state, Stored(event.run_id, state))
        state = known[0]
        if event.seq <= state.header.seq:
            return False  # applied before, but the process ended before its checkpoint was written
        if event.seq != state.header.seq + 1:
            raise LookupError(f"run {event.run_id}: seq {state.header.seq} is followed by {event.seq}")
        state.apply(event)
        return True
