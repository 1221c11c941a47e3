"""Many items, fifty at a time: as a step for each item, or as a step for each batch.

A step for each item retries each one alone, and its result is an event of its own. A step for each batch is cheaper by
the size of the batch, and retries the whole batch. Both hold back the next batch until the last one is through, so no
more than fifty items are under way.
"""

import asyncio

from _run import run
from durably import AsyncClient, step, workflow

BATCH = 50


@step
async def square(item: int) -> int:
    return item * item


@step
async def squares(items: list[int]) -> list[int]:
    return [item * item for item in items]


@workflow
async def by_item(items: list[int]) -> int:
    total = 0
    for i in range(0, len(items), BATCH):
        total += sum(await asyncio.gather(*(square(item) for item in items[i : i + BATCH])))
    return total


@workflow
async def by_batch(items: list[int]) -> int:
    total = 0
    for i in range(0, len(items), BATCH):
        total += sum(await squares(items[i : i + BATCH]))
    return total


async def main() -> None:
    items = list(range(250))
    async with AsyncClient() as client:
        for way in (by_item, by_batch):
            summed = await client.start(way, items)
            total = await summed.result(timeout=60)
            steps = sum(event.type == "step_completed" for event in await summed.events())
            print(f"{way.name}: {total} in {steps} steps")


if __name__ == "__main__":
    run(main)
