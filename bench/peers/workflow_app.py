"""The workflow of `workflow_peer`, in a file of its own: the SDK's sandbox imports it again, by its name."""

from __future__ import annotations

from vercel.workflow import Workflows

app = Workflows()


@app.step
async def nothing() -> None:
    """Does nothing."""


@app.workflow
async def sequence(steps: int) -> int:
    """Calls a step that does nothing, again and again, each after the one before."""
    for _ in range(steps):
        await nothing()
    return steps
