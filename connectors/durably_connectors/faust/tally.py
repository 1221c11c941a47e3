"""What a monitor counts, as rows of a table: pure, so that a redelivered event is seen not to count twice.

The rows of one partition come of its events alone, and each that counts carries the offset of the last event that changed
it: one with a lower or the same offset changes it no more. An event changes the rows that count, then the row of its step,
then the row of its run, and a changelog keeps that order; so whatever of a changelog has survived, reading on from an
earlier event gives what reading once would have given.
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
    """A run that goes on: since when, and how many rows there are of its steps, at most."""

    offset: int
    workflow: str
    created_at: int
    steps: int = 0


class _Step(msgspec.Struct, array_like=True):
    """A step that was called and has not ended."""

    name: str
    created_at: int


_encoder = msgspec.msgpack.Encoder()
_keys = msgspec.msgpack.Decoder(Key)
_counts = msgspec.msgpack.Decoder(Count)
_runs = msgspec.msgpack.Decoder(_Run)
_steps = msgspec.msgpack.Decoder(_Step)
_RUN = b"run|"
_STEP = b"|"  # stands between a run's ID and that of its step; no run's ID has it


def count(rows: Rows, partition: int, offset: int, event: Event) -> None:
    """Counts an event that was found at this place."""
    if isinstance(event.data, ev.TokenClaimed | ev.TokenReleased):
        return
    name = _RUN + event.run_id.encode()
    found = rows.get(name)
    run = None if found is None else _runs.decode(found)
    if isinstance(event.data, ev.RunCreated) and (run is None or run.offset < offset):
        run = _Run(-1, event.data.workflow, event.at)
    if run is None:  # it ended, and this event comes again; or its beginning is gone
        return
    table = _Table(rows, partition, offset, event.at, run.workflow)
    if _of_run(table, run, event):
        if run.steps:
            for of_step in [key for key, _ in rows.items() if key.startswith(name + _STEP)]:
                del rows[of_step]
        if found is not None:
            del rows[name]
        return
    more = _of_step(table, name + _STEP + (event.correlation_id or "").encode(), event)
    if run.offset < offset:
        run.offset = offset
        run.steps += more
        rows[name] = _encoder.encode(run)


def _of_run(table: _Table, run: _Run, event: Event) -> bool:
    """Counts what became of a run. Whether it has ended."""
    match event.data:
        case ev.RunCreated():
            table.bump("", "started")
        case ev.RunBlocked():
            table.bump("", "blocked")
        case ev.RunCompleted():
            table.bump("", "completed", event.at - run.created_at)
            return True
        case ev.RunFailed():
            table.bump("", "failed", event.at - run.created_at)
            return True
        case ev.RunCancelled():
            table.bump("", "cancelled", event.at - run.created_at)
            return True
    return False


def _of_step(table: _Table, name: bytes, event: Event) -> int:
    """Counts what became of a step, which has this row while it is open. How many rows there are more."""
    rows = table.rows
    if isinstance(event.data, ev.StepCreated):
        table.bump(event.data.step, "started")
        rows[name] = _encoder.encode(_Step(event.data.step, event.at))
        return 1
    found = rows.get(name)
    if found is None:
        return 0
    step = _steps.decode(found)
    match event.data:
        case ev.StepRetrying():
            table.bump(step.name, "retried")
            return 0
        case ev.StepCompleted():
            table.bump(step.name, "completed", event.at - step.created_at)
        case ev.StepFailed():
            table.bump(step.name, "failed", event.at - step.created_at)
        case ev.StepCancelled():
            table.bump(step.name, "cancelled")
        case _:
            return 0
    del rows[name]
    return -1


class _Table:
    """The rows that one event may change."""

    def __init__(self, rows: Rows, partition: int, offset: int, at: int, workflow: str) -> None:
        self.rows = rows
        self._partition = partition
        self._offset = offset
        self._windows = (at // MINUTE * MINUTE, TOTAL)
        self._workflow = workflow

    def bump(self, step: str, what: str, milliseconds: int | None = None) -> None:
        """One more of something, in its minute and in all."""
        for window in self._windows:
            name = _encoder.encode(Key(self._partition, window, self._workflow, step))
            found = self.rows.get(name)
            row = Count() if found is None else _counts.decode(found)
            if row.offset >= self._offset:
                continue
            row.offset = self._offset
            setattr(row, what, getattr(row, what) + 1)
            if milliseconds is not None:
                row.took(max(0, milliseconds))
            self.rows[name] = _encoder.encode(row)


def counts(rows: Iterable[tuple[bytes, bytes | None]]) -> Iterator[tuple[Key, Count]]:
    """The rows that count, among all."""
    for name, row in rows:
        if row is not None and not name.startswith(_RUN):
            yield _keys.decode(name), _counts.decode(row)


def expire(rows: Rows, partition: int, before: int) -> None:
    """Drops a partition's minutes that began before an instant."""
    for key, _ in list(counts(list(rows.items()))):
        if key.partition == partition and TOTAL < key.window < before:
            del rows[_encoder.encode(key)]
