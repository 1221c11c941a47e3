"""What durable steps cost, seen by a client: the same work for durably and for each peer.

Besides the standard library it needs psutil only: the peers' environments import it too.
"""

from __future__ import annotations

import asyncio
import time
from statistics import median, quantiles
from typing import NamedTuple, Protocol

from figures import CPU, SHORT_P50, SHORT_P99, STEP, THROUGHPUT, Figure

WARM_UP_RUNS, WARM_UP_STEPS = 20, 5


class Size(NamedTuple):
    """How much is measured, at most: whoever is slow does less of it, in runs and steps that its figures name."""

    sequential_runs: int = 5
    sequential_steps: int = 200  # of each of these runs
    throughput_runs: int = 500
    throughput_steps: int = 20  # of each of these runs
    at_once: int = 500  # of these runs: whoever is faster with fewer gets fewer
    short_runs: int = 200
    long_steps: int = 33_300  # of the one long run
    wave: int = 100  # of its steps at once
    warm_up: float = 15.0  # seconds
    limit: float = 15.0  # seconds, about, for each kind of measurement


SMALL = Size(2, 20, 20, 10, 500, 20, 1_000, 50, 2.0, 5.0)


class Subject(Protocol):
    """A system whose processes run, and a client of it."""

    async def run(self, steps: int) -> None:
        """Starts a run that calls a step which does nothing so many times, one after the other; waits for its end."""

    def cpu_seconds(self) -> dict[str, float]:
        """User and system time so far of each role of its processes."""

    def check(self) -> None:
        """Raises when one of its processes has ended by itself."""


async def measure(group: str, subject: Subject, size: Size) -> list[Figure]:
    """All figures of a system."""
    rate = await warm_up(subject, size.warm_up)
    in_time = max(WARM_UP_RUNS, int(rate * size.limit / size.throughput_steps))
    fitting = size._replace(throughput_runs=min(size.throughput_runs, in_time))
    found = [*await sequential(group, subject, size), *await short(group, subject, size)]
    found += await throughput(group, subject, fitting)
    subject.check()
    return found


async def warm_up(subject: Subject, seconds: float) -> float:
    """Keeps a system busy: virtual machines compile as they go, databases plan, pools fill; the last steps a second."""
    until, rate = time.perf_counter() + seconds, 0.0
    while (began := time.perf_counter()) < until:
        await asyncio.gather(*(subject.run(WARM_UP_STEPS) for _ in range(WARM_UP_RUNS)))
        rate = WARM_UP_RUNS * WARM_UP_STEPS / (time.perf_counter() - began)
        subject.check()
    return rate


async def _milliseconds(subject: Subject, steps: int) -> float:
    began = time.perf_counter()
    await subject.run(steps)
    return (time.perf_counter() - began) * 1000


async def sequential(group: str, subject: Subject, size: Size) -> list[Figure]:
    """The time of a step within a run."""
    runs, probe = size.sequential_runs, min(20, size.sequential_steps)
    fitting = int(size.limit * 1000 / runs / (await _milliseconds(subject, probe) / probe))
    steps = min(size.sequential_steps, max(probe, fitting))
    times = [await _milliseconds(subject, steps) / steps for _ in range(runs)]
    return [Figure(group, f"{STEP}, p50 of {runs} runs of {steps}", median(times), "ms")]


async def short(group: str, subject: Subject, size: Size) -> list[Figure]:
    """The time of a run of three steps, from its start to its result."""
    until, times = time.perf_counter() + size.limit, list[float]()
    while len(times) < min(20, size.short_runs) or (len(times) < size.short_runs and time.perf_counter() < until):
        times.append(await _milliseconds(subject, 3))
    return [
        Figure(group, f"{SHORT_P50} of {len(times)}", median(times), "ms"),
        Figure(group, f"{SHORT_P99} of {len(times)}", quantiles(times, n=100, method="inclusive")[98], "ms"),
    ]


async def throughput(group: str, subject: Subject, size: Size, where: str = "") -> list[Figure]:
    """Steps a second of many runs at once, and what a step costs each role in CPU time."""
    runs, steps = size.throughput_runs, size.throughput_steps
    turns = asyncio.Semaphore(size.at_once)

    async def one() -> None:
        async with turns:
            await subject.run(steps)

    before, began = subject.cpu_seconds(), time.perf_counter()
    await asyncio.gather(*(one() for _ in range(runs)))
    seconds, after = time.perf_counter() - began, subject.cpu_seconds()
    what = f"{where}{runs} runs of {steps} steps{f', {size.at_once}' if size.at_once < runs else ''} at once"
    return [
        Figure(group, f"{THROUGHPUT}, {what}", runs * steps / seconds, "steps/s"),
        *(
            Figure(
                group,
                f"{CPU} the {role} process, {what}",
                (after[role] - before[role]) * 1e6 / (runs * steps),
                "µs/step",
            )
            for role in after
        ),
    ]
