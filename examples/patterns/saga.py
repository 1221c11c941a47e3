"""A saga: each step that is done leaves its undoing on a stack, and a failure, or a cancellation, undoes in reverse.

The undoing steps get many retries, since nobody undoes them. Write them so that a repetition does no harm.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from _run import run
from durably import AsyncClient, FatalError, step, workflow

Undo = Callable[[], Coroutine[Any, Any, str]]


@step
async def book_flight(trip: str) -> str:
    return f"flight for {trip}"


@step
async def book_hotel(trip: str) -> str:
    return f"hotel for {trip}"


@step
async def book_car(trip: str) -> str:
    raise FatalError(f"no car is left in {trip}")


@step(max_retries=1_000)
async def call_off(what: str) -> str:
    return f"called off: {what}"


@workflow
async def trip(name: str) -> list[str]:
    undo: list[Undo] = []
    try:
        flight = await book_flight(name)
        undo.append(lambda: call_off(flight))
        hotel = await book_hotel(name)
        undo.append(lambda: call_off(hotel))
        return [flight, hotel, await book_car(name)]
    except (Exception, asyncio.CancelledError) as e:
        undone = [await action() for action in reversed(undo)]
        if isinstance(e, asyncio.CancelledError):
            raise
        return [f"failed: {e}", *undone]


async def main() -> None:
    async with AsyncClient() as client:
        booked = await client.start(trip, "Lisbon")
        print("\n".join(await booked.result(timeout=60)))


if __name__ == "__main__":
    run(main)
