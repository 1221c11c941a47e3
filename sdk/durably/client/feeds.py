"""Iterators among the arguments of a start: each becomes a stream of the new run, which the client writes."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future, InvalidStateError, wait
from contextlib import suppress
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, cast

from durably_schemas.records import TERMINAL, StreamChunk

from durably import chunks
from durably.client.exchange import query
from durably.errors import DurablyError
from durably.identifiers import ulid
from durably.streams import Readable

if TYPE_CHECKING:
    from durably_schemas.records import ChunkKind, Payload, Reply

    from durably.client.connection import Connection

logger = logging.getLogger("durably.client")

UNACKNOWLEDGED = 1_000  # chunks of one stream that may be under way; more make its iterator wait
UNACKNOWLEDGED_BYTES = 8 * 1024 * 1024  # as many of their payloads; the last one may lie above


class ChunkWriter:
    """Writes one stream of one run as a writer of its own, whose records count from 1.

    Attributes:
        handle: the stream.
        name: the writer's.
    """

    def __init__(self, connection: Connection, handle: Readable) -> None:
        self.handle = handle
        self.name = f"client-{ulid()}"
        self._connection = connection
        self._n = 0

    def send(self, kind: ChunkKind, payload: Payload | None = None) -> Future[None]:
        """Sends one record; the future is done when the broker has it durably. One call at a time."""
        self._n += 1
        record = StreamChunk(
            run_id=self.handle.run_id,
            namespace=self.handle.namespace,
            writer=self.name,
            n=self._n,
            kind=kind,
            at=time.time_ns() // 1_000_000,
            payload=payload,
        )
        return self._connection.send(self.handle.run_id, record, self._connection.catalogue.streams)


class Feed:
    """One iterator on its way into one stream.

    The stream ends when the iterator does, with its error where it raised one. Nothing more is drawn when the run has
    ended, or when the client closes: then the stream ends with an error that says so.

    Attributes:
        handle: the stream.
        done: settled when the end of the stream is durable, or has failed to be; the iterator may still hang then.
    """

    def __init__(self, connection: Connection, handle: Readable, values: AsyncIterator[Any] | Iterator[Any]) -> None:
        self.handle = handle
        self.done: Future[None] = Future()
        self._connection = connection
        self._values = values
        self._writer = ChunkWriter(connection, handle)
        self._under_way: deque[tuple[Future[None], int]] = deque()
        self._bytes = 0
        self._sending = threading.Lock()  # the end may come from who closes the client
        self._ended = False
        self._stopped = False
        self._task: asyncio.Task[None] | None = None
        self._watch: Future[Reply] | None = None

    def start(self) -> None:
        """Draws from the iterator on a thread of its own; an async one gets an event loop there."""
        self._watch_run()
        draw = self._draw if isinstance(self._values, Iterator) else lambda: asyncio.run(self._draw_async())
        context = copy_context()
        threading.Thread(target=lambda: context.run(draw), name=f"durably-{self._writer.name}", daemon=True).start()

    async def start_async(self) -> None:
        """Draws from an async iterator as a task of the running loop, to which it belongs; else as `start`."""
        if not self._connection.is_listening:
            await asyncio.wrap_future(self._connection.listening())
        if isinstance(self._values, Iterator):
            self.start()
        else:
            self._watch_run()
            self._task = asyncio.create_task(self._draw_async(), name=f"durably-{self._writer.name}")

    def stop(self, error: DurablyError | None = None) -> None:
        """Draws nothing more, and ends the stream."""
        self._stopped = True
        self._tell(error)
        task = self._task
        if task is not None and not task.done():
            with suppress(RuntimeError):  # its loop is closed
                task.get_loop().call_soon_threadsafe(task.cancel)

    def _watch_run(self) -> None:
        run_id = self.handle.run_id

        def answered(watch: Future[Reply]) -> None:
            if not watch.cancelled() and watch.exception() is None:
                summary = watch.result().summary
                if summary is not None and summary.status in TERMINAL:
                    self.stop()

        self._watch = self._connection.ask(run_id, query(run_id, "RESULT"))
        self._watch.add_done_callback(answered)

    def _draw(self) -> None:
        values = cast("Iterator[Any]", self._values)
        try:
            for value in values:
                self._send("DATA", chunks.dump(value, self.handle.namespace))
                while (oldest := self._too_much()) is not None:
                    oldest.result()
            self._end()
        except BaseException as e:  # of the user's iterator: the stream's readers are told, whatever it is
            self._failed(e)
        finally:
            if (close := getattr(values, "close", None)) is not None:
                with suppress(Exception):  # what it raises while it is dropped concerns nobody
                    close()
            wait([future for future, _ in self._under_way], self._connection.timeout)
            self._over()

    async def _draw_async(self) -> None:
        values = cast("AsyncIterator[Any]", self._values)
        try:
            async for value in values:
                self._send("DATA", chunks.dump(value, self.handle.namespace))
                while (oldest := self._too_much()) is not None:
                    await asyncio.shield(asyncio.wrap_future(oldest))
            self._end()
        except BaseException as e:  # as above
            self._failed(e)
        finally:
            if (close := getattr(values, "aclose", None)) is not None:
                with suppress(Exception):  # as above
                    await close()
            left = [asyncio.wrap_future(future) for future, _ in self._under_way]
            if left:
                await asyncio.wait(left, timeout=self._connection.timeout)
            self._over()

    def _send(self, kind: ChunkKind, payload: Payload | None) -> None:
        with self._sending:
            if self._ended:
                raise _Stopped
            size = len(payload.data) if payload is not None else 0
            future = self._writer.send(kind, payload)
            self._ended = kind == "END"
            self._under_way.append((future, size))
            self._bytes += size
        if kind == "END":
            future.add_done_callback(lambda _: self._over())

    def _too_much(self) -> Future[None] | None:
        """What to wait for before more is drawn. Raises what kept a chunk from being written."""
        while self._under_way and self._under_way[0][0].done():
            future, size = self._under_way.popleft()
            self._bytes -= size
            future.result()
        if len(self._under_way) >= UNACKNOWLEDGED or self._bytes >= UNACKNOWLEDGED_BYTES:
            return self._under_way[0][0]
        return None

    def _end(self, error: BaseException | None = None) -> None:
        with suppress(_Stopped):
            self._send("END", None if error is None else chunks.dump_error(error, self.handle.namespace))

    def _failed(self, exc: BaseException) -> None:
        if isinstance(exc, _Stopped) or self._stopped:
            return
        logger.warning("%r ends with an error: %s: %s", self.handle, type(exc).__name__, exc)
        self._tell(exc)

    def _tell(self, error: BaseException | None) -> None:
        try:
            self._end(error)
        except Exception:
            logger.warning("%r: its readers could not be told that it ends", self.handle, exc_info=True)

    def _over(self) -> None:
        """Settles `done`. Called when the end of the stream is acknowledged, and when its iterator is let go."""
        if self._watch is not None:
            self._watch.cancel()
        with suppress(InvalidStateError):
            self.done.set_result(None)


class Feeds:
    """What a client feeds just now. Thread-safe."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._live: set[Feed] = set()

    def take(self, run_id: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Taken:
        """The arguments of a start, with handles in the place of iterators, and what is to be fed once it is made."""
        feeds: list[Feed] = []

        def handle(value: Any) -> Any:
            if not isinstance(value, AsyncIterator | Iterator):
                return value
            feed = Feed(self._connection, Readable(run_id, f"arg-{ulid()}"), value)
            feeds.append(feed)
            return feed.handle

        args = tuple(handle(value) for value in args)
        return args, {name: handle(value) for name, value in kwargs.items()}, feeds

    def start(self, feeds: list[Feed]) -> None:
        """Begins to feed a run that has been started."""
        for feed in feeds:
            feed.start()
            self._keep(feed)

    async def start_async(self, feeds: list[Feed]) -> None:
        """As `start`."""
        for feed in feeds:
            await feed.start_async()
            self._keep(feed)

    def close(self) -> None:
        """Waits until all is fed, for the connection's timeout at most; ends what is not with an error."""
        with self._lock:
            feeds = list(self._live)
        if not feeds:
            return
        wait([feed.done for feed in feeds], self._connection.timeout)
        for feed in feeds:
            if not feed.done.done():
                logger.warning("%r is cut off: its client closes", feed.handle)
                feed.stop(
                    DurablyError(f"stream {feed.handle.namespace!r} was cut off: the client that wrote it closed")
                )

    def _keep(self, feed: Feed) -> None:
        with self._lock:
            self._live.add(feed)

        def forget(_: Future[None]) -> None:
            with self._lock:
                self._live.discard(feed)

        feed.done.add_done_callback(forget)


class _Stopped(Exception):
    """The stream has ended, and more was drawn for it."""


_Taken = tuple[tuple[Any, ...], dict[str, Any], list[Feed]]
