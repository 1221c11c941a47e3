# /// script
# dependencies = ["temporalio==1.35.0", "psutil==7.2.2"]
#
# [tool.bench]
# variants = ["temporal"]
# go = ["github.com/temporalio/cli/cmd/temporal@v1.5.1"]
# ///
"""Temporal: its development server, whose program is named by TEMPORAL_CLI or stands in PATH, and a Python worker."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import uuid
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from figures import System
from peer import CLIENT, Unavailable, Variant, free_port, home, main, versions
from processes import Processes
from temporal_worker import QUEUE, Sequence
from temporalio.client import Client as Temporal

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

WORKER = Path(__file__).parent / "temporal_worker.py"


class Client:
    """A client of the server's front end."""

    def __init__(self, temporal: Temporal, processes: Processes) -> None:
        self._temporal = temporal
        self.check = processes.check
        self.cpu_seconds = processes.cpu_seconds

    async def run(self, steps: int) -> None:
        """Starts a run and waits for its result."""
        await self._temporal.execute_workflow(Sequence.run, steps, id=uuid.uuid4().hex, task_queue=QUEUE)


def _program() -> str | None:
    installed = home("temporal") / "bin" / "temporal"
    return os.environ.get("TEMPORAL_CLI") or (str(installed) if installed.exists() else shutil.which("temporal"))


def _server_version() -> str:
    program = _program()
    if program is None:
        return "no server"
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    return said.strip()


@asynccontextmanager
async def running(folder: Path) -> AsyncIterator[Client]:
    """A server on a file, one worker process, and a client."""
    program = _program()
    if program is None:
        raise Unavailable("no server binary here: name one by TEMPORAL_CLI, or run make bench-peers where Go is")
    port = free_port()
    address = f"127.0.0.1:{port}"
    with Processes(folder) as processes:
        processes.start(
            "server",
            [program, "server", "start-dev", "--headless", "--ip", "127.0.0.1", "--port", str(port),
             "--db-filename", folder / "temporal.sqlite", "--log-level", "error"],
        )  # fmt: skip
        asked = [program, "operator", "cluster", "health", "--address", address]
        processes.wait_until(lambda: subprocess.run(asked, capture_output=True, check=False).returncode == 0)
        processes.start("worker", [sys.executable, WORKER, address])
        processes.watch(CLIENT, os.getpid())
        yield Client(await Temporal.connect(address), processes)


VARIANTS = {
    "temporal": Variant(
        System(
            "Temporal, development server on SQLite",
            f"{versions('temporalio')}, {_server_version()}",
            "as it opens the file: rollback journal, `synchronous=FULL`, so each transaction is fsynced",
            "The development server is not meant for production, where PostgreSQL, MySQL or Cassandra stand behind four "
            "services; the worker has its default settings, its sandbox included.",
        ),
        running,
    ),
}

if __name__ == "__main__":
    main(VARIANTS)
