"""Interrupts workflow code that does not come to an end."""

from __future__ import annotations

import ctypes
import functools
import operator
import sys
import threading
import weakref
from time import monotonic
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

_AGAIN_S = 0.5  # between interrupts, for code that swallows them
_LATE_S = 0.1  # what is less is the scheduler's ordinary noise

_set_async_exc = ctypes.pythonapi.PyThreadState_SetAsyncExc


class ActivationTimeout(BaseException):
    """Workflow code ran for too long without awaiting anything. Like KeyboardInterrupt, not to be caught as an error."""


class Watchdog:
    """Watches what one thread does, from a thread of its own.

    An interrupt arrives between two bytecodes: a call into C that blocks is interrupted only when it returns.

    Args:
        limit: seconds that a watched block may take.
    """

    def __init__(self, limit: float = 2.0) -> None:
        self._limit = limit
        # Weak, since a block is over at the latest when nothing refers to its watch any more (see `_Watch.__exit__`).
        self._current: weakref.ref[_Watch] | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._patrol, name="durably-watchdog", daemon=True)
        self._thread.start()

    def watch(self, label: str) -> _Watch:
        """A block that raises `ActivationTimeout`, naming the label and the line, when it takes longer than the limit.

        Let the block consist of calls: where an interrupt hits a loop that stands in the block itself, Python 3.13 may
        skip the block's end. It raises even where the code within has swallowed the interrupt, since an interrupted block is not
        deterministic. When the block is over, so is every interrupt.
        """
        watch = _Watch(label, self._limit)
        self._current = weakref.ref(watch)
        return watch

    def close(self) -> None:
        """Ends the thread."""
        self._closing.set()
        self._thread.join()

    def _patrol(self) -> None:
        # Waking once in every limit is enough: what starts while this sleeps is due later than it wakes.
        pause = self._limit
        asleep = monotonic()
        while not self._closing.wait(pause):
            late = monotonic() - asleep - pause
            watch = self._current() if self._current is not None else None
            pause = self._limit if watch is None else watch.check(late)
            del watch
            asleep = monotonic()


class _Watch:
    __slots__ = ("__weakref__", "_armed", "_due", "_label", "_limit", "_place", "_thread")

    def __init__(self, label: str, limit: float) -> None:
        self._label = label
        self._limit = limit
        self._due = monotonic() + limit
        self._thread = threading.get_ident()
        self._armed = threading.Lock()  # held while the block is being executed
        self._place: str | None = None  # where it was when it was first interrupted

    def __enter__(self) -> None:
        self._armed.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # An interrupt that arrives in here comes out of the block, as it should. Behind the release no other can be
        # sent, and behind the receiving none can be on its way. Should one arrive even before the release, then the
        # block has ended without it, and what stops the watchdog is that this watch is gone.
        self._armed.release()
        if self._place is not None:
            _receive()
            raise ActivationTimeout(
                f"{self._label}: workflow code ran for {self._limit:g} s without awaiting, at {self._place}"
            ) from (None if kind is ActivationTimeout else error)

    def check(self, late: float) -> float:
        """Interrupts the block if it is due; the seconds until the next check. Called by the watchdog's thread.

        Args:
            late: seconds by which that thread overslept. So long the process was stopped, or starved, and so was the block.
        """
        if late > _LATE_S:
            self._due += late
        left = self._due - monotonic()
        if left > 0:
            return left
        if not self._armed.locked():
            return self._limit
        if self._place is None:
            self._place = _place(self._thread)
        interrupt = functools.partial(_set_async_exc, ctypes.c_ulong(self._thread), ctypes.py_object(ActivationTimeout))
        # Asking and interrupting must be one: threads switch between bytecodes, and there are none within this call,
        # which is C all the way (all, map, call, locked, and a foreign function that keeps the GIL).
        steps: tuple[Callable[[], object], ...] = (self._armed.locked, interrupt)
        all(map(operator.call, steps))
        self._due = monotonic() + _AGAIN_S
        return min(_AGAIN_S, self._limit)


def _receive() -> None:
    """Takes the interrupt that may be on its way to this thread, in exchange for one that certainly is.

    To revoke it with None would leave the interpreter looking for it for ever, before every call and jump; and with a
    tracer (a debugger, a measurement of coverage) Python 3.11 then never enters a function again.
    """
    try:
        _set_async_exc(ctypes.c_ulong(threading.get_ident()), ctypes.py_object(ActivationTimeout))
        while True:
            pass
    except ActivationTimeout:
        pass


def _place(thread: int) -> str:
    frame = sys._current_frames().get(thread)  # noqa: SLF001 - documented, whatever its name says
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}" if frame else "an unknown place"
