"""Who may ask: where the gateway listens, the bearer token, and browsers that another site sent."""

from __future__ import annotations

import hmac
import ipaddress
from typing import Annotated
from urllib.parse import urlsplit

from durably.errors import ConfigurationError
from fastapi import Depends
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from durably_connectors.http.problems import Problem

_bearer = HTTPBearer(auto_error=False, description="The token that the gateway was started with, if any.")


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
    """Decides whether a request may use the API; a dependency of its routes. Webhooks and health do without.

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
        self._local = local

    async def __call__(
        self, request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
    ) -> None:
        """Raises `Problem` with 401 or 403."""
        if self._token is not None:
            given = credentials.credentials if credentials is not None else ""
            if not hmac.compare_digest(given.encode(), self._token.encode()):
                raise Problem(
                    401,
                    "unauthorized",
                    "send the gateway's token as Authorization: Bearer TOKEN",
                    {"WWW-Authenticate": "Bearer"},
                )
            return
        host = request.headers.get("host", "")
        if self._local and not is_loopback(urlsplit(f"//{host}").hostname or ""):
            raise Problem(403, "forbidden", f"this gateway serves its own machine only, and was called as {host!r}")
        # A page of another site may send simple requests without asking first; it cannot hide where it is from.
        origin = request.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            raise Problem(403, "forbidden", f"a page of {origin} may not use this gateway without its token")


class BodyLimit:
    """ASGI middleware: a request whose body has more than ``limit`` bytes ends with 413, however it declares it."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on, and counts what comes in."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        taken = 0

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            if message["type"] == "http.request":
                taken += len(message.get("body", b""))
                if taken > self._limit:
                    raise HTTPException(413, f"the body has more than {self._limit:,} bytes, which is the limit here")
            return message

        await self._app(scope, counted, send)
