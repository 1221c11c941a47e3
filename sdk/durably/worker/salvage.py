"""What can still be read of a request that cannot be decoded: whom to tell."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING, Any

import fastavro
from durably_schemas.records import Payload, StepRequest

if TYPE_CHECKING:
    from durably.broker.port import Message

_HEADERS = {b"\xc3\x01": 10, b"\x00": 5}  # bytes before the body: single-object encoding, Confluent wire format
# What every version of a StepRequest begins with. What a reader does not know of follows, and is not looked at.
_BEGINNING: Any = fastavro.parse_schema(
    {
        "type": "record",
        "name": "durably.worker.Beginning",
        "fields": [
            {"name": "run_id", "type": "string"},
            {"name": "step_id", "type": "string"},
            {"name": "step", "type": "string"},
            {"name": "attempt", "type": "int"},
            {"name": "fingerprint", "type": "string"},
        ],
    }
)


def salvaged(message: Message) -> StepRequest | None:
    """The request, without its input, as far as its answer needs it; None where not even that can be read.

    A request is keyed by its step's ID: where that is what was read, the bytes were what they were taken for.
    """
    value = message.value or b""
    skip = next((size for mark, size in _HEADERS.items() if value.startswith(mark)), None)
    if skip is None or message.key is None:
        return None
    try:
        found: Any = fastavro.schemaless_reader(BytesIO(value[skip:]), _BEGINNING, None)
    except Exception:  # whatever fastavro makes of arbitrary bytes
        return None
    if found["step_id"].encode() != message.key:
        return None
    return StepRequest(
        **found,
        input=Payload(content_type="", data=b""),
        workflow="",
        workflow_started_at=0,
        scheduled_at=message.timestamp,
    )
