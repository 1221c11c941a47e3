"""Asking the processor whether a request that was found in a queue is still to be run."""

from __future__ import annotations

import random
import threading
import uuid
from typing import TYPE_CHECKING

from durably_schemas import CodecError
from durably_schemas.records import Reply, ReplyTo

from durably.broker.port import TP, Message

if TYPE_CHECKING:
    from collections.abc import Callable

    from durably_schemas import Codec

    from durably.broker.port import Broker
    from durably.worker.attempt import Attempt
    from durably.worker.clock import Clock
    from durably.worker.outbox import Outbox

FIRST, LAST = 1.0, 10.0  # seconds until a claim is sent again, doubling
IDLE = 10.0  # seconds without a claim after which nobody tails ``replies`` any more


class _Claim:
    __slots__ = ("attempt", "delay", "due")

    def __init__(self, attempt: Attempt, due: float) -> None:
        self.attempt = attempt
        self.delay = FIRST
        self.due = due


class Claims:
    """Sends claims until they are answered. The answers come on one partition of ``replies``.

    The partition is tailed only while there are claims, from an end that is known before the first one is sent; so no
    answer can be missed, and a worker without claims pays nothing.

    Args:
        broker: where ``replies`` is read.
        replies: the topic.
        codec: decodes the answers.
        outbox: sends the claims.
        answered: is called with an attempt, whether it is to be run, and as which execution.
        start_thread: runs a function on a thread whose errors stop the worker.
        clock: the time.
    """

    def __init__(
        self,
        broker: Broker,
        *,
        replies: str,
        codec: Codec,
        outbox: Outbox,
        answered: Callable[[Attempt, bool, int], None],
        start_thread: Callable[[Callable[[], None], str], None],
        clock: Clock,
    ) -> None:
        self._broker = broker
        self._replies = replies
        self._codec = codec
        self._outbox = outbox
        self._answered = answered
        self._start_thread = start_thread
        self._clock = clock
        self._lock = threading.Lock()
        self._pending: dict[str, _Claim] = {}
        self._partition: int | None = None  # of ``replies``, once we know its end
        self._tailing = False
        self._closed = False

    def ask(self, attempt: Attempt) -> None:
        """Asks about an attempt."""
        request_id = uuid.uuid4().hex
        claim = _Claim(attempt, self._clock.monotonic())
        with self._lock:
            self._pending[request_id] = claim
            partition = self._partition
            if not self._tailing:
                self._tailing = True
                self._start_thread(self._tail, "claims")
        if partition is not None:
            self._send(request_id, claim, partition)

    def forget(self, unwanted: Callable[[Attempt], bool]) -> list[Attempt]:
        """Drops claims, and returns the attempts that they were about."""
        with self._lock:
            found = [request_id for request_id, claim in self._pending.items() if unwanted(claim.attempt)]
            return [self._pending.pop(request_id).attempt for request_id in found]

    def close(self) -> None:
        """Ends the thread."""
        self._closed = True

    def resend(self, partition: int) -> None:
        """Sends what is due: new claims, and those that were not answered in time."""
        now = self._clock.monotonic()
        with self._lock:
            due = [(request_id, claim) for request_id, claim in self._pending.items() if claim.due <= now]
        for request_id, claim in due:
            self._send(request_id, claim, partition)

    def _send(self, request_id: str, claim: _Claim, partition: int) -> None:
        claim.due = self._clock.monotonic() + claim.delay
        claim.delay = min(2 * claim.delay, LAST)
        self._outbox.claim(claim.attempt, ReplyTo(partition=partition, request_id=request_id))

    def _tail(self) -> None:
        partition = random.randrange(max(1, self._broker.partitions(self._replies)))  # noqa: S311 - spreads load only
        tp = TP(self._replies, partition)
        reader = self._broker.reader(self._broker.end_offsets([tp]))
        try:
            with self._lock:
                self._partition = partition
            busy = self._clock.monotonic()
            while not self._closed:
                self.resend(partition)
                for item in reader.poll(0.1):
                    if isinstance(item, Message):
                        self._read(item)
                with self._lock:
                    if self._pending:
                        busy = self._clock.monotonic()
                    elif self._clock.monotonic() - busy > IDLE:
                        self._partition, self._tailing = None, False
                        return
        finally:
            reader.close()

    def _read(self, message: Message) -> None:
        try:
            reply = self._codec.decode_as(Reply, message.value)
        except CodecError:
            return  # the answer to somebody else; ours would be asked for again
        with self._lock:
            claim = self._pending.get(reply.request_id)
            if claim is None or (reply.claim is None and reply.status == "OK"):
                return
            del self._pending[reply.request_id]
        # A run that the processor does not know, or a step that it refuses to speak of, needs no result.
        self._answered(claim.attempt, reply.claim == "OPEN", reply.execution)
