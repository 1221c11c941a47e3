"""The list of runs."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from urllib.parse import urlencode

from fastapi import APIRouter, Request
from starlette.responses import Response

from durably_connectors.http.dashboard import live
from durably_connectors.http.dashboard.render import STATUSES, page
from durably_connectors.http.dashboard.session import PageRoute
from durably_connectors.http.gateway import GatewayOf
from durably_connectors.http.problems import Problem
from durably_connectors.http.projection import RunQuery
from durably_connectors.http.runs import asked_list, listed, pair

RUNS = 50
"""Runs on a page."""

router = APIRouter(route_class=PageRoute)


@router.get("")
@router.get("/")
async def runs(request: Request, gateway: GatewayOf) -> Response:
    """The list of runs, filtered, page by page."""
    listens = live.of_list(request, gateway)
    asked = {name: value for name, value in request.query_params.multi_items() if value}
    statuses = [status for status in STATUSES if status in request.query_params.getlist("status")]
    wanted = RunQuery(
        id_prefix=asked.get("id", ""),
        workflow=asked.get("workflow"),
        statuses=statuses,
        attributes=dict([_attribute(asked["attribute"])]) if "attribute" in asked else {},
        created_from=_instant(asked, "from"),
        created_to=_instant(asked, "to"),
    )
    found = await listed(gateway, wanted, RUNS, asked.get("cursor"))
    counts = await asked_list(gateway, lambda projection: projection.counts())
    totals = Counter[str]()
    for count in counts:
        totals[count.status] += count.runs
    kept = [(name, value) for name, value in request.query_params.multi_items() if value and name != "cursor"]
    return page(
        request,
        "runs.html",
        runs=found.runs,
        next=urlencode([*kept, ("cursor", found.cursor)]) if found.cursor else None,
        first=urlencode(kept) if "cursor" in asked else None,
        live="" if "cursor" in asked else listens,
        asked=asked,
        filtered=bool(kept),
        statuses=[(status, status in statuses, totals[status]) for status in STATUSES],
        workflows=sorted({count.workflow for count in counts}),
    )


def _attribute(text: str) -> tuple[str, str]:
    if "=" not in text[1:]:
        raise Problem(400, "bad-attribute", f"the attribute {text!r:.100} is none: write it as NAME=VALUE")
    return pair(text)


def _instant(asked: dict[str, str], name: str) -> int | None:
    if name not in asked:
        return None
    try:
        at = datetime.fromisoformat(asked[name])
        return round((at if at.tzinfo is not None else at.replace(tzinfo=UTC)).timestamp() * 1000)
    except (ValueError, OverflowError):
        raise Problem(400, "bad-instant", f"{asked[name]!r:.100} is no instant: 2026-11-23T23:45 is one") from None


@router.get("/live")
async def live_list(request: Request, gateway: GatewayOf) -> Response:
    """Says, as server-sent events, that the list of runs has changed."""

    async def changes(_: int) -> int:
        return gateway.projection.changes

    return live.said_when_changed(request, gateway, changes)
