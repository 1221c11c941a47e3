"""Coverage-guided: payloads, as msgpack, as JSON and compressed, and errors. ``make fuzz``, or with libFuzzer's own arguments."""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["durably"]):
    from durably import failures, jsonable, payloads
    from durably.errors import SerializationError
from durably_schemas.records import Error, Payload

TYPES = ["application/msgpack", "application/json", "application/msgpack;codec=gzip"]
HINTS = [None, int, str, list[int], dict[str, float], int | str]


def one(data: bytes) -> None:
    """The first byte says what the rest is taken for."""
    if not data:
        return
    kind, data = data[0], data[1:]
    payload = Payload(content_type=TYPES[kind % 3], data=data)
    try:
        hint = HINTS[kind // 3 % len(HINTS)]
        value = payloads.load(payload) if hint is None else payloads.load(payload, hint)
    except SerializationError:
        pass
    else:
        jsonable.to_json(value)
        try:
            payloads.dump(value, "it")
        except SerializationError:
            pass
    jsonable.to_json(payload)
    failures.to_exception(Error(type="builtins:ValueError", message="m", data=payload))


if __name__ == "__main__":
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
