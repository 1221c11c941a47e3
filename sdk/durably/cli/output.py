"""How records look on a terminal, and as JSON."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

from durably_schemas.records import Error
from rich.table import Table
from rich.text import Text

from durably import failures, jsonable
from durably.jsonable import plain

if TYPE_CHECKING:
    from collections.abc import Iterable

    from durably_schemas.records import Event, Hook, RunSummary

COLOURS = {
    "pending": "yellow", "running": "cyan", "blocked": "magenta", "completed": "green", "failed": "red",
    "cancelled": "bright_black",
}  # fmt: skip


def to_json(value: Any) -> str:
    """JSON of records and user values alike, as text."""
    return jsonable.to_json(value).decode()


def instant(ms: int | None) -> str:
    """An instant in local time, to the second."""
    return "" if ms is None else datetime.fromtimestamp(ms / 1000).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def length(ms: int | None) -> str:
    """A length of time, to three digits or so."""
    if ms is None:
        return ""
    if ms < 1000:
        return f"{ms} ms"
    if ms < 60_000:
        return f"{ms / 1000:.2f} s"
    minutes, seconds = divmod(ms // 1000, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = ((days, "d"), (hours, "h"), (minutes, "min"), (seconds, "s"))
    return " ".join(f"{n} {unit}" for n, unit in parts if n)


def status(name: str) -> Text:
    """A status in its colour."""
    return Text(name, style=COLOURS.get(name, ""))


def cut(text: str, at: int = 80) -> str:
    """A text that fits a cell."""
    text = " ".join(text.split())
    return text if len(text) <= at else f"{text[: at - 1]}…"


def error_line(error: Error | None) -> str:
    """An error on one line: its class and message."""
    return "" if error is None else failures.summed_up(error)


def runs_table(runs: Iterable[RunSummary]) -> Table:
    """Runs, one on each line."""
    table = Table("run", "workflow", "status", "created", "took", "attributes", "error", box=None, pad_edge=False)
    for column in (0, 2, 3, 4):
        table.columns[column].no_wrap = True
    for run in runs:
        took = None if run.completed_at is None else run.completed_at - run.created_at
        attributes = " ".join(f"{k}={v}" for k, v in run.attributes.items())
        table.add_row(
            Text(run.run_id), Text(run.workflow), status(run.status), instant(run.created_at), length(took),
            Text(cut(attributes)), Text(cut(error_line(run.error))),
        )  # fmt: skip
    return table


def run_table(run: RunSummary) -> Table:
    """One run, one field on each line."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("run", Text(run.run_id))
    table.add_row("workflow", Text(run.workflow))
    table.add_row("status", status(run.status))
    table.add_row("created", instant(run.created_at))
    for name, ms in (("started", run.started_at), ("ended", run.completed_at)):
        if ms is not None:
            table.add_row(name, f"{instant(ms)}  (+{length(ms - run.created_at)})")
    table.add_row("events", str(run.events))
    if run.parent is not None:
        table.add_row("parent", Text(run.parent.run_id))
    for token in run.hooks:
        table.add_row("hook", Text(token))
    for key, value in run.attributes.items():
        table.add_row("attribute", Text(f"{key}={value}"))
    if run.code_version is not None:
        table.add_row("code", run.code_version)
    if run.version is not None:
        table.add_row("version", str(run.version))
    if run.build is not None:
        table.add_row("build", Text(run.build))
    if run.origin is not None:
        kept = f"  (its first {run.origin.events} events)" if run.origin.events else ""
        table.add_row("origin", Text(f"{run.origin.run_id}{kept}"))
    if run.error is not None:
        table.add_row("error", Text(error_line(run.error), style="red"))
    return table


def hooks_table(hooks: Iterable[Hook]) -> Table:
    """Open hooks, one on each line."""
    table = Table("token", "kind", "run", "created", "received", "metadata", box=None, pad_edge=False)
    table.columns[0].overflow = table.columns[2].overflow = "fold"
    for hook in hooks:
        table.add_row(
            Text(hook.token), _kind(hook), Text(hook.run_id), instant(hook.created_at), str(hook.received),
            Text("" if hook.metadata is None else cut(to_json(hook.metadata))),
        )  # fmt: skip
    return table


def hook_table(hook: Hook) -> Table:
    """One hook, one field on each line."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("token", Text(hook.token))
    table.add_row("kind", _kind(hook))
    table.add_row("run", Text(hook.run_id))
    table.add_row("hook", Text(hook.hook_id))
    table.add_row("created", instant(hook.created_at))
    table.add_row("received", str(hook.received))
    if hook.webhook:
        table.add_row("answers", Text("202" if hook.response is None else to_json(hook.response)))
    if hook.metadata is not None:
        table.add_row("metadata", Text(to_json(hook.metadata)))
    return table


def _kind(hook: Hook) -> str:
    return "webhook" if hook.webhook else "hook"


def events_table(events: Iterable[Event]) -> Table:
    """A run's log, one event on each line."""
    table = Table("seq", "at", "event", "of", "data", box=None, pad_edge=False)
    for event in events:
        data = {name: value for name, value in plain(event.data).items() if value not in (None, {}, [], ())}
        table.add_row(
            str(event.seq), instant(event.at), event.type, Text(event.correlation_id or ""),
            Text(cut(to_json(data), 120)),
        )  # fmt: skip
    return table
