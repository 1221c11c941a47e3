"""Exceptions as data, and back."""

from __future__ import annotations

import builtins
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from durably_schemas.records import Error

from durably import payloads
from durably.errors import SerializationError, StepError

if TYPE_CHECKING:
    from types import ModuleType

    from durably_schemas.records import Payload

CAUSES = 8  # how long a chain of causes is recorded
TRACEBACK = 16_384  # how many characters of a traceback are
MESSAGE = 16_384
DATA = 65_536  # bytes of arguments; more are left out
_OURS = str(Path(__file__).parent)
# Python gives these a meaning of its own where they pass through a coroutine or a future.
_UNRAISABLE = (StopIteration, StopAsyncIteration)


def to_error(exc: BaseException) -> Error:
    """An exception as it is recorded: its class by name, its arguments where they can travel, its causes, its traceback."""
    chain: list[BaseException] = []
    link: BaseException | None = exc
    while link is not None and len(chain) < CAUSES and not any(link is known for known in chain):
        chain.append(link)
        link = link.__cause__ if link.__cause__ is not None or link.__suppress_context__ else link.__context__
    error: Error | None = None
    for link in reversed(chain):
        error = Error(
            type=f"{type(link).__module__}:{type(link).__qualname__}",
            message=_message(link),
            traceback=_traceback(link),
            data=_arguments(link),
            cause=error,
        )
    assert error is not None
    return error


def to_exception(error: Error) -> BaseException:
    """The exception that an error records, as its own class where that is at hand, else a `StepError`.

    A class is at hand when an already imported module has it: nothing is imported on the word of a record.
    """
    exc = _rebuild(error)
    if error.traceback:
        exc.add_note(f"Recorded where it was raised:\n{error.traceback}")
    if error.cause is not None:
        exc.__cause__ = to_exception(error.cause)
    return exc


def _message(exc: BaseException) -> str:
    try:
        return _utf8(str(exc)[:MESSAGE])
    except Exception as e:  # a __str__ of the user's
        return f"(its message cannot be shown: {type(e).__name__})"


def _utf8(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _traceback(exc: BaseException) -> str | None:
    """The frames of the user's code, innermost last, within the bound; None where nothing was raised."""
    if exc.__traceback__ is None:
        return None
    try:
        told = traceback.TracebackException.from_exception(exc, compact=True)
        told.__cause__ = told.__context__ = None  # they are records of their own
        frames = [f for f in told.stack if not f.filename.startswith(_OURS)]
        told.stack = traceback.StackSummary.from_list(frames)
        text = _utf8("".join(told.format(chain=False)))
    except Exception:  # a __str__, a __repr__ or a source file that cannot be read
        return None
    return text if len(text) <= TRACEBACK else f"{text[: TRACEBACK // 4]}\n  …\n{text[-TRACEBACK * 3 // 4 :]}"


def _arguments(exc: BaseException) -> Payload | None:
    try:
        payload = payloads.dump(list(exc.args), "arguments")
    except SerializationError:
        return None
    return payload if len(payload.data) <= DATA else None


def _rebuild(error: Error) -> BaseException:
    cls = _class(error.type)
    if cls is not None:
        try:
            # A foreign language has no arguments, only the message of, say, a ValueError.
            args = payloads.load(error.data, list) if error.data else [error.message] if ":" not in error.type else None
            if args is not None:
                exc = cls(*args)
                if type(exc) is cls:  # an ExceptionGroup's __new__, for one, may choose otherwise
                    return exc
        except Exception:  # noqa: S110 - a constructor with other parameters than its args: the StepError below tells
            pass
    return StepError(error.message, error.type)


def _class(name: str) -> type[Exception] | None:
    module_name, found, qualname = name.partition(":")
    module: ModuleType | None = sys.modules.get(module_name) if found else builtins
    cls: object = module
    for part in (qualname if found else name).split("."):
        cls = getattr(cls, part, None) if not part.startswith("_") or cls is module else None
    if isinstance(cls, type) and issubclass(cls, Exception) and not issubclass(cls, _UNRAISABLE):
        return cls
    return None
