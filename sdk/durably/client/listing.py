"""Listing runs: the latest summary of each, from the compacted topic ``runs``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from durably_schemas import CodecError
from durably_schemas.records import RunStatus, RunSummary

from durably.broker.port import TP, Message

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from durably.client.connection import Connection

DEFAULT_LIMIT = 100


def list_runs(
    connection: Connection,
    *,
    workflow: str | None = None,
    status: RunStatus | Collection[RunStatus] | None = None,
    attributes: Mapping[str, str] | None = None,
    build: str | None = None,
    limit: int | None = DEFAULT_LIMIT,
) -> list[RunSummary]:
    """The runs that match, newest first.

    Args:
        connection: whose broker is read.
        workflow: a workflow's name.
        status: one status, or several.
        attributes: those that a run must have, with these values.
        build: the one that a run is pinned to.
        limit: how many at most; None for all.

    Raises:
        ConfigurationError: topics are missing.
    """
    statuses = {status} if isinstance(status, str) else None if status is None else set(status)
    wanted = (attributes or {}).items()
    found = []
    for value in _latest(connection).values():
        try:
            summary = connection.codec.decode_as(RunSummary, value)
        except CodecError:
            continue  # one that this version cannot read does not hide the others
        if (
            (workflow is None or summary.workflow == workflow)
            and (statuses is None or summary.status in statuses)
            and wanted <= summary.attributes.items()
            and (build is None or summary.build == build)
        ):
            found.append(summary)
    found.sort(key=lambda s: (s.created_at, s.run_id), reverse=True)
    return found[:limit]


def _latest(connection: Connection) -> dict[bytes, bytes]:
    """The newest value of each key; compaction may have left older ones too."""
    topic = connection.catalogue.runs
    tps = [TP(topic, p) for p in range(connection.partitions(topic))]
    ends = connection.broker.end_offsets(tps, committed=True)
    starts = connection.broker.start_offsets(tps)
    open_ends = {tp: end for tp, end in ends.items() if end > starts[tp]}
    latest: dict[bytes, bytes] = {}
    if not open_ends:
        return latest
    reader = connection.broker.reader({tp: starts[tp] for tp in open_ends})
    try:
        while open_ends:
            for item in reader.poll(1.0, 5000):
                tp, position = TP(item.topic, item.partition), item.offset
                if isinstance(item, Message):
                    position += 1
                    if item.key is not None and item.value is not None:
                        latest[item.key] = item.value
                    elif item.key is not None:
                        latest.pop(item.key, None)
                if position >= open_ends.get(tp, position + 1):
                    del open_ends[tp]
    finally:
        reader.close()
    return latest
