"""Workflow code at work: a live coroutine on its own loop, fed with events, answering with commands.

A *command* is an event that workflow code causes (a step or wait created, a wait dropped, the run's end). A
*delivery* is an event that it waits for. The log of a run is: a delivery, the commands that it led to, the next
delivery, and so on; which is why the same deliveries always give the same commands, and why replay can compare.
"""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import Callable, Collection, Container, Coroutine, Iterable, Sequence
from contextlib import AbstractContextManager
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from durably import attributes, failures, payloads, tokens
from durably.authoring import Registry, StepDefinition, WorkflowDefinition
from durably.builds import pinned_queue
from durably.durations import Duration, milliseconds
from durably.errors import (
    ConfigurationError,
    DeterminismError,
    NonDeterminismError,
    PayloadCodecError,
    RecordTooLarge,
    RegistrationError,
    SerializationError,
)
from durably.failures import add_note, to_error, to_exception
from durably.identifiers import ulid_of
from durably.runtime import HookSink
from durably_schemas import Codec, CodecError
from durably_schemas import events as ev
from durably_schemas.records import Error, Event, Payload

from durably_processor.engine.loop import DeterministicLoop, Task
from durably_processor.engine.watchdog import ActivationTimeout

failures.leave_out(Path(__file__).parents[1])

RECORD_OVERHEAD = 40_960
"""Room for what surrounds a payload in its record: attributes, ids, a token."""
WATCHED_ONLY = ""
"""The workflow of a child that somebody else started."""
DERIVED = 4_096
"""Room for what surrounds an event's data in the records that follow from it."""

_COMMANDS = (
    ev.StepCreated, ev.StepCancelled, ev.WaitCreated, ev.HookCreated, ev.HookDisposed, ev.ChildCreated,
    ev.ChildCancelling, ev.AttributesSet, ev.PatchMarked, ev.RunCompleted, ev.RunFailed, ev.RunCancelled,
)  # fmt: skip
_DELIVERIES = (
    ev.RunStarted, ev.StepCompleted, ev.StepFailed, ev.HookGranted, ev.HookConflict, ev.HookReceived,
    ev.ChildCompleted, ev.RunCancelling,
)  # fmt: skip
_STEP_ENDS = (ev.StepCompleted, ev.StepFailed)
_HOOK_NEWS = (ev.HookReceived, ev.HookGranted, ev.HookConflict)


_CODEC = Codec()


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
        gateway_url: where the gateway is, for the runs that start from now on.
        code_version: of all that is registered; made of its source when not given.
        build: whose workers the pinned runs keep to that start from now on.
    """

    def __init__(
        self,
        registry: Registry,
        max_record_bytes: int,
        queues: Container[str],
        watch: Callable[[str], AbstractContextManager[Any]],
        gateway_url: str | None = None,
        *,
        code_version: str | None = None,
        build: str | None = None,
    ) -> None:
        self.registry = registry
        # The minor version counts as code: asyncio's own order of turns differs between them.
        python = f"py{sys.version_info.major}.{sys.version_info.minor}"
        self.code_version = f"{code_version or registry.code_version()}-{python}"
        self.build = build
        self.max_event_bytes = max_record_bytes
        self.max_payload_bytes = max_record_bytes - RECORD_OVERHEAD
        self.queues = queues
        self.watch = watch
        self.gateway_url = gateway_url

    def workflow(self, name: str, version: int | None) -> WorkflowDefinition[..., Any]:
        """The workflow of this name and version. Raises `Blocked` where this processor does not have it."""
        newest = self.registry.workflows.get(name)
        if newest is None:
            known = ", ".join(sorted(self.registry.workflows)) or "none"
            what = f"unknown workflow {name!r}: this processor has {known}"
        elif newest.version == version:
            return newest
        else:
            versions = self.registry.versions(name)
            if version is None:  # begun before the workflow had versions
                return versions[min(versions)]
            if version in versions:
                return versions[version]
            known = ", ".join(map(str, sorted(versions))) or "no versions of it"
            what = f"the run began with version {version} of workflow {name!r}: this processor has {known}"
        error = RegistrationError(f"{what}; start it with the module that defines it, and the run goes on")
        raise Blocked(to_error(error))

    def newest(self, name: str) -> int | None:
        """The version that new runs of a workflow begin with; None where it has none."""
        found = self.registry.workflows.get(name)
        return None if found is None else found.version

    def build_of(self, workflow: WorkflowDefinition[..., Any]) -> str | None:
        """The build whose workers a run that starts now keeps to; None: its steps go to all workers."""
        return self.build if workflow.pinned else None


class Execution:
    """One run's workflow coroutine and everything that it waits for. Also its `WorkflowContext` and loop `Host`.

    Attributes:
        ended: the workflow has returned or raised.
        recorded: the patches of its log while it does what it has done before; None: what it does is new.
    """

    def __init__(self, run_id: str, created: ev.RunCreated, environment: Environment) -> None:
        self._steps_of = run_id
        self._origins = created.origins
        self.run_id = self._identity(1)
        self.workflow_name = created.workflow
        self.started_at_ms = 0
        self.url: str | None = None
        self._build: str | None = None
        self._nonce = created.nonce
        self.workflow = environment.workflow(created.workflow, created.version)
        self._environment = environment
        self._input = created.input
        self._loop = DeterministicLoop(self.run_id, self)
        self._loop.workflow_context = self
        self._main: Task[Any] | None = None
        self._ordinal = 0
        self._futures: dict[str, asyncio.Future[Payload]] = {}
        self._timers: dict[int, str] = {}
        self._hooks: dict[str, HookSink] = {}
        self._hook_ordinal = 0
        self._children: dict[str, asyncio.Future[ev.ChildCompleted]] = {}
        self._watched: dict[str, str] = {}  # by run id
        self._attributes: dict[str, str] = dict(created.attributes)
        self._commands: dict[str, Command] = {}  # by what they are about, in the order they arose
        self._patches: dict[str, bool] = {}  # as the run was answered first
        self.recorded: Collection[str] | None = None
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
        if self._origins and self.run_id != (identity := self._identity(event.seq)):
            self.run_id = identity
            loop.reseed(identity)
        try:
            with self._environment.watch(self.run_id):
                self._take(event)
                loop.run_ready()
                self._conclude()
        except (ActivationTimeout, KeyboardInterrupt) as e:  # the latter raised by workflow code: no signal comes here
            raise Blocked(to_error(e)) from e
        commands, self._commands = self._commands, {}
        return list(commands.values())

    def _identity(self, seq: int) -> str:
        """Which run's id the code sees, and its ids and random values derive from, when this event is delivered.

        Where the beginning of the log was copied from another run, the code must do there as it did then. What it does
        after the last copied event is its own.
        """
        return next((origin.run_id for origin in self._origins if seq < origin.events), self._steps_of)

    @property
    def begun(self) -> bool:
        """The workflow's code has been called."""
        return self._main is not None

    @property
    def replaying(self) -> bool:
        """It does what it has done before."""
        return self.recorded is not None

    def _conclude(self) -> None:
        if self._obstacle is not None:
            raise Blocked(to_error(self._obstacle)) from self._obstacle
        main = self._main
        if main is not None and main.done() and not self.ended:
            self.ended = True
            self._commands["end"] = Command(self._outcome(main))

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
        elif isinstance(data, _HOOK_NEWS):
            self._tell_hook(correlation_id or "", data)
        elif isinstance(data, ev.ChildCompleted):
            ended = self._children.get(correlation_id or "")
            if ended is not None and not ended.done():
                ended.set_result(data)
        elif isinstance(data, ev.RunStarted):
            self.started_at_ms, self.url, self._build = event.at, data.url, data.build
            self._main = self._loop.create_task(self._body(), name=self.workflow_name)
        elif isinstance(data, ev.RunCancelling) and self._main is not None:
            self._cancelling, self._cancel_reason = True, data.reason
            self._main.cancel(data.reason)

    def _tell_hook(self, hook_id: str, data: ev.HookReceived | ev.HookGranted | ev.HookConflict) -> None:
        sink = self._hooks.get(hook_id)
        if sink is None:
            return  # disposed of while the run was blocked
        if isinstance(data, ev.HookReceived):
            sink.received(data.payload)
        elif isinstance(data, ev.HookGranted):
            sink.granted()
        else:
            del self._hooks[hook_id]
            sink.refused(data.holder_run_id)

    async def _body(self) -> Any:
        try:
            args, kwargs = payloads.load_arguments(self._input, self.workflow.fn)
        except PayloadCodecError as e:
            await self._park(e)
        return await self.workflow.fn(*args, **kwargs)

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
                what = f"the result of workflow {self.workflow_name!r}"
                result = payloads.dump_result(self.workflow.fn, main.result(), what)
                self._check_size(result, what)
                return ev.RunCompleted(result=result)
            except (SerializationError, RecordTooLarge) as e:
                error = e
        return ev.RunFailed(error=to_error(error))

    # -- what workflow code calls ----------------------------------------------------------------------------------

    async def call_step(self, step: StepDefinition[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A recorded step: its request is a command, its result a delivery."""
        plain = payloads.plain_arguments(step.fn, args, kwargs, f"step {step.name!r}")
        # Of the plain input, and in the way of the run's own: a codec may write the same in other bytes each time.
        fingerprint = payloads.fingerprint(step.name, plain, self._input)
        payload = payloads.encode(plain)
        self._check_size(payload, f"the arguments of step {step.name!r}")
        queue = step.queue if self._build is None else pinned_queue(step.queue, self._build)
        if queue not in self._environment.queues:
            options = f"--queue {step.queue}" + (f" --build {self._build}" if self._build is not None else "")
            await self._park(
                ConfigurationError(
                    f"step {step.name!r} goes to queue {queue!r}, whose topic does not exist: "
                    f"create it with `durably topics create {options}`, then restart the processors"
                )
            )
        step_id = self._name_step(fingerprint)
        future = self._futures[step_id] = self._loop.create_future()
        created = ev.StepCreated(
            step=step.name,
            queue=queue,
            input=payload,
            fingerprint=fingerprint,
            max_retries=step.max_retries,
            backoff=step.backoff,
            timeout=step.timeout_ms,
        )
        self._commands[step_id] = Command(created, step_id)
        try:
            result = await future
        except asyncio.CancelledError:
            self._give_up(step_id)
            raise
        return await self.load(result, Any if step.yields else payloads.result_type(step.fn))

    async def load(self, payload: Payload, type: Any) -> Any:  # noqa: A002 - as of `payloads`
        """The value of a payload. A codec that is missing here is the processor's fault: the run is blocked."""
        try:
            return payloads.load(payload, type)
        except PayloadCodecError as e:
            await self._park(e)

    def _give_up(self, step_id: str) -> None:
        # Only while the result is still to come, and not while the run is being dropped.
        if self._loop.dead or self._futures.pop(step_id, None) is None:
            return
        if self._commands.pop(step_id, None) is None:  # else it was never recorded, and leaves no trace
            self._commands[f"{step_id}/cancelled"] = Command(ev.StepCancelled(), step_id)

    def sleep(self, value: Duration) -> Coroutine[Any, Any, None]:
        """A durable wait of this length from the workflow's own time, or until an instant."""
        return asyncio.sleep(milliseconds(value, now=self._loop.now_ms) / 1000)

    def open_hook(
        self, sink: HookSink, token: str | None, metadata: Payload | None, *, webhook: bool, response: Payload | None
    ) -> tuple[str, str]:
        """A hook is a command; what becomes of it are deliveries."""
        self._loop.check_alive()
        ordinal = self._hook_ordinal + 1
        hook_id = f"hook_{ordinal}"
        if token is None:
            token = tokens.default_token(self.run_id, self._nonce, ordinal)
        created = ev.HookCreated(token=token, metadata=metadata, webhook=webhook, response=response)
        self._check(created, f"a hook with the token {token!r}")
        self._hook_ordinal = ordinal
        self._hooks[hook_id] = sink
        self._commands[hook_id] = Command(created, hook_id)
        return hook_id, token

    def close_hook(self, hook_id: str) -> None:
        """Gives the token back; nothing where it never was the run's."""
        self._loop.check_alive()
        if self._hooks.pop(hook_id, None) is not None:
            self._commands[f"{hook_id}/disposed"] = Command(ev.HookDisposed(), hook_id)

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
        """Another run: a command whose effect is the record that any client would send."""
        self._loop.check_alive()
        child_id = self._next_child()
        if run_id is None:
            seed = blake2b(f"{self.run_id}\0{self._nonce}\0{child_id}".encode(), digest_size=10).digest()
            run_id = f"wrun_{ulid_of(self._loop.now_ms, int.from_bytes(seed, 'big'))}"
        created = ev.ChildCreated(
            child_run_id=run_id,
            workflow=workflow,
            input=input,
            attributes=attributes,
            start_at=start_at,
            cancel=cancel,
        )
        self._check(created, f"the start of workflow {workflow!r:.100}")
        self._begin_child(child_id, created)
        return run_id, child_id

    def watch_run(self, run_id: str) -> str:
        """A run that is somebody else's is recorded as a child without a workflow; however often it is waited for."""
        self._loop.check_alive()
        child_id = self._watched.get(run_id)
        if child_id is not None:
            return child_id
        child_id = self._watched[run_id] = self._next_child()
        nothing = Payload(content_type=payloads.MSGPACK, data=b"")
        self._begin_child(child_id, ev.ChildCreated(child_run_id=run_id, workflow=WATCHED_ONLY, input=nothing))
        return child_id

    def _next_child(self) -> str:
        return f"child_{len(self._children) + 1}"

    def _begin_child(self, child_id: str, created: ev.ChildCreated) -> None:
        self._children[child_id] = self._loop.create_future()
        self._commands[child_id] = Command(created, child_id)

    async def child_outcome(self, child_id: str) -> ev.ChildCompleted:
        """How it ended. Whoever stops waiting takes nothing from others who wait."""
        return await asyncio.shield(self._children[child_id])

    def cancel_child(self, child_id: str, reason: str | None) -> None:
        """A command; nothing where the child has ended."""
        self._loop.check_alive()
        if self._children[child_id].done():
            return
        cancelling = ev.ChildCancelling(reason=reason)
        self._check(cancelling, "the cancellation of a run")
        self._commands[f"{child_id}/cancelling"] = Command(cancelling, child_id)

    def set_attributes(self, changes: dict[str, str | None]) -> None:
        """A command. Changes of one activation are recorded as one."""
        self._loop.check_alive()
        merged = {**self._attributes, **changes}
        kept = {name: value for name, value in merged.items() if value is not None}
        attributes.check_size(kept)
        self._check(ev.AttributesSet(attributes=changes), "the attributes")
        self._attributes = kept
        before = self._commands.pop("attributes", None)
        if before is not None:
            assert isinstance(before.data, ev.AttributesSet)
            changes = {**before.data.attributes, **changes}
        self._commands["attributes"] = Command(ev.AttributesSet(attributes=changes))

    def patched(self, patch_id: str, *, deprecated: bool) -> bool:
        """A command where the run takes the new way: with what is new, or as the log says."""
        self._loop.check_alive()
        known = self._patches.get(patch_id)
        if known is None:
            known = self._patches[patch_id] = self.recorded is None or patch_id in self.recorded
            if known:
                self._commands[f"patch/{patch_id}"] = Command(ev.PatchMarked(patch_id=patch_id, deprecated=deprecated))
        return known

    def now_ms(self) -> int:
        """That of the event which is being delivered."""
        return self._loop.now_ms

    def _name_step(self, fingerprint: str) -> str:
        self._ordinal += 1
        return step_id(self._steps_of, self._ordinal, fingerprint)

    def _check_size(self, payload: Payload, what: str) -> None:
        size, limit = len(payload.data), self._environment.max_payload_bytes
        if size > limit:
            raise RecordTooLarge.of(what, size, limit)

    def _check(self, data: ev.EventData, what: str) -> None:
        """Raises at the call what would else be found when the command is recorded, which nobody could catch."""
        try:
            size = len(_CODEC.encode(ev.event(self.run_id, 1, 0, data)))
        except CodecError as e:
            raise SerializationError(f"{what}: {e}") from e
        limit = self._environment.max_event_bytes - RECORD_OVERHEAD - DERIVED
        if size > limit:
            raise RecordTooLarge.of(what, size, limit)

    async def _park(self, obstacle: BaseException) -> NoReturn:
        # Not an exception: user code must not be able to catch what is no fault of the run.
        self._obstacle = self._obstacle or obstacle
        while True:
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


def step_id(run_id: str, ordinal: int, fingerprint: str) -> str:
    """The id of a run's n-th step.

    Unique across runs, since it is the idempotency key that steps hand to other systems; and different for different
    work at the same place, so that what a crash orphaned is never mistaken for its successor.
    """
    digest = blake2b(f"{run_id}\0{ordinal}\0{fingerprint}".encode(), digest_size=10).hexdigest()
    return f"step_{ordinal}_{digest}"


def _exception_of(data: ev.StepFailed) -> BaseException:
    error = to_exception(data.error)
    if data.attempt > 1:
        retries = data.attempt - 1
        add_note(error, f"failed after {retries} {'retry' if retries == 1 else 'retries'}")
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


def replay(log: Iterable[Event], environment: Environment, *, cut: bool = False) -> Replayed:
    """Executes a run again from its log and compares every command with what the log says was asked for.

    Args:
        log: the run's.
        environment: see `Environment`.
        cut: the log is the beginning of another run's, and what its last event led to may be missing.

    Raises `Blocked` at the first difference, with what was expected and what was found.
    """
    first, *rest = log
    assert isinstance(first.data, ev.RunCreated), first
    execution = Execution(first.run_id, first.data, environment)
    try:
        replaying = _Replaying(execution, rest, cut=cut)
        for event in rest:
            replaying.take(event)
        return replaying.end()
    except BaseException:
        execution.close()
        raise


class _Replaying:
    def __init__(self, execution: Execution, log: Sequence[Event], *, cut: bool) -> None:
        self._execution = execution
        self._cut = cut
        self._patches = frozenset(e.data.patch_id for e in log if isinstance(e.data, ev.PatchMarked))
        self._unanswered = _unanswered(log, cut=cut)
        self._pending: deque[Command] = deque()
        self._backlog: list[Event] | None = None  # a list while the log has the run blocked

    def take(self, event: Event) -> None:
        data = event.data
        if isinstance(data, ev.RunBlocked):
            self._backlog = [] if self._backlog is None else self._backlog
        elif isinstance(data, ev.RunUnblocked):
            backlog, self._backlog = self._backlog or [], None
            for delivery in backlog:
                self._deliver(delivery)
        elif self._is_superfluous(data) or self._was_ended(data):
            pass
        elif is_command(data):
            _compare(event, self._pending.popleft() if self._pending else None)
        elif is_delivery(data):
            if self._backlog is not None:
                self._backlog.append(event)
                return
            if self._pending:
                _diverged(event, self._pending[0])
            self._deliver(event)

    def _deliver(self, event: Event) -> None:
        self._execution.recorded = None if event is self._unanswered else self._patches
        self._pending.extend(self._execution.deliver(event))
        self._execution.recorded = None

    def _is_superfluous(self, data: ev.EventData) -> bool:
        """A deprecated patch that the code does not ask for any more."""
        if not isinstance(data, ev.PatchMarked) or not data.deprecated:
            return False
        asked = self._pending[0].data if self._pending else None
        return not isinstance(asked, ev.PatchMarked) or asked.patch_id != data.patch_id

    def _was_ended(self, data: ev.EventData) -> bool:
        """The run's end, where it was not its code's: the run had not begun, or was blocked, or reset."""
        return isinstance(data, ev.RunCancelled) and (
            not self._execution.begun or self._backlog is not None or data.successor is not None
        )

    def end(self) -> Replayed:
        if self._pending and self._backlog is None and not self._cut:
            _diverged(None, self._pending[0])
        return Replayed(self._execution, self._pending, self._backlog or [])


def _unanswered(log: Sequence[Event], *, cut: bool) -> Event | None:
    """The delivery that blocked the run, where it still is, or behind which its log was cut.

    What the code makes of it is not in the log, and is new.
    """
    end: int | None = None
    for place, event in enumerate(log):
        if isinstance(event.data, ev.RunBlocked):
            end = place if end is None else end
        elif isinstance(event.data, ev.RunUnblocked):
            end = None
    before = log[: end if end is not None else len(log) if cut else 0]
    if before and isinstance(before[-1].data, ev.RunReset):
        before = before[:-1]
    return before[-1] if before and is_delivery(before[-1].data) else None


def _compare(event: Event, command: Command | None) -> None:
    if (
        command is None
        or type(command.data) is not type(event.data)
        or command.correlation_id != event.correlation_id
        or _identity(command.data) != _identity(event.data)
    ):
        _diverged(event, command)


def _identity(data: ev.EventData) -> object:
    """What a command must have in common with the log's, besides its kind and its id. A step's id says it all."""
    if isinstance(data, ev.HookCreated):
        return data.token
    if isinstance(data, ev.ChildCreated):
        return data.child_run_id, data.workflow
    if isinstance(data, ev.AttributesSet):
        return data.attributes
    if isinstance(data, ev.PatchMarked):
        return data.patch_id
    return None


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
    if isinstance(data, ev.HookCreated):
        return f"{name} {data.token} ({correlation_id})"
    if isinstance(data, ev.ChildCreated):
        return f"{name} {data.workflow} {data.child_run_id} ({correlation_id})"
    if isinstance(data, ev.AttributesSet):
        return f"{name} {data.attributes}"
    if isinstance(data, ev.PatchMarked):
        return f"{name} {data.patch_id}"
    return f"{name} ({correlation_id})" if correlation_id else name
