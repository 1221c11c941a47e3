"""User values as bytes, and back: msgpack with extension types out; msgpack or JSON in. Never pickle.

What comes back without an annotation is exactly what went in, for None, bool, int, float, str, bytes, list, dict, tuple,
set, frozenset, datetime, date, time, timedelta, Decimal and UUID; a time zone becomes its offset, a subclass its base, a
dataclass (or msgspec Struct, attrs or pydantic object) a dict, an Enum its value. With an annotation it is converted.
"""

from __future__ import annotations

import dataclasses
import inspect
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from functools import lru_cache
from hashlib import blake2b
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Never, NoReturn, get_type_hints
from uuid import UUID

import msgspec
from durably_schemas.records import Payload
from msgspec.msgpack import Ext

from durably.errors import SerializationError
from durably.streams import Writable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

MSGPACK = "application/msgpack"
JSON = "application/json"
DEPTH = 200  # of nesting; both coders recurse on the C stack
_REMEDY = (
    "pass plain data (numbers, texts, lists, dicts, dataclasses, …), or the name by which a step can find the thing"
)
_ROOT = "\0"  # stands for the name of the whole value at the end of a path that is being collected

# The codes are part of the wire contract: never reuse one.
_BIGINT, _TUPLE, _SET, _FROZENSET, _DATETIME, _DATE, _TIME, _TIMEDELTA, _DECIMAL, _UUID, _PAIRS, _STREAM = range(1, 13)

_encode = msgspec.msgpack.Encoder().encode
_AS_IS = frozenset({str, float, bool, type(None), bytes})
_KEYS = _AS_IS | {int}


class _Unfit(Exception):
    """A value that cannot travel; the path to it is collected on the way up, innermost first."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        self.path: list[str] = []


def _plain(value: Any, above: list[Any]) -> Any:
    """The value in terms of what msgpack has. ``above`` holds the containers around it."""
    kind = type(value)
    if kind in _AS_IS:
        return value
    if kind is int:
        return value if -(1 << 63) <= value < 1 << 64 else Ext(_BIGINT, str(value).encode())
    known = _EXACT.get(kind)
    if known is not None:
        return known(value, above)
    return _other(value, above)


def _enter(value: Any, above: list[Any]) -> None:
    # By identity, but without id(): that raises an audit event, which costs more than all the rest.
    for container in above:
        if container is value:
            raise _Unfit("contains itself")
    if len(above) >= DEPTH:
        raise _Unfit(f"is nested deeper than {DEPTH} levels")
    above.append(value)


def _items(value: Iterable[Any], above: list[Any]) -> list[Any]:
    _enter(value, above)
    out: list[Any] = []
    try:
        for item in value:
            out.append(item if type(item) in _AS_IS else _plain(item, above))  # noqa: PERF401 - its length is the path
    except _Unfit as e:
        e.path.append(f"[{len(out)}]")
        raise
    above.pop()
    return out


def _mapping(value: Mapping[Any, Any], above: list[Any]) -> Any:
    _enter(value, above)
    out: dict[Any, Any] = {}
    key: Any = None
    try:
        for key, item in value.items():
            if type(key) not in _KEYS:
                break
            out[key] = item if type(item) in _AS_IS else _plain(item, above)
        else:
            above.pop()
            return out
    except _Unfit as e:
        e.path.append(f"[{key!r:.60}]")
        raise
    above.pop()
    return _pairs(value, above)


def _pairs(value: Mapping[Any, Any], above: list[Any]) -> Ext:
    """A mapping with keys that msgpack has no form for that would stay hashable."""
    _enter(value, above)
    out = []
    key: Any = None
    try:
        for key, item in value.items():
            plain = _plain(key, above)
            if isinstance(plain, dict | list):
                raise _Unfit(f"has a key of {type(key)!r}, which would come back as a {type(plain).__name__}")
            out.append((plain, _plain(item, above)))
    except _Unfit as e:
        e.path.append(f"[{key!r:.60}]")
        raise
    above.pop()
    return Ext(_PAIRS, _encode(out))


def _set(code: int) -> Callable[[Any, list[Any]], Ext]:
    def convert(value: Any, above: list[Any]) -> Ext:
        # Sorted by their bytes, so that equal sets have equal bytes whatever the hash seed.
        return Ext(code, _encode([msgspec.Raw(b) for b in sorted(map(_encode, _items(value, above)))]))

    return convert


def _fields(pairs: Iterable[tuple[str, str]], value: Any, above: list[Any]) -> dict[str, Any]:
    _enter(value, above)
    out: dict[str, Any] = {}
    attribute = ""
    try:
        for attribute, name in pairs:
            out[name] = _plain(getattr(value, attribute), above)
    except _Unfit as e:
        e.path.append(f".{attribute}")
        raise
    above.pop()
    return out


def _struct(value: msgspec.Struct, above: list[Any]) -> Any:
    config = value.__struct_config__
    out = _fields(zip(value.__struct_fields__, value.__struct_encode_fields__, strict=True), value, above)
    if config.tag_field is not None:
        out = {config.tag_field: config.tag, **out}
    return list(out.values()) if config.array_like else out


def _other(value: Any, above: list[Any]) -> Any:
    """Objects of the user's classes, and subclasses of the built-in ones."""
    cls = type(value)
    if isinstance(value, Enum):
        return _plain(value.value, above)
    if isinstance(value, Writable):
        return Ext(_STREAM, _encode([value.run_id, value.namespace]))
    if isinstance(value, msgspec.Struct):
        return _struct(value, above)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _fields(((f.name, f.name) for f in dataclasses.fields(value)), value, above)
    if not isinstance(value, type):
        if hasattr(cls, "__attrs_attrs__"):
            return _fields(((a.name, a.name) for a in cls.__attrs_attrs__), value, above)
        if hasattr(cls, "model_dump"):  # pydantic's
            return _plain(value.model_dump(), above)
    for base, convert in _BASES:
        if isinstance(value, base):
            return convert(value, above)
    raise _Unfit(f"{value!r:.100} of {cls!r} cannot travel")


def _text(code: int, write: Callable[[Any], str]) -> Callable[[Any, list[Any]], Ext]:
    return lambda value, _: Ext(code, write(value).encode())


_EXACT: dict[type, Callable[[Any, list[Any]], Any]] = {
    list: _items,
    dict: _mapping,
    tuple: lambda value, above: Ext(_TUPLE, _encode(_items(value, above))),
    set: _set(_SET),
    frozenset: _set(_FROZENSET),
    datetime: _text(_DATETIME, datetime.isoformat),
    date: _text(_DATE, date.isoformat),
    time: _text(_TIME, time.isoformat),
    timedelta: lambda value, _: Ext(_TIMEDELTA, _encode([value.days, value.seconds, value.microseconds])),
    Decimal: _text(_DECIMAL, str),
    UUID: lambda value, _: Ext(_UUID, value.bytes),
    bytearray: lambda value, _: bytes(value),
    memoryview: lambda value, _: bytes(value),
}
_BASES: tuple[tuple[type, Callable[[Any, list[Any]], Any]], ...] = (  # a datetime is a date: the order matters
    (str, lambda value, _: str.__str__(value)),
    (int, lambda value, above: _plain(int.__int__(value), above)),
    (float, lambda value, _: float.__float__(value)),
    (bytes, lambda value, _: bytes(value)),
    *_EXACT.items(),
)


def dump(value: Any, what: str) -> Payload:
    """The value as a payload; equal values give equal bytes, dicts in the order of their items.

    Args:
        value: what is to travel. It is copied: what two places share comes back as two.
        what: its name in messages, such as ``"the result of step charge"``.

    Raises:
        SerializationError: some part of it cannot travel; the message names the path to it.
    """
    try:
        data = _encode(_plain(value, []))
    except _Unfit as e:
        raise SerializationError(f"{what}{''.join(reversed(e.path))}: {e.reason}; {_REMEDY}") from None
    except UnicodeEncodeError as e:
        raise SerializationError(f"{what}: a text in it is not valid Unicode ({e}); use bytes for raw data") from None
    except (TypeError, ValueError, OverflowError, AttributeError, RecursionError) as e:
        raise SerializationError(f"{what}: {e}; {_REMEDY}") from e
    return Payload(content_type=MSGPACK, data=data)


def _bigint(data: memoryview) -> int:
    return int(str(data, "ascii"))


_EXTENSIONS: dict[int, Callable[[memoryview], Any]] = {
    _BIGINT: _bigint,
    _TUPLE: lambda data: tuple(_decode(data)),
    _SET: lambda data: set(_decode(data)),
    _FROZENSET: lambda data: frozenset(_decode(data)),
    _DATETIME: lambda data: datetime.fromisoformat(str(data, "ascii")),
    _DATE: lambda data: date.fromisoformat(str(data, "ascii")),
    _TIME: lambda data: time.fromisoformat(str(data, "ascii")),
    _TIMEDELTA: lambda data: timedelta(*_decode(data)),
    _DECIMAL: lambda data: Decimal(str(data, "ascii")),
    _UUID: lambda data: UUID(bytes=bytes(data)),
    _PAIRS: lambda data: dict(_decode(data)),
    _STREAM: lambda data: Writable(*_decode(data)),
}


def _extension(code: int, data: memoryview) -> Any:
    read = _EXTENSIONS.get(code)
    if read is None:
        raise SerializationError(f"msgpack extension type {code} is unknown here: it was written by a newer version")
    return read(data)


_decode: Callable[[bytes | memoryview], Any] = msgspec.msgpack.Decoder(ext_hook=_extension).decode


def load(payload: Payload, type: Any = Any) -> Any:  # noqa: A002 - as msgspec names it
    """The value of a payload.

    Args:
        payload: msgpack or JSON.
        type: what to convert it to: any type that msgspec knows, a pydantic model, or Any to take it as it is.

    Raises:
        SerializationError: not readable, of another media type, or not of this type.
    """
    value, textual = _raw(payload)
    if type is Any or type is value.__class__:  # of plain classes only: the others are never what was read
        return value
    return _convert(value, type, textual, "the value")


def _raw(payload: Payload) -> tuple[Any, bool]:
    """(value, whether keys are texts only and bytes base64)."""
    try:
        if payload.content_type == MSGPACK:
            return _decode(payload.data), False
        media = payload.content_type.split(";", 1)[0].strip().lower()
        if media == JSON:
            return msgspec.json.decode(payload.data), True
        if media == MSGPACK:
            return _decode(payload.data), False
    except SerializationError:
        raise
    except Exception as e:  # bytes from anywhere: the extensions may raise what they like
        raise SerializationError(f"not readable as {payload.content_type}: {type(e).__name__}: {e}") from e
    raise SerializationError(f"media type {payload.content_type!r} is not understood: send {JSON} or {MSGPACK}")


def _custom(cls: type, value: Any) -> Any:
    """Classes that msgspec does not know."""
    if isinstance(value, cls):
        return value
    if hasattr(cls, "model_validate"):  # pydantic's
        return cls.model_validate(value)
    raise ValueError(f"expected {cls.__qualname__}, got {type(value).__name__}")


def _convert(value: Any, to: Any, textual: bool, what: str) -> Any:
    try:
        return msgspec.convert(value, to, dec_hook=_custom, str_keys=textual)
    except TypeError as e:  # the annotation's fault
        raise SerializationError(
            f"{what} cannot be converted to {to!r}: {e}; annotate it as Any to take it as it is"
        ) from e
    except Exception as e:  # a validator of the user's may raise anything
        raise SerializationError(f"{what} does not fit {to!r}: {e}") from e


class _Signature:
    """A function's parameters, prepared for checking and converting arguments quickly."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.name = getattr(fn, "__qualname__", repr(fn)).rpartition(".<locals>.")[2]
        self.signature = inspect.signature(fn)
        hints = _hints(inspect.unwrap(fn))
        self.result = hints.get("return", Any)
        self.by_position: list[tuple[str, Any]] = []
        self.by_name: dict[str, Any] = {}
        self.more: tuple[str, Any] | None = None
        self.more_names: Any = None
        needed: list[str] = []
        for p in self.signature.parameters.values():
            hint = hints.get(p.name, Any)
            if p.kind is p.VAR_POSITIONAL:
                self.more = (p.name, hint)
                continue
            if p.kind is p.VAR_KEYWORD:
                self.more_names = hint
                continue
            if p.kind is not p.KEYWORD_ONLY:
                self.by_position.append((p.name, hint))
            if p.kind is not p.POSITIONAL_ONLY:
                self.by_name[p.name] = hint
            if p.default is p.empty:
                needed.append(p.name)
        names = [name for name, _ in self.by_position]
        # For n positional arguments: the names that are taken by them, and those that must be given by keyword.
        self.taken = [frozenset(names[:n]) for n in range(len(names) + 1)]
        self.missing = [frozenset(needed) - taken for taken in self.taken]

    def check(self, args: list[Any] | tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raises `TypeError`, naming the function and the misfit."""
        n = len(args)
        given = kwargs.keys()
        if (
            n < len(self.taken)
            and given <= self.by_name.keys()
            and given.isdisjoint(self.taken[n])
            and self.missing[n] <= given
        ):
            return
        try:
            self.signature.bind(*args, **kwargs)
        except TypeError as e:
            raise TypeError(f"{self.name}(): {e}") from None

    def parameter(self, path: str) -> str:
        """A path within ``[args, kwargs]`` in terms of the parameters: ``[0][1].x`` is ``'cents'.x``."""
        where, _, rest = path[1:].partition("][")
        first, _, rest = rest.partition("]")
        if where == "1":
            return f"{first}{rest}"
        n = int(first)
        if n < len(self.by_position):
            return f"{self.by_position[n][0]!r}{rest}"
        return f"{'*' + self.more[0] if self.more else n!r}[{n - len(self.by_position)}]{rest}"


def _hints(fn: Callable[..., Any]) -> dict[str, Any]:
    """Annotations, evaluated; one that cannot be (imported for type checkers only) is left out, the others stay."""
    try:
        hints = get_type_hints(fn, include_extras=True)
    except Exception:
        hints = {}
        for name, annotation in getattr(fn, "__annotations__", {}).items():
            try:
                one = SimpleNamespace(__annotations__={name: annotation})
                hints |= get_type_hints(one, getattr(fn, "__globals__", {}), include_extras=True)
            except Exception:
                hints[name] = Any
    return {name: Any if hint in (NoReturn, Never, object) else hint for name, hint in hints.items()}


_signature = lru_cache(maxsize=4096)(_Signature)


def result_type(fn: Callable[..., Any]) -> Any:
    """What a function's result is to be converted to: its annotation, or Any."""
    return _signature(fn).result


def dump_arguments(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], what: str) -> Payload:
    """The arguments of a call as a payload, ``[args, kwargs]``.

    Raises:
        TypeError: they do not fit the function's signature.
        SerializationError: one of them cannot travel; the message names it.
    """
    signature = _signature(fn)
    signature.check(args, kwargs)
    try:
        return dump([list(args), kwargs], _ROOT)
    except SerializationError as e:
        path, found, reason = str(e).removeprefix(_ROOT).partition(": ")
        if not found or not path:
            raise SerializationError(f"{what}: {str(e).removeprefix(_ROOT + ': ')}") from e.__cause__
        raise SerializationError(f"{what}: argument {signature.parameter(path)}: {reason}") from e.__cause__


def load_arguments(payload: Payload, fn: Callable[..., Any]) -> tuple[list[Any], dict[str, Any]]:
    """Positional and keyword arguments, converted by the function's annotations.

    JSON: a list holds positional arguments, an object keywords, null none.

    Raises:
        SerializationError: not readable, or not fitting; the message names the parameter.
    """
    signature = _signature(fn)
    args, kwargs, textual = _arguments(payload)
    try:
        signature.check(args, kwargs)
    except TypeError as e:
        raise SerializationError(f"the arguments do not fit: {e}") from e
    named = signature.by_position
    for i, value in enumerate(args):
        name, hint = named[i] if i < len(named) else signature.more or ("", Any)
        if hint is not Any and hint is not type(value):
            args[i] = _convert(value, hint, textual, f"{signature.name}(): argument {name!r}")
    for name, value in kwargs.items():
        hint = signature.by_name.get(name, signature.more_names or Any)
        if hint is not Any and hint is not type(value):
            kwargs[name] = _convert(value, hint, textual, f"{signature.name}(): argument {name!r}")
    return args, kwargs


def _arguments(payload: Payload) -> tuple[list[Any], dict[str, Any], bool]:
    value, textual = _raw(payload)
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


def fingerprint(step_name: str, payload: Payload) -> str:
    """16 hex digits that stand for a step and its input."""
    digest = blake2b(f"{step_name}\0{payload.content_type}\0".encode(), digest_size=8)
    digest.update(payload.data)
    return digest.hexdigest()
