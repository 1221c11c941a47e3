"""Records and user values as JSON, for whoever looks at them: the command line, the gateway. Not a way to travel."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import msgspec
from durably_schemas.records import Payload

from durably import payloads
from durably.errors import SerializationError


def plain(value: Any) -> Any:
    """A record as dicts and lists, with the values of its payloads in their place.

    A payload that cannot be read here, being encrypted, raw or of a class that is not imported, becomes its media type
    and its bytes in base64.
    """
    if isinstance(value, Payload):
        try:
            return plain(payloads.load(value))
        except SerializationError:
            return {"content_type": value.content_type, "base64": base64.b64encode(value.data).decode()}
    if isinstance(value, msgspec.Struct):
        return {name: plain(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if hasattr(value, "__durably_dump__") and not isinstance(value, type):
        return plain(value.__durably_dump__())
    return value


def to_json(value: Any) -> bytes:
    """JSON of records and user values alike; what JSON has no form for is given as text."""
    shown = plain(value)
    try:
        return msgspec.json.encode(shown, enc_hook=str)
    except (TypeError, ValueError):  # a key that JSON cannot hold
        return msgspec.json.encode(_textual(shown), enc_hook=str)


def _textual(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else str(key): _textual(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_textual(item) for item in value]
    return value
