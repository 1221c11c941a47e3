"""Serving the gateway: as a process of its own, or on a thread beside others."""

from __future__ import annotations

import socket
import threading
from typing import TYPE_CHECKING

import uvicorn
from durably import payload_codec
from durably.client import AsyncClient
from durably.errors import ConfigurationError
from durably.observability.endpoint import serving

from durably_connectors.http.app import create_gateway
from durably_connectors.http.gateway import Gateway
from durably_connectors.http.security import checked_binding, is_loopback

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from durably.settings import Settings
    from fastapi import FastAPI

_BACKLOG = 512  # connections that wait to be accepted
_SHUTDOWN = 5  # seconds for open requests; a stream may have no end


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any that is free. Raises `ConfigurationError` where it is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off for sockets that say they are TCP's. With it every answer, which is sent as a
    # head and a body, waits for the delayed acknowledgement of its head: 40 ms on Linux.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host.strip("[]"), port))
        listening.listen(_BACKLOG)
    except OSError as e:
        listening.close()
        raise ConfigurationError(f"cannot listen on {host} port {port}: {e}; choose another with --port") from e
    return listening


def url_of(listening: socket.socket) -> str:
    """What a gateway on this socket is reached by from this machine."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def serve(
    settings: Settings,
    *,
    host: str,
    port: int,
    token: str | None = None,
    projection: Path | None = None,
    ready: Callable[[str], None] | None = None,
    metrics: str | None = None,
) -> None:
    """Serves until SIGTERM or SIGINT.

    Args:
        settings: where the broker is.
        host: the address to listen on; one that others reach needs a token.
        port: 0 takes any that is free.
        token: what callers of the API must send.
        projection: a file for the list of runs.
        ready: called with the gateway's URL when it listens.
        metrics: where it tells of itself, as `Endpoint` takes it.

    Raises:
        ConfigurationError: no token for such a host, or the port is taken.
    """
    checked_binding(host, token)
    payload_codec.installed()  # a wrong setting should end the process, and not every request
    listening = bind(host, port)
    app = _app(settings, token, local=is_loopback(host), projection=projection)
    server = _Server(app)
    if ready is not None:
        ready(url_of(listening))
    with serving(metrics, [app.state.gateway]):
        server.run([listening])


class GatewayThread:
    """A gateway on a thread of its own, for this machine alone.

    Args:
        make: makes the application, when it is started.
        port: on 127.0.0.1; 0 takes any that is free.

    Raises:
        ConfigurationError: the port is taken.

    Attributes:
        url: what it is reached by. It is known, and taken, from the beginning.
    """

    def __init__(self, make: Callable[[], FastAPI], port: int) -> None:
        self._make = make
        self._listening = bind("127.0.0.1", port)
        self.url = url_of(self._listening)
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begins to serve. Who connected before is served then."""
        app = self._make()
        app.state.guard.local = True  # nobody else reaches it, except by a browser that was lured to 127.0.0.1
        self._server = _Server(app)
        self._thread = threading.Thread(target=self._server.run, args=([self._listening],), name="durably-gateway")
        self._thread.start()

    def stop(self) -> None:
        """Ends open requests, and the thread. May be called without a start."""
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join()
        self._listening.close()


def local_gateway(settings: Settings, port: int) -> GatewayThread:
    """A gateway for a process that has others to run. Raises `ConfigurationError` where the port is taken."""
    return GatewayThread(lambda: _app(settings, None, local=True), port)


class _Server(uvicorn.Server):
    """Tells what is open that it is to end, before it waits for that."""

    def __init__(self, app: FastAPI) -> None:
        # No header of a proxy is believed: whoever reaches the gateway directly could forge where he comes from.
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=_SHUTDOWN,
        )
        super().__init__(config)
        self._gateway: Gateway = app.state.gateway

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As that of uvicorn."""
        self._gateway.leave()
        await super().shutdown(sockets)


def _app(settings: Settings, token: str | None, *, local: bool, projection: Path | None = None) -> FastAPI:
    client = AsyncClient(settings.url, namespace=settings.namespace, kafka=settings.kafka)
    return create_gateway(client, token=token, local=local, public_url=settings.gateway_url, projection=projection)
