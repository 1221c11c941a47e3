"""The broker port in memory: records, groups and transactions of one process, at a time that the caller sets."""

from __future__ import annotations

import threading
import time
import uuid
from collections import defaultdict, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from durably_schemas.catalogue import partition_for

from durably.broker.port import TP, Committed, End, GroupMember, GroupState, Message, TopicState
from durably.errors import RecordTooLarge, UnknownTopic

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from durably_schemas.catalogue import Topic

    from durably.broker.acl import Acl
    from durably.broker.port import Headers, Listener, OnAck

MAX_RECORD_BYTES = 1_000_000


def _wall_clock() -> int:
    return time.time_ns() // 1_000_000


@dataclass
class Group:
    """A consumer group: what its members own, and what it has committed."""

    members: list[MemoryConsumer] = field(default_factory=list)
    owner: dict[int, MemoryConsumer] = field(default_factory=dict)
    committed: dict[TP, Committed] = field(default_factory=dict)


class MemoryBroker:
    """Everything is durable and readable at once, and lost with the process. Acknowledgements wait for ``poll``, as Kafka's do.

    Args:
        max_record_bytes: what one record may hold.
        now: the time that records are stamped with, in milliseconds since the epoch.
        on_append: is called after each record that is written, on the thread that wrote it.

    Attributes:
        logs: the records of each partition.
        groups: the consumer groups by name.
        arrived: notified when a record is written; its lock guards all that is here.
    """

    url = "memory:"

    def __init__(
        self,
        max_record_bytes: int = MAX_RECORD_BYTES,
        *,
        now: Callable[[], int] = _wall_clock,
        on_append: Callable[[], None] = lambda: None,
    ) -> None:
        self.max_record_bytes = max_record_bytes
        self.logs: dict[TP, list[Message]] = {}
        self.groups: dict[str, Group] = defaultdict(Group)
        self.arrived = threading.Condition(threading.RLock())
        self._topics: dict[str, Topic] = {}
        self._now = now
        self._on_append = on_append
        self._identity = uuid.uuid4().hex

    # -- what the others are made of -------------------------------------------------------------------------------

    def append(
        self,
        topic: str,
        value: bytes | None,
        key: bytes | None = None,
        partition: int | None = None,
        headers: Headers = (),
    ) -> int:
        """Writes a record; returns its offset."""
        with self.arrived:
            if partition is None:
                count = self._topics[topic].partitions
                partition = partition_for(key, count) if key is not None and count > 1 else 0
            log = self.logs[TP(topic, partition)]
            log.append(Message(topic, partition, len(log), self._now(), key, value, tuple(headers)))
            self.arrived.notify_all()
            offset = len(log) - 1
        self._on_append()
        return offset

    def check(self, topic: str, value: bytes | None) -> None:
        """Raises `UnknownTopic` or `RecordTooLarge` where a record cannot be written."""
        if topic not in self._topics:
            raise UnknownTopic(topic)
        if len(value or b"") > self.max_record_bytes:
            raise RecordTooLarge(f"{len(value or b'')} bytes")

    def records(self, topic: str) -> list[Message]:
        """All records of a topic, in the order of their partitions and offsets."""
        return [m for p in range(self.partitions(topic)) for m in self.logs[TP(topic, p)]]

    # -- the port --------------------------------------------------------------------------------------------------

    def producer(self) -> MemoryProducer:
        """A plain producer."""
        return MemoryProducer(self)

    def transactions(self, transactional_id: str, timeout: float = 15) -> MemoryTransactions:  # noqa: ARG002 - the port's
        """A transactional producer. Nobody is fenced: there is one process."""
        return MemoryTransactions(self)

    def consumer(
        self,
        group: str,
        topic: str,
        listener: Listener,
        *,
        companions: Sequence[str] = (),
        paused: bool = False,
        instance_id: str | None = None,  # noqa: ARG002 - the port's
    ) -> MemoryConsumer:
        """A member of a group."""
        return MemoryConsumer(self, self.groups[group], topic, listener, companions=companions, paused=paused)

    def reader(self, positions: Mapping[TP, int], *, committed: bool = True) -> MemoryReader:  # noqa: ARG002 - the port's
        """A reader without a group."""
        return MemoryReader(self, dict(positions))

    def end_offsets(self, tps: Iterable[TP], *, committed: bool = False, timeout: float = 30) -> dict[TP, int]:  # noqa: ARG002
        """The next offset of each."""
        return {tp: len(self.logs[tp]) for tp in tps}

    def start_offsets(self, tps: Iterable[TP], *, timeout: float = 30) -> dict[TP, int]:  # noqa: ARG002
        """0: nothing is ever dropped."""
        return dict.fromkeys(tps, 0)

    def offsets_at(self, tps: Iterable[TP], timestamp: int, *, timeout: float = 30) -> dict[TP, int]:  # noqa: ARG002
        """The first offset of each at or after an instant."""
        return {
            tp: next((m.offset for m in self.logs[tp] if m.timestamp >= timestamp), len(self.logs[tp])) for tp in tps
        }

    def partitions(self, topic: str, timeout: float = 10) -> int:  # noqa: ARG002
        """How many partitions the topic has; 0 where it does not exist."""
        return self._topics[topic].partitions if topic in self._topics else 0

    def identity(self, topic: str, timeout: float = 10) -> str:  # noqa: ARG002
        """What tells this topic from every other."""
        return f"{self._identity}/{topic}"

    def group_metadata_of(self, group: str, tps: Iterable[TP], timeout: float = 30) -> dict[TP, str]:  # noqa: ARG002
        """The text stored with a group's offsets."""
        committed = self.groups[group].committed
        return {tp: committed[tp].metadata for tp in tps if tp in committed}

    def group_state(self, group: str, tps: Iterable[TP], timeout: float = 10) -> GroupState:  # noqa: ARG002
        """A group's members, and its offsets of these partitions."""
        with self.arrived:
            found = self.groups[group]
            members = [GroupMember(f"member-{n}", "", list(m.positions)) for n, m in enumerate(found.members)]
            return GroupState(members, {tp: found.committed[tp].offset for tp in tps if tp in found.committed})

    def describe(self, names: Iterable[str], timeout: float = 30) -> dict[str, TopicState]:  # noqa: ARG002
        """The topics that exist, of those named."""
        return {n: TopicState(t.partitions, t.config) for n in names if (t := self._topics.get(n))}

    def topics(self, timeout: float = 30) -> list[str]:  # noqa: ARG002
        """The names of all topics."""
        return list(self._topics)

    def require(self, acls: Iterable[Acl], timeout: float = 10) -> None:
        """Everything is granted."""

    def create(self, topics: Iterable[Topic], timeout: float = 30) -> None:  # noqa: ARG002
        """Creates topics; those that exist stay as they are."""
        for topic in topics:
            self._topics.setdefault(topic.name, topic)
            for p in range(topic.partitions):
                self.logs.setdefault(TP(topic.name, p), [])

    def truncate(self, offsets: Mapping[TP, int], timeout: float = 30) -> None:
        """Drops nothing: a few records may stay, and here all do."""

    def close(self) -> None:
        """Nothing is held."""


class MemoryProducer:
    """Appends at once; keeps the acknowledgements."""

    def __init__(self, broker: MemoryBroker) -> None:
        self._broker = broker
        self._acks: deque[tuple[OnAck, Exception | None, int]] = deque()

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
        """Writes a record; ``on_ack`` waits for `poll`."""
        self._broker.check(topic, value)
        self._acknowledge(on_ack, None, self._broker.append(topic, value, key, partition, headers))

    def _acknowledge(self, on_ack: OnAck | None, error: Exception | None, offset: int) -> None:
        if on_ack is not None:
            self._acks.append((on_ack, error, offset))

    def poll(self, timeout: float = 0) -> None:
        """Delivers acknowledgements."""
        if not self._acks and timeout:
            time.sleep(min(timeout, 0.001))
        while self._acks:
            on_ack, error, offset = self._acks.popleft()
            on_ack(error, offset)

    def flush(self, timeout: float) -> int:  # noqa: ARG002 - the port's
        """How many acknowledgements are still to come."""
        self.poll(0)
        return len(self._acks)

    def close(self) -> None:
        """Delivers what is left."""
        self.flush(1)


class MemoryTransactions:
    """Keeps what is sent until the commit."""

    def __init__(self, broker: MemoryBroker) -> None:
        self._broker = broker
        self._sent: list[tuple[str, bytes | None, bytes | None, int | None, Headers, OnAck | None]] = []

    def init(self, timeout: float) -> None:
        """Nobody else has its id."""

    def begin(self) -> None:
        """Begins a transaction."""
        self._sent = []

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
        """Keeps a record for the commit."""
        self._broker.check(topic, value)
        self._sent.append((topic, value, key, partition, headers, on_ack))

    def commit(self, offsets: Mapping[TP, Committed], group: object, timeout: float) -> None:  # noqa: ARG002 - the port's
        """Writes all of it, and the group's offsets; without a group, the records alone."""
        with self._broker.arrived:
            for topic, value, key, partition, headers, on_ack in self._sent:
                offset = self._broker.append(topic, value, key, partition, headers)
                if on_ack is not None:
                    on_ack(None, offset)
            if group is not None:
                cast("Group", group).committed.update(offsets)

    def close(self) -> None:
        """Drops what is not committed."""
        self._sent = []


class MemoryReader:
    """Reads partitions from positions; `End` once whenever one is exhausted."""

    def __init__(self, broker: MemoryBroker, positions: dict[TP, int]) -> None:
        self._broker = broker
        self.positions = positions
        self.paused: set[TP] = set()
        self._ended: dict[TP, int] = {}

    def seek(self, tp: TP, offset: int) -> None:
        """Reads on from there."""
        self.positions[tp] = offset
        self._ended.pop(tp, None)

    def poll(self, timeout: float, limit: int = 500) -> list[Message | End]:
        """Waits for the first record, then takes what else is there."""
        with self._broker.arrived:
            found = self._read(limit)
            if not found and timeout:
                self._broker.arrived.wait(timeout)
                found = self._read(limit)
            return found

    def _read(self, limit: int) -> list[Message | End]:
        found: list[Message | End] = []
        for tp, position in self.positions.items():
            if tp in self.paused or len(found) >= limit:
                continue
            new = self._broker.logs[tp][position : position + limit - len(found)]
            found += new
            self.positions[tp] = end = position + len(new)
            if end == len(self._broker.logs[tp]) and self._ended.get(tp) != end:
                self._ended[tp] = end
                found.append(End(*tp, end))
        return found

    def close(self) -> None:
        """Nothing is held."""


class MemoryConsumer(MemoryReader):
    """A member of a group, rebalanced cooperatively within its own polls."""

    def __init__(
        self,
        broker: MemoryBroker,
        group: Group,
        topic: str,
        listener: Listener,
        *,
        companions: Sequence[str],
        paused: bool,
    ) -> None:
        super().__init__(broker, {})
        self._group = group
        self._names = (topic, *companions)
        self._listener = listener
        self._start_paused = paused
        with broker.arrived:
            group.members.append(self)

    def poll(self, timeout: float, limit: int = 500) -> list[Message | End]:
        """As of a reader, of what is assigned."""
        self._rebalance()
        return super().poll(timeout, limit)

    def _rebalance(self) -> None:
        group, members = self._group, self._group.members
        count = self._broker.partitions(self._names[0])
        mine = [p for p in range(count) if self in members and members[p % len(members)] is self]
        gone = [p for p, owner in group.owner.items() if owner is self and p not in mine]
        if gone:
            self._listener.on_revoked(gone)
            self._drop(gone)
        with self._broker.arrived:
            new = [p for p in mine if p not in group.owner]
            for p in new:
                group.owner[p] = self
        if new:
            for tp in self._tps(new):
                self.seek(tp, max(0, group.committed.get(tp, Committed(0, "")).offset))
                if self._start_paused:
                    self.paused.add(tp)
            self._listener.on_assigned(new)

    def lose(self) -> None:
        """As after a session timeout: the partitions are gone before anybody said so."""
        gone = [p for p, owner in self._group.owner.items() if owner is self]
        self._drop(gone)
        self._listener.on_lost(gone)

    def _drop(self, partitions: Sequence[int]) -> None:
        with self._broker.arrived:
            for p in partitions:
                self._group.owner.pop(p, None)
            for tp in self._tps(partitions):
                self.positions.pop(tp, None)
                self.paused.discard(tp)

    def _tps(self, partitions: Iterable[int]) -> list[TP]:
        return [TP(t, p) for t in self._names for p in partitions]

    def group_metadata(self) -> Group:
        """What a transaction commits offsets to."""
        return self._group

    def committed(self, tps: Iterable[TP], timeout: float) -> dict[TP, Committed]:  # noqa: ARG002 - the port's
        """The group's offsets."""
        return {tp: self._group.committed.get(tp, Committed(-1, "")) for tp in tps}

    def rewind(self, positions: Mapping[TP, int]) -> None:
        """Reads on from these offsets, when they are resumed."""
        for tp, offset in positions.items():
            self.seek(tp, offset)
            self.paused.add(tp)

    def pause(self, tps: Iterable[TP]) -> None:
        """Delivers nothing from these."""
        self.paused |= set(tps)

    def resume(self, tps: Iterable[TP]) -> None:
        """Ends a pause."""
        self.paused -= set(tps)

    def commit(self, offsets: Mapping[TP, Committed], *, wait: bool = False) -> None:  # noqa: ARG002 - the port's
        """Commits outside of a transaction."""
        self._group.committed.update(offsets)

    def close(self) -> None:
        """Leaves the group."""
        with self._broker.arrived:
            if self in self._group.members:
                self._group.members.remove(self)
        self._rebalance()
