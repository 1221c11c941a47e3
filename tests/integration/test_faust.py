"""Connectors as processes on Kafka: killed, joined, starved and fed with poison, they lose nothing and double nothing."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import time
import urllib.request
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import checker
import pytest
from confluent_kafka import ConsumerGroupTopicPartitions, Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from durably.broker.port import TP, Message
from durably_schemas.catalogue import Topic
from durably_schemas.records import DeadLetter, Event, StartRun
from harness import until
from installation import SESSION, Installation
from kafka_cluster import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(180)]

MODULE = Path(__file__).with_name("faust_shop.py")
PARTITIONS = 3


class Shop(Installation):
    """An installation with topics of the user's own."""

    def __init__(self, kafka: str, namespace: str, folder: Path) -> None:
        super().__init__(kafka, namespace, folder, MODULE, environment={"DURABLY_CONNECTORS_PORT": "0"})
        for name in ("orders", "sales", "payments", "parcels", "packed", "trouble"):
            self.broker.create(
                [Topic(name=f"{namespace}-{name}", partitions=PARTITIONS, config={}, key="", written_by="", records=())]
            )
        self._producer = self.broker.producer()

    def put(self, topic: str, *values: object, key: bytes | None = None) -> None:
        """Messages, round and round the partitions, or where their key belongs."""
        for n, value in enumerate(values):
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            self._producer.send(f"{self.namespace}-{topic}", data, key=key, partition=None if key else n % PARTITIONS)
        assert self._producer.flush(30) == 0

    def put_in_transactions(self, topic: str, *values: object) -> None:
        """One message a transaction; each second transaction is aborted. Both leave gaps in the offsets."""
        server = self.url.removeprefix("kafka://")
        producer = Producer({"bootstrap.servers": server, "transactional.id": f"{self.namespace}-user"})
        producer.init_transactions(30)
        for n, value in enumerate(values):
            producer.begin_transaction()
            producer.produce(f"{self.namespace}-{topic}", json.dumps(value).encode(), partition=n % PARTITIONS)
            assert producer.flush(30) == 0  # what is aborted is there, too
            if n % 2 == 0:
                producer.commit_transaction(30)
            else:
                producer.abort_transaction(30)

    def values(self, topic: str) -> list[tuple[str, object]]:
        """Key and value of each message."""
        topic = f"{self.namespace}-{topic}"
        tps = [TP(topic, p) for p in range(PARTITIONS)]
        reader, found, ended = self.broker.reader(dict.fromkeys(tps, 0)), [], set()
        while len(ended) < PARTITIONS:
            for item in reader.poll(1.0):
                if isinstance(item, Message):
                    found.append((item.key.decode(), json.loads(item.value)))
                else:
                    ended.add(item.partition)
        reader.close()
        return found

    def rewind(self, topics: list[str]) -> None:
        """Has the connectors, which do not run just now, read these topics again from their beginning."""
        admin = AdminClient({"bootstrap.servers": self.url.removeprefix("kafka://")})
        group = f"{self.namespace}.connectors.faust_shop"
        start = [TopicPartition(topic, p, 0) for topic in topics for p in range(self.broker.partitions(topic))]
        for future in admin.alter_consumer_group_offsets([ConsumerGroupTopicPartitions(group, start)]).values():
            future.result(30)

    def read(self, topic: str, record: type) -> list:
        """What is on a topic of durably, of one type."""
        return [found for _, found in checker.read(self.broker, topic) if isinstance(found, record)]

    def created(self) -> Counter[str]:
        """How often each run was created."""
        return Counter(e.run_id for e in self.read(self.catalogue.events, Event) if e.type == "run_created")

    def close(self) -> None:
        self._producer.close()
        super().close()


def totals(port: int) -> list[dict]:
    """What the monitor on this port has counted."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/monitor", timeout=10) as answer:
        return json.load(answer)["totals"]


@pytest.fixture
def shop(kafka, namespace, tmp_path) -> Iterator[Shop]:
    shop = Shop(kafka, namespace, tmp_path)
    yield shop
    shop.close()


def test_every_message_starts_one_run_and_counts_once_through_kills_and_rebalances(shop, tmp_path):
    table = f"sqlite:///{tmp_path}/outcomes.db"
    ports = [free_port() for _ in range(3)]

    def spawned(n: int) -> subprocess.Popen[bytes]:
        environment = {"TABLE": table, "DURABLY_CONNECTORS_PORT": str(ports[n - 1])}
        return shop.spawn("connectors", f"c{n}", environment=environment)

    shop.start("processor", "p")
    numbers, poison = range(300), [b"{", b"", b'{"no": 1}', b"[]"]
    first = spawned(1)
    shop.put("orders", *({"number": n} for n in numbers[:100]), *poison)
    until(lambda: len(shop.read(shop.catalogue.commands, StartRun)) > 20, 60)
    first.kill()
    first.wait(10)
    shop.put("orders", *({"number": n} for n in numbers[100:200]), *poison)
    second, third = spawned(2), spawned(3)
    until(lambda: len({r.run_id for r in shop.read(shop.catalogue.commands, StartRun)}) >= 150, 60)
    second.kill()
    second.wait(10)
    shop.put_in_transactions("orders", *({"number": n if n % 2 == 0 else 1000 + n} for n in range(200, 206)))
    shop.put(
        "orders", *({"number": n} for n in numbers[206:]), *({"number": n} for n in (201, 203, 205)), {"number": -1}
    )
    until(lambda: len(shop.created()) >= len(numbers), 60)
    until(lambda: sum(x["completed"] for x in totals(ports[2])) == len(numbers), 60)
    assert [x["started"] for x in totals(ports[2])] == [len(numbers)]
    third.terminate()
    assert third.wait(20) == 0

    created = shop.created()
    assert len(created) == len(numbers)
    assert set(created.values()) == {1}
    results = sorted(shop.client.get_run(run_id).result(60) for run_id in created)
    assert results == list(numbers)
    letters = {(x.partition, x.offset): x for x in shop.read(shop.catalogue.dead_letters, DeadLetter)}
    assert Counter(x.value for x in letters.values()) == Counter(poison * 2)
    assert {x.topic for x in letters.values()} == {f"{shop.namespace}-orders"}


def test_a_payment_resumes_the_run_that_waits_for_it_or_will_once(shop):
    shop.start("processor", "p")
    shop.start("connectors", "c")
    shop.put("sales", {"number": 1})
    shop.put("payments", {"number": 1, "cents": 5}, {"number": 1, "cents": 6}, key=b"1")  # one delivery, by its name
    shop.put("payments", {"number": 2, "cents": 7})  # its run comes later
    shop.put("payments", {"number": 404})
    until(lambda: "sale-1" in shop.created())
    shop.put("sales", {"number": 2}, {"number": 2})
    assert shop.client.get_run("sale-1").result(60) == {"number": 1, "cents": 5}
    assert shop.client.get_run("sale-2").result(60) == {"number": 2, "cents": 7}
    (letter,) = until(lambda: shop.read(shop.catalogue.dead_letters, DeadLetter))
    assert letter.value == b'{"number": 404}'
    assert "HookNotFoundError" in letter.reason


def test_a_broker_that_is_away_is_waited_for_and_keeps_nobody_from_leaving(own_kafka, namespace, tmp_path):
    with closing(Shop(own_kafka.bootstrap, namespace, tmp_path)) as shop:
        port = free_port()
        environment = {"TABLE": f"sqlite:///{tmp_path}/outcomes.db", "DURABLY_CONNECTORS_PORT": str(port)}
        shop.start("processor", "p")
        connectors = shop.start("connectors", "c", environment=environment)

        def settled(n: int) -> bool:
            return sum(x["completed"] for x in totals(port)) == n

        shop.put("orders", *({"number": n} for n in range(30)))
        own_kafka.pause()
        time.sleep(2 * SESSION)
        own_kafka.unpause()
        shop.put("orders", *({"number": n} for n in range(30, 60)))
        until(lambda: settled(60), 90)
        assert connectors.poll() is None
        shop.put("orders", *({"number": n} for n in range(60, 90)))
        own_kafka.pause()
        connectors.terminate()
        connectors.wait(40)
        own_kafka.unpause()
        shop.start("connectors", "c", environment=environment)
        until(lambda: settled(90), 90)
        assert set(shop.created().values()) == {1}


def test_outcomes_events_and_counts_are_the_same_when_everything_is_delivered_again(shop, tmp_path):
    table, port = tmp_path / "outcomes.db", free_port()
    environment = {"TABLE": f"sqlite:///{table}", "DURABLY_CONNECTORS_PORT": str(port)}
    shop.start("processor", "p")
    shop.start("worker", "w")
    connectors = shop.start("connectors", "c", environment=environment)
    numbers = range(40)
    shop.put("parcels", *({"number": n} for n in numbers))

    def rows() -> list:
        with sqlite3.connect(table) as connection:
            if not connection.execute("select 1 from sqlite_master where name = 'outcomes'").fetchall():
                return []
            return connection.execute("select run_id, seq, kind, value from outcomes").fetchall()

    def settled() -> bool:
        return len(rows()) == len(numbers) and sum(x["completed"] + x["failed"] for x in totals(port)) == 2 * len(
            numbers
        )

    until(settled, 60)
    until(lambda: len(dict(shop.values("packed"))) == len(numbers), 30)
    (runs, steps), stored = totals(port), sorted(rows())
    assert runs["workflow"] == steps["workflow"] == "faust_parcel"
    assert (runs["started"], runs["completed"], runs["failed"]) == (40, 36, 4)
    assert (steps["step"], steps["started"], steps["completed"], steps["failed"]) == ("faust_pack", 40, 36, 4)
    assert 0 < steps["p50"] <= steps["p99"]
    assert sorted(json.loads(value) for *_, value in stored if value != "null") == sorted(
        f"parcel {n}" for n in numbers if n % 10 != 3
    )
    assert dict(shop.values("packed"))["parcel-3"] == {"run": "parcel-3", "parcel": None, "why": "3 does not fit"}
    assert {value for _, value in shop.values("trouble")} == {f"{n} does not fit" for n in (3, 13, 23, 33)}

    connectors.terminate()
    assert connectors.wait(20) == 0
    before = len(shop.values("packed"))
    shop.rewind([shop.catalogue.events, shop.catalogue.runs, f"{shop.namespace}-parcels"])
    shop.start("connectors", "c", environment=environment)
    until(lambda: len(shop.values("packed")) >= before + len(numbers), 60)  # the topic has all of them once more
    shop.put("parcels", {"number": 100})
    until(lambda: "parcel-100" in dict(shop.values("packed")), 30)
    until(lambda: totals(port) and totals(port)[0]["completed"] == 37, 30)
    assert totals(port)[0]["started"] == 41
    assert [x for x in sorted(rows()) if x[0] != "parcel-100"] == stored
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        metrics = answer.read().decode().splitlines()
    assert 'durably_runs_failed_total{workflow="faust_parcel"} 4' in metrics
    assert 'durably_steps_seconds_count{workflow="faust_parcel",step="faust_pack"} 41' in metrics
