"""Streams, as the code of workflows and steps sees them: handles that a workflow passes on and a step writes to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from durably.errors import DurablyError
from durably.runtime import step_context, workflow_context

if TYPE_CHECKING:
    from types import TracebackType

    from durably.runtime import Writers

DEFAULT_NAMESPACE = "default"


class Writable:
    """One stream of one run. A workflow can only pass it on, to steps of the same run; a step can write to it.

    Used as a context manager (``async with`` or ``with``) it closes the stream when its block ends without an
    exception. The methods that end in ``_sync`` are for steps that are plain functions.
    """

    __slots__ = ("namespace", "run_id")

    def __init__(self, run_id: str, namespace: str) -> None:
        self.run_id = run_id
        self.namespace = namespace

    async def write(self, value: Any) -> None:
        """Appends a chunk: any value that can travel. Waits while too many chunks are unacknowledged.

        Raises:
            DurablyError: not in a step of this run, or the stream was closed by this execution of it.
            SerializationError: the value cannot travel.
            RecordTooLarge: the chunk is larger than a record may be.
        """
        await self._writers().write(self.namespace, value)

    async def close(self) -> None:
        """Ends the stream for its readers, whoever else writes to it. Closing twice is harmless."""
        self._writers().end(self.namespace)

    def write_sync(self, value: Any) -> None:
        """As `write`, blocking."""
        self._writers().write_sync(self.namespace, value)

    def close_sync(self) -> None:
        """As `close`."""
        self._writers().end(self.namespace)

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

    def _writers(self) -> Writers:
        ctx = None if workflow_context() is not None else step_context.get()
        if ctx is None:
            raise DurablyError(f"stream {self.namespace!r} can be written in a step only; pass the handle to one")
        if ctx.run_id != self.run_id:
            raise DurablyError(
                f"stream {self.namespace!r} belongs to run {self.run_id}, and this step to run {ctx.run_id}"
            )
        return ctx.writers


def get_writable(namespace: str | None = None) -> Writable:
    """A stream of the run: in a step to write to, in a workflow to pass to steps.

    Args:
        namespace: which of the run's streams; ``"default"`` when not given.

    Raises:
        DurablyError: called in neither.
    """
    name = DEFAULT_NAMESPACE if namespace is None else namespace
    if not isinstance(name, str) or not name:
        raise DurablyError(f"a stream's namespace is a text that is not empty, not {namespace!r}")
    run = workflow_context() or step_context.get()
    if run is None:
        raise DurablyError("get_writable() works in a workflow or a step only; read a stream with Run.stream()")
    return Writable(run.run_id, name)
