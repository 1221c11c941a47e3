"""Replaying recorded histories with the code that there is now."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from durably import failures, history
from durably.authoring import Registry
from durably.authoring import registry as everything
from durably.errors import NonDeterminismError
from durably.installation import processor_module

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from durably_schemas.records import Event

    from durably.authoring import WorkflowDefinition


def replay_history(
    recorded: str | os.PathLike[str] | Sequence[Event],
    workflows: Iterable[WorkflowDefinition[..., Any]] | None = None,
) -> None:
    """Replays a run's log: returns where the code does what the log says it did, and raises where it does not.

    No step is run. A run that goes on is replayed as far as its log goes.

    Args:
        recorded: a file that ``durably runs events RUN --json`` has written, or the events of a run.
        workflows: the code; everything that was registered in this process by default.

    Raises:
        NonDeterminismError: the code does something else; says what the log expects and what was found.
        DeterminismError: the code does what only a step may do.
        RegistrationError: the run's workflow is not among them.
        SerializationError: the file holds no history.
        OSError: the file cannot be read.
    """
    events = history.load(Path(recorded).read_bytes()) if isinstance(recorded, str | os.PathLike) else list(recorded)
    registry = everything
    if workflows is not None:
        registry = Registry()
        registry.steps = everything.steps
        for definition in workflows:
            registry.add_workflow(definition)
    try:
        processor_module("inline").check_history(events, registry)
    except NonDeterminismError as e:
        if os.environ.get("PYTHONHASHSEED") != "0":
            failures.add_note(
                e, "PYTHONHASHSEED is not 0, as it is in processors: sets of str may have another order here than there"
            )
        raise
