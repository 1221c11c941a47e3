"""Logging in, with the gateway's token, and out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import APIRouter, Request
from starlette.responses import RedirectResponse, Response

from durably_connectors.http import documents
from durably_connectors.http.dashboard import session
from durably_connectors.http.dashboard.render import base_of, page
from durably_connectors.http.dashboard.session import PublicRoute

if TYPE_CHECKING:
    from durably_connectors.http.security import Guard

router = APIRouter(route_class=PublicRoute)


@router.get("/login")
async def login_page(request: Request) -> Response:
    """Asks for the token."""
    return page(request, "login.html", next=_local(request.query_params.get("next", "/")), wrong=False)


@router.post("/login")
async def login(request: Request) -> Response:
    """Gives a browser that has sent the token a cookie, and goes where it wanted to be."""
    guard: Guard = request.app.state.guard
    form = await documents.form(request)
    back = _local(form.get("next", "/"))
    if guard.asks and not guard.knows(form.get("token", "")):
        response: Response = page(request, "login.html", next=back, wrong=True)
        response.status_code = 401
        return response
    response = RedirectResponse(base_of(request) + back, 303)
    if guard.asks:
        session.log_in(request, response)
    return response


@router.post("/logout")
async def logout(request: Request) -> Response:
    """Takes the cookie away."""
    response = RedirectResponse(f"{base_of(request)}/login", 303)
    session.log_out(request, response)
    return response


def _local(path: str) -> str:
    """A path below the dashboard's own: a login leads nowhere else."""
    return path if path.startswith("/") and not path.startswith(("//", "/\\")) else "/"
