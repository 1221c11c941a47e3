"""The round trip of ``durably health``: through a processor to a worker of a queue and back, without a run.

    asker ──StartRun of `WORKFLOW`──▶ processor ──StepRequest──▶ worker ──StepResult──▶ processor ──Reply──▶ asker

Nothing of it is recorded: where the answer goes travels as the step's ID, and what the topics have of it expires.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from durably.authoring import DEFAULT_BACKOFF, StepDefinition

WORKFLOW = STEP = "durably.health"
QUEUE = "queue"
"""The attribute of the start that names the queue."""
_SEPARATOR = "/"
_ASKER = re.compile(rf"{re.escape(STEP)}/([0-9]{{1,19}})/([0-9]{{1,10}})/(.+)", re.DOTALL)


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
        found = _ASKER.fullmatch(step_id)
        return None if found is None else cls(int(found[1]), int(found[2]), found[3])
