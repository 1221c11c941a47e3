"""What stands behind the runs: queues, dead letters, and code that does not fit."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import urlencode

from durably.client import AsyncRun
from durably.client.liveness import round_trips
from durably.errors import DurablyError
from durably_schemas import events as ev
from durably_schemas.records import RunSummary, StepRequest
from fastapi import APIRouter, Request
from starlette.responses import RedirectResponse, Response

from durably_connectors.http import documents
from durably_connectors.http.dashboard import letters, live
from durably_connectors.http.dashboard.queues import queues as asked_queues
from durably_connectors.http.dashboard.render import base_of, page
from durably_connectors.http.dashboard.run import events_from
from durably_connectors.http.dashboard.session import PageRoute
from durably_connectors.http.gateway import Gateway, GatewayOf
from durably_connectors.http.problems import Problem
from durably_connectors.http.projection import RunQuery
from durably_connectors.http.runs import listed

BLOCKED = 20
"""Blocked runs on a page."""
_PROCESSORS = 2.0  # seconds for a processor to answer

router = APIRouter(route_class=PageRoute)


@router.get("/queues")
async def queues(request: Request, gateway: GatewayOf) -> Response:
    """Queues with their lag and workers, and who owns the partitions."""
    connection = gateway.connection
    found = await asyncio.to_thread(asked_queues, connection.broker, connection.catalogue)
    # Only then, because these questions are records themselves, which nobody shall take for a lag.
    trips = await asyncio.to_thread(round_trips, connection, _PROCESSORS)
    return page(request, "queues.html", queues=found, trips=trips, url=connection.broker.url)


@router.get("/dead-letters")
async def dead_letters(request: Request, gateway: GatewayOf) -> Response:
    """The latest dead letters."""
    found = await asyncio.to_thread(letters.latest, gateway.connection)
    return page(request, "dead_letters.html", letters=found.found, more=found.more)


@router.post("/dead-letters")
async def replay(request: Request, gateway: GatewayOf) -> Response:
    """Sends the record of a dead letter again."""
    form = await documents.form(request)
    place = [form.get(name, "") for name in ("partition", "offset")]
    if not all(text.isascii() and text.isdigit() and len(text) <= 18 for text in place):
        raise Problem(400, "bad-place", "a dead letter has a partition and an offset")
    partition, offset = map(int, place)
    letter = await asyncio.to_thread(letters.letter_at, gateway.connection, partition, offset)
    if isinstance(letter.record, StepRequest):
        await _wanted(gateway, letter.record)
    await asyncio.to_thread(letters.send_again, gateway.connection, letter)
    return RedirectResponse(f"{base_of(request)}/dead-letters?said=sent", 303)


async def _wanted(gateway: Gateway, asked: StepRequest) -> None:
    """Raises `Problem` with 409 where the run no longer waits for this attempt: its step would run once more."""
    attempt = 0
    for event in await AsyncRun[Any](gateway.connection, asked.run_id).events():
        if event.correlation_id == asked.step_id:
            match event.data:
                case ev.StepCreated():
                    attempt = 1
                case ev.StepRetrying(attempt=following):
                    attempt = following
                case ev.StepCompleted() | ev.StepFailed() | ev.StepCancelled():
                    attempt = 0
        elif isinstance(event.data, ev.RunCompleted | ev.RunFailed | ev.RunCancelled):
            attempt = 0
    if attempt != asked.attempt:
        raise Problem(
            409, "not-wanted", f"run {asked.run_id} no longer waits for attempt {asked.attempt} of step {asked.step}"
        )


@router.get("/blocked")
async def blocked(request: Request, gateway: GatewayOf) -> Response:
    """Blocked runs, each with what was expected and what was found."""
    listens = live.of_list(request, gateway)
    found = await listed(gateway, RunQuery(statuses=["blocked"]), BLOCKED, request.query_params.get("cursor"))
    differences = await asyncio.gather(*(_difference(gateway, run_) for run_ in found.runs))
    return page(
        request,
        "blocked.html",
        live=listens,
        runs=list(zip(found.runs, differences, strict=True)),
        next=urlencode({"cursor": found.cursor}) if found.cursor else None,
    )


async def _difference(gateway: Gateway, summary: RunSummary) -> ev.RunBlocked | None:
    """Why a run is blocked: the entry stands near the end that its log had when its summary was written."""
    try:
        found = await events_from(gateway, summary.run_id, max(1, summary.events - 50))
    except (DurablyError, TimeoutError):  # it has gone, or its processor has
        return None
    return next((event.data for event in reversed(found) if isinstance(event.data, ev.RunBlocked)), None)
