"""A workflow that is worth a test: it waits for weeks, retries, asks a person, and undoes what it did."""

import asyncio

from durably import FatalError, create_hook, sleep, step, workflow


@step(max_retries=2, backoff="10s")
async def score(applicant: str) -> int:
    """Asks a rating agency, which is down now and then."""
    return 500 + len(applicant)


@step
async def pay_out(applicant: str, cents: int) -> str:
    return f"{cents} cents to {applicant}"


@step
async def remind(applicant: str) -> None:
    print(f"{applicant}: please pay back")


@workflow
async def loan(applicant: str, cents: int) -> str:
    if await score(applicant) < 400:
        raise FatalError(f"{applicant} is not good for {cents} cents")
    if cents > 100_000:
        try:
            async with asyncio.timeout(7 * 86_400), create_hook(token=f"loan-{applicant}") as approval:
                if not await approval:
                    return "refused"
        except TimeoutError:
            return "nobody decided"
    paid = await pay_out(applicant, cents)
    for _ in range(3):
        await sleep("30d")
        await remind(applicant)
    return paid
