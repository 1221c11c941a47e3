"""A run's log, asked for page by page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from durably_schemas.events import RunCreated, StepCompleted
from durably_schemas.records import Event, Reply, StreamWritten

from durably.client.exchange import Command, answer, answer_async, query
from durably.client.outcome import summary_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from durably_schemas import Codec

    from durably.client.connection import Connection


class _Pages:
    """Which page comes next."""

    def __init__(self, run_id: str, codec: Codec) -> None:
        self._run_id = run_id
        self._codec = codec
        self._next: int | None = 1

    def next(self) -> Command | None:
        return None if self._next is None else query(self._run_id, "EVENTS", self._next)

    def take(self, reply: Reply) -> list[Event]:
        summary_of(reply, self._run_id)
        self._next = reply.next_seq
        return [self._codec.decode_as(Event, data) for data in reply.events]

    def first(self, reply: Reply) -> RunCreated:
        created = self.take(reply)[0].data
        assert isinstance(created, RunCreated)  # the first entry of every log
        return created


def log_pages(connection: Connection, run_id: str) -> Iterator[list[Event]]:
    """All events of a run that are committed by now, some at a time. Raises `RunNotFoundError`, or `TimeoutError`."""
    pages = _Pages(run_id, connection.codec)
    while (command := pages.next()) is not None:
        yield pages.take(answer(connection, run_id, command))


def read_log(connection: Connection, run_id: str) -> list[Event]:
    """As `log_pages`, at once."""
    return [event for page in log_pages(connection, run_id) for event in page]


async def read_log_async(connection: Connection, run_id: str) -> list[Event]:
    """As `read_log`."""
    pages = _Pages(run_id, connection.codec)
    events: list[Event] = []
    while (command := pages.next()) is not None:
        events += pages.take(await answer_async(connection, run_id, command))
    return events


def creation(connection: Connection, run_id: str) -> RunCreated:
    """What a run was started with. Raises `RunNotFoundError`, or `TimeoutError`."""
    pages = _Pages(run_id, connection.codec)
    return pages.first(answer(connection, run_id, query(run_id, "EVENTS")))


async def creation_async(connection: Connection, run_id: str) -> RunCreated:
    """As `creation`."""
    pages = _Pages(run_id, connection.codec)
    return pages.first(await answer_async(connection, run_id, query(run_id, "EVENTS")))


def streams_written(events: list[Event]) -> list[StreamWritten]:
    """What the completed steps of a run wrote."""
    return [written for e in events if isinstance(e.data, StepCompleted) for written in e.data.streams]


def stream_names(events: list[Event]) -> list[str]:
    """The streams that a run's completed steps have written, in the order of their first appearance."""
    return list(dict.fromkeys(written.namespace for written in streams_written(events)))
