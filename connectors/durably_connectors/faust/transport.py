"""Faust's way to Kafka, mended in three places where it loses records, or shows such as were never committed.

1. *What may be committed.* Faust works out gaps between the offsets that it was told of, and takes the record behind a
   gap for part of it; an aborted transaction, a transaction's marker or compaction makes such gaps. It also overlooks a
   hole of one record, or any hole where nothing is committed yet. With more than one record in the works it therefore
   commits beyond some that are not done (faust#606). Here the offset that may be committed is that of the oldest record
   which was handed out and is not acknowledged, else the one behind the last that was: gaps do not matter.
2. *Reading on from the committed offset.* aiokafka's ``seek_to_committed`` leaves a partition where it is when its
   committed offset is 0 or none, after its records were fetched and dropped. Here it then begins at the beginning.
3. *Isolation.* Faust reads uncommitted unless it writes in transactions itself. The topics of durably are written in
   transactions, and what these aborted has never been.

A revoke commits what is acknowledged before the partitions go; Faust forgets it, and repeats up to an interval's worth.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from faust.transport.drivers import aiokafka
from faust.types import TP

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from faust.types import Message


class Ledger:
    """Which records of each partition were handed out, and which of them are acknowledged. Not thread-safe."""

    def __init__(self) -> None:
        self._open: dict[TP, dict[int, None]] = defaultdict(dict)
        self._behind: dict[TP, int] = {}

    def handed_out(self, tp: TP, offset: int) -> None:
        """A record was given to its streams. Those of one partition come in their order."""
        self._open[tp][offset] = None
        self._behind[tp] = offset + 1

    def acknowledged(self, tp: TP, offset: int) -> None:
        """It is done. One that is not known, since its partition was forgotten, changes nothing."""
        self._open[tp].pop(offset, None)

    def committable(self, tp: TP) -> int | None:
        """The offset to read on from if all were to end now; None where nothing was handed out."""
        return next(iter(self._open[tp]), self._behind.get(tp))

    def partitions(self) -> list[TP]:
        """Those of which records were handed out."""
        return list(self._behind)

    def forget(self, tps: Iterable[TP]) -> None:
        """These are read again from their committed offsets, here or elsewhere."""
        for tp in tps:
            self._open.pop(tp, None)
            self._behind.pop(tp, None)


class _Thread(aiokafka.AIOKafkaConsumerThread):
    def _create_worker_consumer(self, transport: Any) -> Any:
        consumer = super()._create_worker_consumer(transport)
        consumer._isolation_level = "read_committed"  # noqa: SLF001 - Faust has no setting; it is read at the start
        return consumer


class Consumer(aiokafka.Consumer):
    """A member of a group that commits as its `Ledger` says."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ledger = Ledger()
        self._deliver = self.callback
        self.callback = self._hand_out

    def _new_consumer_thread(self) -> _Thread:
        return _Thread(self, loop=self.loop, beacon=self.beacon)

    async def _hand_out(self, message: Message) -> None:
        if self.app.topics.acks_enabled_for(message.topic):
            self._ledger.handed_out(message.tp, message.offset)
        await self._deliver(message)

    def ack(self, message: Message) -> bool:
        """Marks a record as done. Whether it was not before."""
        if message.acked:
            return False
        message.acked = True
        self._unacked_messages.discard(message)
        self._ledger.acknowledged(message.tp, message.offset)
        self._n_acked += 1
        return True

    async def perform_seek(self) -> None:
        """Reads on from the committed offsets, all of them."""
        self._ledger.forget(self._ledger.partitions())
        committed = await self.seek_to_committed()
        fresh = [tp for tp, offset in committed.items() if not offset or offset < 0]
        if fresh:
            await self._thread.seek_to_beginning(*fresh)
        for tp, offset in committed.items():
            at = offset if offset and offset > 0 else None
            self._read_offset[tp] = at
            self._committed_offset[tp] = at

    async def on_partitions_revoked(self, revoked: set[TP]) -> None:
        """Commits what is done, and forgets the rest."""
        await self.commit()
        await super().on_partitions_revoked(revoked)
        self._ledger.forget(revoked)

    def _filter_tps_with_pending_acks(self, topics: Any = None) -> Iterator[TP]:
        return (tp for tp in self._ledger.partitions() if topics is None or tp in topics or tp.topic in topics)

    def _new_offset(self, tp: TP) -> int | None:
        return self._ledger.committable(tp)

    async def _add_gap(self, tp: TP, offset_from: int, offset_to: int) -> None:
        """Gaps do not matter."""


class Transport(aiokafka.Transport):
    """Kafka by aiokafka, with our consumer."""

    Consumer = Consumer
