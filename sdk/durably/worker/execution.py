"""Running a step's function, and what comes of it."""

from __future__ import annotations

import asyncio
import inspect
from typing import TYPE_CHECKING, Any

import msgspec
from durably_schemas.records import StepFailed, StepSucceeded

from durably import failures, payloads
from durably.cancellation import running_step
from durably.durations import milliseconds
from durably.errors import FatalError, RetryableError, SerializationError, StepTimeoutError
from durably.runtime import StepContext, step_context
from durably.worker.writers import drain, drain_sync

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from durably.runtime import Services
    from durably.worker.attempt import Attempt
    from durably.worker.clock import Clock

Outcome = StepSucceeded | StepFailed


class Unreadable(Exception):
    """The input cannot be read, or does not fit the function."""


def _enter(attempt: Attempt, services: Services) -> tuple[list[Any], dict[str, Any]]:
    """Makes the current context that of the step, and reads its arguments."""
    request = attempt.request
    assert attempt.step is not None
    assert attempt.writers is not None
    running_step.set(attempt)
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
            services=services,
            workflow_url=request.workflow_url,
        )
    )
    try:
        return payloads.load_arguments(request.input, attempt.step.fn)
    except Exception as e:
        raise Unreadable from e


async def run(attempt: Attempt, services: Services) -> Outcome:
    """Runs an async step within its timeout. Raises `Unreadable`, and what the step raises."""
    args, kwargs = _enter(attempt, services)
    assert attempt.writers is not None
    try:
        if attempt.request.timeout is None:
            value = await _value(attempt, args, kwargs)
        else:
            value = await _timely(attempt, attempt.request.timeout / 1000, args, kwargs)
    finally:
        attempt.writers.shut()  # what the step has left running must not write behind its result
    outcome = _succeeded(attempt, value)
    if not attempt.writers.settled():
        await attempt.writers.settle()
    return outcome


def run_sync(attempt: Attempt, services: Services, loop: asyncio.AbstractEventLoop) -> Outcome:
    """Runs a step on this thread. Raises `Unreadable`, and what the step raises."""
    args, kwargs = _enter(attempt, services)
    assert attempt.step is not None
    assert attempt.writers is not None
    try:
        value = attempt.step.fn(*args, **kwargs)
        if inspect.iscoroutine(value):  # a plain function around an async one, as decorators make them
            value = asyncio.run_coroutine_threadsafe(_awaited(attempt, value), loop).result()
        value = drain_sync(attempt.writers, value, loop)
    finally:
        attempt.writers.shut()  # as above
    outcome = _succeeded(attempt, value)
    attempt.writers.settle_sync()
    return outcome


async def _timely(attempt: Attempt, seconds: float, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """As `_value`. Raises `StepTimeoutError` when they are over."""
    try:
        async with asyncio.timeout(seconds) as scope:
            return await _value(attempt, args, kwargs)
    except TimeoutError:
        if scope.expired():
            raise timed_out(attempt) from None
        raise


async def _value(attempt: Attempt, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """What the function of an async step returns, with what it yields in a stream."""
    assert attempt.step is not None
    assert attempt.writers is not None
    made = attempt.step.fn(*args, **kwargs)
    return await drain(attempt.writers, made if attempt.step.yields else await made)


async def _awaited(attempt: Attempt, made: Coroutine[Any, Any, Any]) -> Any:
    """Awaits what a plain function has made, as the attempt's task: so that it can be cancelled."""
    if attempt.unwanted:
        made.close()
        raise asyncio.CancelledError(no_longer_wanted(attempt))
    attempt.task = asyncio.current_task()
    return await made


def no_longer_wanted(attempt: Attempt) -> str:
    """What a step is told that is cancelled."""
    return f"the result of {attempt} is no longer wanted: its workflow cancelled it, or the run has ended"


def timed_out(attempt: Attempt) -> StepTimeoutError:
    """What an attempt fails with that took too long."""
    return StepTimeoutError(f"step {attempt.request.step} took longer than {(attempt.request.timeout or 0) / 1000:g} s")


def _succeeded(attempt: Attempt, value: Any) -> StepSucceeded:
    step, what = attempt.step, f"the result of step {attempt.request.step}"
    assert step is not None
    if step.yields:  # then the annotation is of what it yields, and the value a handle
        return StepSucceeded(result=payloads.dump(value, what))
    # Checked here and not where it is read: a result that is not what the function says is the step's failure.
    return StepSucceeded(result=payloads.dump_result(step.fn, value, what))


def failed(exc: BaseException, clock: Clock) -> StepFailed:
    """How an exception is reported: for good, or to be retried, and when."""
    fatal, retry_after = False, None
    for leaf in _leaves(exc):
        # What cannot be serialized will not be the next time either.
        fatal = fatal or isinstance(leaf, FatalError | SerializationError)
        if isinstance(leaf, RetryableError) and leaf.retry_after is not None:
            try:
                retry_after = max(retry_after or 0, milliseconds(leaf.retry_after, now=clock.now()))
            except (TypeError, ValueError, OverflowError) as e:
                failures.add_note(leaf, f"its retry_after was ignored: {e}")
    error = failures.to_error(exc)
    if isinstance(exc, asyncio.CancelledError) and not error.message:
        error = msgspec.structs.replace(error, message="raised by the step's own code: nobody had cancelled the step")
    return StepFailed(error=error, retry_after=retry_after, fatal=fatal)


def untold(why: str) -> StepFailed:
    """What is reported, for good, of an attempt whose outcome cannot be put into a record."""
    return StepFailed(error=failures.to_error(SerializationError(why)), fatal=True)


def _leaves(exc: BaseException) -> list[BaseException]:
    if isinstance(exc, BaseExceptionGroup):
        return [leaf for member in exc.exceptions for leaf in _leaves(member)]
    return [exc]
