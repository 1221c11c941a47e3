"""The documents of the REST API, as OpenAPI describes them. Instants are milliseconds since the epoch."""

from __future__ import annotations

from typing import Annotated, Any

from durably_schemas.records import RunStatus
from pydantic import BaseModel, ConfigDict, Field


class _In(BaseModel):
    model_config = ConfigDict(extra="forbid")  # a field that is mistyped shall not be one that is left out


class StartRequest(_In):
    """Asks for a run. Arguments are given by position or by name."""

    workflow: str = Field(min_length=1, description="The workflow's name.")
    args: list[Any] | None = Field(None, description="Positional arguments.")
    kwargs: dict[str, Any] | None = Field(None, description="Arguments by name.")
    input: list[Any] | dict[str, Any] | None = Field(None, description="Either of the two, by its form.")
    run_id: str | None = Field(None, description="An id of your own: starting it again attaches to the first run.")
    attributes: dict[str, str] = Field(default_factory=dict, description="Texts to find the run by.")
    delay: Annotated[float, Field(strict=True)] | str | None = Field(
        None, description='Waits before the workflow begins: seconds, or "10s".'
    )


class CancelRequest(_In):
    """Asks for the cancellation of a run."""

    reason: str | None = Field(None, description="Recorded in the run's log.")


class RerunRequest(_In):
    """Asks for a new run like another one."""

    run_id: str | None = Field(None, description="An id of your own for the new run.")


class Error(BaseModel):
    """An exception."""

    type: str = Field(description="``module:class``, or a bare name from a foreign language.")
    message: str
    traceback: str | None = None
    data: Any = None
    cause: Error | None = None


class Parent(BaseModel):
    """The run that started another, and where in it."""

    run_id: str
    correlation_id: str
    root_run_id: str


class Origin(BaseModel):
    """The run that this one repeats."""

    run_id: str
    events: int = Field(description="How many events of that run's log this one was given; 0: it was begun anew.")


class Run(BaseModel):
    """A run, as committed."""

    run_id: str
    workflow: str
    status: RunStatus
    created_at: int
    events: int = Field(
        description="How many entries its log has; in a list, had when its status, attributes or hooks last changed."
    )
    attributes: dict[str, str]
    parent: Parent | None = None
    started_at: int | None = None
    completed_at: int | None = None
    error: Error | None = None
    code_version: str | None = None
    hooks: list[str] = Field(description="Tokens of its open hooks, the first 100.")
    origin: Origin | None = None
    build: str | None = Field(None, description="Of the workers that it is pinned to.")
    version: int | None = Field(None, description="Of its workflow, where that has several.")


class Runs(BaseModel):
    """A page of runs, newest first."""

    runs: list[Run]
    next_cursor: str | None = Field(description="Asks for the next page; null: this is the last.")


class Started(BaseModel):
    """A run that was asked for."""

    run_id: str
    status: RunStatus
    existing: bool = Field(description="Whether it was there before.")


class Result(BaseModel):
    """How far a run is, and what it returned."""

    run_id: str
    status: RunStatus
    result: Any = Field(None, description="What the workflow returned, when it has.")


class Event(BaseModel):
    """One entry of a run's log."""

    run_id: str
    seq: int = Field(description="Dense from 1 within the run.")
    type: str
    at: int
    data: dict[str, Any] = Field(description="By type; user values stand in the place of their payloads.")
    correlation_id: str | None = Field(description="The step, wait, hook or child that it is about.")


class Events(BaseModel):
    """A page of a run's log."""

    events: list[Event]
    next_seq: int | None = Field(description="Where the next page begins; null: there is none as yet.")


class Hook(BaseModel):
    """An open hook."""

    token: str
    hook_id: str
    run_id: str
    created_at: int
    webhook: bool
    url: str | None = Field(None, description="Where a webhook takes requests.")
    received: int = Field(description="How many payloads it has been given.")
    metadata: Any = None
    response: Any = Field(None, description='What a webhook answers: a response, "manual", or null for 202.')


class Hooks(BaseModel):
    """A page of open hooks, those of newer runs first."""

    hooks: list[Hook]
    next_cursor: str | None = None


class Resumed(BaseModel):
    """A payload that the run's log has."""

    run_id: str
    status: RunStatus
    resume_id: str = Field(description="Names this delivery: a second one of the same name is dropped.")


class Streams(BaseModel):
    """The streams that the completed steps of a run have written."""

    streams: list[str]


class Health(BaseModel):
    """Whether the gateway, and what stands behind it, can do their work."""

    healthy: bool
    problem: str | None = None


class Processor(BaseModel):
    """Who owns a partition."""

    partition: int
    latency_ms: float | None = Field(description="How long the answer took; null: nobody answered in time.")


class Processors(BaseModel):
    """Whether every partition has an owner."""

    healthy: bool
    partitions: list[Processor]


class Problem(BaseModel):
    """An error (RFC 9457, ``application/problem+json``)."""

    type: str
    title: str
    status: int
    detail: str
