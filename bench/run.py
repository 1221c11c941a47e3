"""Measures the broker's floors, durably above them, and its peers beside it; writes ``bench/README.md``.

DURABLY_BENCH_KAFKA=host:port measures on that broker; without it one is started for the time. The peers that are
measured are those that ``make bench-peers`` has installed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import docker
import history
import psutil
import report
import typer
from docker.errors import DockerException
from environments import Peer, Unavailable, peers
from figures import Curve, Figure, System, text
from floors import Floors
from history import Session
from length import measure_length
from measure import SMALL, Size, measure, warm_up
from roles import installation
from scale import measure_scale

if TYPE_CHECKING:
    from collections.abc import Iterator

VERSIONS = f"durably {version('durably')}, confluent-kafka {version('confluent-kafka')}"
SYSTEMS = {
    "kafka": System(
        "durably on Kafka",
        VERSIONS,
        "`acks=all` and transactions, as Kafka is run everywhere: in the brokers' page cache, not fsynced; here there is "
        "one broker, so a loss of power may lose what several would keep",
        "One processor, one worker, 12 partitions.",
    ),
    "kafka-fsync": System(
        "durably on Kafka, fsynced",
        VERSIONS,
        "`flush.messages=1` on its topics, so each append is fsynced before it is acknowledged; Kafka's own topics are not",
        "Not how Kafka is usually run; here because most of the others sync their disks at every step.",
    ),
    "embedded": System(
        "durably on the embedded broker",
        VERSIONS,
        "survives `kill -9`, not a loss of power",
        "`durably dev`: processor, worker and broker in one process.",
    ),
}
PEERS = {variant: peer for peer in peers() for variant in peer.variants}
SECTIONS = ("floor", "kafka", "kafka-fsync", "embedded", "length", "scale", *PEERS)
LONG = {"kafka", "embedded"}  # where the length of a log is measured
ON_BROKER = {"floor", "kafka", "kafka-fsync", "length", "scale"}


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


def broker_pid(bootstrap: str) -> int | None:
    """The broker's process on this machine: a container's, or whoever listens on its port; None if it is elsewhere."""
    port = int(bootstrap.rpartition(":")[2])
    with contextlib.suppress(DockerException), contextlib.closing(docker.from_env()) as engine:
        for container in engine.containers.list(filters={"publish": str(port)}):
            return int(container.attrs["State"]["Pid"])
    listening = (c.pid for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == port)
    return next(listening, None)


class Bench:
    """Measures sections, one after the other, into a session: nothing else of ours runs meanwhile."""

    def __init__(self, wanted: set[str], small: bool, note: str) -> None:
        self._wanted = wanted
        self._small = small
        self._size = SMALL if small else Size()
        self.session = Session(conditions={}, figures=[], note=note)

    def everything(self) -> None:
        """All sections that are wanted."""
        with broker() if self._wanted & ON_BROKER else nullcontext(("", "none")) as (bootstrap, described):
            self.session.conditions |= report.conditions(described)
            if "floor" in self._wanted:
                self._add(Floors(bootstrap).figures())
            if self._wanted & ON_BROKER - {"floor"}:
                url, pid = f"kafka://{bootstrap}", broker_pid(bootstrap)
                for group in ("kafka", "kafka-fsync"):
                    asyncio.run(self._durably(group, ("processor", "worker"), url, pid))
                if "scale" in self._wanted:
                    self._add(*asyncio.run(measure_scale(url, pid, self._size)))
        # A broker of the bench's own is gone by now: an idle one still takes some percent of a core.
        asyncio.run(self._durably("embedded", ("dev",), "embedded:{folder}/broker", None))
        for variant, peer in PEERS.items():
            if variant in self._wanted:
                self._peer(variant, peer)
        self.session.conditions["load after"] = report.load()

    async def _durably(self, group: str, names: tuple[str, ...], url: str, pid: int | None) -> None:
        long = "length" in self._wanted and group in LONG
        if not long and group not in self._wanted:
            return
        self.session.systems[group] = SYSTEMS[group]
        async with installation(names, url, pid, fsync=group == "kafka-fsync") as running:
            if group in self._wanted:
                self._add(await measure(group, running, self._size))
            else:
                await warm_up(running, self._size.warm_up)
            if long:
                self._add(*await measure_length(group, running, self._size))

    def _peer(self, variant: str, peer: Peer) -> None:
        try:
            self.session.systems[variant], figures = peer.measure(variant, self._small)
        except (Unavailable, RuntimeError, TimeoutError) as reason:  # not at the cost of all that was measured before
            self.session.missing[variant] = str(reason)
            print(f"{variant} was not measured: {reason}", flush=True)
        else:
            self._add(figures)

    def _add(self, figures: list[Figure], curves: list[Curve] | None = None) -> None:
        for figure in figures:
            print(f"{figure.group:<14} {figure.what:<90} {text(figure.value, figure.unit):>18}", flush=True)
        self.session.figures += figures
        self.session.curves += curves or []


def main(
    only: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(SECTIONS)}; all by default.")] = None,
    small: Annotated[bool, typer.Option(help="A fraction of the work, for a first look; writes nothing.")] = False,
    note: Annotated[str, typer.Option(envvar="NOTE", help="What has changed since the last time, in a sentence.")] = "",
    readme: Annotated[
        bool, typer.Option("--readme", help="Measures nothing: writes README.md and the plots from the last session.")
    ] = False,
) -> None:
    """Measures and prints; writes bench/README.md, unless only a part was measured."""
    if readme:
        report.write(history.read()[-1])
        return
    if unknown := set(only or ()) - set(SECTIONS):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: the sections are {', '.join(SECTIONS)}")
    bench = Bench(set(only or SECTIONS), small, note)
    bench.everything()
    if not small and not only:
        history.append(bench.session)
        report.write(bench.session)


if __name__ == "__main__":
    typer.run(main)
