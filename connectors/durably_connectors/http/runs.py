"""REST: starting runs, and looking at them."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, TypeVar
from urllib.parse import quote, unquote

import msgspec
from durably import failures, payloads
from durably.broker.port import Headers
from durably.client import AsyncRun
from durably.client.exchange import answer_async, answer_within_async, query, submit_async
from durably.client.outcome import summary_of
from durably.client.starting import StartOptions
from durably.errors import ConfigurationError
from durably.identifiers import checked_run_id
from durably.observability.tracing import start_span
from durably_schemas.records import TERMINAL, Event, Payload, ReplyTo, RunStatus, RunSummary, StartRun
from fastapi import APIRouter, Depends, Path, Query, Request
from pydantic import StringConstraints

from durably_connectors.http import models
from durably_connectors.http.gateway import Gateway, GatewayOf, Json
from durably_connectors.http.problems import Problem
from durably_connectors.http.projection import Page, RunQuery
from durably_connectors.http.security import GuardedRoute

if TYPE_CHECKING:
    from collections.abc import Callable

    from durably_connectors.http.projection import Projection

T = TypeVar("T")

LONGEST_WAIT = 300.0
"""Seconds that one request for a result may wait."""
_ANSWER = 10.0  # seconds for a processor to answer a start, which is durable without its answer
_COMPLETE = 10.0  # seconds for the list of runs to be complete, after the gateway's start
_LOOK = 0.02  # seconds between two looks whether it is
_LARGEST = 2**63 - 1  # that a record or the list of runs can hold

router = APIRouter(prefix="/runs", tags=["runs"], route_class=GuardedRoute)


async def _run_id(run_id: Annotated[str, Path(description="The run's id, percent-encoded.")]) -> str:
    return _checked(run_id)


def _checked(run_id: str) -> str:
    try:
        return checked_run_id(run_id)
    except ConfigurationError as e:
        raise Problem(400, "bad-run-id", str(e)) from None


RunId = Annotated[str, Depends(_run_id)]
"""The id in a path. Its routes come before the one that ends with it, because an id may hold slashes."""


@router.post(
    "",
    status_code=201,
    response_model=models.Started,
    responses={
        200: {"model": models.Started, "description": "A run with this id was there before."},
        202: {"model": models.Started, "description": "The start is durable, but no processor has answered yet."},
    },
)
async def start(gateway: GatewayOf, request: Request, asked: models.StartRequest) -> Json:
    """Starts a run; answers when its start is durable."""
    command = _command(asked)
    # The caller's trace goes on in the run.
    with start_span(command, [(name, value.encode("latin-1")) for name, value in request.headers.items()]) as headers:
        return await _start(gateway, command, headers)


async def _start(gateway: Gateway, command: StartRun, headers: Headers) -> Json:

    def answered(to: ReplyTo) -> StartRun:
        return msgspec.structs.replace(command, reply_to=to)

    reply = await answer_within_async(gateway.connection, command.run_id, answered, _ANSWER, headers)
    if reply is None:
        await submit_async(gateway.connection, command)  # known by its id, so that this is no second run
        return _started(202, command.run_id, "pending", existing=False)
    summary = summary_of(reply, command.run_id)
    return _started(200 if reply.existing else 201, command.run_id, summary.status, existing=reply.existing)


def _command(asked: models.StartRequest) -> StartRun:
    given = [value for value in (asked.args, asked.kwargs, asked.input) if value is not None]
    if len(given) > 1:
        raise Problem(422, "invalid-request", "give one of args, kwargs and input: a call is by position or by name")
    payload = Payload(content_type=payloads.JSON, data=msgspec.json.encode(given[0] if given else []))
    try:
        options = StartOptions(run_id=asked.run_id, attributes=asked.attributes, delay=asked.delay)
    except (ConfigurationError, ValueError, TypeError) as e:
        raise Problem(422, "invalid-request", str(e)) from None
    return options.named().command(asked.workflow, payloads.encode(payload))


def _started(code: int, run_id: str, status: RunStatus, *, existing: bool) -> Json:
    location = {"Location": f"runs/{quote(run_id, safe='')}"} if code == 201 else None
    return Json({"run_id": run_id, "status": status, "existing": existing}, code, location)


@router.get("", response_model=models.Runs)
async def runs(
    gateway: GatewayOf,
    *,
    workflow: Annotated[str | None, Query(description="Only runs of this workflow.")] = None,
    status: Annotated[list[RunStatus], Query(description="Only runs that are this, or one of these.")] = [],  # noqa: B006 - FastAPI copies
    attribute: Annotated[
        list[Annotated[str, StringConstraints(pattern="^[^=]+=")]],
        Query(description="Only runs with this attribute, as KEY=VALUE; in a KEY, %3D stands for =. Repeatable."),
    ] = [],  # noqa: B006 - as above
    created_from: Annotated[datetime | None, Query(description="Only runs of this instant or later.")] = None,
    created_to: Annotated[datetime | None, Query(description="Only runs before this instant.")] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 50,
    cursor: Annotated[str | None, Query(description="The next_cursor of the page before.")] = None,
) -> Json:
    """Lists runs, newest first; a moment behind the log."""
    wanted = RunQuery(
        workflow=workflow,
        statuses=status,
        attributes=dict(pair(text) for text in attribute),
        created_from=_milliseconds(created_from),
        created_to=_milliseconds(created_to),
    )
    page = await listed(gateway, wanted, limit, cursor)
    return Json({"runs": page.runs, "next_cursor": page.cursor})


def pair(text: str) -> tuple[str, str]:
    """The first = ends the name; one within it is percent-encoded, once more than the query as a whole is."""
    name, _, value = text.partition("=")
    return unquote(name), value


def _milliseconds(instant: datetime | None) -> int | None:
    if instant is None:
        return None
    return round((instant if instant.tzinfo is not None else instant.replace(tzinfo=UTC)).timestamp() * 1000)


async def listed(gateway: Gateway, wanted: RunQuery, limit: int, cursor: str | None) -> Page:
    """A page of the list of runs.

    Raises:
        Problem: as `asked_list`, with 400 for a bad cursor.
    """
    try:
        return await asked_list(gateway, lambda projection: projection.runs(wanted, limit, cursor))
    except ValueError as e:
        raise Problem(400, "bad-cursor", str(e)) from None


async def asked_list(gateway: Gateway, question: Callable[[Projection], T]) -> T:
    """What the list of runs answers, when it is complete; asked on a thread.

    Raises:
        Problem: with 503 while the list is not complete or cannot be read.
    """
    try:
        projection = gateway.projection
    except ConfigurationError as e:  # the file was taken away while the gateway was closed
        raise Problem(503, "not-ready", str(e)) from None
    until = time.monotonic() + _COMPLETE
    # Looked at again and again, because all who wait would otherwise hold a thread each, and keep them from others.
    while not projection.is_ready and projection.problem is None and time.monotonic() < until:  # noqa: ASYNC110 - by a thread
        await asyncio.sleep(_LOOK)
    if not projection.is_ready:
        why = projection.problem or "it is still being read"
        raise Problem(503, "not-ready", f"the list of runs is not complete: {why}", {"Retry-After": "5"})
    try:
        return await asyncio.to_thread(question, projection)
    except sqlite3.Error as e:
        raise Problem(503, "unavailable", f"the list of runs cannot be read: {e}", {"Retry-After": "5"}) from None


@router.get("/{run_id:path}/events", response_model=models.Events)
async def events(
    gateway: GatewayOf,
    run_id: RunId,
    from_seq: Annotated[int, Query(ge=1, le=_LARGEST, description="The first entry.")] = 1,
) -> Json:
    """A page of a run's log, as committed."""
    reply = await answer_async(gateway.connection, run_id, query(run_id, "EVENTS", from_seq))
    summary_of(reply, run_id)
    entries = [gateway.connection.codec.decode_as(Event, data) for data in reply.events]
    return Json({"events": entries, "next_seq": reply.next_seq})


@router.get(
    "/{run_id:path}/result",
    response_model=models.Result,
    responses={
        202: {"model": models.Result, "description": "The run has not ended yet."},
        409: {"model": models.Problem, "description": "It failed, was cancelled, or is blocked."},
    },
)
async def result(
    gateway: GatewayOf,
    run_id: RunId,
    request: Request,
    wait: Annotated[float, Query(ge=0, le=LONGEST_WAIT, description="Seconds to wait for the end of the run.")] = 0,
) -> Json:
    """What a run returned; waits for its end."""
    connection = gateway.connection
    summary = summary_of(await answer_async(connection, run_id, query(run_id, "SUMMARY")), run_id)
    ended = summary.status in TERMINAL or summary.status == "blocked"
    if ended or wait > 0:
        limit = connection.timeout if ended else wait
        asking = answer_within_async(connection, run_id, query(run_id, "RESULT"), limit)
        reply = await gateway.while_wanted(request, asking)
        if reply is not None:
            summary = summary_of(reply, run_id)
            if summary.status == "completed":
                return Json({"run_id": run_id, "status": "completed", "result": reply.result})
            raise _unsuccessful(summary, reply.message)
    return Json({"run_id": run_id, "status": summary.status}, 202)


def _unsuccessful(summary: RunSummary, message: str | None) -> Problem:
    error = summary.error
    why = f": {failures.summed_up(error)}" if error is not None else ""
    if not why and message:
        why = f": {message}"
    of = f"run {summary.run_id} of workflow {summary.workflow}"
    said = {"failed": "failed", "cancelled": "was cancelled"}.get(summary.status, "is blocked")
    return Problem(
        409, f"run-{summary.status}", f"{of} {said}{why}", run_id=summary.run_id, run_status=summary.status, error=error
    )


@router.post("/{run_id:path}/cancel", response_model=models.Run)
async def cancel(gateway: GatewayOf, run_id: RunId, asked: models.CancelRequest | None = None) -> Json:
    """Asks a run to end; its cleanup may still run steps. Harmless where it has ended."""
    run = AsyncRun[Any](gateway.connection, run_id)
    await run.cancel(asked.reason if asked is not None else None)
    return Json(await run.describe())


@router.post("/{run_id:path}/rerun", status_code=201, response_model=models.Started)
async def rerun(gateway: GatewayOf, run_id: RunId, asked: models.RerunRequest | None = None) -> Json:
    """Starts a new run with the workflow, input and attributes of another one. What that one did is done again."""
    chosen = None if asked is None or asked.run_id is None else _checked(asked.run_id)
    new = await AsyncRun[Any](gateway.connection, run_id).rerun(run_id=chosen)
    return _started(201, new.id, "pending", existing=False)


@router.get("/{run_id:path}", response_model=models.Run)
async def describe(gateway: GatewayOf, run_id: RunId) -> Json:
    """One run, as committed."""
    return Json(await AsyncRun[Any](gateway.connection, run_id).describe())
