"""The event loop that workflow code runs on: asyncio without I/O, without a clock of its own, the same in every process.

Nothing here waits. `DeterministicLoop.run_ready` runs what is ready until nothing is; time passes, timers fire and
futures complete only because the engine says so, in the order of the run's log.

What must not differ between two processes, and does in asyncio: the order of a set of tasks (they hash by address), and
their names (a counter of the process). Tasks and futures of this loop hash and are named by their ordinal in the run.
"""

# ruff: noqa: SLF001 - a loop and asyncio's tasks, futures and handles share their private attributes, in asyncio too

from __future__ import annotations

import asyncio
import functools
import gc
import math
import random
import sys
import warnings
import weakref
from asyncio.events import _get_running_loop, _set_running_loop
from collections import deque
from contextlib import contextmanager
from contextvars import Context, copy_context
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar, TypeVarTuple

from durably.errors import DeterminismError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterable, Iterator

_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")

_FOREVER_S = 250_000_000_000.0
"""Longer delays, ``inf`` among them, end about here: some 8,000 years from now."""

_ORDINAL_BITS = 20
_PATIENCE = 1_000  # refusals in a dead context that user code may swallow before calls park it instead of raising
_ATTEMPTS = 64  # DeadContexts thrown into one coroutine before it is dropped as it stands


class DeadContext(BaseException):
    """The run is being dropped: nothing that its code still does on the way out has any effect."""


class Host(Protocol):
    """Who is told of timers. The engine turns each into a durable wait and, when it is over, calls `fire`."""

    def timer_set(self, timer: int, due_ms: int) -> None:
        """Workflow code waits until this instant."""

    def timer_dropped(self, timer: int) -> None:
        """It no longer waits. Never said of a timer that has fired."""


def refusal(call: str) -> DeterminismError:
    """The error for a call that workflow code must not make."""
    return DeterminismError(
        f"{call}: workflow code must do the same at every replay, and cannot reach the outside: do this in a step"
    )


def _digest(seed: str) -> int:
    return int.from_bytes(blake2b(seed.encode(), digest_size=20).digest(), "big")


def _refused(name: str) -> Any:
    def method(self: DeterministicLoop, *_: object, **__: object) -> NoReturn:
        if self.dead:
            raise DeadContext
        raise refusal(f"loop.{name}()")

    method.__name__ = name
    return method


class Task(asyncio.Task[_T]):
    """A task that hashes by its ordinal in the run."""

    __slots__ = ("_hash",)

    def __init__(
        self, coro: Generator[Any, None, _T] | Coroutine[Any, Any, _T], *, loop: DeterministicLoop, **options: Any
    ) -> None:
        # First, since asyncio hashes the task while it initialises it.
        self._hash = loop.next_hash()
        super().__init__(coro, loop=loop, **options)

    def __hash__(self) -> int:
        return self._hash


class Future(asyncio.Future[_T]):
    """A future that hashes by its ordinal in the run."""

    __slots__ = ("_hash",)

    _hash: int

    def __hash__(self) -> int:
        return self._hash


class _Handle(asyncio.Handle):
    __slots__ = ()

    # asyncio's constructor asks the loop for its debug mode, which costs as much as all the rest.
    def __init__(
        self,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        loop: asyncio.AbstractEventLoop,
        context: Context | None,
    ) -> None:
        self._callback = callback
        self._args = args
        self._cancelled = False
        self._loop = loop
        self._context = copy_context() if context is None else context
        self._repr = None
        self._source_traceback = None


class _Timer(asyncio.TimerHandle):
    __slots__ = ("ordinal",)

    def __init__(self, ordinal: int, when: float, *rest: Any) -> None:
        super().__init__(when, *rest)
        self.ordinal = ordinal


class DeterministicLoop(asyncio.AbstractEventLoop):
    """The loop of one run.

    Used by one thread at a time, and by asyncio's own C code, which knows it as any other loop.

    Args:
        seed: what the run's randomness, and the order of its sets of tasks, derive from: the run's ID.
        host: who is told of timers.

    Attributes:
        now_ms: the time, set by the engine before each activation; never moves backwards.
        workflow_context: what `durably.runtime.workflow_context` finds.
        dead: the loop is closed, or being closed.
        unhandled: asyncio's reports of what nobody handled (exceptions of callbacks, exceptions never retrieved), as
            `call_exception_handler` had them. When one comes can depend on garbage collection: for people to read only.
    """

    def __init__(self, seed: str, host: Host) -> None:
        self._host = host
        self._digest = _digest(seed)
        self._hash_base = (self._digest & 0xFFFF_FFFF) << _ORDINAL_BITS
        self._ordinals = 0
        self._timer_ordinals = 0
        self._task_ordinals = 0
        self._ready: deque[asyncio.Handle] = deque()
        self._timers: dict[int, _Timer] = {}
        # Strong references: a task that nothing else refers to would be collected, its ``finally`` executed, whenever
        # the garbage collector runs. The context is kept for `close`, since Python 3.11 does not tell a task's.
        self._tasks: dict[asyncio.Task[Any], Context] = {}
        self._generators: weakref.WeakSet[AsyncGenerator[Any, Any]] | None = None
        self._abandoned: list[AsyncGenerator[Any, Any]] = []
        self._task_factory: Any = None
        self._closed = False
        self._refusals = 0
        self.now_ms = 0
        self.workflow_context: object | None = None
        self.dead = False
        self.unhandled: list[dict[str, Any]] = []

    @functools.cached_property
    def random(self) -> random.Random:
        """The run's randomness. Made when first drawn from: a generator takes 2.5 KB, and most runs need none."""
        return random.Random(self._digest)  # noqa: S311 - deterministic on purpose

    def reseed(self, seed: str) -> None:
        """Randomness derives from this from now on; hashes do not, since there are sets that are ordered by them."""
        self._digest = _digest(seed)
        self.__dict__.pop("random", None)

    def next_hash(self) -> int:
        """The hash of the run's next task or future.

        The low bits are the ordinal, so that a small set iterates in the order of creation. The high bits are the run's,
        since all the tasks of a process meet in asyncio's registry, where equal hashes would make a list of it.
        """
        self._ordinals += 1
        return self._hash_base + self._ordinals

    # -- driven by the engine --------------------------------------------------------------------------------------

    def run_ready(self) -> None:
        """Runs until nothing is ready.

        Exceptions of callbacks go to `unhandled`; what is no `Exception` (an interrupt, `DeadContext`) leaves the rest
        where it is and comes out here.
        """
        if self.dead:
            raise RuntimeError("the loop is closed")
        previous = _get_running_loop()
        if type(previous) is DeterministicLoop:
            raise RuntimeError("a deterministic loop is running in this thread already")
        hooks = sys.get_asyncgen_hooks()
        if hooks.finalizer != self._generator_dropped:
            sys.set_asyncgen_hooks(self._generator_started, self._generator_dropped)
        collecting = gc.isenabled()
        # An asynchronous exception (the watchdog's) may arrive behind any call, and at any jump back. Each undoing is
        # therefore the first call of a ``finally`` of its own, and the loop stands in another function: Python 3.13
        # compiles some jumps so that no ``finally`` around them covers them.
        try:
            # Garbage collection would run finalizers, of this run and of others, at a point that differs each time.
            gc.disable()
            try:
                _set_running_loop(self)
                self._drain()
            finally:
                _set_running_loop(previous)
        finally:
            try:
                if collecting:
                    gc.enable()
            finally:
                if previous is not None:  # otherwise they stay until `close`, for the next activation of this run
                    sys.set_asyncgen_hooks(*hooks)

    def _drain(self) -> None:
        ready = self._ready
        while ready:
            handle = ready.popleft()
            if handle._cancelled:
                continue
            try:
                handle._context.run(handle._callback, *handle._args)  # type: ignore[attr-defined]
            except (Exception, SystemExit) as error:
                # A workflow's sys.exit() ends that workflow, not the processor; its task has recorded it.
                self.call_exception_handler(
                    {"message": f"Exception in callback {handle!r}", "exception": error, "handle": handle}
                )

    def fire(self, timer: int) -> None:
        """Puts the timer's callback on the ready queue. Raises KeyError where the timer is not set (any more)."""
        handle = self._timers.pop(timer)
        self._ready.append(handle)

    def close(self) -> None:
        """Drops everything that is parked.

        Python offers no way to free a suspended coroutine without running its ``finally`` blocks. They run here, in a
        dead context: whatever they ask of the loop, of the SDK or of a guarded function raises `DeadContext`.
        """
        if self._closed:
            return
        previous = _get_running_loop()
        if previous is self:
            raise RuntimeError("a running loop cannot be closed")
        self._closed = self.dead = True
        self._ready.clear()
        self._timers.clear()
        with _silence():
            try:
                _set_running_loop(self)
                self._drop_tasks()
                self._drop_generators()
            finally:
                _set_running_loop(previous)
        self.unhandled.clear()

    def _drop_tasks(self) -> None:
        tasks, self._tasks = self._tasks, {}
        for task, context in tasks.items():
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            coro = task.get_coro()
            if coro is not None and not context.run(_exhaust, coro):
                self._take_coroutine(task)
            # Cuts task -> future -> callback -> task, so that most of a run is freed at once, without the collector.
            waiter = task._fut_waiter  # type: ignore[attr-defined]
            for callback, _ in getattr(waiter, "_callbacks", None) or ():
                waiter.remove_done_callback(callback)

    def _take_coroutine(self, task: asyncio.Task[Any]) -> None:
        # It swallows everything. Freeing it is what Python leaves: that throws once more, and does not insist. It has to
        # happen here, in the dead context, while others may hold the task for longer; a task initialised again lets go
        # of its coroutine.
        self._refusals = _PATIENCE
        nothing = _park(self)
        asyncio.Task.__init__(task, nothing, loop=self)
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        nothing.close()

    def _drop_generators(self) -> None:
        for generator in [*(self._generators or ()), *self._abandoned]:
            _end_generator(generator)
        self._abandoned.clear()
        if sys.get_asyncgen_hooks().finalizer == self._generator_dropped:
            sys.set_asyncgen_hooks(None, None)

    # -- asked by asyncio and by workflow code ---------------------------------------------------------------------

    def time(self) -> float:
        """The time in seconds since 1970: that of the event which is being delivered."""
        self.check_alive()
        return self.now_ms / 1000

    def call_soon(
        self, callback: Callable[[*_Ts], object], *args: *_Ts, context: Context | None = None
    ) -> asyncio.Handle:
        """As in asyncio."""
        handle = _Handle(callback, args, self, context)
        if self.dead:
            self.check_alive()
        else:
            self._ready.append(handle)
        return handle

    def call_soon_threadsafe(
        self, callback: Callable[[*_Ts], object], *args: *_Ts, context: Context | None = None
    ) -> asyncio.Handle:
        """As `call_soon`, from workflow code. From another thread, which could come at any time: DeterminismError."""
        if _get_running_loop() is not self:
            raise refusal("loop.call_soon_threadsafe() from another thread")
        return self.call_soon(callback, *args, context=context)

    def call_later(
        self,
        delay: float,
        callback: Callable[[*_Ts], object],
        *args: *_Ts,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        """As in asyncio, but a durable timer: its host is told, and `fire` is what makes it happen."""
        due_ms = self.now_ms + _milliseconds(delay)
        return self._set_timer(due_ms, callback, args, context)

    def call_at(
        self,
        when: float,
        callback: Callable[[*_Ts], object],
        *args: *_Ts,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        """As `call_later`, at an instant of `time`."""
        return self._set_timer(_milliseconds(when), callback, args, context)

    def _set_timer(
        self, due_ms: int, callback: Callable[..., object], args: tuple[Any, ...], context: Context | None
    ) -> asyncio.TimerHandle:
        self._timer_ordinals += 1
        handle = _Timer(self._timer_ordinals, due_ms / 1000, callback, args, self, context)
        if self.dead:
            self.check_alive()
        else:
            self._timers[handle.ordinal] = handle
            self._host.timer_set(handle.ordinal, due_ms)
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        # Silent in a dead context, whose timers are gone: unwinding code cancels its timeouts, and should get on.
        assert isinstance(handle, _Timer)
        if self._timers.pop(handle.ordinal, None) is not None:
            self._host.timer_dropped(handle.ordinal)

    def create_future(self) -> Future[Any]:
        """As in asyncio."""
        if self.dead:
            self.check_alive()
        future: Future[Any] = Future(loop=self)
        future._hash = self.next_hash()
        return future

    def create_task(
        self,
        coro: Generator[Any, None, _T] | Coroutine[Any, Any, _T],
        *,
        name: str | None = None,
        context: Context | None = None,
    ) -> Task[_T]:
        """As in asyncio. A task without a name is called by its ordinal in the run."""
        if self.dead:
            _exhaust(coro)
            self.check_alive()
            coro = _park(self)
        self._task_ordinals += 1
        if context is None:
            context = copy_context()
        options: dict[str, Any] = {"name": f"Task-{self._task_ordinals}" if name is None else name, "context": context}
        if self._task_factory is not None:
            options["eager_start"] = True
        task = Task(coro, loop=self, **options)
        if self.dead:
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            _exhaust(coro)
        elif not task.done():
            self._tasks[task] = context
            task.add_done_callback(self._tasks.pop, context=context)
        return task

    def set_task_factory(self, factory: Any) -> None:
        """None, or `asyncio.eager_task_factory` (Python 3.12); tasks made by others would not hash by ordinal."""
        if factory is not None and factory is not getattr(asyncio, "eager_task_factory", None):
            raise refusal("loop.set_task_factory() with a factory of your own")
        self._task_factory = factory

    def get_task_factory(self) -> Any:
        """What `set_task_factory` was given."""
        return self._task_factory

    def all_tasks(self) -> Iterable[asyncio.Task[Any]]:
        """The unfinished tasks in the order of their creation."""
        return [task for task in self._tasks if not task.done()]

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Collects it in `unhandled`."""
        if not self.dead:
            self.unhandled.append(context)

    def get_debug(self) -> bool:
        """Never: debug mode measures real time."""
        return False

    def is_running(self) -> bool:
        """Whether workflow code of this run is being executed by this thread."""
        return _get_running_loop() is self

    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def check_alive(self) -> None:
        """Raises `DeadContext` in a dead context.

        Code that swallows it in an endless loop would never end. After a while the loop's methods therefore do nothing
        instead, and what they return never completes: such code parks itself, and a parked coroutine can be dropped.
        """
        if self.dead:
            self._refusals += 1
            if self._refusals <= _PATIENCE:
                raise DeadContext

    # -- refused: I/O, threads, signals, and running the loop ------------------------------------------------------

    run_forever = _refused("run_forever")
    run_until_complete = _refused("run_until_complete")
    stop = _refused("stop")
    shutdown_asyncgens = _refused("shutdown_asyncgens")
    shutdown_default_executor = _refused("shutdown_default_executor")
    run_in_executor = _refused("run_in_executor")
    set_default_executor = _refused("set_default_executor")
    getaddrinfo = _refused("getaddrinfo")
    getnameinfo = _refused("getnameinfo")
    create_connection = _refused("create_connection")
    create_server = _refused("create_server")
    start_tls = _refused("start_tls")
    sendfile = _refused("sendfile")
    create_unix_connection = _refused("create_unix_connection")
    create_unix_server = _refused("create_unix_server")
    connect_accepted_socket = _refused("connect_accepted_socket")
    create_datagram_endpoint = _refused("create_datagram_endpoint")
    connect_read_pipe = _refused("connect_read_pipe")
    connect_write_pipe = _refused("connect_write_pipe")
    subprocess_shell = _refused("subprocess_shell")
    subprocess_exec = _refused("subprocess_exec")
    add_reader = _refused("add_reader")
    remove_reader = _refused("remove_reader")
    add_writer = _refused("add_writer")
    remove_writer = _refused("remove_writer")
    sock_recv = _refused("sock_recv")
    sock_recv_into = _refused("sock_recv_into")
    sock_recvfrom = _refused("sock_recvfrom")
    sock_recvfrom_into = _refused("sock_recvfrom_into")
    sock_sendto = _refused("sock_sendto")
    sock_sendall = _refused("sock_sendall")
    sock_connect = _refused("sock_connect")
    sock_accept = _refused("sock_accept")
    sock_sendfile = _refused("sock_sendfile")
    add_signal_handler = _refused("add_signal_handler")
    remove_signal_handler = _refused("remove_signal_handler")
    set_exception_handler = _refused("set_exception_handler")
    get_exception_handler = _refused("get_exception_handler")
    default_exception_handler = _refused("default_exception_handler")
    set_debug = _refused("set_debug")

    # -- async generators ------------------------------------------------------------------------------------------

    def _generator_started(self, generator: AsyncGenerator[Any, Any]) -> None:
        if self._generators is None:
            self._generators = weakref.WeakSet()
        self._generators.add(generator)

    def _generator_dropped(self, generator: AsyncGenerator[Any, Any]) -> None:
        if _get_running_loop() is not self:
            # The collector found it, at any time and on any thread: it has to wait for `close`.
            self._abandoned.append(generator)
        elif self.dead:
            _end_generator(generator)
        else:
            # The collector is off: the last reference has just gone, always at this point. Closed as asyncio would.
            self.create_task(generator.aclose())


def _end_generator(generator: AsyncGenerator[Any, Any]) -> None:
    for _ in range(_ATTEMPTS):
        try:
            throwing = generator.athrow(DeadContext())
            throwing.send(None)
        except (StopIteration, RuntimeError):
            continue  # it yielded, to nobody; or it is being iterated by a coroutine that would not end
        except BaseException:
            return
        _exhaust(throwing)
        return


def _milliseconds(seconds: float) -> int:
    # A float of today's seconds is exact to a quarter of a microsecond: what it means is the nearest microsecond.
    # Timers never fire early, hence the ceiling.
    if math.isnan(seconds):
        raise ValueError("a delay must be a number, not NaN")
    return -(-round(min(seconds, _FOREVER_S) * 1_000_000) // 1000)


async def _park(loop: DeterministicLoop) -> Any:
    await loop.create_future()


def _exhaust(coro: Any) -> bool:
    # Not coro.close(): it turns an ``await`` in an inner ``finally`` into a RuntimeError that outer user code catches.
    # Everything is swallowed, an interrupt too: whoever sent that is told when the watched block ends.
    for _ in range(_ATTEMPTS):
        try:
            coro.throw(DeadContext())
        except BaseException:
            return True
    return False


@contextmanager
def _silence() -> Iterator[None]:
    """Python reports what goes wrong while coroutines are freed; of a dead context's it shall not, on this thread."""
    report, warn = sys.unraisablehook, warnings._warn_unawaited_coroutine  # type: ignore[attr-defined]

    def report_unless_dead(unraisable: sys.UnraisableHookArgs, /) -> None:
        if not _in_dead_context():
            report(unraisable)

    def warn_unless_dead(coro: Coroutine[Any, Any, Any]) -> None:
        if not _in_dead_context():
            warn(coro)

    sys.unraisablehook = report_unless_dead
    warnings._warn_unawaited_coroutine = warn_unless_dead  # type: ignore[attr-defined]
    try:
        yield
    finally:
        sys.unraisablehook = report
        warnings._warn_unawaited_coroutine = warn  # type: ignore[attr-defined]


def _in_dead_context() -> bool:
    loop = _get_running_loop()
    return type(loop) is DeterministicLoop and loop.dead
