"""Ask again and again until something is done, with a durable pause between two questions.

Use it for systems that cannot call back. Each question is a step of its own, so the log shows every answer; let the
pause grow, so that a wait of days has hundreds of events and not a million.
"""

from _run import run
from durably import AsyncClient, sleep, step, workflow


@step
async def job_status(job: str, question: int) -> str:
    return f"{job} done" if question == 4 else f"{job} running"


@workflow
async def wait_for_job(job: str) -> int:
    question, pause = 1, 0.05
    while not (await job_status(job, question)).endswith("done"):
        await sleep(pause)
        question, pause = question + 1, min(pause * 2, 3600)
    return question


async def main() -> None:
    async with AsyncClient() as client:
        polled = await client.start(wait_for_job, "job-1")
        print(f"done at question {await polled.result(timeout=60)}")


if __name__ == "__main__":
    run(main)
