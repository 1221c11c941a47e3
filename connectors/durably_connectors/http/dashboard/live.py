"""What happens while one looks: server-sent events that say no more than that something has changed."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from durably.errors import DurablyError
from starlette.responses import Response, StreamingResponse

from durably_connectors.http.dashboard.render import base_of, segment
from durably_connectors.http.problems import Problem
from durably_connectors.http.streams import HEARTBEAT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from durably_schemas.records import RunSummary
    from starlette.requests import Request

    from durably_connectors.http.gateway import Gateway

_EVERY = 1.0  # seconds between two looks for something new


def of_list(request: Request, gateway: Gateway) -> str:
    """Where a page listens for changes of the list of runs. To be asked before the list is, so that none is missed."""
    return f"{base_of(request)}/live?seen={gateway.projection.changes}"


def of_run(request: Request, summary: RunSummary) -> str:
    """Where a page listens for more entries of a run's log."""
    return f"{base_of(request)}/live/{segment(summary.run_id)}?seen={summary.events}"


def said_when_changed(request: Request, gateway: Gateway, look: Callable[[int], Awaitable[int]]) -> Response:
    """An event whenever there is something new, until the client goes or the server stops.

    Args:
        request: its parameter ``seen`` says what the page has seen already.
        gateway: the gateway.
        look: what there is now, given what has been seen; the same number where nothing is new.

    Raises:
        Problem: with 400 where ``seen`` is no number.
    """
    seen = request.query_params.get("seen", "0")
    if not (seen.isascii() and seen.isdigit()) or len(seen) > 18:
        raise Problem(400, "bad-seen", f"{seen!r:.50} is no number")
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # the second is for nginx
    return StreamingResponse(_changes(gateway, look, int(seen)), media_type="text/event-stream", headers=headers)


async def _changes(gateway: Gateway, look: Callable[[int], Awaitable[int]], seen: int) -> AsyncIterator[bytes]:
    leaving, silent = gateway.leaving(), 0.0
    try:
        yield b"retry: 2000\n\n"
        while not leaving.done():
            found = await look(seen)
            if found != seen:
                seen, silent = found, 0.0
                yield b"data: changed\n\n"
            elif silent >= HEARTBEAT:
                silent = 0.0
                yield b": still here\n\n"
            await asyncio.wait({leaving}, timeout=_EVERY)
            silent += _EVERY
    except (DurablyError, TimeoutError):  # the browser comes back by itself, and asks anew
        return
    finally:
        leaving.cancel()
