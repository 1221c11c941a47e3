"""The broker port over the log of an embedded broker."""

from __future__ import annotations

from contextlib import suppress
from functools import lru_cache
from itertools import count
from random import randrange
from time import monotonic
from typing import TYPE_CHECKING

from durably_schemas.catalogue import murmur2

from durably.broker.embedded_cursor import Reading
from durably.broker.embedded_group import Member, Membership
from durably.broker.embedded_log import identity_of
from durably.broker.port import TP, Committed, GroupState
from durably.errors import BrokerError, Fenced, RecordTooLarge

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from durably_schemas.catalogue import Topic

    from durably.broker.acl import Acl
    from durably.broker.embedded_group import Coordinator, Group
    from durably.broker.embedded_log import Log, Partition
    from durably.broker.port import End, Headers, Listener, Message, OnAck, TopicState

MAX_RECORD_BYTES = 1_000_000
WAIT_SECONDS = 0.25  # how often a waiting member looks whether another one has died

_hash = lru_cache(maxsize=20_000)(murmur2)
_turns = count(randrange(1 << 16))  # noqa: S311 - spreads load, keeps no secret


def check_size(key: bytes | None, value: bytes | None, headers: Headers) -> None:
    """Raises `RecordTooLarge` for a record that no topic takes."""
    size = len(value or b"") + len(key or b"")
    if headers:
        size += sum(len(name) + len(data) for name, data in headers)
    if size > MAX_RECORD_BYTES:
        raise RecordTooLarge.of("a record", size, MAX_RECORD_BYTES)


def state_of(log: Log, coordinator: Coordinator, group: str, tps: Iterable[TP]) -> GroupState:
    """As `Broker.group_state`; to be called with the log's lock held."""
    found = {tp: log.committed(group, tp).offset for tp in tps}
    return GroupState(coordinator.members(group), {tp: offset for tp, offset in found.items() if offset >= 0})


def _place(log: Log, topic: str, partition: int | None, key: bytes | None) -> Partition:
    """The partition of a record."""
    partitions = log.partitions.get(topic)
    if partitions is None or partition is not None:
        return log.partition(TP(topic, partition or 0))
    number = next(_turns) if key is None else _hash(key) & 0x7FFFFFFF
    return partitions[number % len(partitions)]


class EmbeddedProducer:
    """A `Producer`. Records are written when somebody waits for them, when they are many, or at the next poll."""

    def __init__(self, log: Log, release: Callable[[], None]) -> None:
        self._log = log
        self._release = release
        self._sent: list[tuple[OnAck | None, Partition, int]] = []

    def send(
        self,
        topic: str,
        value: bytes | None,
        *,
        key: bytes | None = None,
        partition: int | None = None,
        headers: Headers = (),
        on_ack: OnAck | None = None,
    ) -> None:
        """As `Producer.send`."""
        check_size(key, value, headers)
        log = self._log
        with log.lock:
            log.check()
            place = _place(log, topic, partition, key)
            offset = log.stage(place, key, value, headers, log.now())
            self._sent.append((on_ack, place, offset))
            if log.due(place):
                with suppress(BrokerError):  # which on_ack is told
                    log.write()

    def poll(self, timeout: float = 0) -> None:  # noqa: ARG002 - nothing is ever left to wait for
        """As `Producer.poll`."""
        if not self._sent:
            return
        error: BrokerError | None = None
        with self._log.lock:
            sent, self._sent = self._sent, []
            try:
                self._log.write()
            except BrokerError as failure:
                error = failure
        for on_ack, partition, offset in sent:
            if on_ack:
                on_ack(None, offset) if offset < partition.end else on_ack(error, -1)

    def flush(self, timeout: float) -> int:
        """As `Producer.flush`."""
        self.poll(timeout)
        return 0

    def close(self) -> None:
        """As `Producer.close`."""
        self.poll()
        self._release()


class EmbeddedTransactions:
    """A `Transactions`."""

    def __init__(self, log: Log, coordinator: Coordinator, transactional_id: str) -> None:
        self._log = log
        self._owners = coordinator.transactional
        self._id = transactional_id
        self._release = log.hold()
        self._open = False
        self._staged: list[tuple[Partition, bytes | None, bytes | None, Headers, OnAck | None]] = []

    def init(self, timeout: float) -> None:  # noqa: ARG002 - nothing is ever left open
        """As `Transactions.init`."""
        with self._log.lock:
            self._log.check()
            self._owners[self._id] = self

    def _check(self) -> None:
        self._log.check()
        if self._owners.get(self._id) is not self:
            raise Fenced(f"transactional id {self._id!r} has another owner by now, or init() was not called")

    def begin(self) -> None:
        """As `Transactions.begin`."""
        self._check()
        if self._open:
            raise BrokerError("a transaction is open already")
        self._open = True

    def send(
        self,
        topic: str,
        value: bytes | None,
        *,
        key: bytes | None = None,
        partition: int | None = None,
        headers: Headers = (),
        on_ack: OnAck | None = None,
    ) -> None:
        """As `Transactions.send`."""
        if not self._open:
            raise BrokerError("no transaction is open: begin() comes first")
        check_size(key, value, headers)
        place = _place(self._log, topic, partition, key)
        self._staged.append((place, key, value, headers, on_ack))

    def commit(self, offsets: Mapping[TP, Committed], group: object, timeout: float) -> None:  # noqa: ARG002
        """As `Transactions.commit`; an outcome is never unknown, and nothing is waited for."""
        if not self._open:
            raise BrokerError("no transaction is open: begin() comes first")
        log = self._log
        acks: list[tuple[OnAck | None, int]] = []
        try:
            with log.lock:
                self._check()
                timestamp = log.now()
                if isinstance(group, Membership):
                    group.check()
                    log.stage_offsets(group.group.name, offsets)
                elif offsets:
                    raise BrokerError(f"offsets need the metadata of their group, not {group!r}")
                for place, key, value, headers, on_ack in self._staged:
                    acks.append((on_ack, log.stage(place, key, value, headers, timestamp)))
                log.write()
        except BrokerError as error:
            self._abort(error)
            raise
        self._staged, self._open = [], False
        for on_ack, offset in acks:
            if on_ack:
                on_ack(None, offset)

    def _abort(self, error: BrokerError) -> None:
        staged, self._staged, self._open = self._staged, [], False
        for *_, on_ack in staged:
            if on_ack:
                on_ack(error, -1)

    def close(self) -> None:
        """As `Transactions.close`."""
        with self._log.lock:
            if self._owners.get(self._id) is self:
                del self._owners[self._id]
        self._abort(BrokerError("the transaction was aborted"))
        self._release()


class EmbeddedConsumer:
    """A `Consumer`."""

    def __init__(
        self,
        log: Log,
        group: Group,
        topics: Sequence[str],
        listener: Listener,
        *,
        paused: bool,
        instance_id: str | None,
    ) -> None:
        self._log = log
        self._group = group
        self._topics = topics
        self._listener = listener
        self._paused = paused
        self._instance_id = instance_id
        self._release = log.hold()
        self._reading = Reading(log)
        self._closed = False
        self._join()

    def _join(self) -> None:
        self._member = Member(self._reading, self._instance_id)
        with self._log.lock:
            self._group.join(self._member)

    def _tps(self, numbers: Iterable[int]) -> list[TP]:
        known = self._log.partitions
        return [TP(topic, number) for number in numbers for topic in self._topics if number < len(known[topic])]

    def poll(self, timeout: float, limit: int = 500) -> list[Message | End]:
        """As `Consumer.poll`."""
        deadline = monotonic() + timeout
        while True:
            until = deadline if self._settle() else min(deadline, monotonic() + WAIT_SECONDS)
            out = self._reading.take(limit)
            if out or (not self._reading.wait(until) and until == deadline):
                return out

    def _settle(self) -> bool:
        """Takes part in a rebalance; true when this member has all that it is to have."""
        member, group, lock = self._member, self._group, self._log.lock
        with lock:
            self._log.check()
            if self._closed:
                raise BrokerError(f"this member of group {group.name!r} is closed")
            if member.fenced:
                raise Fenced(f"another member of group {group.name!r} has instance_id {self._instance_id!r}")
            member.polled = monotonic()
            if group.settled(member):
                return True
            lost = member.id not in group.members
            leaving = sorted(member.owned if lost else member.owned - group.target[member.id])
        if leaving:
            try:
                (self._listener.on_lost if lost else self._listener.on_revoked)(leaving)
            finally:
                with lock:
                    self._reading.remove(self._tps(leaving))
                    member.owned.difference_update(leaving)
                    group.wake()
        if lost:
            self._join()
            return False
        return self._take_up(member)

    def _take_up(self, member: Member) -> bool:
        group = self._group
        with self._log.lock:
            if member.id not in group.members:
                return False
            member.polled = monotonic()
            coming = sorted(group.lacking(member))
            member.generation = group.generation
            member.owned.update(coming)
            for tp in self._tps(coming):
                offset = self._log.committed(group.name, tp).offset
                start = self._log.partition(tp).start
                self._reading.add(tp, start if offset < 0 else offset, paused=self._paused)
        if coming:
            self._listener.on_assigned(coming)
        return group.settled(member)

    def group_metadata(self) -> object:
        """As `Consumer.group_metadata`."""
        return Membership(self._group, self._member, self._member.generation)

    def committed(self, tps: Iterable[TP], timeout: float) -> dict[TP, Committed]:  # noqa: ARG002
        """As `Consumer.committed`."""
        with self._log.lock:
            return {tp: self._log.committed(self._group.name, tp) for tp in tps}

    def rewind(self, positions: Mapping[TP, int]) -> None:
        """As `Consumer.rewind`."""
        with self._log.lock:
            for tp, position in positions.items():
                if tp not in self._reading.cursors:
                    raise BrokerError(f"{tp.topic}[{tp.partition}] is not assigned to this member")
                self._reading.add(tp, position, paused=True)

    def pause(self, tps: Iterable[TP]) -> None:
        """As `Consumer.pause`."""
        self._reading.pause(tps, paused=True)

    def resume(self, tps: Iterable[TP]) -> None:
        """As `Consumer.resume`."""
        self._reading.pause(tps, paused=False)

    def commit(self, offsets: Mapping[TP, Committed], *, wait: bool = False) -> None:
        """As `Consumer.commit`."""
        with self._log.lock:
            try:
                Membership(self._group, self._member, self._member.generation).check()
                if not self._member.owned.issuperset(tp.partition for tp in offsets):
                    raise Fenced(f"not all of {sorted(offsets)} belong to this member of {self._group.name!r}")
            except Fenced:
                if wait:
                    raise
                return
            self._log.stage_offsets(self._group.name, offsets)
            if wait:
                self._log.write()

    def close(self) -> None:
        """As `Consumer.close`."""
        if self._closed:
            return
        member, lock = self._member, self._log.lock
        with lock:
            lost = self._group.members.get(member.id) is not member
            owned = sorted(member.owned)
        try:
            if owned:
                (self._listener.on_lost if lost else self._listener.on_revoked)(owned)
        finally:
            with lock:
                self._closed = True
                self._reading.close()
                member.owned.clear()
                self._group.leave(member)
            self._release()


class EmbeddedReader:
    """A `Reader`."""

    def __init__(self, log: Log, positions: Mapping[TP, int], release: Callable[[], None]) -> None:
        self._release = release
        self._reading = Reading(log)
        for tp, position in positions.items():
            self._reading.add(tp, position)

    def poll(self, timeout: float, limit: int = 500) -> list[Message | End]:
        """As `Reader.poll`."""
        return self._reading.poll(timeout, limit)

    def seek(self, tp: TP, offset: int) -> None:
        """As `Reader.seek`."""
        self._reading.add(tp, offset)

    def wake(self) -> None:
        """Ends a poll that waits, from another thread."""
        self._reading.poke()

    def close(self) -> None:
        """As `Reader.close`."""
        self._reading.close()
        self._release()


class EmbeddedBroker:
    """A `Broker`: one holder of a path's log.

    Args:
        log: the path's log, of which this process has only one.
        coordinator: its groups and transactional ids.
    """

    max_record_bytes = MAX_RECORD_BYTES

    def __init__(self, log: Log, coordinator: Coordinator) -> None:
        self.url = f"embedded:{log.path}"
        self._log = log
        self._coordinator = coordinator
        self._release = log.hold()

    def producer(self) -> EmbeddedProducer:
        """As `Broker.producer`."""
        return EmbeddedProducer(self._log, self._log.hold())

    def transactions(self, transactional_id: str, timeout: float = 15) -> EmbeddedTransactions:  # noqa: ARG002
        """As `Broker.transactions`; ``timeout`` has no meaning here, because nothing open is in anybody's way."""
        return EmbeddedTransactions(self._log, self._coordinator, transactional_id)

    def consumer(
        self,
        group: str,
        topic: str,
        listener: Listener,
        *,
        companions: Sequence[str] = (),
        paused: bool = False,
        instance_id: str | None = None,
    ) -> EmbeddedConsumer:
        """As `Broker.consumer`. Closing leaves the group also with an ``instance_id``; it keeps out a second member."""
        log, topics = self._log, (topic, *companions)
        with log.lock:
            for name in topics:
                log.partition(TP(name, 0))
            members = self._coordinator.group(group, topic, len(log.partitions[topic]))
        return EmbeddedConsumer(log, members, topics, listener, paused=paused, instance_id=instance_id)

    def reader(self, positions: Mapping[TP, int], *, committed: bool = True) -> EmbeddedReader:  # noqa: ARG002
        """As `Broker.reader`; what is not committed is not in the log."""
        for tp in positions:
            self._log.partition(tp)
        return EmbeddedReader(self._log, positions, self._log.hold())

    def end_offsets(self, tps: Iterable[TP], *, committed: bool = False, timeout: float = 30) -> dict[TP, int]:  # noqa: ARG002
        """As `Broker.end_offsets`."""
        with self._log.lock:
            self._log.write()
            return {tp: self._log.partition(tp).end for tp in tps}

    def start_offsets(self, tps: Iterable[TP], *, timeout: float = 30) -> dict[TP, int]:  # noqa: ARG002
        """As `Broker.start_offsets`."""
        with self._log.lock:
            return {tp: self._log.partition(tp).start for tp in tps}

    def offsets_at(self, tps: Iterable[TP], timestamp: int, *, timeout: float = 30) -> dict[TP, int]:  # noqa: ARG002
        """As `Broker.offsets_at`."""
        with self._log.lock:
            self._log.write()
            return {tp: self._log.offset_at(self._log.partition(tp), timestamp) for tp in tps}

    def partitions(self, topic: str, timeout: float = 10) -> int:  # noqa: ARG002
        """As `Broker.partitions`."""
        return len(self._log.partitions.get(topic, ()))

    def identity(self, topic: str, timeout: float = 10) -> str:  # noqa: ARG002
        """As `Broker.identity`."""
        return identity_of(self._log.path, topic)

    def group_metadata_of(self, group: str, tps: Iterable[TP], timeout: float = 30) -> dict[TP, str]:  # noqa: ARG002
        """As `Broker.group_metadata_of`."""
        with self._log.lock:
            return {tp: self._log.committed(group, tp).metadata for tp in tps}

    def group_state(self, group: str, tps: Iterable[TP], timeout: float = 10) -> GroupState:  # noqa: ARG002
        """As `Broker.group_state`."""
        with self._log.lock:
            return state_of(self._log, self._coordinator, group, tps)

    def describe(self, names: Iterable[str], timeout: float = 30) -> dict[str, TopicState]:  # noqa: ARG002
        """As `Broker.describe`."""
        return {name: self._log.topics[name] for name in names if name in self._log.topics}

    def topics(self, timeout: float = 30) -> list[str]:  # noqa: ARG002
        """As `Broker.topics`."""
        return sorted(self._log.topics)

    def require(self, acls: Iterable[Acl], timeout: float = 10) -> None:
        """As `Broker.require`: who reaches the folder may do everything."""

    def create(self, topics: Iterable[Topic], timeout: float = 30) -> None:  # noqa: ARG002
        """As `Broker.create`."""
        self._log.create(topics)

    def truncate(self, offsets: Mapping[TP, int], timeout: float = 30) -> None:  # noqa: ARG002
        """As `Broker.truncate`."""
        with self._log.lock:
            self._log.write()
            for tp, offset in offsets.items():
                self._log.truncate(self._log.partition(tp), offset)

    def close(self) -> None:
        """As `Broker.close`; the path stays open while something made from a broker of it is."""
        self._release()
