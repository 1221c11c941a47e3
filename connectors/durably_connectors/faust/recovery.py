"""How tables are read back from their changelogs: Faust's way, mended where it loses records, or stands still for ever.

1. *From tables to streams.* While tables are read back the flow is open, for their changelogs. Faust then opens the
   partitions of the streams, seeks these to their committed offsets, and empties the queues: what was read meanwhile is
   given to nobody, and nothing behind it is ever committed. Here the flow is closed until the streams stand where they are
   to begin.
2. *An outage.* What takes Kafka longer than a request may is taken by Faust for the end of its service: nothing is read any
   more, by a process that lives on. Here it is waited for; what fails ends the process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from faust.tables.manager import TableManager
from faust.tables.recovery import Recovery

if TYPE_CHECKING:
    from mode import Seconds


class MendedRecovery(Recovery):
    """Reads tables back after each rebalance."""

    async def on_recovery_completed(self, generation_id: int = 0) -> None:
        """Has the streams begin, when they have been sought."""
        self.app.consumer.stop_flow()
        self.app.flow_control.suspend()
        await super().on_recovery_completed(generation_id)

    async def _wait(self, coro: Any, timeout: Seconds | None = None) -> None:  # noqa: ARG002, ASYNC109 - as Faust has it
        await super()._wait(coro)


class Tables(TableManager):
    """The tables of an app."""

    @property
    def recovery(self) -> Recovery:
        """What reads them back."""
        if self._recovery is None:
            self._recovery = MendedRecovery(self.app, self, beacon=self.beacon, loop=self.loop)
        return self._recovery
