"""Tell whoever watches how far a run is: a step writes to the run's stream, and readers get it at once.

A reader that comes late, or comes back, begins at any index. Nothing of it is in the run's log.
"""

from _run import run
from durably import AsyncClient, get_writable, step, workflow


@step
async def import_rows(rows: list[str]) -> int:
    async with get_writable() as out:
        for n, row in enumerate(rows, 1):
            await out.write({"row": row, "done": n, "of": len(rows)})
    return len(rows)


@workflow
async def import_file(rows: list[str]) -> int:
    return await import_rows(rows)


async def main() -> None:
    async with AsyncClient() as client:
        importing = await client.start(import_file, ["a", "b", "c"])
        async for line in importing.stream():
            print(f"{line['done']} of {line['of']}")
        again = [line["row"] async for line in importing.stream(start_index=-1)]
        print(f"the last row was {again[0]}, and {await importing.result(timeout=60)} rows are imported")


if __name__ == "__main__":
    run(main)
