# /// script
# dependencies = ["restate-sdk==1.3.0", "hypercorn==0.18.0", "aiohttp==3.14.5", "psutil==7.2.2"]
#
# [tool.bench]
# variants = ["restate-calls", "restate-run"]
# npm = ["@restatedev/restate-server@1.7.12"]
# ///
"""Restate: a server that journals, and calls a service process; steps are service calls, or ``ctx.run`` in a handler."""

from __future__ import annotations

import json
import os
import sys
import urllib.request
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
import restate
from figures import System
from peer import CLIENT, Unavailable, Variant, free_port, home, main, versions
from processes import Processes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

NPM = "node_modules/@restatedev"
SERVER = f"{NPM}/restate-server-*/bin/restate-server"  # a package for each platform
PATIENCE = 300.0  # seconds
DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))

bench = restate.Service("Bench")


@bench.handler()
async def nothing(ctx: restate.Context) -> None:
    """Does nothing, as a step that the server calls."""


async def nothing_here() -> None:
    """Does nothing, as a step within its handler."""


@bench.handler()
async def calls(ctx: restate.Context, steps: int) -> int:
    """Calls a step that does nothing, again and again, each after the one before."""
    for _ in range(steps):
        await ctx.service_call(nothing, arg=None)
    return steps


@bench.handler()
async def run(ctx: restate.Context, steps: int) -> int:
    """The same, with steps that run in this very handler."""
    for _ in range(steps):
        await ctx.run_typed("nothing", nothing_here)
    return steps


app = restate.app(services=[bench])

SETTINGS = """
bind-ip = "127.0.0.1"
bind-port = {fabric}
listen-mode = "tcp"
disable-telemetry = true
[ingress]
bind-port = {ingress}
[admin]
bind-port = {admin}
"""
# As the documentation has it for production, but for one worker instead of eight: durably has one, too.
HYPERCORN = """
bind = "127.0.0.1:{service}"
h2_max_concurrent_streams = 2147483647
keep_alive_max_requests = 2147483647
keep_alive_timeout = 2147483647
workers = 1
"""


class Client:
    """A client of the server's ingress."""

    def __init__(self, http: aiohttp.ClientSession, handler: str, processes: Processes) -> None:
        self._http = http
        self._handler = handler
        self.check = processes.check
        self.cpu_seconds = processes.cpu_seconds

    async def run(self, steps: int) -> None:
        """Calls the handler and waits for its answer."""
        async with self._http.post(f"/Bench/{self._handler}", json=steps) as answer:
            answer.raise_for_status()
            await answer.read()


@asynccontextmanager
async def running(handler: str, folder: Path) -> AsyncIterator[Client]:
    """A server, one process of the service, registered there, and a client."""
    server = next(home("restate").glob(SERVER), None)
    if server is None:
        raise Unavailable("no restate-server here: make bench-peers, which needs npm")
    ports = {name: free_port() for name in ("fabric", "ingress", "admin", "service")}
    configuration, hypercorn = folder / "restate.toml", folder / "hypercorn.toml"
    configuration.write_text(SETTINGS.format(**ports))
    hypercorn.write_text(HYPERCORN.format(**ports))
    with Processes(folder) as processes:
        processes.start("server", [server, "--config-file", configuration, "--base-dir", folder / "data", "--no-logo"])
        processes.start(
            "service",
            [sys.executable, "-m", "hypercorn", "--config", hypercorn, "restate_peer:app"],
            os.environ | {"PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[:2]))},
        )
        processes.watch(CLIENT, os.getpid())
        processes.wait_until(lambda: _registered(ports))
        async with aiohttp.ClientSession(
            f"http://127.0.0.1:{ports['ingress']}",
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=PATIENCE),
        ) as http:
            yield Client(http, handler, processes)


def _registered(ports: dict[str, int]) -> bool:
    body = json.dumps({"uri": f"http://127.0.0.1:{ports['service']}"}).encode()
    asked = urllib.request.Request(
        f"http://127.0.0.1:{ports['admin']}/deployments", body, {"Content-Type": "application/json"}
    )
    try:
        DIRECTLY.open(asked, timeout=10).close()
    except OSError:
        return False
    return True


def _variant(handler: str, how: str) -> Variant:
    return Variant(
        System(
            f"Restate, {how}",
            versions("restate-sdk", "hypercorn") + f", restate-server {_server_version()}",
            "one node, defaults: the log's RocksDB fsyncs its write-ahead log",
            "One service process, where the documentation has eight in production; requests by HTTP/1.1 to the ingress; "
            "24 partitions, the default.",
        ),
        partial(running, handler),
    )


def _server_version() -> str:
    package = home("restate") / NPM / "restate-server" / "package.json"
    return json.loads(package.read_text())["version"] if package.exists() else "missing"


VARIANTS = {
    "restate-calls": _variant("calls", "steps as service calls"),
    "restate-run": _variant("run", "steps as `ctx.run` within the handler"),
}

if __name__ == "__main__":
    main(VARIANTS)
