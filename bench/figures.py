"""What a measurement yields. Standard library only: the peers' environments import it too."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """One measured value.

    Attributes:
        group: the system that it is of (``kafka``, ``dbos-sqlite``, …), else ``floor`` or `SCALE`.
        what: what was measured and on how much work. It begins as in `MEASURES` where all systems have it.
    """

    group: str
    what: str
    value: float
    unit: str


@dataclass(frozen=True)
class Curve:
    """Values over something else: two lists of equal length, in ascending order of ``x``."""

    group: str
    what: str
    x: list[float]
    y: list[float]
    x_unit: str
    y_unit: str


@dataclass(frozen=True)
class System:
    """What a reader must know of a system to weigh its figures.

    Attributes:
        title: its name, and how its steps run.
        versions: of its packages and servers.
        durability: what has happened to a step's result before the next step begins.
        notes: where its set-up differs from what its makers recommend, or from the other systems'.
    """

    title: str
    versions: str
    durability: str
    notes: str


SCALE = "scale"  # the group of figures about other arrangements of an installation
STEP = "sequential step"
SHORT_P50 = "run of 3 steps, start to result, one at a time, p50"
SHORT_P99 = "run of 3 steps, start to result, one at a time, p99"
THROUGHPUT = "throughput"
CPU = "CPU of"
MEASURES = {
    STEP: "sequential step, p50",
    SHORT_P50: "run of 3 steps, p50",
    SHORT_P99: "run of 3 steps, p99",
    THROUGHPUT: "throughput",
    CPU: "CPU, all processes",
}


def text(value: float, unit: str) -> str:
    """The value with as many digits as it is worth."""
    return f"{value:,.{2 if value < 100 else 0}f} {unit}"
