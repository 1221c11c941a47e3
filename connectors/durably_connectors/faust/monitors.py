"""Monitors: what runs and steps do, by the minute and in all, as JSON and for Prometheus."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from durably.durations import Duration, milliseconds
from durably.errors import ConfigurationError
from durably_schemas.records import Event
from faust.exceptions import ConsumerNotStarted

from durably_connectors.faust.declared import declared
from durably_connectors.faust.tally import BUCKETS, MINUTE, TOTAL, Count, count, counts, expire

if TYPE_CHECKING:
    from durably_schemas import Catalogue

    from durably_connectors.faust.app import App
    from durably_connectors.faust.tally import Key, Rows

NAME = "monitor"
PATH = "/monitor"
METRICS = "/metrics"

Sums = dict[tuple[int, str, str], Count]
"""Counts by window, workflow and step, of all partitions together."""


def monitor(*, keep: Duration = "1h") -> None:
    """Declares that the process counts what runs and steps do: what started, completed, failed, was retried, how long it took.

    Served by the app's web server, of the partitions of ``events`` that this process has: ``/monitor`` is JSON, with the
    minutes and the totals; ``/metrics`` has the totals for Prometheus, which adds up several processes.

    Args:
        keep: how long minutes are kept; totals always are.

    Raises:
        ConfigurationError: less than a minute.
    """
    kept = milliseconds(keep)
    if kept < MINUTE:
        raise ConfigurationError(f"keep={keep!r} is less than a minute")
    declared.add(_Monitor(kept))


class _Monitor:
    name = NAME

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._swept: dict[int, int] = {}

    def topics(self, catalogue: Catalogue) -> list[str]:
        return [catalogue.events]

    def attach(self, app: App) -> None:
        events = app.catalogue.events
        table = app.table_of(NAME)

        async def watch(event: Any) -> None:
            if isinstance(event.value, Event):
                self._take(table, event)

        def sums() -> Sums:
            # What is of other partitions has been left behind when they went.
            mine: set[int] = set()
            with suppress(ConsumerNotStarted):
                mine = {tp.partition for tp in app.consumer.assignment() if tp.topic == events}
            since = round(time.time() * 1000) - self._keep
            found = counts(list(table.items()))
            return summed((k, c) for k, c in found if k.partition in mine and (k.window == TOTAL or k.window >= since))

        async def show_json(view: Any, request: Any) -> Any:  # noqa: ARG001 - as Faust calls it
            return view.json(as_json(sums()))

        async def show_metrics(view: Any, request: Any) -> Any:  # noqa: ARG001 - as Faust calls it
            return view.text(as_prometheus(sums()), content_type="text/plain")

        app.each(app.events)(watch)
        app.page(PATH, name=NAME)(show_json)
        app.page(METRICS, name="metrics")(show_metrics)

    def _take(self, rows: Rows, event: Any) -> None:
        partition = event.message.partition
        count(rows, partition, event.message.offset, event.value)
        minute = event.value.at // MINUTE
        if minute > self._swept.get(partition, 0):
            self._swept[partition] = minute
            expire(rows, partition, minute * MINUTE - self._keep)


def summed(rows: Iterable[tuple[Key, Count]]) -> Sums:
    """The counts of all partitions together."""
    sums: Sums = defaultdict(Count)
    for key, row in rows:
        sums[key.window, key.workflow, key.step].add(row)
    return sums


def as_json(sums: Sums) -> dict[str, Any]:
    """``{"minutes": […], "totals": […]}``: latencies in milliseconds, a minute as the instant when it began."""
    minutes, totals = [], []
    for (window, workflow, step), row in sorted(sums.items(), key=lambda item: item[0]):
        shown = {
            "workflow": workflow,
            "step": step or None,
            "started": row.started,
            "completed": row.completed,
            "failed": row.failed,
            "cancelled": row.cancelled,
            "retried": row.retried,
            "blocked": row.blocked,
            **{f"p{share}": row.percentile(share / 100) for share in (50, 90, 99)},
        }
        if window == TOTAL:
            totals.append(shown)
        else:
            minutes.append({"minute": window, **shown})
    return {"minutes": minutes, "totals": totals}


_KINDS = ("started", "completed", "failed", "cancelled", "retried", "blocked")


def as_prometheus(sums: Sums) -> str:
    """The totals in Prometheus' text format, version 0.0.4; latencies in seconds."""
    totals = sorted((key[1:], row) for key, row in sums.items() if key[0] == TOTAL)
    lines = []
    for what, steps in (("runs", False), ("steps", True)):
        chosen = [(_labels(workflow, step), row) for (workflow, step), row in totals if bool(step) == steps]
        for kind in _KINDS:
            lines.append(f"# TYPE durably_{what}_{kind}_total counter")
            lines += [f"durably_{what}_{kind}_total{{{labels}}} {getattr(row, kind)}" for labels, row in chosen]
        lines.append(f"# TYPE durably_{what}_seconds histogram")
        for labels, row in chosen:
            lines += _histogram(f"durably_{what}_seconds", labels, row)
    return "\n".join(lines) + "\n"


def _histogram(name: str, labels: str, row: Count) -> list[str]:
    lines, below = [], 0
    for bound, there in zip((*(f"{b / 1000:g}" for b in BUCKETS), "+Inf"), row.latencies, strict=True):
        below += there
        lines.append(f'{name}_bucket{{{labels},le="{bound}"}} {below}')
    return [*lines, f"{name}_sum{{{labels}}} {row.milliseconds / 1000:g}", f"{name}_count{{{labels}}} {below}"]


def _labels(workflow: str, step: str) -> str:
    pairs = {"workflow": workflow} | ({"step": step} if step else {})
    return ",".join(f'{name}="{_escaped(value)}"' for name, value in pairs.items())


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
