"""Open hooks, and resuming them."""

from __future__ import annotations

import asyncio
from urllib.parse import urlencode

from durably import payloads
from durably.client.hooks import resume_hook_async
from durably_schemas.records import Payload
from fastapi import APIRouter, Request
from starlette.responses import Response

from durably_connectors.http import documents
from durably_connectors.http.dashboard import live
from durably_connectors.http.dashboard.render import page, to_run
from durably_connectors.http.dashboard.session import PageRoute
from durably_connectors.http.gateway import GatewayOf
from durably_connectors.http.hooks import checked_token, hooks_of
from durably_connectors.http.problems import Problem
from durably_connectors.http.projection import RunQuery
from durably_connectors.http.runs import listed

RUNS = 20
"""Runs on a page, each with all of its hooks."""

router = APIRouter(route_class=PageRoute)


@router.get("/hooks")
async def hooks(request: Request, gateway: GatewayOf) -> Response:
    """Open hooks, with a form for each."""
    listens = live.of_list(request, gateway)
    found = await listed(gateway, RunQuery(with_hooks=True), RUNS, request.query_params.get("cursor"))
    of_runs = await asyncio.gather(*(hooks_of(gateway, run_) for run_ in found.runs))
    return page(
        request,
        "hooks.html",
        live=listens,
        hooks=[
            (run_, hook.record) for run_, some in zip(found.runs, of_runs, strict=True) for hook in some
        ],
        webhook_url=lambda token: gateway.webhook_url(token, request),
        next=urlencode({"cursor": found.cursor}) if found.cursor else None,
    )  # fmt: skip


@router.post("/hooks")
async def resume(request: Request, gateway: GatewayOf) -> Response:
    """Hands a payload to a hook: JSON, or nothing."""
    form = await documents.form(request)
    token = checked_token(form.get("token", ""))
    text = form.get("payload", "").strip()
    if text:
        try:
            documents.parsed(text.encode())
        except ValueError as e:
            raise Problem(
                400, "not-json", f'the payload is no JSON: {e}; a text stands in quotes, "like this"'
            ) from None
        payload = payloads.encode(Payload(content_type=payloads.JSON, data=text.encode()))
    else:
        payload = payloads.dump(None, "the payload")
    run_ = await resume_hook_async(gateway.connection, token, payload)
    return to_run(request, run_.run_id, "resumed")
