"""What happened in a run, as rows on a common axis of time: a fold over its log."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from durably_schemas import events as ev

if TYPE_CHECKING:
    from collections.abc import Iterable

    from durably_schemas.records import Error, Event

_TICKS = 4  # parts of the axis
_LEAST = 0.35  # percent of the axis; what is shorter could not be seen


@dataclass(slots=True)
class Bar:
    """A piece of a row. ``kind`` is its colour; ``until`` is None where it goes on."""

    kind: str
    says: str
    since: int
    until: int | None = None


@dataclass(slots=True)
class Row:
    """A step, wait, hook, webhook or child. ``until`` is None where it is open.

    ``values`` are pairs of a title and a payload, in their order; ``marks`` are instants at which data arrived.
    """

    kind: str
    id: str
    name: str
    state: str
    since: int
    until: int | None = None
    attempts: int = 0
    note: str = ""
    due: int | None = None
    child: str = ""
    error: Error | None = None
    bars: list[Bar] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    values: list[tuple[str, Any]] = field(default_factory=list)

    def turn(self, kind: str, says: str, at: int) -> None:
        """Another bar begins where the last one ends."""
        self._end(at)
        self.bars.append(Bar(kind, says, at))

    def close(self, state: str, at: int) -> None:
        """It is over."""
        self.state, self.until = state, at
        self._end(at)

    def _end(self, at: int) -> None:
        if self.bars and self.bars[-1].until is None:
            self.bars[-1].until = at


class Timeline:
    """The rows of a run, from its events. ``end`` is None while it goes on."""

    def __init__(self, events: Iterable[Event]) -> None:
        self.rows: list[Row] = []
        self.streams: dict[str, int] = {}
        self.blocked: ev.RunBlocked | None = None
        self.input: ev.RunCreated | None = None
        self.result: ev.RunCompleted | None = None
        self.begin: int | None = None
        self.end: int | None = None
        self._of: dict[str, Row] = {}
        for event in events:
            self._take(event)
        if self.end is not None:  # what the run left open is of no more consequence
            for row in self.rows:
                if row.until is None:
                    row.close("dropped", self.end)

    def axis(self, now: int) -> Axis:
        """What the rows are drawn on, at this instant."""
        begin = now if self.begin is None else self.begin
        return Axis(begin, max(begin + 1, now if self.end is None else self.end))

    def _take(self, event: Event) -> None:
        of, at = event.correlation_id or "", event.at
        if self.begin is None:
            self.begin = at
        match event.data:
            case ev.RunCreated() as created:
                self.input = created
            case ev.RunCompleted() as completed:
                self.result, self.end = completed, at
            case ev.RunFailed() | ev.RunCancelled():
                self.end = at
            case ev.RunBlocked() as blocked:
                self.blocked = blocked
            case ev.RunUnblocked():
                self.blocked = None
            case ev.StepCreated(step=step, queue=queue, input=given):
                row = self._add(Row("step", of, step, "scheduled", at, values=[("Input", given)]))
                row.note = "" if queue == "default" else f"queue {queue}"
                row.turn("queued", "waits for a worker, or runs", at)
            case ev.WaitCreated(due_at=due):
                row = self._add(Row("wait", of, "sleep", "waiting", at, due=due))
                row.turn("wait", "waits", at)
            case ev.HookCreated(token=token, webhook=webhook, metadata=metadata):
                row = self._add(Row("webhook" if webhook else "hook", of, token, "open", at))
                row.turn("hook", "waits for data", at)
                if metadata is not None:
                    row.values.append(("Metadata", metadata))
            case ev.ChildCreated(child_run_id=child, workflow=workflow, input=given):
                row = self._add(Row("child", of, workflow or "run", "running", at, child=child))
                row.turn("child", f"run {child}", at)
                row.values.append(("Input", given))
            case _ if (found := self._of.get(of)) is not None:
                self._further(found, event)

    def _add(self, row: Row) -> Row:
        self.rows.append(row)
        self._of[row.id] = row
        return row

    def _further(self, row: Row, event: Event) -> None:
        at = event.at
        match event.data:
            case ev.StepStarted(attempt=attempt, worker=worker, started_at=started):
                row.attempts, row.state = attempt, "running"
                row.note = f"on {worker}"
                row.turn("running", f"attempt {attempt} on {worker}", min(max(started, row.bars[-1].since), at))
            case ev.StepScheduled(attempt=attempt):
                row.state = "scheduled"
                row.turn("queued", f"attempt {attempt} waits for a worker, or runs", at)
            case ev.StepRetrying(attempt=attempt, error=error):
                row.attempts, row.state, row.error = attempt - 1, "retrying", error
                row.bars[-1].kind = "failed"
                row.turn("backoff", f"waits for attempt {attempt}", at)
            case ev.StepCompleted(attempt=attempt, result=result, streams=streams):
                row.attempts, row.error = attempt, None
                row.bars[-1].kind = "completed"
                row.values.append(("Result", result))
                row.close("completed", at)
                for written in streams:
                    self.streams[written.namespace] = self.streams.get(written.namespace, 0) + written.chunks
            case ev.StepFailed(attempt=attempt, error=error):
                row.attempts, row.error = attempt, error
                row.bars[-1].kind = "failed"
                row.close("failed", at)
            case ev.StepCancelled():
                row.close("cancelled", at)
            case ev.WaitCompleted(cancelled=cancelled):
                row.close("dropped" if cancelled else "completed", at)
            case ev.HookReceived(payload=payload):
                row.state = "received"
                row.marks.append(at)
                row.values.append((f"Payload {len(row.marks)}", payload))
            case ev.HookConflict(holder_run_id=holder):
                row.note = f"held by run {holder}"
                row.close("refused", at)
            case ev.HookDisposed():
                row.close("closed", at)
            case ev.ChildCompleted(status=status, result=result, error=error):
                row.error = error
                row.bars[-1].kind = status
                if result is not None:
                    row.values.append(("Result", result))
                row.close(status, at)


@dataclass(frozen=True, slots=True)
class Axis:
    """Time, from left to right: instants become percent of the width."""

    begin: int
    end: int

    def at(self, instant: int) -> float:
        """Where an instant is, within 0 and 100."""
        return round(min(100.0, max(0.0, 100 * (instant - self.begin) / (self.end - self.begin))), 3)

    def span(self, since: int, until: int | None) -> tuple[float, float]:
        """Where a bar begins, and how wide it is; so that it can be seen, and does not stand out at the right."""
        left, right = self.at(since), 100.0 if until is None else self.at(until)
        width = max(_LEAST, right - left)
        return round(min(left, 100 - width), 3), round(width, 3)

    def ticks(self) -> list[tuple[float, int]]:
        """Marks of the axis: where, and how many milliseconds from the beginning."""
        return [(100 * n / _TICKS, (self.end - self.begin) * n // _TICKS) for n in range(_TICKS + 1)]
