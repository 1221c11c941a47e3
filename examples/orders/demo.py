"""400 real orders, a kill -9 half-way, and a check of the books.

On the embedded broker, which needs neither Kafka nor Docker; with ``--url kafka://host:port`` the same against Kafka.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import books
import ledger
from durably import AsyncClient, AsyncRun
from durably.broker import connect
from durably.broker.port import TP, End
from durably.settings import Settings
from durably_schemas import Codec
from durably_schemas.events import StepCompleted, StepFailed, StepRetrying
from durably_schemas.records import Event, Record, StepRequest
from installation import Installation
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from workflows import ORDERS, Fulfilled, fulfil

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

KILL_AT = 0.45
PATIENCE = 180


class Kill(NamedTuple):
    """What was so when the process had been killed."""

    pid: int
    finished: int
    open: set[ledger.Attempt]
    cut_off: set[ledger.Attempt]


def attempts(
    settings: Settings, topic: str, attempt_in: Callable[[Record], ledger.Attempt | None]
) -> set[ledger.Attempt]:
    """The attempts that the records of a topic speak of; read from the topic itself, whoever runs or does not."""
    codec, found = Codec(), set()
    broker = connect(settings.url, settings.kafka)
    try:
        waiting = {TP(topic, p) for p in range(broker.partitions(topic))}
        # A request goes out before the transaction that explains it, so those of an open transaction count.
        reader = broker.reader(dict.fromkeys(waiting, 0), committed=topic == settings.catalogue.events)
        while waiting:
            for message in reader.poll(1.0):
                if isinstance(message, End):
                    waiting.discard(TP(message.topic, message.partition))
                elif (attempt := attempt_in(codec.decode(message.value))) is not None:
                    found.add(attempt)
        reader.close()
    finally:
        broker.close()
    return found


def requested(record: Record) -> ledger.Attempt | None:
    """The attempt that a request asks for."""
    match record:
        case StepRequest(run_id=run_id, step_id=step_id, attempt=attempt):
            return ledger.Attempt(run_id, step_id, attempt)
    return None


def concluded(record: Record) -> ledger.Attempt | None:
    """The attempt whose outcome an event records."""
    match record:
        case Event(data=StepCompleted(attempt=attempt) | StepFailed(attempt=attempt)):
            return ledger.Attempt(record.run_id, str(record.correlation_id), attempt)
        case Event(data=StepRetrying(attempt=following)):
            return ledger.Attempt(record.run_id, str(record.correlation_id), following - 1)
    return None


class Outcome(NamedTuple):
    """What came of it all: results, attempts that were executed twice, and an order with its stream."""

    fulfilled: list[Fulfilled]
    kill: Kill
    twice: set[ledger.Attempt]
    shown: books.Order
    lines: list[Any]


@asynccontextmanager
async def awaited(runs: Sequence[AsyncRun[Any]]) -> AsyncIterator[list[asyncio.Task[Any]]]:
    """A task for each run that waits for its result; those still waiting at the end are cancelled."""
    tasks = [asyncio.create_task(run.result(timeout=PATIENCE)) for run in runs]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Demo:
    """One pass over the orders."""

    def __init__(self, settings: Settings, folder: Path, console: Console) -> None:
        self._settings = settings
        self._ledger = folder / "ledger"
        self._installation = Installation(settings.url, settings.namespace, folder, self._ledger)
        self._console = console
        self._rows = books.orders(ORDERS)

    async def run(self) -> bool:
        """Does it all; whether every check has passed."""
        began = time.monotonic()
        try:
            self._installation.start()
            kill = await self._first_half()
            self._console.print(
                f"[bold red]kill -9[/] durably {self._installation.victim} (pid {kill.pid}): {kill.finished} runs "
                f"finished, {len(kill.open)} steps open. Starting it again."
            )
            self._installation.start()
            outcome = await self._second_half(kill)
        finally:
            self._installation.stop()
        self._console.print(f"All runs have finished, after {time.monotonic() - began:.1f} s.")
        return self._verdict(outcome)

    def _client(self) -> AsyncClient:
        return AsyncClient(self._settings.url, namespace=self._settings.namespace)

    async def _first_half(self) -> Kill:
        """Starts all runs, waits until enough have finished, and kills."""
        async with self._client() as client:
            runs = await asyncio.gather(
                *(client.options(run_id=row.order_id).start(fulfil, *row) for row in self._rows)
            )
            async with awaited(runs) as results:
                finished = await self._watch(results, until=int(KILL_AT * len(results)))
                return await asyncio.to_thread(self._kill, finished)

    async def _second_half(self, kill: Kill) -> Outcome:
        """Waits for all results, also those of the first half: they must have survived."""
        async with self._client() as client:
            runs = [client.get_run(row.order_id) for row in self._rows]
            async with awaited(runs) as results:
                await self._watch(results, until=len(results))
                fulfilled = [task.result() for task in results]
            twice = {a for a, n in ledger.executions(ledger.read(self._ledger)).items() if n > 1}
            # An order whose shipping ran twice has its lines twice on the stream, from two writers.
            again = {attempt.run_id for attempt in twice}
            shown = max((row for row in self._rows if row.order_id not in again), key=lambda row: row.cds)
            lines = [line async for line in runs[self._rows.index(shown)].stream()]
        return Outcome(fulfilled, kill, twice, shown, lines)

    async def _watch(self, results: Sequence[asyncio.Task[Any]], until: int) -> int:
        """Shows how things go on until so many runs have finished; returns how many have."""
        with Progress(
            TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            console=self._console,
        ) as progress:  # fmt: skip
            runs = progress.add_task("runs finished", total=len(results))
            steps = progress.add_task("steps executed", total=None)
            refused = progress.add_task("charges refused", total=None)
            while True:
                # result() raises here what a run has failed with.
                finished = sum(task.done() and task.result() is not None for task in results)
                lines = ledger.read(self._ledger)
                progress.update(runs, completed=finished)
                progress.update(steps, completed=sum(line.mark == "begin" for line in lines))
                progress.update(refused, completed=sum(line.mark == "raised" for line in lines))
                if finished >= until:
                    return finished
                self._installation.check()
                await asyncio.sleep(0.05)

    def _kill(self, finished: int) -> Kill:
        pid = self._installation.kill()
        lines = ledger.read(self._ledger)
        catalogue = self._settings.catalogue
        asked = attempts(self._settings, catalogue.requests("default"), requested)
        return Kill(
            pid=pid,
            finished=finished,
            open=asked - attempts(self._settings, catalogue.events, concluded),
            cut_off=ledger.unfinished(lines),
        )

    def _verdict(self, outcome: Outcome) -> bool:
        fulfilled, kill, twice, shown, lines = outcome
        expected = books.expected(self._rows)
        done = ledger.read(self._ledger)
        packed = [f"disc {n} of {shown.cds}" for n in range(1, shown.cds + 1)]
        table = Table("", "found", "expected", "", title=f"{len(self._rows)} orders")
        checks = []

        def check(what: str, found: object, wanted: object) -> None:
            checks.append(found == wanted)
            table.add_row(what, str(found), str(wanted), "[green]ok[/]" if checks[-1] else "[bold red]WRONG[/]")

        check("runs finished", len(fulfilled), len(self._rows))
        check("orders, each once", len({f["order_id"] for f in fulfilled}), len(self._rows))
        for what in ("net", "tax", "discount", "charged"):
            check(f"{what}, in dollars", dollars(sum(f[what] for f in fulfilled)), dollars(getattr(expected, what)))
        check("charges asked for", sum(f["attempts"] for f in fulfilled), expected.charges)
        check("ran twice, though not open at the kill", len(twice - kill.open), 0)
        check(f"stream of {shown.order_id}: discs packed", sum(p in str(x) for p in packed for x in lines), shown.cds)
        self._console.print(table)
        self._console.print(
            f"{sum(line.mark == 'begin' for line in done)} executions of steps. At the kill {len(kill.open)} attempts were "
            f"open (requested, without an outcome in a run's log), and {len(kill.cut_off)} of them just running. "
            f"Executed twice: {len(twice)}."
        )
        for step in sorted({line.step for line in done if line.attempt in twice}):
            which = sorted({line.attempt.run_id for line in done if line.attempt in twice and line.step == step})
            self._console.print(f"  {step}: {', '.join(which)}")
        self._console.print(f"The stream of {shown.order_id}:")
        for line in lines:
            self._console.print(f"  {line}")
        self._console.print("[bold green]The books agree.[/]" if all(checks) else "[bold red]The books disagree.[/]")
        return all(checks)


def dollars(cents: int) -> str:
    """An amount for people."""
    return f"{cents // 100:,}.{cents % 100:02}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="kafka://host:port, or embedded:PATH; a fresh embedded one by default")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="durably-orders-") as name:
        folder = Path(name)
        # A namespace of its own: a second demo on the same cluster finds no runs of the first.
        settings = Settings.from_environment(
            url=arguments.url or f"embedded:{folder / 'broker'}", namespace=f"orders-{int(time.time())}"
        )
        sys.exit(0 if asyncio.run(Demo(settings, folder, Console()).run()) else 1)


if __name__ == "__main__":
    main()
