"""Who may ask: where the gateway listens, the bearer token, and browsers that another site sent."""

from __future__ import annotations

import hmac
import ipaddress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from durably.errors import ConfigurationError
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException

from durably_connectors.http.documents import StrictRequest
from durably_connectors.http.problems import Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

bearer = HTTPBearer(auto_error=False, description="The token that the gateway was started with, if any.")
"""What OpenAPI says of the API's routes. It is `GuardedRoute` that asks for the token."""


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host: a loopback address, or ``localhost``."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def checked_binding(host: str, token: str | None) -> None:
    """Raises `ConfigurationError` where anybody on the network could start and cancel runs."""
    if token is None and not is_loopback(host):
        raise ConfigurationError(
            f"the gateway would listen on {host} for everybody: set DURABLY_GATEWAY_TOKEN (or --token) to a secret "
            f"that callers of the API send, or listen on 127.0.0.1"
        )


class Guard:
    """Decides whether a request may use the API. Webhooks and health do without.

    Args:
        token: what callers must send as ``Authorization: Bearer``; None asks for none.
        local: whether a request must name this machine in ``Host``. So no web page can reach a gateway without a
            token by a domain of its own that it points to 127.0.0.1.

    Raises:
        ConfigurationError: the token is empty.
    """

    def __init__(self, token: str | None, *, local: bool) -> None:
        if token is not None and not token.strip():
            raise ConfigurationError("the gateway's token is empty: use a secret, or None for no token")
        self._token = token
        self.local = local

    @property
    def asks(self) -> bool:
        """Whether callers must have a token."""
        return self._token is not None

    def knows(self, token: str) -> bool:
        """Whether this is the token."""
        return self._token is not None and hmac.compare_digest(token.strip().encode(), self._token.encode())

    def sign(self, text: str) -> str:
        """A signature that only who has the token can make, and that does not tell it; empty where there is none."""
        return "" if self._token is None else hmac.new(self._token.encode(), text.encode(), "sha256").hexdigest()

    def check(self, request: Request) -> None:
        """Looks at the head of a request alone. Raises `Problem` with 401 or 403."""
        if self._token is not None:
            scheme, _, given = request.headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not self.knows(given):
                raise Problem(
                    401,
                    "unauthorized",
                    "send the gateway's token as Authorization: Bearer TOKEN",
                    {"WWW-Authenticate": "Bearer"},
                )
            return
        host = request.headers.get("host", "")
        if self.local and not is_loopback(_hostname(host)):
            raise Problem(403, "forbidden", f"this gateway serves its own machine only, and was called as {host!r}")
        # A page of another site may send simple requests without asking first; it cannot hide where it is from.
        origin = request.headers.get("origin")
        if origin is not None and netloc(origin) != host:
            raise Problem(403, "forbidden", f"a page of {origin} may not use this gateway without its token")


def _hostname(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:  # such as "[": a bracket that nothing closes
        return ""


def netloc(origin: str) -> str:
    """Host and port of an origin; empty where it has none."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


class GuardedRoute(APIRoute):
    """A route of the API: its guard, ``app.state.guard``, is asked before anything of the body is read."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """As that of FastAPI, behind the guard, and with bodies that are read as `StrictRequest` does."""
        handle = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            request.app.state.guard.check(request)
            return await handle(StrictRequest(request.scope, request.receive))

        return guarded


class BodyLimit:
    """ASGI middleware: a request whose body has more than ``limit`` bytes ends with 413.

    One that declares its length is answered before anything is read; of another one, what comes is counted.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on, and counts what comes in."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        too_large = f"the body has more than {self._limit:,} bytes, which is the limit here"
        if _declared(scope) > self._limit:
            await Problem(413, "too-large", too_large).response()(scope, receive, send)
            return
        taken = 0

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            if message["type"] == "http.request":
                taken += len(message.get("body", b""))
                if taken > self._limit:
                    raise HTTPException(413, too_large)
            return message

        await self._app(scope, counted, send)


def _declared(scope: Scope) -> int:
    """The length that a request declares. Servers have checked it; 0 where it declares none."""
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value[:20])  # more digits do not make it smaller, and Python refuses to read thousands
    return 0
