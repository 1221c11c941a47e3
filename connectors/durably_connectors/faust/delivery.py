"""Records out: durable when awaited, tried again for as long as Kafka takes; and dead letters for what cannot be handled."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from typing import TYPE_CHECKING

from durably.errors import BrokerError, BrokerUnreachable, RecordTooLarge
from durably_schemas import Codec
from durably_schemas.records import DeadLetter, Record
from msgspec.structs import replace

if TYPE_CHECKING:
    from durably.broker.port import Broker, Headers, Producer
    from durably_schemas import Catalogue

    from durably_connectors.faust.message import Message

logger = logging.getLogger("durably.connectors")

RETRY = 1.0
"""Seconds until something that the world outside did not take is tried again."""
_POLL = 0.1  # seconds that an acknowledgement of the last record may wait for a look at the next one
_OVERHEAD = 512  # bytes that Kafka adds around a record in a batch, generously
_REASON = 10_000  # characters


class Delivery:
    """One idempotent producer, which all connectors of a process share. To be used on one event loop.

    Args:
        broker: where to.
        catalogue: whose topics.
    """

    def __init__(self, broker: Broker, catalogue: Catalogue) -> None:
        self.catalogue = catalogue
        self.codec = Codec()
        self._broker = broker
        self._loop = asyncio.get_running_loop()
        self._closed = threading.Event()
        self._known: set[str] = set()
        self._producer: Producer = broker.producer()
        self._thread = threading.Thread(target=self._poll, name="durably-delivery", daemon=True)
        self._thread.start()

    async def command(self, key: str, record: Record) -> None:
        """Sends a command to the engine. Raises as `send`, or `CodecError`."""
        await self.send(self.catalogue.commands, self.codec.encode(record), key.encode())

    async def send(self, topic: str, value: bytes | None, key: bytes | None = None, headers: Headers = ()) -> None:
        """Returns when the record is durable, however long that takes. Raises `RecordTooLarge`."""
        size = len(value or b"") + len(key or b"") + _OVERHEAD
        if size > self._broker.max_record_bytes:
            raise RecordTooLarge.of(f"a record for {topic}", size, self._broker.max_record_bytes)
        while True:
            producer = self._producer
            try:
                return await self._sent(producer, topic, value, key, headers)
            except RecordTooLarge:
                raise
            except BrokerError as e:
                logger.warning("writing to %s is tried again: %s", topic, e)
                if not isinstance(e, BrokerUnreachable):
                    await self._replace(producer)
            await asyncio.sleep(RETRY)

    async def dead_letter(self, message: Message, reason: str, component: str) -> None:
        """Keeps a message, whose value is bytes, that cannot be handled; returns when that is durable."""
        where = f"{message.topic}[{message.partition}]@{message.offset}"
        logger.error("%s: the message at %s goes to the dead letters: %s", component, where, reason)
        letter = DeadLetter(
            topic=message.topic,
            partition=message.partition,
            offset=message.offset,
            key=message.key,
            value=message.value,
            reason=reason[:_REASON].encode(errors="replace").decode(),  # JSON may hold half a surrogate pair
            component=component,
            at=time.time_ns() // 1_000_000,
        )
        try:
            await self.send(self.catalogue.dead_letters, self.codec.encode(letter), message.key)
        except RecordTooLarge:
            # The letter is larger than what is in it. Where it lies can be read there.
            bare = replace(letter, key=None, value=None)
            await self.send(self.catalogue.dead_letters, self.codec.encode(bare))

    async def close(self) -> None:
        """Flushes for a bounded time and lets go."""
        self._closed.set()
        await asyncio.to_thread(self._thread.join)
        await asyncio.to_thread(self._producer.close)

    async def _sent(
        self, producer: Producer, topic: str, value: bytes | None, key: bytes | None, headers: Headers
    ) -> None:
        done: asyncio.Future[None] = self._loop.create_future()

        def settle(error: Exception | None) -> None:
            if done.cancelled():
                return
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(error)

        def on_ack(error: Exception | None, _: int) -> None:
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(settle, error)

        if topic in self._known:
            producer.send(topic, value, key=key, headers=headers, on_ack=on_ack)
        else:
            # The broker is asked about it, which may take seconds; the loop has other things to do.
            await asyncio.to_thread(producer.send, topic, value, key=key, headers=headers, on_ack=on_ack)
            self._known.add(topic)
        await done

    async def _replace(self, broken: Producer) -> None:
        """A producer that failed for good refuses everything; all who meet that share one successor."""
        if self._producer is broken and not self._closed.is_set():
            self._producer = self._broker.producer()
            self._known.clear()
            await asyncio.to_thread(broken.close)

    def _poll(self) -> None:
        while not self._closed.is_set():
            self._producer.poll(_POLL)
