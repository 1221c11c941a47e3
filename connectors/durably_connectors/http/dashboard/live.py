"""What happens while one looks: server-sent events that say no more than that something has changed."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from durably.errors import DurablyError
from starlette.responses import Response, StreamingResponse

from durably_connectors.http.streams import HEARTBEAT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from durably_connectors.http.gateway import Gateway

_EVERY = 1.0  # seconds between two looks for something new


def said_when_changed(gateway: Gateway, look: Callable[[], Awaitable[object]]) -> Response:
    """An event whenever what ``look`` returns is another, until the client goes or the server stops."""
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # the second is for nginx
    return StreamingResponse(_changes(gateway, look), media_type="text/event-stream", headers=headers)


async def _changes(gateway: Gateway, look: Callable[[], Awaitable[object]]) -> AsyncIterator[bytes]:
    leaving, last, silent = gateway.leaving(), await look(), 0.0
    try:
        yield b"retry: 2000\n\n"
        while not leaving.done():
            await asyncio.wait({leaving}, timeout=_EVERY)
            try:
                found = await look()
            except (DurablyError, TimeoutError):  # the browser comes back by itself, and asks anew
                return
            silent += _EVERY
            if found != last:
                last, silent = found, 0.0
                yield b"data: changed\n\n"
            elif silent >= HEARTBEAT:
                silent = 0.0
                yield b": still here\n\n"
    finally:
        leaving.cancel()
