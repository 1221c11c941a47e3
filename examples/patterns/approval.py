"""A human decides: the run waits for a hook, for two days at most, and takes no memory or thread meanwhile.

The hook's metadata tell whoever decides what it is about; its model checks a decision before anything is recorded.
"""

import asyncio
from dataclasses import dataclass

from _run import hook, run
from durably import AsyncClient, define_hook, step, workflow


@dataclass
class Decision:
    approved: bool
    by: str


Approval = define_hook(Decision)


@step
async def pay_out(employee: str, cents: int) -> str:
    return f"{cents} cents to {employee}"


@workflow
async def expense(report: str, employee: str, cents: int) -> str:
    try:
        async with (
            asyncio.timeout(2 * 24 * 3600),
            Approval.create(token=f"expense-{report}", metadata={"employee": employee, "cents": cents}) as approval,
        ):
            decision = await approval
    except TimeoutError:
        return "nobody decided"
    if not decision.approved:
        return f"refused by {decision.by}"
    return f"{await pay_out(employee, cents)}, approved by {decision.by}"


async def decide(client: AsyncClient, report: str, by: str) -> None:
    """What a page with two buttons does: it shows the metadata, and resumes the hook."""
    asked = (await hook(client, f"expense-{report}")).metadata
    await Approval.resume(f"expense-{report}", Decision(approved=asked["cents"] < 10_000, by=by))


async def main() -> None:
    async with AsyncClient() as client:
        for report, cents in (("r1", 4_200), ("r2", 99_000)):
            expensed = await client.start(expense, report, "ada", cents)
            await decide(client, report, "grace")
            print(f"{report}: {await expensed.result(timeout=60)}")


if __name__ == "__main__":
    run(main)
