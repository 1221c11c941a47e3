"""The dashboard: pages of HTML beside the REST API, by the same guard. They can be read without scripts."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from durably_connectors.http.dashboard import hooks, listing, login, operations, run, workflows
from durably_connectors.http.dashboard.render import PATH, base_of
from durably_connectors.http.dashboard.session import HEADERS


class _Static(StaticFiles):
    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(HEADERS)
        response.headers["Cache-Control"] = "no-cache"  # asked for anew, and answered by 304 where it is the same
        return response


async def _front(request: Request) -> Response:
    return RedirectResponse(base_of(request) + "/")


def install(app: FastAPI) -> None:
    """Adds the dashboard to a gateway, and leads there who knows only its address."""
    for part in (login, listing, run, hooks, workflows, operations):
        app.include_router(part.router, prefix=PATH, include_in_schema=False)
    static = _Static(packages=[("durably_connectors.http.dashboard", "static")])  # which holds no secret
    app.router.routes += [Mount(f"{PATH}/static", static), Route("/", _front, include_in_schema=False)]
