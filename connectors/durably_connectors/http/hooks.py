"""REST: open hooks, and resuming them."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import msgspec
from durably import payloads
from durably.client.hooks import HookInfo, get_hook_async, resume_hook_async, run_hooks_async, token_key
from durably.errors import ConfigurationError, RunNotFoundError
from durably.identifiers import ulid
from durably_schemas.records import Payload, RunSummary
from fastapi import APIRouter, Depends, Header, Path, Query, Request

from durably_connectors.http import documents, models
from durably_connectors.http.gateway import Gateway, GatewayOf, Json
from durably_connectors.http.problems import Problem
from durably_connectors.http.projection import RunQuery
from durably_connectors.http.runs import RunId, listed
from durably_connectors.http.security import GuardedRoute

LONGEST_KEY = 255
"""Characters of an Idempotency-Key."""

router = APIRouter(tags=["hooks"], route_class=GuardedRoute)


async def _token(token: Annotated[str, Path(description="The hook's token, percent-encoded.")]) -> str:
    return checked_token(token)


def checked_token(token: str) -> str:
    """The same token. Raises `Problem` with 400 where no hook may have it."""
    try:
        token_key(token)
    except ConfigurationError as e:
        raise Problem(400, "bad-token", str(e)) from None
    return token


Token = Annotated[str, Depends(_token)]
IdempotencyKey = Annotated[
    str | None,
    Header(
        description="Names this delivery: a second one of the same name is dropped, and answered as the first was.",
        min_length=1,
        max_length=LONGEST_KEY,
    ),
]


@router.get("/runs/{run_id:path}/hooks", response_model=models.Hooks)
async def run_hooks(gateway: GatewayOf, request: Request, run_id: RunId) -> Json:
    """The open hooks of one run, as committed."""
    return Json(
        {"hooks": [_shown(gateway, request, hook) for hook in await run_hooks_async(gateway.connection, run_id)]}
    )


@router.get("/hooks", response_model=models.Hooks)
async def hooks(
    gateway: GatewayOf,
    request: Request,
    *,
    workflow: Annotated[str | None, Query(description="Only hooks of runs of this workflow.")] = None,
    limit: Annotated[int, Query(ge=1, le=100, description="How many runs, each with all of its hooks.")] = 20,
    cursor: Annotated[str | None, Query(description="The next_cursor of the page before.")] = None,
) -> Json:
    """Lists open hooks, run by run, those of newer runs first."""
    page = await listed(gateway, RunQuery(workflow=workflow, with_hooks=True), limit, cursor)
    found = await asyncio.gather(*(hooks_of(gateway, run) for run in page.runs))
    return Json(
        {"hooks": [_shown(gateway, request, hook) for some in found for hook in some], "next_cursor": page.cursor}
    )


async def hooks_of(gateway: Gateway, run: RunSummary) -> list[HookInfo]:
    """The open hooks of a run that was listed; none where it has gone."""
    try:
        return await run_hooks_async(gateway.connection, run.run_id)
    except RunNotFoundError:  # the list is a moment behind
        return []


@router.get("/hooks/{token:path}", response_model=models.Hook)
async def hook(gateway: GatewayOf, request: Request, token: Token) -> Json:
    """The open hook with this token."""
    return Json(_shown(gateway, request, await get_hook_async(gateway.connection, token)))


async def _payload(request: Request) -> Payload:
    """The body, as the workflow shall receive it."""
    body = await request.body()
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not body and not media:
        return payloads.dump(None, "the payload")
    if media == payloads.MSGPACK:
        try:
            msgspec.msgpack.decode(body)  # as far as that goes: its extensions are for the workflow to read
        except (ValueError, RecursionError) as e:
            raise Problem(400, "not-msgpack", f"the body is no msgpack: {e}") from None
        return payloads.encode(Payload(content_type=payloads.MSGPACK, data=body))
    if media == payloads.JSON or media.endswith("+json"):
        try:
            documents.parsed(body)
        except ValueError as e:
            raise Problem(400, "not-json", f"the body is no JSON: {e}") from None
        return payloads.encode(Payload(content_type=payloads.JSON, data=body))
    if media.startswith("text/"):
        try:
            return payloads.dump(body.decode(), "the payload")
        except UnicodeDecodeError as e:
            raise Problem(400, "not-text", f"the body is no UTF-8: {e}") from None
    return payloads.dump(body, "the payload")


_BODY = {
    "requestBody": {
        "description": "The payload. JSON, msgpack or text arrives as its value, anything else as bytes; none as None.",
        "content": {"application/json": {"schema": {}}, "text/plain": {}, "application/octet-stream": {}},
    }
}


@router.post("/hooks/{token:path}", response_model=models.Resumed, openapi_extra=_BODY)
async def resume(
    gateway: GatewayOf,
    token: Token,
    payload: Annotated[Payload, Depends(_payload)],
    idempotency_key: IdempotencyKey = None,
) -> Json:
    """Hands a payload to the hook with this token; answers when the run's log has it."""
    resume_id = idempotency_key or ulid()
    run = await resume_hook_async(gateway.connection, token, payload, resume_id)
    return Json({"run_id": run.run_id, "status": run.status, "resume_id": resume_id})


def _shown(gateway: Gateway, request: Request, hook: HookInfo) -> dict[str, Any]:
    shown = {name: getattr(hook.record, name) for name in hook.record.__struct_fields__}
    return {**shown, "url": gateway.webhook_url(hook.token, request) if hook.webhook else None}
