"""Workflow code at work: a live coroutine on its own loop, fed with events, answering with commands.

A *command* is an event that workflow code causes (a step or wait created, a wait dropped, the run's end). A
*delivery* is an event that it waits for. The log of a run is: a delivery, the commands that it led to, the next
delivery, and so on; which is why the same deliveries always give the same commands, and why replay can compare.
"""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Iterable
from contextlib import AbstractContextManager
from hashlib import blake2b
from typing import Any, NamedTuple

from durably import payloads
from durably.authoring import Registry, StepDefinition, WorkflowDefinition
from durably.durations import Duration, milliseconds
from durably.errors import (
    ConfigurationError,
    DeterminismError,
    NonDeterminismError,
    RecordTooLarge,
    RegistrationError,
    SerializationError,
)
from durably.failures import to_error, to_exception
from durably_schemas import events as ev
from durably_schemas.records import Error, Event, Payload

from durably_processor.engine.loop import DeterministicLoop, Task
from durably_processor.engine.watchdog import ActivationTimeout

RECORD_OVERHEAD = 16_384
"""Room for what surrounds a payload in its record."""

_COMMANDS = (
    ev.StepCreated, ev.WaitCreated, ev.RunCompleted, ev.RunFailed, ev.RunCancelled,
)  # fmt: skip
_DELIVERIES = (ev.RunStarted, ev.StepCompleted, ev.StepFailed, ev.RunCancelling)
_STEP_ENDS = (ev.StepCompleted, ev.StepFailed)


class Command(NamedTuple):
    """What workflow code asks for, as the event that records it."""

    data: ev.EventData
    correlation_id: str | None = None


class Blocked(Exception):
    """The run cannot go on with this code; carries what its run_blocked event says."""

    def __init__(self, error: Error, expected: str | None = None, found: str | None = None) -> None:
        super().__init__(error.message)
        self.data = ev.RunBlocked(error=error, expected=expected, found=found)


class Environment:
    """What executions are given from outside.

    Args:
        registry: the workflows and steps.
        max_record_bytes: what one record may hold.
        queues: those whose topic exists; kept up to date from outside, since an activation does no I/O.
        watch: a context manager around each activation; raises `ActivationTimeout` within it when it takes too long.
    """

    def __init__(
        self,
        registry: Registry,
        max_record_bytes: int,
        queues: Collection[str],
        watch: Callable[[str], AbstractContextManager[Any]],
    ) -> None:
        self.registry = registry
        # The minor version counts as code: asyncio's own order of turns differs between them.
        self.code_version = f"{registry.code_version()}-py{sys.version_info.major}.{sys.version_info.minor}"
        self.max_event_bytes = max_record_bytes
        self.max_payload_bytes = max_record_bytes - RECORD_OVERHEAD
        self.queues = queues
        self.watch = watch

    def workflow(self, name: str) -> WorkflowDefinition[..., Any]:
        """The workflow of this name. Raises `Blocked` where this processor has none."""
        found = self.registry.workflows.get(name)
        if found is None:
            known = ", ".join(sorted(self.registry.workflows)) or "none"
            error = RegistrationError(
                f"unknown workflow {name!r}: this processor has {known}; "
                "start it with the module that defines it, and the run goes on"
            )
            raise Blocked(to_error(error))
        return found


class Execution:
    """One run's workflow coroutine and everything that it waits for. Also its `WorkflowContext` and loop `Host`."""

    def __init__(self, run_id: str, created: ev.RunCreated, environment: Environment) -> None:
        self.run_id = run_id
        self.workflow_name = created.workflow
        self.started_at_ms = 0
        self._workflow = environment.workflow(created.workflow)
        self._environment = environment
        self._input = created.input
        self._loop = DeterministicLoop(run_id, self)
        self._loop.workflow_context = self
        self._main: Task[Any] | None = None
        self._ordinal = 0
        self._futures: dict[str, asyncio.Future[Payload]] = {}
        self._timers: dict[int, str] = {}
        self._commands: dict[str, Command] = {}  # by correlation id, in the order they arose
        self._obstacle: BaseException | None = None
        self._cancel_reason: str | None = None
        self._cancelling = False
        self.ended = False

    # -- driven by the run -----------------------------------------------------------------------------------------

    def deliver(self, event: Event) -> list[Command]:
        """Runs the workflow from this event until it can go no further; the commands that this led to.

        Raises `Blocked` when the code cannot be taken further. The execution is then of no more use.
        """
        loop = self._loop
        loop.now_ms = max(loop.now_ms, event.at)
        try:
            with self._environment.watch(self.run_id):
                self._take(event)
                loop.run_ready()
        except (ActivationTimeout, KeyboardInterrupt) as e:  # the latter raised by workflow code: no signal comes here
            raise Blocked(to_error(e)) from e
        if self._obstacle is not None:
            raise Blocked(to_error(self._obstacle)) from self._obstacle
        main = self._main
        if main is not None and main.done() and not self.ended:
            self.ended = True
            self._commands["end"] = Command(self._outcome(main))
        commands, self._commands = self._commands, {}
        return list(commands.values())

    def close(self) -> None:
        """Drops the coroutine; nothing that it does on the way out has any effect."""
        try:
            with self._environment.watch(self.run_id):
                self._loop.close()
        except ActivationTimeout:  # code in a finally that never ends: what is left of it has no effect either
            pass

    def _take(self, event: Event) -> None:
        data, correlation_id = event.data, event.correlation_id
        if isinstance(data, _STEP_ENDS):
            future = self._futures.pop(correlation_id or "", None)
            if future is None or future.done():
                return  # the task that waited for it was cancelled
            if isinstance(data, ev.StepCompleted):
                future.set_result(data.result)
            else:
                future.set_exception(_exception_of(data))
        elif isinstance(data, ev.WaitCompleted):
            timer = int((correlation_id or "").removeprefix("wait_"))
            if self._timers.pop(timer, None) is not None:  # else the workflow dropped it while its run was blocked
                self._loop.fire(timer)
        elif isinstance(data, ev.RunStarted):
            self.started_at_ms = event.at
            self._main = self._loop.create_task(self._body(), name=self.workflow_name)
        elif isinstance(data, ev.RunCancelling) and self._main is not None:
            self._cancelling, self._cancel_reason = True, data.reason
            self._main.cancel(data.reason)

    async def _body(self) -> Any:
        args, kwargs = payloads.load_arguments(self._input, self._workflow.fn)
        return await self._workflow.fn(*args, **kwargs)

    def _outcome(self, main: Task[Any]) -> ev.EventData:
        if main.cancelled():
            if self._cancelling:
                return ev.RunCancelled(reason=self._cancel_reason)
            return ev.RunFailed(error=to_error(asyncio.CancelledError("the workflow cancelled itself")))
        error = main.exception()
        if isinstance(error, DeterminismError):
            raise Blocked(to_error(error)) from error
        if error is None:
            try:
                result = payloads.dump(main.result(), f"the result of workflow {self.workflow_name!r}")
                self._check_size(result, f"the result of workflow {self.workflow_name!r}")
                return ev.RunCompleted(result=result)
            except (SerializationError, RecordTooLarge) as e:
                error = e
        return ev.RunFailed(error=to_error(error))

    # -- what workflow code calls ----------------------------------------------------------------------------------

    async def call_step(self, step: StepDefinition[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A recorded step: its request is a command, its result a delivery."""
        payload = payloads.dump_arguments(step.fn, args, kwargs, f"step {step.name!r}")
        self._check_size(payload, f"the arguments of step {step.name!r}")
        if step.queue not in self._environment.queues:
            await self._park(
                ConfigurationError(
                    f"step {step.name!r} goes to queue {step.queue!r}, whose topic does not exist: "
                    f"create it with `durably topics create --queue {step.queue}`, then restart the processors"
                )
            )
        fingerprint = payloads.fingerprint(step.name, payload)
        step_id = self._name_step(fingerprint)
        future = self._futures[step_id] = self._loop.create_future()
        created = ev.StepCreated(
            step=step.name,
            queue=step.queue,
            input=payload,
            fingerprint=fingerprint,
            max_retries=step.max_retries,
            backoff=step.backoff,
            timeout=step.timeout_ms,
        )
        self._commands[step_id] = Command(created, step_id)
        result = await future
        return payloads.load(result, payloads.result_type(step.fn))

    def sleep(self, value: Duration) -> Coroutine[Any, Any, None]:
        """A durable wait of this length from the workflow's own time, or until an instant."""
        return asyncio.sleep(milliseconds(value, now=self._loop.now_ms) / 1000)

    def _name_step(self, fingerprint: str) -> str:
        # Unique across runs, since it is the idempotency key that steps hand to other systems; and different for
        # different work at the same place, so that what a crash orphaned is never mistaken for its successor.
        self._ordinal += 1
        digest = blake2b(f"{self.run_id}\0{self._ordinal}\0{fingerprint}".encode(), digest_size=10).hexdigest()
        return f"step_{self._ordinal}_{digest}"

    def _check_size(self, payload: Payload, what: str) -> None:
        size, limit = len(payload.data), self._environment.max_payload_bytes
        if size > limit:
            raise RecordTooLarge(
                f"{what}: {size:,} bytes, but a record holds {limit:,}: keep large data elsewhere and pass a reference"
            )

    async def _park(self, obstacle: BaseException) -> None:
        # Not an exception: user code must not be able to catch what is no fault of the run.
        self._obstacle = self._obstacle or obstacle
        await self._loop.create_future()

    # -- what the loop tells us ------------------------------------------------------------------------------------

    def timer_set(self, timer: int, due_ms: int) -> None:
        """A sleep, a timeout, a call_later: all are durable waits."""
        wait_id = self._timers[timer] = f"wait_{timer}"
        self._commands[wait_id] = Command(ev.WaitCreated(due_at=due_ms), wait_id)

    def timer_dropped(self, timer: int) -> None:
        """The workflow no longer waits. One that was never recorded leaves no trace."""
        wait_id = self._timers.pop(timer)
        if self._commands.pop(wait_id, None) is None:
            self._commands[wait_id] = Command(ev.WaitCompleted(cancelled=True), wait_id)


def _exception_of(data: ev.StepFailed) -> BaseException:
    error = to_exception(data.error)
    if data.attempt > 1:
        retries = data.attempt - 1
        error.add_note(f"failed after {retries} {'retry' if retries == 1 else 'retries'}")
    return error


def is_delivery(data: ev.EventData) -> bool:
    """Whether workflow code waits for this event."""
    return isinstance(data, _DELIVERIES) or (isinstance(data, ev.WaitCompleted) and not data.cancelled)


def is_command(data: ev.EventData) -> bool:
    """Whether workflow code causes this event."""
    return isinstance(data, _COMMANDS) or (isinstance(data, ev.WaitCompleted) and data.cancelled)


class Replayed(NamedTuple):
    """An execution brought up to the end of a log.

    ``pending``: commands that the log does not have, since the run was blocked before they were written.
    ``backlog``: deliveries that the log recorded while the run was blocked, not yet given to it.
    """

    execution: Execution
    pending: deque[Command]
    backlog: list[Event]


def replay(log: Iterable[Event], environment: Environment) -> Replayed:
    """Executes a run again from its log and compares every command with what the log says was asked for.

    Raises `Blocked` at the first difference, with what was expected and what was found.
    """
    execution: Execution | None = None
    try:
        for event in log:
            if execution is None:
                assert isinstance(event.data, ev.RunCreated), event
                execution = Execution(event.run_id, event.data, environment)
                replaying = _Replaying(execution)
            else:
                replaying.take(event)
        assert execution is not None, "an empty log"
        return replaying.end()
    except BaseException:
        if execution is not None:
            execution.close()
        raise


class _Replaying:
    def __init__(self, execution: Execution) -> None:
        self._execution = execution
        self._pending: deque[Command] = deque()
        self._backlog: list[Event] | None = None  # a list while the log has the run blocked

    def take(self, event: Event) -> None:
        data = event.data
        if isinstance(data, ev.RunBlocked):
            self._backlog = [] if self._backlog is None else self._backlog
        elif isinstance(data, ev.RunUnblocked):
            backlog, self._backlog = self._backlog or [], None
            for delivery in backlog:
                self._pending.extend(self._execution.deliver(delivery))
        elif is_command(data):
            _compare(event, self._pending.popleft() if self._pending else None)
        elif is_delivery(data):
            if self._backlog is not None:
                self._backlog.append(event)
                return
            if self._pending:
                _diverged(event, self._pending[0])
            self._pending.extend(self._execution.deliver(event))

    def end(self) -> Replayed:
        if self._pending and self._backlog is None:
            _diverged(None, self._pending[0])
        return Replayed(self._execution, self._pending, self._backlog or [])


def _compare(event: Event, command: Command | None) -> None:
    if command is None or type(command.data) is not type(event.data) or command.correlation_id != event.correlation_id:
        _diverged(event, command)


def _diverged(event: Event | None, command: Command | None) -> None:
    expected = f"#{event.seq} {_describe(event.data, event.correlation_id)}" if event else "the end of the log"
    found = _describe(command.data, command.correlation_id) if command else "nothing more to do"
    error = NonDeterminismError(
        f"the workflow's code does not do what its log says it did: expected {expected}, found {found}", expected, found
    )
    raise Blocked(to_error(error), expected, found) from error


def _describe(data: ev.EventData, correlation_id: str | None) -> str:
    name = ev.TYPE_OF[type(data)]
    if isinstance(data, ev.StepCreated):
        return f"{name} {data.step} ({correlation_id})"
    return f"{name} ({correlation_id})" if correlation_id else name
