"""Records and user values as JSON, for whoever looks at them: the command line, the gateway. Not a way to travel."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import msgspec
from durably_schemas.records import Error, Payload

from durably import failures, payloads


def plain(value: Any) -> Any:
    """A record as dicts and lists, with the values of its payloads in their place.

    A payload that cannot be read here, being encrypted, raw or of a class that is not imported, becomes its media type
    and its bytes in base64.
    """
    if isinstance(value, Payload):
        try:
            return plain(payloads.load(value))
        except Exception:  # it cannot be read here, is nested deeper than this goes, or has a method that raises
            return {"content_type": value.content_type, "base64": base64.b64encode(value.data).decode()}
    if isinstance(value, Error):
        return _error(value)
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
    except Exception:  # a key that JSON cannot hold, an integer that Python does not write out, a __str__ that raises
        return msgspec.json.encode(_textual(shown), enc_hook=_text)


def _error(error: Error) -> dict[str, Any]:
    """An exception with what it carries, in clear where this process can read that."""
    told = failures.revealed(error)
    shown = {"type": error.type, "message": told.message, "traceback": told.traceback}
    data = plain(error.data)
    if isinstance(data, dict):  # what is hidden has these three in its data
        data = _carried({name: part for name, part in data.items() if name not in shown or part != shown[name]})
    return {**shown, "data": data, "cause": plain(error.cause)}


def _carried(data: dict[str, Any]) -> dict[str, Any]:
    """The data of an error, whose parts are msgpack within msgpack, so that one which cannot be read hides no other."""
    shown: dict[str, Any] = {}
    for name, part in data.items():
        match part:
            case bytes():
                shown[name] = plain(Payload(content_type=payloads.MSGPACK, data=part))
            case dict():
                shown[name] = _carried(part)
            case list():
                shown[name] = [_carried(member) if isinstance(member, dict) else member for member in part]
            case _:
                shown[name] = part
    return shown


def _textual(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else _text(key): _textual(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_textual(item) for item in value]
    try:
        msgspec.json.encode(value, enc_hook=_text)
    except Exception:  # as above
        return _text(value)
    return value


def _text(value: Any) -> str:
    try:
        return str(value)
    except Exception:  # a method of the user's; or an integer of thousands of digits, which Python does not write out
        return hex(value) if isinstance(value, int) else f"<{type(value).__qualname__}>"
