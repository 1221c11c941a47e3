"""Exceptions as data, and back: in the records of failures, and as values among others.

An exception comes back as its own class where an imported module has that and it can be rebuilt, with its arguments, its
attributes as far as they can travel, its notes, its causes and, for a group, its members. Else it is a `StepError`.
"""

from __future__ import annotations

import builtins
import inspect
import sys
import traceback
from contextlib import suppress
from contextvars import ContextVar
from functools import partial
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import msgspec
from durably_schemas.records import Error, Payload

from durably import payload_codec, payload_types, payloads
from durably.errors import StepError

if TYPE_CHECKING:
    from types import TracebackType

CAUSES = 8
"""How long a chain of causes is recorded, and how deep groups are."""
MEMBERS = 64
"""How many members of one group are, and how many attributes and notes of one exception."""
TRACEBACK = 16_384
"""Bytes of a traceback that are; of a cause or a group's member, a quarter of that."""
MESSAGE = 16_384
"""Bytes of a message that are."""
DATA = 65_536
"""Bytes of all the rest, causes and members included; what does not fit is left out."""
HELD = 128
"""How many exceptions that stand in the arguments and attributes of others are recorded, and at most `HELD_DEEP` deep."""
HELD_DEEP = 3
HIDDEN = "(encrypted)"
"""The message in a record whose payloads are encrypted; the real one is among them."""

_OURS = [str(Path(__file__).parent)]
_LEAST = 200  # bytes of a message that are recorded while there is any room
_EACH = 256  # bytes that an exception costs before anything is said of it: names of fields, lengths, a codec's own
_TYPE = 1024  # bytes of a class's name
_WORK = 4 * DATA  # items that are looked at, also in vain
_FRAMES = 128  # of a traceback; of a cause's or a member's, a quarter
_RAISED = "Recorded where it was raised:\n"
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


def to_error(exc: BaseException) -> Error:
    """An exception as it is recorded. Never raises; where payloads are encrypted, so are message and traceback."""
    return _error(_told_of(exc, traced=True))


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
    """As ``exc.add_note(note)``, also where the exception is a frozen dataclass, which refuses that. Never raises."""
    try:
        exc.add_note(note)
    except Exception:
        with suppress(Exception):  # its notes are no list
            exc.__dict__.setdefault("__notes__", []).append(note)


def as_value(exc: BaseException) -> Told:
    """An exception as it travels among other values: as in a record, but for where it was raised.

    That would make equal values differ, and with them the fingerprints of steps, by a line added to the workflow's file.

    Raises:
        Unfit: it stands in an exception that is being recorded, which has no room for it, or is itself around that.
    """
    telling = _telling.get()
    return _told_of(exc, traced=False) if telling is None else telling.hold(exc)


# -- there -------------------------------------------------------------------------------------------------------------


class _Telling:
    """Of one exception, with all that it comes with and holds, within the bounds of this module.

    Each of these may lead back to it or to the others, by any number of ways.
    """

    def __init__(self, *, traced: bool) -> None:
        self._traced = traced
        self._left = DATA
        self._reserved = 0
        self._work = _WORK
        self._held = HELD
        self._depth = 0  # of exceptions that stand in others
        self._around: list[BaseException] = []  # those that are being told, outermost first

    def tell(self, exc: BaseException) -> Told | None:
        """The exception as data. Never raises; None: there is no room for it."""
        name, message = _type(exc), _message(exc)
        told = Told(type=name)
        if not self._around:  # the bounds of the exception itself hold for its message and traceback
            told.message = message
        elif not self._take(_EACH + len(name.encode()), least=True):
            return None
        else:
            told.message = self._text(message) or self._text(_utf8(message, _LEAST), least=True) or ""
        self._around.append(exc)
        try:
            self._tell_parts(exc, told)
        except Exception:  # noqa: S110 - what a class of the user's does to itself: what has been told stays
            pass
        finally:
            self._around.pop()
        return told

    def hold(self, exc: BaseException) -> Told:
        """An exception that stands in an argument or attribute of the one that is being told. Raises `Unfit`."""
        if self._is_around(exc) or not self._held or self._depth == HELD_DEEP or len(self._around) >= CAUSES:
            raise payload_types.Unfit("is an exception within others, for which there is no room")
        self._held -= 1
        self._depth += 1
        try:
            told = self.tell(exc)
        finally:
            self._depth -= 1
        if told is None:
            raise payload_types.Unfit("is an exception within others, for which there is no room")
        return told

    def _tell_parts(self, exc: BaseException, told: Told) -> None:
        if self._traced and not self._depth:
            told.traceback = self._trace(exc)
        group: Any = exc if issubclass(type(exc), BaseExceptionGroup) else None  # isinstance would ask it for its class
        args = _args(exc)
        told.args = self._packed(list(args) if group is None else [_group_message(group)])
        made_of, attributes = _state(exc, args)
        if made_of is not None and group is None:
            told.made_of = self._packed(list(made_of))
        notes = attributes.pop("__notes__", None)
        for name, value in islice(attributes.items(), MEMBERS):
            if _is_attribute(name) and (data := self._packed(value, beside=len(name.encode()))) is not None:
                told.attributes[name] = data
        told.notes = [text for note in self._notes(notes) if (text := self._text(note)) is not None]
        cause = _cause(exc)
        # One that stands in another comes without its own cause: as a rule that is where the other's leads as well.
        if cause is not None and not self._depth and len(self._around) < CAUSES and not self._is_around(cause):
            told.cause = self.tell(cause)
        if group is not None:
            self._tell_members(group, told)

    def _tell_members(self, group: BaseExceptionGroup[Any], told: Told) -> None:
        members = [m for m in _members(group) if not self._is_around(m)]
        before, self._reserved = self._reserved, DATA // 2  # so that the first leave room for the others
        for member in members[:MEMBERS] if len(self._around) < CAUSES else ():
            one = self.tell(member)
            if one is None:
                break
            told.members.append(one)
        self._reserved = before
        left_out = len(members) - len(told.members)
        if left_out:
            told.notes.append(f"{left_out} more of its exceptions are not recorded")

    def _trace(self, exc: BaseException) -> str | None:
        if len(self._around) == 1:
            return _traceback(exc, TRACEBACK, _FRAMES)
        # Formatting one that there is no room for would take most of the time.
        text = _traceback(exc, TRACEBACK // 4, _FRAMES // 4) if self._left - self._reserved > _LEAST else None
        return None if text is None else self._text(text)

    def _notes(self, notes: object) -> list[str]:
        if not isinstance(notes, list | tuple):
            return []
        kept = [_utf8(note, DATA) for note in notes[:MEMBERS] if isinstance(note, str)]
        return kept if self._traced and not self._depth else [note for note in kept if not note.startswith(_RAISED)]

    def _packed(self, value: Any, beside: int = 0) -> bytes | None:
        if self._work <= 0:
            return None
        limit, before = payload_types.Limit(self._left), self._left
        try:
            data = payload_types.write(value, limit)
        except Exception:  # it cannot travel, for whatever reason
            data = None
        self._work -= limit.looked_at
        self._left = before  # what exceptions in it took is part of it, or given up with it
        return data if data is not None and self._take(len(data) + beside + 8) else None

    def _text(self, text: str, *, least: bool = False) -> str | None:
        return text if self._take(len(text.encode()) + 4, least=least) else None

    def _take(self, size: int, *, least: bool = False) -> bool:
        if size > self._left - (0 if least else self._reserved):
            return False
        self._left -= size
        return True

    def _is_around(self, exc: BaseException) -> bool:
        return any(exc is one for one in self._around)


# What an exception holds is written by durably.payload_types, which comes back here for exceptions in it: by way of
# classes of the user's, too, through which nothing else could be passed.
_telling: ContextVar[_Telling | None] = ContextVar("durably-telling", default=None)


def _told_of(exc: BaseException, *, traced: bool) -> Told:
    telling = _Telling(traced=traced)
    before = _telling.set(telling)
    try:
        told = telling.tell(exc)
        assert told is not None, "the first has room"
        return told
    finally:
        _telling.reset(before)


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


# Classes may have attributes of their own by these names: here Exception's are meant.


def _args(exc: BaseException) -> tuple[Any, ...]:
    args: tuple[Any, ...] = BaseException.args.__get__(exc)  # type: ignore[attr-defined]
    return args


def _cause(exc: BaseException) -> BaseException | None:
    get: Any = BaseException
    cause: BaseException | None = get.__cause__.__get__(exc)
    context: BaseException | None = get.__context__.__get__(exc)
    return cause if cause is not None or get.__suppress_context__.__get__(exc) else context


def _members(group: BaseExceptionGroup[Any]) -> tuple[BaseException, ...]:
    members: tuple[BaseException, ...] = BaseExceptionGroup.exceptions.__get__(group)
    return members


def _group_message(group: BaseExceptionGroup[Any]) -> str:
    message: str = BaseExceptionGroup.message.__get__(group)
    return message


def _type(exc: BaseException) -> str:
    cls = type(exc)
    try:
        return _utf8(f"{cls.__module__}:{cls.__qualname__}", _TYPE)
    except Exception:  # a __module__ of the user's
        return _utf8(type.__repr__(cls), _TYPE)


def _message(exc: BaseException) -> str:
    try:
        return _utf8(str(exc), MESSAGE)
    except Exception as e:  # a __str__ of the user's
        return f"(its message cannot be shown: {_utf8(type(e).__name__, _LEAST)})"


def _utf8(text: str, most: int) -> str:
    """The text, or as much of its beginning as has ``most`` bytes."""
    return str.__str__(text)[:most].encode("utf-8", "backslashreplace")[:most].decode("utf-8", "ignore")


def _traceback(exc: BaseException, limit: int, frames: int) -> str | None:
    """The frames of the user's code, innermost last, within the bounds; None where nothing was raised."""
    get: Any = BaseException
    raised: TracebackType | None = get.__traceback__.__get__(exc)
    if raised is None:
        return None
    try:
        text = _with_members(exc, frames) if _are_few(exc) else _alone(exc, raised, frames)
    except Exception:  # a __str__, a __repr__ or a source file that cannot be read
        return None
    if len(text.encode("utf-8", "backslashreplace")) <= limit:
        return _utf8(text, limit)
    end = text[-limit * 3 // 4 :].encode("utf-8", "backslashreplace")[-limit * 3 // 4 + 8 :].decode("utf-8", "ignore")
    return f"{_utf8(text, limit // 4 - 8)}\n  …\n{end}"


def _with_members(exc: BaseException, frames: int) -> str:
    told = traceback.TracebackException.from_exception(exc, limit=-frames, compact=True)
    told.__cause__ = told.__context__ = None  # they are records of their own
    told.__notes__ = None  # so are they
    told.stack = _of_the_user(told.stack)
    return "".join(told.format(chain=False))


def _alone(exc: BaseException, raised: TracebackType, frames: int) -> str:
    stack = traceback.StackSummary.extract(traceback.walk_tb(raised), limit=-frames)
    name = _type(exc).removeprefix("builtins:").replace(":", ".")
    return f"Traceback (most recent call last):\n{''.join(_of_the_user(stack).format())}{name}: {_message(exc)}\n"


def _of_the_user(frames: traceback.StackSummary) -> traceback.StackSummary:
    return traceback.StackSummary.from_list([f for f in frames if not f.filename.startswith(tuple(_OURS))])


def _are_few(exc: BaseException) -> bool:
    """Whether the exception and all that the traceback module would go through with it are at most `MEMBERS`."""
    open_ones, n = [exc], 0
    while open_ones and n <= MEMBERS:
        one = open_ones.pop()
        n += 1
        open_ones += [e for e in (one.__cause__, one.__context__) if e is not None]
        if isinstance(one, BaseExceptionGroup):
            open_ones += one.exceptions[: MEMBERS + 1]
    return n <= MEMBERS


def _state(exc: BaseException, args: tuple[Any, ...]) -> tuple[tuple[Any, ...] | None, dict[str, Any]]:
    """What the class is to be called with, where that is not ``args``, and the attributes: as pickle would have it."""
    made_of, attributes = None, dict(object.__getattribute__(exc, "__dict__"))
    try:
        reduced: Any = exc.__reduce__()
        cls, given, *rest = reduced
        if cls is type(exc) and given is not args:
            made_of = tuple(given)
        if rest and isinstance(rest[0], dict):  # some keep theirs elsewhere: ImportError its name
            attributes.update(rest[0])
    except Exception:  # noqa: S110 - a __reduce__ of the user's: it does without
        pass
    return made_of, attributes


def _is_attribute(name: object) -> bool:
    return isinstance(name, str) and not name.startswith("__") and name.isprintable()


# -- and back ----------------------------------------------------------------------------------------------------------


def retold(told: Told) -> BaseException:
    """The exception that was told, or a `StepError`."""
    exc = _group(told) if told.members else _single(told)
    for note in told.notes:
        add_note(exc, note)
    if told.traceback:
        add_note(exc, f"{_RAISED}{told.traceback}")
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
        if type(exc) is cls and _args(exc) == args:  # else it has made its message of them once more
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
        if not _is_attribute(name):  # it would be one of Python's own, as `to_error` writes none
            continue
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
    """The class of this name, found without running anything: neither lazy modules nor their attributes are touched."""
    module_name, found, qualname = name.partition(":")
    module = sys.modules.get(module_name) if found else builtins
    if not issubclass(type(module), ModuleType):
        return None
    first, *others = (qualname if found else name).split(".")
    cls: Any = object.__getattribute__(module, "__dict__").get(first)
    for part in others:
        if not issubclass(type(cls), type) or part.startswith("_"):
            return None
        cls = inspect.getattr_static(cls, part, None)
    if issubclass(type(cls), type) and issubclass(cls, Exception) and not issubclass(cls, _UNRAISABLE):
        made: type[Exception] = cls
        return made
    return None
