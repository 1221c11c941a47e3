"""Prints where the processor's time goes, sampled by py-spy (``pip install py-spy``) while a client keeps it busy.

A sample is taken of the thread that holds the GIL, so that waiting does not count. Neither does work that lets go of
it: RocksDB's writes, librdkafka's threads.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from durably import AsyncClient
from roles import roles
from workflows import sequence

PY_SPY = Path(sys.executable).parent / "py-spy"


async def keep_busy(url: str, namespace: str, until: float, runs: int = 100, steps: int = 20) -> None:
    """As many runs at once as given, over and over."""

    async def one() -> None:
        while time.monotonic() < until:
            run = await client.start(sequence, steps)
            await run.result(timeout=60)

    async with AsyncClient(url, namespace=namespace) as client:
        await asyncio.gather(*(one() for _ in range(runs)))


def shares(samples: Path) -> tuple[Counter[str], Counter[str], int]:
    """Samples in which a function was the innermost one, those in which it was on the stack, and all of them."""
    alone: Counter[str] = Counter()
    within: Counter[str] = Counter()
    total = 0
    for line in samples.read_text().splitlines():
        stack, _, count = line.rpartition(" ")
        frames = stack.split(";")
        total += int(count)
        alone[frames[-1]] += int(count)
        for frame in set(frames):
            within[frame] += int(count)
    return alone, within, total


def main(
    url: Annotated[str, typer.Argument(help="kafka://host:port, or embedded:PATH for the whole of `durably dev`.")],
    role: Annotated[str, typer.Option(help="The process to look at, where there are several.")] = "processor",
    seconds: int = 15,
    top: int = 30,
) -> None:
    """Starts an installation of its own on that broker, and samples one of its processes."""
    if not PY_SPY.exists():
        raise typer.BadParameter(f"{PY_SPY} is not there: {sys.executable} -m pip install py-spy")
    names = ("dev",) if url.startswith("embedded:") else ("processor", "worker")
    watched = role if role in names else names[0]
    namespace = f"profile-{int(time.time())}"
    with tempfile.TemporaryDirectory(prefix="durably-profile-") as name:
        folder = Path(name)
        with roles(names, {"DURABLY_URL": url, "DURABLY_NAMESPACE": namespace}, folder) as processes:
            asyncio.run(keep_busy(url, namespace, time.monotonic() + 3))
            samples = folder / "samples"
            sampler = subprocess.Popen(
                [PY_SPY, "record", "--pid", str(processes.pid(watched)), "--duration", str(seconds), "--rate", "200",
                 "--gil", "--threads", "--function", "--format", "raw", "--output", samples],
                stdout=subprocess.DEVNULL,
            )  # fmt: skip
            asyncio.run(keep_busy(url, namespace, time.monotonic() + seconds))
            if sampler.wait(60):
                raise SystemExit(
                    "py-spy could not sample: it needs the right to trace a process (root, or CAP_SYS_PTRACE)"
                )
        alone, within, total = shares(samples)
    for title, counts in (("in the function itself", alone), ("in it and what it calls", within)):
        print(f"\ndurably {watched}, {title}, of {total} samples")
        for frame, count in counts.most_common(top):
            print(f"{count / total:7.1%}  {frame}")


if __name__ == "__main__":
    typer.run(main)
