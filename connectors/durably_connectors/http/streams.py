"""Streams as server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

from __future__ import annotations

import asyncio
import base64
from typing import TYPE_CHECKING, Annotated, Any

from durably.client import AsyncRun
from durably.client.stream import shown_async
from durably.errors import DurablyError
from durably.jsonable import to_json
from durably.streams import checked_namespace
from fastapi import APIRouter, Header, Path, Query
from starlette.responses import StreamingResponse

from durably_connectors.http import models
from durably_connectors.http.gateway import Gateway, GatewayOf, Json
from durably_connectors.http.problems import Problem
from durably_connectors.http.runs import RunId
from durably_connectors.http.security import GuardedRoute

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

HEARTBEAT = 15.0
"""Seconds of silence after which a comment is sent, so that nobody between takes the connection for dead."""
_LONGEST_INDEX = 18  # digits
_ENDED = object()

router = APIRouter(prefix="/runs", tags=["streams"], route_class=GuardedRoute)


@router.get("/{run_id:path}/streams", response_model=models.Streams)
async def streams(gateway: GatewayOf, run_id: RunId) -> Json:
    """The streams that the completed steps of a run have written."""
    return Json({"streams": await AsyncRun[Any](gateway.connection, run_id).streams()})


@router.get(
    "/{run_id:path}/streams/{namespace:path}",
    response_class=StreamingResponse,
    responses={
        200: {
            "description": "Each value is an event: its id is the value's index, its data are JSON. Bytes are events "
            "named `bytes`, in base64. The end of the stream is an event named `end`; an error that ended it is one "
            "named `failed`, with its type and detail. What cannot be read here is an object of `content_type` and "
            "`base64`.",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        },
    },
)
async def follow(
    gateway: GatewayOf,
    run_id: RunId,
    namespace: Annotated[str, Path(description="The stream's name, percent-encoded; `default` is the default one's.")],
    start_index: Annotated[
        int, Query(description="The first value, from 0; negative: counted from the end as it is now.")
    ] = 0,
    last_event_id: Annotated[
        str | None, Header(description="The id of the last event that was received; stands before start_index.")
    ] = None,
) -> StreamingResponse:
    """Follows a stream, from any of its values to its end."""
    try:
        checked_namespace(namespace)
    except DurablyError as e:
        raise Problem(400, "bad-namespace", str(e)) from None
    run = AsyncRun[Any](gateway.connection, run_id)
    await run.describe()
    if last_event_id is not None:
        start = _after(last_event_id)
    elif start_index < 0:
        start = max(0, (await run.stream_info(namespace)).tail_index + 1 + start_index)
    else:
        start = start_index
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # the second is for nginx
    values = shown_async(gateway.connection, run_id, namespace, start, AsyncRun)
    events = _events(gateway, values, start)
    return StreamingResponse(events, media_type="text/event-stream", headers=headers)


def _after(event_id: str) -> int:
    if not event_id.isascii() or not event_id.isdigit() or len(event_id) > _LONGEST_INDEX:
        raise Problem(400, "bad-last-event-id", f"Last-Event-ID {event_id!r:.100} is none of a stream's: an index is")
    return int(event_id) + 1


async def _events(gateway: Gateway, values: AsyncIterator[Any], index: int) -> AsyncIterator[bytes]:
    leaving = gateway.leaving()
    waiting: asyncio.Future[Any] | None = None
    try:
        yield b"retry: 1000\n\n"
        while True:
            waiting = asyncio.ensure_future(anext(values, _ENDED))
            while not waiting.done():
                await asyncio.wait({waiting, leaving}, timeout=HEARTBEAT, return_when=asyncio.FIRST_COMPLETED)
                if leaving.done():
                    return  # with no word of an end: the reader comes back, to another gateway
                if not waiting.done():
                    yield b": still here\n\n"
            value = waiting.result()
            if value is _ENDED:
                yield _event("end", b"{}")
                return
            yield _value(index, value)
            index += 1
    except Exception as e:  # whatever ended the stream is told to its reader; the response has begun
        yield _event("failed", to_json({"type": type(e).__name__, "detail": str(e)}))
    finally:
        leaving.cancel()
        if waiting is not None and not waiting.done():
            waiting.cancel()
            await asyncio.wait([waiting])
        await values.aclose()  # type: ignore[attr-defined]


def _value(index: int, value: Any) -> bytes:
    if isinstance(value, bytes):
        return _event("bytes", base64.b64encode(value), index)
    return _event(None, to_json(value), index)


def _event(name: str | None, data: bytes, index: int | None = None) -> bytes:
    """One event. JSON and base64 have no line breaks, so ``data`` is one line."""
    head = b"" if index is None else b"id: %d\n" % index
    if name is not None:
        head += b"event: %s\n" % name.encode()
    return head + b"data: " + data + b"\n\n"
