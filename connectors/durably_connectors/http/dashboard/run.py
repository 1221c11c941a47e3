"""One run: what has happened in it, and what can be done about it."""

from __future__ import annotations

import asyncio
from typing import Any

from durably.client import AsyncRun
from durably.client.exchange import answer_async, query
from durably.client.hooks import run_hooks_async
from durably.client.outcome import summary_of
from durably.client.stream import shown_async
from durably.errors import DurablyError
from durably.streams import checked_namespace
from durably_schemas.records import TERMINAL, Event, RunSummary
from fastapi import APIRouter, Request
from starlette.responses import Response

from durably_connectors.http import documents, streams
from durably_connectors.http.dashboard import live
from durably_connectors.http.dashboard.render import now_ms, page, to_run
from durably_connectors.http.dashboard.session import PageRoute
from durably_connectors.http.dashboard.timeline import Timeline
from durably_connectors.http.gateway import Gateway, GatewayOf
from durably_connectors.http.problems import Problem
from durably_connectors.http.runs import RunId

EVENTS = 3_000
"""The latest entries of a run's log that its page is made of; the first one is always there."""
EVENTS_SHOWN = 300
CHUNKS = 200
"""The latest values of a stream that a page shows; what comes then is added to them."""

router = APIRouter(route_class=PageRoute)


@router.get("/runs/{run_id:path}")
async def run(request: Request, gateway: GatewayOf, run_id: RunId) -> Response:
    """One run: its timeline, values, hooks, streams and log."""
    summary = await AsyncRun[Any](gateway.connection, run_id).describe()
    ended = summary.status in TERMINAL
    log, open_hooks = await asyncio.gather(_log(gateway, summary), _none() if ended else _hooks(gateway, run_id))

    def rendered() -> Response:
        timeline = Timeline(log)
        return page(
            request,
            "run.html",
            run=summary,
            ended=ended,
            live="" if ended else live.of_run(request, summary),
            timeline=timeline,
            axis=timeline.axis(now_ms()),
            events=log[-EVENTS_SHOWN:],
            left_out=summary.events - min(len(log), EVENTS_SHOWN),
            cut=summary.events > len(log),
            hooks=open_hooks,
            webhook_url=lambda token: gateway.webhook_url(token, request),
        )

    return await asyncio.to_thread(rendered)  # which takes a while where the log or its values are long


async def _none() -> list[Any]:
    return []


async def _hooks(gateway: Gateway, run_id: str) -> list[Any]:
    return [hook.record for hook in await run_hooks_async(gateway.connection, run_id)]


async def events_from(gateway: Gateway, run_id: str, seq: int) -> list[Event]:
    """Entries of a run's log from one on, as many as come at once; none where it has no more."""
    reply = await answer_async(gateway.connection, run_id, query(run_id, "EVENTS", seq))
    summary_of(reply, run_id)
    return [gateway.connection.codec.decode_as(Event, data) for data in reply.events]


async def _log(gateway: Gateway, summary: RunSummary) -> list[Event]:
    """The log of a run; of a long one the first entry, and the latest."""
    begin = max(1, summary.events - EVENTS + 1)
    found = [] if begin == 1 else (await events_from(gateway, summary.run_id, 1))[:1]
    while page_ := await events_from(gateway, summary.run_id, begin):
        found += page_
        begin = page_[-1].seq + 1
    return found


@router.post("/runs/{run_id:path}")
async def act(request: Request, gateway: GatewayOf, run_id: RunId) -> Response:
    """Cancels a run, or starts another one like it."""
    form, run_ = await documents.form(request), AsyncRun[Any](gateway.connection, run_id)
    match form.get("action"):
        case "cancel":
            await run_.cancel(form.get("reason") or None)
            return to_run(request, run_id, "cancelled")
        case "rerun":
            return to_run(request, (await run_.rerun()).id, "started")
        case other:
            raise Problem(400, "bad-action", f"there is no action {other!r:.50}")


@router.get("/streams/{run_id:path}")
async def stream(request: Request, gateway: GatewayOf, run_id: RunId) -> Response:
    """What is in a stream of a run; a script adds what comes."""
    name, run_ = _stream(request), AsyncRun[Any](gateway.connection, run_id)
    info = await run_.stream_info(name)
    first = max(0, info.tail_index + 1 - CHUNKS)
    values = []
    if first <= info.tail_index:
        reading = shown_async(gateway.connection, run_id, name, first, AsyncRun)
        try:
            async for value in reading:
                values.append(value)
                if first + len(values) > info.tail_index:
                    break
        finally:
            await reading.aclose()  # type: ignore[attr-defined]
    return page(
        request,
        "stream.html",
        run_id=run_id,
        name=name,
        values=list(enumerate(values, first)),
        next=first + len(values),
        done=info.done,
    )


@router.get("/follow/{run_id:path}")
async def follow(request: Request, gateway: GatewayOf, run_id: RunId) -> Response:
    """A stream of a run as server-sent events, as the API has it."""
    start = request.query_params.get("start", "0")
    if not (start.isascii() and start.isdigit()) or len(start) > 18:
        raise Problem(400, "bad-start", f"{start!r:.50} is no index")
    return await streams.follow(gateway, run_id, _stream(request), int(start), request.headers.get("last-event-id"))


def _stream(request: Request) -> str:
    name = request.query_params.get("name") or "default"
    try:
        checked_namespace(name)
    except DurablyError as e:
        raise Problem(400, "bad-namespace", str(e)) from None
    return name


@router.get("/live/{run_id:path}")
async def live_run(request: Request, gateway: GatewayOf, run_id: RunId) -> Response:
    """Says, as server-sent events, that a run's log has grown."""
    await AsyncRun[Any](gateway.connection, run_id).describe()

    async def entries(seen: int) -> int:
        while found := await events_from(gateway, run_id, seen + 1):
            seen = found[-1].seq
        return seen

    return live.said_when_changed(request, gateway, entries)
