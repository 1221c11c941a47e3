# /// script
# dependencies = ["vercel-workflow==0.12.0", "psutil==7.2.2"]
#
# [tool.bench]
# variants = ["workflow"]
# ///
"""Workflow SDK for Python by Vercel, in its local world: files, and a queue within the process."""

from __future__ import annotations

import asyncio
import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from figures import System
from peer import CLIENT, Variant, main, versions
from processes import Processes
from vercel.workflow import start
from workflow_app import sequence

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

POLL = 0.01  # seconds
ENDED = {"completed", "failed", "cancelled"}


class Application:
    """The process that is client, workflows and steps at once."""

    def __init__(self, processes: Processes) -> None:
        self._waiting = 0
        self.check = processes.check
        self.cpu_seconds = processes.cpu_seconds

    async def run(self, steps: int) -> None:
        """Starts a run and waits for its result."""
        run = await start(sequence, steps)
        self._waiting += 1
        try:
            # `return_value` alone asks once a second. All together ask a hundred times a second here.
            while await run.status() not in ENDED:  # noqa: ASYNC110  the SDK has no event for it
                await asyncio.sleep(POLL * self._waiting)
        finally:
            self._waiting -= 1
        if await run.return_value() != steps:
            raise RuntimeError("a run has returned something else")


@asynccontextmanager
async def running(folder: Path) -> AsyncIterator[Application]:
    """All in this process."""
    os.environ["WORKFLOW_LOCAL_DATA_DIR"] = str(folder / "data")
    with Processes(folder) as processes:
        processes.watch(CLIENT, os.getpid())
        yield Application(processes)


VARIANTS = {
    "workflow": Variant(
        System(
            "Vercel Workflow for Python, local world",
            versions("vercel-workflow"),
            "files that are renamed into place, not fsynced; the queue is in memory",
            "Meant for development. Client, workflows and steps share one process. The client asks for the end of runs a "
            "hundred times a second, where the SDK's own wait asks once a second.",
        ),
        running,
    ),
}

if __name__ == "__main__":
    main(VARIANTS)
