"""Workflows for tests that kill processes."""

import asyncio
import os
import time
from pathlib import Path

from durably import get_step_metadata, sleep, step, workflow


def note(what: str) -> None:
    """One line for each execution, in a file that outlives the worker."""
    with Path(os.environ["LEDGER"]).open("a") as ledger:
        ledger.write(f"{what} {get_step_metadata().step_id} {get_step_metadata().attempt}\n")


@step
async def pay(n: int) -> int:
    note("pay")
    return n


@step
def ship(n: int) -> int:
    note("ship")
    time.sleep(0.02)
    return n


@workflow
async def order(n: int) -> int:
    total = await pay(n)
    for _ in range(3):
        total += sum(await asyncio.gather(pay(1), ship(2)))
        await sleep("300ms")
    async with asyncio.timeout(30):
        total += await ship(3)
    return total
