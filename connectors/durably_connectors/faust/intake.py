"""How records come in: each is handled until that has succeeded, or goes to the dead letters; only then its offset may go."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from durably_connectors.faust.delivery import RETRY
from durably_connectors.faust.message import Message, message_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Hashable

    from faust.streams import Stream
    from faust.types import EventT

    from durably_connectors.faust.delivery import Delivery

logger = logging.getLogger("durably.connectors")

AT_ONCE = 100
"""Records that one agent has in the works at once."""


class Later(Exception):
    """The world outside is not ready: the same is to be tried again in a while. The message says what is awaited."""


class Handler(Protocol):
    """What is to be done with a message whose value is bytes.

    Attributes:
        name: of the connector, for logs and dead letters.
    """

    name: str

    def lane(self, message: Message) -> Hashable:
        """Messages of one lane are handled one after the other; None: of no lane."""

    async def handle(self, message: Message) -> None:
        """Returns when it is done, durably. Raises `Later`, or anything else for what will never be done."""


class Intake:
    """Handles the records of one stream, many at once.

    Faust acknowledges a record whose agent has raised, and drops one that cannot be decoded. So this takes bytes, lets
    nothing escape, and acknowledges by itself.

    Args:
        handler: what is to be done.
        delivery: where dead letters go.
    """

    def __init__(self, handler: Handler, delivery: Delivery) -> None:
        self._handler = handler
        self._delivery = delivery
        self._room = asyncio.Semaphore(AT_ONCE)
        self._tasks: set[asyncio.Task[None]] = set()
        self._last: dict[Hashable, asyncio.Task[None]] = {}
        self._ending = False

    async def run(self, stream: Stream[Any]) -> None:
        """Takes records for as long as the stream goes on."""
        async for event in stream.noack().events():
            await self._room.acquire()
            if self._ending:  # it will be delivered again
                self._room.release()
                continue
            message = message_of(event.message)
            lane = self._handler.lane(message)
            before = None if lane is None else self._last.get(lane)
            task = asyncio.create_task(self._finish(event, message, before))
            self._tasks.add(task)
            if lane is not None:
                self._last[lane] = task
            task.add_done_callback(partial(self._done, lane))

    async def drain(self, timeout: float) -> None:  # noqa: ASYNC109 - what is not done by then is given up
        """Takes nothing more, waits for what is in the works, and gives up what takes longer: it is delivered again."""
        self._ending = True
        if self._tasks:
            _, left = await asyncio.wait(self._tasks, timeout=timeout)
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    def _done(self, lane: Hashable, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if self._last.get(lane) is task:
            del self._last[lane]
        self._room.release()

    async def _finish(self, event: EventT[Any], message: Message, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await asyncio.wait([before])
        handler = self._handler
        await tried(partial(handler.handle, message), message, self._delivery, handler.name)
        event.ack()


async def tried(handle: Callable[[], Awaitable[None]], message: Message, delivery: Delivery, name: str) -> None:
    """Has a message handled, however long that takes; what will never be goes to the dead letters.

    Args:
        handle: does it. Raises `Later`, or something else for what will never be done.
        message: with its value as it came.
        delivery: where dead letters go.
        name: of who handles it.
    """
    while True:
        try:
            return await handle()
        except Later as e:
            where = f"{message.topic}[{message.partition}]@{message.offset}"
            logger.warning("%s: the message at %s waits: %s", name, where, e)
            await asyncio.sleep(RETRY)
        except Exception as e:  # decoding, the user's mapping, what the engine refuses: none gets better by waiting
            return await delivery.dead_letter(message, f"{type(e).__name__}: {e}", name)
