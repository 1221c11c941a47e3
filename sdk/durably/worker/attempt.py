"""One step-request in a worker, from the moment it is taken until its offset is released.

    taken ──> asking ──> running ──> over
      │          │                     ^
      ├──────────┼─────────────────────┤     not wanted any more (claim refused, or cancelled), or cannot be run
      └──────────┴──────────> dropped        the partition went, or the worker stops: somebody else's now

Beside these, a running attempt becomes a lease when a heartbeat of it is durable; then its offset is released.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio
    from typing import Any

    from durably_schemas.records import StepRequest

    from durably.authoring import StepDefinition
    from durably.broker.port import Message
    from durably.worker.tracker import Tracker
    from durably.worker.writers import StepWriters


class Attempt:
    """The state of a request that was taken. Compared by identity: the same request may be delivered twice."""

    __slots__ = (
        "beat_at", "deadline", "execution", "message", "question", "request", "started", "started_at", "step", "task",
        "tracker", "unwanted", "writers",
    )  # fmt: skip

    def __init__(self, request: StepRequest, message: Message, tracker: Tracker) -> None:
        self.request = request
        self.message = message
        self.tracker = tracker
        self.execution = 1
        self.step: StepDefinition[..., Any] | None = None
        self.writers: StepWriters | None = None
        self.task: asyncio.Task[None] | None = None
        self.started_at = 0  # milliseconds since the epoch
        self.started = 0.0  # monotonic, as are the following
        self.deadline: float | None = None
        self.beat_at: float | None = None  # when the last heartbeat was sent; None: not a lease
        self.question: str | None = None  # the id under which its heartbeats ask whether it is still wanted
        self.unwanted = False  # nobody will hear of its result: cancelled, given up, or left to another worker

    def release(self) -> None:
        """The request need not be delivered again."""
        self.tracker.release(self.message.offset)

    @property
    def about(self) -> dict[str, str | int]:
        """What its lines in the log are about, for their ``extra``."""
        r = self.request
        return {"run_id": r.run_id, "workflow": r.workflow, "step_id": r.step_id, "step": r.step, "attempt": r.attempt}

    def __str__(self) -> str:
        r = self.request
        return f"step {r.step} ({r.step_id}, attempt {r.attempt}) of run {r.run_id}"
