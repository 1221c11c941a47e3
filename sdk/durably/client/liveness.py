"""Whether somebody owns each partition, and serves each queue: asked of them, because only an answer proves one."""

from __future__ import annotations

import time
from concurrent.futures import wait
from typing import TYPE_CHECKING, NamedTuple

from durably_schemas.catalogue import partition_for
from durably_schemas.records import StartRun

from durably import health, payloads
from durably.client.exchange import query
from durably.identifiers import new_run_id

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from concurrent.futures import Future

    from durably_schemas.records import Reply, ReplyTo

    from durably.client.connection import Connection


class RoundTrip(NamedTuple):
    """How long the owner of a partition took to answer; None: nobody did."""

    partition: int
    latency_ms: float | None


def round_trips(connection: Connection, timeout: float) -> list[RoundTrip]:
    """Asks the owner of every partition for a run that does not exist.

    Asked twice, because the first answer comes through connections that are only just being made.

    Args:
        connection: who asks.
        timeout: seconds for each of the two rounds.

    Raises:
        ConfigurationError: topics are missing.
    """
    run_ids = dict(enumerate(_run_ids(connection.partitions(connection.catalogue.commands))))
    first = _ask(connection, run_ids, timeout)
    took = first | _ask(connection, {partition: run_ids[partition] for partition in first}, timeout)
    return [RoundTrip(partition, took.get(partition)) for partition in run_ids]


class QueueTrip(NamedTuple):
    """A round trip through a processor and a worker of a queue.

    Attributes:
        queue: its name.
        worker: who has answered; None: nobody.
        latency_ms: from the question to the answer, as the asker sees it.
        took_ms: from the question's record to the worker's, by the log's clock.
        problem: what is wrong, and what to do.
    """

    queue: str
    worker: str | None = None
    latency_ms: float | None = None
    took_ms: int | None = None
    problem: str | None = None


def queues_of(connection: Connection, timeout: float) -> list[str]:
    """The queues that have a topic."""
    prefix = connection.catalogue.requests("x")[:-1]
    return sorted(name.removeprefix(prefix) for name in connection.broker.topics(timeout) if name.startswith(prefix))


def queue_trips(connection: Connection, queues: Sequence[str], timeout: float) -> list[QueueTrip]:
    """Sends a round trip through every queue, all at once; it is no run, and leaves nothing behind.

    Args:
        connection: who asks.
        queues: which.
        timeout: seconds for all of them.

    Raises:
        ConfigurationError: topics are missing.
    """
    connection.listen()
    ended: dict[str, float] = {}
    futures: dict[str, Future[Reply]] = {}
    began = time.perf_counter()
    for queue in queues:
        run_id = new_run_id()

        def ask(reply_to: ReplyTo, run_id: str = run_id, queue: str = queue) -> StartRun:
            return StartRun(
                run_id=run_id,
                workflow=health.WORKFLOW,
                input=payloads.dump([[], {}], "no arguments"),
                requested_at=time.time_ns() // 1_000_000,
                attributes={health.QUEUE: queue},
                reply_to=reply_to,
            )

        future = futures[queue] = connection.ask(run_id, ask)
        future.add_done_callback(lambda _, queue=queue: ended.setdefault(queue, since(began)))  # type: ignore[misc]
    wait(futures.values(), timeout)
    trips = [_queue_trip(queue, future, ended, timeout) for queue, future in futures.items()]
    for future in futures.values():
        future.cancel()
    return trips


def _queue_trip(queue: str, future: Future[Reply], ended: Mapping[str, float], timeout: float) -> QueueTrip:
    if not future.done():
        why = (
            f"no worker answers within {timeout:g} s: start `durably worker MODULE --queue {queue}`; where some run, "
            f"all of their slots are taken"
        )
        return QueueTrip(queue, problem=why)
    if (error := future.exception()) is not None:
        return QueueTrip(queue, problem=str(error))
    reply = future.result()
    if reply.status != "OK" or reply.result is None:
        return QueueTrip(queue, problem=reply.message)
    told = payloads.load(reply.result)
    return QueueTrip(queue, told["worker"], ended.get(queue), told["took_ms"], reply.message)


def since(began: float) -> float:
    """Milliseconds since an instant of `time.perf_counter`, for people to read."""
    return round((time.perf_counter() - began) * 1000, 2)


def _ask(connection: Connection, run_ids: dict[int, str], timeout: float) -> dict[int, float]:
    """How long the answer of each partition took, in milliseconds; all are asked at once."""
    connection.listen()
    took: dict[int, float] = {}
    futures: list[Future[Reply]] = []
    for partition, run_id in run_ids.items():
        began = time.perf_counter()
        future = connection.ask(run_id, query(run_id, "SUMMARY"))

        def note(answered: Future[Reply], partition: int = partition, began: float = began) -> None:
            if not answered.cancelled() and answered.exception() is None:
                took[partition] = since(began)

        future.add_done_callback(note)
        futures.append(future)
    wait(futures, timeout)
    for future in futures:
        future.cancel()
    return took


def _run_ids(count: int) -> list[str]:
    """For each partition the id of a run that does not exist, and whose key maps to it."""
    found: dict[int, str] = {}
    while len(found) < count:
        run_id = new_run_id()
        found.setdefault(partition_for(run_id.encode(), count), run_id)
    return [found[partition] for partition in range(count)]
