"""The records on the topics, typed and frozen. One class for each ``avro/NAME.avsc``; field for field the same.

Instants are integers, milliseconds since the epoch; durations are integers, milliseconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import msgspec

if TYPE_CHECKING:
    from durably_schemas.events import EventData

RunStatus = Literal["pending", "running", "blocked", "completed", "failed", "cancelled"]
TERMINAL: frozenset[str] = frozenset({"completed", "failed", "cancelled"})
Query = Literal["SUMMARY", "EVENTS", "RESULT", "HOOK"]
ReplyStatus = Literal["OK", "NOT_FOUND", "REFUSED"]
ClaimAnswer = Literal["OPEN", "LEASED", "DONE"]
ChunkKind = Literal["DATA", "END"]


class Record(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """What every record is: immutable, compared by value."""


class Payload(Record, frozen=True, kw_only=True):
    """A user value: its media type and its bytes."""

    content_type: str
    data: bytes


class Error(Record, frozen=True, kw_only=True):
    """An exception as data. ``type`` is ``module:qualname``, or a bare name from a foreign language."""

    type: str
    message: str
    traceback: str | None = None
    data: Payload | None = None
    cause: Error | None = None


class ReplyTo(Record, frozen=True, kw_only=True):
    """Where an answer goes: a partition of ``replies``, and the id that the asker waits for."""

    partition: int
    request_id: str


class Parent(Record, frozen=True, kw_only=True):
    """The run that started this one, and where in it."""

    run_id: str
    correlation_id: str
    root_run_id: str


class Origin(Record, frozen=True, kw_only=True):
    """The run that this one repeats, and how many events of its log it was given; 0: it was begun anew."""

    run_id: str
    events: int = 0


class StartRun(Record, frozen=True, kw_only=True):
    """Asks for a run. A second start of the same ``run_id`` attaches to the first.

    ``nonce``: random text; what keeps the tokens of the run's hooks from being guessed.
    ``rerun_of``: the run whose workflow, input and attributes these are.
    """

    run_id: str
    workflow: str
    input: Payload
    requested_at: int
    attributes: dict[str, str] = {}
    parent: Parent | None = None
    start_at: int | None = None
    nonce: str = ""
    rerun_of: str | None = None
    reply_to: ReplyTo | None = None


class ResumeHook(Record, frozen=True, kw_only=True):
    """Delivers a payload to the hook with this token; a second resume with the same ``resume_id`` is dropped."""

    token: str
    resume_id: str
    payload: Payload
    requested_at: int
    reply_to: ReplyTo | None = None


class CancelRun(Record, frozen=True, kw_only=True):
    """Asks for the cancellation of a run."""

    run_id: str
    requested_at: int
    reason: str | None = None
    reply_to: ReplyTo | None = None


class ResetRun(Record, frozen=True, kw_only=True):
    """Asks for a new run that goes on from an event of this one, which is ended if it has not.

    ``to_event``: the last event that both have in common. ``new_run_id``: no run has had it; every copy has the same.
    """

    run_id: str
    new_run_id: str
    to_event: int
    requested_at: int
    reason: str | None = None
    reply_to: ReplyTo | None = None


class QueryRun(Record, frozen=True, kw_only=True):
    """Asks about a run; ``RESULT`` is answered when the run has ended.

    ``HOOK`` with a custom token, and an empty ``run_id``, asks the token's owner who holds it.
    """

    run_id: str
    what: Query
    reply_to: ReplyTo
    from_seq: int = 1
    token: str | None = None


class StepRequest(Record, frozen=True, kw_only=True):
    """One attempt of a step, for a worker of its queue. ``timeout`` is in milliseconds."""

    run_id: str
    step_id: str
    step: str
    attempt: int
    fingerprint: str
    input: Payload
    workflow: str
    workflow_started_at: int
    scheduled_at: int
    timeout: int | None = None
    workflow_url: str | None = None


class StepSucceeded(Record, frozen=True, kw_only=True):
    """An attempt returned."""

    result: Payload


class StepFailed(Record, frozen=True, kw_only=True):
    """An attempt raised. ``retry_after`` in milliseconds; ``fatal`` forbids a retry."""

    error: Error
    retry_after: int | None = None
    fatal: bool = False


class StreamWritten(Record, frozen=True, kw_only=True):
    """What one execution of a step wrote to one stream."""

    namespace: str
    writer: str
    partition: int
    first_offset: int
    chunks: int


class StepResult(Record, frozen=True, kw_only=True):
    """How an attempt ended."""

    run_id: str
    step_id: str
    attempt: int
    fingerprint: str
    outcome: StepSucceeded | StepFailed
    started_at: int
    finished_at: int
    worker: str
    streams: tuple[StreamWritten, ...] = ()


class StepHeartbeat(Record, frozen=True, kw_only=True):
    """A worker still runs this attempt, and will say so again before ``lease_until``.

    ``sent_at`` is by the same clock, the worker's: what counts is the time between the two.
    With ``reply_to`` it asks whether the result is still wanted, and is answered as a claim is.
    """

    run_id: str
    step_id: str
    attempt: int
    worker: str
    started_at: int
    lease_until: int
    sent_at: int
    details: Payload | None = None
    reply_to: ReplyTo | None = None


class StepClaim(Record, frozen=True, kw_only=True):
    """A worker asks whether an attempt that it found in its queue is still to be run."""

    run_id: str
    step_id: str
    attempt: int
    worker: str
    reply_to: ReplyTo


class RunSummary(Record, frozen=True, kw_only=True):
    """The latest state of a run; on the compacted topic ``runs``.

    ``hooks``: tokens of open ones, the first 100. ``build``: of the workers that it is pinned to. ``version``: of its
    workflow. ``origin``: the run that it repeats.
    """

    run_id: str
    workflow: str
    status: RunStatus
    created_at: int
    events: int
    attributes: dict[str, str] = {}
    parent: Parent | None = None
    started_at: int | None = None
    completed_at: int | None = None
    error: Error | None = None
    code_version: str | None = None
    hooks: tuple[str, ...] = ()
    origin: Origin | None = None
    build: str | None = None
    version: int | None = None


class Hook(Record, frozen=True, kw_only=True):
    """An open hook of a run. ``response`` is a webhook's; None: 202 at once."""

    token: str
    hook_id: str
    run_id: str
    created_at: int
    webhook: bool = False
    received: int = 0
    metadata: Payload | None = None
    response: Payload | None = None


class Reply(Record, frozen=True, kw_only=True):
    """An answer to a command or a claim."""

    request_id: str
    run_id: str | None = None
    status: ReplyStatus = "OK"
    message: str | None = None
    existing: bool = False
    summary: RunSummary | None = None
    result: Payload | None = None
    events: tuple[bytes, ...] = ()
    next_seq: int | None = None
    claim: ClaimAnswer | None = None
    execution: int = 0
    hooks: tuple[Hook, ...] = ()


class StreamChunk(Record, frozen=True, kw_only=True):
    """One piece of a stream. An END with an empty namespace closes every stream of the run."""

    run_id: str
    namespace: str
    writer: str
    n: int
    kind: ChunkKind
    at: int
    payload: Payload | None = None


class DeadLetter(Record, frozen=True, kw_only=True):
    """A record that could not be handled, as it was found."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    reason: str
    component: str
    at: int


class ClaimToken(Record, frozen=True, kw_only=True):
    """A run asks the owner of a custom token for it."""

    token: str
    run_id: str
    hook_id: str


class TokenGranted(ClaimToken, frozen=True, kw_only=True):
    """The owner's yes."""


class TokenRefused(ClaimToken, frozen=True, kw_only=True):
    """The owner's no: who holds it."""

    holder_run_id: str


class ReleaseToken(ClaimToken, frozen=True, kw_only=True):
    """A holder gives a token back; applies to this holder only.

    ``resume_ids``: the last ones that the hook received, so that copies of them which are still under way are known.
    """

    resume_ids: tuple[str, ...] = ()


class HookDelivery(ClaimToken, frozen=True, kw_only=True):
    """A payload on its way from a custom token's owner to the run's."""

    resume_id: str
    payload: Payload
    reply_to: ReplyTo | None = None


class WatchRun(Record, frozen=True, kw_only=True):
    """A run waits for the end of another, ``run_id``; it is told by a `ChildFinished`."""

    run_id: str
    watcher_run_id: str
    correlation_id: str


class RunCopied(Record, frozen=True, kw_only=True):
    """The beginning of a new run's log, copied from that of the run that was reset, under the new run's id."""

    run_id: str
    events: tuple[bytes, ...]
    reason: str | None = None
    reply_to: ReplyTo | None = None


class ChildFinished(Record, frozen=True, kw_only=True):
    """A child run, or one that was watched, has ended."""

    run_id: str
    correlation_id: str
    child_run_id: str
    status: RunStatus
    result: Payload | None = None
    error: Error | None = None


class Event(Record, frozen=True, kw_only=True):
    """One entry of a run's log. ``seq`` is dense from 1 within the run.

    A token's log has its entries under a ``run_id`` of its own, ``token|TOKEN|RUN_ID|HOOK_ID``: no run can have it.
    """

    run_id: str
    seq: int
    type: str
    at: int
    data: EventData
    correlation_id: str | None = None


class Snapshot(Record, frozen=True, kw_only=True):
    """A copy of a run's events ``from_seq`` to ``to_seq``, encoded as they are: ``events`` need not keep them any longer."""

    run_id: str
    from_seq: int
    to_seq: int
    events: tuple[bytes, ...]
