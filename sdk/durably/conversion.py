"""Values that were read, made into what an annotation says: msgspec's conversions, and what they lack."""

from __future__ import annotations

import collections.abc
import dataclasses
import re
import sys
import types
from collections import Counter, OrderedDict, defaultdict
from enum import Enum, Flag
from functools import lru_cache, partial
from pathlib import PurePath
from types import SimpleNamespace
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Never,
    NoReturn,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

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
_ITERABLES = (collections.abc.Iterable, collections.abc.Container, collections.abc.Reversible)
_DICTS = (OrderedDict, defaultdict, Counter)
_DEFAULTS = (int, float, str, bytes, bool, list, dict, set, tuple)  # what a defaultdict of them makes by itself
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
            value, to, dec_hook=_CUSTOM[textual], str_keys=textual, builtin_types=None if textual else _BINARY
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


def _custom(cls: Any, value: Any, *, textual: bool) -> Any:
    """Classes that msgspec does not know."""
    origin, args = get_origin(cls) or cls, get_args(cls)
    if origin in _ITERABLES and args and type(value) in _SEQUENCES:
        return type(value)(convert(v, args[0], textual=textual, what=f"[{i}]") for i, v in enumerate(value))
    if origin in _DICTS and type(value) is dict:
        return _dict_of(origin, args, value, textual)
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


_CUSTOM = {textual: partial(_custom, textual=textual) for textual in (False, True)}


def _dict_of(kind: Any, args: tuple[Any, ...], value: dict[Any, Any], textual: bool) -> Any:
    if kind is Counter:
        args = (*args, int)
    if len(args) == 2:
        of: Any = dict
        value = convert(value, of[args], textual=textual, what="it")
    if kind is not defaultdict:
        return kind(value)
    made_of = get_origin(args[1]) or args[1] if args else None
    return defaultdict(made_of if made_of in _DEFAULTS else None, value)


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
    """Of the options that take the value the one that loses nothing of it; of several texts and numbers the first."""
    if type(value) in options and type(value) is not dict:  # which may be what a class travelled as
        return value
    misfits: list[str] = []
    fitting: list[tuple[Any, Any]] = []
    for option in options:
        try:
            converted = convert(value, option, textual=textual, what=what)
        except SerializationError as e:
            misfits.append(str(e))
            continue
        if not isinstance(value, dict | list | tuple | set | frozenset):
            return converted
        fitting.append((option, converted))
    if not fitting:
        raise SerializationError(f"{what} does not fit {shown(to)}: {'; '.join(misfits)}")
    kept = [(option, converted) for option, converted in fitting if _covers(option, value)]
    if len(kept) > 1:  # a class says more than a dict
        kept = [(option, converted) for option, converted in kept if _has_fields(option)] or kept[:1]
    if len(kept) > 1:  # we write all fields of a class, those that have defaults as well
        kept = [(option, converted) for option, converted in kept if _covers(option, value, exactly=True)] or kept
    if not kept and sum(map(_has_fields, options)) == 1:  # as it would, did it stand alone
        kept = fitting
    if not kept or any(not _same(converted, kept[0][1]) for _, converted in kept):
        fits = f"{' and '.join(shown(option) for option, _ in kept)} fit" if kept else "no option has all of its fields"
        raise SerializationError(
            f"{what} is ambiguous for {shown(to)}: {fits}; mark the classes @serializable, or give the Structs a tag"
        )
    return kept[0][1]


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b)


def _covers(hint: Any, value: Any, *, exactly: bool = False) -> bool:
    """Whether what an annotation makes of a value, which fits it, has a place for all that is in it.

    Args:
        hint: the annotation.
        value: what was read.
        exactly: and the value has all that there is a place for.
    """
    origin, args = get_origin(hint) or hint, get_args(hint)
    covers = partial(_covers, exactly=exactly)
    if origin is Annotated:
        return covers(args[0], value)
    if origin in (Union, types.UnionType):
        return any(covers(arg, value) for arg in args)
    if isinstance(value, dict):
        fields = _fields_of(origin)
        if fields is None:
            return len(args) != 2 or all(covers(args[1], item) for item in value.values())
        fits = value.keys() == fields.keys() if exactly else value.keys() <= fields.keys()
        return fits and all(covers(fields[key], item) for key, item in value.items())
    if isinstance(value, list | tuple | set | frozenset) and args:
        if origin is tuple and args[-1] is not Ellipsis:
            return all(map(covers, args, value))
        return all(covers(args[0], item) for item in value)
    return True


def _has_fields(hint: Any) -> bool:
    return _fields_of(get_origin(hint) or hint) is not None or any(map(_has_fields, get_args(hint)))


def _fields_of(cls: Any) -> dict[str, Any] | None:
    """The annotations of a class's fields, by the keys of the dict that it is made of; None: there are no such fields."""
    if not isinstance(cls, type):
        return None
    annotated: Any = cls
    if hasattr(cls, "model_fields"):  # pydantic's
        if annotated.model_config.get("extra") == "allow":
            return None
        aliased = [
            (name, field, (field.alias, field.validation_alias)) for name, field in annotated.model_fields.items()
        ]
        return {
            key: field.annotation for name, field, others in aliased for key in (name, *others) if isinstance(key, str)
        }
    if issubclass(cls, msgspec.Struct):
        tag = cls.__struct_config__.tag_field
        names = [
            *zip(cls.__struct_encode_fields__, cls.__struct_fields__, strict=True),
            *([] if tag is None else [(tag, "")]),
        ]
    elif dataclasses.is_dataclass(cls):
        names = [(field.name, field.name) for field in dataclasses.fields(cls)]
    elif hasattr(cls, "__attrs_attrs__"):
        names = [(attribute.name, attribute.name) for attribute in annotated.__attrs_attrs__]
    elif is_typeddict(cls):
        names = [(name, name) for name in hints_of(annotated)]
    else:
        return None
    hints = hints_of(annotated)
    return {key: hints.get(name, Any) for key, name in names}


@lru_cache(maxsize=4096)
def hints_of(obj: Any) -> dict[str, Any]:
    """Annotations, evaluated; one that cannot be (imported for type checkers only) is left out, the others stay."""
    try:
        hints = get_type_hints(obj, include_extras=True)
    except Exception:
        hints = {}
        for one in reversed(obj.__mro__) if isinstance(obj, type) else (obj,):
            hints |= _evaluated(one)
    return {name: Any if hint in (NoReturn, Never, object) else hint for name, hint in hints.items()}


def _evaluated(obj: Any) -> dict[str, Any]:
    """The annotations of a function, or of a class without those that it inherits; Any for one that cannot be evaluated."""
    hints: dict[str, Any] = {}
    module = sys.modules.get(getattr(obj, "__module__", ""))
    names = getattr(obj, "__globals__", None) or vars(module or types)
    own = vars(obj).get("__annotations__", {}) if isinstance(obj, type) else getattr(obj, "__annotations__", {})
    for name, annotation in own.items():
        try:
            one = SimpleNamespace(__annotations__={name: annotation})
            hints |= get_type_hints(one, names, include_extras=True)
        except Exception:
            hints[name] = Any
    return hints
