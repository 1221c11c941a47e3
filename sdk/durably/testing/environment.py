"""Runs of workflows in a test, as `WorkflowEnvironment` offers them."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, Self, TypeVar, overload

from durably import history
from durably.authoring import registry as everything
from durably.durations import milliseconds
from durably.testing.stage import Stage

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence
    from os import PathLike
    from types import TracebackType

    from durably_schemas.records import Event, RunStatus, RunSummary

    from durably.authoring import Registry, WorkflowDefinition
    from durably.client import AsyncClient, AsyncRun
    from durably.client.client import AsyncStarter
    from durably.client.hooks import HookInfo
    from durably.durations import Duration
    from durably.testing.faults import Call, StepLike
    from durably.web import Request, Response

P = ParamSpec("P")
R = TypeVar("R")


class WorkflowEnvironment:
    """Runs workflows and steps without broker, processes or waiting. A context manager; bound to one event loop.

    Steps run for real, on the loop of the test and, where they are plain functions, on threads; `replace`, `fail` and
    `crash_after` change what they do. Time stands still but for `advance`, and, while somebody waits for a run's end,
    skips to the next timer whenever nothing else can proceed.

    Args:
        always_replay: replays each run from its log for each of its events: finds workflow code that is not
            deterministic.
        skip_time: whether time skips; it can be switched at any moment.
        now: the time that it begins at; the machine's by default.
        registry: the workflows and steps; everything that was registered in this process by default.

    Raises:
        ConfigurationError: this installation has no processor.
    """

    def __init__(
        self,
        *,
        always_replay: bool = False,
        skip_time: bool = True,
        now: datetime | None = None,
        registry: Registry = everything,
    ) -> None:
        begin = None if now is None else round(now.timestamp() * 1000)
        self._stage = Stage(registry, now=begin, skip_time=skip_time, always_replay=always_replay)

    @property
    def client(self) -> AsyncClient:
        """For the application: what it is given to start runs and to follow them. The timeouts of its calls are real."""
        return self._stage.client

    # -- runs ------------------------------------------------------------------------------------------------------

    @overload
    async def start(
        self, workflow: WorkflowDefinition[P, R], /, *args: P.args, **kwargs: P.kwargs
    ) -> EnvironmentRun[R]: ...
    @overload
    async def start(self, workflow: str, /, *args: Any, **kwargs: Any) -> EnvironmentRun[Any]: ...
    async def start(self, workflow: WorkflowDefinition[..., Any] | str, /, *args: Any, **kwargs: Any) -> Any:
        """Starts a run. Raises as `durably.AsyncClient.start`."""
        return await self.options().start(workflow, *args, **kwargs)

    def options(
        self,
        *,
        run_id: str | None = None,
        attributes: Mapping[str, str] | None = None,
        delay: Duration | None = None,
    ) -> EnvironmentStarter:
        """As `durably.AsyncClient.options`; a delay is of the environment's time."""
        return EnvironmentStarter(self._stage, self.client.options(run_id=run_id, attributes=attributes, delay=delay))

    def run(self, run_id: str) -> EnvironmentRun[Any]:
        """A run by its ID: a child, or one that the application has started."""
        return EnvironmentRun(self._stage, self.client.get_run(run_id))

    @property
    def runs(self) -> list[EnvironmentRun[Any]]:
        """All runs, children too, in the order in which they were started."""
        return [self.run(run_id) for run_id in self._stage.run_ids()]

    async def resume_hook(self, token: str, payload: Any = None, *, resume_id: str | None = None) -> RunSummary:
        """Hands data to the hook with this token, as soon as a run has come so far. Raises as `durably.AsyncClient.resume_hook`.

        Time is not skipped for it: a hook that opens after a sleep is there after `advance`.
        """
        return await self._stage.when_open(lambda: self.client.resume_hook(token, payload, resume_id=resume_id))

    async def resume_webhook(self, token: str, request: Request) -> Response:
        """Calls a webhook; returns what it answers. Raises as `durably.AsyncClient.resume_webhook`."""
        return await self._stage.when_open(lambda: self.client.resume_webhook(token, request))

    async def hook(self, token: str) -> HookInfo:
        """The open hook with this token, as soon as there is one. Raises `HookNotFoundError`."""
        return await self._stage.when_open(lambda: self.client.get_hook(token))

    # -- time ------------------------------------------------------------------------------------------------------

    @property
    def skip_time(self) -> bool:
        """Whether time skips while somebody waits for a run's end. It can be switched."""
        return self._stage.skip_time

    @skip_time.setter
    def skip_time(self, skip: bool) -> None:
        self._stage.let_skip(skip)

    @property
    def now(self) -> datetime:
        """The time that runs live in."""
        return datetime.fromtimestamp(self._stage.now / 1000, UTC)

    async def advance(self, duration: Duration) -> None:
        """Lets time pass: all that is due meanwhile happens at its time, and in its order.

        Args:
            duration: seconds, ``"2h"``, a timedelta; or the instant to go on to.
        """
        await self._stage.advance(self._stage.now + milliseconds(duration, now=self._stage.now))

    async def settle(self) -> None:
        """Returns when nothing can proceed any more unless time passes, or somebody resumes a hook; steps are waited for."""
        await self._stage.settle()

    # -- faults ----------------------------------------------------------------------------------------------------

    def replace(self, step: StepLike, by: Callable[..., Any] | Sequence[Any]) -> None:
        """Runs something else instead of a step.

        Args:
            step: the step, or its name.
            by: a function, async or not, that takes the step's arguments; or a list of outcomes: each execution returns
                the next one, or raises it where it is an exception, and the last one stays.

        Raises:
            ConfigurationError: no such step, or no outcome.
            TypeError: neither a function nor a list of outcomes.
        """
        self._stage.steps.replace(step, by)

    def restore(self, step: StepLike) -> None:
        """The step's own function again, and no faults."""
        self._stage.steps.restore(step)

    def fail(
        self, step: StepLike, *, times: int = 1, error: BaseException | type[BaseException] = RuntimeError
    ) -> None:
        """Lets the next executions of a step raise an error before they do anything. Retries count as executions."""
        self._stage.steps.fail(step, times, error)

    def crash_after(self, step: StepLike, *, times: int = 1) -> None:
        """Lets the worker die when it has executed a step, before it has told so: the step runs again."""
        self._stage.steps.crash_after(step, times)

    def crash_processor(self) -> None:
        """Lets the processor die: the state of all runs is rebuilt from their logs, and their code is replayed."""
        self._stage.crash()

    def calls(self, step: StepLike) -> list[Call]:
        """The executions of a step so far, with their arguments: replaced, failed and repeated ones, too."""
        return self._stage.steps.calls(step)

    # -- its end ---------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Drops all runs."""
        self._stage.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class EnvironmentStarter:
    """Starts runs in one certain way. Made by `WorkflowEnvironment.options`."""

    def __init__(self, stage: Stage, starter: AsyncStarter) -> None:
        self._stage = stage
        self._starter = starter

    @overload
    async def start(
        self, workflow: WorkflowDefinition[P, R], /, *args: P.args, **kwargs: P.kwargs
    ) -> EnvironmentRun[R]: ...
    @overload
    async def start(self, workflow: str, /, *args: Any, **kwargs: Any) -> EnvironmentRun[Any]: ...
    async def start(self, workflow: WorkflowDefinition[..., Any] | str, /, *args: Any, **kwargs: Any) -> Any:
        """As `WorkflowEnvironment.start`."""
        self._stage.bind()
        run = await self._starter.start(workflow, *args, **kwargs)
        await self._stage.until(lambda: self._stage.exists(run.id))
        return EnvironmentRun(self._stage, run)


class EnvironmentRun(Generic[R]):
    """A run in a test. Made by `WorkflowEnvironment.start` and `WorkflowEnvironment.run`.

    Attributes:
        id: what it was started as.
    """

    def __init__(self, stage: Stage, run: AsyncRun[R]) -> None:
        self.id = run.id
        self._stage = stage
        self._run = run

    async def result(self, timeout: float | None = None) -> R:  # noqa: ASYNC109 - as of an AsyncRun
        """What the workflow returned; time skips to the next timer as often as it takes.

        Args:
            timeout: seconds of the machine's time; None waits for ever.

        Raises:
            RunFailedError: the workflow raised; its exception is ``cause``.
            RunCancelledError: the run was cancelled.
            RunBlockedError: the code is not deterministic, or does what only a step may do.
            RunStuckError: the run will never end, because nobody does what it waits for.
            TimeoutError: not ended in time.
        """
        self._stage.bind()
        return await self._run.result(timeout)

    @property
    def events(self) -> list[Event]:
        """Its log."""
        return self._stage.events(self.id)

    @property
    def status(self) -> RunStatus:
        """How far it is. Raises `RunNotFoundError`."""
        return self.summary.status

    @property
    def summary(self) -> RunSummary:
        """Its attributes, parent, times, error. Raises `RunNotFoundError`."""
        return self._stage.summary(self.id)

    def save(self, path: str | PathLike[str]) -> None:
        """Writes its log as ``durably runs events --json`` does, for `replay_history`."""
        Path(path).write_bytes(history.dump(self.events))

    async def cancel(self, reason: str | None = None) -> None:
        """Asks the workflow to end by a CancelledError; its cleanup may still run steps."""
        self._stage.bind()
        await self._run.cancel(reason)

    def stream(self, namespace: str | None = None, start_index: int = 0) -> AsyncIterator[Any]:
        """The values of one of its streams, and each new one; time skips as for `result`.

        Args:
            namespace: which stream; None is the default one.
            start_index: the first value, from 0; negative: counted from the end as it is when nothing proceeds.

        Raises:
            RunNotFoundError: there is no such run.
            RunStuckError: nothing will ever be written any more, and the stream does not end.
            Exception: what ended the stream, where its writer was an iterator that failed.
        """
        return self._stage.chunks(self.id, namespace, start_index)

    async def hooks(self) -> list[HookInfo]:
        """Its open hooks, when nothing else proceeds."""
        await self._stage.settle()
        return await self._run.hooks()

    def __repr__(self) -> str:
        return f"<EnvironmentRun {self.id}>"
