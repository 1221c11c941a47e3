"""The workloads: steps that do nothing, so that only durably's own cost is measured."""

from __future__ import annotations

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
