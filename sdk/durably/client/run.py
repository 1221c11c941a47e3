"""A run, seen from outside: `Run` for threads, `AsyncRun` for tasks, with the same names in the same order."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import msgspec
from durably_schemas.records import CancelRun, Event, ReplyTo, ResetRun, RunStatus, RunSummary, StartRun

from durably.client import stream
from durably.client.exchange import (
    Command,
    answer,
    answer_async,
    answer_within,
    answer_within_async,
    query,
    submit,
    submit_async,
)
from durably.client.log import creation, creation_async, read_log, read_log_async, stream_names
from durably.client.outcome import summary_of, value_of
from durably.client.starting import StartOptions
from durably.client.stream import StreamInfo
from durably.errors import DurablyError
from durably.identifiers import new_run_id
from durably.streams import bound_to

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from durably_schemas.events import RunCreated

    from durably.client.connection import Connection
    from durably.client.hooks import HookInfo

R = TypeVar("R")

_STATUS_TIMEOUT = 2.0  # for the one question whose answer only completes an error message


class Run(Generic[R]):
    """A run. Made by `Client.start` and `Client.get_run`; making one does no I/O.

    Every method raises `RunNotFoundError` where there is no such run, and `TimeoutError`, saying what to do, where no
    processor answers.

    Attributes:
        id: what it was started as.
    """

    __durably_run_handle__ = True  # how payloads know one, without importing the client

    def __init__(self, connection: Connection, run_id: str, returns: Any = None) -> None:
        self.id = run_id
        self._connection = connection
        self._returns = returns

    def status(self) -> RunStatus:
        """How far it is, as committed."""
        return self.describe().status

    def result(self, timeout: float | None = None) -> R:
        """What the workflow returned; waits until it has.

        Args:
            timeout: seconds; None waits for ever.

        Raises:
            RunFailedError: the workflow raised; its exception is ``cause``.
            RunCancelledError: the run was cancelled.
            RunBlockedError: the run waits for other code; it is not over.
            TimeoutError: not ended in time; says how far the run is. The run goes on.
        """
        reply = answer_within(self._connection, self.id, query(self.id, "RESULT"), timeout)
        if reply is not None:
            with bound_to(self._connection, Run):
                return cast("R", value_of(reply, self.id, self._returns))
        status = None
        with suppress(DurablyError):
            reply = answer_within(self._connection, self.id, query(self.id, "SUMMARY"), _STATUS_TIMEOUT)
            status = summary_of(reply, self.id).status if reply is not None else None
        raise TimeoutError(_not_ended(self.id, timeout, status))

    def cancel(self, reason: str | None = None) -> None:
        """Asks the workflow to end by a CancelledError; its cleanup may still run steps. Harmless when it has ended."""
        summary_of(answer(self._connection, self.id, _cancel(self.id, reason)), self.id)

    def events(self) -> list[Event]:
        """The log, as committed."""
        return read_log(self._connection, self.id)

    def stream(self, namespace: str | None = None, start_index: int = 0) -> Iterator[Any]:
        """The values of one of its streams, and each new one as it is written, until the stream or the run ends.

        Args:
            namespace: which stream; None is the default one. The run need not have been started yet.
            start_index: the first value, from 0; negative: counted from the end as it is now.

        Raises:
            DurablyError: the stream's beginning is no longer retained, or no stream may have this name.
            Exception: what ended the stream, where its writer was an iterator that failed.
        """
        return stream.read(self._connection, self.id, namespace, start_index, Run)

    def streams(self) -> list[str]:
        """The namespaces of the streams that its completed steps have written."""
        return stream_names(self.events())

    def stream_info(self, namespace: str | None = None) -> StreamInfo:
        """How far one of its streams is now; None is the default one."""
        return stream.info(self._connection, self.id, namespace, Run)

    def describe(self) -> RunSummary:
        """Its summary, as committed."""
        return summary_of(answer(self._connection, self.id, query(self.id, "SUMMARY")), self.id)

    def hooks(self) -> list[HookInfo]:
        """Its open hooks, as committed."""
        from durably.client import hooks  # most clients ask for none

        return hooks.run_hooks(self._connection, self.id)

    def rerun(self, *, run_id: str | None = None) -> Run[R]:
        """Starts a new run of the same workflow, with the same input and attributes; its ``origin`` is this one.

        Args:
            run_id: an id for it; starting it again attaches to that run.

        Raises:
            ConfigurationError: no run may have this id.
        """
        created = creation(self._connection, self.id)
        command = _again(self.id, created, run_id)
        submit(self._connection, command)
        return Run(self._connection, command.run_id, self._returns)

    def reset(self, to_event: int, *, reason: str | None = None) -> Run[R]:
        """Starts a new run that goes on from an event of this one's log, which is cancelled if it has not ended.

        The new run has the log up to that event, with the results of steps; what follows is done again, by the code of
        now. What the hooks that are open there receive later goes to the new run, too.

        Args:
            to_event: the last event that both have in common: its ``seq``, 1 or more.
            reason: recorded in both logs.

        Raises:
            DurablyError: the run cannot be reset to this event; says why, and to which it can.
            TimeoutError: no processor has answered; names the new run, which may be there soon.
        """
        command, about = _reset(self.id, to_event, reason)
        reply = answer(self._connection, self.id, command, about)
        return Run(self._connection, summary_of(reply, self.id).run_id, self._returns)

    def __repr__(self) -> str:
        return f"<Run {self.id}>"


class AsyncRun(Generic[R]):
    """A run. Made by `AsyncClient.start` and `AsyncClient.get_run`; making one does no I/O.

    Every method raises `RunNotFoundError` where there is no such run, and `TimeoutError`, saying what to do, where no
    processor answers.

    Attributes:
        id: what it was started as.
    """

    __durably_run_handle__ = True  # how payloads know one, without importing the client

    def __init__(self, connection: Connection, run_id: str, returns: Any = None) -> None:
        self.id = run_id
        self._connection = connection
        self._returns = returns

    async def status(self) -> RunStatus:
        """How far it is, as committed."""
        return (await self.describe()).status

    async def result(self, timeout: float | None = None) -> R:  # noqa: ASYNC109 - as its twin
        """What the workflow returned; waits until it has.

        Args:
            timeout: seconds; None waits for ever.

        Raises:
            RunFailedError: the workflow raised; its exception is ``cause``.
            RunCancelledError: the run was cancelled.
            RunBlockedError: the run waits for other code; it is not over.
            TimeoutError: not ended in time; says how far the run is. The run goes on.
        """
        reply = await answer_within_async(self._connection, self.id, query(self.id, "RESULT"), timeout)
        if reply is not None:
            with bound_to(self._connection, AsyncRun):
                return cast("R", value_of(reply, self.id, self._returns))
        status = None
        with suppress(DurablyError):
            reply = await answer_within_async(self._connection, self.id, query(self.id, "SUMMARY"), _STATUS_TIMEOUT)
            status = summary_of(reply, self.id).status if reply is not None else None
        raise TimeoutError(_not_ended(self.id, timeout, status))

    async def cancel(self, reason: str | None = None) -> None:
        """Asks the workflow to end by a CancelledError; its cleanup may still run steps. Harmless when it has ended."""
        summary_of(await answer_async(self._connection, self.id, _cancel(self.id, reason)), self.id)

    async def events(self) -> list[Event]:
        """The log, as committed."""
        return await read_log_async(self._connection, self.id)

    def stream(self, namespace: str | None = None, start_index: int = 0) -> AsyncIterator[Any]:
        """The values of one of its streams, and each new one as it is written, until the stream or the run ends.

        Args:
            namespace: which stream; None is the default one. The run need not have been started yet.
            start_index: the first value, from 0; negative: counted from the end as it is now.

        Raises:
            DurablyError: the stream's beginning is no longer retained, or no stream may have this name.
            Exception: what ended the stream, where its writer was an iterator that failed.
        """
        return stream.read_async(self._connection, self.id, namespace, start_index, AsyncRun)

    async def streams(self) -> list[str]:
        """The namespaces of the streams that its completed steps have written."""
        return stream_names(await self.events())

    async def stream_info(self, namespace: str | None = None) -> StreamInfo:
        """How far one of its streams is now; None is the default one."""
        return await asyncio.to_thread(stream.info, self._connection, self.id, namespace, AsyncRun)

    async def describe(self) -> RunSummary:
        """Its summary, as committed."""
        return summary_of(await answer_async(self._connection, self.id, query(self.id, "SUMMARY")), self.id)

    async def hooks(self) -> list[HookInfo]:
        """Its open hooks, as committed."""
        from durably.client import hooks  # most clients ask for none

        return await hooks.run_hooks_async(self._connection, self.id)

    async def rerun(self, *, run_id: str | None = None) -> AsyncRun[R]:
        """Starts a new run of the same workflow, with the same input and attributes; its ``origin`` is this one.

        Args:
            run_id: an id for it; starting it again attaches to that run.

        Raises:
            ConfigurationError: no run may have this id.
        """
        created = await creation_async(self._connection, self.id)
        command = _again(self.id, created, run_id)
        await submit_async(self._connection, command)
        return AsyncRun(self._connection, command.run_id, self._returns)

    async def reset(self, to_event: int, *, reason: str | None = None) -> AsyncRun[R]:
        """Starts a new run that goes on from an event of this one's log, which is cancelled if it has not ended.

        The new run has the log up to that event, with the results of steps; what follows is done again, by the code of
        now. What the hooks that are open there receive later goes to the new run, too.

        Args:
            to_event: the last event that both have in common: its ``seq``, 1 or more.
            reason: recorded in both logs.

        Raises:
            DurablyError: the run cannot be reset to this event; says why, and to which it can.
            TimeoutError: no processor has answered; names the new run, which may be there soon.
        """
        command, about = _reset(self.id, to_event, reason)
        reply = await answer_async(self._connection, self.id, command, about)
        return AsyncRun(self._connection, summary_of(reply, self.id).run_id, self._returns)

    def __repr__(self) -> str:
        return f"<AsyncRun {self.id}>"


def _again(old: str, created: RunCreated, run_id: str | None) -> StartRun:
    options = StartOptions(run_id=run_id, attributes=created.attributes)
    command = options.named().command(created.workflow, created.input)
    return msgspec.structs.replace(command, rerun_of=old)


def _cancel(run_id: str, reason: str | None) -> Command:
    now = time.time_ns() // 1_000_000

    def command(to: ReplyTo) -> CancelRun:
        return CancelRun(run_id=run_id, requested_at=now, reason=reason, reply_to=to)

    return command


def _reset(run_id: str, to_event: int, reason: str | None) -> tuple[Command, str]:
    now = time.time_ns() // 1_000_000
    new = new_run_id()  # the same in every copy of the command

    def command(to: ReplyTo) -> ResetRun:
        return ResetRun(run_id=run_id, new_run_id=new, to_event=to_event, requested_at=now, reason=reason, reply_to=to)

    # Who asks again without having looked would have two runs.
    return command, f"the reset of run {run_id} as run {new}, which may come through yet,"


def _not_ended(run_id: str, timeout: float | None, status: RunStatus | None) -> str:
    how = f"it is {status}" if status is not None else "its status is unknown, because no processor answers"
    return f"run {run_id} has not ended within {timeout:g} s: {how}"
