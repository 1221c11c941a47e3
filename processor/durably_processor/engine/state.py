"""A run's state, derived from its events by one function, live and in recovery alike.

    STEP     created ──> scheduled ──result──> closed
                          │   ▲  │
               heartbeat  ▼   │  └─failure──> backoff ──timer──> scheduled   (attempt + 1)
                         leased ──lease over──> backoff
             held: created, but not handed out until every token that the run had asked for is granted or refused
    WAIT     created ──timer, or dropped by the workflow──> closed
    HOOK     claiming ──granted──> active ──disposed of, or the run's end──> closed      (a default token: active at once)
             claiming ──refused──> closed
    CHILD    created ──its end──> closed
    RUN      pending ─> running ─> completed | failed | cancelled
             any but the last three <─> blocked

Every open step and wait has exactly one timer, ``due``; hooks and children have none.
"""

from __future__ import annotations

from itertools import islice
from typing import ClassVar, Literal

import msgspec
from durably.tokens import run_of
from durably_schemas import events as ev
from durably_schemas.records import TERMINAL, Error, Event, Origin, Parent, Payload, RunStatus, RunSummary

REDISPATCH_MS = 3 * 24 * 60 * 60 * 1000
"""A request that nobody answers is handed out again after this; shorter than the retention of ``requests``."""
TIMEOUT_GRACE_MS = 5_000
"""The worker enforces a step's timeout; when it does not, for this long, the processor does."""

TOKENS_TOLD = 100
"""How many of a run's hooks its summary names."""

RESUMES_TOLD = 50
"""How many resumes of a hook the owner of its token is told of: copies of older ones are no longer under way."""

START = "start"
"""The item that waits for a delayed start."""

StepStatus = Literal["scheduled", "leased", "backoff"]


class OpenStep(msgspec.Struct, tag="s"):
    """A step without a result. ``input`` stays in memory only: the log has it at ``seq``."""

    step: str
    queue: str
    seq: int
    fingerprint: str
    max_retries: int
    backoff: ev.Backoff
    timeout: int | None
    due: int
    status: StepStatus = "scheduled"
    attempt: int = 1
    started: int = 0  # the attempt that step_started has been written for
    executions: int = 1
    claimed_by: str | None = None
    worker: str | None = None
    started_at: int | None = None
    held: bool = False


class OpenWait(msgspec.Struct, tag="w"):
    """A sleep or a timeout."""

    due: int


class OpenHook(msgspec.Struct, tag="h"):
    """A hook that may receive payloads, or will when its token is granted. The log has its metadata at ``seq``."""

    due: ClassVar[None] = None
    token: str
    seq: int
    created_at: int
    claiming: bool
    received: int = 0
    recent: list[str] = []  # the last resumes, for a custom token: whoever looks after it is told at the end

    @property
    def custom(self) -> bool:
        """Its token is looked after by the token's own partition."""
        return run_of(self.token) is None


class OpenChild(msgspec.Struct, tag="c"):
    """A run that this one started, or watches, and that has not ended."""

    due: ClassVar[None] = None
    run_id: str
    cancel: bool
    seq: int
    held: bool = False


class Watcher(msgspec.Struct, tag="x"):
    """A run that waits for the end of this one."""

    due: ClassVar[None] = None
    run_id: str
    correlation_id: str


OpenItem = OpenStep | OpenWait | OpenHook | OpenChild | Watcher


def watcher_id(run_id: str, correlation_id: str) -> str:
    """Of a watcher's item: no step, wait, hook or child has such an id."""
    return f"{run_id}|{correlation_id}"


class Header(msgspec.Struct, omit_defaults=True):
    """What is kept of a run besides its open items."""

    run_id: str
    workflow: str
    created_at: int
    status: RunStatus = "pending"
    seq: int = 0
    at: int = 0  # of its latest event
    attributes: dict[str, str] = {}
    parent: Parent | None = None
    started_at: int | None = None
    completed_at: int | None = None
    error: Error | None = None
    code_version: str | None = None
    cancelling: bool = False
    cancel_reason: str | None = None
    blocked: bool = False
    blocked_under: str | None = None  # the code version that could not go on
    streams: list[str] = []
    nonce: str = ""
    url: str | None = None
    origin: Origin | None = None
    build: str | None = None
    version: int | None = None
    successor: str | None = None
    traceparent: str | None = None
    tracestate: str | None = None


_AWAITED_OTHERWISE = frozenset({OpenStep, Watcher})


class RunState:
    """The state of one run.

    Attributes:
        header: everything but the open items.
        items: open steps and waits by correlation id.
        inputs: of open steps, as far as they are in memory.
        unborn: children that are held, as far as they are in memory.
        unsettled: how many open steps have a timer that may fire soon (backoff, lease).
        waits: how many open items are what this run waits for, other than steps.
        claiming: how many hooks wait for their token.
        hooks: ids of open hooks by token.
        touched: ids of the items that changed since this was last cleared.
        news: counts the changes of what the summary tells.
    """

    __slots__ = ("claiming", "header", "hooks", "inputs", "items", "news", "touched", "unborn", "unsettled", "waits")

    def __init__(self, header: Header, items: dict[str, OpenItem] | None = None) -> None:
        self.header = header
        self.items: dict[str, OpenItem] = items or {}
        self.inputs: dict[str, Payload] = {}
        self.unborn: dict[str, ev.ChildCreated] = {}
        self.touched: set[str] = set()
        self.news = 0
        self.waits = sum(type(i) not in _AWAITED_OTHERWISE for i in self.items.values())
        self.claiming = sum(type(i) is OpenHook and i.claiming for i in self.items.values())
        self.hooks = {i.token: hook_id for hook_id, i in self.items.items() if type(i) is OpenHook}
        self.unsettled = sum(type(i) is OpenStep and i.status != "scheduled" for i in self.items.values())

    @property
    def terminal(self) -> bool:
        """The run has ended."""
        return self.header.status in TERMINAL

    def summary(self) -> RunSummary:
        """What the topic ``runs`` says of it."""
        h = self.header
        return RunSummary(
            run_id=h.run_id,
            workflow=h.workflow,
            status="blocked" if h.blocked and not self.terminal else h.status,
            attributes=h.attributes,
            parent=h.parent,
            created_at=h.created_at,
            started_at=h.started_at,
            completed_at=h.completed_at,
            error=h.error,
            code_version=h.code_version,
            events=h.seq,
            hooks=tuple(islice(self.hooks, TOKENS_TOLD)),
            origin=h.origin,
            build=h.build,
            version=h.version,
        )

    def apply(self, event: Event) -> None:
        """Takes one event in. The event must be the next one: its seq follows the header's."""
        h = self.header
        h.seq, h.at = event.seq, event.at
        _APPLY[type(event.data)](self, event, event.data)

    # -- items -----------------------------------------------------------------------------------------------------

    def _open(self, correlation_id: str, item: OpenItem) -> None:
        self.items[correlation_id] = item
        self.touched.add(correlation_id)
        if type(item) in _AWAITED_OTHERWISE:
            return
        self.waits += 1
        if type(item) is OpenHook:
            self.claiming += item.claiming
            self.hooks.setdefault(item.token, correlation_id)
            self.news += 1

    def _close(self, correlation_id: str) -> None:
        item = self.items.pop(correlation_id, None)
        if item is None:
            return
        self.touched.add(correlation_id)
        self.inputs.pop(correlation_id, None)
        self.unborn.pop(correlation_id, None)
        if type(item) is OpenStep:
            self.unsettled -= item.status != "scheduled"
        if type(item) in _AWAITED_OTHERWISE:
            return
        self.waits -= 1
        if type(item) is OpenHook:
            self.claiming -= item.claiming
            if self.hooks.get(item.token) == correlation_id:
                del self.hooks[item.token]
            self.news += 1
            self._hand_out()

    def _turn(self, correlation_id: str, step: OpenStep, status: StepStatus, due: int) -> None:
        self.unsettled += (status != "scheduled") - (step.status != "scheduled")
        step.status, step.due = status, due
        self.touched.add(correlation_id)

    def _hand_out(self) -> None:
        if self.claiming:
            return
        for correlation_id in self.held():
            item = self.items[correlation_id]
            assert isinstance(item, OpenStep | OpenChild)
            item.held = False
            self.touched.add(correlation_id)

    def held(self) -> list[str]:
        """Ids of the steps and children that wait for the tokens."""
        return [i for i, item in self.items.items() if isinstance(item, OpenStep | OpenChild) and item.held]

    def step(self, correlation_id: str) -> OpenStep | None:
        """The open step with this id."""
        item = self.items.get(correlation_id)
        return item if type(item) is OpenStep else None

    def extend_lease(self, correlation_id: str, step: OpenStep, lease_until: int) -> None:
        """A heartbeat. Not an event: what a crash forgets of it, the grace after a take-over makes good."""
        step.due = _lease_due(step, lease_until)
        self.touched.add(correlation_id)

    # -- one function an event type --------------------------------------------------------------------------------

    def _run_created(self, event: Event, data: ev.RunCreated) -> None:
        h = self.header
        h.attributes, h.parent, h.nonce = dict(data.attributes), data.parent, data.nonce
        h.origin, h.version = data.origins[-1] if data.origins else None, data.version
        h.traceparent, h.tracestate = data.traceparent, data.tracestate
        if data.start_at is not None and data.start_at > event.at:
            self._open(START, OpenWait(due=data.start_at))

    def _run_started(self, event: Event, data: ev.RunStarted) -> None:
        h = self.header
        h.status, h.started_at, h.code_version, h.url = "running", event.at, data.code_version, data.url
        h.build = data.build
        self._close(START)

    def _end(self, event: Event, status: RunStatus, error: Error | None = None) -> None:
        h = self.header
        h.status, h.completed_at, h.error, h.blocked = status, event.at, error, False
        for correlation_id in list(self.items):
            self._close(correlation_id)

    def _run_completed(self, event: Event, data: ev.RunCompleted) -> None:
        self._end(event, "completed")

    def _run_failed(self, event: Event, data: ev.RunFailed) -> None:
        self._end(event, "failed", data.error)

    def _run_cancelled(self, event: Event, data: ev.RunCancelled) -> None:
        self.header.cancel_reason, self.header.successor = data.reason, data.successor
        self._end(event, "cancelled")

    def _run_cancelling(self, event: Event, data: ev.RunCancelling) -> None:
        self.header.cancelling, self.header.cancel_reason = True, data.reason

    def _run_blocked(self, event: Event, data: ev.RunBlocked) -> None:
        h = self.header
        h.blocked, h.error, h.blocked_under = True, data.error, data.code_version

    def _run_unblocked(self, event: Event, data: ev.RunUnblocked) -> None:
        h = self.header
        h.blocked, h.error, h.code_version = False, None, data.code_version

    def _step_created(self, event: Event, data: ev.StepCreated) -> None:
        self.inputs[_id(event)] = data.input
        step = OpenStep(
            step=data.step,
            queue=data.queue,
            seq=event.seq,
            fingerprint=data.fingerprint,
            max_retries=data.max_retries,
            backoff=data.backoff,
            timeout=data.timeout,
            due=event.at + REDISPATCH_MS,
            held=self.claiming > 0,
        )
        self._open(_id(event), step)

    def _step_started(self, event: Event, data: ev.StepStarted) -> None:
        step = self.step(_id(event))
        if step is None:
            return
        step.started, step.executions = data.attempt, data.execution
        step.worker, step.started_at = data.worker, data.started_at
        self.touched.add(_id(event))
        if data.lease_until is not None:
            self._turn(_id(event), step, "leased", _lease_due(step, data.lease_until))

    def _step_scheduled(self, event: Event, data: ev.StepScheduled) -> None:
        step = self.step(_id(event))
        if step is not None:
            self._turn(_id(event), step, "scheduled", event.at + REDISPATCH_MS)

    def _step_retrying(self, event: Event, data: ev.StepRetrying) -> None:
        step = self.step(_id(event))
        if step is not None:
            step.attempt, step.executions, step.claimed_by, step.started_at = data.attempt, 1, None, None
            self._turn(_id(event), step, "backoff", data.retry_at)

    def _step_completed(self, event: Event, data: ev.StepCompleted) -> None:
        self._close(_id(event))
        if data.streams:
            written = (stream.namespace for stream in data.streams)
            self.header.streams = list(dict.fromkeys((*self.header.streams, *written)))

    def _step_failed(self, event: Event, data: ev.StepFailed) -> None:
        self._close(_id(event))

    def _step_cancelled(self, event: Event, data: ev.StepCancelled) -> None:
        self._close(_id(event))

    def _hook_created(self, event: Event, data: ev.HookCreated) -> None:
        claiming = run_of(data.token) is None
        self._open(_id(event), OpenHook(token=data.token, seq=event.seq, created_at=event.at, claiming=claiming))

    def _hook_granted(self, event: Event, data: ev.HookGranted) -> None:
        hook = self.items.get(_id(event))
        if type(hook) is OpenHook and hook.claiming:
            hook.claiming = False
            self.claiming -= 1
            self.touched.add(_id(event))
            self._hand_out()

    def _hook_conflict(self, event: Event, data: ev.HookConflict) -> None:
        self._close(_id(event))

    def _hook_received(self, event: Event, data: ev.HookReceived) -> None:
        hook = self.items.get(_id(event))
        if type(hook) is OpenHook:
            hook.received += 1
            if hook.custom:
                hook.recent = [*hook.recent[1 - RESUMES_TOLD :], data.resume_id]
            self.touched.add(_id(event))

    def _hook_disposed(self, event: Event, data: ev.HookDisposed) -> None:
        self._close(_id(event))

    def _child_created(self, event: Event, data: ev.ChildCreated) -> None:
        held = self.claiming > 0
        if held:
            self.unborn[_id(event)] = data
        self._open(_id(event), OpenChild(run_id=data.child_run_id, cancel=data.cancel, seq=event.seq, held=held))

    def _child_cancelling(self, event: Event, data: ev.ChildCancelling) -> None:
        """Its end is still to come."""

    def _child_completed(self, event: Event, data: ev.ChildCompleted) -> None:
        self._close(_id(event))

    def _attributes_set(self, event: Event, data: ev.AttributesSet) -> None:
        merged = {**self.header.attributes, **data.attributes}
        self.header.attributes = {name: value for name, value in merged.items() if value is not None}
        self.news += 1

    def _patch_marked(self, event: Event, data: ev.PatchMarked) -> None:
        """For the run's code only."""

    def _run_reset(self, event: Event, data: ev.RunReset) -> None:
        """What is open is the run's own from now on: its tokens are still to be granted, and its steps begin anew."""
        for correlation_id, item in list(self.items.items()):
            if type(item) is Watcher:
                self._close(correlation_id)
            elif type(item) is OpenHook and item.custom and not item.claiming:
                item.claiming = True
                self.claiming += 1
                self.touched.add(correlation_id)
        for correlation_id, item in self.items.items():
            if type(item) is OpenStep:
                item.attempt, item.executions, item.started = 1, 1, 0
                item.claimed_by = item.worker = item.started_at = None
                item.held = self.claiming > 0
                self._turn(correlation_id, item, "scheduled", event.at + REDISPATCH_MS)

    def _run_watched(self, event: Event, data: ev.RunWatched) -> None:
        watcher = Watcher(run_id=data.run_id, correlation_id=data.correlation_id)
        self._open(watcher_id(data.run_id, data.correlation_id), watcher)

    def _wait_created(self, event: Event, data: ev.WaitCreated) -> None:
        self._open(_id(event), OpenWait(due=data.due_at))

    def _wait_completed(self, event: Event, data: ev.WaitCompleted) -> None:
        self._close(_id(event))


def _id(event: Event) -> str:
    assert event.correlation_id is not None, event
    return event.correlation_id


def _lease_due(step: OpenStep, lease_until: int) -> int:
    if step.timeout is None or step.started_at is None:
        return lease_until
    return min(lease_until, step.started_at + step.timeout + TIMEOUT_GRACE_MS)


_APPLY = {cls: getattr(RunState, f"_{name}") for cls, name in ev.TYPE_OF.items() if hasattr(RunState, f"_{name}")}


def created(event: Event) -> RunState:
    """The state that a run_created event begins; the event itself is still to be applied."""
    data = event.data
    assert isinstance(data, ev.RunCreated), event
    return RunState(Header(run_id=event.run_id, workflow=data.workflow, created_at=event.at))
