"""The figures on disk: a table for people, and one line of JSON for each time that they were measured."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent
PACKAGES = ("durably", "confluent-kafka", "rocksdict", "fastavro", "msgspec")


class Figure(NamedTuple):
    """One measured value. ``group`` is floor, kafka or embedded."""

    group: str
    what: str
    value: float
    unit: str


TITLES = {
    "floor": "The broker alone",
    "kafka": "durably on Kafka: one processor, one worker, one client",
    "embedded": "durably on the embedded broker: `durably dev` and one client",
}


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def load() -> str:
    """Runnable processes, averaged over the last minute; more than a few tenths before means a machine that is busy."""
    return f"{os.getloadavg()[0]:.2f}"


def conditions(broker: str) -> dict[str, str]:
    """What else a reader must know to compare the figures with other ones."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(time.time())),
        "machine": f"{os.cpu_count()} cores, {_cpu()}; broker, processes and client share them",
        "load before": load(),
        "python": platform.python_version(),
        "broker": broker,
        "packages": ", ".join(f"{name} {version(name)}" for name in PACKAGES),
    }


def write(figures: list[Figure], where: dict[str, str]) -> None:
    """Replaces the table, and appends to the history."""
    with (FOLDER / "history.jsonl").open("a") as history:
        history.write(json.dumps({"conditions": where, "figures": [figure._asdict() for figure in figures]}) + "\n")
    lines = ["# Figures", "", "Written by `make bench`; `history.jsonl` has those of earlier times.", ""]
    lines += ["| condition | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in where.items())]
    for group, title in TITLES.items():
        rows = [figure for figure in figures if figure.group == group]
        if rows:
            lines += ["", f"## {title}", "", "| what | value |", "| --- | ---: |"]
            lines += [f"| {figure.what} | {text(figure)} |" for figure in rows]
    lines += ["", "## Ratios", "", "| what | value |", "| --- | ---: |", *ratios(figures)]
    lines += ["", (FOLDER / "notes.md").read_text().rstrip()]
    (FOLDER / "README.md").write_text("\n".join(lines) + "\n")


def ratios(figures: list[Figure]) -> list[str]:
    """What can be compared between machines: figures of one run against each other."""

    def value(group: str, beginning: str) -> float:
        return next(f.value for f in figures if f.group == group and f.what.startswith(beginning))

    step, floor = value("kafka", "sequential"), value("floor", "two hops")
    rows = [
        ("a sequential step on Kafka, against two hops (at most 2)", step / floor),
        ("an event late in a run of 10,000 against an early one, on Kafka (at most 1.2)", _growth("kafka", value)),
        ("the same, embedded", _growth("embedded", value)),
        ("a sequential step on Kafka against one embedded (at least 5)", step / value("embedded", "sequential")),
    ]
    return [f"| {what} | {ratio:.2f} |" for what, ratio in rows]


def _growth(group: str, value: Callable[[str, str], float]) -> float:
    return value(group, "per event, last") / value(group, "per event, first")


def text(figure: Figure) -> str:
    """The value with as many digits as it is worth."""
    digits = 2 if figure.value < 100 else 0
    return f"{figure.value:,.{digits}f} {figure.unit}"
