"""The sentences of the broker port, on the embedded broker and on Kafka alike."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from contextlib import ExitStack, closing, suppress
from typing import TYPE_CHECKING

import pytest
from durably.broker import connect
from durably.broker.port import TP, Committed, End, GroupState, Message
from durably.errors import Fenced, RecordTooLarge, UnknownTopic
from durably_schemas.catalogue import Topic, partition_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from durably.broker.port import Broker, Consumer, Reader

WAIT = 20.0
PARTITIONS = 4


def topic_named(name: str, partitions: int = PARTITIONS) -> Topic:
    config = {"cleanup.policy": "delete", "retention.ms": "-1"}
    return Topic(name=name, partitions=partitions, config=config, key="", written_by="", records=())


@pytest.fixture
def broker(broker_url: str) -> Iterator[Broker]:
    with closing(connect(broker_url)) as broker:
        yield broker


@pytest.fixture
def topic(broker: Broker, namespace: str) -> str:
    broker.create([topic_named(f"{namespace}.in"), topic_named(f"{namespace}.beside")])
    return f"{namespace}.in"


@pytest.fixture
def beside(topic: str) -> str:
    return topic.replace(".in", ".beside")


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


class Recorder:
    """A listener that keeps what it is told, and what it owns."""

    def __init__(self) -> None:
        self.owned: set[int] = set()
        self.told: list[tuple[str, list[int]]] = []
        self.on_revoke: Callable[[], None] = lambda: None

    def on_assigned(self, partitions: Sequence[int]) -> None:
        self.told.append(("assigned", sorted(partitions)))
        self.owned |= set(partitions)

    def on_revoked(self, partitions: Sequence[int]) -> None:
        self.told.append(("revoked", sorted(partitions)))
        self.on_revoke()
        self.owned -= set(partitions)

    def on_lost(self, partitions: Sequence[int]) -> None:
        self.told.append(("lost", sorted(partitions)))
        self.owned -= set(partitions)


def produce(
    broker: Broker, topic: str, *values: bytes, partition: int | None = 0, key: bytes | None = None
) -> list[int]:
    offsets: list[int] = []

    def on_ack(error: Exception | None, offset: int) -> None:
        assert error is None
        offsets.append(offset)

    with closing(broker.producer()) as producer:
        for value in values:
            producer.send(topic, value, key=key, partition=partition, on_ack=on_ack)
        assert producer.flush(WAIT) == 0
    return offsets


def read(reader: Reader | Consumer, until: Callable[[list[Message | End]], bool]) -> list[Message | End]:
    """Polls until what was read satisfies; fails when it takes too long."""
    out: list[Message | End] = []
    deadline = time.monotonic() + WAIT
    while not until(out):
        assert time.monotonic() < deadline, f"only {out}"
        out += reader.poll(0.1)
    return out


def messages(records: list[Message | End]) -> list[Message]:
    return [record for record in records if isinstance(record, Message)]


def values(records: list[Message | End]) -> list[bytes | None]:
    return [record.value for record in messages(records)]


def read_values(reader: Reader | Consumer, count: int) -> list[bytes | None]:
    return values(read(reader, lambda out: len(messages(out)) >= count))


def settle(*members: tuple[Consumer, Recorder], partitions: int = PARTITIONS) -> None:
    """Polls all members until they own all partitions between them, evenly."""
    deadline = time.monotonic() + WAIT
    while sorted(n for _, r in members for n in r.owned) != list(range(partitions)) or any(
        len(r.owned) != partitions // len(members) for _, r in members
    ):
        assert time.monotonic() < deadline, [r.told for _, r in members]
        for consumer, _ in members:
            consumer.poll(0.05)
    for consumer, _ in members:
        consumer.poll(0.05)


@pytest.fixture
def member(broker: Broker, topic: str, beside: str, stack: ExitStack) -> Callable[..., tuple[Consumer, Recorder]]:
    """Makes members of the group ``g``."""

    def make(**options: object) -> tuple[Consumer, Recorder]:
        recorder = Recorder()
        consumer = broker.consumer(f"{topic}.g", topic, recorder, companions=[beside], **options)  # type: ignore[arg-type]
        stack.callback(consumer.close)
        return consumer, recorder

    return make


def test_records_of_a_partition_come_in_the_order_in_which_they_were_sent(broker: Broker, topic: str) -> None:
    sent = [b"%d" % n for n in range(1200)]
    assert produce(broker, topic, *sent) == list(range(1200))
    with closing(broker.reader({TP(topic, 0): 0})) as reader:
        got = messages(read(reader, lambda out: len(messages(out)) >= 1200))
    assert [m.value for m in got] == sent
    assert [m.offset for m in got] == list(range(1200))
    assert {(m.topic, m.partition) for m in got} == {(topic, 0)}


def test_a_key_goes_to_the_partition_of_the_java_client(broker: Broker, topic: str) -> None:
    # murmur2 as in Kafka's own UtilsTest: 21 -> -973932308, foobar -> -790332482, a-little-bit-long-string -> -985981536
    known = {b"21": -973932308, b"foobar": -790332482, b"a-little-bit-long-string": -985981536}
    keys = [*known, b"", b"wrun_01J0000000000000000000000A"]
    for key in keys:
        produce(broker, topic, b"v", key=key, partition=None)
    with closing(broker.reader({TP(topic, n): 0 for n in range(PARTITIONS)})) as reader:
        got = {m.key: m.partition for m in messages(read(reader, lambda out: len(messages(out)) >= len(keys)))}
    assert got == {key: partition_for(key, PARTITIONS) for key in keys}
    assert {key: got[key] for key in known} == {key: (h & 0x7FFFFFFF) % PARTITIONS for key, h in known.items()}


def test_key_value_headers_and_time_arrive_as_they_were(broker: Broker, topic: str) -> None:
    before = int(time.time() * 1000)
    with closing(broker.producer()) as producer:
        producer.send(topic, b"\x00v", key=b"\xffk", headers=[("a", b"1"), ("a", b"\x00")], partition=1)
        producer.send(topic, None, partition=1)
        assert producer.flush(WAIT) == 0
    with closing(broker.reader({TP(topic, 1): 0})) as reader:
        full, empty = messages(read(reader, lambda out: len(messages(out)) >= 2))
    assert (full.key, full.value, list(full.headers)) == (b"\xffk", b"\x00v", [("a", b"1"), ("a", b"\x00")])
    assert (empty.key, empty.value, list(empty.headers)) == (None, None, [])
    assert before - 1000 <= full.timestamp <= int(time.time() * 1000) + 1000


def test_an_end_follows_the_last_record_and_tells_of_an_empty_partition(broker: Broker, topic: str) -> None:
    produce(broker, topic, b"a", b"b")
    with closing(broker.reader({TP(topic, 0): 0, TP(topic, 1): 0})) as reader:
        got = read(reader, lambda out: sum(isinstance(r, End) for r in out) >= 2)
        assert End(topic, 1, 0) in got
        assert values([r for r in got if r.partition == 0]) == [b"a", b"b"]
        assert [r for r in got if r.partition == 0][-1] == End(topic, 0, 2)
        produce(broker, topic, b"c")
        later = read(reader, lambda out: any(isinstance(r, End) for r in out))
        assert values(later) == [b"c"]
        assert later[-1] == End(topic, 0, 3)


def test_a_poll_without_records_is_empty_after_its_timeout(broker: Broker, topic: str) -> None:
    with closing(broker.reader({TP(topic, 0): 0})) as reader:
        read(reader, lambda out: any(isinstance(r, End) for r in out))
        assert reader.poll(0.05) == []


def test_a_waiting_reader_is_woken_by_a_record(broker: Broker, topic: str) -> None:
    with closing(broker.reader({TP(topic, 0): 0})) as reader:
        read(reader, lambda out: any(isinstance(r, End) for r in out))
        sender = threading.Timer(0.05, produce, (broker, topic, b"x"))
        sender.start()
        began = time.monotonic()
        assert values(reader.poll(WAIT)) == [b"x"]
        assert time.monotonic() - began < WAIT / 2
        sender.join()


def test_a_reader_seeks_anywhere_and_takes_on_partitions(broker: Broker, topic: str) -> None:
    produce(broker, topic, *(b"%d" % n for n in range(10)))
    produce(broker, topic, b"other", partition=1)
    with closing(broker.reader({TP(topic, 0): 7})) as reader:
        assert read_values(reader, 3) == [b"7", b"8", b"9"]
        reader.seek(TP(topic, 0), 8)
        assert read_values(reader, 2) == [b"8", b"9"]
        reader.seek(TP(topic, 1), 0)
        assert read_values(reader, 1) == [b"other"]


def test_a_record_that_is_too_large_is_refused_at_once(broker: Broker, topic: str) -> None:
    with closing(broker.producer()) as producer, pytest.raises(RecordTooLarge):
        producer.send(topic, b"x" * (broker.max_record_bytes + 1))
    large = b"x" * (broker.max_record_bytes - 1000)
    produce(broker, topic, large)
    with closing(broker.reader({TP(topic, 0): 0})) as reader:
        assert read_values(reader, 1) == [large]


def test_a_missing_topic_is_an_error_and_is_not_created(broker: Broker, topic: str) -> None:
    missing = f"{topic}.missing"
    errors: list[Exception | None] = []
    with closing(broker.producer()) as producer:
        with suppress(UnknownTopic):
            producer.send(missing, b"x", on_ack=lambda error, _: errors.append(error))
            producer.flush(WAIT)
            assert isinstance(errors[0], UnknownTopic)
        assert broker.partitions(missing) == 0
    assert missing not in broker.topics()


def test_topics_are_described_and_creating_again_changes_nothing(broker: Broker, topic: str) -> None:
    broker.create([topic_named(topic, partitions=9)])
    assert broker.partitions(topic) == PARTITIONS
    described = broker.describe([topic, f"{topic}.missing"])
    assert set(described) == {topic}
    assert described[topic].partitions == PARTITIONS
    assert described[topic].config["cleanup.policy"] == "delete"
    assert topic in broker.topics()


def test_offsets_are_found_by_end_start_and_time(broker: Broker, topic: str) -> None:
    tp, empty = TP(topic, 0), TP(topic, 1)
    produce(broker, topic, b"a", b"b")
    time.sleep(0.02)
    instant = int(time.time() * 1000)
    produce(broker, topic, b"c")
    assert broker.end_offsets([tp, empty]) == {tp: 3, empty: 0}
    assert broker.end_offsets([tp], committed=True) == {tp: 3}
    assert broker.start_offsets([tp, empty]) == {tp: 0, empty: 0}
    assert broker.offsets_at([tp], instant) == {tp: 2}
    assert broker.offsets_at([tp, empty], 0) == {tp: 0, empty: 0}
    assert broker.offsets_at([tp, empty], instant + 3_600_000) == {tp: 3, empty: 0}


def test_a_truncated_partition_begins_later_and_goes_on(broker: Broker, topic: str) -> None:
    tp, other = TP(topic, 0), TP(topic, 1)
    produce(broker, topic, *(b"%d" % n for n in range(200)))
    broker.truncate({tp: 150})
    start = broker.start_offsets([tp, other])[tp]
    assert 0 < start <= 150, "a few may stay"
    assert broker.end_offsets([tp]) == {tp: 200}
    assert broker.start_offsets([other]) == {other: 0}
    broker.truncate({tp: 20})
    assert broker.start_offsets([tp]) == {tp: start}, "what is gone is gone"
    produce(broker, topic, b"more")
    with closing(broker.reader({tp: 0})) as reader:
        found: list[Message] = []
        while not found or found[-1].offset < 200:
            found += [m for m in reader.poll(WAIT) if isinstance(m, Message)]
    assert [m.offset for m in found] == list(range(start, 201))
    broker.truncate({tp: 201})
    assert broker.end_offsets([tp]) == {tp: 201}


def test_a_producer_is_shared_by_threads(broker: Broker, topic: str) -> None:
    acked: list[int] = []
    with closing(broker.producer()) as producer:

        def work(partition: int) -> None:
            for n in range(200):
                producer.send(topic, b"%d" % n, partition=partition, on_ack=lambda _, offset: acked.append(offset))
                producer.poll()

        threads = [threading.Thread(target=work, args=(n,)) for n in range(PARTITIONS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert producer.flush(WAIT) == 0
    assert sorted(acked) == sorted(list(range(200)) * PARTITIONS)
    with closing(broker.reader({TP(topic, n): 0 for n in range(PARTITIONS)})) as reader:
        got = defaultdict(list)
        for m in messages(read(reader, lambda out: len(messages(out)) >= 200 * PARTITIONS)):
            got[m.partition].append(int(m.value or b""))
    assert all(got[n] == list(range(200)) for n in range(PARTITIONS))


def test_an_open_transaction_is_not_read_and_a_committed_one_is(
    broker: Broker, topic: str, member: Callable[..., tuple[Consumer, Recorder]]
) -> None:
    consumer, recorder = member()
    settle((consumer, recorder))
    acks: list[int] = []
    with (
        closing(broker.transactions(f"{topic}.t")) as transactions,
        closing(broker.reader({TP(topic, 0): 0})) as reader,
    ):
        transactions.init(WAIT)
        transactions.begin()
        for value in (b"a", b"b"):
            transactions.send(topic, value, partition=0, on_ack=lambda _, offset: acks.append(offset))
        assert values(reader.poll(0.1)) == []
        transactions.commit({}, consumer.group_metadata(), WAIT)
        assert acks == [0, 1]
        assert read_values(reader, 2) == [b"a", b"b"]


def test_an_aborted_transaction_is_never_read(broker: Broker, topic: str) -> None:
    first = broker.transactions(f"{topic}.t")
    first.init(WAIT)
    first.begin()
    first.send(topic, b"dropped", partition=0)
    first.close()
    with closing(broker.transactions(f"{topic}.t")) as second:
        second.init(WAIT)
        produce(broker, topic, b"kept")
        with closing(broker.reader({TP(topic, 0): 0})) as reader:
            assert read_values(reader, 1) == [b"kept"]


def test_records_and_offsets_with_their_metadata_are_committed_as_one(
    broker: Broker, topic: str, beside: str, member: Callable[..., tuple[Consumer, Recorder]]
) -> None:
    consumer, recorder = member()
    settle((consumer, recorder))
    tps = [TP(topic, 0), TP(beside, 0)]
    assert consumer.committed(tps, WAIT) == dict.fromkeys(tps, Committed(-1, ""))
    with closing(broker.transactions(f"{topic}.t")) as transactions:
        transactions.init(WAIT)
        for n in (1, 2):
            transactions.begin()
            transactions.send(topic, b"%d" % n, partition=3)
            offsets = {tps[0]: Committed(n, f"owner {n} ü"), tps[1]: Committed(10 * n, "")}
            transactions.commit(offsets, consumer.group_metadata(), WAIT)
            assert consumer.committed(tps, WAIT) == offsets
    assert broker.group_metadata_of(f"{topic}.g", tps) == {tps[0]: "owner 2 ü", tps[1]: ""}
    with closing(broker.reader({TP(topic, 3): 0})) as reader:
        assert read_values(reader, 2) == [b"1", b"2"]


def test_a_newer_init_with_the_same_transactional_id_fences_the_older(
    broker: Broker, topic: str, member: Callable[..., tuple[Consumer, Recorder]]
) -> None:
    consumer, recorder = member()
    settle((consumer, recorder))
    with (
        closing(broker.transactions(f"{topic}.t")) as older,
        closing(broker.transactions(f"{topic}.t")) as newer,
        closing(broker.reader({TP(topic, 0): 0})) as reader,
    ):
        older.init(WAIT)
        older.begin()
        older.send(topic, b"older", partition=0)
        newer.init(WAIT)
        with pytest.raises(Fenced):
            older.commit({TP(topic, 0): Committed(7, "")}, consumer.group_metadata(), WAIT)
        newer.begin()
        newer.send(topic, b"newer", partition=0)
        newer.commit({}, consumer.group_metadata(), WAIT)
        assert read_values(reader, 1) == [b"newer"]
        assert consumer.committed([TP(topic, 0)], WAIT) == {TP(topic, 0): Committed(-1, "")}


def test_metadata_from_before_a_rebalance_fences_the_commit(
    broker: Broker, topic: str, member: Callable[..., tuple[Consumer, Recorder]]
) -> None:
    first = member()
    settle(first)
    stale = first[0].group_metadata()
    second = member()
    settle(first, second)
    with closing(broker.transactions(f"{topic}.t")) as transactions:
        transactions.init(WAIT)
        transactions.begin()
        transactions.send(topic, b"zombie", partition=0)
        with pytest.raises(Fenced):
            transactions.commit({TP(topic, 0): Committed(1, "")}, stale, WAIT)
    with closing(broker.transactions(f"{topic}.t")) as transactions:
        transactions.init(WAIT)
        transactions.begin()
        transactions.send(topic, b"owner", partition=0)
        transactions.commit({TP(topic, 0): Committed(2, "")}, first[0].group_metadata(), WAIT)
    with closing(broker.reader({TP(topic, 0): 0})) as reader:
        assert read_values(reader, 1) == [b"owner"]
    assert first[0].committed([TP(topic, 0)], WAIT)[TP(topic, 0)].offset == 2


def test_the_same_partitions_of_companions_are_read_by_the_same_member(
    broker: Broker, topic: str, beside: str, member: Callable[..., tuple[Consumer, Recorder]]
) -> None:
    members = [member(), member()]
    settle(*members)
    for n in range(PARTITIONS):
        produce(broker, topic, b"a", partition=n)
        produce(broker, beside, b"b", partition=n)
    for consumer, recorder in members:
        got = messages(read(consumer, lambda out: len(messages(out)) >= PARTITIONS))
        assert {(m.topic, m.partition) for m in got} == {(t, n) for t in (topic, beside) for n in recorder.owned}


def test_a_second_member_takes_half_and_gives_it_back_when_it_leaves(
    member: Callable[..., tuple[Consumer, Recorder]],
) -> None:
    first = member()
    settle(first)
    assert first[1].told == [("assigned", [0, 1, 2, 3])]
    second = member()
    settle(first, second)
    kept, taken = set(first[1].owned), set(second[1].owned)
    assert ("revoked", sorted(taken)) in first[1].told
    assert not kept & taken
    second[0].close()
    assert second[1].told[-1] == ("revoked", sorted(taken))
    settle(first)
    assert first[1].owned == {0, 1, 2, 3}


def test_what_is_committed_while_revoking_is_where_the_next_owner_begins(
    broker: Broker, topic: str, member: Callable[..., tuple[Consumer, Recorder]]
) -> None:
    for n in range(PARTITIONS):
        produce(broker, topic, b"0", b"1", b"2", partition=n)
    consumer, recorder = first = member()
    settle(first)
    done = {TP(topic, n): Committed(2, "mine") for n in range(PARTITIONS)}
    recorder.on_revoke = lambda: consumer.commit(done, wait=True)
    consumer.close()
    second = member()
    got = read(second[0], lambda out: len(messages(out)) >= PARTITIONS)
    assert values(got) == [b"2"] * PARTITIONS


def test_who_looks_on_sees_the_members_of_a_group_and_how_far_it_is(
    broker: Broker, broker_url: str, topic: str, member: Callable[..., tuple[Consumer, Recorder]]
) -> None:
    tps = [TP(topic, number) for number in range(PARTITIONS)]
    assert broker.group_state(f"{topic}.g", tps) == GroupState([], {})
    both = [member(), member()]
    settle(*both)
    for consumer, recorder in both:
        consumer.commit({TP(topic, number): Committed(number + 3, "") for number in recorder.owned}, wait=True)
    with closing(connect(broker_url)) as another:
        members, offsets = another.group_state(f"{topic}.g", tps)
    assert offsets == {tp: tp.partition + 3 for tp in tps}
    owned = [{tp.partition for tp in found.partitions if tp.topic == topic} for found in members]
    assert sorted(map(sorted, owned)) == sorted(sorted(recorder.owned) for _, recorder in both)
    assert all(found.client and found.host for found in members)


def test_a_member_starts_at_the_committed_offset_or_at_the_beginning(
    broker: Broker, topic: str, member: Callable[..., tuple[Consumer, Recorder]]
) -> None:
    produce(broker, topic, b"0", b"1", b"2", partition=0)
    produce(broker, topic, b"all", partition=1)
    first = member()
    settle(first)
    first[0].commit({TP(topic, 0): Committed(1, "")}, wait=True)
    first[0].close()
    got = read(member()[0], lambda out: len(messages(out)) >= 3)
    assert sorted(values(got), key=str) == [b"1", b"2", b"all"]


def test_a_paused_member_delivers_nothing_until_it_is_resumed(
    broker: Broker, topic: str, member: Callable[..., tuple[Consumer, Recorder]]
) -> None:
    produce(broker, topic, b"0", b"1", partition=0)
    produce(broker, topic, b"x", partition=1)
    consumer, recorder = member(paused=True)
    settle((consumer, recorder))
    assert messages(consumer.poll(0.1)) == []
    consumer.resume([TP(topic, 0)])
    assert read_values(consumer, 2) == [b"0", b"1"]
    consumer.pause([TP(topic, 0)])
    produce(broker, topic, b"2", partition=0)
    assert messages(consumer.poll(0.2)) == []
    consumer.resume([TP(topic, 0), TP(topic, 1)])
    assert sorted(read_values(consumer, 2), key=str) == [b"2", b"x"]


def test_a_rewind_reads_again_and_leaves_the_partition_paused(
    broker: Broker, topic: str, member: Callable[..., tuple[Consumer, Recorder]]
) -> None:
    produce(broker, topic, *(b"%d" % n for n in range(600)), partition=0)
    consumer, recorder = member()
    assert values(read(consumer, lambda out: bool(messages(out))))[0] == b"0"
    consumer.rewind({TP(topic, 0): 5})
    assert messages(consumer.poll(0.1)) == []
    consumer.resume([TP(topic, 0)])
    assert read_values(consumer, 595) == [b"%d" % n for n in range(5, 600)]
    assert recorder.owned == {0, 1, 2, 3}


def test_a_poll_takes_about_its_limit(broker: Broker, topic: str) -> None:
    produce(broker, topic, *(b"%d" % n for n in range(100)), partition=0)
    with closing(broker.reader({TP(topic, 0): 0})) as reader:
        deadline = time.monotonic() + WAIT
        got: list[Message | End] = []
        while len(messages(got)) < 100:
            assert time.monotonic() < deadline
            part = reader.poll(0.1, limit=10)
            assert len(messages(part)) <= 11
            got += part
    assert values(got) == [b"%d" % n for n in range(100)]
