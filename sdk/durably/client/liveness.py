"""Whether somebody owns each partition: asked of its owner, because only an answer proves one."""

from __future__ import annotations

import time
from concurrent.futures import wait
from typing import TYPE_CHECKING, NamedTuple

from durably_schemas.catalogue import partition_for

from durably.client.exchange import query
from durably.identifiers import new_run_id

if TYPE_CHECKING:
    from concurrent.futures import Future

    from durably_schemas.records import Reply

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
