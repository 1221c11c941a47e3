"""Changing a workflow while runs of it are under way: the new way for those that have not been there, the old for others.

    if patched("ship-insured"):
        await insured(order)
    else:
        await plain(order)

The three lives of a patch, as in Temporal: `patched` while runs are there that took the old way; `deprecate_patch` in its
place when there are none; no call at all when no run is left that recorded the patch by `patched`.
"""

from __future__ import annotations

from durably.errors import ConfigurationError, DurablyError
from durably.runtime import WorkflowContext, workflow_context

LONGEST = 200
"""Characters of a patch's ID."""


def patched(patch_id: str) -> bool:
    """Whether the run takes the new way. In workflows only.

    True where the run comes here for the first time, which its log records; False where it had come by, with code that
    did not ask, before this code was deployed. The first answer of a run is its answer for good, wherever it asks again.

    Args:
        patch_id: names the change; 1 to 200 characters. Another change needs another one.

    Raises:
        DurablyError: called outside of a workflow.
        ConfigurationError: an ID that no patch may have.
    """
    return _run("patched", patch_id).patched(patch_id, deprecated=False)


def deprecate_patch(patch_id: str) -> None:
    """Says that no run is left that takes the old way, whose code is gone. In workflows only.

    Logs with the patch replay, and what it records now needs no call any more: when the runs of `patched` have ended,
    this call may be deleted.

    Raises:
        DurablyError: called outside of a workflow.
        ConfigurationError: an ID that no patch may have.
    """
    _run("deprecate_patch", patch_id).patched(patch_id, deprecated=True)


def _run(call: str, patch_id: str) -> WorkflowContext:
    run = workflow_context()
    if run is None:
        raise DurablyError(f"{call}() works in a workflow only: it asks which way the run has taken")
    if not isinstance(patch_id, str) or not 0 < len(patch_id) <= LONGEST:
        raise ConfigurationError(f"patch {patch_id!r:.100}: use a text of 1 to {LONGEST} characters")
    return run
