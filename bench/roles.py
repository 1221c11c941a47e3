"""An installation of durably: its processes, each started through the command line, and a client of it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import uuid
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType
from durably import AsyncClient
from processes import Processes
from workflows import sequence, waves

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping

    from durably import Event

WORKFLOWS = Path(__file__).parent / "workflows.py"
DURABLY = Path(sys.executable).parent / "durably"
PATIENCE = 300.0  # seconds


@contextmanager
def roles(
    names: tuple[str, ...], environment: Mapping[str, str], folder: Path, *, fsync: bool = False
) -> Iterator[Processes]:
    """The processes of one installation.

    Args:
        names: subcommands of ``durably``; one that stands there twice is started twice.
        environment: the settings, ``DURABLY_*``.
        folder: for the processors' data and the processes' output.
        fsync: whether the broker syncs its disk at every append to the installation's topics.
    """
    settings = os.environ | environment
    if not settings["DURABLY_URL"].startswith("embedded:"):
        subprocess.run([DURABLY, "topics", "create"], env=settings, check=True, stdout=subprocess.DEVNULL)
    if fsync:
        _fsync_appends(settings["DURABLY_URL"].removeprefix("kafka://"), settings["DURABLY_NAMESPACE"])
    with Processes(folder) as processes:
        for number, name in enumerate(names):
            data = str(folder / f"data-{number}")
            processes.start(name, [DURABLY, name, WORKFLOWS], settings | {"DURABLY_DATA_DIR": data})
        # A client that came first would open an embedded broker's folder itself.
        processes.wait_until(lambda: all("ready: " in said for name in names for said in processes.outputs(name)))
        yield processes


def _fsync_appends(bootstrap: str, namespace: str) -> None:
    admin = AdminClient({"bootstrap.servers": bootstrap})
    at_once = ConfigEntry("flush.messages", "1", incremental_operation=AlterConfigOpType.SET)
    topics = [topic for topic in admin.list_topics(timeout=30).topics if topic.startswith(f"{namespace}.")]
    changes = [ConfigResource(ResourceType.TOPIC, topic, incremental_configs=[at_once]) for topic in topics]
    for changed in admin.incremental_alter_configs(changes).values():
        changed.result(30)


class Installation:
    """An installation that runs, and a client of it."""

    def __init__(self, client: AsyncClient, processes: Processes) -> None:
        self._client = client
        self.check = processes.check
        self.cpu_seconds = processes.cpu_seconds

    async def run(self, steps: int) -> None:
        """Starts a run and waits for its result."""
        run = await self._client.start(sequence, steps)
        await run.result(timeout=PATIENCE)

    async def events_of_waves(self, steps: int, width: int) -> list[Event]:
        """The log of a run that takes its steps ``width`` at a time."""
        run = await self._client.start(waves, steps, width)
        await run.result(timeout=PATIENCE)
        return await run.events()


@asynccontextmanager
async def installation(
    names: tuple[str, ...], url: str, broker_pid: int | None = None, *, fsync: bool = False, **settings: str
) -> AsyncIterator[Installation]:
    """Starts an installation with topics of its own, and ends it.

    Args:
        names: subcommands of ``durably``.
        url: of the broker; ``{folder}`` stands for a folder that lasts as long as the installation.
        broker_pid: the process whose CPU time counts as the broker's.
        fsync: whether the broker syncs its disk at every append to the installation's topics.
        settings: ``DURABLY_*``.
    """
    namespace = f"bench-{uuid.uuid4().hex[:8]}"
    with tempfile.TemporaryDirectory(prefix="durably-bench-") as folder:
        where = url.format(folder=folder)
        environment = {"DURABLY_URL": where, "DURABLY_NAMESPACE": namespace, **settings}
        with roles(names, environment, Path(folder), fsync=fsync) as processes:
            if broker_pid is not None:
                processes.watch("broker", broker_pid)
            processes.watch("client", os.getpid())
            async with AsyncClient(where, namespace=namespace) as client:
                yield Installation(client, processes)
