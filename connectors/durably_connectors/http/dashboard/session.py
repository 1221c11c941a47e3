"""Who may see the dashboard: a cookie in the place of the token, and no page of another site."""

from __future__ import annotations

import hmac
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode, urlsplit

from durably.errors import DurablyError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse, Response

from durably_connectors.http import problems
from durably_connectors.http.dashboard.render import base_of, page
from durably_connectors.http.problems import Problem
from durably_connectors.http.security import Guard, netloc

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from starlette.requests import Request

COOKIE = "durably-dashboard"
LASTS = 12 * 60 * 60
"""Seconds that a login lasts."""
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "same-origin",  # with no-referrer a browser would not say where a form comes from
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
}
"""Of every response. Whatever a payload holds, no script of it runs, and nobody frames or embeds a page."""
_SAFE = frozenset({"GET", "HEAD"})


def ticket(guard: Guard) -> str:
    """A cookie's value: how long it is good, signed by the token, which it does not tell."""
    until = str(int(time.time()) + LASTS)
    return f"{until}.{guard.sign(f'{COOKIE}.{until}')}"


def is_valid(guard: Guard, given: str) -> bool:
    """Whether it is a ticket of ours, by the token that we have now, and still good."""
    until, _, signature = given.partition(".")
    if not (until.isascii() and until.isdigit()) or len(until) > 12:
        return False
    signed = hmac.compare_digest(signature.encode(), guard.sign(f"{COOKIE}.{until}").encode())
    return signed and int(until) >= time.time()


def log_in(request: Request, response: Response) -> None:
    """Gives a browser a ticket. It is sent with requests from our own pages alone, and no script can read it."""
    response.set_cookie(COOKIE, ticket(request.app.state.guard), max_age=LASTS, **_cookie(request))


def log_out(request: Request, response: Response) -> None:
    """Takes it away."""
    response.delete_cookie(COOKIE, **_cookie(request))


def _cookie(request: Request) -> dict[str, Any]:
    public = request.app.state.gateway.public_url or ""
    secure = request.url.scheme == "https" or public.startswith("https:")
    return {"path": base_of(request), "secure": secure, "httponly": True, "samesite": "strict"}


def check(request: Request) -> None:
    """Looks at the head of a request alone. Raises `Problem` with 401 or 403."""
    guard: Guard = request.app.state.guard
    if not (guard.asks and is_valid(guard, request.cookies.get(COOKIE, ""))):
        guard.check(request)
    check_same_origin(request)


def check_same_origin(request: Request) -> None:
    """Raises `Problem` with 403 for a request that changes something and does not come from a page of ours.

    A cookie that is SameSite=Strict is sent from other ports and subdomains too, and without a token there is none.
    """
    if request.method in _SAFE or request.headers.get("sec-fetch-site") == "same-origin":
        return
    public = request.app.state.gateway.public_url
    ours = {request.headers.get("host", ""), urlsplit(public).netloc if public else ""} - {""}
    if netloc(request.headers.get("origin", "")) not in ours:
        raise Problem(403, "forbidden", "only a page of this dashboard may ask for that; for programs there is the API")


class PublicRoute(APIRoute):
    """A route of the dashboard. Its errors are pages."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """As that of FastAPI, with `HEADERS`."""
        handle = super().get_route_handler()

        async def answered(request: Request) -> Response:
            try:
                self.admit(request)
                response = await handle(request)
            except (Problem, DurablyError, TimeoutError) as e:
                response = _told(request, problems.of(e))
            except HTTPException as e:
                response = _told(request, Problem(e.status_code, "refused", str(e.detail), e.headers))
            response.headers.update(HEADERS)
            response.headers.setdefault("Cache-Control", "no-store")
            return response

        return answered

    def admit(self, request: Request) -> None:
        """Everybody may, as far as the gateway's host goes."""
        guard: Guard = request.app.state.guard
        if not guard.asks:
            guard.check(request)
        check_same_origin(request)


class PageRoute(PublicRoute):
    """One that asks for a login where the gateway has a token."""

    def admit(self, request: Request) -> None:
        """See `check`."""
        check(request)


def _told(request: Request, problem: Problem) -> Response:
    if problem.status == 401:
        raw: bytes = request.scope.get("raw_path") or quote(request.url.path).encode()  # an id may hold a ? or a #
        path = raw.decode("latin-1").removeprefix(base_of(request))
        back = f"{path}?{request.url.query}" if request.url.query else path
        asked = urlencode({"next": back if request.method in _SAFE else "/"})
        return RedirectResponse(f"{base_of(request)}/login?{asked}", 303)
    response = page(request, "problem.html", status=problem.status, kind=problem.kind, detail=problem.detail)
    response.status_code = problem.status
    response.headers.update(problem.headers)
    return response
