"""Steps a second over the number of partitions, processors and workers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from figures import SCALE, THROUGHPUT, Curve, Figure
from measure import throughput, warm_up
from roles import installation

if TYPE_CHECKING:
    from measure import Size

PARTITIONS = (1, 4, 12, 24)
PROCESSES = ((2, 1), (1, 2), (2, 2))  # processors and workers; one of each is among those over partitions
USUAL = 12  # partitions, where processes vary


async def measure_scale(url: str, broker_pid: int | None, size: Size) -> tuple[list[Figure], list[Curve]]:
    """Throughput, and the CPU time of each role, in every arrangement; a new installation for each."""
    found: list[Figure] = []
    over: list[float] = []
    for partitions, processors, workers in (*((n, 1, 1) for n in PARTITIONS), *((USUAL, *some) for some in PROCESSES)):
        where = f"{partitions} partitions, {processors} processor(s), {workers} worker(s), "
        names = ("processor",) * processors + ("worker",) * workers
        async with installation(names, url, broker_pid, DURABLY_PARTITIONS=str(partitions)) as running:
            # The broker is warm from what came before, or will be after the first arrangements.
            await warm_up(running, size.warm_up / 3)
            figures = await throughput(SCALE, running, size, where)
        found += figures
        if (processors, workers) == (1, 1):
            over.append(next(figure.value for figure in figures if figure.what.startswith(THROUGHPUT)))
    curve = Curve(SCALE, "one processor, one worker", [float(n) for n in PARTITIONS], over, "partitions", "steps/s")
    return found, [curve]
