"""A small HTTP server beside a process: ``/metrics`` for Prometheus, ``/livez`` and ``/readyz`` for whoever restarts it."""

from __future__ import annotations

import logging
import socket
import sys
import threading
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Protocol

from durably.errors import ConfigurationError
from durably.observability.metrics import Exposition

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from durably.observability.metrics import Sample

log = logging.getLogger("durably.metrics")

LOOPBACK = "127.0.0.1"
_TEXT = "text/plain; charset=utf-8"
_SILENCE = 10.0  # seconds until a connection on which nothing comes is closed


class Watched(Protocol):
    """A part of the process that has something to tell. Asked from any thread."""

    @property
    def dead(self) -> str | None:
        """Why it should be started anew; None: it lives."""

    @property
    def unready(self) -> str | None:
        """Why it does not do all of its work yet; None: it does."""

    def samples(self) -> Iterable[Sample]:
        """Its metrics."""


class Endpoint:
    """The server, on threads of its own, from the beginning.

    Args:
        address: ``HOST:PORT``, or a port of 127.0.0.1; port 0 takes any that is free. It asks for no token: on an
            address that others reach they read the names of workflows and queues.
        parts: who tells of itself. It is live when all of them are, and ready when they are.

    Raises:
        ConfigurationError: an address of another form, or one that is taken; or prometheus-client is not installed.

    Attributes:
        url: what it is reached by.
    """

    def __init__(self, address: str, parts: Sequence[Watched]) -> None:
        host, port = _parsed(address)
        exposition = Exposition([part.samples for part in parts])
        self._parts = parts

        class Handler(_Handler):
            endpoint = self
            metrics = exposition

        server = _ServerV6 if ":" in host else _Server
        try:
            self._server = server((host, port), Handler)
        except OSError as e:
            raise ConfigurationError(
                f"metrics cannot be served on {address}: {e}; choose another with --metrics"
            ) from e
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, name="durably-metrics", daemon=True).start()

    def close(self) -> None:
        """Ends the server."""
        self._server.shutdown()
        self._server.server_close()

    def problem(self, path: str) -> str | None:
        """What ``/livez`` or ``/readyz`` has to say against the process."""
        told = [part.dead for part in self._parts]
        if path == "/readyz":
            told += [part.unready for part in self._parts]
        return "; ".join(why for why in told if why) or None


@contextmanager
def serving(address: str | None, parts: Sequence[Watched]) -> Iterator[Endpoint | None]:
    """An `Endpoint` for as long as this is open; none without an address."""
    if address is None:
        yield None
        return
    endpoint = Endpoint(address, parts)
    log.info("metrics at %s/metrics", endpoint.url)
    try:
        yield endpoint
    finally:
        endpoint.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 - of the base
        error = sys.exception()
        if isinstance(error, OSError):
            log.debug("%s did not wait for its answer", client_address)
        else:
            log.error("%s was not answered", client_address, exc_info=error)


class _ServerV6(_Server):
    address_family = socket.AF_INET6


class _Handler(BaseHTTPRequestHandler):
    endpoint: Endpoint
    metrics: Exposition
    timeout = _SILENCE
    server_version, sys_version = "durably", ""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/metrics":
            self._answer(HTTPStatus.OK, *self.metrics.write(self.headers.get("Accept", "")))
        elif path in {"/livez", "/readyz"}:
            problem = self.endpoint.problem(path)
            status = HTTPStatus.OK if problem is None else HTTPStatus.SERVICE_UNAVAILABLE
            self._answer(status, f"{problem or 'ok'}\n".encode())
        else:
            self._answer(HTTPStatus.NOT_FOUND, b"there are /metrics, /livez and /readyz\n")

    do_HEAD = do_GET  # noqa: N815 - of the base

    def _answer(self, status: HTTPStatus, body: bytes, content_type: str = _TEXT) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - as of the base
        log.debug(format, *args)


def _parsed(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    bare = host.startswith("[") != host.endswith("]") or (":" in host and not host.startswith("["))
    if bare or not port.isascii() or not port.isdigit() or int(port) > 65_535:
        raise ConfigurationError(
            f"metrics cannot be served on {address!r}: give HOST:PORT, or a port of {LOOPBACK}, by --metrics or "
            f"DURABLY_METRICS"
        )
    return host.strip("[]") or LOOPBACK, int(port)
