"""Faust's way to Kafka, mended where it loses records, or shows such as were never committed.

1. *What may be committed.* Faust works out gaps between the offsets that it was told of, and takes the record behind a
   gap for part of it; an aborted transaction, a transaction's marker or compaction makes such gaps. It also overlooks a
   hole of one record, or any hole where nothing is committed yet. With more than one record in the works it therefore
   commits beyond some that are not done (faust#606). Here the offset that may be committed is that of the oldest record
   which was handed out and is not acknowledged, else the one behind the last that was: gaps do not matter.
2. *Acknowledging what was skipped.* In a rebalance Faust's streams pass over what is left of the generation before, and
   acknowledge it all the same. Here that does not count: it is read again.
3. *Acknowledging behind one's back.* Faust's compiled streams write into the consumer rather than tell it. Here they are
   not used.
4. *Reading on from the committed offset.* aiokafka's ``seek_to_committed`` leaves a partition where it is when its
   committed offset is 0 or none, after its records were fetched and dropped. Here it then begins at the beginning.
5. *Flushing before a commit.* Faust gives up after 0.1 s in which nothing was sent, and overlooks the record that is just
   being handed on; a failure is only logged. What tables were changed by is then committed, and the change is not in
   their changelog. Here a flush waits for the acknowledgement of all, and raises where one has failed.
6. *Isolation.* Faust reads uncommitted unless it writes in transactions itself. The topics of durably are written in
   transactions, and what these aborted has never been.

A revoke commits what is acknowledged before the partitions go; Faust forgets it, and repeats up to an interval's worth.
`durably_connectors.faust.recovery` mends how tables are read back.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import TYPE_CHECKING, Any, cast

import faust
from faust.transport.drivers import aiokafka
from faust.types import TP

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Mapping

    from faust.types import FutureMessage, Message


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
        """Marks a record as done, unless a rebalance has come between: then it may have been skipped, and is read again.

        Returns:
            Whether it was not marked before.
        """
        if message.acked:
            return False
        message.acked = True
        self._unacked_messages.discard(message)
        if message.generation_id == self.app.consumer_generation_id and self.app.flow_control.is_active():
            self._ledger.acknowledged(message.tp, message.offset)
        self._n_acked += 1
        return True

    async def perform_seek(self) -> None:
        """Reads on from the committed offsets, all of them."""
        self._ledger.forget(self._ledger.partitions())
        committed = await self.seek_to_committed()
        fresh = [tp for tp, offset in committed.items() if (not offset or offset < 0) and not self._is_changelog_tp(tp)]
        if fresh:
            await self._thread.seek_to_beginning(*fresh)
        for tp, offset in committed.items():
            at = offset if offset and offset > 0 else None
            self._read_offset[tp] = at
            self._committed_offset[tp] = at

    async def on_partitions_revoked(self, revoked: set[TP]) -> None:
        """Commits what is done, and forgets the rest."""
        await self.commit()
        # Faust stops what has partitions; one that has none would begin with the next before its tables are read back.
        self.stop_flow()
        self.app.flow_control.suspend()
        # So would a partition whose queue was full, as soon as that is empty.
        self._buffered_partitions.difference_update(revoked)
        await super().on_partitions_revoked(revoked)
        self._ledger.forget(revoked)

    def _filter_tps_with_pending_acks(self, topics: Any = None) -> Iterator[TP]:
        return (tp for tp in self._ledger.partitions() if topics is None or tp in topics or tp.topic in topics)

    def _new_offset(self, tp: TP) -> int | None:
        return self._ledger.committable(tp)

    async def _add_gap(self, tp: TP, offset_from: int, offset_to: int) -> None:
        """Gaps do not matter."""


class Producer(aiokafka.Producer):
    """What writes changelogs. One that has lost a record writes no more: the app ends, and reads its tables again."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._unconfirmed: set[FutureMessage] = set()
        self._failure: BaseException | None = None

    def send_soon(self, fut: FutureMessage) -> None:
        """Hands a record to the buffer; see `flush`."""
        self._unconfirmed.add(fut)
        fut.add_done_callback(self._settled)
        super().send_soon(fut)

    async def flush(self) -> None:
        """Returns when all that was handed over is durable. Raises what kept a record from being so."""
        if self._unconfirmed:
            await self.wait_first(asyncio.wait(set(self._unconfirmed)))  # or until the producer has crashed
        lost = self._failure or self.crash_reason
        if lost is not None:
            raise lost

    def _settled(self, fut: asyncio.Future[Any]) -> None:
        self._unconfirmed.discard(cast("FutureMessage", fut))
        if not fut.cancelled() and fut.exception() is not None:
            self._failure = fut.exception()

    def _settings_extra(self) -> Mapping[str, Any]:
        # A batch that is sent again must not come behind later ones: the newest row of a key is the one that counts.
        return {"acks": "all", "enable_idempotence": True}


class Stream(faust.Stream[Any]):
    """A stream that tells the consumer what it acknowledges."""

    def __aiter__(self) -> AsyncIterator[Any]:
        records = cast("AsyncGenerator[Any, None]", self._py_aiter())
        self._active_agens.add(records)
        return records


class Transport(aiokafka.Transport):
    """Kafka by aiokafka, with our consumer and our producer."""

    Consumer = Consumer
    Producer = Producer
