"""Where code is running: in a workflow, in a step, or in neither; and what it may ask there."""

from __future__ import annotations

import asyncio
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Protocol, cast

import msgspec

from durably.errors import DurablyError

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from durably.authoring import StepDefinition
    from durably.durations import Duration


class WorkflowContext(Protocol):
    """What a run offers to the code of its workflow."""

    run_id: str
    workflow_name: str
    started_at_ms: int

    def call_step(
        self, step: StepDefinition[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Coroutine[Any, Any, Any]:
        """Runs a step in a worker, and returns what the log says it returned."""

    def sleep(self, value: Duration) -> Coroutine[Any, Any, None]:
        """Waits durably."""


class Writers(Protocol):
    """The streams that one execution of a step writes to."""

    async def write(self, namespace: str, value: Any) -> None:
        """Hands a chunk over; waits while too many are unacknowledged."""

    def write_sync(self, namespace: str, value: Any) -> None:
        """The same, blocking."""

    def end(self, namespace: str) -> None:
        """Closes a stream."""


class StepContext(msgspec.Struct, frozen=True, kw_only=True):
    """What an execution of a step knows of itself. Instants in milliseconds since the epoch."""

    run_id: str
    workflow_name: str
    workflow_started_at: int
    step_id: str
    step_name: str
    attempt: int
    execution: int
    started_at: int
    writers: Writers


step_context: ContextVar[StepContext | None] = ContextVar("durably_step", default=None)


@dataclass(frozen=True, slots=True)
class StepMetadata:
    """Of the step that is running.

    Attributes:
        step_id: the same in every attempt: an idempotency key for what the step does elsewhere.
        step_name: the name that it is registered under.
        attempt: counted from 1.
        started_at: when this attempt began.
        run_id: the run that called it.
    """

    step_id: str
    step_name: str
    attempt: int
    started_at: datetime
    run_id: str


@dataclass(frozen=True, slots=True)
class WorkflowMetadata:
    """Of the run that is executing, or that called the running step."""

    run_id: str
    workflow_name: str
    started_at: datetime


def workflow_context() -> WorkflowContext | None:
    """The run whose workflow code is calling, or None elsewhere.

    It belongs to the event loop and not to a context variable, because a workflow may run tasks in contexts of its
    own making, and because code in another thread must not find it.
    """
    loop = asyncio._get_running_loop()  # noqa: SLF001 - the documented form raises where no loop runs
    return cast("WorkflowContext | None", getattr(loop, "workflow_context", None))


def get_step_metadata() -> StepMetadata:
    """What the running step knows of itself. Raises `DurablyError` outside of a step."""
    ctx = None if workflow_context() is not None else step_context.get()
    if ctx is None:
        raise DurablyError("get_step_metadata() works in a step only; call it inside a function marked @step")
    return StepMetadata(ctx.step_id, ctx.step_name, ctx.attempt, _instant(ctx.started_at), ctx.run_id)


def get_workflow_metadata() -> WorkflowMetadata:
    """Of the run, in its workflow and in its steps alike. Raises `DurablyError` elsewhere."""
    run = workflow_context()
    if run is not None:
        return WorkflowMetadata(run.run_id, run.workflow_name, _instant(run.started_at_ms))
    ctx = step_context.get()
    if ctx is None:
        raise DurablyError("get_workflow_metadata() works in a workflow or a step only")
    return WorkflowMetadata(ctx.run_id, ctx.workflow_name, _instant(ctx.workflow_started_at))


async def sleep(value: Duration) -> None:
    """Waits durably: seconds, ``"10s"``, a timedelta, or until an aware datetime. In workflows only.

    Raises:
        DurablyError: called outside of a workflow.
    """
    run = workflow_context()
    if run is None:
        where = "a step" if step_context.get() is not None else "this place"
        raise DurablyError(
            f"sleep() is durable and works in a workflow only; in {where} use asyncio.sleep or time.sleep"
        )
    await run.sleep(value)


def _instant(ms: int) -> datetime:
    return datetime.fromtimestamp(ms / 1000, UTC)
