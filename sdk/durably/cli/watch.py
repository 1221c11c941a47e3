"""The live view of one run: a fold over its events, and how that looks."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from durably_schemas import events as ev
from rich.console import Group
from rich.table import Table
from rich.text import Text

from durably.cli.output import cut, error_line, instant, length, status, to_json

if TYPE_CHECKING:
    from durably_schemas.records import Event
    from rich.console import RenderableType

SHOWN = 40  # how many rows a terminal is given; of more, the latest


@dataclass(slots=True)
class Row:
    """A step, wait, hook or child of the run. ``since`` and ``until`` bound its duration; an open one has no end."""

    kind: str
    name: str
    state: str
    since: int
    until: int | None = None
    attempts: int = 0
    note: str = ""

    def close(self, state: str, at: int, note: str = "") -> None:
        """It is over."""
        self.state, self.until, self.note = state, at, note


class RunView:
    """What is known of a run after some of its events."""

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        self.workflow = ""
        self.status = "pending"
        self.outcome = ""
        self.created_at: int | None = None
        self.ended_at: int | None = None
        self.events = 0
        self.rows: dict[str, Row] = {}
        self.streams: dict[str, int] = {}

    def take(self, event: Event) -> None:
        """The next event of the log."""
        self.events = event.seq
        if not self._of_the_run(event):
            self._of_a_part(event)

    def _of_the_run(self, event: Event) -> bool:
        match event.data:
            case ev.RunCreated(workflow=workflow):
                self.workflow, self.created_at = workflow, event.at
            case ev.RunStarted() | ev.RunUnblocked():
                self.status, self.outcome = "running", ""
            case ev.RunCompleted(result=result):
                self._end("completed", event.at, to_json(result))
            case ev.RunFailed(error=error):
                self._end("failed", event.at, error_line(error))
            case ev.RunCancelled(reason=reason):
                self._end("cancelled", event.at, reason or "")
            case ev.RunCancelling(reason=reason):
                self.outcome = f"cancelling: {reason}" if reason else "cancelling"
            case ev.RunBlocked(error=error):
                self.status, self.outcome = "blocked", error_line(error)
            case _:
                return False
        return True

    def _of_a_part(self, event: Event) -> None:
        of = event.correlation_id or ""
        row = self.rows.get(of)
        match event.data:
            case ev.StepCreated(step=step, queue=queue):
                self.rows[of] = Row("step", step, "waiting", event.at, note="" if queue == "default" else f"on {queue}")
            case ev.WaitCreated(due_at=due_at):
                self.rows[of] = Row("wait", f"until {instant(due_at)}", "waiting", event.at)
            case ev.HookCreated(token=token, webhook=webhook):
                self.rows[of] = Row("webhook" if webhook else "hook", token, "open", event.at)
            case ev.ChildCreated(child_run_id=child, workflow=workflow):
                self.rows[of] = Row("child", f"{workflow} {child}", "running", event.at)
            case _ if row is not None:
                self._further(row, event)

    def _further(self, row: Row, event: Event) -> None:
        match event.data:
            case ev.StepStarted(attempt=attempt, worker=worker):
                row.attempts, row.state, row.note = attempt, "running", f"by {worker}"
            case ev.StepRetrying(attempt=attempt, error=error):
                row.attempts, row.state = attempt - 1, "retrying"
                row.note = error_line(error)
            case ev.StepCompleted(attempt=attempt, result=result, streams=streams):
                row.attempts = attempt
                row.close("completed", event.at, to_json(result))
                for written in streams:
                    self.streams[written.namespace] = self.streams.get(written.namespace, 0) + written.chunks
            case ev.StepFailed(attempt=attempt, error=error):
                row.attempts = attempt
                row.close("failed", event.at, error_line(error))
            case ev.WaitCompleted(cancelled=cancelled):
                row.close("dropped" if cancelled else "completed", event.at)
            case ev.HookReceived(payload=payload):
                row.attempts += 1
                row.state, row.note = "received", to_json(payload)
            case ev.HookConflict(holder_run_id=holder):
                row.close("refused", event.at, f"held by {holder}")
            case ev.HookDisposed():
                row.close("closed", event.at, row.note)
            case ev.ChildCompleted(status=ended, error=error):
                row.close(ended, event.at, error_line(error))
            case _:
                pass

    def _end(self, name: str, at: int, outcome: str) -> None:
        self.status, self.ended_at, self.outcome = name, at, outcome
        for row in self.rows.values():
            if row.until is None:
                row.close("dropped", at, row.note)

    def render(self, now: int | None = None) -> RenderableType:
        """How it looks at an instant."""
        now = time.time_ns() // 1_000_000 if now is None else now
        head = Text.assemble(
            (self.run_id, "bold"), "  ", self.workflow, "  ", status(self.status),
            f"  {self.events} events",
            "" if self.created_at is None else f"  {length(max(0, (self.ended_at or now) - self.created_at))}",
        )  # fmt: skip
        table = Table("", "name", "state", "tries", "took", "", box=None, pad_edge=False)
        rows = list(self.rows.values())
        for row in rows[-SHOWN:]:
            took = length(max(0, (row.until or now) - row.since))
            tries = str(row.attempts) if row.attempts else ""
            table.add_row(row.kind, Text(cut(row.name, 60)), status(row.state), tries, took, Text(cut(row.note, 60)))
        parts: list[RenderableType] = [head]
        if len(rows) > SHOWN:
            parts.append(Text(f"… {len(rows) - SHOWN} earlier ones", style="dim"))
        if rows:
            parts.append(table)
        parts += [Text(f"stream {name}: {chunks} chunks") for name, chunks in self.streams.items()]
        if self.outcome:
            parts.append(Text(self.outcome, style="red" if self.status in ("failed", "blocked") else ""))
        return Group(*parts)
