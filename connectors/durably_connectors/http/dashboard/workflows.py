"""Workflows: how many of their runs there are, and how long they take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from durably_connectors.http.dashboard import charts, live
from durably_connectors.http.dashboard.render import STATUSES, now_ms, page
from durably_connectors.http.dashboard.session import PageRoute
from durably_connectors.http.gateway import GatewayOf
from durably_connectors.http.problems import Problem
from durably_connectors.http.projection import RunQuery, by_status
from durably_connectors.http.runs import asked_list, listed

if TYPE_CHECKING:
    from durably_connectors.http.projection import Count, Projection

TOOK = 20_000
"""Completed runs, the newest, that a plot of durations is made of."""
PERCENTS = (50, 95)

router = APIRouter(route_class=PageRoute)


@router.get("/workflows")
async def workflows(request: Request, gateway: GatewayOf) -> Response:
    """All workflows: how many of their runs there are, and how long they take."""
    listens = live.of_list(request, gateway)
    window, since, slot = _window(request)

    def asked(projection: Projection) -> list[dict[str, Any]]:
        by_workflow: dict[str, list[Count]] = {}
        for count in projection.counts(since, slot):
            by_workflow.setdefault(count.workflow, []).append(count)
        return [
            {
                "name": name,
                "statuses": by_status(counts),
                "columns": charts.columns(counts, since, slot)[0],
                "durations": _durations(projection, name, since),
            }
            for name, counts in sorted(by_workflow.items())
        ]

    found = await asked_list(gateway, asked)
    return page(
        request,
        "workflows.html",
        live=listens,
        workflows=found,
        window=window,
        windows=list(charts.WINDOWS),
        statuses=STATUSES,
    )


@router.get("/workflows/{name:path}")
async def workflow(request: Request, gateway: GatewayOf, name: str) -> Response:
    """One workflow: how many runs over time, and how long they took."""
    listens = live.of_list(request, gateway)
    window, since, slot = _window(request)

    def asked(projection: Projection) -> dict[str, Any]:
        counts = [count for count in projection.counts(since, slot) if count.workflow == name]
        took = projection.took(name, since, TOOK)
        columns, top = charts.columns(counts, since, slot)
        ran, waited = sorted(run_.ran for run_ in took), sorted(run_.waited for run_ in took)
        return {
            "statuses": by_status(counts),
            "columns": columns,
            "top": top,
            "latency": charts.latency(took, since, slot, PERCENTS),
            "sample": len(took),
            "ran": [(percent, charts.percentile(ran, percent)) for percent in (50, 90, 95, 99, 100)],
            "waited": [(percent, charts.percentile(waited, percent)) for percent in (50, 90, 95, 99, 100)],
        }

    found = await asked_list(gateway, asked)
    latest = await listed(gateway, RunQuery(workflow=name), 10, None)
    return page(
        request, "workflow.html", live=listens, name=name, window=window, windows=list(charts.WINDOWS), since=since, slot=slot,
        runs=latest.runs, order=STATUSES, **found,
    )  # fmt: skip


def _window(request: Request) -> tuple[str, int, int]:
    """What a plot is about: its name, where it begins, and how many milliseconds a part of it has."""
    name = request.query_params.get("window", "24h")
    if name not in charts.WINDOWS:
        raise Problem(400, "bad-window", f"{name!r:.50} is none of {', '.join(charts.WINDOWS)}")
    slot = charts.WINDOWS[name] // charts.SLOTS
    end = (now_ms() // slot + 1) * slot  # so that columns stay where they are
    return name, end - slot * charts.SLOTS, slot


def _durations(projection: Projection, name: str, since: int) -> list[int | None]:
    ran = sorted(run_.ran for run_ in projection.took(name, since, 1_000))
    return [charts.percentile(ran, percent) for percent in PERCENTS]
