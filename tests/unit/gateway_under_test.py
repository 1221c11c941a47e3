"""A gateway on a real server, on loopback, over the scripted processor; and an HTTP client that calls it."""

from __future__ import annotations

import asyncio
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpx
import uvicorn
from durably.client import AsyncClient
from durably_connectors.http import GatewayThread, create_gateway
from durably_connectors.http.server import bind, url_of
from durably_schemas import Catalogue
from unit.scripted_broker import ScriptedBroker
from unit.scripted_hooks import ScriptedHooks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastapi import FastAPI


class GatewayUnderTest:
    """What a test needs: the network, who answers on it, and the HTTP client."""

    def __init__(self, broker: ScriptedBroker, processor: ScriptedHooks, app: FastAPI, thread: GatewayThread) -> None:
        self.broker = broker
        self.processor = processor
        self.app = app
        self.url = thread.url
        self.thread = thread
        self.http = httpx.Client(base_url=self.url, timeout=20, trust_env=False, verify=False)

    def api(self, method: str, path: str, **options: Any) -> httpx.Response:
        return self.http.request(method, f"/api/v1{path}", **options)


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """Serves any application on loopback."""
    listening = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        yield url_of(listening)
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


@contextmanager
def gateway_under_test(*, timeout: float = 5, **options: Any) -> Iterator[GatewayUnderTest]:
    broker = ScriptedBroker(Catalogue(partitions=3))
    processor = ScriptedHooks(broker)
    client = AsyncClient(broker, timeout=timeout)
    app = create_gateway(client, **options)
    thread = GatewayThread(lambda: app, 0)
    thread.start()
    under_test = GatewayUnderTest(broker, processor, app, thread)
    try:
        yield under_test
    finally:
        under_test.http.close()
        thread.stop()
        asyncio.run(client.close())
