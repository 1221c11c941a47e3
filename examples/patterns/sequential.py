"""One step after the other: each one's result is the next one's argument.

Use it where the order matters. A crash between two steps repeats neither of those that are done.
"""

from _run import run
from durably import AsyncClient, step, workflow


@step
async def reserve(sku: str) -> str:
    return f"shelf-{sku}"


@step
async def take_payment(sku: str, cents: int) -> str:
    return f"receipt-{sku}-{cents}"


@step
async def send_parcel(shelf: str, receipt: str) -> str:
    return f"parcel from {shelf}, paid by {receipt}"


@workflow
async def one_by_one(sku: str, cents: int) -> str:
    shelf = await reserve(sku)
    receipt = await take_payment(sku, cents)
    return await send_parcel(shelf, receipt)


async def main() -> None:
    async with AsyncClient() as client:
        run = await client.start(one_by_one, "cd-7", 1250)
        print(await run.result(timeout=60))


if __name__ == "__main__":
    run(main)
