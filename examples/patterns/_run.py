"""What the programs of this folder share: an installation to run on, and a server for those that call an API."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

from durably import AsyncClient, HookNotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from durably.client.hooks import HookInfo

DURABLY = Path(sys.executable).with_name("durably")


def run(main: Callable[[], Coroutine[Any, Any, None]], *, gateway: bool = False) -> None:
    """Runs ``main`` against ``DURABLY_URL``; where that is not set, against a ``durably dev`` of the program's own.

    Args:
        main: the program.
        gateway: whether it needs the gateway, for webhooks.
    """
    if os.environ.get("DURABLY_URL"):
        asyncio.run(main())
        return
    with tempfile.TemporaryDirectory() as folder, _dev(sys.argv[0], Path(folder), gateway=gateway) as url:
        os.environ["DURABLY_URL"] = url
        asyncio.run(main())


@contextmanager
def _dev(program: str, folder: Path, *, gateway: bool) -> Iterator[str]:
    url, log = f"embedded:{folder / 'broker'}", folder / "log"
    port = _free_port() if gateway else 0
    with log.open("wb") as out:
        process = subprocess.Popen(  # noqa: S603 - our own command
            [DURABLY, "dev", program, "--url", url, "--port", str(port)], stdout=out, stderr=out
        )
    try:
        while "ready: " not in log.read_text():
            if process.poll() is not None:
                raise RuntimeError(f"durably dev ended:\n{log.read_text()}")
            time.sleep(0.02)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as s:
        return int(s.getsockname()[1])


async def hook(client: AsyncClient, token: str) -> HookInfo:
    """The hook with this token, as soon as its workflow has created it."""
    async with asyncio.timeout(30):
        while True:
            try:
                return await client.get_hook(token)
            except HookNotFoundError:
                await asyncio.sleep(0.05)


async def resume(client: AsyncClient, token: str, payload: Any) -> None:
    """Resumes a hook, as soon as its workflow has created it."""
    await hook(client, token)
    await client.resume_hook(token, payload)


class Api(BaseHTTPRequestHandler):
    """What an example's API derives from: answers with JSON, and keeps its log to itself."""

    def reply(self, status: int, body: bytes = b"{}", **headers: str) -> None:
        """Sends a whole response."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@contextmanager
def serving(api: type[Api]) -> Iterator[str]:
    """Serves an API on loopback; gives its URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), api)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
