"""Asking the processor whether a request that was found in a queue is still to be run."""

from __future__ import annotations

import threading
import uuid
from typing import TYPE_CHECKING

from durably_schemas.records import Reply, ReplyTo

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from durably.worker.attempt import Attempt
    from durably.worker.clock import Clock
    from durably.worker.outbox import Outbox
    from durably.worker.replies import Replies

FIRST, LAST = 1.0, 10.0  # seconds until a claim is sent again, doubling


class _Claim:
    __slots__ = ("attempt", "delay", "due")

    def __init__(self, attempt: Attempt, due: float) -> None:
        self.attempt = attempt
        self.delay = FIRST
        self.due = due

    def is_due(self, now: float) -> bool:
        """Whether it is to be sent now; if so, it is next due after its delay. To be called with the lock held."""
        if self.due > now:
            return False
        self.due = now + self.delay
        self.delay = min(2 * self.delay, LAST)
        return True


class Claims:
    """Sends claims until they are answered.

    Args:
        replies: reads the answers.
        outbox: sends the claims.
        answered: is called with an attempt, whether it is to be run, and as which execution.
        clock: the time.
    """

    def __init__(
        self,
        replies: Replies,
        outbox: Outbox,
        answered: Callable[[Attempt, bool, int], None],
        *,
        clock: Clock,
    ) -> None:
        self._replies = replies
        self._outbox = outbox
        self._answered = answered
        self._clock = clock
        self._lock = threading.Lock()
        self._pending: dict[str, _Claim] = {}

    def about(self, attempt: Attempt) -> None:
        """Asks about an attempt."""
        request_id = uuid.uuid4().hex
        claim = _Claim(attempt, self._clock.monotonic())
        with self._lock:
            self._pending[request_id] = claim
        partition = self._replies.open()
        if partition is not None:
            self._send([request_id], partition)

    def forget(self, unwanted: Callable[[Attempt], bool]) -> list[Attempt]:
        """Drops claims, and returns the attempts that they were about."""
        with self._lock:
            found = [request_id for request_id, claim in self._pending.items() if unwanted(claim.attempt)]
            return [self._pending.pop(request_id).attempt for request_id in found]

    def waits(self) -> bool:
        """Whether a claim is unanswered."""
        return bool(self._pending)

    def ask(self, partition: int) -> None:
        """Sends what is due: new claims, and those that were not answered in time."""
        self._send(self._pending.copy(), partition)

    def take(self, reply: Reply) -> None:
        """An answer, perhaps to a claim."""
        with self._lock:
            claim = self._pending.get(reply.request_id)
            if claim is None or (reply.claim is None and reply.status == "OK"):
                return
            del self._pending[reply.request_id]
        # A run that the processor does not know, or a step that it refuses to speak of, needs no result.
        self._answered(claim.attempt, reply.claim == "OPEN", reply.execution)

    def _send(self, request_ids: Iterable[str], partition: int) -> None:
        now = self._clock.monotonic()
        with self._lock:  # the thread that asks and the one that reads answers must not both send the same
            claims = [(r, self._pending[r]) for r in request_ids if r in self._pending]
            due = [(request_id, claim.attempt) for request_id, claim in claims if claim.is_due(now)]
        for request_id, attempt in due:
            self._outbox.claim(attempt, ReplyTo(partition=partition, request_id=request_id))
