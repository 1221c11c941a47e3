"""A worker without a consumer: it takes requests from memory, and runs them on the test's own event loop."""

from __future__ import annotations

import contextvars
import math
import time
from typing import TYPE_CHECKING, cast

from durably_schemas import Codec
from durably_schemas.records import StepClaim, StepRequest

from durably.broker.port import TP, Message
from durably.observability.tracing import StepSpans
from durably.testing.connection import LocalClient, LocalSyncClient
from durably.testing.faults import PlannedSteps
from durably.worker.attempt import Attempt
from durably.worker.capacity import Capacity
from durably.worker.leases import Leases
from durably.worker.outbox import Outbox
from durably.worker.replies import Replies
from durably.worker.services import WorkerServices
from durably.worker.steps import Steps
from durably.worker.threads import Threads
from durably.worker.tracker import Tracker
from durably.worker.writers import StreamTopic

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterable
    from concurrent.futures import Future

    from durably_schemas import Catalogue
    from durably_schemas.records import Reply

    from durably.authoring import Registry
    from durably.client import AsyncClient, Client
    from durably.testing.broker import MemoryBroker
    from durably.testing.connection import LocalConnection

WORKER_ID = "test-worker"
SLOTS = 1 << 30  # a test's steps all run at once
LOOK = 0.05  # seconds between two looks at the deadlines of steps that have one


class LocalWorker:
    """Runs steps as a `durably.worker.Worker` does, but for leases and rebalances: there is nobody else.

    Args:
        broker: in memory.
        catalogue: of the topics.
        registry: the steps as they are.
        connection: for the clients of steps, and for claims.
        now: the clock, in milliseconds.
        freed: is called when an attempt is over, on any thread.

    Attributes:
        planned: what is done to the steps.
    """

    def __init__(
        self,
        broker: MemoryBroker,
        catalogue: Catalogue,
        registry: Registry,
        connection: LocalConnection,
        now: Callable[[], int],
        freed: Callable[[], None],
    ) -> None:
        self.planned = PlannedSteps(registry, self._died)
        self._broker = broker
        self._catalogue = catalogue
        self._connection = connection
        self._codec = Codec()
        self._clock = _Clock(now)
        self._slots = _Slots(freed)
        self._reader = broker.reader({})
        self._steps: Steps | None = None

    def serve(self, queues: Iterable[str]) -> None:
        """Takes requests from these, too."""
        for queue in queues:
            tp = TP(self._catalogue.requests(queue), 0)
            if tp not in self._reader.positions:
                self._reader.seek(tp, 0)

    def run_on(self, loop: asyncio.AbstractEventLoop) -> None:
        """Steps run on this loop from now on."""
        broker, catalogue, codec, clock = self._broker, self._catalogue, self._codec, self._clock
        producer = broker.producer()
        self._loop = loop
        self._threads = Threads("step-test")
        streams = StreamTopic(
            catalogue.streams,
            partitions=lambda: broker.partitions(catalogue.streams),
            producer=producer,
            codec=codec,
            max_bytes=broker.max_record_bytes,
            clock=clock,
        )
        outbox = Outbox(producer, codec, catalogue, worker_id=WORKER_ID, max_bytes=broker.max_record_bytes, clock=clock)
        services = _Services(
            broker,
            catalogue,
            producer=producer,
            acknowledgements=streams.acknowledgements,
            codec=codec,
            loop=loop,
            clock=clock,
        )
        services.connection = self._connection
        steps = self._steps = Steps(
            cast("Registry", self.planned),
            outbox=outbox,
            streams=streams,
            services=services,
            spans=StepSpans(WORKER_ID),
            capacity=self._slots,
            loop=loop,
            threads=self._threads,
            context=contextvars.copy_context(),
            cancel_grace=math.inf,
            clock=clock,
        )
        # Only its deadlines are used, and nothing becomes a lease: so it never asks anybody anything.
        replies = Replies(broker, catalogue.replies, codec=codec, start_thread=lambda *_: None, clock=clock)
        steps.leases = self._leases = Leases(
            steps.running,
            outbox,
            replies,
            give_up=steps.give_up,
            cancel=steps.cancel,
            after=math.inf,
            every=math.inf,
            ttl=math.inf,
            clock=clock,
        )

    def take(self) -> bool:
        """Begins what is asked for; False where nothing was."""
        assert self._steps is not None
        messages = [item for item in self._reader.poll(0) if isinstance(item, Message)]
        attempts = [
            Attempt(self._codec.decode_as(StepRequest, m.value), m, Tracker(TP(m.topic, m.partition), 0))
            for m in messages
        ]
        for _ in attempts:
            self._slots.take()
        if attempts:
            self._steps.start(attempts)
        return bool(attempts)

    @property
    def busy(self) -> bool:
        """Whether a result is still to come: it is, until it has been sent."""
        return self._slots.taken > sum(attempt.unwanted for attempt in self._steps.running()) if self._steps else False

    def running(self) -> list[Attempt]:
        """What runs now, and is still wanted."""
        return [] if self._steps is None else [a for a in self._steps.running() if not a.unwanted]

    def cancel(self, attempt: Attempt) -> None:
        """Ends an attempt whose result is no longer wanted."""
        assert self._steps is not None
        self._steps.cancel(attempt)

    def look(self) -> float | None:
        """Gives up what has run for too long; returns the seconds until the next look, None where nothing has a timeout."""
        if not any(attempt.request.timeout is not None for attempt in self.running()):
            return None
        self._leases.look()
        return LOOK

    def close(self) -> None:
        """Lets go of what runs."""
        if self._steps is None:
            return
        if not self._loop.is_closed():
            for attempt in self._steps.running():
                self._steps.abandon(attempt.message.topic)
        self._threads.close()

    def _died(self, attempt: Attempt) -> None:
        """The worker of an attempt is dead: nobody hears of its result, and another one finds its request."""
        self._slots.take()  # for the other one: at no moment does it look as if nothing were to come
        attempt.unwanted = True
        self._loop.call_soon_threadsafe(self._claim, attempt)

    def _claim(self, dead: Attempt) -> None:
        """Asks whether the request is still to be run, as a worker does that finds one which may have been run before."""
        request = dead.request
        attempt = Attempt(request, dead.message, dead.tracker)
        to, answer = self._connection.expect()
        claim = StepClaim(
            run_id=request.run_id,
            step_id=request.step_id,
            attempt=request.attempt,
            worker=f"{WORKER_ID}-{dead.execution + 1}",
            reply_to=to,
        )

        def answered(found: Future[Reply]) -> None:
            reply = found.result()
            assert self._steps is not None
            self._steps.answered(attempt, reply.claim == "OPEN", reply.execution)

        answer.add_done_callback(answered)
        self._broker.append(self._catalogue.results, self._codec.encode(claim), request.run_id.encode())


class _Slots(Capacity):
    """Room for all steps of a test, which tells when one is over."""

    def __init__(self, freed: Callable[[], None]) -> None:
        super().__init__(SLOTS)
        self._freed = freed

    @property
    def taken(self) -> int:
        """How many steps are not over."""
        return SLOTS - self.free

    def give(self) -> None:
        """Frees a slot."""
        super().give()
        self._freed()


class _Clock:
    """The test's time for what is recorded, the machine's for what steps may take."""

    def __init__(self, now: Callable[[], int]) -> None:
        self._now = now

    def now(self) -> int:
        return self._now()

    def monotonic(self) -> float:
        return time.monotonic()


class _Services(WorkerServices):
    """Steps get clients of the test's own."""

    connection: LocalConnection

    def client(self) -> AsyncClient:
        return LocalClient(self.connection)

    def sync_client(self) -> Client:
        return LocalSyncClient(self.connection)

    def close(self) -> None:
        """Nothing is held."""
