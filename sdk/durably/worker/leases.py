"""Watching over what runs: steps that take long become leases, and those that take too long are given up."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from durably.worker.attempt import Attempt
    from durably.worker.clock import Clock
    from durably.worker.outbox import Outbox

GRACE = 1.0  # seconds that an async step has to obey its own timeout before it is given up
DRAWN_OUT = 0.01  # seconds between two looks at the last chunks of a step that was given up


class Leases:
    """Looks after running attempts from a thread of its own, which no step can keep busy.

    Args:
        running: what runs now; asked from this thread.
        outbox: sends the heartbeats.
        give_up: is called with an attempt that is past its deadline, when its last stream chunk is acknowledged.
        after: seconds that a step runs before it becomes a lease.
        every: seconds between heartbeats.
        ttl: seconds that a heartbeat holds.
        clock: the time.
    """

    def __init__(
        self,
        running: Callable[[], Iterable[Attempt]],
        outbox: Outbox,
        give_up: Callable[[Attempt], None],
        *,
        after: float,
        every: float,
        ttl: float,
        clock: Clock,
    ) -> None:
        self._running = running
        self._outbox = outbox
        self._give_up = give_up
        self._after = after
        self._every = every
        self._ttl = ttl
        self._clock = clock
        self._pause = min(after, every, 1.0)
        self._next = 0.0
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
        if attempt.beat_at is None:
            self._outbox.heartbeat(attempt, self._ttl)

    def look(self) -> float:
        """Does what is due; returns when to look again, in monotonic seconds."""
        # Set before the look: an attempt that starts meanwhile and is not seen sees this, and wakes us.
        now = self._clock.monotonic()
        self._next = soonest = now + self._pause
        self._outbox.send_again()
        for attempt in self._running():
            beat_at = attempt.beat_at
            due = attempt.started + self._after if beat_at is None else beat_at + self._every
            if due <= now:
                self._outbox.heartbeat(attempt, self._ttl)
            else:
                soonest = min(soonest, due)
            if attempt.deadline is not None:
                soonest = min(soonest, self._check(attempt, attempt.deadline, now))
        self._next = soonest
        return soonest

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
