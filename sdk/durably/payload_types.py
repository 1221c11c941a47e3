"""Python values as msgpack, and back: which types travel, and the extension types of those that msgpack lacks.

What comes back is exactly what went in, for None, bool, int, float, str, bytes, list, dict, tuple, set, frozenset,
datetime, date, time, timedelta, Decimal, UUID and Path; for instances of `serializable` classes; for handles of streams
and runs, for steps and workflows; and for exceptions, as far as `durably.failures` goes. A bytearray becomes bytes, a
subclass its base, a dataclass (or msgspec Struct, attrs or pydantic object) a dict, an Enum its value.
"""

from __future__ import annotations

import dataclasses
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias
from uuid import UUID
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec
from msgspec.msgpack import Ext

from durably.authoring import StepDefinition, WorkflowDefinition, registry
from durably.errors import SerializationError
from durably.runtime import run_handle
from durably.serialization import Entry, by_class, entry_named, load_instance, unmarked_child
from durably.streams import Readable, Writable

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

DEPTH = 128
"""Levels of nesting; both coders recurse on the C stack."""
_REMEDY = (
    "pass plain data (numbers, texts, lists, dicts, dataclasses, …), mark its class @serializable, or pass the name by "
    "which a step can find the thing"
)

# The codes are part of the wire contract: never reuse one.
(
    _BIGINT, _TUPLE, _SET, _FROZENSET, _DATETIME, _DATE, _TIME, _TIMEDELTA, _DECIMAL, _UUID, _PAIRS, _WRITABLE,
    _READABLE, _RUN, _STEP, _WORKFLOW, _OBJECT, _CLASS, _EXCEPTION, _PATH, _ZONED, _ZONED_TIME,
) = range(1, 23)  # fmt: skip

_encode = msgspec.msgpack.Encoder().encode
_identity = object.__hash__  # id() raises an audit event, which costs more than all the rest
_AS_IS = frozenset({str, float, bool, type(None), bytes})
_KEYS = _AS_IS | {int}
_SIZED = (str, bytes, bytearray, memoryview)
_LOWEST, _HIGHEST = -(1 << 63), (1 << 64) - 1

_Seen = dict[int, Any]
"""The mutable things met so far, in that order, by identity. It holds them, so that no identity is given out twice."""
_Writer: TypeAlias = "Callable[[Any, _Seen, int], Any]"
"""Takes a value, what was met before it, and how deep it stands."""


class Unfit(Exception):
    """A value that cannot travel. The path to it is collected on the way up, innermost first."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        self.path: list[str] = []

    def where(self) -> str:
        """The path from the whole value to the part: ``[0]['name'].x``."""
        return "".join(reversed(self.path))


class _Twice(Unfit):
    """Something mutable that was met before, as the n-th such thing: at ``first``, or around itself."""

    def __init__(self, value: Any, seen: _Seen) -> None:
        super().__init__("appears twice")
        self.n = list(seen).index(_identity(value))
        self.first = ""
        self.within = False


class _Until(dict[int, Any]):
    """Stands in for what was seen, to find out where the n-th mutable thing stood."""

    def __init__(self, n: int) -> None:
        self._n = n

    def __setitem__(self, key: int, value: Any) -> None:
        if len(self) == self._n:
            raise Unfit("")
        super().__setitem__(key, value)


class Limit(dict[int, Any]):
    """For `write`: gives up on a value that is larger than there is room for, before it has been gone through.

    Args:
        most: bytes; a value that takes more may yet be written, where it consists of many small objects.

    Attributes:
        looked_at: how many items.
    """

    def __init__(self, most: int) -> None:
        self.looked_at = 0
        self._left = most

    def weigh(self, values: Collection[Any]) -> None:
        """Counts what a container is going to take at least. Raises `Unfit`."""
        self._left -= len(values)
        if self._left >= 0:
            self.looked_at += len(values)
            self._left -= sum(len(value) for value in values if isinstance(value, _SIZED))
        if self._left < 0:
            raise Unfit("is larger than there is room for")


def write(value: Any, limit: Limit | None = None) -> bytes:
    """The value as msgpack: equal values give equal bytes, dicts in the order of their items.

    Args:
        value: what is to be written.
        limit: how much of it; None: all of it.

    Raises:
        Unfit: a part of it cannot travel, contains itself, or is mutable and stands in two places; or it exceeds the
            limit, in which case the path to it may be missing.
        ValueError: as msgspec and the user's own methods say; and `TypeError`, `AttributeError` and the like.
    """
    if limit is not None:
        limit.weigh((value,))
        return _encode(_plain(value, limit, 1))
    try:
        return _encode(value if type(value) in _AS_IS else _plain(value, {}, 1))
    except _Twice as e:
        _find_first(value, e)
        raise
    except UnicodeEncodeError as e:
        misfit = Unfit(f"is a text that is not valid Unicode ({e}): use bytes for raw data")
        misfit.path.append(_find_text(value) or "")
        raise misfit from None


def _find_text(value: Any, depth: int = 0) -> str | None:
    """The path to the first text that UTF-8 cannot write, as far as plain containers lead to it."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return ""
    elif depth > DEPTH:
        return None
    elif isinstance(value, dict):
        for key, item in value.items():
            if (path := _find_text(item, depth + 1)) is not None:
                return f"[{key!r:.60}]{path}"
    elif isinstance(value, list | tuple):
        for n, item in enumerate(value):
            if (path := _find_text(item, depth + 1)) is not None:
                return f"[{n}]{path}"
    return None


def refusal(e: Exception, what: str, parameter: Callable[[str], str] | None = None) -> SerializationError:
    """The error for what `write` raised.

    Args:
        e: that.
        what: the value's name.
        parameter: where the value was ``[args, kwargs]``: what a path in it means, in terms of the parameters.
    """
    if isinstance(e, Unfit):
        path, reason = e.where(), e.reason
        if isinstance(e, _Twice):
            first = parameter(e.first) if parameter is not None and e.first else e.first
            reason = (
                f"contains itself; {_REMEDY}"
                if e.within
                else f"appears twice, first at {first or 'a place that cannot be told'}; each would arrive as a copy of "
                f"its own: pass a copy"
            )
        else:
            reason = f"{reason}; {_REMEDY}"
        if parameter is None or not path:
            return SerializationError(f"{what}{path}: {reason}")
        return SerializationError(f"{what}: argument {parameter(path)}: {reason}")
    return SerializationError(f"{what}: {type(e).__name__}: {e}; {_REMEDY}")


def _find_first(value: Any, again: _Twice) -> None:
    try:
        _plain(value, _Until(again.n), 1)
    except Unfit as first:
        again.first = first.where()
        # A container that holds itself is met within itself.
        again.within = first.path == again.path[len(again.path) - len(first.path) :]


def _plain(value: Any, seen: _Seen, depth: int) -> Any:
    """The value in terms of what msgpack has."""
    kind = type(value)
    if kind in _AS_IS:
        return value
    if kind is int:
        return value if _LOWEST <= value <= _HIGHEST else _bigint(value)
    known = _EXACT.get(kind)
    if known is not None:
        return known(value, seen, depth)
    return _other(value, seen, depth)


def _bigint(value: int) -> Ext:
    return Ext(_BIGINT, value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True))


def _enter(value: Any, seen: _Seen) -> None:
    identity = _identity(value)
    if identity in seen:
        raise _Twice(value, seen)
    seen[identity] = value


def _items(value: Collection[Any], seen: _Seen, depth: int, each: _Writer = _plain) -> list[Any]:
    if type(seen) is Limit:
        seen.weigh(value)
    if depth > DEPTH:
        raise Unfit(f"is nested deeper than {DEPTH} levels")
    out: list[Any] = []
    depth += 1
    try:
        for item in value:
            kind = type(item)
            if kind in _AS_IS or (kind is int and _LOWEST <= item <= _HIGHEST):
                out.append(item)
            else:
                out.append(each(item, seen, depth))
    except Unfit as e:
        e.path.append(f"[{len(out)}]")
        raise
    return out


def _list(value: list[Any], seen: _Seen, depth: int) -> list[Any]:
    identity = _identity(value)  # _enter, written out where it is called most
    if identity in seen:
        raise _Twice(value, seen)
    seen[identity] = value
    return _items(value, seen, depth)


def _mapping(value: Mapping[Any, Any], seen: _Seen, depth: int) -> Any:
    identity = _identity(value)
    if identity in seen:
        raise _Twice(value, seen)
    seen[identity] = value
    if depth > DEPTH:
        raise Unfit(f"is nested deeper than {DEPTH} levels")
    if type(seen) is Limit:
        seen.weigh(value)
        seen.weigh(value.values())
    out: dict[Any, Any] = {}
    key: Any = None
    depth += 1
    items = iter(value.items())
    try:
        for key, item in items:
            if type(key) is not str and (type(key) not in _KEYS or _is_big(key)):
                break
            kind = type(item)
            if kind in _AS_IS or (kind is int and _LOWEST <= item <= _HIGHEST):
                out[key] = item
            else:
                out[key] = _plain(item, seen, depth)
        else:
            return out
    except Unfit as e:
        e.path.append(f"[{key!r:.60}]")
        raise
    return _pairs(out, chain(((key, item),), items), seen, depth)


def _is_big(key: Any) -> bool:
    return type(key) is int and not _LOWEST <= key <= _HIGHEST


def _pairs(done: dict[Any, Any], rest: Iterable[tuple[Any, Any]], seen: _Seen, depth: int) -> Ext:
    """A mapping with keys that msgpack has no form for that would stay hashable; the items before the first are done."""
    out = list(done.items())
    key: Any = None
    try:
        for key, item in rest:
            out.append((_hashable(key, seen, depth), _plain(item, seen, depth)))
    except Unfit as e:
        e.path.append(f"[{key!r:.60}]")
        raise
    return Ext(_PAIRS, _encode(out))


def _set(value: set[Any], seen: _Seen, depth: int) -> Ext:
    _enter(value, seen)
    return Ext(_SET, _members(value, seen, depth))


def _members(value: Collection[Any], seen: _Seen, depth: int) -> bytes:
    # Sorted by their bytes, so that equal sets have equal bytes whatever the hash seed.
    return _encode([msgspec.Raw(b) for b in sorted(map(_encode, _items(value, seen, depth, _hashable)))])


def _tuple(value: tuple[Any, ...], seen: _Seen, depth: int) -> Ext:
    return Ext(_TUPLE, _encode(_items(value, seen, depth)))


def _hashable(value: Any, seen: _Seen, depth: int) -> Any:
    """As `_plain`, for a key or a member of a set: it must come back as something that hashes."""
    cls: Any = type(value)
    if isinstance(value, Enum) and cls not in by_class:
        return _hashable(value.value, {}, depth)
    if isinstance(value, tuple) and _writer_of(cls, len(by_class)) is _tuple:
        return Ext(_TUPLE, _encode(_items(value, seen, depth, _hashable)))
    plain = _plain(value, seen, depth)
    if isinstance(plain, dict | list):
        raise Unfit(
            f"{value!r:.100} of {cls!r} would come back as a {type(plain).__name__}, which can be no key and no member of "
            f"a set"
        )
    return plain


def _datetime(value: datetime, _: _Seen, __: int) -> Ext:
    zone = value.tzinfo
    key = zone.key if isinstance(zone, ZoneInfo) else None
    if key is None and not value.fold:
        return Ext(_DATETIME, value.isoformat().encode())
    return Ext(_ZONED, _encode([(value if key is None else value.replace(tzinfo=None)).isoformat(), key, value.fold]))


def _time(value: time, _: _Seen, __: int) -> Ext:
    zone = value.tzinfo
    key = zone.key if isinstance(zone, ZoneInfo) else None
    if key is None and zone is not None and value.utcoffset() is None:
        raise Unfit(f"{value!r:.100} has a zone without a name, whose offset depends on the date")
    if key is None and not value.fold:
        return Ext(_TIME, value.isoformat().encode())
    text = (value if key is None else value.replace(tzinfo=None)).isoformat()
    return Ext(_ZONED_TIME, _encode([text, key, value.fold]))


def _path(value: PurePath, _: _Seen, __: int) -> Ext:
    kind = "here" if isinstance(value, Path) else "windows" if isinstance(value, PureWindowsPath) else "posix"
    return Ext(_PATH, _encode([kind, str(value)]))


def _other(value: Any, seen: _Seen, depth: int) -> Any:
    """Objects of other classes, and subclasses of the built-in ones."""
    cls: Any = type(value)
    return _writer_of(cls, len(by_class))(value, seen, depth)


@lru_cache(maxsize=1024)
def _writer_of(cls: type[Any], _: int) -> _Writer:
    """How instances of a class travel; worked out anew when more classes are marked serializable."""
    handle = _handle_of(cls)
    if handle is not None:
        return handle
    write = _object_of(cls)
    if write is not None:
        return write if _is_immutable(cls) else _entered(write)
    for kind, convert in _BASES:
        if issubclass(cls, kind):
            return convert
    return _refused


def _refused(value: Any, _: _Seen, __: int) -> NoReturn:
    raise Unfit(f"{value!r:.100} of {type(value)!r} cannot travel")


def _entered(write: _Writer) -> _Writer:
    def enter(value: Any, seen: _Seen, depth: int) -> Any:
        _enter(value, seen)
        return write(value, seen, depth)

    return enter


def _is_immutable(cls: type[Any]) -> bool:
    # What hashes by value is a value. A Struct has a __hash__ also where calling it raises.
    if issubclass(cls, msgspec.Struct):
        return cls.__struct_config__.frozen
    hashed: object = cls.__hash__
    return hashed is not None and hashed is not object.__hash__


def _handle_of(cls: type[Any]) -> _Writer | None:
    """For what stays where it is, and is found again by its name."""
    if issubclass(cls, Writable | Readable):
        code = _WRITABLE if issubclass(cls, Writable) else _READABLE
        return lambda value, _, __: Ext(code, _encode([value.run_id, value.namespace]))
    if getattr(cls, "__durably_run_handle__", False):
        return _text(_RUN, lambda run: str(run.id))
    if issubclass(cls, WorkflowDefinition):
        return _text(_WORKFLOW, lambda workflow: str(workflow.name))
    if issubclass(cls, StepDefinition):
        return lambda step, _, __: Ext(_STEP, _encode([step.name, _options(step)]))
    return _class if issubclass(cls, type) else None


def _object_of(cls: type[Any]) -> _Writer | None:
    """For what is more than a value of a built-in type."""
    entry = by_class.get(cls)
    if entry is not None:
        return partial(_instance, entry)
    base = unmarked_child(cls)
    if base is not None:
        raise Unfit(
            f"is of {cls!r}, which derives from the serializable {base.__qualname__}, and would come back as something "
            f"else: mark it @serializable, too"
        )
    if issubclass(cls, Enum):
        # What a member holds is no part of the value: all its uses share it.
        return lambda member, _, depth: _plain(member.value, {}, depth)
    if issubclass(cls, BaseException):
        return _exception
    if issubclass(cls, msgspec.Struct):
        return partial(_struct, tuple(zip(cls.__struct_fields__, cls.__struct_encode_fields__, strict=True)))
    if dataclasses.is_dataclass(cls):
        return partial(_fields, tuple((f.name, f.name) for f in dataclasses.fields(cls)))
    if hasattr(cls, "__attrs_attrs__"):
        return partial(_fields, tuple((a.name, a.name) for a in cls.__attrs_attrs__))
    if hasattr(cls, "model_dump"):  # pydantic's
        return lambda model, seen, depth: _plain(model.model_dump(round_trip=True), seen, depth)
    return None


def _fields(pairs: Iterable[tuple[str, str]], value: Any, seen: _Seen, depth: int) -> dict[str, Any]:
    if depth > DEPTH:
        raise Unfit(f"is nested deeper than {DEPTH} levels")
    out: dict[str, Any] = {}
    attribute = ""
    try:
        for attribute, name in pairs:
            out[name] = _plain(getattr(value, attribute), seen, depth + 1)
    except Unfit as e:
        e.path.append(f".{attribute}")
        raise
    if type(seen) is Limit:
        seen.weigh(out.values())
    return out


def _struct(pairs: Iterable[tuple[str, str]], value: msgspec.Struct, seen: _Seen, depth: int) -> Any:
    config = value.__struct_config__
    out = _fields(pairs, value, seen, depth)
    if config.tag_field is not None:
        out = {config.tag_field: config.tag, **out}
    return list(out.values()) if config.array_like else out


def _exception(value: BaseException, _: _Seen, __: int) -> Ext:
    from durably import failures  # which in turn writes what exceptions hold

    return Ext(_EXCEPTION, _encode(failures.as_value(value)))


def _instance(entry: Entry, value: Any, seen: _Seen, depth: int) -> Ext:
    if entry.fields is not None:
        return Ext(_OBJECT, _encode([entry.name, _fields(entry.fields, value, seen, depth)]))
    assert entry.dump is not None
    if depth > DEPTH:
        raise Unfit(f"is nested deeper than {DEPTH} levels")
    # Again, what a member of an Enum holds is no part of the value.
    plain = _plain(entry.dump(value), {} if isinstance(value, Enum) else seen, depth + 1)
    return Ext(_OBJECT, _encode([entry.name, plain]))


def _class(value: type[Any], _: _Seen, __: int) -> Ext:
    entry = by_class.get(value)
    if entry is None:
        raise Unfit(f"is {value!r}: a class travels only when it is marked @serializable")
    return Ext(_CLASS, entry.name.encode())


_OPTIONS = ("queue", "max_retries", "timeout_ms", "backoff")


def _options(step: StepDefinition[..., Any]) -> dict[str, Any]:
    """In what a step differs from the registered one, by its `options`."""
    plain = registry.steps.get(step.name, step)
    changed = {name: getattr(step, name) for name in _OPTIONS if getattr(step, name) != getattr(plain, name)}
    if "backoff" in changed:
        changed["backoff"] = msgspec.to_builtins(changed["backoff"])
    return changed


def _text(code: int, text: Callable[[Any], str]) -> _Writer:
    return lambda value, _, __: Ext(code, text(value).encode())


_EXACT: dict[type, _Writer] = {
    list: _list,
    dict: _mapping,
    tuple: _tuple,
    set: _set,
    frozenset: lambda value, seen, depth: Ext(_FROZENSET, _members(value, seen, depth)),
    datetime: _datetime,
    date: _text(_DATE, date.isoformat),
    time: _time,
    timedelta: lambda value, _, __: Ext(_TIMEDELTA, _encode([value.days, value.seconds, value.microseconds])),
    Decimal: _text(_DECIMAL, str),
    UUID: lambda value, _, __: Ext(_UUID, value.bytes),
    bytearray: lambda value, _, __: bytes(value),
    memoryview: lambda value, _, __: bytes(value),
}
_BASES: tuple[tuple[type, _Writer], ...] = (  # a datetime is a date: the order matters
    (str, lambda value, _, __: str.__str__(value)),
    (int, lambda value, seen, depth: _plain(int.__int__(value), seen, depth)),
    (float, lambda value, _, __: float.__float__(value)),
    (bytes, lambda value, _, __: bytes(value)),
    (PurePath, _path),
    *_EXACT.items(),
)


def _read_zoned(data: memoryview) -> datetime:
    text, key, fold = read(data)
    value = datetime.fromisoformat(text).replace(fold=fold)
    return value if key is None else value.replace(tzinfo=_zone(key))


def _read_zoned_time(data: memoryview) -> time:
    text, key, fold = read(data)
    value = time.fromisoformat(text).replace(fold=fold)
    return value if key is None else value.replace(tzinfo=_zone(key))


def _zone(key: str) -> ZoneInfo:
    try:
        return ZoneInfo(key)
    except ZoneInfoNotFoundError as e:
        raise SerializationError(
            f"time zone {key!r} is unknown here: install the system's time zones, or the package tzdata"
        ) from e


_PATHS: dict[str, type[PurePath]] = {"here": Path, "posix": PurePosixPath, "windows": PureWindowsPath}


def _read_path(data: memoryview) -> PurePath:
    kind, text = read(data)
    return _PATHS[kind](text)


def _read_texts(data: memoryview) -> tuple[str, str]:
    return msgspec.msgpack.decode(data, type=tuple[str, str])


def _read_step(data: memoryview) -> StepDefinition[..., Any]:
    name, options = read(data)
    step = registry.steps.get(name)
    if step is None:
        raise SerializationError(f"no step named {name!r} is registered here: load the module that defines it, too")
    if not isinstance(options, dict):
        raise SerializationError(f"the options of step {name!r} are {options!r:.100}")
    if "backoff" in options:
        options["backoff"] = msgspec.convert(options["backoff"], type(step.backoff))
    return dataclasses.replace(step, **{key: options[key] for key in _OPTIONS if key in options}) if options else step


def _read_workflow(data: memoryview) -> WorkflowDefinition[..., Any]:
    name = str(data, "utf-8")
    workflow = registry.workflows.get(name)
    if workflow is None:
        raise SerializationError(f"no workflow named {name!r} is registered here: load the module that defines it, too")
    return workflow


def _read_exception(data: memoryview) -> BaseException:
    from durably import failures  # as above

    return failures.retold(msgspec.msgpack.decode(data, type=failures.Told))


_READERS: dict[int, Callable[[memoryview], Any]] = {
    _BIGINT: lambda data: int.from_bytes(data, "big", signed=True),
    _TUPLE: lambda data: tuple(read(data)),
    _SET: lambda data: set(read(data)),
    _FROZENSET: lambda data: frozenset(read(data)),
    _DATETIME: lambda data: datetime.fromisoformat(str(data, "ascii")),
    _DATE: lambda data: date.fromisoformat(str(data, "ascii")),
    _TIME: lambda data: time.fromisoformat(str(data, "ascii")),
    _TIMEDELTA: lambda data: timedelta(*read(data)),
    _DECIMAL: lambda data: Decimal(str(data, "ascii")),
    _UUID: lambda data: UUID(bytes=bytes(data)),
    _PAIRS: lambda data: dict(read(data)),
    _WRITABLE: lambda data: Writable(*_read_texts(data)),
    _READABLE: lambda data: Readable(*_read_texts(data)),
    _RUN: lambda data: run_handle(str(data, "utf-8")),
    _STEP: _read_step,
    _WORKFLOW: _read_workflow,
    _OBJECT: lambda data: load_instance(*read(data)),
    _CLASS: lambda data: entry_named(str(data, "utf-8")).cls,
    _EXCEPTION: _read_exception,
    _PATH: _read_path,
    _ZONED: _read_zoned,
    _ZONED_TIME: _read_zoned_time,
}


def _extension(code: int, data: memoryview) -> Any:
    reader = _READERS.get(code)
    if reader is None:
        raise SerializationError(f"msgpack extension type {code} is unknown here: it was written by a newer version")
    return reader(data)


read: Callable[[bytes | memoryview], Any] = msgspec.msgpack.Decoder(ext_hook=_extension).decode
"""The value of bytes that `write` made. Raises whatever there is to raise: they may come from anywhere."""
