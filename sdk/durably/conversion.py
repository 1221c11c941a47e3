"""Values that were read, made into what an annotation says: msgspec's conversions, and what they lack."""

from __future__ import annotations

import collections.abc
import re
import sys
import types
from enum import Enum, Flag
from functools import lru_cache
from pathlib import PurePath
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, Never, NoReturn, Union, get_args, get_origin, get_type_hints

import msgspec

from durably.errors import SerializationError

if TYPE_CHECKING:
    from collections.abc import Callable

_SEQUENCES: dict[Any, Callable[[list[Any]], Any]] = {
    list: list,
    set: set,
    frozenset: frozenset,
    tuple: tuple,
    collections.abc.Sequence: list,
    collections.abc.Set: set,
}
_STREAMED = (
    collections.abc.Iterator, collections.abc.Generator, collections.abc.AsyncIterator, collections.abc.AsyncGenerator,
)  # fmt: skip
_MAPPINGS = (dict, collections.abc.Mapping)
_BINARY = (bytes, bytearray)  # msgpack has these; a text that stands where they should is a mistake, and not base64


def convert(value: Any, to: Any, *, textual: bool, what: str) -> Any:
    """The value as the type that is asked for.

    Args:
        value: what was read.
        to: any type that msgspec knows; a pydantic model, a path, a class of the user's; containers and unions of these.
        textual: it was JSON: keys are texts, and bytes base64.
        what: its name in messages.

    Raises:
        SerializationError: it does not fit; names the path to the misfit.
    """
    if to is Any:
        return value
    try:
        return msgspec.convert(
            value, to, dec_hook=_custom, str_keys=textual, builtin_types=None if textual else _BINARY
        )
    except TypeError as e:  # msgspec does not take the annotation
        return _in_parts(value, to, textual, what, e)
    except Exception as e:  # a validator of the user's may raise anything
        if _is_beyond_msgspec(to):
            return _in_parts(value, to, textual, what, e)
        message, found, path = str(e).rpartition(" - at `$")
        if not found:
            message, path = str(e), ""
        raise SerializationError(f"{what}{path.removesuffix('`')} does not fit {shown(to)}: {message}") from e


def shown(annotation: Any) -> str:
    """An annotation as it is written, its classes without their modules."""
    if isinstance(annotation, type) and not get_args(annotation):
        return annotation.__qualname__
    return _MODULES.sub("", str(annotation))


_MODULES = re.compile(r"(?<!['\"\w.])(?:[\w<>]+\.)+(?=\w)")  # but not within a Literal


def validate(cls: type[Any], value: Any) -> Any:
    """A pydantic model, of data whose keys are field names (as we write them) or aliases (as others do)."""
    return cls.model_validate(value, by_name=True, by_alias=True)


def _custom(cls: Any, value: Any) -> Any:
    """Classes that msgspec does not know."""
    origin = get_origin(cls) or cls
    try:
        if isinstance(value, origin):
            return value
    except TypeError:  # a protocol, or something else that nothing can be held against
        return value
    if origin in _STREAMED and isinstance(value, collections.abc.AsyncIterable):
        return value  # the handle of a stream, which is read in its own way
    if hasattr(cls, "__durably_load__"):
        return cls.__durably_load__(value)
    if hasattr(cls, "model_validate"):  # pydantic's
        return validate(cls, value)
    if isinstance(origin, type) and issubclass(origin, PurePath) and isinstance(value, str):
        return origin(value)
    raise ValueError(f"expected {shown(cls)}, got {type(value).__name__}")


def _is_handle(cls: Any) -> bool:
    # Of a run. Which class that has depends on where it is read, and not on the annotation.
    return hasattr(get_origin(cls) or cls, "__durably_run_handle__")


def _is_beyond_msgspec(annotation: Any) -> bool:
    # It takes a combination of flags for no instance of its class.
    flag = isinstance(annotation, type) and issubclass(annotation, Flag)
    return flag or _is_handle(annotation) or any(map(_is_beyond_msgspec, get_args(annotation)))


def _in_parts(value: Any, to: Any, textual: bool, what: str, fault: Exception) -> Any:
    """What msgspec cannot convert as a whole: in it is a union that it does not tell apart, an odd Enum, or a handle."""
    origin, args = get_origin(to), get_args(to)
    if _is_handle(to):
        if not _is_handle(type(value)):
            raise SerializationError(f"{what} does not fit {shown(to)}: got {type(value).__name__}") from fault
        return value
    if isinstance(to, type) and issubclass(to, Enum):
        return _member(value, to, what)
    if origin is Annotated:
        return convert(value, args[0], textual=textual, what=what)
    if origin in (Union, types.UnionType):
        return _of_union(value, to, args, textual, what)
    if origin in _SEQUENCES and isinstance(value, list | tuple | set | frozenset):
        if origin is not tuple or args[-1] is Ellipsis:
            args = (args[0],) * len(value)
        elif len(args) != len(value):
            raise SerializationError(f"{what} does not fit {shown(to)}: it has {len(value)} items") from fault
        parts = enumerate(zip(value, args, strict=True))
        return _SEQUENCES[origin]([convert(v, hint, textual=textual, what=f"{what}[{i}]") for i, (v, hint) in parts])
    if origin in _MAPPINGS and isinstance(value, dict):
        return {
            convert(k, args[0], textual=textual, what=f"a key of {what}"): convert(
                v, args[1], textual=textual, what=f"{what}[{k!r:.60}]"
            )
            for k, v in value.items()
        }
    if origin in _SEQUENCES or origin in _MAPPINGS:
        raise SerializationError(f"{what} does not fit {shown(to)}: got {type(value).__name__}") from fault
    raise SerializationError(
        f"{what} cannot be converted to {shown(to)}: {fault}; annotate it as Any to take it as it is"
    ) from fault


def _member(value: Any, of: type[Enum], what: str) -> Enum:
    """Of an Enum whose values are not all texts or all integers, or of a Flag."""
    try:
        return value if isinstance(value, of) else of(value)
    except ValueError as e:
        raise SerializationError(f"{what} does not fit {shown(of)}: {e}") from e


def _of_union(value: Any, to: Any, options: tuple[Any, ...], textual: bool, what: str) -> Any:
    if type(value) in options:
        return value
    misfits = []
    for option in options:
        try:
            return convert(value, option, textual=textual, what=what)
        except SerializationError as e:
            misfits.append(str(e))
    raise SerializationError(f"{what} does not fit {shown(to)}: {'; '.join(misfits)}")


@lru_cache(maxsize=4096)
def hints_of(obj: Any) -> dict[str, Any]:
    """Annotations, evaluated; one that cannot be (imported for type checkers only) is left out, the others stay."""
    try:
        hints = get_type_hints(obj, include_extras=True)
    except Exception:
        hints = {}
        module = sys.modules.get(getattr(obj, "__module__", ""))
        names = getattr(obj, "__globals__", None) or vars(module or types)
        for name, annotation in getattr(obj, "__annotations__", {}).items():
            try:
                one = SimpleNamespace(__annotations__={name: annotation})
                hints |= get_type_hints(one, names, include_extras=True)
            except Exception:
                hints[name] = Any
    return {name: Any if hint in (NoReturn, Never, object) else hint for name, hint in hints.items()}
