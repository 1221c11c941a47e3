"""Measures the broker's floors and durably above them, and writes ``bench/README.md``.

DURABLY_BENCH_KAFKA=host:port measures on that broker; without it one is started for the time.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import report
import typer
from durably import AsyncClient
from floors import Floors
from measure import SMALL, Measure, Size
from roles import Roles

if TYPE_CHECKING:
    from collections.abc import Iterator

GROUPS = tuple(report.TITLES)


@contextmanager
def broker() -> Iterator[tuple[str, str]]:
    """The address of a broker, and what it is."""
    if named := os.environ.get("DURABLY_BENCH_KAFKA"):
        yield named, f"Kafka at {named}"
        return
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    import kafka_cluster  # the tests' own; only where no broker is named

    cluster = kafka_cluster.start()
    try:
        yield cluster.bootstrap, f"{kafka_cluster.IMAGE}, one node"
    finally:
        cluster.stop()


async def durably_figures(group: str, names: tuple[str, ...], url: str, size: Size) -> list[report.Figure]:
    """Starts an installation with topics of its own, measures it, and ends it."""
    namespace = f"bench-{int(time.time())}"
    with tempfile.TemporaryDirectory(prefix="durably-bench-") as folder:
        where = url.format(folder=folder)
        with Roles(names, {"DURABLY_URL": where, "DURABLY_NAMESPACE": namespace}, Path(folder)) as roles:
            async with AsyncClient(where, namespace=namespace) as client:
                return await Measure(group, client, roles, size).figures()


def main(
    only: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(GROUPS)}; all by default.")] = None,
    small: Annotated[bool, typer.Option(help="A tenth of the work, for a first look; writes nothing.")] = False,
) -> None:
    """Measures, prints, and writes bench/README.md."""
    wanted, size = only or GROUPS, SMALL if small else Size()
    figures = []
    with broker() as (bootstrap, described):
        where = report.conditions(described)
        if "floor" in wanted:
            figures += Floors(bootstrap).figures()
        if "kafka" in wanted:
            figures += asyncio.run(durably_figures("kafka", ("processor", "worker"), f"kafka://{bootstrap}", size))
    if "embedded" in wanted:
        figures += asyncio.run(durably_figures("embedded", ("dev",), "embedded:{folder}/broker", size))
    for figure in figures:
        print(f"{figure.group:<9} {figure.what:<70} {report.text(figure):>18}")
    if not small and not only:
        report.write(figures, where | {"load after": report.load()})


if __name__ == "__main__":
    typer.run(main)
