"""What durably costs, seen by a client: time a step, steps a second, CPU a step, and how it grows with a run's log."""

from __future__ import annotations

import asyncio
import time
from statistics import median, quantiles
from typing import TYPE_CHECKING, NamedTuple

from report import Figure
from workflows import sequence

if TYPE_CHECKING:
    from durably import AsyncClient
    from roles import Roles

PATIENCE = 300
WARM_UP = 15.0  # seconds


class Size(NamedTuple):
    """How much is measured."""

    sequential_runs: int = 5
    sequential_steps: int = 200
    throughput_runs: int = 500
    throughput_steps: int = 20
    short_runs: int = 200
    long_steps: int = 3400


SMALL = Size(2, 50, 50, 10, 20, 400)


class Measure:
    """Measures one installation, whose processes run."""

    def __init__(self, group: str, client: AsyncClient, roles: Roles, size: Size) -> None:
        self._group = group
        self._client = client
        self._roles = roles
        self._size = size

    def _figure(self, what: str, value: float, unit: str) -> Figure:
        return Figure(self._group, what, value, unit)

    async def _run(self, steps: int) -> float:
        """Starts a run and waits for its result; how long that took, in milliseconds."""
        began = time.perf_counter()
        run = await self._client.start(sequence, steps)
        await run.result(timeout=PATIENCE)
        return (time.perf_counter() - began) * 1000

    async def figures(self) -> list[Figure]:
        """All of them."""
        # As long as the floors: the broker's JVM compiles as it goes, and transactions are new to it.
        warm = time.perf_counter() + WARM_UP
        while time.perf_counter() < warm:
            await asyncio.gather(*(self._run(20) for _ in range(20)))
            await self._run(50)
            self._roles.check()
        found = [*await self._sequential(), *await self._short(), *await self._throughput(), *await self._history()]
        self._roles.check()
        return found

    async def _sequential(self) -> list[Figure]:
        steps = self._size.sequential_steps
        times = [await self._run(steps) / steps for _ in range(self._size.sequential_runs)]
        return [self._figure(f"sequential step, p50 of {len(times)} runs of {steps}", median(times), "ms")]

    async def _short(self) -> list[Figure]:
        times = [await self._run(3) for _ in range(self._size.short_runs)]
        what = f"run of 3 steps, start to result, one at a time, {{}} of {len(times)}"
        return [
            self._figure(what.format("p50"), median(times), "ms"),
            self._figure(what.format("p99"), quantiles(times, n=100)[98], "ms"),
        ]

    async def _throughput(self) -> list[Figure]:
        runs, steps = self._size.throughput_runs, self._size.throughput_steps
        before, began = self._roles.cpu_seconds(), time.perf_counter()
        await asyncio.gather(*(self._run(steps) for _ in range(runs)))
        seconds, after = time.perf_counter() - began, self._roles.cpu_seconds()
        what = f"{runs} runs of {steps} steps at once"
        return [
            self._figure(f"throughput, {what}", runs * steps / seconds, "steps/s"),
            *(
                self._figure(
                    f"CPU of the {role} process, {what}", (after[role] - before[role]) * 1e6 / (runs * steps), "µs/step"
                )
                for role in after
            ),
        ]

    async def _history(self) -> list[Figure]:
        """Whether an event costs the same wherever in a run's log it stands."""
        run = await self._client.start(sequence, self._size.long_steps)
        await run.result(timeout=PATIENCE)
        at = [event.at for event in await run.events()]
        # The log's instants are whole milliseconds: only long stretches tell something.
        tenth = len(at) // 10
        first, last = (at[tenth] - at[0]) / tenth, (at[-1] - at[-1 - tenth]) / tenth
        return [
            self._figure(f"per event, first tenth of a run of {len(at):,} events", first * 1000, "µs"),
            self._figure(f"per event, last tenth of a run of {len(at):,} events", last * 1000, "µs"),
        ]
