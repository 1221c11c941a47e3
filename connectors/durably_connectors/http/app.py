"""The application: its routes, and what stands before them."""

from __future__ import annotations

from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Depends, FastAPI

from durably_connectors.http import dashboard, health, hooks, models, problems, runs, streams, webhooks
from durably_connectors.http.gateway import MAX_BODY, RESPONSE_TIMEOUT, Gateway
from durably_connectors.http.security import BodyLimit, Guard, GuardedRoute, bearer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from durably.client import AsyncClient

API = "/api/v1"
"""Where the REST API begins."""

_PROBLEMS: dict[int | str, dict[str, Any]] = {
    400: {"model": models.Problem, "description": "An id, token, cursor or body that can be none; says why."},
    401: {"model": models.Problem, "description": "The token is missing or wrong."},
    403: {"model": models.Problem, "description": "Without a token: a page of another site, or another host, asks."},
    404: {"model": models.Problem, "description": "There is no such run or hook."},
    409: {"model": models.Problem, "description": "The processor refused; or the run has no result to give."},
    413: {
        "model": models.Problem,
        "description": "The body is over the gateway's limit, or a payload over a record's.",
    },
    422: {"model": models.Problem, "description": "The request is not as it must be; says where."},
    503: {"model": models.Problem, "description": "The broker does not answer."},
    504: {"model": models.Problem, "description": "No processor has answered in time."},
}


def create_gateway(
    client: AsyncClient | str | None = None,
    *,
    token: str | None = None,
    local: bool = False,
    public_url: str | None = None,
    projection: Path | None = None,
    max_body: int = MAX_BODY,
    response_timeout: float = RESPONSE_TIMEOUT,
) -> FastAPI:
    """The gateway, as an application to serve, or to mount into another one under any prefix.

    Mounted, it opens at its first request. To close it with the application that it is mounted into, enter its
    ``router.lifespan_context`` in that one's lifespan.

    Args:
        client: who talks to the broker; or a URL, ``DURABLY_URL`` by default, for a client of its own.
        token: what callers of the API send as ``Authorization: Bearer``, and people type into the dashboard. None asks
            for nothing: serve it on a loopback address only, or behind what authenticates. Webhooks and health ask for
            none.
        local: without a token, whether callers must have named this machine by a loopback name. A `GatewayThread`
            switches it on.
        public_url: what people reach the gateway by, for the URL of the requests that workflows receive; by default
            what each request says of itself. No header of a proxy is believed.
        projection: a file for the list of runs, so that the next start is fast; in memory by default.
        max_body: bytes of a request's body.
        response_timeout: seconds that the caller of a webhook waits for a step's response.

    Raises:
        ConfigurationError: the token is empty, a setting of the client is not as it must be, or the projection's file
            cannot be opened.
    """
    guard = Guard(token, local=local)
    gateway = Gateway(client, projection=projection, public_url=public_url, response_timeout=response_timeout)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await gateway.close()

    app = FastAPI(
        title="durably",
        description="Durable workflows whose database is the Kafka you already run.",
        version=version("durably"),
        lifespan=lifespan,
        docs_url=None,  # they load scripts from elsewhere into the origin of the API
        redoc_url=None,
        redirect_slashes=False,  # a token or an id may end with a slash
        generate_unique_id_function=lambda route: route.name,  # what clients made of the document call their methods
    )
    app.state.gateway, app.state.guard = gateway, guard
    problems.install(app)
    app.add_middleware(BodyLimit, limit=max_body)
    api = APIRouter(prefix=API, dependencies=[Depends(bearer)], responses=_PROBLEMS, route_class=GuardedRoute)
    # Ids and tokens may hold slashes, so what is more specific stands first.
    for part in (hooks.router, streams.router, runs.router, health.installation):
        api.include_router(part)
    for part in (api, webhooks.router, health.router):
        app.include_router(part)
    app.router.routes.append(webhooks.every_method)
    dashboard.install(app)
    app.openapi = lambda: problems.described(FastAPI.openapi(app))  # type: ignore[method-assign]
    return app
