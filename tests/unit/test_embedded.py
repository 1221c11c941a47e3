"""The embedded broker alone: what it keeps through kill -9 and reopening, and its socket."""

from __future__ import annotations

import random
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import closing
from typing import TYPE_CHECKING

import pytest
from durably.broker.embedded import open_embedded
from durably.broker.embedded_group import spread
from durably.broker.port import TP, Committed, End, GroupState, Message
from durably.errors import BrokerError, BrokerUnreachable, ConfigurationError, Fenced, RecordTooLarge, UnknownTopic
from durably_schemas.catalogue import Topic

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from durably.broker.port import Broker

DELETE = {"cleanup.policy": "delete", "retention.ms": "-1"}
TPS = [TP("in", n) for n in range(4)]


def topic(name: str, config: dict[str, str] = DELETE) -> Topic:
    return Topic(name=name, partitions=4, config=config, key="", written_by="", records=())


class Deaf:
    def on_assigned(self, partitions): ...
    def on_revoked(self, partitions): ...
    def on_lost(self, partitions): ...


def send(broker: Broker, name: str, *values: bytes | None, key: bytes | None = None, partition: int = 0) -> None:
    errors: list[Exception | None] = []
    with closing(broker.producer()) as producer:
        for value in values:
            producer.send(
                name, value, key=key, partition=partition, headers=[("h", b"1")], on_ack=lambda e, _: errors.append(e)
            )
        assert producer.flush(5) == 0
    assert errors == [None] * len(values)


def read(broker: Broker, *tps: TP, start: int = 0) -> list[Message]:
    out: list[Message] = []
    left = set(tps)
    with closing(broker.reader(dict.fromkeys(tps, start))) as reader:
        while left:
            for record in reader.poll(5):
                if isinstance(record, Message):
                    out.append(record)
                else:
                    left.discard(TP(record.topic, record.partition))
    return out


def values(broker: Broker, *tps: TP, start: int = 0) -> list[bytes | None]:
    return [m.value for m in read(broker, *tps, start=start)]


class Child:
    """Another Python process that runs a snippet with ``path`` given, killed at the end."""

    def __init__(self, path: Path, snippet: str) -> None:
        code = f"import sys\npath = {str(path)!r}\n" + textwrap.dedent(snippet)
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
        )

    def line(self) -> str:
        return self.process.stdout.readline().strip()

    def kill(self) -> list[str]:
        """SIGKILL; what it had printed and nobody had read."""
        if self.process.returncode is not None:
            return []
        self.process.send_signal(signal.SIGKILL)
        rest = self.process.stdout.read().split("\n")
        self.process.wait()
        self.process.stdout.close()
        self.process.stdin.close()
        return rest


OWNER = """
    from durably.broker.embedded import open_embedded
    from durably.broker.port import *
    broker = open_embedded(path)
    producer = broker.producer()
    producer.send("in", b"owner's", partition=0)
    producer.flush(5)
    print("ready", flush=True)
    sys.stdin.readline()
    broker.close()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    folder = tmp_path / "a folder whose name is long" / ("x" * 90)
    with closing(open_embedded(folder)) as broker:
        broker.create([topic("in"), topic("out")])
    return folder


@pytest.fixture
def broker(path: Path) -> Iterator[Broker]:
    with closing(open_embedded(path)) as broker:
        yield broker


@pytest.fixture
def owner(path: Path) -> Iterator[Child]:
    child = Child(path, OWNER)
    assert child.line() == "ready"
    yield child
    child.kill()


WRITER = """
    from durably.broker.embedded import open_embedded
    from durably.broker.port import *
    class Deaf:
        def on_assigned(self, partitions): pass
        on_revoked = on_lost = on_assigned
    broker = open_embedded(path)
    consumer = broker.consumer("g", "in", Deaf(), paused=True)
    consumer.poll(0)
    n = consumer.committed([TP("in", 0)], 1)[TP("in", 0)].offset
    n = max(n, 0)
    producer, transactions = broker.producer(), broker.transactions("t")
    transactions.init(1)
    print("ready", flush=True)
    acked = [0]
    while True:
        n += 1
        producer.send("in", b"%d" % n, partition=1, on_ack=lambda e, offset: acked.__setitem__(0, offset))
        transactions.begin()
        for partition in range(4):
            transactions.send("out", b"%d" % n, partition=partition)
        transactions.commit({TP("in", 0): Committed(n, str(n))}, consumer.group_metadata(), 1)
        producer.poll()
        print(n, acked[0], flush=True)
"""


def test_a_kill_at_any_moment_leaves_each_transaction_whole_or_absent_and_every_acked_record(path: Path) -> None:
    chance = random.Random(7)
    for _ in range(6):
        child = Child(path, WRITER)
        assert child.line() == "ready"
        time.sleep(chance.uniform(0.01, 0.15))
        lines = [line.split() for line in child.kill() if line.count(" ") == 1]
        committed, acked = map(int, lines[-2] if len(lines) > 1 else ("0", "-1"))
        with closing(open_embedded(path)) as broker:
            counts = {tuple(int(v or 0) for v in values(broker, TP("out", n))) for n in range(4)}
            assert len(counts) == 1, "a transaction was torn"
            (numbers,) = counts
            assert numbers == tuple(range(1, len(numbers) + 1))
            assert len(numbers) >= committed
            assert broker.group_metadata_of("g", [TP("in", 0)]) == {TP("in", 0): str(len(numbers))}
            assert broker.end_offsets([TP("in", 1)])[TP("in", 1)] > acked
            assert [m.offset for m in read(broker, TP("in", 1))] == list(range(broker.end_offsets(TPS)[TPS[1]]))


def test_everything_is_there_after_reopening(path: Path) -> None:
    with closing(open_embedded(path)) as broker:
        send(broker, "in", *(b"%d" % n for n in range(300)), key=b"k")
        before = read(broker, TPS[0], start=250)
        with closing(broker.consumer("g", "in", Deaf())) as consumer:
            consumer.poll(0)
            consumer.commit({TPS[0]: Committed(123, "mine")})
    with closing(open_embedded(path)) as broker:
        assert read(broker, TPS[0], start=250) == before
        assert values(broker, TPS[0], start=123) == [b"%d" % n for n in range(123, 300)]
        send(broker, "in", b"next")
        assert read(broker, TPS[0], start=299)[-1].offset == 300
        assert broker.group_metadata_of("g", [TPS[0]]) == {TPS[0]: "mine"}
        assert broker.partitions("in") == 4
        assert broker.topics() == ["in", "out"]


def test_readers_far_behind_read_from_disk_what_memory_no_longer_holds(broker: Broker) -> None:
    numbers = [b"%d" % n for n in range(5000)]
    with closing(broker.reader({TPS[0]: 0})) as late:
        send(broker, "in", *numbers)
        send(broker, "in", *([b"x" * 900_000] * 4), partition=1)
        got: list[Message | End] = []
        while not any(isinstance(r, End) for r in got):
            got += late.poll(1, limit=333)
    assert [r.value for r in got if isinstance(r, Message)] == numbers
    assert len(values(broker, TPS[1])) == 4
    middle = read(broker, TPS[0])[2500]
    assert broker.offsets_at([TPS[0]], middle.timestamp)[TPS[0]] <= 2500
    assert broker.offsets_at([TPS[0]], got[-2].timestamp + 1)[TPS[0]] == 5000


def test_the_brokers_of_one_process_share_the_log_until_the_last_holder_lets_go(path: Path) -> None:
    first, second = open_embedded(path), open_embedded(str(path))
    producer = second.producer()
    first.close()
    first.close()
    second.close()
    producer.send("in", b"still open", partition=0)
    producer.close()
    with pytest.raises(BrokerError, match="closed"):
        producer.send("in", b"closed", partition=0)
    assert not (path / "broker.sock").exists()
    with closing(open_embedded(path)) as broker:
        assert values(broker, TPS[0]) == [b"still open"]


def test_old_records_are_dropped_when_the_path_is_opened_but_offsets_go_on(path: Path) -> None:
    with closing(open_embedded(path)) as broker:
        broker.create([topic("brief", {"cleanup.policy": "delete", "retention.ms": "1"})])
        for n in range(3):
            send(broker, "brief", b"%d" % n)
    time.sleep(0.01)
    tp = TP("brief", 0)
    with closing(open_embedded(path)) as broker:
        assert values(broker, tp) == [b"2"]
        assert broker.start_offsets([tp]) == {tp: 2}
        assert broker.end_offsets([tp]) == {tp: 3}


def test_a_compacted_topic_keeps_the_latest_of_each_key_when_the_path_is_opened(path: Path) -> None:
    with closing(open_embedded(path)) as broker:
        broker.create([topic("latest", {"cleanup.policy": "compact"})])
        for n in range(100):
            for key in (b"a", b"b"):
                send(broker, "latest", b"%d" % n, key=key)
        send(broker, "latest", None, b"last", key=b"c")
        send(broker, "latest", b"other", key=b"a", partition=1)
    for _ in range(2):
        with closing(open_embedded(path)) as broker:
            kept = read(broker, TP("latest", 0))
            assert [(m.key, m.value, m.offset) for m in kept] == [
                (b"a", b"99", 198),
                (b"b", b"99", 199),
                (b"c", b"last", 201),
            ]
            assert broker.start_offsets([TP("latest", 0)]) == {TP("latest", 0): 198}
            assert values(broker, TP("latest", 1)) == [b"other"]
            assert broker.offsets_at([TP("latest", 0)], kept[0].timestamp) == {TP("latest", 0): 198}


def test_a_member_that_stops_polling_loses_its_partitions_and_learns_it(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, list[int]]] = []

    class Listener(Deaf):
        def on_assigned(self, partitions):
            told.append(("assigned", partitions))

        def on_lost(self, partitions):
            told.append(("lost", partitions))

    with closing(broker.consumer("g", "in", Listener())) as asleep, closing(broker.transactions("t")) as transactions:
        asleep.poll(0)
        stale = asleep.group_metadata()
        monkeypatch.setattr("durably.broker.embedded_group.SESSION_SECONDS", -1.0)
        with closing(broker.consumer("g", "in", Deaf())) as other:
            other.poll(0)
            monkeypatch.undo()
            transactions.init(1)
            transactions.begin()
            with pytest.raises(Fenced):
                transactions.commit({TPS[0]: Committed(1, "")}, stale, 1)
            with pytest.raises(Fenced):
                asleep.commit({TPS[0]: Committed(1, "")}, wait=True)
            asleep.commit({TPS[0]: Committed(1, "")})
            assert other.committed(TPS[:1], 1) == {TPS[0]: Committed(-1, "")}
            asleep.poll(0)
        asleep.poll(0)
    assert told[:2] == [("assigned", [0, 1, 2, 3]), ("lost", [0, 1, 2, 3])]
    assert sorted(n for _, numbers in told[2:] for n in numbers) == [0, 1, 2, 3]


def test_a_member_puts_out_another_with_its_instance_id(broker: Broker) -> None:
    with closing(broker.consumer("g", "in", Deaf(), instance_id="one")) as older:
        older.poll(0)
        with closing(broker.consumer("g", "in", Deaf(), instance_id="one")) as newer:
            with pytest.raises(Fenced, match="one"):
                older.poll(0)
            newer.poll(0)
            newer.commit({tp: Committed(1, "") for tp in TPS}, wait=True)


def test_a_disk_that_fails_is_told_to_everybody_and_nothing_is_acknowledged(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        def put(self, *args):
            raise OSError("no space left")

    told: list[tuple[Exception | None, int]] = []
    broker = open_embedded(path)
    with closing(broker.producer()) as producer, closing(broker.reader({TPS[0]: 0})) as reader:
        with monkeypatch.context() as patch:
            patch.setattr(broker._log, "_db", Full())
            producer.send("in", b"x", partition=0, on_ack=lambda *outcome: told.append(outcome))
            producer.poll()
        assert [(type(error), offset) for error, offset in told] == [(BrokerError, -1)]
        with pytest.raises(BrokerError, match="no space left"):
            producer.send("in", b"y", partition=0)
        with pytest.raises(BrokerError, match="no space left"):
            reader.poll(0)
    broker.close()
    with closing(open_embedded(path)) as broker:
        assert values(broker, TPS[0]) == []


@pytest.mark.parametrize("members", [1, 2, 3, 5])
def test_partitions_are_spread_evenly_and_stay_where_they_are(members: int) -> None:
    owned: list[set[int]] = []
    for _ in range(members):
        owned.append(set())
        before, owned = owned, spread(12, owned)
        assert sorted(n for share in owned for n in share) == list(range(12))
        assert max(map(len, owned)) - min(map(len, owned)) <= 1
        assert all(new <= old for old, new in zip(before[:-1], owned[:-1], strict=True))
    assert spread(12, owned) == owned


def test_another_process_writes_and_reads_through_the_socket(path: Path, owner: Child) -> None:
    with closing(open_embedded(path)) as remote:
        assert stat.S_IMODE((path / "broker.sock").stat().st_mode) == 0o600
        send(remote, "in", b"a", b"b", key=b"k")
        got = read(remote, TPS[0])
        assert [m.value for m in got] == [b"owner's", b"a", b"b"]
        assert (got[1].key, list(got[1].headers), got[1].offset) == (b"k", [("h", b"1")], 1)
        remote.create([topic("new")])
        assert remote.topics() == ["in", "new", "out"]
        assert (remote.partitions("new"), remote.partitions("none")) == (4, 0)
        assert remote.describe(["in", "none"])["in"].config == DELETE
        tp = TPS[0]
        assert (remote.end_offsets([tp]), remote.start_offsets([tp])) == ({tp: 3}, {tp: 0})
        assert remote.offsets_at([tp], got[1].timestamp + 60_000) == {tp: 3}
        assert remote.group_metadata_of("g", [tp]) == {tp: ""}
        assert remote.group_state("g", [tp]) == GroupState([], {})
        with closing(remote.reader({tp: 0})) as reader:
            reader.seek(tp, 2)
            assert reader.poll(5)[-2:] == [got[2], End("in", 0, 3)]
            waiting = threading.Timer(0.05, send, (remote, "in", b"late"))
            waiting.start()
            assert [m.value for m in reader.poll(5) if isinstance(m, Message)] == [b"late"]
            waiting.join()
            assert reader.poll(0.01) in ([], [End("in", 0, 4)])


def test_the_socket_carries_more_than_it_buffers(path: Path, owner: Child) -> None:
    with closing(open_embedded(path)) as remote:
        send(remote, "in", *([b"x" * 20_000] * 3000), partition=2)
        assert len(values(remote, TPS[2])) == 3000


def test_the_socket_tells_errors_as_they_are(path: Path, owner: Child) -> None:
    with closing(open_embedded(path)) as remote:
        with pytest.raises(ConfigurationError, match="durably dev"):
            remote.consumer("g", "in", Deaf())
        with pytest.raises(ConfigurationError, match="durably dev"):
            remote.transactions("t")
        with pytest.raises(UnknownTopic, match="none"):
            remote.end_offsets([TP("none", 0)])
        with pytest.raises(UnknownTopic, match="none"):
            remote.reader({TP("none", 0): 0})
        with closing(remote.producer()) as producer:
            with pytest.raises(UnknownTopic):
                producer.send("none", b"")
            with pytest.raises(RecordTooLarge):
                producer.send("in", b"x" * 1_000_001)
            errors: list[Exception | None] = []
            producer.send("in", b"", partition=9, on_ack=lambda e, _: errors.append(e))
            assert producer.flush(5) == 0
            assert isinstance(errors[0], UnknownTopic)


def test_the_death_of_the_owner_is_told_and_the_next_one_takes_over(path: Path, owner: Child) -> None:
    remote = open_embedded(path)
    producer, reader = remote.producer(), remote.reader({TPS[0]: 0})
    assert reader.poll(5)
    owner.kill()
    errors: list[Exception | None] = []
    with pytest.raises(BrokerUnreachable, match=path.name):
        reader.poll(5)
    with pytest.raises(BrokerUnreachable, match=path.name):
        remote.end_offsets([TPS[0]])
    with pytest.raises(BrokerUnreachable):
        producer.send("in", b"x", on_ack=lambda e, _: errors.append(e))
    for made in (producer, reader, remote):
        made.close()
    assert (path / "broker.sock").exists(), "a killed process leaves its socket"
    with closing(open_embedded(path)) as broker:
        assert values(broker, TPS[0]) == [b"owner's"]
        third = Child(path, OWNER)
        assert third.line() == "ready"
        assert values(broker, TPS[0]) == [b"owner's"] * 2
        third.kill()


def test_closing_the_owner_ends_its_sessions_promptly(path: Path) -> None:
    broker = open_embedded(path)
    child = Child(
        path,
        """
        from durably.broker.embedded import open_embedded
        from durably.broker.port import *
        from durably.errors import BrokerUnreachable
        reader = open_embedded(path).reader({TP("in", 0): 0})
        reader.poll(5)
        print("waiting", flush=True)
        try:
            reader.poll(60)
        except BrokerUnreachable:
            print("gone", flush=True)
        """,
    )
    assert child.line() == "waiting"
    began = time.monotonic()
    broker.close()
    assert child.line() == "gone"
    assert time.monotonic() - began < 1
    child.kill()


def test_a_path_that_is_locked_and_silent_is_a_clear_error(
    path: Path, owner: Child, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("durably.broker.embedded.OPEN_SECONDS", 0.05)
    (path / "broker.sock").unlink()
    with pytest.raises(ConfigurationError, match="open in another process"):
        open_embedded(path)


def test_a_path_that_cannot_be_a_folder_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot be opened"):
        open_embedded(tmp_path / "file")
