"""Worker builds: queues for the steps of runs that are pinned to the build that they began with.

A build is a name for one deployment of the workers' code. A run of a workflow that is ``pinned`` records the build of the
processor that started it, and its steps go to the queue ``<queue>.<build>`` for all its life.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


def checked_build(build: str) -> str:
    """The same build. Raises `ValueError` when none may be named so, because its queues could not be."""
    if not _NAME.fullmatch(build):
        raise ValueError(f"build {build!r:.100}: letters, digits, '.', '_' and '-' only, 64 at most")
    return build


def pinned_queue(queue: str, build: str) -> str:
    """Where the steps of a queue go in runs that are pinned to a build."""
    return f"{queue}.{build}"


def serves(queue: str, step_queue: str) -> bool:
    """Whether requests of a step of the second queue may come by the first: in runs of some build."""
    return queue == step_queue or queue.startswith(pinned_queue(step_queue, ""))


def served(queues: Iterable[str], build: str | None) -> list[str]:
    """What a worker of this build serves: its queues, and those of the runs that are pinned to it."""
    plain = list(dict.fromkeys(queues))
    return plain if build is None else [*plain, *(pinned_queue(queue, build) for queue in plain)]
