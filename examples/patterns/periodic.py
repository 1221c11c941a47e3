"""Something every so often, for as long as its run lives.

The loop ends after some rounds, and the run hands over to a successor with a fresh log: a log that grows for ever takes
ever longer to replay. The successor's id follows from the number of the round, so a crash never starts two of them.
"""

from datetime import UTC, datetime, timedelta

import durably
from _run import run
from durably import AsyncClient, get_workflow_metadata, sleep, step, workflow

ROUNDS = 3


@step
async def report(number: int) -> str:
    return f"report {number}"


@workflow
async def reports(first: int, last: int, seconds: float) -> str:
    due = datetime.now(UTC)
    for number in range(first, min(first + ROUNDS, last + 1)):
        done = await report(number)
        # Until an instant, not for a while: the time that the report takes must not move the next one.
        due += timedelta(seconds=seconds)
        await sleep(due)
    if first + ROUNDS > last:
        return done
    name = get_workflow_metadata().run_id.partition("/")[0]
    successor = durably.options(run_id=f"{name}/from-{first + ROUNDS}")
    return f"{done}, then run {(await successor.start(reports, first + ROUNDS, last, seconds)).id}"


async def main() -> None:
    async with AsyncClient() as client:
        first = await client.options(run_id="reports").start(reports, 1, 5, 0.05)
        print(await first.result(timeout=60))
        print(await client.get_run("reports/from-4").result(timeout=60))


if __name__ == "__main__":
    run(main)
