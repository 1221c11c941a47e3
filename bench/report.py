"""``bench/README.md``: the figures of a session for people, and what has become of the ratios over time."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path

import history
import plots
from figures import CPU, MEASURES, SCALE, STEP, THROUGHPUT, text
from history import Session
from length import FIRST, LAST

FOLDER = Path(__file__).parent
PACKAGES = ("durably", "confluent-kafka", "rocksdict", "fastavro", "msgspec")
UNITS = {STEP: "ms", THROUGHPUT: "steps/s", CPU: "µs/step"}
TITLES = {
    "floor": "The broker alone",
    "kafka": "durably on Kafka",
    "kafka-fsync": "durably on Kafka, fsynced",
    "embedded": "durably on the embedded broker",
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
        "machine": f"{os.cpu_count()} cores, {_cpu()}; servers, workers and clients share them",
        "load before": load(),
        "python": platform.python_version(),
        "broker": broker,
        "packages": ", ".join(f"{name} {version(name)}" for name in PACKAGES),
    }


def write(session: Session) -> None:
    """Draws, and replaces the README."""
    pictures = set(plots.draw(session))
    (FOLDER / "README.md").write_text("\n".join(readme(session, history.read(), pictures)).rstrip() + "\n")


def readme(session: Session, sessions: list[Session], pictures: set[str]) -> Iterable[str]:
    """Its lines: a session's figures, the ratios of all sessions, and those pictures that there are."""
    yield from ("# Figures", "", "Written by `make bench`; `history.jsonl` has those of earlier times.", "")
    if session.note:
        yield from (f"Since the last time: {session.note}", "")
    yield from _table(("condition", ""), session.conditions.items())
    if session.systems:
        yield from ("", "## durably and its peers", "", _WORK, "")
        yield from _picture("systems", "Time of a step and throughput of each system", pictures)
        yield from _systems(session)
    for group, title in TITLES.items():
        rows = [(figure.what, text(figure.value, figure.unit)) for figure in session.figures if figure.group == group]
        if rows:
            yield from ("", f"## {title}", "", *_table(("what", "value"), rows, right=1))
    if growths := list(_growths(session)):
        yield from ("", "## The length of a log", "")
        yield from _picture("length", "Time per event over the place of the event in its run's log", pictures)
        yield from _table(("system", "first tenth", "last tenth", "ratio"), growths, right=3)
    if scaled := list(_scaled(session)):
        yield from ("", "## Partitions, processors and workers", "")
        yield from _picture("scale", "Throughput over the number of partitions", pictures)
        head = ("installation", "throughput", "CPU, all processes", "of it the broker")
        yield from _table(head, scaled, right=3)
    yield from (
        "",
        "## Ratios",
        "",
        "Between machines only ratios can be compared: figures of one session against each other.",
        "",
    )
    yield from _table(
        ("date", "what had changed", *RATIOS),
        (
            (one.conditions["date"], one.note, *(_ratio(of(one)) for of in RATIOS.values()))
            for one in reversed(sessions)
        ),
        right=len(RATIOS),
    )
    yield from ("", (FOLDER / "notes.md").read_text().rstrip())


_WORK = (
    "The same work for each, on one machine in one session: a run calls a step that does nothing, again and again, each "
    "after the one before. CPU is that of all processes together, the client's included."
)


def _systems(session: Session) -> Iterable[str]:
    def cell(group: str, measure: str) -> str:
        value = session.total(group, measure) if measure == CPU else session.value(group, measure)
        return "" if value is None else text(value, UNITS.get(measure, "ms"))

    yield from _table(
        ("system", *MEASURES.values()),
        ((system.title, *(cell(group, measure) for measure in MEASURES)) for group, system in session.systems.items()),
        right=len(MEASURES),
    )
    yield ""
    for group, system in session.systems.items():
        work = next(
            f.what.partition(", ")[2] for f in session.figures if f.group == group and f.what.startswith(THROUGHPUT)
        )
        yield f"- **{system.title}** ({system.versions}; {work}). Durability: {system.durability}. {system.notes}"
    for group, reason in session.missing.items():
        yield f"- **{group}** was not measured: {reason}"


def _growths(session: Session) -> Iterable[tuple[str, ...]]:
    for group, system in session.systems.items():
        first, last = session.value(group, FIRST), session.value(group, LAST)
        if first and last:
            yield system.title, text(first, "µs"), text(last, "µs"), f"{last / first:.2f}"


def _scaled(session: Session) -> Iterable[tuple[str, ...]]:
    for figure in session.figures:
        if figure.group == SCALE and figure.what.startswith(THROUGHPUT):
            where = figure.what.removeprefix(f"{THROUGHPUT}, ")
            cpu = {f.what: f.value for f in session.figures if f.group == SCALE and f.what.endswith(f", {where}")}
            del cpu[figure.what]
            broker = sum(value for what, value in cpu.items() if what.startswith(f"{CPU} the broker"))
            yield where, text(figure.value, "steps/s"), text(sum(cpu.values()), "µs/step"), text(broker, "µs/step")


def _quotient(over: tuple[str, str], under: tuple[str, str]) -> Callable[[Session], float | None]:
    def of(session: Session) -> float | None:
        above, below = session.value(*over), session.value(*under)
        return above / below if above and below else None

    return of


RATIOS = {
    "step on Kafka / two hops (at most 2)": _quotient(("kafka", STEP), ("floor", "two hops")),
    "step on Kafka / embedded (at least 5)": _quotient(("kafka", STEP), ("embedded", STEP)),
    "late event / early event, Kafka (at most 1.2)": _quotient(("kafka", LAST), ("kafka", FIRST)),
    "late event / early event, embedded (at most 1.2)": _quotient(("embedded", LAST), ("embedded", FIRST)),
    "step on Kafka / Restate's service call": _quotient(("kafka", STEP), ("restate-calls", STEP)),
    "steps/s on Kafka / Restate's service calls": _quotient(("kafka", THROUGHPUT), ("restate-calls", THROUGHPUT)),
    "steps/s on Kafka / DBOS on PostgreSQL": _quotient(("kafka", THROUGHPUT), ("dbos-postgres", THROUGHPUT)),
}


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]], right: int = 0) -> Iterable[str]:
    """A table of Markdown whose last columns, ``right`` of them, are numbers."""
    yield f"| {' | '.join(head)} |"
    yield f"|{' --- |' * (len(head) - right)}{' ---: |' * right}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _picture(name: str, words: str, pictures: set[str]) -> Iterable[str]:
    if name in pictures:
        yield from (f"![{words}](plots/{name}.svg)", "")
