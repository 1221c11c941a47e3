"""Threads for steps that are plain functions."""

from __future__ import annotations

import threading
from queue import SimpleQueue
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Threads:
    """Runs jobs on threads that are made when all others are busy, and kept.

    They are daemons, and nobody joins them: a step that hangs must neither hold a slot for ever nor keep the process
    from ending. The caller bounds how many jobs there are at once.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._idle = 0
        self._made = 0

    def submit(self, job: Callable[[], None]) -> None:
        """Runs a job, which must not raise."""
        with self._lock:
            if self._idle:
                self._idle -= 1
            else:
                self._made += 1
                threading.Thread(target=self._work, name=f"{self._name}-{self._made}", daemon=True).start()
        self._jobs.put(job)

    def close(self) -> None:
        """Ends the threads that are idle now, and the others as they become idle."""
        for _ in range(self._made):
            self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            with self._lock:
                self._idle += 1
