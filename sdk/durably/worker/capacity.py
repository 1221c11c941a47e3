"""How many steps may run at once."""

from __future__ import annotations

import threading


class Capacity:
    """A number of ``slots``, shared by the queues of a worker."""

    def __init__(self, slots: int) -> None:
        self.slots = self._free = slots
        self._lock = threading.Lock()
        self._room = threading.Event()

    @property
    def free(self) -> int:
        """How many slots are free just now."""
        return self._free

    def take(self) -> bool:
        """Takes a slot; False where none is free."""
        with self._lock:
            if self._free:
                self._free -= 1
                return True
            self._room.clear()
            return False

    def give(self) -> None:
        """Frees a slot."""
        with self._lock:
            self._free += 1
            if not self._room.is_set():
                self._room.set()

    def wait(self, timeout: float) -> None:
        """Until a slot is freed after a `take` that failed, or for ``timeout`` seconds."""
        self._room.wait(timeout)
