"""Connectors as processes on Kafka: killed, joined, starved and fed with poison, they lose nothing and double nothing."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import checker
import pytest
from durably_schemas.catalogue import Topic
from durably_schemas.records import DeadLetter, Event, StartRun
from harness import until
from installation import Installation

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(180)]

MODULE = Path(__file__).with_name("faust_shop.py")
PARTITIONS = 3


class Shop(Installation):
    """An installation with topics of the user's own."""

    def __init__(self, kafka: str, namespace: str, folder: Path) -> None:
        super().__init__(kafka, namespace, folder, MODULE, environment={"DURABLY_CONNECTORS_PORT": "0"})
        for name in ("orders", "sales", "payments"):
            self.broker.create(
                [Topic(name=f"{namespace}-{name}", partitions=PARTITIONS, config={}, key="", written_by="", records=())]
            )
        self._producer = self.broker.producer()

    def put(self, topic: str, *values: object, key: bytes | None = None) -> None:
        """Messages, round and round the partitions."""
        for n, value in enumerate(values):
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            self._producer.send(f"{self.namespace}-{topic}", data, key=key, partition=n % PARTITIONS)
        assert self._producer.flush(30) == 0

    def read(self, topic: str, record: type) -> list:
        """What is on a topic of durably, of one type."""
        return [found for _, found in checker.read(self.broker, topic) if isinstance(found, record)]

    def created(self) -> Counter[str]:
        """How often each run was created."""
        return Counter(e.run_id for e in self.read(self.catalogue.events, Event) if e.type == "run_created")

    def close(self) -> None:
        self._producer.close()
        super().close()


@pytest.fixture
def shop(kafka, namespace, tmp_path) -> Iterator[Shop]:
    shop = Shop(kafka, namespace, tmp_path)
    yield shop
    shop.close()


def test_every_message_starts_one_run_through_kills_and_rebalances(shop):
    shop.start("processor", "p")
    numbers, poison = range(300), [b"{", b"", b'{"no": 1}', b"[]"]
    first = shop.start("connectors", "c1")
    shop.put("orders", *({"number": n} for n in numbers[:100]), *poison)
    until(lambda: len(shop.read(shop.catalogue.commands, StartRun)) > 20)
    first.kill()
    first.wait(10)
    shop.put("orders", *({"number": n} for n in numbers[100:200]), *poison)
    second, third = shop.spawn("connectors", "c2"), shop.spawn("connectors", "c3")
    until(lambda: len({r.run_id for r in shop.read(shop.catalogue.commands, StartRun)}) >= 150, 60)
    second.kill()
    second.wait(10)
    shop.put("orders", *({"number": n} for n in numbers[200:]), {"number": -1})
    until(lambda: len(shop.created()) >= len(numbers), 60)
    assert third.poll() is None
    third.terminate()
    assert third.wait(20) == 0

    created = shop.created()
    assert len(created) == len(numbers)
    assert set(created.values()) == {1}
    results = sorted(shop.client.get_run(run_id).result(60) for run_id in created)
    assert results == list(numbers)
    letters = shop.read(shop.catalogue.dead_letters, DeadLetter)
    assert {(x.topic, x.partition, x.offset) for x in letters} >= {(x.topic, x.partition, x.offset) for x in letters}
    assert Counter(value for _, value in {(x.offset * PARTITIONS + x.partition, x.value) for x in letters}) == Counter(
        poison * 2
    )


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
