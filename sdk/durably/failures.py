"""Exceptions as data, and back: in the records of failures, and as values among others.

An exception comes back as its own class where an imported module has that and it can be rebuilt, with its arguments, its
attributes as far as they can travel, its notes, its causes and, for a group, its members. Else it is a `StepError`.
"""

from __future__ import annotations

import builtins
import sys
import traceback
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from durably_schemas.records import Error, Payload

from durably import payload_codec, payload_types, payloads
from durably.errors import StepError

if TYPE_CHECKING:
    from types import ModuleType

CAUSES = 8
"""How long a chain of causes is recorded, and how deep groups are."""
MEMBERS = 64
"""How many members of one group are."""
TRACEBACK = 16_384
"""Characters of a traceback that are; of a group's member, a quarter of that."""
MESSAGE = 16_384
DATA = 65_536
"""Bytes of arguments, attributes, notes and members together; what does not fit is left out."""
HIDDEN = "(encrypted)"
"""The message in a record whose payloads are encrypted; the real one is among them."""

_OURS = [str(Path(__file__).parent)]
_LEAST = 200  # characters of a message that are recorded whatever the room
# Python gives these a meaning of its own where they pass through a coroutine or a future.
_UNRAISABLE = (StopIteration, StopAsyncIteration)
_GROUPS = ("builtins:ExceptionGroup", "builtins:BaseExceptionGroup")


class Told(msgspec.Struct, omit_defaults=True):
    """An exception as it travels among values, and, but for its type and cause, in the data of an `Error`.

    Attributes:
        type: ``module:qualname``.
        message: what ``str`` gives.
        traceback: its frames as text, where it was raised.
        args: its ``args``, as msgpack; None: they cannot travel. Of a group: its message alone.
        made_of: what its ``__reduce__`` calls the class with, where that is not ``args``; as msgpack.
        attributes: what else it holds, by name; each as msgpack of its own, so that one that cannot be read where it
            arrives takes nothing else with it.
        notes: its notes.
        members: of a group.
        cause: what it came from.
    """

    type: str = ""
    message: str = ""
    traceback: str | None = None
    args: bytes | None = None
    made_of: bytes | None = None
    attributes: dict[str, bytes] = {}
    notes: list[str] = []
    members: list[Told] = []
    cause: Told | None = None


class _Room:
    """What is left of the bytes that one exception, with all its causes and members, may take."""

    def __init__(self) -> None:
        self._left = DATA

    def packed(self, value: Any) -> bytes | None:
        try:
            data = payload_types.write(value)
        except Exception:  # it cannot travel, for whatever reason
            return None
        return data if self._take(len(data)) else None

    def text(self, text: str, least: int = 0) -> str | None:
        if self._take(len(text)):
            return text
        return text[:least] if least else None

    def _take(self, size: int) -> bool:
        if size > self._left:
            return False
        self._left -= size
        return True


def to_error(exc: BaseException) -> Error:
    """An exception as it is recorded. Never raises; where payloads are encrypted, so are message and traceback."""
    return _error(tell(exc))


def to_exception(error: Error) -> BaseException:
    """The exception that an error records, as its own class where that is at hand, else a `StepError`.

    A class is at hand when an already imported module has it: nothing is imported on the word of a record.
    """
    return retold(_told(error))


def leave_out(folder: Path) -> None:
    """Frames of code in this folder are not the user's: tracebacks do without them."""
    _OURS.append(str(folder))


def revealed(error: Error) -> Error:
    """The same error with its message and traceback, and its causes', in clear, where this process can read them."""
    told = _told(error)
    cause = None if error.cause is None else revealed(error.cause)
    return msgspec.structs.replace(error, message=told.message, traceback=told.traceback, cause=cause)


def summed_up(error: Error) -> str:
    """``ValueError: what it said``, in clear where this process can read it."""
    return f"{error.type.rpartition(':')[2]}: {revealed(error).message}".rstrip(": ")


def add_note(exc: BaseException, note: str) -> None:
    """As ``exc.add_note(note)``, also where the exception is a frozen dataclass, which refuses that."""
    try:
        exc.add_note(note)
    except Exception:
        exc.__dict__.setdefault("__notes__", []).append(note)


# -- there -------------------------------------------------------------------------------------------------------------


def tell(exc: BaseException) -> Told:
    """An exception as data, within the bounds of this module."""
    return _tell(exc, _Room(), ())


def _tell(exc: BaseException, room: _Room, around: tuple[BaseException, ...]) -> Told:
    group = exc if isinstance(exc, BaseExceptionGroup) else None
    message = _message(exc)
    told = Told(
        type=f"{type(exc).__module__}:{type(exc).__qualname__}",
        # The bounds of the exception itself hold for message and traceback; its members' count against the room.
        message=message if not around else room.text(message, least=_LEAST) or "",
        traceback=_traceback(exc, TRACEBACK // 4 if around else TRACEBACK),
    )
    if around and told.traceback is not None:
        told.traceback = room.text(told.traceback)
    told.args = room.packed(list(exc.args) if group is None else [group.message])
    made_of, attributes = _state(exc)
    if made_of is not None and group is None:
        told.made_of = room.packed(list(made_of))
    for name, value in attributes.items():
        data = room.packed(value)
        if data is not None:
            told.attributes[name] = data
    told.notes = [text for note in _notes(exc) if (text := room.text(note)) is not None]
    above = (*around, exc)
    cause = _cause(exc)
    if cause is not None and len(above) < CAUSES and not any(cause is known for known in above):
        told.cause = _tell(cause, room, above)
    if group is not None:
        _tell_members(group, told, room, above)
    return told


def _tell_members(group: BaseExceptionGroup[Any], told: Told, room: _Room, above: tuple[BaseException, ...]) -> None:
    members = [m for m in group.exceptions if not any(m is known for known in above)]
    kept = members[:MEMBERS] if len(above) < CAUSES else []
    told.members = [_tell(member, room, above) for member in kept]
    left_out = len(members) - len(kept)
    if left_out:
        told.notes.append(f"{left_out} more of its exceptions are not recorded")


def _error(told: Told) -> Error:
    try:
        hides = payload_codec.active is not None and payload_codec.active.hides()
    except Exception:  # the setting is at fault, which others say; nothing is shown that may have to be hidden
        hides = True
    data = msgspec.structs.replace(told, type="", cause=None)
    if not hides:
        data.message, data.traceback = "", None
    return Error(
        type=told.type,
        message=HIDDEN if hides else told.message,
        traceback=None if hides else told.traceback,
        data=_payload(data),
        cause=None if told.cause is None else _error(told.cause),
    )


def _payload(data: Told) -> Payload | None:
    if data == Told():
        return None
    try:
        return payloads.encode(Payload(content_type=payloads.MSGPACK, data=msgspec.msgpack.encode(data)))
    except Exception:  # a codec that fails
        return None


def _cause(exc: BaseException) -> BaseException | None:
    return exc.__cause__ if exc.__cause__ is not None or exc.__suppress_context__ else exc.__context__


def _message(exc: BaseException) -> str:
    try:
        return _utf8(str(exc)[:MESSAGE])
    except Exception as e:  # a __str__ of the user's
        return f"(its message cannot be shown: {type(e).__name__})"


def _utf8(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _notes(exc: BaseException) -> list[str]:
    notes = getattr(exc, "__notes__", ())
    return [_utf8(note) for note in notes if isinstance(note, str)] if isinstance(notes, list | tuple) else []


def _traceback(exc: BaseException, limit: int) -> str | None:
    """The frames of the user's code, innermost last, within the bound; None where nothing was raised."""
    if exc.__traceback__ is None:
        return None
    try:
        told = traceback.TracebackException.from_exception(exc, compact=True)
        told.__cause__ = told.__context__ = None  # they are records of their own
        told.__notes__ = None  # so are they
        frames = [f for f in told.stack if not f.filename.startswith(tuple(_OURS))]
        told.stack = traceback.StackSummary.from_list(frames)
        text = _utf8("".join(told.format(chain=False)))
    except Exception:  # a __str__, a __repr__ or a source file that cannot be read
        return None
    return text if len(text) <= limit else f"{text[: limit // 4]}\n  …\n{text[-limit * 3 // 4 :]}"


def _state(exc: BaseException) -> tuple[tuple[Any, ...] | None, dict[str, Any]]:
    """What the class is to be called with, where that is not ``args``, and the attributes: as pickle would have it."""
    made_of, attributes = None, dict(getattr(exc, "__dict__", {}))
    try:
        reduced: Any = exc.__reduce__()
        cls, given, *rest = reduced
        if cls is type(exc) and given is not exc.args:
            made_of = tuple(given)
        if rest and isinstance(rest[0], dict):  # some keep theirs elsewhere: ImportError its name
            attributes.update(rest[0])
    except Exception:  # noqa: S110 - a __reduce__ of the user's: it does without
        pass
    return made_of, {k: v for k, v in attributes.items() if isinstance(k, str) and not k.startswith("__")}


# -- and back ----------------------------------------------------------------------------------------------------------


def retold(told: Told) -> BaseException:
    """The exception that was told, or a `StepError`."""
    exc = _group(told) if told.members else _single(told)
    for note in told.notes:
        add_note(exc, note)
    if told.traceback:
        add_note(exc, f"Recorded where it was raised:\n{told.traceback}")
    if told.cause is not None:
        BaseException.__setattr__(exc, "__cause__", retold(told.cause))
    return exc


def _told(error: Error) -> Told:
    told = Told()
    if error.data is not None:
        with suppress(Exception):  # a foreign writer's, an absent codec's, a damaged one's: the message tells
            told = msgspec.msgpack.decode(payload_codec.decode(error.data).data, type=Told)
    told.type = error.type
    told.message = told.message or error.message
    told.traceback = told.traceback or error.traceback
    told.cause = None if error.cause is None else _told(error.cause)
    return told


def _single(told: Told) -> BaseException:
    cls = _class(told.type)
    args = _read(told.args)
    if args is None and ":" not in told.type:
        args = (told.message,)  # a foreign language has no arguments, only the message of, say, a ValueError
    exc = None if cls is None or args is None else _made(cls, _read(told.made_of) or args, args)
    if exc is None:
        return StepError(told.message, told.type)
    _set_attributes(exc, told)
    return exc


def _read(data: bytes | None) -> tuple[Any, ...] | None:
    if data is None:
        return None
    try:
        return tuple(payload_types.read(data))
    except Exception:  # a class that is not imported here, say
        return None


def _made(cls: type[Exception], made_of: tuple[Any, ...], args: tuple[Any, ...]) -> Exception | None:
    with suppress(Exception):  # a constructor with other parameters than its args
        exc = cls(*made_of)
        if type(exc) is cls and exc.args == args:  # else it has made its message of them once more
            return exc
    with suppress(Exception):  # a class with a layout of its own
        base: Any = next(base for base in cls.__mro__ if base.__module__ == "builtins")
        exc = base.__new__(cls, *made_of)
        base.__init__(exc, *made_of)
        BaseException.__setattr__(exc, "args", args)
        if type(exc) is cls:
            return exc
    return None


def _set_attributes(exc: BaseException, told: Told) -> None:
    for name, data in told.attributes.items():
        with suppress(Exception):  # not to be read here, or not to be set
            object.__setattr__(exc, name, payload_types.read(data))  # also where it is frozen


def _group(told: Told) -> BaseException:
    members: list[Any] = [retold(member) for member in told.members]  # Exceptions, all of them
    message = (_read(told.args) or (told.message,))[0]
    cls = _class(told.type)
    if cls is not None and issubclass(cls, BaseExceptionGroup):
        for make in (cls, partial(BaseExceptionGroup.__new__, cls)):  # the latter where its constructor takes others
            with suppress(Exception):
                exc: Any = make(message, members)
                if type(exc) is cls and len(exc.exceptions) == len(members):
                    _set_attributes(exc, told)
                    return exc
    group = ExceptionGroup(str(message), members)
    if told.type not in _GROUPS:
        group.add_note(f"Recorded as {told.type}, which cannot be rebuilt here")
    return group


def _class(name: str) -> type[Exception] | None:
    module_name, found, qualname = name.partition(":")
    module: ModuleType | None = sys.modules.get(module_name) if found else builtins
    cls: object = module
    for part in (qualname if found else name).split("."):
        cls = getattr(cls, part, None) if not part.startswith("_") or cls is module else None
    if isinstance(cls, type) and issubclass(cls, Exception) and not issubclass(cls, _UNRAISABLE):
        return cls
    return None
