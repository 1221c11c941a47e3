"""A race against the clock: a step gets so long, then the workflow goes another way.

`asyncio.timeout` cancels what it wraps: the step is recorded as cancelled, it is not retried, and the worker stops it at
its next heartbeat. To keep the loser instead, wrap it in `asyncio.shield`.
"""

import asyncio

from _run import run
from durably import AsyncClient, step, workflow


@step
async def exact_quote(seconds: float) -> str:
    await asyncio.sleep(seconds)
    return "exact quote"


@step
async def rough_quote() -> str:
    return "rough quote"


@workflow
async def quote(seconds: float) -> str:
    try:
        async with asyncio.timeout(3):
            return await exact_quote(seconds)
    except TimeoutError:
        return await rough_quote()


async def main() -> None:
    async with AsyncClient() as client:
        for seconds in (0.01, 4.5):
            quoted = await client.start(quote, seconds)
            print(f"{seconds} s: {await quoted.result(timeout=60)}")


if __name__ == "__main__":
    run(main)
