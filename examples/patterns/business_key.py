"""The token of a hook is a business key: whoever knows the order's number reaches its run, without any look-up.

Only one open hook has a token, so it is a lock as well: a second run of the same order learns who holds it.
"""

from _run import resume, run
from durably import AsyncClient, create_hook, workflow


@workflow
async def deliver(order: str) -> str:
    async with create_hook(token=f"order-{order}") as news:
        if (other := await news.get_conflict()) is not None:
            return f"run {other.id} does it already"
        seen = []
        async for event in news:
            seen.append(event["state"])
            if event["state"] == "delivered":
                break
    return " > ".join(seen)


async def main() -> None:
    async with AsyncClient() as client:
        first = await client.options(run_id="deliver-7").start(deliver, "7")
        await resume(client, "order-7", {"state": "packed"})
        second = await client.start(deliver, "7")
        print(await second.result(timeout=60))
        for state in ("shipped", "delivered"):
            await client.resume_hook("order-7", {"state": state})
        print(await first.result(timeout=60))


if __name__ == "__main__":
    run(main)
