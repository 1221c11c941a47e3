"""The steps that a worker runs: a request's way from a slot to its result."""

from __future__ import annotations

import logging
import threading
from functools import partial
from typing import TYPE_CHECKING

from durably_schemas.records import StepFailed

from durably import failures
from durably.errors import PayloadCodecError, RegistrationError
from durably.worker import execution
from durably.worker.leases import GRACE
from durably.worker.writers import StepWriters

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Sequence
    from contextvars import Context

    from durably.authoring import Registry
    from durably.observability.tracing import StepSpans
    from durably.runtime import Services
    from durably.worker.attempt import Attempt
    from durably.worker.capacity import Capacity
    from durably.worker.claims import Claims
    from durably.worker.clock import Clock
    from durably.worker.execution import Outcome
    from durably.worker.leases import Leases
    from durably.worker.meter import Meter
    from durably.worker.outbox import Outbox
    from durably.worker.threads import Threads
    from durably.worker.tracker import Tracker
    from durably.worker.writers import StreamTopic

logger = logging.getLogger("durably.worker")


class Steps:
    """Runs attempts: async ones as tasks of one event loop, plain ones on threads; reports each once.

    Every attempt given to `start` holds a slot of ``capacity``, which is given back when it is over or dropped.
    """

    claims: Claims
    leases: Leases

    def __init__(
        self,
        registry: Registry,
        *,
        outbox: Outbox,
        streams: StreamTopic,
        services: Services,
        capacity: Capacity,
        loop: asyncio.AbstractEventLoop,
        threads: Threads,
        context: Context,
        cancel_grace: float,
        clock: Clock,
        spans: StepSpans,
        meter: Meter | None = None,
    ) -> None:
        self._registry = registry
        self._spans = spans
        self._meter = meter
        self._outbox = outbox
        self._streams = streams
        self._services = services
        self._capacity = capacity
        self._loop = loop
        self._threads = threads
        self._context = context
        self._cancel_grace = cancel_grace
        self._clock = clock
        # Taking an attempt out of here decides who reports it: dict.pop is atomic.
        self._running: dict[Attempt, Attempt] = {}
        self._leaving = threading.Lock()  # an answered claim must not begin while its partition goes
        self._left: set[str] = set()  # the queues' topics of which nothing begins any more

    def running(self, topic: str | None = None) -> list[Attempt]:
        """What runs just now, of one queue's topic or of all. May be asked from any thread."""
        running = list(self._running)
        return running if topic is None else [attempt for attempt in running if attempt.message.topic == topic]

    def start(self, attempts: Sequence[Attempt]) -> None:
        """Runs these, or first asks about them where somebody may have run them before."""
        batch: list[Attempt] = []
        for attempt in attempts:
            if attempt.message.offset < attempt.tracker.claim_below:
                self.claims.about(attempt)
            else:
                self._begin(attempt, batch)
        if batch:
            self._loop.call_soon_threadsafe(self._spawn, batch)

    def answered(self, attempt: Attempt, wanted: bool, number: int) -> None:
        """The processor has said whether an attempt is to be run, and as which execution."""
        batch: list[Attempt] = []
        with self._leaving:
            if not wanted:
                attempt.release()
                self._capacity.give()
            elif attempt.tracker.revoked or attempt.message.topic in self._left:
                self._capacity.give()  # and not released: whoever gets the partition next is to run it
            else:
                attempt.execution = number
                self._begin(attempt, batch)
        if batch:
            self._loop.call_soon_threadsafe(self._spawn, batch)

    def leave(self, trackers: Sequence[Tracker]) -> None:
        """These partitions go to somebody else: what runs becomes a lease, what does not yet is dropped."""
        with self._leaving:
            for tracker in trackers:
                tracker.revoked = True
        self._drop_claims()
        for attempt in self.running():
            if attempt.tracker.revoked:
                self.leases.lease(attempt)

    def stop_asking(self, topic: str) -> None:
        """Drops what waits for the answer to a claim, of one queue's topic."""
        self._drop_claims(topic)

    def abandon(self, topic: str) -> None:
        """Gives up what still runs of one queue's topic, unreported, and begins nothing more of it.

        It is delivered again, at once where it had become a lease.
        """
        with self._leaving:
            self._left.add(topic)
        for attempt in self.running(topic):
            if self._running.pop(attempt, None) is None:
                continue
            if attempt.unwanted:
                attempt.release()
            else:
                logger.warning("%s did not end in time and is left to another worker", attempt, extra=attempt.about)
                if attempt.beat_at is not None:
                    self._outbox.heartbeat(attempt, 0)
            self._let_go(attempt, "the worker stops, and leaves it to another one")
            self._capacity.give()

    def give_up(self, attempt: Attempt) -> None:
        """Reports that an attempt took too long; whatever it does later is dropped.

        One that was cancelled took too long to clean up, and is not reported.
        """
        if attempt.unwanted:
            logger.warning("%s was cancelled, and still does not end: its slot is taken from it", attempt)
        outcome = None if attempt.unwanted else self._failed(attempt, execution.timed_out(attempt))
        if self._report(attempt, outcome):
            self._let_go(attempt, "it took longer than its timeout")

    def cancel(self, attempt: Attempt) -> None:
        """Ends an attempt whose result is no longer wanted: its cleanup may run for a while, and nothing is reported.

        A plain function cannot be interrupted: it holds its slot until it returns, or its timeout has passed.
        """
        if attempt.unwanted or attempt not in self._running:
            return
        attempt.unwanted = True
        logger.info("%s is no longer wanted, and is cancelled", attempt, extra=attempt.about)
        if attempt.step is not None and attempt.step.is_async:
            until = self._clock.monotonic() + self._cancel_grace
            attempt.deadline = until if attempt.deadline is None else min(attempt.deadline, until)
            self.leases.watch(attempt)
        self._loop.call_soon_threadsafe(_interrupt, attempt, execution.no_longer_wanted(attempt))

    def _drop_claims(self, topic: str | None = None) -> None:
        for _ in self.claims.forget(lambda attempt: attempt.tracker.revoked or attempt.message.topic == topic):
            self._capacity.give()

    def _begin(self, attempt: Attempt, batch: list[Attempt]) -> None:
        """Hands a plain function to a thread; adds an async one to the batch for the loop."""
        request = attempt.request
        attempt.started_at = self._clock.now()
        attempt.started = self._clock.monotonic()
        self._running[attempt] = attempt
        step = self._registry.step(request.step)
        if step is None:
            self._unknown(attempt)
            return
        attempt.step = step
        if self._meter is not None:
            self._meter.began(attempt)
        attempt.writers = StepWriters(
            self._streams, request.run_id, f"{request.step_id}/{request.attempt}/{attempt.execution}"
        )
        if step.is_async:
            batch.append(attempt)
        else:
            self._threads.submit(partial(self._run_sync, attempt))

    def _spawn(self, batch: list[Attempt]) -> None:
        for attempt in batch:
            attempt.task = self._loop.create_task(self._run(attempt), context=self._context.copy())

    async def _run(self, attempt: Attempt) -> None:
        self._set_deadline(attempt, GRACE)
        try:
            with self._spans.of(attempt.request, attempt.message.headers):
                outcome: Outcome | None = await execution.run(attempt, self._services)
        except BaseException as e:  # whatever a step raises, SystemExit too, is its result and not the worker's end
            outcome = self._raised(attempt, e)
            try:
                if outcome is not None:
                    await self._writers(attempt).settle()
            except BaseException:  # also a cancellation of its own that the step has left to the next await
                logger.debug("the streams of %s failed too", attempt, exc_info=True)
        self._report(attempt, outcome)

    def _run_sync(self, attempt: Attempt) -> None:
        self._set_deadline(attempt, 0)
        try:
            outcome: Outcome | None = self._context.copy().run(self._execute, attempt)
        except BaseException as e:  # as above
            outcome = self._raised(attempt, e)
            try:
                if outcome is not None:
                    self._writers(attempt).settle_sync()
            except Exception:
                logger.debug("the streams of %s failed too", attempt, exc_info=True)
        self._report(attempt, outcome)

    def _execute(self, attempt: Attempt) -> Outcome:
        with self._spans.of(attempt.request, attempt.message.headers):
            return execution.run_sync(attempt, self._services, self._loop)

    def _raised(self, attempt: Attempt, exc: BaseException) -> StepFailed | None:
        """What is reported of what an attempt raised; None where nobody wants to hear of it. Never raises."""
        try:
            if isinstance(exc, execution.Unreadable):
                return self._unreadable(attempt, exc)
            if attempt.unwanted or attempt not in self._running:  # its CancelledError, or what it made of it
                return None
            return self._failed(attempt, exc)
        except Exception as e:  # the exception's own code has raised while it was looked at
            logger.exception("how %s failed cannot be told", attempt)
            return execution.untold(f"how {attempt} failed cannot be told: {type(e).__name__}")

    def _set_deadline(self, attempt: Attempt, grace: float) -> None:
        if attempt.request.timeout is not None:
            attempt.deadline = self._clock.monotonic() + attempt.request.timeout / 1000 + grace
            self.leases.watch(attempt)

    def _writers(self, attempt: Attempt) -> StepWriters:
        assert attempt.writers is not None
        return attempt.writers

    def _report(self, attempt: Attempt, outcome: Outcome | None) -> bool:
        """Sends the result, where it is wanted, and frees the slot; False where somebody else has settled the attempt."""
        if self._running.pop(attempt, None) is None:
            return False
        unwanted = attempt.unwanted or outcome is None
        if self._meter is not None and attempt.step is not None:
            self._meter.ended(attempt, None if unwanted else outcome, self._clock.monotonic())
        try:
            if attempt.unwanted or outcome is None:
                attempt.release()
            else:
                self._outbox.result(attempt, outcome)
        finally:
            self._capacity.give()
        return True

    def _let_go(self, attempt: Attempt, why: str) -> None:
        """Ends what can be ended of an attempt whose slot is taken from it."""
        attempt.unwanted = True
        if attempt.writers is not None:
            attempt.writers.shut()
        self._loop.call_soon_threadsafe(_interrupt, attempt, f"{attempt} is given up: {why}")

    def _failed(self, attempt: Attempt, exc: BaseException) -> StepFailed:
        outcome = execution.failed(exc, self._clock)
        error = outcome.error
        logger.warning("%s failed: %s: %s", attempt, error.type, error.message, extra=attempt.about)
        return outcome

    def _unreadable(self, attempt: Attempt, exc: execution.Unreadable) -> StepFailed:
        error = failures.to_error(exc.__cause__ or exc)
        self._outbox.dead_letter(attempt.message, error.message, attempt)
        # A codec that is missing here may be there in another worker; nothing else gets better by trying again.
        return StepFailed(error=error, fatal=not isinstance(exc.__cause__, PayloadCodecError))

    def _unknown(self, attempt: Attempt) -> None:
        error = RegistrationError(
            f"no step named {attempt.request.step!r} is registered in this worker: deploy the code that has it to every "
            f"worker of its queue"
        )
        self._outbox.dead_letter(attempt.message, str(error), attempt)
        self._report(attempt, StepFailed(error=failures.to_error(error), fatal=True))


def _interrupt(attempt: Attempt, why: str) -> None:
    """Cancels what runs of an attempt on the loop. Called there: its task may have been made in the meantime."""
    if attempt.task is not None:
        attempt.task.cancel(why)
