"""Runs, as workflow code sees them: starting others, and waiting for their ends. All of it is recorded."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Generic, Literal, ParamSpec, TypeVar, cast, get_args, overload

from durably import failures, payloads
from durably.attributes import checked
from durably.authoring import WorkflowDefinition, registry
from durably.durations import milliseconds
from durably.errors import ConfigurationError, DurablyError, RunCancelledError, RunFailedError, RunNotFoundError
from durably.identifiers import checked_run_id
from durably.runtime import workflow_context

if TYPE_CHECKING:
    from collections.abc import Mapping

    from durably.durations import Duration
    from durably.runtime import WorkflowContext

P = ParamSpec("P")
R = TypeVar("R")

LONGEST_REASON = 16_384
"""Characters of a cancellation's reason."""
_ASKS_THE_PROCESSOR = frozenset(
    {"describe", "events", "hooks", "rerun", "reset", "status", "stream", "stream_info", "streams"}
)
OnParentEnd = Literal["abandon", "cancel"]


class ChildRun(Generic[R]):
    """A run, in the workflow code of another: one that it started, or any other by its id.

    Attributes:
        id: the run.
    """

    __durably_run_handle__ = True

    def __init__(self, parent: WorkflowContext, run_id: str, child_id: str | None = None, returns: Any = None) -> None:
        self.id = run_id
        self._parent = parent
        self._child_id = child_id
        self._returns = returns

    async def result(self, timeout: float | None = None) -> R:  # noqa: ASYNC109 - as of `durably.AsyncRun`
        """What its workflow returned; waits until it has. May be asked again.

        Args:
            timeout: seconds, by a durable timer; None waits for ever.

        Raises:
            TimeoutError: it has not ended in time. It goes on.
            RunFailedError: its workflow raised; the exception is ``cause``.
            RunCancelledError: it was cancelled.
            RunNotFoundError: there is no such run.
        """
        async with asyncio.timeout(timeout):
            ended = await self._parent.child_outcome(self._child())
        if ended.status == "completed":
            assert ended.result is not None
            return cast("R", await self._parent.load(ended.result, Any if self._returns is None else self._returns))
        cause = failures.to_exception(ended.error) if ended.error is not None else None
        if ended.status == "cancelled":
            reason = "" if ended.error is None else failures.revealed(ended.error).message
            why = f": {reason}" if reason else ""
            raise RunCancelledError(f"run {self.id} was cancelled{why}", self.id)
        if isinstance(cause, RunNotFoundError) and cause.run_id == self.id:
            raise cause
        said = f": {failures.summed_up(ended.error)}" if ended.error is not None else ""
        raise RunFailedError(f"run {self.id} failed{said}", self.id, cause) from cause

    async def cancel(self, reason: str | None = None) -> None:
        """Asks it to end by a CancelledError. Harmless when it has ended.

        Raises:
            DurablyError: the reason is no text, or has more than 16,384 characters.
        """
        if reason is not None and (not isinstance(reason, str) or len(reason) > LONGEST_REASON):
            raise DurablyError(f"reason {reason!r:.100}: a text of at most {LONGEST_REASON:,} characters")
        self._parent.cancel_child(self._child(), reason)

    def __getattr__(self, name: str) -> Any:
        """What other handles of runs have, and workflow code must not ask."""
        if name in _ASKS_THE_PROCESSOR:
            raise DurablyError(
                f"{name} of run {self.id} asks a processor, which a workflow must not: pass the run to a step, and ask there"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)

    def _child(self) -> str:
        if self._child_id is None:
            if self.id == self._parent.run_id:
                raise DurablyError(f"run {self.id} cannot wait for its own end")
            self._child_id = self._parent.watch_run(self.id)
        return self._child_id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ChildRun) and self.id == other.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        return f"<ChildRun {self.id}>"


class ChildStarter:
    """Starts runs in one certain way, from workflow code. Made by `durably.options`."""

    def __init__(
        self,
        run: WorkflowContext,
        *,
        run_id: str | None = None,
        attributes: Mapping[str, str] | None = None,
        delay: Duration | None = None,
        on_parent_end: OnParentEnd = "abandon",
    ) -> None:
        if on_parent_end not in get_args(OnParentEnd):
            raise ConfigurationError(f'on_parent_end={on_parent_end!r}: "abandon" or "cancel"')
        self._run = run
        self._run_id = None if run_id is None else checked_run_id(run_id)
        self._attributes = checked(attributes)
        self._start_at = None if delay is None else run.now_ms() + milliseconds(delay, now=run.now_ms())
        self._cancel = on_parent_end == "cancel"

    @overload
    async def start(self, workflow: WorkflowDefinition[P, R], /, *args: P.args, **kwargs: P.kwargs) -> ChildRun[R]: ...
    @overload
    async def start(self, workflow: str, /, *args: Any, **kwargs: Any) -> ChildRun[Any]: ...
    async def start(self, workflow: WorkflowDefinition[..., Any] | str, /, *args: Any, **kwargs: Any) -> ChildRun[Any]:
        """Starts a run of its own; returns at once. Awaiting its ``result()`` is another matter.

        An id that a run has already attaches to that run, whoever started it.

        Raises:
            TypeError: the arguments do not fit, or it is no workflow.
            SerializationError: an argument cannot travel; names it.
            RecordTooLarge: the arguments are larger than a record may be.
        """
        definition = workflow if isinstance(workflow, WorkflowDefinition) else registry.workflows.get(workflow)
        returns = None
        if definition is not None:
            name, returns = definition.name, payloads.result_type(definition.fn)
            given = payloads.dump_arguments(definition.fn, args, kwargs, f"workflow {name}")
        elif isinstance(workflow, str) and workflow:
            name = workflow
            given = payloads.dump([list(args), kwargs], f"workflow {name}")
        else:
            raise TypeError(f"{workflow!r} is no workflow: give a function marked @workflow, or the name of one")
        if self._run_id == self._run.run_id:
            raise DurablyError(f"run {self._run_id} cannot start itself")
        run_id, child_id = self._run.start_child(
            name,
            given,
            run_id=self._run_id,
            attributes=self._attributes,
            start_at=self._start_at,
            cancel=self._cancel,
        )
        return ChildRun(self._run, run_id, child_id, returns)


def _context() -> WorkflowContext:
    run = workflow_context()
    assert run is not None, "called outside of workflow code"
    return run


def options(
    *,
    run_id: str | None = None,
    attributes: Mapping[str, str] | None = None,
    delay: Duration | None = None,
    on_parent_end: OnParentEnd = "abandon",
) -> ChildStarter:
    """See `durably.options`. In workflow code."""
    return ChildStarter(_context(), run_id=run_id, attributes=attributes, delay=delay, on_parent_end=on_parent_end)


async def start(workflow: WorkflowDefinition[..., Any] | str, /, *args: Any, **kwargs: Any) -> ChildRun[Any]:
    """See `durably.start`. In workflow code."""
    return await ChildStarter(_context()).start(workflow, *args, **kwargs)


def get_run(run_id: str) -> ChildRun[Any]:
    """See `durably.get_run`. In workflow code."""
    return ChildRun(_context(), checked_run_id(run_id))
