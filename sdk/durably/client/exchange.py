"""One command and its answer, awaited by a thread or by a task."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import wait
from typing import TYPE_CHECKING

from durably_schemas.catalogue import partition_for
from durably_schemas.records import Query, QueryRun, Record, Reply, ReplyTo, StartRun

from durably.errors import BrokerUnreachable

if TYPE_CHECKING:
    from durably.client.connection import Connection

Command = Callable[[ReplyTo], Record]


def query(run_id: str, what: Query, from_seq: int = 1) -> Command:
    """A QueryRun, but for its address."""
    return lambda to: QueryRun(run_id=run_id, what=what, from_seq=from_seq, reply_to=to)


def submit(connection: Connection, command: StartRun) -> None:
    """Returns when the broker has the start durably. Raises `BrokerUnreachable` when it does not say so in time."""
    future = connection.send(command.run_id, command)
    wait([future], connection.timeout)
    if not future.done():
        raise BrokerUnreachable(_unacknowledged(connection, command.run_id))
    future.result()


async def submit_async(connection: Connection, command: StartRun) -> None:
    """As `submit`."""
    if not connection.is_open:
        await asyncio.to_thread(connection.open)
    future = asyncio.wrap_future(connection.send(command.run_id, command))
    done, _ = await asyncio.wait([future], timeout=connection.timeout)
    if not done:
        raise BrokerUnreachable(_unacknowledged(connection, command.run_id))
    future.result()


def answer(connection: Connection, run_id: str, command: Command) -> Reply:
    """The reply to a command that needs no waiting. Raises `TimeoutError` when no processor gives one."""
    reply = answer_within(connection, run_id, command, connection.timeout)
    if reply is None:
        raise TimeoutError(unanswered(connection, run_id))
    return reply


async def answer_async(connection: Connection, run_id: str, command: Command) -> Reply:
    """As `answer`."""
    reply = await answer_within_async(connection, run_id, command, connection.timeout)
    if reply is None:
        raise TimeoutError(unanswered(connection, run_id))
    return reply


def answer_within(connection: Connection, run_id: str, command: Command, timeout: float | None) -> Reply | None:
    """The reply, or None after ``timeout`` seconds; None waits for ever."""
    future = connection.ask(run_id, command)
    try:
        wait([future], timeout)
        return future.result() if future.done() else None
    finally:
        future.cancel()


async def answer_within_async(
    connection: Connection,
    run_id: str,
    command: Command,
    timeout: float | None,  # noqa: ASYNC109 - as its twin
) -> Reply | None:
    """As `answer_within`."""
    if not connection.is_listening:
        await asyncio.to_thread(connection.listen)
    future = asyncio.wrap_future(connection.ask(run_id, command))
    try:
        await asyncio.wait([future], timeout=timeout)
        return future.result() if future.done() else None
    finally:
        future.cancel()


def unanswered(connection: Connection, run_id: str) -> str:
    """What to say where a processor should have answered."""
    topic = connection.catalogue.commands
    partition = partition_for(run_id.encode(), connection.partitions(topic))
    return (
        f"no processor answered for run {run_id} within {connection.timeout:g} s: partition {partition} of "
        f"{topic} has no live owner; start `durably processor`, and look with `durably health`"
    )


def _unacknowledged(connection: Connection, run_id: str) -> str:
    return (
        f"{connection.broker.url} did not acknowledge the start of run {run_id} within {connection.timeout:g} s; it "
        f"may come through yet: start again with run_id={run_id!r}, which attaches to the run if there is one"
    )
