"""What a test does to steps: replaces them, makes them fail, and lets their worker die."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import AsyncIterable, Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any

from durably.authoring import Registry, StepDefinition
from durably.cancellation import running_step
from durably.errors import ConfigurationError
from durably.worker.attempt import Attempt

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

StepLike = StepDefinition[..., Any] | str
"""A step, or its name."""


@dataclass(frozen=True, slots=True)
class Call:
    """One execution of a step.

    Attributes:
        args, kwargs: what it was called with.
        run_id: whose step it is.
        attempt: from 1; each retry is one more.
        execution: from 1; one more where a worker died, and the same attempt was run again.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    run_id: str
    attempt: int
    execution: int


class _Plan:
    """What happens to one step."""

    def __init__(self) -> None:
        self.by: Callable[..., Any] | None = None
        self.failures: list[BaseException | type[BaseException]] = []
        self.crashes = 0
        self.calls: list[Call] = []


class PlannedSteps:
    """The steps of a registry as a worker finds them in a test. Implements `durably.worker.steps.Steps`' registry.

    Args:
        registry: the steps as they are.
        crashed: is called with an attempt whose worker has died of it.
    """

    def __init__(self, registry: Registry, crashed: Callable[[Attempt], None]) -> None:
        self._registry = registry
        self._crashed = crashed
        self._plans: dict[str, _Plan] = {}
        self._made: dict[str, tuple[Callable[..., Any] | None, StepDefinition[..., Any]]] = {}

    def step(self, name: str) -> StepDefinition[..., Any] | None:
        """The step of this name, as it is to be run next."""
        original = self._registry.step(name)
        if original is None:
            return None
        plan = self._plans.setdefault(name, _Plan())
        made = self._made.get(name)
        if made is None or made[0] is not plan.by:
            made = self._made[name] = plan.by, self._planned(original, plan)
        return made[1]

    def replace(self, step: StepLike, by: Callable[..., Any] | Sequence[Any]) -> None:
        """A function instead of the step's own, or the outcomes of its executions, one after the other."""
        plan = self._plan(step)
        plan.by = by if callable(by) else _outcomes(by)

    def restore(self, step: StepLike) -> None:
        """The step's own function again, without faults."""
        plan = self._plan(step)
        plan.by, plan.failures, plan.crashes = None, [], 0

    def fail(self, step: StepLike, times: int, error: BaseException | type[BaseException]) -> None:
        """The next executions raise this instead of doing anything."""
        self._plan(step).failures += [error] * times

    def crash_after(self, step: StepLike, times: int) -> None:
        """The worker of the next executions dies when they are done, before it has reported."""
        self._plan(step).crashes += times

    def calls(self, step: StepLike) -> list[Call]:
        """The executions so far, also those that failed."""
        return list(self._plan(step).calls)

    def _plan(self, step: StepLike) -> _Plan:
        name = step.name if isinstance(step, StepDefinition) else step
        if self._registry.step(name) is None:
            raise ConfigurationError(f"there is no step {name!r}: import the module that defines it")
        return self._plans.setdefault(name, _Plan())

    def _planned(self, original: StepDefinition[..., Any], plan: _Plan) -> StepDefinition[..., Any]:
        """The step with what is planned around its function."""
        fn = plan.by or original.fn

        def begin(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            attempt = _attempt()
            request = attempt.request
            plan.calls.append(Call(args, kwargs, request.run_id, request.attempt, attempt.execution))
            if plan.failures:
                raise plan.failures.pop(0)

        def end() -> None:
            if plan.crashes:
                plan.crashes -= 1
                self._crashed(_attempt())

        @wraps(original.fn)
        async def task(*args: Any, **kwargs: Any) -> Any:
            begin(args, kwargs)
            value = fn(*args, **kwargs)
            if inspect.isawaitable(value):
                value = await value
            end()
            return value

        @wraps(original.fn)
        async def stream(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
            begin(args, kwargs)
            values: AsyncIterable[Any] | Iterable[Any] = fn(*args, **kwargs)
            if inspect.isawaitable(values):
                values = await values
            if isinstance(values, AsyncIterable):
                async for value in values:
                    yield value
            else:
                for value in values:
                    yield value
            end()

        @wraps(original.fn)
        def plain(*args: Any, **kwargs: Any) -> Any:
            begin(args, kwargs)
            value = fn(*args, **kwargs)
            end()
            return value

        @wraps(original.fn)
        def plain_stream(*args: Any, **kwargs: Any) -> Iterator[Any]:
            begin(args, kwargs)
            yield from fn(*args, **kwargs)
            end()

        # What replaces a step runs on the loop. Only a plain function of the user's own needs a thread.
        is_async = original.is_async or plan.by is not None
        if original.yields:
            return dataclasses.replace(original, fn=stream if is_async else plain_stream, is_async=is_async)
        return dataclasses.replace(original, fn=task if is_async else plain, is_async=is_async)


def _attempt() -> Attempt:
    attempt = running_step.get()
    assert isinstance(attempt, Attempt)  # set by the worker around each execution
    return attempt


def _outcomes(values: Sequence[Any]) -> Callable[..., Any]:
    """A function that gives these one after the other, raising what is an exception, and then the last again and again."""
    if isinstance(values, str | bytes):
        raise TypeError(
            f"a step is replaced by {values!r:.100}: give a function, or a list of outcomes, [{values!r:.100}]"
        )
    left = list(values)
    if not left:
        raise ConfigurationError("a step is replaced by no outcomes at all: give one at least")

    def outcome(*_: Any, **__: Any) -> Any:
        value = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(value, BaseException) or (isinstance(value, type) and issubclass(value, BaseException)):
            raise value
        return value

    return outcome
