"""The worker: what it is made of, and its life from start to drain."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import os
import secrets
import socket
import threading
from typing import TYPE_CHECKING

from durably_schemas import Codec

from durably.builds import serves
from durably.observability.metrics import of_broker
from durably.observability.tracing import StepSpans
from durably.worker.capacity import Capacity
from durably.worker.claims import Claims
from durably.worker.clock import Clock, SystemClock
from durably.worker.intake import Intake
from durably.worker.leases import Leases
from durably.worker.meter import Meter
from durably.worker.outbox import Outbox
from durably.worker.replies import Replies
from durably.worker.services import WorkerServices
from durably.worker.steps import Steps
from durably.worker.threads import Threads
from durably.worker.writers import StreamTopic

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from durably_schemas import Catalogue

    from durably.authoring import Registry
    from durably.broker.port import Broker
    from durably.observability.metrics import Sample

logger = logging.getLogger("durably.worker")

SETTLED = 5.0  # seconds after which the steps should be registered, also where code is typed into a running process
LEAVE = 3.0  # seconds that a thread has to end which a step may be blocking


class Worker:
    """Runs the steps of a registry that are asked for on some queues.

    Threads: one that polls for each queue; one for the event loop that async steps share; as many as plain functions
    need at once; one that watches over leases and deadlines; and, while claims or leases are open, one that reads what
    processors answer to them.

    Args:
        broker: where the topics are. It stays open.
        catalogue: the names of the topics.
        registry: the steps that can be run here.
        queues: which queues to take requests from.
        concurrency: how many steps run at once, over all queues.
        group: the consumer group of a queue is ``{group}.{queue}``; ``{namespace}.worker`` when not given.
        worker_id: who this is in the log; made of host and process when not given.
        lease_after: seconds after which a running step becomes a lease.
        heartbeat_every: seconds between the heartbeats of a lease.
        lease_ttl: seconds after the last heartbeat at which the processor gives a lease to somebody else.
        cancel_grace: seconds that an async step has to clean up when it is cancelled.
        clock: the time.
        counting: whether somebody reads the metrics.

    Attributes:
        worker_id: who this is in the log.
        error: what stopped the worker, if that was not `stop`.
    """

    def __init__(
        self,
        broker: Broker,
        catalogue: Catalogue,
        registry: Registry,
        *,
        queues: Sequence[str] = ("default",),
        concurrency: int = 100,
        group: str | None = None,
        worker_id: str | None = None,
        lease_after: float = 5.0,
        heartbeat_every: float = 5.0,
        lease_ttl: float = 20.0,
        cancel_grace: float = 10.0,
        clock: Clock | None = None,
        counting: bool = False,
    ) -> None:
        if concurrency < 1:
            raise ValueError(f"concurrency={concurrency}: at least 1")
        if lease_ttl <= heartbeat_every:
            raise ValueError(f"lease_ttl={lease_ttl} must be longer than heartbeat_every={heartbeat_every}")
        self.worker_id = worker_id or f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}"
        self.error: BaseException | None = None
        self._clock = clock = clock or SystemClock()
        self._registry = registry
        self._queues = tuple(dict.fromkeys(queues))
        codec = Codec()
        self._polling: list[threading.Thread] = []
        self._others: list[threading.Thread] = []
        self._checking = threading.Timer(SETTLED, self._check_steps)
        self._checking.daemon = True
        self._loop = asyncio.new_event_loop()
        self._threads = Threads(f"step-{self.worker_id}")
        self._producer = producer = broker.producer()
        largest = broker.max_record_bytes
        streams = StreamTopic(
            catalogue.streams,
            partitions=lambda: broker.partitions(catalogue.streams),
            producer=producer,
            codec=codec,
            max_bytes=largest,
            clock=clock,
        )
        outbox = Outbox(producer, codec, catalogue, worker_id=self.worker_id, max_bytes=largest, clock=clock)
        self._broker, self._outbox = broker, outbox
        self._capacity = capacity = Capacity(concurrency)
        self._meter = Meter() if counting else None
        self._services = WorkerServices(
            broker,
            catalogue,
            producer=producer,
            acknowledgements=streams.acknowledgements,
            codec=codec,
            loop=self._loop,
            clock=clock,
        )
        self._steps = steps = Steps(
            registry,
            outbox=outbox,
            streams=streams,
            services=self._services,
            capacity=capacity,
            loop=self._loop,
            threads=self._threads,
            context=contextvars.copy_context(),
            cancel_grace=cancel_grace,
            clock=clock,
            spans=StepSpans(self.worker_id),
            meter=self._meter,
        )
        self._replies = replies = Replies(
            broker, catalogue.replies, codec=codec, start_thread=self._start_thread, clock=clock
        )
        claims = Claims(replies, outbox, steps.answered, clock=clock)
        self._leases = leases = Leases(
            steps.running,
            outbox,
            replies,
            give_up=steps.give_up,
            cancel=steps.cancel,
            after=lease_after,
            every=heartbeat_every,
            ttl=lease_ttl,
            clock=clock,
        )
        replies.serve(claims)
        replies.serve(leases)
        steps.claims, steps.leases = claims, leases
        self._intakes = [
            Intake(
                broker,
                catalogue.requests(queue),
                f"{group or catalogue.namespace + '.worker'}.{queue}",
                codec=codec,
                producer=producer,
                outbox=outbox,
                capacity=capacity,
                steps=steps,
                clock=clock,
            )
            for queue in self._queues
        ]

    def start(self) -> None:
        """Starts the threads, and returns. Warns a little later when the registry has no step for the queues."""
        self._checking.start()
        self._start_thread(self._run_loop, "loop")
        self._start_thread(self._leases.run, "leases")
        for intake in self._intakes:
            thread = self._thread(intake.run, "intake")
            self._polling.append(thread)
            thread.start()

    def stop(self, drain_timeout: float = 30.0) -> None:
        """Takes nothing more, lets what runs finish within ``drain_timeout`` seconds, and leaves. Does not wait.

        May be called from a signal handler.
        """
        until = self._clock.monotonic() + drain_timeout
        for intake in self._intakes:
            intake.drain(until)

    def join(self) -> None:
        """Waits until the worker has stopped, and lets go of what it holds. See `error` for why it did."""
        for thread in self._polling:
            thread.join()
        self._checking.cancel()
        self._replies.close()
        self._leases.close()
        if not self._others:
            self._loop.close()  # never started
        elif not self._loop.is_closed():
            self._services.close()
            self._loop.call_soon_threadsafe(self._loop.stop)
        for thread in self._others:
            thread.join(LEAVE)
        self._threads.close()
        self._producer.close()

    @property
    def dead(self) -> str | None:
        """Why it should be started anew; None: it lives. May be asked from any thread, as may the following."""
        if self.error is not None:
            return f"{type(self.error).__name__}: {self.error}"
        return next((why for intake in self._intakes if (why := intake.dead)), None)

    @property
    def unready(self) -> str | None:
        """Why it does not serve all of its queues yet; None: it does."""
        return next((why for intake in self._intakes if (why := intake.unready)), None)

    def samples(self) -> Iterable[Sample]:
        """Its metrics; none where it does not count."""
        if self._meter is None:
            return
        yield from self._meter.samples()
        yield "durably_worker_slots", (), self._capacity.slots
        yield "durably_worker_slots_in_use", (), self._capacity.slots - self._capacity.free
        yield "durably_worker_leases", (), sum(a.beat_at is not None for a in self._steps.running())
        yield "durably_dead_letters_total", ("worker",), self._outbox.dead_letters
        yield from of_broker(self._broker, {tp: at for intake in self._intakes for tp, at in intake.positions.items()})

    def _check_steps(self) -> None:
        steps = self._registry.steps.values()
        served = ", ".join(self._queues)
        if not steps:
            logger.warning(
                "worker %s serves %s, but no step is registered: name the modules that define them; until then every "
                "request fails",
                self.worker_id,
                served,
            )
        elif not any(serves(queue, step.queue) for step in steps for queue in self._queues):
            others = ", ".join(sorted({step.queue for step in steps}))
            logger.warning(
                "worker %s serves %s, but its steps are for %s: add --queue, or correct queue= of the steps; it runs "
                "only calls that name its queue by options(queue=…)",
                self.worker_id,
                served,
                others,
            )

    def _run_loop(self) -> None:
        loop = self._loop
        asyncio.set_event_loop(loop)
        try:
            loop.run_forever()
        finally:
            left = asyncio.all_tasks(loop)
            for task in left:
                task.cancel()
            if left:
                loop.run_until_complete(asyncio.wait(left, timeout=1))
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()

    def _start_thread(self, run: Callable[[], None], name: str) -> None:
        thread = self._thread(run, name)
        thread.start()
        self._others = [*(t for t in self._others if t.is_alive()), thread]

    def _thread(self, run: Callable[[], None], name: str) -> threading.Thread:
        """A thread whose error stops the worker. A daemon: a step that blocks must not keep the process alive."""

        def guarded() -> None:
            try:
                run()
            except BaseException as e:
                logger.critical("worker %s stops: %s: %s", self.worker_id, type(e).__name__, e, exc_info=e)
                self.error = self.error or e
                self.stop(0)

        return threading.Thread(target=guarded, name=f"{name}-{self.worker_id}", daemon=True)
