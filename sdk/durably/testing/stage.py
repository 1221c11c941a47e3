"""What runs a test's workflows: the real engine in this process, on the test's event loop, at a time that skips ahead.

    append ──> pump: the processor's turns ──> requests to steps ──> replies to clients ──> results ──> append ...

Every record that is written schedules a *pump* on the loop. When a pump finds nothing more to do, and no step is at
work, the stage is at *rest*. If somebody then waits for the end of a run, the clock is set to the next timer; if there
is none, whoever waits is told that nothing will ever happen.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from concurrent.futures import InvalidStateError
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from durably_schemas import Catalogue, Codec
from durably_schemas.records import Event, RunSummary, StreamChunk

from durably import chunks
from durably.client.stream import ChunkOrder
from durably.errors import DurablyError, HookNotFoundError, RunNotFoundError
from durably.installation import processor_module
from durably.streams import bound_to, checked_namespace
from durably.testing.broker import MemoryBroker
from durably.testing.connection import LocalClient, LocalConnection
from durably.testing.worker import LocalWorker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from durably_schemas.records import Payload

    from durably.authoring import Registry
    from durably.client import AsyncClient

T = TypeVar("T")

GATEWAY_URL = "http://gateway.test"
"""The base of webhooks' URLs. Nobody listens there: a test hands requests over by `WorkflowEnvironment.resume_webhook`."""
COURTESY = 16
"""Turns of the event loop that other tasks of the test have, at rest, before time is skipped."""
PATIENCE_MS = 5 * 60 * 1000
"""A processor remembers for somewhat longer who waits for a result; a client asks again long before."""


class RunStuckError(DurablyError):
    """A run is waited for that will never end: nothing is under way, no timer is left, and nobody has resumed its hooks.

    Args:
        message: says what the run waits for.
        run_id: the run; None where a response of a step was waited for.
    """

    def __init__(self, message: str, run_id: str | None = None) -> None:
        super().__init__(message)
        self.run_id = run_id


class Stage:
    """A broker in memory, a processor, a worker, a client and a clock, which belong to one event loop.

    Args:
        registry: the workflows and steps.
        now: the time that it begins at, in milliseconds since the epoch; None: the machine's.
        skip_time: whether time skips while somebody waits.
        always_replay: whether each run is replayed for each of its events.

    Attributes:
        client: on its broker.
        steps: what is planned for them.
        skip_time: as given; see `let_skip`.
        now: the time.

    Raises:
        ConfigurationError: this installation has no processor.
    """

    def __init__(self, registry: Registry, *, now: int | None, skip_time: bool, always_replay: bool) -> None:
        self.skip_time = skip_time
        self.now = self._asked_at = time.time_ns() // 1_000_000 if now is None else now
        self._registry = registry
        self._codec = Codec()
        self._catalogue = catalogue = Catalogue("test", 1)
        self._broker = broker = MemoryBroker(now=self._time, on_append=self._wake)
        broker.create(catalogue.topics(()))
        self._connection = LocalConnection(broker, catalogue, self._time)
        self.client: AsyncClient = LocalClient(self._connection)
        self._worker = LocalWorker(broker, catalogue, registry, self._connection, self._time, self._wake)
        self.steps = self._worker.planned
        self._loop: asyncio.AbstractEventLoop | None = None
        self._scheduled = self._closed = False
        self._looking = False
        self._pumps = 0
        self._changed: asyncio.Future[None] | None = None
        self._failed: BaseException | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="durably-test-", dir=_memory())
        self._processor = processor_module("inline").InlineProcessor(
            broker,
            catalogue,
            registry,
            Path(self._folder.name),
            now=self._time,
            always_replay=always_replay,
            gateway_url=GATEWAY_URL,
        )

    # -- what is asked of it ---------------------------------------------------------------------------------------

    def bind(self) -> None:
        """Makes the running loop its own, and serves the queues that steps name by now.

        Raises:
            DurablyError: it belongs to another loop.
        """
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
            self._worker.run_on(loop)
        elif self._loop is not loop:
            raise DurablyError("this environment belongs to another event loop: make one for each asyncio.run()")
        queues = {"default", *(step.queue for step in self._registry.steps.values())}
        self._broker.create(self._catalogue.topics(tuple(queues)))
        self._processor.serve(queues)
        self._worker.serve(queues)

    def let_skip(self, skip: bool) -> None:
        """Switches whether time skips, for those too who wait already."""
        self.skip_time = skip
        self._wake()

    async def settle(self) -> None:
        """Returns when nothing can proceed any more unless time passes or data come from outside."""
        self.bind()
        await self.until(lambda: False)

    async def until(self, ready: Callable[[], bool]) -> None:
        """Returns when something is so, or when nothing proceeds that could make it so."""
        while not ready() and not self._at_rest:
            await self._change()

    async def _change(self) -> None:
        """Returns after the next pump. Raises what has ended it all."""
        if self._failed is not None:
            raise self._failed
        assert self._loop is not None
        if self._changed is None or self._changed.done():
            self._changed = self._loop.create_future()
        await asyncio.shield(self._changed)

    async def advance(self, until: int) -> None:
        """Lets time pass: all that is due meanwhile happens at its time, and in its order."""
        await self.settle()
        while (due := self._processor.next_due()) is not None and due <= until:
            self._set_time(due)
            await self.settle()
        self._set_time(until)
        await self.settle()

    async def when_open(self, act: Callable[[], Awaitable[T]]) -> T:
        """Tries until the hook is there. Raises `HookNotFoundError` where it is not, and nothing proceeds."""
        self.bind()
        while True:
            resting = self._at_rest
            try:
                return await act()
            except HookNotFoundError:
                if resting:
                    raise
            if not self._at_rest:
                await self._change()

    def crash(self) -> None:
        """The processor dies, and another one takes over."""
        self._processor.crash()
        self._connection.ask_again()
        self._wake()

    def exists(self, run_id: str) -> bool:
        """Whether there is such a run."""
        return self._processor.state(run_id) is not None

    def summary(self, run_id: str) -> RunSummary:
        """A run as it is. Raises `RunNotFoundError`."""
        state = self._processor.state(run_id)
        if state is None:
            raise RunNotFoundError(f"there is no run {run_id}", run_id)
        summary: RunSummary = state.summary()
        return summary

    def run_ids(self) -> list[str]:
        """All runs, in the order in which they were started."""
        return list(dict.fromkeys((m.key or b"").decode() for m in self._broker.records(self._catalogue.runs)))

    def events(self, run_id: str) -> list[Event]:
        """A run's log."""
        key = run_id.encode()
        records = [m for m in self._broker.records(self._catalogue.events) if m.key == key]
        events = [self._codec.decode_as(Event, message.value) for message in records]
        return [event for event in events if event.run_id == run_id]  # custom tokens have logs of their own

    async def chunks(self, run_id: str, namespace: str | None, start_index: int) -> AsyncIterator[Any]:
        """The values of a stream, and each new one, to its end. Raises what its writer has ended it with."""
        order, position, skip = ChunkOrder(checked_namespace(namespace)), 0, start_index
        await self.settle() if skip < 0 else self.bind()
        while True:
            over = self.summary(run_id).completed_at is not None
            found, position = self._accepted(run_id, order, position)
            if skip < 0:
                found, skip = found[skip:], 0
            skipped = min(skip, len(found))
            skip -= skipped
            for payload in found[skipped:]:
                with bound_to(self._connection):
                    value = chunks.load(payload)
                yield value
            if order.error is not None:
                raise chunks.load_error(order.error)
            if order.ended or over:
                return
            await self._more(run_id)

    def close(self) -> None:
        """Drops all runs."""
        self._closed = True
        self._worker.close()
        self._processor.close()
        self._folder.cleanup()

    # -- how it works ----------------------------------------------------------------------------------------------

    def _time(self) -> int:
        return self.now

    def _set_time(self, ms: int) -> None:
        self.now = max(self.now, ms)
        if self.now - self._asked_at > PATIENCE_MS:
            self._asked_at = self.now
            self._connection.ask_again()
        self._wake()

    def _wake(self) -> None:
        """Schedules a pump. Called with each record, on any thread; the first comes of a client in the test's loop."""
        if self._closed:
            return
        if self._loop is None:
            with suppress(RuntimeError):  # no loop runs yet
                self.bind()
        if self._loop is not None and not self._scheduled and not self._loop.is_closed():
            self._scheduled = True
            self._loop.call_soon_threadsafe(self._pump)

    def _pump(self) -> None:
        if self._closed:
            return
        self._scheduled = False
        self._pumps += 1
        try:
            while self._processor.turn():
                pass
            for attempt in self._worker.running():
                request = attempt.request
                if not self._processor.wants(request.run_id, request.step_id, request.attempt):
                    self._worker.cancel(attempt)
            self._worker.take()
            self._connection.deliver()
        except BaseException as e:  # a bug of ours: whoever waits is told, instead of waiting for ever
            self._failed = e
            self._connection.fail(e)
        self._tell()
        self._look()
        self._rest(self._pumps, COURTESY)

    def _tell(self) -> None:
        if self._changed is not None and not self._changed.done():
            self._changed.set_result(None)

    @property
    def _at_rest(self) -> bool:
        return not self._scheduled and not self._worker.busy

    def _look(self) -> None:
        """Watches over steps that have a deadline, while there are some."""
        pause = None if self._looking else self._worker.look()
        if pause is not None and self._loop is not None:
            self._looking = True
            self._loop.call_later(pause, self._look_again)

    def _look_again(self) -> None:
        self._looking = False
        if not self._closed:
            self._look()

    def _rest(self, pump: int, courtesy: int) -> None:
        """Where nothing proceeds: lets the test's own tasks have a few turns, then lets time pass for who waits."""
        waiting = self._connection.waiting()
        if pump != self._pumps or not self._at_rest or not self.skip_time or not waiting:
            return
        if courtesy:
            assert self._loop is not None
            self._loop.call_soon(self._rest, pump, courtesy - 1)
        elif (due := self._processor.next_due()) is not None:
            self._set_time(due)
        else:
            for run_id, futures in waiting.items():
                for future in futures:
                    with suppress(InvalidStateError):  # who waited has just gone
                        future.set_exception(self._stuck(run_id))
            self._tell()

    def _stuck(self, run_id: str | None) -> RunStuckError:
        if run_id is None:
            return RunStuckError("a webhook's response is waited for, and no step will ever give it")
        obstacles = " and ".join(self._processor.obstacles(run_id)) or "something that is not durable"
        return RunStuckError(
            f"run {run_id} will never end: it waits for {obstacles}, nothing is under way, and no timer is left", run_id
        )

    def _accepted(self, run_id: str, order: ChunkOrder, position: int) -> tuple[list[Payload], int]:
        """The payloads of a stream behind a position, and the next position."""
        records = self._broker.records(self._catalogue.streams)
        found = [self._codec.decode_as(StreamChunk, message.value) for message in records[position:]]
        accepted = [order.accept(chunk) for chunk in found if chunk.run_id == run_id]
        return [payload for payload in accepted if payload is not None], len(records)

    async def _more(self, run_id: str) -> None:
        """Returns when there may be another chunk. Lets time pass for it, as `_rest` does for who waits for a result."""
        pump, courtesy = self._pumps, COURTESY
        while courtesy and self._at_rest:
            await asyncio.sleep(0)
            courtesy -= 1
            if self._pumps != pump:
                return
        if self._at_rest and self.skip_time:
            due = self._processor.next_due()
            if due is None:
                raise self._stuck(run_id)
            self._set_time(due)
        await self._change()


def _memory() -> str | None:
    """A folder that is memory, where there is one: a database on a disk takes ten times as long to make."""
    shared = Path("/dev/shm")  # noqa: S108 - a folder of our own is made there
    return str(shared) if shared.is_dir() else None
