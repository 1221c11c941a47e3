"""Streams, as the code of workflows and steps sees them: handles that can be passed on, written to and read from.

A handle is two texts, the run's id and the stream's namespace, and travels like any value. What a stream holds is never
part of a run's log, so workflow code, which is replayed from the log, can neither write nor read one.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Self

from durably.errors import DurablyError
from durably.runtime import Writers, step_context, workflow_context

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from types import TracebackType

    from durably.client.connection import Connection
    from durably.client.run import AsyncRun, Run

DEFAULT_NAMESPACE = "default"
LONGEST_NAMESPACE = 256
"""Characters of a stream's name."""

_loading_for: ContextVar[tuple[Connection, type[Run[Any] | AsyncRun[Any]] | None] | None] = ContextVar(
    "durably_loading_for", default=None
)


class Readable:
    """The reading end of a stream: ``async for`` and, in plain functions, ``for`` go through it from its beginning.

    It can be an argument, a result, or lie within one. It is read in steps and outside of runs: with the client that
    loaded it from a run's result or from another stream, else with the step's worker's, else with the default client.
    Every iteration is a reader of its own; it waits for what is not written yet, and ends with the stream or the run.
    """

    __slots__ = ("_connection", "namespace", "run_id")

    def __init__(self, run_id: str, namespace: str) -> None:
        self.run_id = run_id
        self.namespace = namespace
        bound = _loading_for.get()
        self._connection = None if bound is None else bound[0]

    def read(self, start_index: int = 0) -> AsyncIterator[Any]:
        """The stream's values, and each new one as it is written.

        Args:
            start_index: the first value, from 0; negative: counted from the end as it is now.

        Raises:
            DurablyError: in workflow code; or the stream's beginning is no longer retained.
            Exception: whatever ended the stream, where its writer was an iterator that failed.
        """
        return self._run().stream(self.namespace, start_index)

    def read_sync(self, start_index: int = 0) -> Iterator[Any]:
        """As `read`, blocking."""
        return self._sync_run().stream(self.namespace, start_index)

    def __aiter__(self) -> AsyncIterator[Any]:
        return self.read()

    def __iter__(self) -> Iterator[Any]:
        return self.read_sync()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Readable) and (self.run_id, self.namespace) == (other.run_id, other.namespace)

    def __hash__(self) -> int:
        return hash((Readable, self.run_id, self.namespace))

    def __repr__(self) -> str:
        return f"Readable(run_id={self.run_id!r}, namespace={self.namespace!r})"

    def _run(self) -> AsyncRun[Any]:
        from durably.client import AsyncRun, default  # the client needs this module

        self._check_place()
        if self._connection is not None:
            return AsyncRun(self._connection, self.run_id)
        ctx = step_context.get()
        return (default.default_client() if ctx is None else ctx.services.client()).get_run(self.run_id)

    def _sync_run(self) -> Run[Any]:
        from durably.client import Run, default  # as above

        self._check_place()
        if self._connection is not None:
            return Run(self._connection, self.run_id)
        ctx = step_context.get()
        if ctx is not None:
            return ctx.services.sync_client().get_run(self.run_id)
        return Run(default.default_client()._connection, self.run_id)  # noqa: SLF001 - one connection serves both kinds

    def _check_place(self) -> None:
        if workflow_context() is not None:
            raise DurablyError(
                f"stream {self.namespace!r} of run {self.run_id} cannot be read in workflow code, which is replayed "
                f"without what streams hold: pass the handle to a step"
            )


class Writable:
    """One stream of one run. A workflow can only pass it on, to steps of the same run; a step can write to it.

    Used as a context manager (``async with`` or ``with``) it closes the stream when its block ends without an
    exception; otherwise the stream stays open, for other steps too, until somebody closes it or the run ends. The
    methods that end in ``_sync`` are for steps that are plain functions.
    """

    __slots__ = ("_raw", "namespace", "run_id")

    def __init__(self, run_id: str, namespace: str, *, raw: bool = False) -> None:
        self.run_id = run_id
        self.namespace = namespace
        self._raw = raw

    @property
    def readable(self) -> Readable:
        """The stream's reading end."""
        return Readable(self.run_id, self.namespace)

    async def write(self, value: Any) -> None:
        """Appends a chunk: any value that can travel; bytes are written as they are.

        Waits while too much is unacknowledged. What Kafka does not take in the end fails the step, whatever happens
        to the exceptions of this method.

        Raises:
            DurablyError: not in a step of this run, or the stream was closed by this execution of it.
            SerializationError: the value cannot travel.
            RecordTooLarge: the chunk is larger than a record may be.
            TypeError: the stream is one of bytes, and the value is not.
        """
        writers = self._writers()
        for chunk in self._chunks(value):
            await writers.write(self.namespace, chunk)

    async def flush(self) -> None:
        """Waits until all that this execution has written, to this stream and others, is durable."""
        await self._writers().settle()

    async def close(self) -> None:
        """Ends the stream for its readers, whoever else writes to it. Closing twice is harmless."""
        self._writers().end(self.namespace)

    def write_sync(self, value: Any) -> None:
        """As `write`, blocking."""
        writers = self._writers()
        for chunk in self._chunks(value):
            writers.write_sync(self.namespace, chunk)

    def flush_sync(self) -> None:
        """As `flush`, blocking."""
        self._writers().settle_sync()

    def close_sync(self) -> None:
        """As `close`."""
        self._writers().end(self.namespace)

    def __aiter__(self) -> AsyncIterator[Any]:
        return self.readable.read()

    def __iter__(self) -> Iterator[Any]:
        return self.readable.read_sync()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            await self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close_sync()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Writable) and (self.run_id, self.namespace) == (other.run_id, other.namespace)

    def __hash__(self) -> int:
        return hash((self.run_id, self.namespace))

    def __repr__(self) -> str:
        return f"Writable(run_id={self.run_id!r}, namespace={self.namespace!r})"

    def _chunks(self, value: Any) -> Iterator[Any]:
        if not self._raw:
            return iter((value,))
        from durably.chunks import pieces  # it needs payloads, which need this module

        if not isinstance(value, bytes | bytearray | memoryview):
            raise TypeError(
                f"stream {self.namespace!r} was opened with type=bytes, and {value!r:.100} is of {type(value)!r}: "
                f"encode it, or open the stream without a type"
            )
        return pieces(value)

    def _writers(self) -> Writers:
        ctx = None if workflow_context() is not None else step_context.get()
        if ctx is None:
            raise DurablyError(f"stream {self.namespace!r} can be written in a step only; pass the handle to one")
        if ctx.run_id != self.run_id:
            raise DurablyError(
                f"stream {self.namespace!r} belongs to run {self.run_id}, and this step to run {ctx.run_id}"
            )
        return ctx.writers


def get_writable(namespace: str | None = None, *, type: type[bytes] | None = None) -> Writable:  # noqa: A002 - as annotations say it
    """A stream of the run: in a step to write to, in a workflow to pass to steps.

    Args:
        namespace: which of the run's streams, 1 to 256 characters of any kind; ``"default"`` when not given.
        type: bytes, for a stream of bytes of any length: a write then takes nothing else, and cuts what is longer
            than 512 KiB into several chunks. It holds for this handle only, and is not passed on with it.

    Raises:
        DurablyError: called in neither, or no stream may have this name.
        TypeError: another type.
    """
    name = checked_namespace(namespace)
    if type is not None and type is not bytes:
        raise TypeError(f"get_writable(type={type!r}): a stream takes any value, or with type=bytes bytes only")
    run = workflow_context() or step_context.get()
    if run is None:
        raise DurablyError("get_writable() works in a workflow or a step only; read a stream with Run.stream()")
    return Writable(run.run_id, name, raw=type is bytes)


def checked_namespace(namespace: str | None) -> str:
    """The name of a stream; None is the default one's. Raises `DurablyError` where no stream may have it."""
    if namespace is None:
        return DEFAULT_NAMESPACE
    if not isinstance(namespace, str) or not 0 < len(namespace) <= LONGEST_NAMESPACE:
        raise DurablyError(
            f"a stream's namespace is a text of 1 to {LONGEST_NAMESPACE} characters, not {namespace!r:.100}"
        )
    try:
        namespace.encode()
    except UnicodeEncodeError as e:
        raise DurablyError(
            f"a stream's namespace must be valid Unicode, which {namespace!r:.100} is not: {e}"
        ) from None
    return namespace


@contextmanager
def bound_to(connection: Connection, kind: type[Run[Any] | AsyncRun[Any]] | None = None) -> Iterator[None]:
    """Within it, handles that are made, as payloads are loaded, belong to one client.

    Args:
        connection: the client's; streams are read through it.
        kind: what handles of runs are to be; None: what they are where no client loads them.
    """
    token = _loading_for.set((connection, kind))
    try:
        yield
    finally:
        _loading_for.reset(token)


def bound_run(run_id: str) -> Run[Any] | AsyncRun[Any] | None:
    """A run's handle, as the client that loads a payload has them; None where no client does."""
    connection, kind = _loading_for.get() or (None, None)
    return None if connection is None or kind is None else kind(connection, run_id)
