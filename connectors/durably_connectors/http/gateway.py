"""What the gateway's routes share: the client, the list of runs, and the limits."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast, get_args
from urllib.parse import quote

from durably.client import AsyncClient
from durably.errors import ConfigurationError, DurablyError
from durably.hooks import WEBHOOK_PATH
from durably.jsonable import to_json
from durably_schemas.records import RunStatus
from fastapi import Depends, Request
from starlette.responses import Response

from durably_connectors.http.projection import Projection, by_status, checked_file

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterable
    from concurrent.futures import Future
    from pathlib import Path

    from durably.client.connection import Connection
    from durably.observability.metrics import Sample

T = TypeVar("T")

MAX_BODY = 10 * 1024 * 1024
"""Bytes of a request's body, by default."""
RESPONSE_TIMEOUT = 30.0
"""Seconds that the caller of a webhook waits for a step's response, by default."""
_BROKER = 5.0  # seconds for the broker to answer


class Gateway:
    """One gateway. It opens with the application's lifespan, or where it is mounted and has none, at its first request.

    Args:
        client: who talks to the broker; where it is a URL, or None for ``DURABLY_URL``, a client of its own.
        projection: the file of the list of runs; in memory by default.
        public_url: what people reach the gateway by, ``https://hooks.example.com``; else what requests say.
        response_timeout: seconds that the caller of a webhook waits for a step's response.

    Raises:
        ConfigurationError: the projection's file cannot be opened, or a setting of the client is not as it must be.
    """

    def __init__(
        self,
        client: AsyncClient | str | None,
        *,
        projection: Path | None = None,
        public_url: str | None = None,
        response_timeout: float = RESPONSE_TIMEOUT,
    ) -> None:
        if projection is not None:
            checked_file(projection)
        self._owned = not isinstance(client, AsyncClient)
        self.client = client if isinstance(client, AsyncClient) else AsyncClient(client)
        self.public_url = None if public_url is None else public_url.rstrip("/")
        self.response_timeout = response_timeout
        self._path = projection
        self._lock = threading.Lock()
        self._projection: Projection | None = None
        self._leaving: set[asyncio.Future[None]] = set()
        self._prober = ThreadPoolExecutor(1, thread_name_prefix="durably-ready")
        self._probe: Future[str | None] | None = None

    @property
    def connection(self) -> Connection:
        """The client's, for what its methods do not offer: answers as they came, undecoded."""
        return self.client._connection  # noqa: SLF001

    def webhook_url(self, token: str, request: Request) -> str:
        """Where the webhook with this token takes requests, as people reach the gateway."""
        base = self.public_url or f"{request.url.scheme}://{request.url.netloc}{request.scope.get('root_path', '')}"
        return f"{base}{WEBHOOK_PATH}{quote(token, safe='')}"

    @property
    def projection(self) -> Projection:
        """The list of runs; begins to be kept at the first call."""
        with self._lock:
            if self._projection is None:
                self._projection = Projection(self.connection, self._path)
                self._projection.start()
            return self._projection

    def leaving(self) -> asyncio.Future[None]:
        """Done when the server stops, so that what is open does not keep it. To be cancelled when it is of no more use."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._leaving.add(future)
        future.add_done_callback(self._leaving.discard)
        return future

    def leave(self) -> None:
        """Tells all who have asked for `leaving`. On the server's event loop."""
        for future in list(self._leaving):
            if not future.done():
                future.set_result(None)

    async def while_wanted(self, request: Request, awaitable: Awaitable[T]) -> T | None:
        """What it gives; None where the client goes before, or the server stops, and then it is cancelled.

        Args:
            request: who asks. Its body must have been read, or be of no interest.
            awaitable: what may take long.
        """
        task, leaving, gone = asyncio.ensure_future(awaitable), self.leaving(), asyncio.ensure_future(_gone(request))
        any_: set[asyncio.Future[Any]] = {task, leaving, gone}
        try:
            await asyncio.wait(any_, return_when=asyncio.FIRST_COMPLETED)
            if gone.done() and not task.done():
                gone.result()  # raises where the client sends more than it may
            return task.result() if task.done() else None
        finally:
            for future in any_:
                future.cancel()
            await asyncio.wait({task, gone})

    async def broker_problem(self) -> str | None:
        """Why the broker does not answer, or None. All who ask at once share one question, on a thread of its own."""
        if self._probe is None or self._probe.done():
            self._probe = self._prober.submit(self._ask_broker)
        answered = asyncio.wrap_future(self._probe)
        done, _ = await asyncio.wait([answered], timeout=_BROKER)
        return answered.result() if done else f"{self.connection.broker.url} does not answer within {_BROKER:g} s"

    def _ask_broker(self) -> str | None:
        try:
            self.connection.broker.topics(_BROKER)
        except DurablyError as e:
            return str(e)
        return None

    # -- what it tells of itself, to any thread --------------------------------------------------------------------

    @property
    def dead(self) -> str | None:
        """Nothing: a gateway that answers nobody is found out by ``/health``."""
        return None

    @property
    def unready(self) -> str | None:
        """Why the list of runs is not complete; None: it is."""
        try:
            projection = self.projection
        except ConfigurationError as e:
            return str(e)
        return projection.problem or (None if projection.is_ready else "the list of runs is still being read")

    def samples(self) -> Iterable[Sample]:
        """Its metrics: how many runs are listed."""
        try:
            found = by_status(self.projection.counts())
        except (ConfigurationError, sqlite3.Error):
            return
        for status in get_args(RunStatus):
            yield "durably_runs", (status,), found[status]

    async def close(self) -> None:
        """Lets go of the list, and of the client where it is the gateway's own. A request opens it again."""
        with self._lock:
            projection, self._projection = self._projection, None
        if projection is not None:
            await asyncio.to_thread(projection.stop)
        if self._owned:
            await self.client.close()


async def _gone(request: Request) -> None:
    """Returns when the client has closed the connection; what it still sends is read over."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _of(request: Request) -> Gateway:  # a plain function would be called on a thread
    return cast("Gateway", request.app.state.gateway)


GatewayOf = Annotated[Gateway, Depends(_of)]
"""The gateway that a route belongs to."""


class Json(Response):
    """A response of records and user values."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """As `durably.jsonable` shows them."""
        return to_json(content)
