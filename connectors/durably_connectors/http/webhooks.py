"""Webhooks: any HTTP request to a webhook's URL becomes a payload of its run."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Annotated, Any

from durably import chunks
from durably.client import AsyncRun
from durably.client.feeds import ChunkWriter
from durably.client.hooks import WebhookCall, get_hook_async, token_key
from durably.errors import BrokerUnreachable, ConfigurationError, HookNotFoundError
from durably.hooks import WEBHOOK_PATH
from durably.identifiers import ulid
from durably.streams import Readable
from durably.web import INLINE_BODY, Request, Response
from durably_schemas.records import ChunkKind, Payload
from fastapi import APIRouter, Path
from starlette import requests, responses
from starlette.routing import Route

from durably_connectors.http import models
from durably_connectors.http.gateway import Gateway, GatewayOf
from durably_connectors.http.hooks import LONGEST_KEY
from durably_connectors.http.problems import Problem

if TYPE_CHECKING:
    from asyncio import Future

    from durably.client.connection import Connection
    from starlette.types import Receive, Scope, Send

_PATH = WEBHOOK_PATH + "{token:path}"
_IN_FLIGHT = 4  # chunks of a body that may be unacknowledged
# What belongs to one connection, or is for the server to say (RFC 9110, section 7.6.1).
_HOP_BY_HOP = frozenset(
    {"connection", "content-length", "date", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"}
)

router = APIRouter(tags=["webhooks"])


@router.post(
    _PATH,
    responses={
        200: {"description": "What the webhook answers: its own response, or that of a step."},
        202: {"description": "The run has the request."},
        404: {"description": "No open webhook has this token. Empty."},
        504: {"model": models.Problem, "description": "The run has the request, but no step has responded in time."},
    },
    response_class=responses.Response,
)
async def webhook(
    gateway: GatewayOf,
    token: Annotated[str, Path(description="The webhook's token, percent-encoded.")],
    request: requests.Request,
) -> responses.Response:
    """Hands the request to the run that waits for it. Every other method does the same.

    Knowing the token is all that is asked of a caller. An `Idempotency-Key` makes repeated calls count once.
    """
    return await _call(gateway, token, request)


class _EveryMethod:
    """An ASGI application in the place of a function: so Starlette asks for no list of methods."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Does as `webhook`."""
        request = requests.Request(scope, receive)
        response = await _call(request.app.state.gateway, request.path_params["token"], request)
        await response(scope, receive, send)


every_method = Route(_PATH, _EveryMethod(), include_in_schema=False)
"""To stand behind `router`: takes what is not a POST."""


async def _call(gateway: Gateway, token: str, request: requests.Request) -> responses.Response:
    try:
        call = await _looked_up(gateway, token)
    except HookNotFoundError:
        return responses.Response(status_code=404)
    key = request.headers.get("idempotency-key")
    if key is not None and not 0 < len(key) <= LONGEST_KEY:
        raise Problem(400, "bad-idempotency-key", f"an Idempotency-Key has 1 to {LONGEST_KEY} characters")
    received = await _received(gateway, token, call.hook.run_id, request)
    try:
        run = await call.deliver(gateway.connection, received, key or ulid())
        waiting = call.answered(gateway.connection, run, gateway.response_timeout)
        answer = await gateway.while_wanted(request, waiting)
    finally:
        call.forget()
    if answer is None:
        raise Problem(
            504, "no-answer", f"run {run.run_id} has the request, but the gateway stops: its response is lost"
        )
    return _response(gateway.connection, answer)


async def _looked_up(gateway: Gateway, token: str) -> WebhookCall:
    """Raises `HookNotFoundError`, also for what can be no token."""
    try:
        token_key(token)
    except ConfigurationError as e:
        raise HookNotFoundError(str(e), token) from None
    return WebhookCall(await get_hook_async(gateway.connection, token))


async def _received(gateway: Gateway, token: str, run_id: str, request: requests.Request) -> Request:
    """The request as the workflow gets it. Its body is taken in, and made durable where it is large."""
    query = request.scope["query_string"].decode("latin-1")
    url = f"{gateway.webhook_url(token, request)}{'?' if query else ''}{query}"
    headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in request.headers.raw]
    body = await _body(gateway.connection, run_id, request)
    try:
        return Request.received(request.method, url, headers, body)
    except ValueError as e:
        raise Problem(400, "bad-request", str(e)) from None


async def _body(connection: Connection, run_id: str, request: requests.Request) -> bytes | Readable:
    held = bytearray()
    upload: _Upload | None = None
    async for piece in request.stream():
        held += piece
        if len(held) > INLINE_BODY:
            upload = upload or _Upload(connection, run_id)
            await upload.write(bytes(held))
            held.clear()
    if upload is None:
        return bytes(held)
    await upload.write(bytes(held))
    return await upload.finish()


class _Upload:
    """A body on its way into a stream of the run. What is never finished is never referred to."""

    def __init__(self, connection: Connection, run_id: str) -> None:
        self._connection = connection
        self._writer = ChunkWriter(connection, Readable(run_id, f"webhook-{ulid()}"))
        self._unacknowledged: deque[Future[None]] = deque()

    async def write(self, data: bytes) -> None:
        """Waits while too much is unacknowledged. Raises `BrokerUnreachable`."""
        for piece in chunks.pieces(data):
            await self._send("DATA", chunks.dump(piece, self._writer.handle.namespace))

    async def finish(self) -> Readable:
        """The stream, which is durable by then. Raises `BrokerUnreachable`."""
        await self._send("END")
        await self._settle(0)
        return self._writer.handle

    async def _send(self, kind: ChunkKind, payload: Payload | None = None) -> None:
        self._unacknowledged.append(asyncio.wrap_future(self._writer.send(kind, payload)))
        await self._settle(_IN_FLIGHT)

    async def _settle(self, allowed: int) -> None:
        while len(self._unacknowledged) > allowed:
            sent = self._unacknowledged.popleft()
            done, _ = await asyncio.wait([sent], timeout=self._connection.timeout)
            if not done:
                raise BrokerUnreachable(
                    f"{self._connection.broker.url} did not acknowledge a part of the body within "
                    f"{self._connection.timeout:g} s: send the request again"
                )
            sent.result()


def _response(connection: Connection, answer: Response) -> responses.Response:
    body = answer.body
    made: responses.Response
    if isinstance(body, Readable):
        made = responses.StreamingResponse(AsyncRun[Any](connection, body.run_id).stream(body.namespace), answer.status)
    else:
        made = responses.Response(body, answer.status)
    made.raw_headers += [
        (name.lower().encode("latin-1"), value.encode("latin-1"))
        for name, value in answer.headers.pairs
        if name.lower() not in _HOP_BY_HOP
    ]
    return made
