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
    from collections.abc import Coroutine, Mapping

    from durably_schemas.records import Payload, ReplyTo

    from durably.authoring import StepDefinition
    from durably.client import AsyncClient, Client
    from durably.durations import Duration


class HookSink(Protocol):
    """Who is told what becomes of a hook; the object that workflow code holds."""

    def granted(self) -> None:
        """The run holds the token."""

    def refused(self, holder_run_id: str) -> None:
        """Another hook holds it."""

    def received(self, payload: Payload) -> None:
        """Outside data arrived."""


class Outcome(Protocol):
    """What a child ended with: the fields of an event child_completed."""

    status: Any
    result: Payload | None
    error: Any


class WorkflowContext(Protocol):
    """What a run offers to the code of its workflow."""

    run_id: str
    workflow_name: str
    started_at_ms: int
    url: str | None

    def call_step(
        self, step: StepDefinition[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Coroutine[Any, Any, Any]:
        """Runs a step in a worker, and returns what the log says it returned."""

    def sleep(self, value: Duration) -> Coroutine[Any, Any, None]:
        """Waits durably."""

    def load(self, payload: Payload, type: Any) -> Coroutine[Any, Any, Any]:  # noqa: A002 - as of `durably.payloads`
        """The value of a payload; where a codec is missing that is no fault of the run, which waits until it is there."""

    def open_hook(
        self, sink: HookSink, token: str | None, metadata: Payload | None, *, webhook: bool, response: Payload | None
    ) -> tuple[str, str]:
        """A hook, with a token of its own where None is given; returns its id and its token."""

    def close_hook(self, hook_id: str) -> None:
        """Gives the token back; closing twice is harmless."""

    def start_child(
        self,
        workflow: str,
        input: Payload,  # noqa: A002 - as the record names it
        *,
        run_id: str | None,
        attributes: dict[str, str],
        start_at: int | None,
        cancel: bool,
    ) -> tuple[str, str]:
        """Starts a run; returns its id and what `child_outcome` and `cancel_child` know it by."""

    def watch_run(self, run_id: str) -> str:
        """Waits for a run that may be anybody's; returns what `child_outcome` knows it by."""

    def child_outcome(self, child_id: str) -> Coroutine[Any, Any, Outcome]:
        """How the run ended, when it has."""

    def cancel_child(self, child_id: str, reason: str | None) -> None:
        """Asks for its cancellation."""

    def set_attributes(self, changes: dict[str, str | None]) -> None:
        """Changes attributes of the run; None removes one."""

    def patched(self, patch_id: str, *, deprecated: bool) -> bool:
        """Whether the run takes the new way, which it records."""

    def now_ms(self) -> int:
        """The run's own time."""


class Writers(Protocol):
    """The streams that one execution of a step writes to."""

    async def write(self, namespace: str, value: Any) -> None:
        """Hands a chunk over; waits while too many are unacknowledged."""

    def write_sync(self, namespace: str, value: Any) -> None:
        """The same, blocking."""

    def end(self, namespace: str) -> None:
        """Closes a stream."""

    async def settle(self) -> None:
        """Returns when all that was written is durable; raises what kept it from that."""

    def settle_sync(self) -> None:
        """The same, blocking."""


class Services(Protocol):
    """What a worker offers to the steps that it runs."""

    def client(self) -> AsyncClient:
        """A client on the worker's broker and namespace, made when first asked for; the worker closes it."""

    def sync_client(self) -> Client:
        """Its twin for plain functions."""

    async def respond(self, to: ReplyTo, payload: Payload) -> None:
        """Sends the response of a webhook to the gateway that waits for it; returns when it is durable."""

    def respond_sync(self, to: ReplyTo, payload: Payload) -> None:
        """The same, blocking."""


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
    services: Services
    workflow_url: str | None = None


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
    """Of the run that is executing, or that called the running step.

    Attributes:
        run_id: the run.
        workflow_name: what it executes.
        started_at: when its code began.
        url: where the gateway is (``DURABLY_GATEWAY_URL`` of the processor when the run started), or None.
    """

    run_id: str
    workflow_name: str
    started_at: datetime
    url: str | None = None


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
        return WorkflowMetadata(run.run_id, run.workflow_name, _instant(run.started_at_ms), run.url)
    ctx = step_context.get()
    if ctx is None:
        raise DurablyError("get_workflow_metadata() works in a workflow or a step only")
    return WorkflowMetadata(ctx.run_id, ctx.workflow_name, _instant(ctx.workflow_started_at), ctx.workflow_url)


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


def set_attributes(changes: Mapping[str, str | None] | None = None, /, **more: str | None) -> None:
    """Sets texts to find the run by; None removes one. In workflows only.

    ``set_attributes(stage="packing")``, or a mapping where a name is no identifier. Searched with
    ``client.runs(attributes=…)``.

    Raises:
        DurablyError: called outside of a workflow.
        TypeError: a name or a value is no text.
        RecordTooLarge: all attributes together have more than 16,384 characters.
    """
    run = workflow_context()
    if run is None:
        raise DurablyError("set_attributes() works in a workflow only; a start takes attributes, too")
    wanted = {**(changes or {}), **more}
    for name, value in wanted.items():
        if not isinstance(name, str) or not isinstance(value, str | None):
            raise TypeError(f"attribute {name!r}={value!r}: names and values of attributes are texts")
    if wanted:
        run.set_attributes(wanted)


def run_handle(run_id: str) -> Any:
    """What a run's handle becomes where a payload that holds one is read: in a workflow, a step, or elsewhere."""
    run = workflow_context()
    if run is not None:
        from durably.children import ChildRun

        return ChildRun(run, run_id)
    from durably.client.default import get_run
    from durably.streams import bound_run

    bound = bound_run(run_id)
    return get_run(run_id) if bound is None else bound
