"""Plots as numbers: what the templates draw as SVG."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from durably_connectors.http.projection import Count, Took

SLOTS = 48
"""Parts that the time of a plot is cut into."""
WINDOWS = {"1h": 3_600_000, "24h": 86_400_000, "7d": 7 * 86_400_000, "30d": 30 * 86_400_000}
"""How far back plots may reach, in milliseconds."""
STACK = ("completed", "running", "pending", "blocked", "cancelled", "failed")
"""The statuses, from the bottom of a column to its top."""


class Piece(NamedTuple):
    """A status within a column: where it begins, counted from the top, and how high it is; in percent of the plot."""

    status: str
    y: float
    height: float
    runs: int


class Column(NamedTuple):
    """One part of the time: where it begins, and what was created in it."""

    x: float
    since: int
    runs: int
    pieces: Sequence[Piece]


class Line(NamedTuple):
    """Durations over the time: the points of a polyline as SVG wants them, by a width and a height of 100 each."""

    name: str
    points: str


class Latency(NamedTuple):
    """Lines below each other, and the duration in milliseconds at the top of the plot."""

    lines: Sequence[Line]
    top: float


def columns(counts: Iterable[Count], since: int, slot: int) -> tuple[list[Column], int]:
    """Runs created over time, stacked by status; and how many there are in the highest column."""
    by_slot: dict[int, dict[str, int]] = {}
    for count in counts:
        statuses = by_slot.setdefault(min(count.slot, SLOTS - 1), {})
        statuses[count.status] = statuses.get(count.status, 0) + count.runs
    top = max((sum(statuses.values()) for statuses in by_slot.values()), default=0)
    found = []
    for number, statuses in sorted(by_slot.items()):
        y, pieces = 100.0, []
        for status in STACK:
            if runs := statuses.get(status, 0):
                height = 100 * runs / top
                y -= height
                pieces.append(Piece(status, round(y, 3), round(height, 3), runs))
        found.append(Column(100 * number / SLOTS, since + number * slot, sum(statuses.values()), pieces))
    return found, top


def percentile(values: Sequence[int], percent: float) -> int | None:
    """The least of the sorted values that so many percent do not exceed; None of nothing.

    >>> percentile([1, 2, 3, 4], 50), percentile([1, 2, 3, 4], 95), percentile([], 50)
    (2, 4, None)
    """
    return values[max(0, math.ceil(len(values) * percent / 100) - 1)] if values else None


def latency(took: Iterable[Took], since: int, slot: int, percents: Sequence[int]) -> Latency:
    """How long runs took that were created in each part of the time, one line for each of the percents."""
    by_slot: dict[int, list[int]] = {}
    for run in took:
        by_slot.setdefault(min((run.created_at - since) // slot, SLOTS - 1), []).append(run.ran)
    for durations in by_slot.values():
        durations.sort()
    heights = {
        percent: [(number, percentile(durations, percent) or 0) for number, durations in sorted(by_slot.items())]
        for percent in percents
    }
    top = max((height for points in heights.values() for _, height in points), default=0)
    lines = [
        Line(
            f"p{percent}",
            " ".join(f"{100 * (n + 0.5) / SLOTS:.2f},{100 - 100 * h / (top or 1):.2f}" for n, h in points),
        )
        for percent, points in heights.items()
    ]
    return Latency(lines, top)
