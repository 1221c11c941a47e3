"""What a worker offers to the steps that it runs: clients on its broker, and responses to webhooks."""

from __future__ import annotations

import asyncio
import logging
import threading
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import TYPE_CHECKING

from durably_schemas.records import Reply

from durably.errors import BrokerError, BrokerUnreachable, DurablyError, RecordTooLarge
from durably.runtime import step_context

if TYPE_CHECKING:
    from durably_schemas import Catalogue, Codec
    from durably_schemas.records import Payload, ReplyTo

    from durably.broker.port import Broker, Producer
    from durably.client import AsyncClient, Client
    from durably.worker.clock import Clock
    from durably.worker.writers import Acknowledgements

logger = logging.getLogger("durably.worker")

RESPOND = 30.0  # seconds that a response may take until it is durable
CLOSE = 10.0  # seconds that a client has for closing: what it was given last may still be under way


class WorkerServices:
    """Implements `durably.runtime.Services`. Its methods may be called from any step.

    Args:
        broker: where the clients' commands and the responses go. It stays open.
        catalogue: the names of the topics.
        producer: sends the responses.
        acknowledgements: waits for them.
        codec: encodes them.
        loop: the one that async steps run on; a client for them is closed there.
        clock: the time.
    """

    def __init__(
        self,
        broker: Broker,
        catalogue: Catalogue,
        *,
        producer: Producer,
        acknowledgements: Acknowledgements,
        codec: Codec,
        loop: asyncio.AbstractEventLoop,
        clock: Clock,
    ) -> None:
        self._broker = broker
        self._catalogue = catalogue
        self._producer = producer
        self._acknowledgements = acknowledgements
        self._codec = codec
        self._loop = loop
        self._clock = clock
        self._lock = threading.Lock()
        self._client: AsyncClient | None = None
        self._sync_client: Client | None = None
        self._closed = False

    def client(self) -> AsyncClient:
        """A client on the worker's broker and namespace. Raises `DurablyError` when the worker has stopped."""
        with self._lock:
            if self._client is None:
                from durably.client import AsyncClient  # most steps need none

                self._check_open()
                self._client = AsyncClient(self._broker, namespace=self._catalogue.namespace)
            return self._client

    def sync_client(self) -> Client:
        """Its twin for plain functions."""
        with self._lock:
            if self._sync_client is None:
                from durably.client import Client  # as above

                self._check_open()
                self._sync_client = Client(self._broker, namespace=self._catalogue.namespace)
            return self._sync_client

    async def respond(self, to: ReplyTo, payload: Payload) -> None:
        """Sends the response of a webhook to the gateway that waits for it; returns when it is durable.

        Raises:
            RecordTooLarge: the response is larger than a record may be.
            BrokerUnreachable: nobody acknowledged it in time; it may come through yet.
            BrokerError: it cannot be sent.
        """
        response = self._send(to, payload)
        await self._acknowledgements.until(response.is_over)
        response.check()

    def respond_sync(self, to: ReplyTo, payload: Payload) -> None:
        """As `respond`, blocking."""
        response = self._send(to, payload)
        self._acknowledgements.until_sync(response.is_over)
        response.check()

    def close(self) -> None:
        """Closes the clients. To be called when no step runs any more, while the event loop still does."""
        with self._lock:
            self._closed = True
            client, sync_client = self._client, self._sync_client
        if sync_client is not None:
            sync_client.close()
        if client is not None:
            closing = asyncio.run_coroutine_threadsafe(client.close(), self._loop)
            try:
                closing.result(CLOSE)
            except FutureTimeoutError:
                logger.warning(
                    "the client of this worker's steps was not closed within %g s: what it still had to send may be lost",
                    CLOSE,
                )

    def _check_open(self) -> None:
        if self._closed:
            raise DurablyError("this worker has stopped: its steps have no client any more")

    def _send(self, to: ReplyTo, payload: Payload) -> _Response:
        context = step_context.get()
        reply = Reply(request_id=to.request_id, run_id=None if context is None else context.run_id, result=payload)
        value = self._codec.encode(reply)
        if len(value) > self._broker.max_record_bytes:
            raise RecordTooLarge.of("the response to a webhook", len(value), self._broker.max_record_bytes)
        response = _Response(self._clock)
        self._producer.send(self._catalogue.replies, value, partition=to.partition, on_ack=response.on_ack)
        return response


class _Response:
    """A response under way."""

    __slots__ = ("_clock", "_error", "_settled", "_until")

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._until = clock.monotonic() + RESPOND
        self._settled = False
        self._error: Exception | None = None

    def on_ack(self, error: Exception | None, _: int) -> None:
        self._error = error
        self._settled = True

    def is_over(self) -> bool:
        return self._settled or self._clock.monotonic() >= self._until

    def check(self) -> None:
        if not self._settled:
            raise BrokerUnreachable(
                f"the response to a webhook was not acknowledged within {RESPOND:g} s; it may arrive yet"
            )
        if self._error is not None:
            raise BrokerError(f"the response to a webhook could not be sent: {self._error}") from self._error
