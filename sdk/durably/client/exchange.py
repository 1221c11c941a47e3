"""One command and its answer, awaited by a thread or by a task."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from concurrent.futures import wait
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from durably_schemas.catalogue import partition_for
from durably_schemas.records import Query, QueryRun, Record, Reply, ReplyTo, StartRun

from durably.errors import BrokerUnreachable
from durably.observability.tracing import start_span

if TYPE_CHECKING:
    from durably.broker.port import Headers
    from durably.client.connection import Connection

Command = Callable[[ReplyTo], Record]
T = TypeVar("T")


class Question(NamedTuple):
    """A command, its routing key, and what it is about, as an error message names it."""

    key: str
    command: Command
    about: str


Talk = Generator[Question, Reply, T]
"""Questions that build on each other's answers, without I/O: `converse` asks them, and returns what it returns."""


def query(run_id: str, what: Query, from_seq: int = 1, token: str | None = None) -> Command:
    """A QueryRun, but for its address."""
    return lambda to: QueryRun(run_id=run_id, what=what, from_seq=from_seq, token=token, reply_to=to)


def submit(connection: Connection, command: StartRun) -> None:
    """Returns when the broker has the start durably. Raises `BrokerUnreachable` when it does not say so in time."""
    with start_span(command) as headers:
        future = connection.send(command.run_id, command, headers=headers)
        wait([future], connection.timeout)
    if not future.done():
        raise BrokerUnreachable(_unacknowledged(connection, command.run_id))
    future.result()


async def submit_async(connection: Connection, command: StartRun) -> None:
    """As `submit`."""
    if not connection.is_open:
        await asyncio.wrap_future(connection.opening())
    with start_span(command) as headers:
        future = asyncio.wrap_future(connection.send(command.run_id, command, headers=headers))
        done, _ = await asyncio.wait([future], timeout=connection.timeout)
    if not done:
        raise BrokerUnreachable(_unacknowledged(connection, command.run_id))
    future.result()


def answer(connection: Connection, key: str, command: Command, about: str | None = None) -> Reply:
    """The reply to a command that needs no waiting.

    Args:
        connection: who asks.
        key: the routing key of the command: a run's ID, or the custom token of a hook.
        command: the question.
        about: what it is about; the run with this key by default.

    Raises:
        TimeoutError: no processor gave one.
    """
    reply = answer_within(connection, key, command, connection.timeout)
    if reply is None:
        raise TimeoutError(unanswered(connection, key, about))
    return reply


async def answer_async(connection: Connection, key: str, command: Command, about: str | None = None) -> Reply:
    """As `answer`."""
    reply = await answer_within_async(connection, key, command, connection.timeout)
    if reply is None:
        raise TimeoutError(unanswered(connection, key, about))
    return reply


def converse(connection: Connection, talk: Talk[T]) -> T:
    """Asks the questions of a talk, one after the other. Raises what the talk raises, and as `answer`."""
    try:
        question = next(talk)
        while True:
            question = talk.send(answer(connection, *question))
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]


async def converse_async(connection: Connection, talk: Talk[T]) -> T:
    """As `converse`."""
    try:
        question = next(talk)
        while True:
            reply = await answer_async(connection, *question)
            question = talk.send(reply)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]


def answer_within(connection: Connection, key: str, command: Command, timeout: float | None) -> Reply | None:
    """The reply, or None after ``timeout`` seconds; None waits for ever."""
    future = connection.ask(key, command)
    try:
        wait([future], timeout)
        return future.result() if future.done() else None
    finally:
        future.cancel()


async def answer_within_async(
    connection: Connection,
    key: str,
    command: Command,
    timeout: float | None,  # noqa: ASYNC109 - as its twin
    headers: Headers = (),
) -> Reply | None:
    """As `answer_within`; with headers for the command."""
    if not connection.is_listening:
        await asyncio.wrap_future(connection.listening())
    future = asyncio.wrap_future(connection.ask(key, command, headers))
    try:
        await asyncio.wait([future], timeout=timeout)
        return future.result() if future.done() else None
    finally:
        future.cancel()


def unanswered(connection: Connection, key: str, about: str | None = None) -> str:
    """What to say where a processor should have answered."""
    topic = connection.catalogue.commands
    partition = partition_for(key.encode(), connection.partitions(topic))
    return (
        f"no processor answered for {about or f'run {key}'} within {connection.timeout:g} s: partition {partition} of "
        f"{topic} has no live owner; start `durably processor`, and look with `durably health`"
    )


def _unacknowledged(connection: Connection, run_id: str) -> str:
    return (
        f"{connection.broker.url} did not acknowledge the start of run {run_id} within {connection.timeout:g} s; it "
        f"may come through yet: start again with run_id={run_id!r}, which attaches to the run if there is one"
    )
