"""A run's log as JSON: for people to read, and with each event as it is on its topic, so that it can be replayed."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

import msgspec
from durably_schemas import Codec, CodecError
from durably_schemas.records import Event

from durably.errors import SerializationError
from durably.jsonable import plain, to_json

if TYPE_CHECKING:
    from collections.abc import Iterable

RECORD = "record"
"""The field of an event that holds its record, in base64. All the others are for people."""

_codec = Codec()


def shown(events: Iterable[Event]) -> list[dict[str, Any]]:
    """The events as dicts, payloads as values, each with its `RECORD`."""
    return [plain(event) | {RECORD: base64.b64encode(_codec.encode(event)).decode()} for event in events]


def dump(events: Iterable[Event]) -> bytes:
    """The events as JSON, one on each line: as ``durably runs events --json`` prints them."""
    return b"[" + b",\n".join(to_json(event) for event in shown(events)) + b"]\n"


def load(data: bytes | str) -> list[Event]:
    """The events that JSON holds.

    Raises:
        SerializationError: it is not what `dump` writes.
    """
    try:
        found = msgspec.json.decode(data)
        events = [_codec.decode_as(Event, base64.b64decode(event[RECORD], validate=True)) for event in found]
    except (msgspec.DecodeError, KeyError, TypeError, ValueError, CodecError) as e:
        raise SerializationError(
            f"this is no history that can be replayed ({type(e).__name__}: {e}): export one by `durably runs events RUN --json`"
        ) from e
    run_id = events[0].run_id if events else None
    if [(event.run_id, event.seq) for event in events] != [(run_id, n + 1) for n in range(len(events))] or not events:
        raise SerializationError(
            "this is no history that can be replayed: it is not one run's log from its beginning on"
        )
    return events
