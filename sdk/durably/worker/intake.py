"""Taking requests from one queue: the polling thread, which owns the consumer and the offsets."""

from __future__ import annotations

import logging
from collections import deque
from typing import TYPE_CHECKING

from durably_schemas import CodecError
from durably_schemas.records import StepFailed, StepRequest

from durably import failures
from durably.broker.port import TP, Committed, End
from durably.errors import BrokerError, SerializationError
from durably.worker.attempt import Attempt
from durably.worker.salvage import salvaged
from durably.worker.tracker import Tracker

if TYPE_CHECKING:
    from collections.abc import Sequence

    from durably_schemas import Codec

    from durably.broker.port import Broker, Consumer, Message, Producer
    from durably.worker.capacity import Capacity
    from durably.worker.clock import Clock
    from durably.worker.outbox import Outbox
    from durably.worker.steps import Steps

logger = logging.getLogger("durably.worker")

POLL = 0.1  # seconds that a poll waits for a request; acknowledgements wait as long
BATCH = 500
COMMIT_EVERY = 0.2
HOLD = 1.0  # seconds without room after which the partitions are paused, so that polling can go on
REVOKE = 5.0  # seconds that a revoke waits for heartbeats and results to be durable
LIVE = 60.0  # seconds without a round after which the thread counts as dead
SPARE = 20.0  # seconds without a first assignment after which there is none to come
EVERYTHING = 1 << 62  # claim below: all of it


class Intake:
    """The polling loop of one queue, and its end of the group's protocol.

    It pauses its partitions only when it has found no free slot for a second: a pause makes the client throw away
    what it has prefetched, so it must not happen at each breath of a busy worker.
    """

    def __init__(
        self,
        broker: Broker,
        topic: str,
        group: str,
        *,
        codec: Codec,
        producer: Producer,
        outbox: Outbox,
        capacity: Capacity,
        steps: Steps,
        clock: Clock,
    ) -> None:
        self._broker = broker
        self._topic = topic
        self._group = group
        self._codec = codec
        self._producer = producer
        self._outbox = outbox
        self._capacity = capacity
        self._steps = steps
        self._clock = clock
        self._trackers: dict[int, Tracker] = {}
        self._waiting: deque[Attempt] = deque()  # taken from the consumer, but without a slot
        self._paused: set[TP] = set()
        self._full_since: float | None = None
        self._committed_at = 0.0
        self._drain_until: float | None = None
        self._since = clock.monotonic()
        self._passed = self._since
        self._assigned = False

    @property
    def dead(self) -> str | None:
        """Why its thread counts as dead; None: it lives. May be asked from any thread, as may the following."""
        stalled = self._clock.monotonic() - self._passed
        return f"nothing has been polled of {self._topic} for {stalled:.0f} s" if stalled > LIVE else None

    @property
    def unready(self) -> str | None:
        """Why it takes no requests yet; None: it does, or is a member that there is no partition for."""
        waited = self._clock.monotonic() - self._since
        return None if self._assigned or waited > SPARE else f"nothing of {self._topic} is assigned to it yet"

    @property
    def positions(self) -> dict[TP, int]:
        """Up to where it has taken requests."""
        return {t.tp: t.position for t in self._trackers.copy().values() if t.position >= 0}

    def drain(self, until: float) -> None:
        """Takes nothing more, and ends `run` when nothing of this queue runs, or at ``until``, in monotonic seconds."""
        self._drain_until = until

    def run(self) -> None:
        """Until drained."""
        consumer = self._broker.consumer(self._group, self._topic, self)
        self._consumer = consumer
        try:
            while self._drain_until is None:
                self.turn(consumer)
            self._waiting.clear()  # not released: whoever gets the partition next gets these again
            self._steps.stop_asking(self._topic)
            while self._steps.running(self._topic) and self._clock.monotonic() < self._drain_until:
                self._hold(consumer, POLL / 10)
                self._waiting.clear()
                self._serve(consumer)
        finally:
            # Also after an error: what is cut off by it must not be taken for the step's own failure.
            self._steps.abandon(self._topic)
            consumer.close()

    def turn(self, consumer: Consumer) -> None:
        """One round: take what there is room for, start it, serve acknowledgements, commit."""
        self._passed = self._clock.monotonic()
        if self._waiting:
            self._wait_for_room(consumer)
        else:
            self._take(consumer, POLL, max(1, min(BATCH, self._capacity.free)))
        self._start()
        self._serve(consumer)

    def on_assigned(self, partitions: Sequence[int]) -> None:
        """New partitions: finds out which of their requests somebody may have run before."""
        self._assigned = True
        tps = [TP(self._topic, p) for p in partitions]
        try:
            ends = self._broker.end_offsets(tps)
        except BrokerError as e:
            logger.warning("the ends of %s are unknown (%s): asking about every request", self._topic, e)
            ends = {}
        for tp in tps:
            self._trackers[tp.partition] = Tracker(tp, ends.get(tp, EVERYTHING))

    def on_revoked(self, partitions: Sequence[int]) -> None:
        """Makes leases of what runs, and commits what is finished."""
        gone = self._leave(partitions)
        # All of them again: nobody has told whether the commits under way went through.
        offsets = {t.tp: Committed(mark, "") for t in gone if (mark := t.mark()) >= 0}
        if offsets:
            try:
                self._consumer.commit(offsets, wait=True)
            except BrokerError as e:  # then these requests come again, and are asked about
                logger.warning("the last commit for %s failed: %s", self._topic, e)

    def on_lost(self, partitions: Sequence[int]) -> None:
        """Makes leases of what runs: nothing else can be done for partitions that are gone."""
        self._leave(partitions)

    def _leave(self, partitions: Sequence[int]) -> list[Tracker]:
        gone = [t for p in partitions if (t := self._trackers.pop(p, None)) is not None]
        self._steps.leave(gone)
        self._waiting = deque(a for a in self._waiting if not a.tracker.revoked)
        self._paused -= {t.tp for t in gone}
        self._producer.flush(REVOKE)
        return gone

    def _take(self, consumer: Consumer, timeout: float, limit: int) -> None:
        for item in consumer.poll(timeout, limit):
            tracker = self._trackers.get(item.partition)
            if tracker is None:
                continue
            if isinstance(item, End):
                tracker.exhausted(item.offset)
                continue
            tracker.take(item.offset)
            attempt = self._read(item, tracker)
            if attempt is not None:
                self._waiting.append(attempt)

    def _read(self, message: Message, tracker: Tracker) -> Attempt | None:
        try:
            return Attempt(self._codec.decode_as(StepRequest, message.value), message, tracker)
        except CodecError as e:
            self._outbox.dead_letter(message, str(e))
            self._refuse(message, tracker, e)
            return None

    def _refuse(self, message: Message, tracker: Tracker, reason: CodecError) -> None:
        """Reports a request that cannot be decoded as failed, where it can be read whose it is."""
        request = salvaged(message)
        if request is None:
            tracker.release(message.offset)
            return
        attempt = Attempt(request, message, tracker)
        attempt.started_at = self._clock.now()
        error = SerializationError(
            f"the request for step {request.step} cannot be decoded by this worker: {reason}; deploy the version of "
            f"durably that wrote it to every worker of {self._topic}"
        )
        # Not for good: in the middle of a deployment the next attempt may find a worker that can.
        self._outbox.result(attempt, StepFailed(error=failures.to_error(error)))

    def _start(self) -> None:
        if not self._waiting:
            return
        batch = []
        while self._waiting and self._capacity.take():
            batch.append(self._waiting.popleft())
        if batch:
            self._steps.start(batch)
        if not self._waiting:
            self._full_since = None
            if self._paused:
                self._consumer.resume(list(self._paused))
                self._paused.clear()

    def _wait_for_room(self, consumer: Consumer) -> None:
        now = self._clock.monotonic()
        if self._full_since is None:
            self._full_since = now
        self._capacity.wait(POLL / 5)
        if now - self._full_since >= HOLD:
            self._hold(consumer, 0)

    def _hold(self, consumer: Consumer, timeout: float) -> None:
        """Polls for the sake of the group alone."""
        new = {t.tp for t in self._trackers.values()} - self._paused
        if new:
            consumer.pause(list(new))
            self._paused |= new
        self._take(consumer, timeout, 1)

    def _serve(self, consumer: Consumer) -> None:
        self._producer.poll(0)
        now = self._clock.monotonic()
        if now - self._committed_at >= COMMIT_EVERY:
            self._committed_at = now
            offsets = {t.tp: due for t in self._trackers.values() if (due := t.due()) is not None}
            if offsets:
                try:
                    consumer.commit(offsets)
                except BrokerError as e:  # then these requests may come again, and are asked about
                    logger.warning("a commit for %s failed: %s", self._topic, e)
