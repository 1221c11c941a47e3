"""A shop: orders come on one topic, payments on another, and a run for each order waits for its payment."""

from __future__ import annotations

import asyncio
from typing import Any

import durably
from durably import step, workflow

PATIENCE = 3 * 86_400  # seconds


@step(name="ship-purchase")  # examples/orders has a step `ship`, and one process may serve both
async def ship(order: str) -> str:
    return f"parcel-{order}"


@workflow
async def purchase(order: str, cents: int) -> dict[str, Any]:
    """Waits for the payment of an order, and ships it."""
    try:
        async with asyncio.timeout(PATIENCE), durably.create_hook(token=f"payment-{order}") as payment:
            paid = await payment
    except TimeoutError:
        return {"order": order, "due": cents}
    return {"order": order, "due": cents - paid["cents"], "parcel": await ship(order)}
