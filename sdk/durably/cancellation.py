"""Whether the step that is running is still wanted."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Protocol

from durably.errors import DurablyError
from durably.runtime import workflow_context


class Cancellable(Protocol):
    """An execution of a step, as far as this module knows it."""

    unwanted: bool


running_step: ContextVar[Cancellable | None] = ContextVar("durably_running_step", default=None)
"""Set by the worker, beside `durably.runtime.step_context`: the one thing about a step that changes while it runs."""


def step_cancelled() -> bool:
    """Whether the running step should stop, because nobody wants its result any more.

    For plain functions, which nothing can interrupt: ask between two pieces of work, and return. (An async step gets an
    `asyncio.CancelledError` at its ``await`` instead.) True when the workflow cancelled the step, its run ended, the
    attempt took longer than its timeout, or the worker is stopping and waits no longer. Outside of a worker, where a
    step is a plain function, always False.

    Raises:
        DurablyError: called in a workflow.
    """
    if workflow_context() is not None:
        raise DurablyError("step_cancelled() works in a step; a workflow is cancelled by an asyncio.CancelledError")
    step = running_step.get()
    return step is not None and step.unwanted
