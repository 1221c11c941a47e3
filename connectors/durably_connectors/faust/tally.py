"""What a monitor counts, as rows of a table: pure, so that a redelivered event is seen not to count twice.

The rows of one partition come of its events alone, and each carries the offset of the last event that changed it: one
with a lower or the same offset changes it no more. An event changes the rows that count before the row of its run, and a
changelog keeps that order; so whatever of a changelog has survived, reading on from an earlier event gives what reading
once would have given.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, MutableMapping
from typing import Literal

import msgspec
from durably_schemas import events as ev
from durably_schemas.records import Event

BUCKETS = (
    1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 30_000, 60_000, 300_000, 900_000, 3_600_000,
    21_600_000, 86_400_000,
)  # fmt: skip
"""Upper bounds of latencies, in milliseconds; what is longer stands behind the last."""
MINUTE = 60_000
TOTAL = -1
"""The window of the rows that count from the beginning on."""

Rows = MutableMapping[bytes, bytes]
Result = Literal["completed", "failed", "cancelled"]


class Key(msgspec.Struct, frozen=True, array_like=True):
    """What a row counts: in one partition, within one minute, of one workflow, and of one of its steps or of its runs.

    Attributes:
        partition: of ``events``.
        window: when the minute begins, in milliseconds since the epoch, or `TOTAL`.
        workflow: by name.
        step: by name; empty for runs.
    """

    partition: int
    window: int
    workflow: str
    step: str


class Count(msgspec.Struct, array_like=True):
    """A row that counts. ``latencies``: how many took as long as each of `BUCKETS` says, and longer than the last.

    A run's latency is from its creation to its end; a step's from its call to its result, retries included.
    """

    offset: int = -1
    started: int = 0
    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    retried: int = 0
    blocked: int = 0
    milliseconds: int = 0
    latencies: list[int] = msgspec.field(default_factory=lambda: [0] * (len(BUCKETS) + 1))

    def took(self, milliseconds: int) -> None:
        """Something ended that took so long."""
        self.latencies[bisect_left(BUCKETS, milliseconds)] += 1
        self.milliseconds += milliseconds

    def add(self, other: Count) -> None:
        """Counts what another row has counted, too."""
        for name in ("started", "completed", "failed", "cancelled", "retried", "blocked", "milliseconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.latencies = [a + b for a, b in zip(self.latencies, other.latencies, strict=True)]

    def percentile(self, share: float) -> float | None:
        """The latency in milliseconds that this share of all stays below, as even within a bucket; None: there are none."""
        wanted = share * sum(self.latencies)
        if not wanted:
            return None
        below = 0
        for n, there in enumerate(self.latencies):
            if below + there >= wanted:
                low = BUCKETS[n - 1] if n else 0
                high = BUCKETS[n] if n < len(BUCKETS) else low
                return low + (high - low) * (wanted - below) / there
            below += there
        raise AssertionError("a share above 1")


class _Run(msgspec.Struct, array_like=True):
    """A run that goes on: since when, and its open steps by correlation ID, each with its name and since when."""

    offset: int
    workflow: str
    created_at: int
    steps: dict[str, tuple[str, int]] = {}


_key_encoder = msgspec.msgpack.Encoder()
_keys = msgspec.msgpack.Decoder(Key)
_counts = msgspec.msgpack.Decoder(Count)
_runs = msgspec.msgpack.Decoder(_Run)
_RUN = b"run|"


def count(rows: Rows, partition: int, offset: int, event: Event) -> None:
    """Counts an event that was found at this place."""
    if isinstance(event.data, ev.TokenClaimed | ev.TokenReleased):
        return
    name = _RUN + event.run_id.encode()
    if isinstance(event.data, ev.RunCreated):
        run = _Run(offset, event.data.workflow, event.at)
    elif (found := rows.get(name)) is not None:
        run = _runs.decode(found)
    else:  # it ended, and this event comes again; or its beginning is gone
        return
    table = _Table(rows, partition, offset, event.at, run.workflow)
    over = _apply(table, run, event)
    if over:
        if name in rows:
            del rows[name]
    elif run.offset <= offset:
        run.offset = offset
        rows[name] = _key_encoder.encode(run)


def _apply(table: _Table, run: _Run, event: Event) -> bool:
    """Changes the rows that count, then the run itself. Whether it has ended."""
    step = run.steps.get(event.correlation_id or "")
    match event.data:
        case ev.RunCreated():
            table.bump("", "started")
        case ev.RunCompleted():
            table.bump("", "completed", event.at - run.created_at)
            return True
        case ev.RunFailed():
            table.bump("", "failed", event.at - run.created_at)
            return True
        case ev.RunCancelled():
            table.bump("", "cancelled", event.at - run.created_at)
            return True
        case ev.RunBlocked():
            table.bump("", "blocked")
        case ev.StepCreated(step=called):
            table.bump(called, "started")
            run.steps = {**run.steps, event.correlation_id or "": (called, event.at)}
        case ev.StepRetrying() if step is not None:
            table.bump(step[0], "retried")
        case ev.StepCompleted() if step is not None:
            table.bump(step[0], "completed", event.at - step[1])
            del run.steps[event.correlation_id or ""]
        case ev.StepFailed() if step is not None:
            table.bump(step[0], "failed", event.at - step[1])
            del run.steps[event.correlation_id or ""]
        case ev.StepCancelled() if step is not None:
            table.bump(step[0], "cancelled")
            del run.steps[event.correlation_id or ""]
    return False


class _Table:
    """The rows that one event may change."""

    def __init__(self, rows: Rows, partition: int, offset: int, at: int, workflow: str) -> None:
        self._rows = rows
        self._partition = partition
        self._offset = offset
        self._windows = (at // MINUTE * MINUTE, TOTAL)
        self._workflow = workflow

    def bump(self, step: str, what: str, milliseconds: int | None = None) -> None:
        """One more of something, in its minute and in all."""
        for window in self._windows:
            name = _key_encoder.encode(Key(self._partition, window, self._workflow, step))
            found = self._rows.get(name)
            row = Count() if found is None else _counts.decode(found)
            if row.offset >= self._offset:
                continue
            row.offset = self._offset
            setattr(row, what, getattr(row, what) + 1)
            if milliseconds is not None:
                row.took(max(0, milliseconds))
            self._rows[name] = _key_encoder.encode(row)


def counts(rows: Iterable[tuple[bytes, bytes | None]]) -> Iterator[tuple[Key, Count]]:
    """The rows that count, among all."""
    for name, row in rows:
        if row is not None and not name.startswith(_RUN):
            yield _keys.decode(name), _counts.decode(row)


def expire(rows: Rows, partition: int, before: int) -> None:
    """Drops a partition's minutes that began before an instant."""
    for key, _ in list(counts(list(rows.items()))):
        if key.partition == partition and TOTAL < key.window < before:
            del rows[_key_encoder.encode(key)]
