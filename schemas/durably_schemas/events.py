"""What the entries of a run's log carry: one record for each event type (namespace ``durably.events``)."""

from __future__ import annotations

from durably_schemas.records import Error, Event, Origin, Parent, Payload, Record, RunStatus, StreamWritten


class Backoff(Record, frozen=True, kw_only=True):
    """Delay before retry n, counted from 1: ``min(max_ms, initial_ms * factor ** (n - 1))``."""

    initial_ms: int
    factor: float
    max_ms: int


class RunCreated(Record, frozen=True, kw_only=True):
    """The first entry.

    ``origins``: where the log's beginning was copied from, the earliest first; the last is the run that this one repeats.
    ``version``: of the workflow's code, where that has several.
    """

    workflow: str
    input: Payload
    attributes: dict[str, str] = {}
    parent: Parent | None = None
    start_at: int | None = None
    traceparent: str | None = None
    nonce: str = ""
    origins: tuple[Origin, ...] = ()
    version: int | None = None
    tracestate: str | None = None


class RunStarted(Record, frozen=True, kw_only=True):
    """Workflow code begins.

    ``url``: where the gateway is, as the run sees it for all its life. ``build``: of the workers that its steps go to,
    where it is pinned.
    """

    code_version: str | None = None
    url: str | None = None
    build: str | None = None


class RunCompleted(Record, frozen=True, kw_only=True):
    """Workflow code returned."""

    result: Payload


class RunFailed(Record, frozen=True, kw_only=True):
    """Workflow code raised."""

    error: Error


class RunCancelling(Record, frozen=True, kw_only=True):
    """Cancellation is delivered into the workflow; its cleanup may still run steps."""

    reason: str | None = None


class RunCancelled(Record, frozen=True, kw_only=True):
    """The workflow has ended after a cancellation, or was reset: then its ``successor`` goes on."""

    reason: str | None = None
    successor: str | None = None


class RunBlocked(Record, frozen=True, kw_only=True):
    """The run waits for other code: its own diverged from the log, is missing, or never yields."""

    error: Error
    expected: str | None = None
    found: str | None = None
    code_version: str | None = None


class RunUnblocked(Record, frozen=True, kw_only=True):
    """Other code took the run further."""

    code_version: str | None = None


class StepCreated(Record, frozen=True, kw_only=True):
    """The workflow called a step."""

    step: str
    queue: str
    input: Payload
    fingerprint: str
    max_retries: int
    backoff: Backoff
    timeout: int | None = None


class StepStarted(Record, frozen=True, kw_only=True):
    """An attempt was running: written with its result, or earlier when it became a lease."""

    attempt: int
    worker: str
    started_at: int
    lease_until: int | None = None
    execution: int = 1


class StepScheduled(Record, frozen=True, kw_only=True):
    """A timer handed an attempt out (again): a retry, or a request that nobody took for days."""

    attempt: int


class StepRetrying(Record, frozen=True, kw_only=True):
    """An attempt failed; ``attempt`` is the one that comes next."""

    attempt: int
    error: Error
    retry_at: int


class StepCompleted(Record, frozen=True, kw_only=True):
    """The step has its result."""

    attempt: int
    result: Payload
    streams: tuple[StreamWritten, ...] = ()


class StepFailed(Record, frozen=True, kw_only=True):
    """The step has failed for good."""

    attempt: int
    error: Error


class StepCancelled(Record, frozen=True, kw_only=True):
    """The workflow cancelled what waited for the step: its result no longer counts."""


class HookCreated(Record, frozen=True, kw_only=True):
    """The run waits for outside data under this token. A custom one has first to be granted."""

    token: str
    metadata: Payload | None = None
    webhook: bool = False
    response: Payload | None = None


class HookGranted(Record, frozen=True, kw_only=True):
    """The run holds the custom token that it asked for."""


class HookConflict(Record, frozen=True, kw_only=True):
    """Another run holds the token."""

    token: str
    holder_run_id: str


class HookReceived(Record, frozen=True, kw_only=True):
    """Outside data arrived."""

    resume_id: str
    payload: Payload


class HookDisposed(Record, frozen=True, kw_only=True):
    """The run gave the token back."""


class WaitCreated(Record, frozen=True, kw_only=True):
    """The workflow sleeps, or has set a timeout, until ``due_at``."""

    due_at: int


class WaitCompleted(Record, frozen=True, kw_only=True):
    """The wait is over: its time came, or the workflow dropped it."""

    cancelled: bool = False


class ChildCreated(Record, frozen=True, kw_only=True):
    """The workflow started another run, or (``workflow`` is empty) waits for one that somebody else started."""

    child_run_id: str
    workflow: str
    input: Payload
    attributes: dict[str, str] = {}
    start_at: int | None = None
    cancel: bool = False


class ChildCancelling(Record, frozen=True, kw_only=True):
    """The workflow asked for the cancellation of a child run."""

    reason: str | None = None


class ChildCompleted(Record, frozen=True, kw_only=True):
    """A child run has ended."""

    status: RunStatus
    result: Payload | None = None
    error: Error | None = None


class AttributesSet(Record, frozen=True, kw_only=True):
    """Attributes of the run changed; ``None`` removes one."""

    attributes: dict[str, str | None]


class RunWatched(Record, frozen=True, kw_only=True):
    """Another run waits for the end of this one."""

    run_id: str
    correlation_id: str


class TokenClaimed(Record, frozen=True, kw_only=True):
    """A run holds this token."""

    token: str
    run_id: str
    hook_id: str


class TokenReleased(Record, frozen=True, kw_only=True):
    """The token is free. ``resume_ids``: the last resumes that its holder received."""

    token: str
    run_id: str
    hook_id: str
    resume_ids: tuple[str, ...] = ()


class PatchMarked(Record, frozen=True, kw_only=True):
    """The workflow's code asked for this patch where the run had not been before. ``deprecated``: by `deprecate_patch`."""

    patch_id: str
    deprecated: bool = False


class RunReset(Record, frozen=True, kw_only=True):
    """All before this was copied from another run; what is open is begun anew."""

    reason: str | None = None


EventData = (
    RunCreated | RunStarted | RunCompleted | RunFailed | RunCancelling | RunCancelled | RunBlocked | RunUnblocked
    | StepCreated | StepStarted | StepScheduled | StepRetrying | StepCompleted | StepFailed
    | StepCancelled | HookCreated | HookGranted | HookConflict | HookReceived | HookDisposed
    | WaitCreated | WaitCompleted | ChildCreated | ChildCancelling | ChildCompleted
    | AttributesSet | RunWatched | TokenClaimed | TokenReleased | PatchMarked | RunReset
)  # fmt: skip

TYPE_OF: dict[type[Record], str] = {
    RunCreated: "run_created", RunStarted: "run_started", RunCompleted: "run_completed", RunFailed: "run_failed",
    RunCancelling: "run_cancelling", RunCancelled: "run_cancelled", RunBlocked: "run_blocked",
    RunUnblocked: "run_unblocked",
    StepCreated: "step_created", StepStarted: "step_started", StepScheduled: "step_scheduled",
    StepRetrying: "step_retrying",
    StepCompleted: "step_completed", StepFailed: "step_failed", StepCancelled: "step_cancelled",
    HookCreated: "hook_created", HookGranted: "hook_granted", HookConflict: "hook_conflict", HookReceived: "hook_received",
    HookDisposed: "hook_disposed",
    WaitCreated: "wait_created", WaitCompleted: "wait_completed",
    ChildCreated: "child_created", ChildCancelling: "child_cancelling", ChildCompleted: "child_completed",
    AttributesSet: "attributes_set", RunWatched: "run_watched",
    TokenClaimed: "token_claimed", TokenReleased: "token_released",
    PatchMarked: "patch_marked", RunReset: "run_reset",
}  # fmt: skip


def event(run_id: str, seq: int, at: int, data: EventData, correlation_id: str | None = None) -> Event:
    """An `Event` whose type is that of its data."""
    return Event(run_id=run_id, seq=seq, type=TYPE_OF[type(data)], at=at, data=data, correlation_id=correlation_id)
