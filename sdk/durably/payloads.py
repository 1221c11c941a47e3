"""User values as bytes, and back: msgpack with extension types out; msgpack or JSON in. Never pickle.

`durably.payload_types` says which types travel, `durably.serialization` how those of the user join them. With an annotation
a value is converted to what that says. A `durably.payload_codec` may compress or encrypt what is written here.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import msgspec
from durably_schemas.records import Payload

from durably import payload_codec, payload_types
from durably.conversion import convert
from durably.errors import DeterminismError, SerializationError
from durably.payload_types import DEPTH
from durably.signatures import signature_of

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "DEPTH",
    "JSON",
    "MSGPACK",
    "dump",
    "dump_arguments",
    "dump_result",
    "encode",
    "fingerprint",
    "load",
    "load_arguments",
    "plain_arguments",
    "result_type",
]

MSGPACK = "application/msgpack"
JSON = "application/json"


def dump(value: Any, what: str) -> Payload:
    """The value as a payload; without a codec that encrypts, equal values give equal bytes.

    Args:
        value: what is to travel. It is copied; so that nothing comes back as two things that was one, something mutable
            may stand in it only once.
        what: its name in messages, such as ``"the result of step charge"``.

    Raises:
        SerializationError: some part of it cannot travel; the message names the path to it.
    """
    try:
        plain = Payload(content_type=MSGPACK, data=payload_types.write(value))
    except DeterminismError:  # raised by a method of a user's class, in workflow code
        raise
    except Exception as e:  # such methods may raise anything
        raise payload_types.refusal(e, what) from _cause(e)
    return plain if payload_codec.active is None else payload_codec.active.encode(plain)


def encode(payload: Payload) -> Payload:
    """A payload as the process's codecs leave it; one that went through codecs already is returned as it is.

    Raises:
        SerializationError: a codec failed.
    """
    return payload if payload_codec.active is None else payload_codec.active.encode(payload)


def load(payload: Payload, type: Any = Any) -> Any:  # noqa: A002 - as msgspec names it
    """The value of a payload.

    Args:
        payload: msgpack or JSON, encoded or not.
        type: what to convert it to: any type that msgspec knows, a pydantic model, or Any to take it as it is.

    Raises:
        SerializationError: not readable, of another media type, or not of this type.
    """
    value, textual = _read(payload)
    if type is Any or type is value.__class__:  # the fields of serializable classes have been converted before
        return value
    return convert(value, type, textual=textual, what="the value")


def result_type(fn: Callable[..., Any]) -> Any:
    """What a function's result is to be converted to: its annotation, or Any."""
    return signature_of(fn).result


def dump_result(fn: Callable[..., Any], value: Any, what: str) -> Payload:
    """The result of a function as a payload, sure to fit the function's annotation where it is read.

    Raises:
        SerializationError: it cannot travel, or does not fit the annotation.
    """
    try:
        plain = Payload(content_type=MSGPACK, data=payload_types.write(value))
    except Exception as e:  # the methods of the user's classes may raise anything
        raise payload_types.refusal(e, what) from _cause(e)
    hint = signature_of(fn).result
    if hint is not Any and not (type(value) is hint and hint in _COME_BACK):  # what is Annotated may not hash
        convert(_read(plain)[0], hint, textual=False, what=what)
    return encode(plain)


_COME_BACK = frozenset({str, int, float, bool, type(None), bytes, list, dict, tuple, set, frozenset})


def dump_arguments(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], what: str) -> Payload:
    """The arguments of a call as a payload, ``[args, kwargs]``.

    Raises:
        TypeError: they do not fit the function's signature.
        SerializationError: one of them cannot travel; the message names it.
    """
    plain = plain_arguments(fn, args, kwargs, what)
    return plain if payload_codec.active is None else payload_codec.active.encode(plain)


def plain_arguments(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], what: str) -> Payload:
    """As `dump_arguments`, before any codec: for `fingerprint`, and then `encode`."""
    signature = signature_of(fn)
    signature.check(args, kwargs)
    try:
        return Payload(content_type=MSGPACK, data=payload_types.write([list(args), kwargs]))
    except DeterminismError:  # as in dump
        raise
    except Exception as e:
        raise payload_types.refusal(e, what, signature.parameter) from _cause(e)


def load_arguments(payload: Payload, fn: Callable[..., Any]) -> tuple[list[Any], dict[str, Any]]:
    """Positional and keyword arguments, converted by the function's annotations.

    JSON: a list holds positional arguments, an object keywords, null none.

    Raises:
        SerializationError: not readable, or not fitting; the message names the parameter.
    """
    signature = signature_of(fn)
    args, kwargs, textual = _arguments(payload)
    try:
        signature.check(args, kwargs)
    except TypeError as e:
        raise SerializationError(f"the arguments do not fit: {e}") from e
    signature.convert(args, kwargs, textual=textual)
    return args, kwargs


def fingerprint(step_name: str, payload: Payload, run_input: Payload | None = None) -> str:
    """16 hex digits that stand for a step and its input, the same whether the input was encoded or not.

    Args:
        step_name: the step.
        payload: its arguments.
        run_input: the input of the run, as its log has it. Where it is encrypted the fingerprint is keyed, so that
            nobody finds the arguments by trying. It is the run's input that decides, since that stays what it was,
            whatever codecs later processes have; None: the codecs of this process decide.

    Raises:
        SerializationError: the payload is encoded, and cannot be decoded here.
    """
    key = b"" if payload_codec.active is None else payload_codec.fingerprint_key(run_input)
    plain = payload if payload.content_type == MSGPACK else payload_codec.decode(payload)
    digest = blake2b(f"{step_name}\0{plain.content_type}\0".encode(), digest_size=8, key=key)
    digest.update(plain.data)
    return digest.hexdigest()


def _cause(e: Exception) -> Exception | None:
    return None if isinstance(e, payload_types.Unfit) else e


def _read(payload: Payload) -> tuple[Any, bool]:
    """(value, whether keys are texts only and bytes base64)."""
    if payload.content_type != MSGPACK:
        payload = payload_codec.decode(payload)
    try:
        if payload.content_type == MSGPACK:
            return payload_types.read(payload.data), False
        media = payload.content_type.split(";", 1)[0].strip().lower()
        if media == JSON:
            return msgspec.json.decode(payload.data), True
        if media == MSGPACK:
            return payload_types.read(payload.data), False
    except (SerializationError, DeterminismError):
        raise
    except Exception as e:  # bytes from anywhere: the extensions may raise what they like
        raise SerializationError(f"not readable as {payload.content_type}: {type(e).__name__}: {e}") from e
    raise SerializationError(f"media type {payload.content_type!r} is not understood: send {JSON} or {MSGPACK}")


def _arguments(payload: Payload) -> tuple[list[Any], dict[str, Any], bool]:
    value, textual = _read(payload)
    if not textual:
        if type(value) is list and len(value) == 2:
            args, kwargs = value
            if type(args) is list and type(kwargs) is dict and all(type(name) is str for name in kwargs):
                return args, kwargs, textual
        raise SerializationError("arguments in msgpack are [[positional, …], {name: value, …}]")
    match value:
        case list():
            return value, {}, textual
        case dict():
            return [], value, textual
        case None:
            return [], {}, textual
        case _:
            raise SerializationError("arguments in JSON are a list (positional), an object (by name), or null (none)")
