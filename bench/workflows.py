"""The workloads: steps that do nothing, so that only durably's own cost is measured."""

from __future__ import annotations

import asyncio

from durably import step, workflow


@step
async def nothing() -> None:
    """Does nothing."""


@workflow
async def sequence(steps: int) -> int:
    """Calls a step that does nothing, again and again, each after the one before."""
    for _ in range(steps):
        await nothing()
    return steps


@workflow
async def waves(steps: int, width: int) -> int:
    """Calls as many steps, ``width`` at a time."""
    for _ in range(steps // width):
        await asyncio.gather(*(nothing() for _ in range(width)))
    return steps
