"""Begin something now, do other things, and ask for its result later.

`asyncio.create_task` hands the step to a worker at the workflow's next `await`. A task that is not done when the
workflow returns is dropped: await it, unless nobody wants its result.
"""

import asyncio

from _run import run
from durably import AsyncClient, step, workflow


@step
async def render(document: str) -> str:
    await asyncio.sleep(0.3)
    return f"{document}.pdf"


@step
async def address_of(customer: str) -> str:
    return f"{customer}@example.com"


@step
async def mail(address: str, attachment: str) -> str:
    return f"{attachment} sent to {address}"


@workflow
async def invoice(customer: str) -> str:
    rendering = asyncio.create_task(render(f"invoice-{customer}"))
    address = await address_of(customer)
    return await mail(address, await rendering)


async def main() -> None:
    async with AsyncClient() as client:
        invoiced = await client.start(invoice, "ada")
        print(await invoiced.result(timeout=60))


if __name__ == "__main__":
    run(main)
