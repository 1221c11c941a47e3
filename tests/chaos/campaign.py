"""A whole chaos run: an installation under load, a schedule of faults, quiet, and the verdict."""

from __future__ import annotations

import sys
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import checker
from durably_schemas.records import TERMINAL
from fault_proxy import FaultProxy
from installation import SESSION, Installation

from chaos import history, verdict
from chaos.faults import Arena, Injected, Injector, Planned
from chaos.fleet import CLOCK, Fleet
from chaos.load import Load

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from kafka_cluster import KafkaCluster

WORKFLOWS = Path(__file__).with_name("workflows.py")
SABOTAGED = Path(__file__).with_name("sabotaged.py")
QUIET = 180.0
"""Seconds without the end of any run, after the last fault, for which one waits for the next."""
WARM = 20
"""Runs that must have ended before the first fault."""


@dataclass
class Report:
    """What came of a chaos run."""

    violations: list[str] = field(default_factory=list)
    table: list[tuple[str, str]] = field(default_factory=list)
    injected: list[Injected] = field(default_factory=list)
    take_overs: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.table)
        return "\n".join(f"{name:{width}}  {value}" for name, value in self.table)


def campaign(
    cluster: KafkaCluster,
    folder: Path,
    schedule: list[Planned],
    *,
    seed: int,
    runs: int,
    seconds: float,
    processors: int = 3,
    workers: int = 3,
    partitions: int = 6,
    in_flight: int = 300,
    at_once: int = 2,
    workflows: Path = WORKFLOWS,
    say: Callable[[str], None] = lambda _: None,
) -> Report:
    """Starts runs while the schedule is carried out, and on to ``runs`` of them, within ``seconds``; then waits and judges.

    The first processor and the first worker reach the broker through a proxy that can lose its answers. ``at_once`` is
    how many faults there may be at a time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mail, ledger = folder / "mail", folder / "ledger"
    paths = [str(CLOCK), *filter(None, sys.path)]
    variables = {"CHAOS_MAIL": str(mail), "CHAOS_LEDGER": str(ledger), "PYTHONPATH": ":".join(dict.fromkeys(paths))}
    namespace = f"chaos{uuid.uuid4().hex[:8]}"
    installation = Installation(
        cluster.bootstrap,
        namespace,
        folder,
        workflows,
        partitions=partitions,
        environment=variables,
    )
    fleet = Fleet(installation, say)
    with FaultProxy(cluster.bootstrap) as proxy:
        through = f"kafka://{proxy.bootstrap}"
        for n in range(processors):
            fleet.add("processor", f"processor-{n}", through if n == 0 else None)
        for n in range(workers):
            fleet.add("worker", f"worker-{n}", through if n == 0 else None)
        fleet.begin()
        load = Load(installation, mail, seed=seed, in_flight=in_flight)
        arena = Arena(fleet, cluster, proxy, load)
        begun = time.monotonic()
        load.begin()
        try:
            _until(lambda: load.ends.ended >= WARM, 120)
            progress = _Progress(arena, load, fleet, say)
            Injector(arena, schedule, at_once).run(lambda: progress() < seconds)
            while len(load.started) < runs and progress() < seconds:
                time.sleep(0.1)
            load.stop()
            under_faults = time.monotonic() - begun
            stuck = _settle(load, arena, progress)
            took = time.monotonic() - begun
        finally:
            load.close()
            fleet.close()
    found = history.read_topics(installation.broker, installation.catalogue)
    found.ledger = history.read_ledger(ledger)
    found.started, found.poisons, found.unreadable = load.started, arena.poisons, arena.letters
    found.told, found.read = load.told, load.read
    found.injected, found.exits = arena.injected, fleet.exits
    found.strangers = history.strangers(found, sorted(folder.glob(f"*/{namespace}/partition-*")))
    report = Report()
    asked = checker.started(installation.broker, installation.catalogue)
    report.violations += checker.settled(installation.broker, installation.catalogue, asked, arena.poisons, timeout=0)
    report.violations += verdict.violations(found)
    report.violations += [f"{run_id} did not end" for run_id in sorted(stuck)[:20]]
    report.violations += [f"fault not injected: {why}" for why in arena.failed]
    report.violations += [f"{times} x a client raised {error}" for error, times in load.errors.items()]
    report.injected, report.take_overs = arena.injected, verdict.take_overs(found)
    report.table = _table(found, load, fleet, under_faults, took)
    installation.client.close()
    installation.broker.close()
    return report


class _Progress:
    """Says every few seconds how far everything is; returns for how many seconds that has gone on."""

    def __init__(self, arena: Arena, load: Load, fleet: Fleet, say: Callable[[str], None]) -> None:
        self._arena, self._load, self._fleet, self._say = arena, load, fleet, say
        self._begun = self._said = time.monotonic()
        self._told = 0

    def __call__(self) -> float:
        injected = self._arena.injected
        for fault in injected[self._told :]:
            number = f"{self._told + 1:3}"
            self._say(
                f"{self._since():6.1f} s  fault {number}  {fault.name:28} {fault.target} ({fault.end - fault.begin} ms)"
            )
            self._told += 1
        if time.monotonic() - self._said > 10:
            self._said = time.monotonic()
            load = self._load
            self._say(
                f"{self._since():6.1f} s  {len(load.started)} runs started, {load.ends.ended} ended (children too), "
                f"{len(load.ends.open)} open, {len(self._fleet.exits)} processes ended by themselves"
            )
        return self._since()

    def _since(self) -> float:
        return time.monotonic() - self._begun


def _until(done: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError(f"the installation does not run within {seconds:.0f} s")
        time.sleep(0.05)


def _settle(load: Load, arena: Arena, progress: _Progress) -> set[str]:
    """Waits until all runs have ended, or are blocked as they must; returns the others when nothing has ended for long."""
    last, since = -1, time.monotonic()
    while True:
        progress()
        statuses = load.ends.statuses
        left = {r for r in list(load.started) if statuses.get(r) not in TERMINAL}
        left |= {
            r
            for r in [*list(load.ends.open), *arena.poisons]
            if not (r in arena.poisons and statuses.get(r) == "blocked")
        }
        if not left:
            return set()
        if load.ends.ended != last:
            last, since = load.ends.ended, time.monotonic()
        elif time.monotonic() - since > QUIET:
            return left
        time.sleep(0.2)


def _table(found: history.History, load: Load, fleet: Fleet, under_faults: float, took: float) -> list[tuple[str, str]]:
    again = verdict.repeated(found.ledger)
    causes = Counter(verdict.cause(executions, found) for executions in again)
    late = verdict.repeated_after_result(found)
    take_overs = verdict.take_overs(found)
    events = sum(len(log) for log in found.logs.values())
    faults = Counter(fault.name for fault in found.injected)
    return [
        ("runs", f"{len(found.logs)}, of them {len(load.started)} started by the load, {len(found.poisons)} poisonous"),
        ("events", f"{events}, and {found.aborted} in transactions that were aborted"),
        ("faults", f"{len(found.injected)}: {_listed(faults)}"),
        ("time", f"{under_faults:.0f} s with faults, {took - under_faults:.0f} s until all had ended"),
        ("executions of steps", f"{len(found.ledger)}"),
        ("attempts that ran again", f"{len(again)}: {_listed(causes)}"),
        ("  after their result was logged", f"{len(late)}"),
        ("resumes sent twice", f"{load.duplicates}"),
        ("results told to clients", f"{len(found.told)}; streams read back: {len(found.read)}"),
        ("dead letters", f"{len(found.letters)} of {len(found.unreadable)} unreadable records"),
        ("take-overs alone", f"{len(take_overs)}, the longest {max(take_overs, default=0)} ms, session timeout {SESSION * 1000:.0f} ms"),
        ("ended by themselves", f"{len(fleet.exits)}: {_listed(Counter(f'{e.name} ({e.code})' for e in fleet.exits))}"),
    ]  # fmt: skip


def _listed(counts: Counter[Iterable[str]] | Counter[str] | Counter[str | None]) -> str:
    return ", ".join(f"{times} {name}" for name, times in counts.most_common()) or "none"
