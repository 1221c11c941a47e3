"""Classes whose instances come back as what they were, with no annotation: `serializable`, and what it registers."""

from __future__ import annotations

import dataclasses
import inspect
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, overload

import msgspec

from durably.conversion import convert, hints_of, validate
from durably.errors import DeterminismError, RegistrationError, SerializationError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

C = TypeVar("C", bound=type[Any])

DUMP, LOAD = "__durably_dump__", "__durably_load__"


class Entry(NamedTuple):
    """How instances of one class travel.

    Attributes:
        name: what the class is known by on the wire.
        cls: the class.
        fields: (attribute, name on the wire) of each field; None where ``dump`` says what travels instead.
        dump: from an instance to a value that can travel.
        load: from that value, or from the fields by name, to an instance.
    """

    name: str
    cls: type[Any]
    fields: tuple[tuple[str, str], ...] | None
    dump: Callable[[Any], Any] | None
    load: Callable[[Any], Any]


by_class: dict[type[Any], Entry] = {}
_by_name: dict[str, Entry] = {}


@overload
def serializable(cls: C, /) -> C: ...
@overload
def serializable(*, name: str | None = None) -> Callable[[C], C]: ...
def serializable(cls: type[Any] | None = None, /, *, name: str | None = None) -> Any:
    """Marks a class: its instances come back from payloads as instances of it, wherever in a value they stand.

    A dataclass, msgspec Struct, attrs class, pydantic model or Enum needs nothing else. Any other class has a method
    ``__durably_dump__(self)``, which returns a value that can travel, and a classmethod ``__durably_load__(cls, data)``,
    which makes the instance of it. Only processes that have imported the class can read its instances: nothing is
    imported on the word of a payload.

    Args:
        cls: the class; `serializable` stands above ``@dataclass`` and the like.
        name: what it is known by in payloads; ``module:qualname`` by default. A name of its own lets a class move.

    Raises:
        RegistrationError: the name is another class's, or it cannot be seen how instances are to travel.
    """

    def register(cls: type[Any]) -> type[Any]:
        entry = _entry(cls, _name(cls, name))
        other = _by_name.get(entry.name)
        if other is not None and _place(other.cls) != _place(cls):
            raise RegistrationError(
                f"two serializable classes are named {entry.name!r}: {_place(other.cls)} and {_place(cls)}; "
                f"give one of them another name="
            )
        _by_name[entry.name] = by_class[cls] = entry
        return cls

    return register if cls is None else register(cls)


def entry_named(name: str) -> Entry:
    """The class of this name. Raises `SerializationError`, saying what to do, where no imported module has marked it."""
    entry = _by_name.get(name)
    if entry is None:
        remedy = (
            "it was marked in a file that ran as a script: give it a name=, or move it to a module that both import"
            if name.startswith("__main__:")
            else "import the module that defines it in this process, too"
        )
        raise SerializationError(f"serializable class {name!r} is unknown here: {remedy}")
    return entry


def unmarked_child(cls: type[Any]) -> type[Any] | None:
    """The marked class that this one, which is not marked itself, derives from."""
    return next((base for base in cls.__mro__[1:] if base in by_class), None)


def load_instance(name: str, data: Any) -> Any:
    """An instance of a marked class, from what it travelled as. Raises `SerializationError`."""
    entry = entry_named(name)
    try:
        return entry.load(data)
    except (SerializationError, DeterminismError):
        raise
    except Exception as e:  # constructors and load methods are the user's
        raise SerializationError(
            f"an instance of {name} cannot be made of what was written: {type(e).__name__}: {e}; "
            f"fields that are added need a default, and those that are removed a {LOAD} that leaves them out"
        ) from e


def _place(cls: type[Any]) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _name(cls: type[Any], name: str | None) -> str:
    if not isinstance(cls, type):
        raise RegistrationError(f"{cls!r:.100} is no class: serializable marks classes")
    if name is None:
        return _place(cls)
    if not isinstance(name, str) or not name:
        raise RegistrationError(f"{_place(cls)}: name={name!r} must be a text that is not empty")
    return name


def _entry(cls: type[Any], name: str) -> Entry:
    has = [method for method in (DUMP, LOAD) if hasattr(cls, method)]
    if len(has) == 1:
        raise RegistrationError(f"{_place(cls)} has {has[0]} and not its counterpart: define both {DUMP} and {LOAD}")
    if has:
        return Entry(name, cls, None, getattr(cls, DUMP), getattr(cls, LOAD))
    if issubclass(cls, Enum):
        return Entry(name, cls, None, lambda member: member.value, cls)
    if hasattr(cls, "model_validate"):  # pydantic's
        return Entry(name, cls, None, lambda model: model.model_dump(round_trip=True), lambda data: validate(cls, data))
    if issubclass(cls, msgspec.Struct):
        names = cls.__struct_fields__
        return _of_fields(cls, name, {n: n for n in names}, set(names))
    if dataclasses.is_dataclass(cls):
        fields = dataclasses.fields(cls)
        return _of_fields(cls, name, {f.name: f.name for f in fields}, {f.name for f in fields if f.init})
    if "__attrs_attrs__" in vars(cls):
        attributes = cls.__attrs_attrs__
        keys = {a.name: a.alias or a.name for a in attributes}
        return _of_fields(cls, name, keys, {a.name for a in attributes if a.init})
    raise RegistrationError(
        f"{_place(cls)} is no dataclass, Struct, attrs class, pydantic model or Enum: put @serializable above the "
        f"decorator that makes it one, or define {DUMP} and {LOAD}"
    )


def _of_fields(cls: type[Any], name: str, keys: Mapping[str, str], given: set[str]) -> Entry:
    """The entry of a class that is made of its fields.

    Args:
        cls: the class.
        name: its name on the wire.
        keys: from each attribute to the parameter of the constructor.
        given: the attributes that the constructor takes; the others are set afterwards.
    """
    parameters = inspect.signature(cls).parameters.values()
    takes = {keys[attribute] for attribute in given}
    needs = {p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
    odd = (needs - takes) | (set() if open_ended else takes - {p.name for p in parameters})
    if odd:
        raise RegistrationError(
            f"{_place(cls)} cannot be made of its fields, because of {', '.join(sorted(odd))}: define {DUMP} and {LOAD}"
        )
    later = {keys[attribute]: attribute for attribute in keys.keys() - given}
    attributes = {key: attribute for attribute, key in keys.items()}
    annotated: Any = cls

    def load(data: dict[str, Any]) -> Any:
        hints = hints_of(annotated)
        fields = {}
        for key, value in data.items():
            hint = hints.get(attributes.get(key, key), Any)
            fields[key] = convert(value, hint, textual=False, what=f"{name}.{key}")
        made = cls(**{key: value for key, value in fields.items() if key not in later})
        for key in later.keys() & fields.keys():
            object.__setattr__(made, later[key], fields[key])  # also where the class is frozen
        return made

    return Entry(name, cls, tuple(keys.items()), None, load)
