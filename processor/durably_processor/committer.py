"""The commit thread: one Kafka transaction after the other, then RocksDB, then the replies.

Advancing never waits for it. Whatever gathers while a transaction is under way goes into the next one.
"""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from functools import partial

from durably.broker.port import TP, Broker, Committed, Producer, Transactions
from durably.errors import AccessDenied, BrokerError, Fenced
from durably_schemas import Catalogue, Codec
from durably_schemas.records import Reply, ReplyTo

from durably_processor.observer import Observer
from durably_processor.state.store import CHECKPOINT, SNAPSHOTS, Changes, StoreError
from durably_processor.turn import Dispatch, Output, Part, Refused, Turn

log = logging.getLogger("durably.processor")

COMMIT_BOUND = 10.0
"""Seconds after which a commit that has not come back is given up; below the transaction timeout."""
OVERDUE = COMMIT_BOUND + 2.0
"""Seconds after which a commit hangs, whatever its bounds say: librdkafka may not come back (librdkafka#5456)."""
LINGER = 0.1
"""Seconds that events and offsets may wait for company when nobody waits for their commit: no request, reply or end of a
run is among them. What a crash takes of it is made anew from the results, which are durable already; and a transaction
costs the broker as much as several steps."""
OWNER = "owner:"
"""What stands before the transactional id in the metadata of an owner's offsets."""
BACKLOG = 50_000


class _Batch:
    """What one transaction takes."""

    def __init__(self) -> None:
        self.parts: dict[int, Part] = {}
        self.dispatches: list[Dispatch] = []
        self.turn = 0
        self.records = 0
        self.urgent = False

    def add(self, turn: Turn) -> None:
        for number, part in turn.parts.items():
            mine = self.parts.get(number)
            if mine is None:
                self.parts[number] = part
            else:
                mine.merge(part)
            self.urgent |= part.urgent
            self.records += len(part.events) + len(part.outputs) + len(part.copies)
        if turn.dispatch.sent:
            self.dispatches.append(turn.dispatch)
        self.turn = turn.number


class Committer:
    """Commits turns in their order.

    Args:
        broker, catalogue, codec: where to.
        plain: the idempotent producer that early requests go out on, and replies.
        transactions: initialised; its id is ``transactional_id``.
        observer: who is told of what is committed.

    Attributes:
        acked: the number of the last turn that is committed and applied.
        error: why it stopped. What it had not acknowledged is then of unknown outcome.
    """

    def __init__(
        self,
        broker: Broker,
        catalogue: Catalogue,
        codec: Codec,
        plain: Producer,
        transactions: Transactions,
        transactional_id: str,
        observer: Observer | None = None,
    ) -> None:
        self.acked = 0
        self._observer = observer
        self.error: BaseException | None = None
        self._broker = broker
        self._catalogue = catalogue
        self._codec = codec
        self._plain = plain
        self._transactions = transactions
        self._transactional_id = transactional_id
        self._gathered = _Batch()
        self._busy = False
        self._asked: float | None = None  # since when Kafka owes an answer
        self._stopped = False
        self._abandoned = False
        self._group: object = None
        self._current = _Batch()  # under way
        self._outdated = False  # its group metadata; it waits for newer ones
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="durably-commit", daemon=True)

    def start(self, acked: int) -> None:
        """Starts the thread; turns are numbered on from ``acked``."""
        self.acked = acked
        self._thread.start()

    @property
    def overdue(self) -> bool:
        """The commit under way hangs: its outcome is unknown, and will not be known."""
        asked = self._asked
        return asked is not None and time.monotonic() - asked > OVERDUE

    @property
    def outdated(self) -> bool:
        """A commit was refused because the group has moved on since its metadata were taken: see `renew`."""
        return self._outdated

    def renew(self, group: object) -> None:
        """Hands over the group's metadata as of a poll, or of a revoke callback: what is still ours is committed with it."""
        with self._changed:
            self._group = group
            self._outdated = False
            self._changed.notify_all()

    def add(self, turn: Turn, group: object) -> None:
        """Hands a turn over, with the group's metadata as of the poll that it came from.

        Waits where the transactions have fallen far behind.
        """
        with self._changed:
            self._group = group
            self._gathered.add(turn)
            self._changed.notify_all()
            while self._gathered.records > BACKLOG and self.error is None and not self.overdue:
                self._changed.wait(0.1)

    def commit(self, turn: Turn) -> None:
        """Commits a turn at once, on the calling thread, without a group. For who never calls `start`."""
        batch = _Batch()
        batch.add(turn)
        self._commit(batch, None)
        self.acked = turn.number

    def drain(self, timeout: float, group: object) -> bool:
        """Waits until everything handed over is committed and applied; False when that took too long or failed.

        ``group``: its metadata now. A revoke comes within a generation that is newer than that of the last poll.
        """
        end = time.monotonic() + timeout
        self.renew(group)
        with self._changed:
            self._gathered.urgent = True
            self._changed.notify_all()
            while (self._gathered.parts or self._busy) and self.error is None:
                left = end - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(left)
            return self.error is None

    def drop(self, partitions: list[int]) -> None:
        """Drops what is not yet under way, or would be tried again, for partitions that have been lost."""
        with self._changed:
            for number in partitions:
                self._gathered.parts.pop(number, None)
                self._current.parts.pop(number, None)

    def stop(self, timeout: float) -> None:
        """Ends the thread, or abandons it where it hangs: it will write nothing any more."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join(timeout)
        if self._thread.is_alive():
            self._abandoned = True
            log.warning("the commit thread hangs in a transactional call: abandoned")
        else:
            self._transactions.close()

    # -- the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                batch, group = self._next()
                if batch is None:
                    return
                self._commit_in_time(batch, group)
                with self._changed:
                    self.acked = batch.turn
                    self._busy = False
                    self._changed.notify_all()
        except BaseException as e:  # whatever it is, the owner must notice and take over anew
            traceback.clear_frames(e.__traceback__)  # an iterator in one of them would keep a closed store locked
            with self._changed:
                self.error = e
                self._busy = False
                self._changed.notify_all()

    def _next(self) -> tuple[_Batch | None, object]:
        with self._changed:
            while not self._gathered.parts:
                if self._stopped:
                    return None, None
                self._changed.wait()
            if not self._gathered.urgent and not self._stopped:
                self._changed.wait_for(lambda: self._gathered.urgent or self._stopped, LINGER)
            batch = self._current = self._gathered
            self._gathered = _Batch()
            self._busy = True
            self._changed.notify_all()
            return batch, self._group

    def _commit_in_time(self, batch: _Batch, group: object) -> None:
        """Commits a batch; with newer metadata again where the group has moved on meanwhile and left partitions to us.

        Every rebalance makes the metadata of some commit too old, also one in which nothing changes hands. To take all
        partitions over anew for it would send the early requests of the batch once more, and so run steps twice.
        """
        end = time.monotonic() + COMMIT_BOUND
        while True:
            try:
                self._commit(batch, group)
                return
            except Fenced as e:
                if not e.stale or time.monotonic() > end:
                    raise
                self._asked = None
                group = self._newer(group, e, end)
                self._asked = time.monotonic()  # Kafka owes an answer to the following as well
                self._transactions.close()
                self._transactions = self._broker.transactions(self._transactional_id)
                self._transactions.init(COMMIT_BOUND)
                self._asked = None
                if self._abandoned:  # a successor's producer comes with the same id: it, or its end, must be the later
                    raise

    def _newer(self, group: object, refused: Fenced, end: float) -> object:
        """The group's metadata, as soon as they are newer than those that were refused."""
        with self._changed:
            # A revoke may have handed newer ones over while these were on their way; it waits, and so no poll follows.
            self._outdated = self._group is group
            while self._outdated or self._stopped:
                left = end - time.monotonic()
                if left <= 0 or self._stopped:
                    raise refused
                self._changed.wait(left)
            return self._group

    def _commit(self, batch: _Batch, group: object) -> None:
        checkpoints: dict[int, Changes] = {}
        refused: list[Refused] = []
        with self._changed:
            parts = dict(batch.parts)  # what is lost meanwhile leaves the batch
        began = time.monotonic()
        self._transactions.begin()
        for number, part in parts.items():
            self._write(number, part, checkpoints, refused)
        self._await_dispatched(batch)
        offsets = {tp: offset for part in parts.values() for tp, offset in part.offsets.items()}
        self._asked = time.monotonic()
        try:
            self._transactions.commit(owned(offsets, self._transactional_id), group, COMMIT_BOUND)
        except BrokerError as e:
            if refused:
                raise refused[0] from e
            raise
        self._asked = None
        if self._abandoned:
            return  # others have gone on meanwhile, from the topics
        for number, part in parts.items():
            self._apply(part, checkpoints.get(number, {}))
        took = time.monotonic() - began
        for part in parts.values():
            self._reply(part)
        if self._observer is not None:
            self._observer.committed(parts.values(), took)

    def _write(self, number: int, part: Part, checkpoints: dict[int, Changes], refused: list[Refused]) -> None:
        send = self._transactions.send
        self._append(self._catalogue.events, part.events, number, CHECKPOINT, checkpoints)
        self._append(self._catalogue.snapshots, part.copies, number, SNAPSHOTS, checkpoints)
        for key, value in part.summaries.items():
            send(self._catalogue.runs, value, key=key)
        for output in part.outputs:
            if output.run_id is None:
                send(output.topic, output.value, key=output.key, partition=output.partition, headers=output.headers)
                continue

            def told(error: Exception | None, _: int, output: Output = output) -> None:
                if error is not None and isinstance(cause := output.failure(error), Refused):
                    refused.append(cause)

            try:
                send(output.topic, output.value, key=output.key, headers=output.headers, on_ack=told)
            except BrokerError as e:
                raise output.failure(e) from e

    def _append(
        self,
        topic: str,
        records: Sequence[tuple[bytes, bytes | None]],
        number: int,
        checkpoint: bytes,
        into: dict[int, Changes],
    ) -> None:
        send = self._transactions.send
        for key, value in records[:-1]:
            send(topic, value, key=key, partition=number)
        if records:  # a partition's records are acknowledged in order: the last one's offset stands for all

            def on_ack(error: Exception | None, offset: int) -> None:
                if error is None and offset >= 0:  # librdkafka does not always know it after a retry
                    into.setdefault(number, {})[checkpoint] = (offset + 1).to_bytes(8, "big")

            key, value = records[-1]
            send(topic, value, key=key, partition=number, on_ack=on_ack)

    def _await_dispatched(self, batch: _Batch) -> None:
        # Committed implies dispatched: a crash after the commit finds every request on its topic.
        end = time.monotonic() + COMMIT_BOUND
        for dispatch in batch.dispatches:
            while not dispatch.done:
                self._plain.poll(0)
                if dispatch.done:
                    break
                if time.monotonic() > end:
                    raise BrokerError(f"step-requests are not acknowledged within {COMMIT_BOUND} s")
                time.sleep(0.0002)
            if dispatch.error is not None:
                if isinstance(dispatch.error, AccessDenied | Refused):
                    raise dispatch.error
                raise BrokerError(f"a step-request could not be written: {dispatch.error}") from dispatch.error

    def _apply(self, part: Part, checkpoints: Changes) -> None:
        # To the store that the turn came from, not to the partition's present one: a store that was closed meanwhile
        # takes nothing more, and whoever owns the partition now reads the events from the topic.
        part.changes |= checkpoints
        if part.changes:
            part.store.write(part.changes)

    def _reply(self, part: Part) -> None:
        for reply_to, make in part.answers:
            try:
                self._send_reply(reply_to, make())
            except StoreError:
                if part.store.closed:
                    return  # the partition has gone meanwhile, and whoever owns it now is asked again
                raise
            except Exception:  # an asker that is not answered asks again; one bad address must not stop the rest
                log.exception("a reply to partition %s could not be sent", reply_to.partition)
        if part.answers:
            self._plain.poll(0)

    def _send_reply(self, reply_to: ReplyTo, reply: Reply | None) -> None:
        if reply is None:
            return
        value = self._codec.encode(reply)
        if len(value) > self._broker.max_record_bytes:
            why = f"the answer takes {len(value):,} bytes, more than a record holds"
            value = self._codec.encode(Reply(request_id=reply.request_id, status="REFUSED", message=why))
        self._plain.send(self._catalogue.replies, value, partition=reply_to.partition)


def dispatch(turn: Turn, plain: Producer) -> None:
    """Sends what may go out ahead of the transaction, and has not gone out yet."""
    outputs: list[Output] = []
    for part in turn.parts.values():
        outputs += part.early
        part.early = []
    for output in outputs:
        turn.dispatch.sent += 1
        try:
            acked = partial(turn.dispatch.on_ack, output)
            plain.send(output.topic, output.value, key=output.key, headers=output.headers, on_ack=acked)
        except BrokerError as e:
            raise output.failure(e) from e
    if outputs:
        plain.poll(0)


def owned(offsets: Mapping[TP, int], transactional_id: str) -> dict[TP, Committed]:
    """Offsets that say whose transactions may be open behind them."""
    return {tp: Committed(offset, OWNER + transactional_id) for tp, offset in offsets.items()}


def owner_of(metadata: str) -> str | None:
    """The transactional id of an owner that has not released its partition."""
    return metadata.removeprefix(OWNER) if metadata.startswith(OWNER) else None


def released(offsets: Mapping[TP, int]) -> dict[TP, Committed]:
    """Offsets that say that nothing is left open behind them."""
    return {tp: Committed(offset, "") for tp, offset in offsets.items()}
