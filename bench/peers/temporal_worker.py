"""The worker process of `temporal_peer`: ``python temporal_worker.py ADDRESS``.

Workflows stand in a file of their own, as Temporal recommends: its sandbox imports that file again for each run.
"""

from __future__ import annotations

import asyncio
import sys
from datetime import timedelta

from temporalio import activity, workflow
from temporalio.client import Client
from temporalio.worker import Worker

QUEUE = "bench"


@activity.defn
async def nothing() -> None:
    """Does nothing."""


@workflow.defn
class Sequence:
    """Calls a step that does nothing, again and again, each after the one before."""

    @workflow.run
    async def run(self, steps: int) -> int:
        for _ in range(steps):
            await workflow.execute_activity(nothing, start_to_close_timeout=timedelta(seconds=30))
        return steps


async def main(address: str) -> None:
    """Works until it is ended."""
    client = await Client.connect(address)
    await Worker(client, task_queue=QUEUE, workflows=[Sequence], activities=[nothing]).run()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
