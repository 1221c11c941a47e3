"""Running a step's function, and what comes of it."""

from __future__ import annotations

import asyncio
import inspect
from typing import TYPE_CHECKING, Any

from durably_schemas.records import StepFailed, StepSucceeded

from durably import failures, payloads
from durably.durations import milliseconds
from durably.errors import FatalError, RetryableError, SerializationError, StepTimeoutError
from durably.runtime import StepContext, step_context

if TYPE_CHECKING:
    from durably.worker.attempt import Attempt
    from durably.worker.clock import Clock

Outcome = StepSucceeded | StepFailed


class Unreadable(Exception):
    """The input cannot be read, or does not fit the function."""


def _enter(attempt: Attempt) -> tuple[list[Any], dict[str, Any]]:
    """Makes the current context that of the step, and reads its arguments."""
    request = attempt.request
    assert attempt.step is not None
    assert attempt.writers is not None
    step_context.set(
        StepContext(
            run_id=request.run_id,
            workflow_name=request.workflow,
            workflow_started_at=request.workflow_started_at,
            step_id=request.step_id,
            step_name=request.step,
            attempt=request.attempt,
            execution=attempt.execution,
            started_at=attempt.started_at,
            writers=attempt.writers,
        )
    )
    try:
        return payloads.load_arguments(request.input, attempt.step.fn)
    except Exception as e:
        raise Unreadable from e


async def run(attempt: Attempt) -> Outcome:
    """Runs an async step within its timeout. Raises `Unreadable`, and what the step raises."""
    args, kwargs = _enter(attempt)
    step, timeout = attempt.step, attempt.request.timeout
    assert step is not None
    if timeout is None:
        value = await step.fn(*args, **kwargs)
    else:
        try:
            async with asyncio.timeout(timeout / 1000) as scope:
                value = await step.fn(*args, **kwargs)
        except TimeoutError:
            if scope.expired():
                raise timed_out(attempt) from None
            raise
    outcome = _succeeded(attempt, value)
    if attempt.writers is not None and not attempt.writers.settled():
        await attempt.writers.settle()
    return outcome


def run_sync(attempt: Attempt, loop: asyncio.AbstractEventLoop) -> Outcome:
    """Runs a step on this thread. Raises `Unreadable`, and what the step raises."""
    args, kwargs = _enter(attempt)
    assert attempt.step is not None
    value = attempt.step.fn(*args, **kwargs)
    if inspect.iscoroutine(value):  # a plain function around an async one, as decorators make them
        value = asyncio.run_coroutine_threadsafe(value, loop).result()
    outcome = _succeeded(attempt, value)
    if attempt.writers is not None:
        attempt.writers.settle_sync()
    return outcome


def timed_out(attempt: Attempt) -> StepTimeoutError:
    """What an attempt fails with that took too long."""
    return StepTimeoutError(f"step {attempt.request.step} took longer than {(attempt.request.timeout or 0) / 1000:g} s")


def _succeeded(attempt: Attempt, value: Any) -> StepSucceeded:
    return StepSucceeded(result=payloads.dump(value, f"the result of step {attempt.request.step}"))


def failed(exc: BaseException, clock: Clock) -> StepFailed:
    """How an exception is reported: for good, or to be retried, and when."""
    fatal, retry_after = False, None
    for leaf in _leaves(exc):
        # What cannot be serialized will not be the next time either.
        fatal = fatal or isinstance(leaf, FatalError | SerializationError)
        if isinstance(leaf, RetryableError) and leaf.retry_after is not None:
            try:
                retry_after = max(retry_after or 0, milliseconds(leaf.retry_after, now=clock.now()))
            except (TypeError, ValueError) as e:
                leaf.add_note(f"its retry_after was ignored: {e}")
    return StepFailed(error=failures.to_error(exc), retry_after=retry_after, fatal=fatal)


def _leaves(exc: BaseException) -> list[BaseException]:
    if isinstance(exc, BaseExceptionGroup):
        return [leaf for member in exc.exceptions for leaf in _leaves(member)]
    return [exc]
