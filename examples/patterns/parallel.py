"""Steps that do not need each other run at the same time, on as many workers as there are.

Use `asyncio.gather` where one failure should fail all, and a `TaskGroup` where it should also cancel the others.
"""

import asyncio

from _run import run
from durably import AsyncClient, step, workflow


@step
async def stock_of(sku: str) -> int:
    await asyncio.sleep(0.2)
    return len(sku)


@step
async def price_of(sku: str) -> int:
    await asyncio.sleep(0.2)
    return 100 * len(sku)


@step
async def rating_of(sku: str) -> float:
    await asyncio.sleep(0.2)
    return 5 - 1 / len(sku)


@workflow
async def describe(sku: str) -> dict[str, float]:
    stock, price, rating = await asyncio.gather(stock_of(sku), price_of(sku), rating_of(sku))
    return {"stock": stock, "price": price, "rating": rating}


async def main() -> None:
    async with AsyncClient() as client:
        described = await client.start(describe, "cd-7")
        print(await described.result(timeout=60))


if __name__ == "__main__":
    run(main)
