"""Watching over what runs: steps that take long become leases, and those that take too long are given up."""

from __future__ import annotations

import threading
import uuid
from typing import TYPE_CHECKING

from durably_schemas.records import ReplyTo

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from durably_schemas.records import Reply

    from durably.worker.attempt import Attempt
    from durably.worker.clock import Clock
    from durably.worker.outbox import Outbox
    from durably.worker.replies import Replies

GRACE = 1.0  # seconds that an async step has to obey its own timeout before it is given up
DRAWN_OUT = 0.01  # seconds between two looks at the last chunks of a step that was given up


class Leases:
    """Looks after running attempts from a thread of its own, which no step can keep busy.

    Every heartbeat also asks whether the result is still wanted. Nobody waits for that answer: the next one asks again.

    Args:
        running: what runs now; asked from this thread.
        outbox: sends the heartbeats.
        replies: reads the answers to them.
        give_up: is called with an attempt that is past its deadline, when its last stream chunk is acknowledged.
        cancel: is called with an attempt whose result is no longer wanted.
        after: seconds that a step runs before it becomes a lease.
        every: seconds between heartbeats.
        ttl: seconds that a heartbeat holds.
        clock: the time.
    """

    def __init__(
        self,
        running: Callable[[], Sequence[Attempt]],
        outbox: Outbox,
        replies: Replies,
        *,
        give_up: Callable[[Attempt], None],
        cancel: Callable[[Attempt], None],
        after: float,
        every: float,
        ttl: float,
        clock: Clock,
    ) -> None:
        self._running = running
        self._outbox = outbox
        self._replies = replies
        self._give_up = give_up
        self._cancel = cancel
        self._after = after
        self._every = every
        self._ttl = ttl
        self._clock = clock
        self._pause = min(after, every, 1.0)
        self._next = 0.0
        self._leased: dict[str, Attempt] = {}  # by the id of the question that their heartbeats ask
        self._wake = threading.Event()
        self._closed = False

    def run(self) -> None:
        """Until `close`."""
        while not self._closed:
            self._wake.clear()
            self._wake.wait(max(0.0, self.look() - self._clock.monotonic()))

    def close(self) -> None:
        """Ends `run`."""
        self._closed = True
        self._wake.set()

    def watch(self, attempt: Attempt) -> None:
        """Makes sure that an attempt with a deadline is looked at in time."""
        if attempt.deadline is not None and attempt.deadline < self._next:
            self._wake.set()

    def lease(self, attempt: Attempt) -> None:
        """Sends the first heartbeat now."""
        if attempt.beat_at is None and not attempt.unwanted:
            self._beat(attempt)

    def waits(self) -> bool:
        """Whether the answer to a heartbeat may come."""
        return bool(self._leased)

    def ask(self, partition: int) -> None:
        """Nothing: heartbeats go out when `look` finds them due."""

    def take(self, reply: Reply) -> None:
        """An answer, perhaps to a heartbeat. Only a plain no ends a step: it may be the only one that runs."""
        attempt = self._leased.get(reply.request_id)
        if attempt is not None and reply.claim == "DONE":
            self._cancel(attempt)

    def look(self) -> float:
        """Does what is due; returns when to look again, in monotonic seconds."""
        # Set before the look: an attempt that starts meanwhile and is not seen sees this, and wakes us.
        now = self._clock.monotonic()
        self._next = soonest = now + self._pause
        self._outbox.send_again()
        running = self._running()
        for attempt in running:
            if not attempt.unwanted:
                soonest = min(soonest, self._extend(attempt, now))
            if attempt.deadline is not None:
                soonest = min(soonest, self._check(attempt, attempt.deadline, now))
        self._forget(running)
        self._next = soonest
        return soonest

    def _extend(self, attempt: Attempt, now: float) -> float:
        """Sends a heartbeat when it is time; returns when that is."""
        due = attempt.started + self._after if attempt.beat_at is None else attempt.beat_at + self._every
        if due <= now:
            self._beat(attempt)
            return now + self._every
        if due <= now + self._pause:  # the last look before it: by then, let it be known where the answer can go
            self._replies.open()
        return due

    def _beat(self, attempt: Attempt) -> None:
        if attempt.question is None:
            attempt.question = uuid.uuid4().hex
        self._leased[attempt.question] = attempt
        partition = self._replies.open()
        reply_to = None if partition is None else ReplyTo(partition=partition, request_id=attempt.question)
        self._outbox.heartbeat(attempt, self._ttl, reply_to)

    def _forget(self, running: Iterable[Attempt]) -> None:
        if self._leased:
            alive = set(running)
            for question, attempt in self._leased.copy().items():
                if attempt not in alive:
                    del self._leased[question]

    def _check(self, attempt: Attempt, deadline: float, now: float) -> float:
        if deadline > now:
            return deadline
        writers = attempt.writers
        if writers is not None:
            writers.shut()
            if not writers.settled():
                return now + DRAWN_OUT
        self._give_up(attempt)
        return now + self._pause
