"""A workflow whose step is run, and whose hook is resumed, by a program that has no durably: see foreign.py."""

from __future__ import annotations

from typing import Any

from durably import create_hook, step, workflow


@step(queue="payments")
def take(order: str, cents: int) -> dict[str, Any]:
    """Declared here for its name, its queue and its signature; no worker of ours serves the queue."""
    raise NotImplementedError(f"take({order!r}, {cents}) is for foreign.py to run")


@workflow
async def pay(order: str, cents: int) -> dict[str, Any]:
    """Takes money, and waits for the bank to confirm it."""
    async with create_hook(token=f"paid-{order}") as paid:
        receipt = await take(order, cents)
        return {"receipt": receipt["number"], "confirmed_by": await paid}
