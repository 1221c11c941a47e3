"""What workflow code gets when it asks for the time, for randomness, or for the outside world.

Time is that of the event being delivered, randomness derives from the run's ID, and files, sockets, threads and processes
are refused with a `DeterminismError`. All of it holds only while this thread's running loop is a `DeterministicLoop`:
anything else in the process sees Python as it is, some 100 ns later.

Functions of a module are replaced in their module and wherever user modules have bound them by name; `install` is
therefore best called before user modules are imported. Two things are outside of workflow code although it causes them:
importing a module, which happens once in a process, and emitting a log record.
"""

# ruff: noqa: SLF001 - what is replaced here is inside of the standard library

from __future__ import annotations

import asyncio
import ctypes
import datetime as dt
import functools
import gc
import importlib._bootstrap
import linecache
import logging
import os
import random
import sys
import threading
import time
import types
import uuid
from asyncio.events import _get_running_loop, _set_running_loop
from typing import TYPE_CHECKING, Any

from durably_processor.engine.loop import DeterministicLoop, refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

_installed = False
_hooked = False
_undo: list[Callable[[], object]] = []


def install() -> bool:
    """Puts the guards in place, for the whole process; False where they were there already, which does no harm."""
    global _hooked, _installed  # noqa: PLW0603 - as is what they are about: of the process
    if _installed:
        return False
    _installed = True
    replaced = [*_clocks(), *_entropy(), *_orders(), *_refusals(), *_exempt()]
    _rebind(replaced)
    _datetimes()
    _shared_random()
    if not _hooked:  # there is no removing one
        sys.addaudithook(_audit)
        _hooked = True
    return True


def uninstall() -> None:
    """Takes them away again, for tests. The audit hook stays, and does nothing."""
    global _installed  # noqa: PLW0603
    while _undo:
        _undo.pop()()
    _installed = False


def _workflow() -> DeterministicLoop | None:
    """The loop of the run whose code this thread executes. Raises DeadContext where that is being dropped."""
    loop = _get_running_loop()
    if type(loop) is not DeterministicLoop:
        return None
    loop.check_alive()
    return loop


def _set(target: Any, name: str, value: object) -> tuple[object, object]:
    original = target.__dict__[name]
    setattr(target, name, value)
    _undo.append(lambda: setattr(target, name, original))
    return original, value


def _rebind(replaced: Iterable[tuple[object, object]]) -> None:
    # ``from time import time`` before us: the name in the user's module still means the original.
    for forward in (True, False):
        new = {id(a): (a, b) for a, b in replaced} if forward else {id(b): (b, a) for a, b in replaced}
        rebind = functools.partial(_rebind_modules, new)
        if forward:
            rebind()
        else:
            _undo.append(rebind)


def _rebind_modules(new: dict[int, tuple[object, object]]) -> None:
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in sys.stdlib_module_names or name in {__name__, DeterministicLoop.__module__}:
            continue
        if not isinstance(module, types.ModuleType):
            continue
        try:
            namespace = object.__getattribute__(module, "__dict__")  # a lazy module's own would import it
        except AttributeError:  # the modules that cffi makes have none
            continue
        for key, value in list(namespace.items()):
            if id(value) in new:
                namespace[key] = new[id(value)][1]


# -- time --------------------------------------------------------------------------------------------------------------


def _seconds(now_ms: int) -> float:
    return now_ms / 1000


def _nanoseconds(now_ms: int) -> int:
    return now_ms * 1_000_000


def _clocks() -> Iterator[tuple[object, object]]:
    for name in ("time", "monotonic", "perf_counter", "process_time", "thread_time"):
        yield _set(time, name, _clock(getattr(time, name), _seconds))
        yield _set(time, f"{name}_ns", _clock(getattr(time, f"{name}_ns"), _nanoseconds))
    for name in ("gmtime", "localtime", "ctime"):
        yield _set(time, name, _conversion(getattr(time, name)))
    strftime, asctime = time.strftime, time.asctime

    @functools.wraps(strftime)
    def strftime_(layout: str, /, *moment: Any) -> str:
        return strftime(layout, *moment) if moment or _workflow() is None else strftime(layout, time.localtime())

    @functools.wraps(asctime)
    def asctime_(*moment: Any) -> str:
        return asctime(*moment) if moment or _workflow() is None else asctime(time.localtime())

    yield _set(time, "strftime", strftime_)
    yield _set(time, "asctime", asctime_)


def _clock(original: Callable[[], Any], reading: Callable[[int], Any]) -> Callable[[], Any]:
    # _workflow is written out in what is called often.
    @functools.wraps(original)
    def clock() -> Any:
        loop = _get_running_loop()
        if type(loop) is not DeterministicLoop:
            return original()
        loop.check_alive()
        return reading(loop.now_ms)

    return clock


def _conversion(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def convert(seconds: float | None = None, /) -> Any:
        if seconds is None and (loop := _workflow()) is not None:
            seconds = loop.now_ms / 1000
        return original(seconds)

    return convert


def _datetimes() -> None:
    # On the real type, in place: users import it as they like, and isinstance, annotations and msgspec, which compare
    # with the type itself, go on as before. It is immutable from Python, so its dictionary, which ``__dict__`` shows
    # through a proxy, is written to directly, and the interpreter is told that cached look-ups are void. date.today,
    # and datetime.today with it, need nothing: they call time.time.
    now, utcnow = dt.datetime.__dict__["now"], dt.datetime.__dict__["utcnow"]
    plain_now = dt.datetime.now

    def now_(cls: type[dt.datetime], tz: dt.tzinfo | None = None) -> dt.datetime:
        loop = _get_running_loop()
        if type(loop) is not DeterministicLoop:
            return plain_now(tz) if cls is dt.datetime else now.__get__(None, cls)(tz)
        loop.check_alive()
        return cls.fromtimestamp(loop.now_ms / 1000, tz)

    def utcnow_(cls: type[dt.datetime]) -> dt.datetime:
        loop = _workflow()
        if loop is None:
            return utcnow.__get__(None, cls)()  # type: ignore[no-any-return]
        return cls.fromtimestamp(loop.now_ms / 1000, dt.UTC).replace(tzinfo=None)

    _set_on_type(dt.datetime, now=classmethod(_named(now_, now)), utcnow=classmethod(_named(utcnow_, utcnow)))
    _undo.append(functools.partial(_set_on_type, dt.datetime, now=now, utcnow=utcnow))


def _set_on_type(cls: type, **attributes: object) -> None:
    gc.get_referents(cls.__dict__)[0].update(attributes)
    ctypes.pythonapi.PyType_Modified(ctypes.py_object(cls))


def _named(function: Callable[..., Any], original: Any) -> Callable[..., Any]:
    function.__name__, function.__qualname__, function.__doc__ = (
        original.__name__,
        original.__qualname__,
        original.__doc__,
    )
    return function


# -- randomness --------------------------------------------------------------------------------------------------------


_random, _getrandbits = random.Random.random, random.Random.getrandbits


class _SharedRandom(random.Random):
    """The class given to the instance behind the functions of `random`: in workflow code it draws from the run's own.

    Functions bound early, ``from random import choice``, are methods of that instance, and draw through it as well.
    """

    def random(self) -> float:
        loop = _get_running_loop()
        if type(loop) is not DeterministicLoop:
            return _random(self)
        loop.check_alive()
        return loop.random.random()

    def getrandbits(self, k: int, /) -> int:
        loop = _get_running_loop()
        if type(loop) is not DeterministicLoop:
            return _getrandbits(self, k)
        loop.check_alive()
        return loop.random.getrandbits(k)

    def seed(self, *args: Any, **kwargs: Any) -> None:
        return super().seed(*args, **kwargs) if (loop := _workflow()) is None else loop.random.seed(*args, **kwargs)

    def getstate(self) -> Any:
        return super().getstate() if (loop := _workflow()) is None else loop.random.getstate()

    def setstate(self, state: Any) -> None:
        return super().setstate(state) if (loop := _workflow()) is None else loop.random.setstate(state)

    # gauss() draws two and keeps one for the next call: here, where a run would leave it to others.
    @property
    def gauss_next(self) -> Any:
        return self.__dict__["gauss_next"] if (loop := _workflow()) is None else loop.random.gauss_next  # type: ignore[attr-defined]

    @gauss_next.setter
    def gauss_next(self, value: float | None) -> None:
        if (loop := _workflow()) is None:
            self.__dict__["gauss_next"] = value
        else:
            loop.random.gauss_next = value  # type: ignore[attr-defined]


def _shared_random() -> None:
    shared = random._inst
    shared.__class__ = _SharedRandom
    _undo.append(functools.partial(setattr, shared, "__class__", random.Random))
    _rebind(
        [
            _set(random, name, getattr(shared, name))
            for name in ("random", "getrandbits", "seed", "getstate", "setstate")
        ]
    )


def _entropy() -> Iterator[tuple[object, object]]:
    urandom, getrandom, seed, uuid1 = os.urandom, os.getrandom, random.Random.seed, uuid.uuid1

    @functools.wraps(urandom)
    def urandom_(size: int, /) -> bytes:
        return urandom(size) if (loop := _workflow()) is None else loop.random.randbytes(size)

    @functools.wraps(getrandom)
    def getrandom_(size: int, flags: int = 0) -> bytes:
        return getrandom(size, flags) if (loop := _workflow()) is None else loop.random.randbytes(size)

    @functools.wraps(seed)
    def seed_(self: random.Random, a: Any = None, version: int = 2) -> None:
        # None means entropy of the system, which C code fetches: Random() would have it too.
        if a is None and (loop := _workflow()) is not None:
            a = loop.random.getrandbits(256)
        seed(self, a, version)

    @functools.wraps(uuid1)
    def uuid1_(node: int | None = None, clock_seq: int | None = None) -> uuid.UUID:
        loop = _workflow()
        if loop is None:
            return uuid1(node, clock_seq)
        ticks = loop.now_ms * 10_000 + 0x01B21DD213814000  # of 100 ns since 1582 (RFC 4122)
        if node is None:
            node = loop.random.getrandbits(48) | 1 << 40  # multicast: no hardware's address
        if clock_seq is None:
            clock_seq = loop.random.getrandbits(14)
        low, middle, high = ticks & 0xFFFFFFFF, ticks >> 32 & 0xFFFF, ticks >> 48 & 0x0FFF
        return uuid.UUID(fields=(low, middle, high, clock_seq >> 8 & 0x3F, clock_seq & 0xFF, node), version=1)

    yield _set(os, "urandom", urandom_)  # uuid4 asks here
    yield _set(random, "_urandom", urandom_)  # SystemRandom asks here, and secrets asks that
    yield _set(os, "getrandom", getrandom_)
    yield _set(random.Random, "seed", seed_)
    yield _set(uuid, "uuid1", uuid1_)


# -- orders ------------------------------------------------------------------------------------------------------------


def _orders() -> Iterator[tuple[object, object]]:
    """Where asyncio puts into a set what does not hash by its ordinal."""
    as_completed, all_tasks = asyncio.as_completed, asyncio.all_tasks

    @functools.wraps(as_completed)
    def as_completed_(fs: Any, *, timeout: float | None = None) -> Any:
        # It makes a set of the coroutines, and then tasks of that.
        if (loop := _workflow()) is not None and not (asyncio.isfuture(fs) or asyncio.iscoroutine(fs)):
            fs = [asyncio.ensure_future(awaitable, loop=loop) for awaitable in dict.fromkeys(fs)]
        return as_completed(fs, timeout=timeout)

    @functools.wraps(all_tasks)
    def all_tasks_(loop: asyncio.AbstractEventLoop | None = None) -> set[asyncio.Task[Any]]:
        # It goes through the tasks of the whole process.
        asked = _workflow() if loop is None else loop
        return set(asked.all_tasks()) if type(asked) is DeterministicLoop else all_tasks(loop)

    for module in (asyncio, asyncio.tasks):
        yield _set(module, "as_completed", as_completed_)
        yield _set(module, "all_tasks", all_tasks_)

    def hash_by_ordinal(self: Any) -> int:
        # What gather() returns is a future that it makes itself; the order of first hashing is the code's own.
        loop = self.get_loop()
        if type(loop) is not DeterministicLoop:
            return object.__hash__(self)
        if not hasattr(self, "_ordinal_hash"):
            self._ordinal_hash = loop.next_hash()
        return self._ordinal_hash  # type: ignore[no-any-return]

    gathering = asyncio.tasks._GatheringFuture  # type: ignore[attr-defined]
    gathering.__hash__ = hash_by_ordinal
    _undo.append(functools.partial(delattr, gathering, "__hash__"))


# -- the outside -------------------------------------------------------------------------------------------------------

_REFUSED = frozenset(
    {
        *("fcntl", "ftplib", "glob", "http", "imaplib", "mmap", "nntplib", "open", "os", "pathlib", "poplib", "pty"),
        *("resource", "shutil", "signal", "smtplib", "socket", "sqlite3", "subprocess", "syslog", "telnetlib"),
        *("tempfile", "urllib", "webbrowser", "_posixshmem"),
    }
)
"""Audit events, by the part before their first dot, that are refused: PEP 578 and the table in Python's manual."""

_REFUSED_TOO = {
    "_thread.start_joinable_thread": "threading.Thread.start",
    "_thread.start_new_thread": "threading.Thread.start",
    "builtins.breakpoint": "breakpoint",
    "builtins.input": "input",
    "ctypes.call_function": "ctypes",
    "ctypes.dlopen": "ctypes.CDLL",
    "ctypes.dlsym": "ctypes.CDLL",
    "socket.__new__": "socket.socket",
    "time.sleep": "time.sleep",
}


def _audit(event: str, args: tuple[Any, ...]) -> None:
    loop = _get_running_loop()
    if type(loop) is not DeterministicLoop or not _installed:
        return
    if event not in _REFUSED_TOO and event.partition(".")[0] not in _REFUSED:
        return
    if event == "open" and _is_time_zone(args[0]):
        return
    loop.check_alive()
    shown = ", ".join(
        repr(a) for a in args if isinstance(a, str | bytes | int | tuple | list) and not isinstance(a, bool)
    )
    if event == "open" and args:
        shown = repr(args[0])
    elif event in _REFUSED_TOO and event != "time.sleep":
        shown = ""
    raise refusal(f"{_REFUSED_TOO.get(event, event)}({shown[:200]})")


def _is_time_zone(path: object) -> bool:
    # zoneinfo reads a zone's file when it is first asked for: data that belongs to Python, and is cached.
    return isinstance(path, str) and "/zoneinfo/" in path


def _refusals() -> Iterator[tuple[object, object]]:
    """What blocks or starts threads without an audit event, on this Python or on an older one."""
    yield _set(time, "sleep", _refuse(time.sleep, "time.sleep()"))
    _set(threading.Thread, "start", _refuse(threading.Thread.start, "threading.Thread.start()"))
    # Event.wait, Queue.get, Future.result and the like all end here; no interrupt would reach them.
    _set(threading.Condition, "wait", _refuse(threading.Condition.wait, "a blocking wait on threading.Condition"))


def _refuse(original: Callable[..., Any], call: str) -> Callable[..., Any]:
    @functools.wraps(original)
    def refuse(*args: Any, **kwargs: Any) -> Any:
        if _workflow() is not None:
            raise refusal(call)
        return original(*args, **kwargs)

    return refuse


# -- exempt ------------------------------------------------------------------------------------------------------------


def _exempt() -> Iterator[tuple[object, object]]:
    bootstrap: Any = importlib._bootstrap
    load = _outside(bootstrap._find_and_load)
    # Python takes the frames of its import system out of tracebacks, recognising them by their file.
    load.__code__ = load.__code__.replace(co_filename="<frozen importlib._bootstrap>")
    # What an import statement comes to when the module is not loaded yet. Were it inside, a module's own draws and
    # readings would be taken from the first run that needs it, and from no other.
    _set(bootstrap, "_find_and_load", load)
    # The lines of source in a traceback or warning.
    _set(linecache, "updatecache", _outside(linecache.updatecache))
    # Handlers write to files and sockets. What a run has said before its replay, it has said;
    # and what it says while it is dropped, it says when it comes to it.
    _set(logging.Logger, "callHandlers", _once(_outside(logging.Logger.callHandlers)))
    yield from ()


def _once(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def once(*args: Any, **kwargs: Any) -> Any:
        loop = _get_running_loop()
        if type(loop) is DeterministicLoop and (loop.dead or getattr(loop.workflow_context, "replaying", False)):
            return None
        return original(*args, **kwargs)

    return once


def _outside(original: Callable[..., Any]) -> types.FunctionType:
    @functools.wraps(original)
    def outside(*args: Any, **kwargs: Any) -> Any:
        loop = _get_running_loop()
        if type(loop) is not DeterministicLoop:
            return original(*args, **kwargs)
        try:
            _set_running_loop(None)
            return original(*args, **kwargs)
        finally:
            _set_running_loop(loop)

    return outside  # type: ignore[return-value]
