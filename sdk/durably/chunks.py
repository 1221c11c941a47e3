"""What one chunk of a stream carries: a value, raw bytes, or, at its end, the error that ended it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from durably_schemas.records import Error, Payload

from durably import failures, payload_codec, payloads
from durably.errors import DurablyError

if TYPE_CHECKING:
    from collections.abc import Iterator

OCTETS = "application/octet-stream"
"""The media type of bytes that are written as they are, for any Kafka consumer to take; a codec adds its name."""
PIECE = 512 * 1024
"""Bytes that a chunk of a stream of bytes holds at most; larger ones are written as several."""


def dump(value: Any, namespace: str) -> Payload:
    """The payload of a chunk. Raises `SerializationError` where the value cannot travel."""
    if isinstance(value, bytes | bytearray | memoryview):
        return payloads.encode(Payload(content_type=OCTETS, data=bytes(value)))
    return payloads.dump(value, f"a chunk for stream {namespace!r}")


def load(payload: Payload) -> Any:
    """The value of a chunk. Raises `SerializationError` where it cannot be read."""
    if payload.content_type.startswith(OCTETS):
        return payload_codec.decode(payload).data
    return payloads.load(payload)


def pieces(value: bytes | bytearray | memoryview) -> Iterator[memoryview]:
    """The bytes in order, in chunks of `PIECE` at most; none of nothing."""
    data = memoryview(bytes(value))
    return (data[start : start + PIECE] for start in range(0, len(data), PIECE))


def dump_error(exc: BaseException, namespace: str) -> Payload:
    """What an END carries where not the writer's wish but an error ended the stream."""
    return payloads.dump(failures.to_error(exc), f"the error that ended stream {namespace!r}")


def load_error(payload: Payload) -> Exception:
    """The error that an END carries: its own class where that is at hand, else a `StepError`.

    What is no `Exception` comes as the cause of a `DurablyError`.
    """
    exc = failures.to_exception(payloads.load(payload, Error))
    if isinstance(exc, Exception):
        return exc
    # A KeyboardInterrupt or a cancellation of the writer's is none of the reader's.
    cut_off = DurablyError(f"the stream was cut off by {type(exc).__name__}: {exc}")
    cut_off.__cause__ = exc
    return cut_off
