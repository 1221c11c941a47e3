"""Steps that feed each other while they run: one writes a stream, the next one reads it, and writes another.

The workflow makes the streams and passes their handles; the chunks go from worker to worker by way of the topic
``streams``, never through the log. A retried step writes its chunks again: here every chunk carries its number, and the
reader skips what it has had.
"""

import asyncio

from _run import run
from durably import AsyncClient, Readable, Writable, get_writable, step, workflow


@step
async def produce(n: int, out: Writable) -> None:
    async with out:
        for number in range(n):
            await out.write({"number": number, "text": f"line {number}"})


@step
async def shout(lines: Readable, out: Writable) -> None:
    expected = 0
    async with out:
        async for line in lines:
            if line["number"] == expected:
                await out.write(line | {"text": line["text"].upper()})
                expected += 1


@step
async def collect(lines: Readable) -> list[str]:
    return [line["text"] async for line in lines]


@workflow
async def pipeline(n: int) -> list[str]:
    raw, loud = get_writable("raw"), get_writable("loud")
    _, _, collected = await asyncio.gather(produce(n, raw), shout(raw.readable, loud), collect(loud.readable))
    return collected


async def main() -> None:
    async with AsyncClient() as client:
        piped = await client.start(pipeline, 1000)
        lines = await piped.result(timeout=60)
        print(f"{len(lines)} lines, from {lines[0]!r} to {lines[-1]!r}")


if __name__ == "__main__":
    run(main)
