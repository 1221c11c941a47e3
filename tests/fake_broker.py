"""The broker port in memory, for tests of one process: records, groups, transactions; and faults on demand."""

import threading
import time
from collections import defaultdict, deque
from dataclasses import dataclass, field

from durably.broker.port import TP, Committed, End, Message, TopicState
from durably.errors import RecordTooLarge, UnknownTopic
from durably_schemas.catalogue import Topic, partition_for


@dataclass
class Group:
    """A consumer group: what its members own, and what it has committed."""

    members: list["FakeConsumer"] = field(default_factory=list)
    owner: dict[int, "FakeConsumer"] = field(default_factory=dict)
    committed: dict[TP, Committed] = field(default_factory=dict)


class FakeBroker:
    """Everything is durable and readable at once. Acknowledgements wait for ``poll``, as Kafka's do.

    Attributes:
        failing: while it is set, what is sent is lost and acknowledged with this error.
        muted: while it is true, no acknowledgement is delivered.
    """

    url = "fake:"

    def __init__(self, max_record_bytes=1_000_000):
        self.max_record_bytes = max_record_bytes
        self.failing = None
        self.muted = False
        self.logs: dict[TP, list[Message]] = {}
        self.groups: dict[str, Group] = defaultdict(Group)
        self.arrived = threading.Condition(threading.RLock())
        self._topics: dict[str, Topic] = {}

    def require(self, acls, timeout=10):
        pass

    def create(self, topics, timeout=30):
        for topic in topics:
            self._topics.setdefault(topic.name, topic)
            for p in range(topic.partitions):
                self.logs.setdefault(TP(topic.name, p), [])

    def append(self, topic, value, key=None, partition=None, headers=()):
        with self.arrived:
            if partition is None:
                count = self._topics[topic].partitions
                partition = partition_for(key, count) if key is not None and count > 1 else 0
            log = self.logs[TP(topic, partition)]
            log.append(Message(topic, partition, len(log), time.time_ns() // 1_000_000, key, value, tuple(headers)))
            self.arrived.notify_all()
            return len(log) - 1

    def check(self, topic, value):
        if topic not in self._topics:
            raise UnknownTopic(topic)
        if len(value or b"") > self.max_record_bytes:
            raise RecordTooLarge(f"{len(value)} bytes")

    def records(self, topic):
        """All records of a topic, in the order of their partitions and offsets."""
        return [m for p in range(self.partitions(topic)) for m in self.logs[TP(topic, p)]]

    def producer(self):
        return FakeProducer(self)

    def transactions(self, transactional_id, timeout=15):
        return FakeTransactions(self)

    def consumer(self, group, topic, listener, *, companions=(), paused=False, instance_id=None):
        return FakeConsumer(self, self.groups[group], topic, listener, companions=companions, paused=paused)

    def reader(self, positions, *, committed=True):
        return FakeReader(self, dict(positions))

    def end_offsets(self, tps, *, committed=False, timeout=30):
        return {tp: len(self.logs[tp]) for tp in tps}

    def start_offsets(self, tps, *, timeout=30):
        return dict.fromkeys(tps, 0)

    def offsets_at(self, tps, timestamp, *, timeout=30):
        return {
            tp: next((m.offset for m in self.logs[tp] if m.timestamp >= timestamp), len(self.logs[tp])) for tp in tps
        }

    def partitions(self, topic, timeout=10):
        return self._topics[topic].partitions if topic in self._topics else 0

    def describe(self, names, timeout=30):
        return {n: TopicState(t.partitions, t.config) for n in names if (t := self._topics.get(n))}

    def topics(self, timeout=30):
        return list(self._topics)

    def close(self):
        pass


class FakeProducer:
    """Appends at once; keeps the acknowledgements."""

    def __init__(self, broker):
        self._broker = broker
        self._acks = deque()

    def send(self, topic, value, *, key=None, partition=None, headers=(), on_ack=None):
        self._broker.check(topic, value)
        error = self._broker.failing
        offset = -1 if error else self._broker.append(topic, value, key, partition, headers)
        if on_ack:
            self._acks.append((on_ack, error, offset))

    def poll(self, timeout=0):
        if not self._acks and timeout:
            time.sleep(min(timeout, 0.001))
        while self._acks and not self._broker.muted:
            on_ack, error, offset = self._acks.popleft()
            on_ack(error, offset)

    def flush(self, timeout):
        self.poll(0)
        return len(self._acks)

    def close(self):
        self.flush(1)


class FakeTransactions:
    """Keeps what is sent until the commit."""

    def __init__(self, broker):
        self._broker = broker
        self._sent = []

    def init(self, timeout):
        pass

    def begin(self):
        self._sent = []

    def send(self, topic, value, *, key=None, partition=None, headers=(), on_ack=None):
        self._broker.check(topic, value)
        self._sent.append((topic, value, key, partition, headers, on_ack))

    def commit(self, offsets, group, timeout):
        with self._broker.arrived:
            for *record, on_ack in self._sent:
                offset = self._broker.append(*record)
                if on_ack:
                    on_ack(None, offset)
            if group is not None:
                group.committed.update(offsets)

    def close(self):
        self._sent = []


class FakeReader:
    """Reads partitions from positions; `End` once whenever one is exhausted."""

    def __init__(self, broker, positions):
        self._broker = broker
        self.positions = positions
        self.paused = set()
        self._ended = {}

    def seek(self, tp, offset):
        self.positions[tp] = offset
        self._ended.pop(tp, None)

    def poll(self, timeout, limit=500):
        with self._broker.arrived:
            found = self._read(limit)
            if not found and timeout:
                self._broker.arrived.wait(timeout)
                found = self._read(limit)
            return found

    def _read(self, limit):
        found = []
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

    def close(self):
        pass


class FakeConsumer(FakeReader):
    """A member of a group, rebalanced cooperatively within its own polls."""

    def __init__(self, broker, group, topic, listener, *, companions, paused):
        super().__init__(broker, {})
        self._group = group
        self._topics = (topic, *companions)
        self._listener = listener
        self._start_paused = paused
        with broker.arrived:
            group.members.append(self)

    def poll(self, timeout, limit=500):
        self._rebalance()
        return super().poll(timeout, limit)

    def _rebalance(self):
        group, members = self._group, self._group.members
        count = self._broker.partitions(self._topics[0])
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

    def lose(self):
        """As after a session timeout: the partitions are gone before anybody said so."""
        gone = [p for p, owner in self._group.owner.items() if owner is self]
        self._drop(gone)
        self._listener.on_lost(gone)

    def _drop(self, partitions):
        with self._broker.arrived:
            for p in partitions:
                self._group.owner.pop(p, None)
            for tp in self._tps(partitions):
                self.positions.pop(tp, None)
                self.paused.discard(tp)

    def _tps(self, partitions):
        return [TP(t, p) for t in self._topics for p in partitions]

    def group_metadata(self):
        return self._group

    def committed(self, tps, timeout):
        return {tp: self._group.committed.get(tp, Committed(-1, "")) for tp in tps}

    def rewind(self, positions):
        for tp, offset in positions.items():
            self.seek(tp, offset)
            self.paused.add(tp)

    def pause(self, tps):
        self.paused |= set(tps)

    def resume(self, tps):
        self.paused -= set(tps)

    def commit(self, offsets, *, wait=False):
        self._group.committed.update(offsets)

    def close(self):
        with self._broker.arrived:
            if self in self._group.members:
                self._group.members.remove(self)
        self._rebalance()
