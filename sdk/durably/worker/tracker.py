"""Which offset of a partition may be committed: the low-water mark of what was taken and is not finished."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from durably.broker.port import Committed

if TYPE_CHECKING:
    from durably.broker.port import TP


class Tracker:
    """The offsets of one partition, for as long as one assignment of it lasts.

    Everything committed was released, and so was everything below it. `release` may be called from any thread, the
    rest from the polling thread only.

    Args:
        tp: the partition.
        claim_below: requests below this offset were there before the assignment; somebody may have run them.
    """

    def __init__(self, tp: TP, claim_below: int) -> None:
        self.tp = tp
        self.claim_below = claim_below
        self.revoked = False
        self._order: deque[int] = deque()
        self._open: set[int] = set()
        self._released: deque[int] = deque()  # appended to by other threads: a deque's append is atomic
        self._next = -1
        self._committed = -1

    def take(self, offset: int) -> None:
        """A request was read. Offsets rise; gaps are normal (transaction markers)."""
        self._order.append(offset)
        self._open.add(offset)
        self._next = offset + 1

    def release(self, offset: int) -> None:
        """This request need not be delivered again. A second release of the same changes nothing."""
        self._released.append(offset)

    def exhausted(self, offset: int) -> None:
        """Everything below ``offset`` was read."""
        self._next = max(self._next, offset)

    @property
    def position(self) -> int:
        """The next offset that nothing has been taken of; -1 while nothing is known. May be asked from any thread."""
        return self._next

    def mark(self) -> int:
        """The next offset to read after a restart; -1 while nothing is known."""
        while self._released:
            self._open.discard(self._released.popleft())
        while self._order and self._order[0] not in self._open:
            self._order.popleft()
        return self._order[0] if self._order else self._next

    def due(self) -> Committed | None:
        """What to commit, where that has changed since it was last asked."""
        mark = self.mark()
        if mark <= self._committed:
            return None
        self._committed = mark
        return Committed(mark, "")
