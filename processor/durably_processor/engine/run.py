"""One run: takes one input, answers with the events to append, and the requests, signals and commands to send.

What each input does, by the state that it finds (anything else is a duplicate or too late, and changes nothing):

    start               no such run             run_created, run_started, commands
    step result         step scheduled/leased   step_started, step_completed | step_failed, commands
                                                step_started, step_retrying
    heartbeat           step scheduled          step_started with a lease;  leased: the lease is extended
    claim               step scheduled          step_started, answer OPEN;  leased: LEASED;  else: DONE
    log of a reset run  no such run             its events, run_reset, commands, the steps that are open
    reset               not ended               run_cancelled
    cancel              running                 run_cancelling, commands;  pending or blocked: run_cancelled
    resume              hook active             hook_received, commands
    token granted       hook claiming           hook_granted, commands, the steps that were held;  else: a release
    token refused       hook claiming           hook_conflict, commands, the steps that were held
    child finished      child open              child_completed, commands
    watch               not ended               run_watched;  ended: its end is told at once
    timer of a wait     open                    wait_completed, commands
    timer of a step     backoff, scheduled      step_scheduled and a request
                        leased                  step_retrying | step_failed
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from typing import Literal

import msgspec
from durably import payloads, tokens
from durably.errors import RunCancelledError, StepTimeoutError, WorkerLostError
from durably.failures import to_error
from durably.observability.tracing import Trace
from durably_schemas import events as ev
from durably_schemas import records as rec
from durably_schemas.records import ClaimAnswer, Error, Event

from durably_processor.engine.execution import WATCHED_ONLY, Blocked, Command, Environment, Execution, replay
from durably_processor.engine.state import (
    START,
    OpenChild,
    OpenHook,
    OpenItem,
    OpenStep,
    OpenWait,
    RunState,
    Watcher,
    created,
    watcher_id,
)

CRASHES_TOLERATED = 3
"""A step's attempt may be handed out again this often beyond its retries before it counts as deadly."""


Signal = rec.ClaimToken | rec.ReleaseToken | rec.ChildFinished
Resumed = Literal["OK", "ENDED", "UNKNOWN"]

_ENDS: dict[type[rec.Record], rec.RunStatus] = {
    ev.RunCompleted: "completed",
    ev.RunFailed: "failed",
    ev.RunCancelled: "cancelled",
}
_TOKEN_SETTLED = (ev.HookGranted, ev.HookConflict, ev.HookDisposed)


class Outcome(msgspec.Struct):
    """What one input makes of a run."""

    events: list[Event] = []
    requests: list[tuple[str, rec.StepRequest]] = []  # with their queue
    signals: list[Signal] = []
    commands: list[rec.StartRun | rec.CancelRun | rec.WatchRun] = []


class Run:
    """One run's state and, while it is live, its execution.

    Args:
        state: derived from all events that the log has.
        environment: see `Environment`.
        history: the run's log from a seq on; asked for only while every event is in it.
    """

    __slots__ = ("_end", "_environment", "_execution", "_history", "_kept", "_out", "state")

    def __init__(self, state: RunState, environment: Environment, history: Callable[[int], Iterable[Event]]) -> None:
        self.state = state
        self._environment = environment
        self._history = history
        self._execution: Execution | None = None
        self._out = Outcome()
        self._kept = 0  # up to which event another run has what this one began
        self._end: ev.EventData | None = None  # how it ended, where that was just now: the log may not have it yet

    def evict(self) -> None:
        """Drops the coroutine; the next delivery brings it back by replay."""
        if self._execution is not None:
            self._execution.close()
            self._execution = None

    # -- inputs ----------------------------------------------------------------------------------------------------

    @classmethod
    def start(
        cls,
        command: rec.StartRun,
        at: int,
        environment: Environment,
        history: Callable[[int], Iterable[Event]],
        trace: Trace | None = None,
        obstacle: BaseException | None = None,
    ) -> tuple[Run, Outcome]:
        """A new run, in a ``trace`` where it has one; with an ``obstacle`` it is created blocked."""
        data = ev.RunCreated(
            workflow=command.workflow,
            input=payloads.encode(command.input),
            attributes=command.attributes,
            parent=command.parent,
            start_at=command.start_at,
            traceparent=None if trace is None else trace.parent,
            nonce=command.nonce,
            version=environment.newest(command.workflow),
            origins=() if command.rerun_of is None else (rec.Origin(run_id=command.rerun_of),),
            tracestate=None if trace is None else trace.state,
        )
        first = ev.event(command.run_id, 1, at, data)
        run = cls(created(first), environment, history)
        run.state.apply(first)
        run._out.events.append(first)
        try:
            if obstacle is not None:
                raise Blocked(to_error(obstacle))
            run._execution = Execution(command.run_id, data, environment)
        except Blocked as e:
            run._emit_blocked(e, at)
        if START not in run.state.items:
            run._begin(at)
        return run, run._answer()

    @classmethod
    def copied(
        cls,
        record: rec.RunCopied,
        log: Sequence[Event],
        at: int,
        environment: Environment,
        history: Callable[[int], Iterable[Event]],
        obstacle: BaseException | None = None,
    ) -> tuple[Run, Outcome]:
        """A run that goes on where another one was; with an ``obstacle`` it is created blocked.

        ``log``: the record's events: the run's first ones, then what its open hooks received later.
        """
        first = log[0].data
        assert isinstance(first, ev.RunCreated), log[0]
        count = first.origins[-1].events
        kept, later = log[:count], log[count:]
        run = cls(created(kept[0]), environment, history)
        for event in kept:
            run.state.apply(event)
        run._out.events += kept
        at = run._clamp(at)
        run._emit(ev.RunReset(reason=record.reason), at)
        for correlation_id, item in list(run.state.items.items()):
            run._take_over(correlation_id, item, at)
        try:
            if obstacle is not None:
                raise Blocked(to_error(obstacle))
            replayed = replay(kept, environment, cut=True)
        except Blocked as e:
            run._emit_blocked(e, at)
        else:
            run._execution = replayed.execution
            run._record(list(replayed.pending), at)
        if run.state.header.status == "pending" and START not in run.state.items:
            run._begin(at)
        for received in later:
            if isinstance(run.state.items.get(received.correlation_id or ""), OpenHook):
                run._deliver(received.data, at, received.correlation_id)
        return run, run._answer()

    def _take_over(self, correlation_id: str, item: OpenItem, at: int) -> None:
        """What another run had under way becomes this one's."""
        if isinstance(item, OpenHook) and item.claiming:
            run_id = self.state.header.run_id
            self._out.signals.append(rec.ClaimToken(token=item.token, run_id=run_id, hook_id=correlation_id))
        elif isinstance(item, OpenStep) and not item.held:
            self._request(correlation_id, item, at)
        elif isinstance(item, OpenChild) and not item.held:
            watch = rec.WatchRun(
                run_id=item.run_id, watcher_run_id=self.state.header.run_id, correlation_id=correlation_id
            )
            self._out.commands.append(watch)

    def reset(self, kept: int, successor: str, reason: str | None, at: int) -> Outcome:
        """Ends the run, where it has not, because another one goes on from its first events, with their children."""
        if not self.state.terminal:
            said = f"reset to event {kept} as run {successor}" + (f": {reason}" if reason else "")
            self._kept = kept
            self._emit(ev.RunCancelled(reason=said, successor=successor), self._clamp(at))
            self.evict()
        return self._answer()

    def result(self, record: rec.StepResult, at: int) -> Outcome:
        """A worker's answer. Only that to the attempt and the work that the step waits for counts."""
        step = self.state.step(record.step_id)
        if (
            step is None
            or step.attempt != record.attempt
            or step.fingerprint != record.fingerprint
            or step.status == "backoff"
        ):
            return self._answer()
        at = self._clamp(at)
        if step.started != record.attempt:
            started = ev.StepStarted(attempt=record.attempt, worker=record.worker, started_at=record.started_at)
            self._emit(started, at, record.step_id)
        outcome = record.outcome
        if isinstance(outcome, rec.StepSucceeded):
            done = ev.StepCompleted(attempt=record.attempt, result=outcome.result, streams=record.streams)
            self._deliver(done, at, record.step_id)
        else:
            self._attempt_failed(record.step_id, step, at, outcome.error, outcome.retry_after, fatal=outcome.fatal)
        return self._answer()

    def heartbeat(self, record: rec.StepHeartbeat, at: int) -> Outcome:
        """A worker still runs an attempt: it becomes, or stays, a lease."""
        step = self.state.step(record.step_id)
        if step is None or step.attempt != record.attempt or step.status == "backoff":
            return self._answer()
        if step.status == "leased":
            self.state.extend_lease(record.step_id, step, record.lease_until)
        else:
            started = ev.StepStarted(
                attempt=record.attempt,
                worker=record.worker,
                started_at=record.started_at,
                lease_until=record.lease_until,
                execution=step.executions,
            )
            self._emit(started, self._clamp(at), record.step_id)
        return self._answer()

    def claim(self, record: rec.StepClaim, at: int) -> tuple[Outcome, ClaimAnswer, int]:
        """A worker found a request that may have been answered before: (outcome, answer, number of the execution)."""
        step = self.state.step(record.step_id)
        if step is None or step.attempt != record.attempt or step.status == "backoff":
            return self._answer(), "DONE", 0
        if step.status == "leased":
            return self._answer(), "LEASED", step.executions
        at = self._clamp(at)
        if step.claimed_by != record.reply_to.request_id:  # else it asks again, and hears the same again
            if step.executions > step.max_retries + CRASHES_TOLERATED:
                lost = WorkerLostError(f"{step.executions} workers died while they ran step {step.step!r}")
                self._attempt_failed(record.step_id, step, at, to_error(lost), None, fatal=True)
                return self._answer(), "DONE", 0
            execution = step.executions + 1
            started = ev.StepStarted(attempt=step.attempt, worker=record.worker, started_at=at, execution=execution)
            self._emit(started, at, record.step_id)
            step.claimed_by = record.reply_to.request_id
        return self._answer(), "OPEN", step.executions

    def cancel(self, reason: str | None, at: int) -> Outcome:
        """Delivers a cancellation, once; a run that cannot take it is cancelled at once."""
        header = self.state.header
        if self.state.terminal or (header.cancelling and not header.blocked):
            return self._answer()
        at = self._clamp(at)
        if header.status == "pending" or header.blocked:
            self._emit(ev.RunCancelled(reason=reason), at)
            self.evict()
            return self._answer()
        self._deliver(ev.RunCancelling(reason=reason), at)
        if header.blocked:  # its history turned out not to be replayable just now
            self._emit(ev.RunCancelled(reason=reason), at)
        return self._answer()

    def resume(
        self, token: str, hook_id: str, resume_id: str, payload: rec.Payload, at: int
    ) -> tuple[Outcome, Resumed]:
        """Outside data for a hook.

        Whether the resume was there before is for the caller to know: it may be as old as the run.
        """
        if self.state.terminal:
            return self._answer(), "ENDED"
        hook = self.state.items.get(hook_id)
        at = self._clamp(at)
        if isinstance(hook, OpenHook) and hook.claiming:  # whoever delivers to it knows that it holds the token
            self._deliver(ev.HookGranted(), at, hook_id)
            hook = self.state.items.get(hook_id)
        if not isinstance(hook, OpenHook) or hook.token != token:
            return self._answer(), "UNKNOWN"
        self._deliver(ev.HookReceived(resume_id=resume_id, payload=payloads.encode(payload)), at, hook_id)
        return self._answer(), "OK"

    def granted(self, record: rec.TokenGranted, at: int) -> Outcome:
        """The token is the run's. Where the run does not want it any more, it goes back."""
        hook = self.state.items.get(record.hook_id)
        if not isinstance(hook, OpenHook):
            self._release(record.token, record.hook_id)
        elif hook.claiming:
            self._deliver(ev.HookGranted(), self._clamp(at), record.hook_id)
        return self._answer()

    def refused(self, record: rec.TokenRefused, at: int) -> Outcome:
        """Another hook holds the token."""
        hook = self.state.items.get(record.hook_id)
        if isinstance(hook, OpenHook) and hook.claiming:
            conflict = ev.HookConflict(token=record.token, holder_run_id=record.holder_run_id)
            self._deliver(conflict, self._clamp(at), record.hook_id)
        return self._answer()

    def child_finished(self, record: rec.ChildFinished, at: int) -> Outcome:
        """A run that this one waits for has ended."""
        child = self.state.items.get(record.correlation_id)
        if isinstance(child, OpenChild) and child.run_id == record.child_run_id:
            done = ev.ChildCompleted(status=record.status, result=record.result, error=record.error)
            self._deliver(done, self._clamp(at), record.correlation_id)
        return self._answer()

    def watch(self, run_id: str, correlation_id: str, at: int) -> Outcome:
        """Another run waits for the end of this one."""
        header = self.state.header
        parent = header.parent
        if parent is not None and (parent.run_id, parent.correlation_id) == (run_id, correlation_id):
            return self._answer()  # it started this run, and will be told
        if self.state.terminal:
            self._tell(run_id, correlation_id, self._end or next(iter(self._history(header.seq))).data)
        elif watcher_id(run_id, correlation_id) not in self.state.items:
            self._emit(ev.RunWatched(run_id=run_id, correlation_id=correlation_id), self._clamp(at))
        return self._answer()

    def timer(self, correlation_id: str, due: int) -> Outcome:
        """The time of an open item has come; a timer that was moved or closed in the meantime does nothing."""
        item = self.state.items.get(correlation_id)
        if item is None or item.due != due:
            return self._answer()
        at = self._clamp(due)
        assert isinstance(item, OpenStep | OpenWait), item  # the others have no timer
        if isinstance(item, OpenWait):
            if correlation_id == START:
                self._begin(at)
            else:
                self._deliver(ev.WaitCompleted(), at, correlation_id)
        elif item.status == "leased":
            self._attempt_failed(correlation_id, item, at, _silence(item, at), 0)
        else:
            self._emit(ev.StepScheduled(attempt=item.attempt), at, correlation_id)
            self._request(correlation_id, item, at)
        return self._answer()

    def block(self, error: BaseException) -> Outcome:
        """Stops a run that its processor cannot take further, for a reason that its own code did not give.

        A run that is blocked already is so under this code, too, from then on.
        """
        if not self.state.terminal:
            self.evict()
            self._emit_blocked(Blocked(to_error(error)), self.state.header.at)
        return self._answer()

    def unblock(self) -> Outcome:
        """Tries a blocked run with the code that there is now. No events: it stays blocked."""
        header = self.state.header
        try:
            execution, pending, backlog = replay(self._history(1), self._environment)
        except Blocked:
            return self._answer()
        commands: list[Command] = list(pending)
        try:
            for delivery in backlog:
                commands.extend(execution.deliver(delivery))
        except Blocked:
            execution.close()
            return self._answer()
        self._execution = execution
        self._emit(ev.RunUnblocked(code_version=self._environment.code_version), header.at)
        self._record(commands, header.at)
        if header.status == "pending" and START not in self.state.items:
            self._begin(header.at)
        return self._answer()

    # -- how they work ---------------------------------------------------------------------------------------------

    def _answer(self) -> Outcome:
        out, self._out = self._out, Outcome()
        return out

    def _clamp(self, at: int) -> int:
        # An input's time is its record's; a run's own time never goes back, whichever clocks the records came from.
        return max(at, self.state.header.at)

    def _emit(self, data: ev.EventData, at: int, correlation_id: str | None = None) -> Event:
        state = self.state
        event = ev.event(state.header.run_id, state.header.seq + 1, at, data, correlation_id)
        if type(data) in _ENDS:
            self._settle(data, at)
        held = state.held() if state.claiming and isinstance(data, _TOKEN_SETTLED) else ()
        state.apply(event)
        self._out.events.append(event)
        if not state.claiming:
            for waiting in held:
                self._hand_out(waiting, at)
        return event

    def _hand_out(self, correlation_id: str, at: int) -> None:
        item = self.state.items[correlation_id]
        if isinstance(item, OpenStep):
            self._request(correlation_id, item, at)
        elif isinstance(item, OpenChild):
            created = self.state.unborn.pop(correlation_id, None) or self._recall(item.seq)
            assert isinstance(created, ev.ChildCreated), created
            self._out.commands.append(self._birth(created, correlation_id, at))

    def _settle(self, data: ev.EventData, at: int) -> None:
        """What the end of the run means to others. The run's items are still open."""
        if not isinstance(data, ev.RunCancelled):  # what it has started goes on, also where it was not handed out yet
            for correlation_id in self.state.held() if self.state.claiming else ():
                self._hand_out(correlation_id, at)
        for correlation_id, item in self.state.items.items():
            if isinstance(item, OpenHook) and item.custom:
                self._release(item.token, correlation_id, item.recent)
            elif isinstance(item, OpenChild) and item.cancel and item.seq > self._kept:
                self._cancel_child(item.run_id, f"its parent {self.state.header.run_id} has ended", at)
            elif isinstance(item, Watcher):
                self._tell(item.run_id, item.correlation_id, data)
        self._end = data
        parent = self.state.header.parent
        if parent is not None:
            self._tell(parent.run_id, parent.correlation_id, data)

    def _tell(self, run_id: str, correlation_id: str, end: ev.EventData) -> None:
        error: Error | None = None
        if isinstance(end, ev.RunFailed):
            error = end.error
        elif isinstance(end, ev.RunCancelled):
            error = to_error(RunCancelledError(end.reason or "", self.state.header.run_id))
        self._out.signals.append(
            rec.ChildFinished(
                run_id=run_id,
                correlation_id=correlation_id,
                child_run_id=self.state.header.run_id,
                status=_ENDS[type(end)],
                result=end.result if isinstance(end, ev.RunCompleted) else None,
                error=error,
            )
        )

    def _release(self, token: str, hook_id: str, received: Sequence[str] = ()) -> None:
        run_id = self.state.header.run_id
        self._out.signals.append(
            rec.ReleaseToken(token=token, run_id=run_id, hook_id=hook_id, resume_ids=tuple(received))
        )

    def _cancel_child(self, run_id: str, reason: str | None, at: int) -> None:
        self._out.commands.append(rec.CancelRun(run_id=run_id, reason=reason, requested_at=at))

    def _emit_blocked(self, obstacle: Blocked, at: int) -> None:
        self._emit(msgspec.structs.replace(obstacle.data, code_version=self._environment.code_version), at)

    def _begin(self, at: int) -> None:
        if self.state.header.blocked:
            return
        self._revive()
        if self._execution is None:
            return  # it begins when it is unblocked
        environment = self._environment
        build = environment.build_of(self._execution.workflow)
        started = ev.RunStarted(code_version=environment.code_version, url=environment.gateway_url, build=build)
        self._deliver(started, at)

    def _deliver(self, data: ev.EventData, at: int, correlation_id: str | None = None) -> None:
        """Records what the workflow waits for and lets it go on. A blocked run only records it."""
        self._revive()
        event = self._emit(data, at, correlation_id)
        if self._execution is None:
            return
        try:
            commands = self._execution.deliver(event)
        except Blocked as e:
            self.evict()
            self._emit_blocked(e, at)
        else:
            self._record(commands, at)

    def _revive(self) -> None:
        """Brings the execution back before an input is recorded; where that fails, the run is blocked."""
        if self._execution is not None or self.state.header.blocked:
            return
        try:
            self._execution = replay(self._history(1), self._environment).execution
        except Blocked as e:
            self._emit_blocked(e, self.state.header.at)

    def _record(self, commands: Sequence[Command], at: int) -> None:
        for data, correlation_id in commands:
            closing = self.state.items.get(correlation_id) if correlation_id is not None else None
            self._emit(data, at, correlation_id)
            if isinstance(data, ev.StepCreated):
                assert correlation_id is not None
                step = self.state.step(correlation_id)
                if step is not None and not step.held:
                    self._request(correlation_id, step, at)
            elif correlation_id is not None and type(data) is not ev.WaitCreated:
                self._carry_out(data, correlation_id, closing, at)
        if self.state.terminal:
            self.evict()

    def _carry_out(self, data: ev.EventData, correlation_id: str, item: OpenItem | None, at: int) -> None:
        """The effects of a command that is about a hook or a child; ``item`` is what it was about before."""
        header = self.state.header
        if isinstance(data, ev.HookCreated):
            if tokens.run_of(data.token) is None:
                claim = rec.ClaimToken(token=data.token, run_id=header.run_id, hook_id=correlation_id)
                self._out.signals.append(claim)
        elif isinstance(data, ev.HookDisposed):
            if isinstance(item, OpenHook) and item.custom:
                self._release(item.token, correlation_id, item.recent)
        elif isinstance(data, ev.ChildCancelling):
            if isinstance(item, OpenChild):
                self._cancel_child(item.run_id, data.reason, at)
        elif isinstance(data, ev.ChildCreated) and correlation_id not in self.state.unborn:
            self._out.commands.append(self._birth(data, correlation_id, at))

    def _birth(self, data: ev.ChildCreated, child_id: str, at: int) -> rec.StartRun | rec.WatchRun:
        """What makes a child of it: the start of a run, or the wish to be told of one's end."""
        header = self.state.header
        if data.workflow == WATCHED_ONLY:
            return rec.WatchRun(run_id=data.child_run_id, watcher_run_id=header.run_id, correlation_id=child_id)
        root = header.parent.root_run_id if header.parent is not None else header.run_id
        return rec.StartRun(
            run_id=data.child_run_id,
            workflow=data.workflow,
            input=data.input,
            attributes=data.attributes,
            parent=rec.Parent(run_id=header.run_id, correlation_id=child_id, root_run_id=root),
            start_at=data.start_at,
            requested_at=at,
            nonce=blake2b(f"{header.nonce}\0{child_id}".encode(), digest_size=16).hexdigest(),
        )

    def _request(self, step_id: str, step: OpenStep, at: int) -> None:
        header = self.state.header
        payload = self.state.inputs.get(step_id)
        if payload is None:
            created = self._recall(step.seq)
            assert isinstance(created, ev.StepCreated), created
            payload = self.state.inputs[step_id] = created.input
        request = rec.StepRequest(
            run_id=header.run_id,
            step_id=step_id,
            step=step.step,
            attempt=step.attempt,
            fingerprint=step.fingerprint,
            input=payload,
            workflow=header.workflow,
            workflow_started_at=header.started_at or header.created_at,
            scheduled_at=at,
            timeout=step.timeout,
            workflow_url=header.url,
        )
        self._out.requests.append((step.queue, request))

    def _recall(self, seq: int) -> ev.EventData:
        event = next(iter(self._history(seq)))
        assert event.seq == seq, event
        return event.data

    def _attempt_failed(
        self, step_id: str, step: OpenStep, at: int, error: Error, retry_after: int | None, *, fatal: bool = False
    ) -> None:
        if fatal or step.attempt > step.max_retries:
            self._deliver(ev.StepFailed(attempt=step.attempt, error=error), at, step_id)
            return
        delay = max(0, retry_after) if retry_after is not None else _delay(step.backoff, step.attempt)
        self._emit(ev.StepRetrying(attempt=step.attempt + 1, error=error, retry_at=at + delay), at, step_id)


def _delay(backoff: ev.Backoff, retry: int) -> int:
    try:
        return int(min(backoff.max_ms, backoff.initial_ms * backoff.factor ** (retry - 1)))
    except OverflowError:
        return backoff.max_ms


def _silence(step: OpenStep, at: int) -> Error:
    if step.timeout is not None and step.started_at is not None and at >= step.started_at + step.timeout:
        return to_error(StepTimeoutError(f"step {step.step!r} took longer than its timeout of {step.timeout} ms"))
    return to_error(WorkerLostError(f"worker {step.worker} fell silent while it ran step {step.step!r}"))
