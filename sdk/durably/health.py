"""The round trip of ``durably health``: through a processor to a worker of a queue and back, without a run.

    asker ──StartRun of `WORKFLOW`──▶ processor ──StepRequest──▶ worker ──StepResult──▶ processor ──Reply──▶ asker

Nothing of it is recorded: where the answer goes travels as the step's ID, and what the topics have of it expires.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from durably.authoring import DEFAULT_BACKOFF, StepDefinition

WORKFLOW = STEP = "durably.health"
QUEUE = "queue"
"""The attribute of the start that names the queue."""
_SEPARATOR = "/"


async def _answer() -> None:
    """The answer is that it was run."""


answer: StepDefinition[..., Any] = StepDefinition(
    name=STEP, fn=_answer, queue="default", max_retries=0, timeout_ms=None, backoff=DEFAULT_BACKOFF, is_async=True
)


class Asker(NamedTuple):
    """Whom a round trip is for: where it began, by the log's clock, and where the answer goes."""

    at: int
    partition: int
    request_id: str

    @property
    def step_id(self) -> str:
        """What the worker is given, and gives back."""
        return _SEPARATOR.join((STEP, str(self.at), str(self.partition), self.request_id))

    @classmethod
    def of(cls, step_id: str) -> Asker | None:
        """What a step's ID says; None where it is of no round trip."""
        parts = step_id.split(_SEPARATOR, 3)
        if len(parts) != 4 or parts[0] != STEP or not (parts[1] + parts[2]).isdecimal():
            return None
        return cls(int(parts[1]), int(parts[2]), parts[3])
