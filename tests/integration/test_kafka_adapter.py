"""What only a real Kafka shows: fencing, hand-over between members, stable offsets, and silence."""

from __future__ import annotations

import time
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING

import kafka_cluster
import pytest
from durably.broker import connect
from durably.broker.port import TP, Committed, End, Message
from durably.errors import BrokerError, BrokerUnreachable, ConfigurationError, Fenced, RecordTooLarge, UnknownTopic
from durably_schemas.catalogue import Topic

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from durably.broker.port import Broker, Consumer, Reader, Transactions

pytestmark = pytest.mark.kafka

WAIT = 20.0
# Members learn of a rebalance with their next heartbeat; the default of 3 s would be waited for.
QUICK = {"heartbeat.interval.ms": "200", "session.timeout.ms": "6000"}


class Silent:
    """A listener that keeps what it is told."""

    def __init__(self, on_revoked: Callable[[Sequence[int]], None] = lambda _: None) -> None:
        self.owned: set[int] = set()
        self.lost: set[int] = set()
        self._on_revoked = on_revoked

    def on_assigned(self, partitions: Sequence[int]) -> None:
        self.owned |= set(partitions)

    def on_revoked(self, partitions: Sequence[int]) -> None:
        self._on_revoked(partitions)
        self.owned -= set(partitions)

    def on_lost(self, partitions: Sequence[int]) -> None:
        self.lost |= set(partitions)
        self.owned -= set(partitions)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def broker(kafka: str, stack: ExitStack) -> Broker:
    return stack.enter_context(closing(connect(f"kafka://{kafka}", QUICK)))


@pytest.fixture
def topic(broker: Broker, namespace: str) -> str:
    broker.create(topics(namespace, "in", "beside", "out"))
    return f"{namespace}.in"


def topics(namespace: str, *names: str, **config: str) -> list[Topic]:
    return [
        Topic(name=f"{namespace}.{name}", partitions=4, config=config, key="", written_by="", records=())
        for name in names
    ]


def take(source: Reader | Consumer, enough: Callable[[list[Message | End]], bool]) -> list[Message | End]:
    taken: list[Message | End] = []
    deadline = time.monotonic() + WAIT
    while not enough(taken):
        assert time.monotonic() < deadline, f"only {taken}"
        taken += source.poll(0.05)
    return taken


def values(taken: list[Message | End]) -> list[bytes | None]:
    return [record.value for record in taken if isinstance(record, Message)]


def transactions(broker: Broker, stack: ExitStack, name: str) -> Transactions:
    producer = stack.enter_context(closing(broker.transactions(name)))
    producer.init(WAIT)
    return producer


def member(broker: Broker, stack: ExitStack, group: str, topic: str) -> tuple[Consumer, Silent]:
    listener = Silent()
    consumer = stack.enter_context(closing(broker.consumer(group, topic, listener)))
    take(consumer, lambda _: bool(listener.owned))
    return consumer, listener


def committed_values(broker: Broker, stack: ExitStack, topic: str, partition: int = 0) -> list[bytes | None]:
    reader = stack.enter_context(closing(broker.reader({TP(topic, partition): 0})))
    return values(take(reader, lambda taken: any(isinstance(record, End) for record in taken)))


def test_a_zombie_is_fenced_and_stays_so(broker: Broker, stack: ExitStack, topic: str) -> None:
    zombie = transactions(broker, stack, topic)
    zombie.begin()
    zombie.send(topic, b"zombie", partition=0)
    successor = transactions(broker, stack, topic)
    with pytest.raises(Fenced, match="another process took over"):
        zombie.commit({}, None, WAIT)
    with pytest.raises(Fenced):
        zombie.begin()
    successor.begin()
    successor.send(topic, b"successor", partition=0)
    successor.commit({}, None, WAIT)
    assert committed_values(broker, stack, topic) == [b"successor"]


def test_metadata_of_an_earlier_generation_fences_records_and_offsets(
    broker: Broker, stack: ExitStack, topic: str
) -> None:
    first, _ = member(broker, stack, topic, topic)
    stale = first.group_metadata()
    second = stack.enter_context(closing(broker.consumer(topic, topic, listener := Silent())))
    deadline = time.monotonic() + WAIT
    while not listener.owned:
        assert time.monotonic() < deadline
        first.poll(0.05)
        second.poll(0.05)
    producer = transactions(broker, stack, topic)
    producer.begin()
    producer.send(topic, b"late", partition=0)
    with pytest.raises(Fenced):
        producer.commit({TP(topic, 0): Committed(1, "")}, stale, WAIT)
    producer.close()
    assert committed_values(broker, stack, topic) == []


def test_offsets_carry_their_text(broker: Broker, stack: ExitStack, topic: str) -> None:
    consumer, _ = member(broker, stack, topic, topic)
    text = "processor-é-1;released"
    producer = transactions(broker, stack, topic)
    producer.begin()
    producer.commit({TP(topic, 0): Committed(7, text)}, consumer.group_metadata(), WAIT)
    consumer.commit({TP(topic, 1): Committed(8, "by hand")}, wait=True)
    tps = [TP(topic, n) for n in range(3)]
    assert consumer.committed(tps, WAIT) == {
        tps[0]: Committed(7, text), tps[1]: Committed(8, "by hand"), tps[2]: Committed(-1, ""),
    }  # fmt: skip
    assert broker.group_metadata_of(topic, tps) == {tps[0]: text, tps[1]: "by hand", tps[2]: ""}


def test_committed_offsets_wait_for_an_open_transaction_and_their_text_does_not(
    broker: Broker, stack: ExitStack, topic: str
) -> None:
    consumer, _ = member(broker, stack, topic, topic)
    tp = TP(topic, 0)
    owner = transactions(broker, stack, topic)
    owner.begin()
    owner.commit({tp: Committed(1, "owner")}, consumer.group_metadata(), WAIT)
    # What a process leaves behind that dies between the offsets and the commit.
    owner.begin()
    owner._client.send_offsets_to_transaction(_offsets(topic, 9), consumer.group_metadata(), WAIT)
    with pytest.raises(BrokerError, match="transaction is still open"):
        consumer.committed([tp], 0.5)
    assert broker.group_metadata_of(topic, [tp]) == {tp: "owner"}
    transactions(broker, stack, topic)
    assert consumer.committed([tp], WAIT) == {tp: Committed(1, "owner")}


def _offsets(topic: str, offset: int) -> list[object]:
    from confluent_kafka import TopicPartition

    return [TopicPartition(topic, 0, offset, "successor")]


class Worker:
    """A member that counts what it reads and commits it when it must give a partition away."""

    def __init__(self, broker: Broker, topics: list[str], seen: list[bytes | None]) -> None:
        self.listener = Silent(self.release)
        self.consumer = broker.consumer(topics[0], topics[0], self.listener, companions=topics[1:])
        self.seen = seen
        self.positions: dict[TP, Committed] = {}

    def release(self, partitions: Sequence[int]) -> None:
        leaving = {tp: at for tp, at in self.positions.items() if tp.partition in partitions}
        self.consumer.commit(leaving, wait=True)
        for tp in leaving:
            del self.positions[tp]

    def turn(self) -> None:
        for record in self.consumer.poll(0.02):
            if isinstance(record, Message):
                self.seen.append(record.value)
                self.positions[TP(record.topic, record.partition)] = Committed(record.offset + 1, "")


def test_companions_are_handed_over_without_loss_or_doubling(broker: Broker, stack: ExitStack, topic: str) -> None:
    pair = [topic, topic.replace(".in", ".beside")]
    producer = stack.enter_context(closing(broker.producer()))
    sent: list[bytes] = []
    seen: list[bytes | None] = []

    def run(*workers: Worker, until: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAIT
        while not until():
            assert time.monotonic() < deadline, [worker.listener.owned for worker in workers]
            for tp in [TP(name, partition) for name in pair for partition in range(4)]:
                sent.append(b"%d" % len(sent))
                producer.send(tp.topic, sent[-1], partition=tp.partition)
            producer.poll()
            for worker in workers:
                worker.turn()

    first = Worker(broker, pair, seen)
    run(first, until=lambda: len(first.listener.owned) == 4 and len(seen) > 20)
    second = Worker(broker, pair, seen)
    run(first, second, until=lambda: len(first.listener.owned) == len(second.listener.owned) == 2)
    half = len(seen)
    run(first, second, until=lambda: len(seen) > half + 100)
    first.consumer.close()
    run(second, until=lambda: len(second.listener.owned) == 4)
    assert producer.flush(WAIT) == 0
    deadline = time.monotonic() + WAIT
    while len(seen) < len(sent) and time.monotonic() < deadline:
        second.turn()
    second.consumer.close()
    assert sorted(seen) == sorted(sent)


def test_ends_pass_over_aborted_transactions_and_control_records(broker: Broker, stack: ExitStack, topic: str) -> None:
    tp = TP(topic, 0)
    producer = transactions(broker, stack, topic)
    producer.begin()
    producer.send(topic, b"kept", partition=0)
    producer.commit({}, None, WAIT)
    producer.begin()
    producer.send(topic, b"dropped", partition=0)
    producer._client.flush(WAIT)
    reader = stack.enter_context(closing(broker.reader({tp: 0})))
    assert take(reader, lambda taken: len(taken) == 2)[1] == End(topic, 0, 2)
    # The open transaction holds the last stable offset back, not the high watermark.
    assert broker.end_offsets([tp]) == {tp: 3}
    assert broker.end_offsets([tp], committed=True) == {tp: 2}
    transactions(broker, stack, topic)
    assert take(reader, lambda taken: len(taken) == 1) == [End(topic, 0, 4)]
    uncommitted = stack.enter_context(closing(broker.reader({tp: 0}, committed=False)))
    assert values(take(uncommitted, lambda taken: len(taken) == 3)) == [b"kept", b"dropped"]


def test_a_rewind_drops_what_is_fetched_and_works_at_once_after_the_assignment(
    broker: Broker, stack: ExitStack, topic: str
) -> None:
    with closing(broker.producer()) as producer:
        for n in range(1000):
            producer.send(topic, b"%d" % n, partition=0)
        assert producer.flush(WAIT) == 0
    listener = Silent()
    consumer = broker.consumer(topic, topic, listener, paused=True)
    stack.enter_context(closing(consumer))
    tp = TP(topic, 0)
    listener.on_assigned = lambda partitions: (  # type: ignore[method-assign]
        consumer.rewind({tp: 990}), listener.owned.update(partitions),
    )  # fmt: skip
    take(consumer, lambda _: bool(listener.owned))
    assert consumer.poll(0.1) == []
    consumer.resume([tp])
    assert values(take(consumer, lambda taken: len(taken) >= 5))[:2] == [b"990", b"991"]
    for start in (10, 500):
        consumer.rewind({tp: start})
        assert consumer.poll(0.1, 10) == []
        consumer.resume([tp])
        assert values(take(consumer, bool))[0] == b"%d" % start


def test_an_unreachable_broker_is_named_within_ten_seconds() -> None:
    address = f"127.0.0.1:{kafka_cluster.free_port()}"
    with closing(connect(f"kafka://{address}")) as broker:
        started = time.monotonic()
        with pytest.raises(BrokerUnreachable, match=f"{address}.*check that it runs"):
            broker.partitions("topic", timeout=0.5)
        with pytest.raises(BrokerUnreachable, match=address):
            broker.topics(timeout=0.5)
        with pytest.raises(BrokerUnreachable, match=address):
            broker.describe(["topic"], timeout=0.5)
        assert time.monotonic() - started < 5


def test_a_record_beyond_its_topics_limit_fails_by_its_callback(broker: Broker, namespace: str) -> None:
    broker.create(topics(namespace, "small", **{"max.message.bytes": "1000"}))
    failures: list[Exception | None] = []
    with closing(broker.producer()) as producer:
        producer.send(f"{namespace}.small", b"x" * 2000, on_ack=lambda error, _: failures.append(error))
        assert producer.flush(WAIT) == 0
    assert isinstance(failures[0], RecordTooLarge)


def test_a_subscription_to_a_missing_topic_says_so(broker: Broker, stack: ExitStack, namespace: str) -> None:
    consumer = stack.enter_context(closing(broker.consumer(namespace, f"{namespace}.none", Silent())))
    with pytest.raises(UnknownTopic, match="durably topics create"):
        take(consumer, lambda _: False)


def test_properties_that_carry_the_guarantees_are_refused(kafka: str) -> None:
    for name, value in (("isolation.level", "read_uncommitted"), ("acks", "1"), ("partitioner", "random")):
        with pytest.raises(ConfigurationError, match=name):
            connect(f"kafka://{kafka}", {name: value})


def test_every_property_goes_where_librdkafka_takes_it(
    kafka: str, stack: ExitStack, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    properties = {
        "session.timeout.ms": "7000", "transaction.timeout.ms": "9000", "compression.type": "lz4",
        "max.partition.fetch.bytes": "2000000", "socket.keepalive.enable": "true",
    }  # fmt: skip
    broker = stack.enter_context(closing(connect(f"kafka://{kafka}", properties)))
    producer = stack.enter_context(closing(broker.producer()))
    producer.send(topic, b"1", partition=0)
    assert producer.flush(WAIT) == 0
    transactions(broker, stack, topic)
    member(broker, stack, topic, topic)
    assert committed_values(broker, stack, topic) == [b"1"]
    assert "CONFWARN" not in caplog.text


def test_closing_does_not_wait_for_a_broker_that_is_silent(
    own_kafka: kafka_cluster.KafkaCluster, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("durably.broker.kafka.LET_GO", 0.5)
    with closing(connect(f"kafka://{own_kafka.bootstrap}")) as broker:
        broker.create(topics(namespace, "in"))
        topic = f"{namespace}.in"
        with ExitStack() as stack:
            consumer, listener = member(broker, stack, namespace, topic)
            producer = transactions(broker, stack, namespace)
            plain = stack.enter_context(closing(broker.producer()))
            producer.begin()
            producer.send(topic, b"1")
            own_kafka.pause()
            plain.send(topic, b"2")
            with pytest.raises(BrokerUnreachable):
                producer.commit({}, None, 0.5)
            consumer.commit({TP(topic, 0): Committed(1, "")})
            started = time.monotonic()
        assert time.monotonic() - started < 5
        assert not listener.owned
        own_kafka.unpause()
