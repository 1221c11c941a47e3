"""What the broker itself costs, without anything of durably: nothing built on it can be faster."""

from __future__ import annotations

import subprocess
import sys
import time
import uuid
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic
from figures import Figure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROUNDS = 1000
WARM_UP = 5.0  # seconds
PAYLOAD = b"x" * 300


def timed(action: Callable[[], None], rounds: int) -> float:
    """The median duration of an action, in milliseconds."""
    # The broker's JVM compiles as it goes: the first thousand rounds take several times as long as the later ones.
    warm = time.perf_counter() + WARM_UP
    while time.perf_counter() < warm:
        action()
    durations = []
    for _ in range(rounds):
        began = time.perf_counter()
        action()
        durations.append((time.perf_counter() - began) * 1000)
    return median(durations)


class Floors:
    """Measures on topics of its own, of one partition each."""

    def __init__(self, bootstrap: str) -> None:
        self._bootstrap = bootstrap
        self._admin = AdminClient({"bootstrap.servers": bootstrap})

    @contextmanager
    def _topics(self, count: int) -> Iterator[list[str]]:
        names = [f"floor-{uuid.uuid4().hex[:8]}" for _ in range(count)]
        for created in self._admin.create_topics([NewTopic(name, 1, 1) for name in names]).values():
            created.result(30)
        yield names
        for deleted in self._admin.delete_topics(names).values():
            deleted.result(30)

    def _producer(self, **settings: str) -> Producer:
        return Producer(
            {
                "bootstrap.servers": self._bootstrap,
                "linger.ms": 0,
                "log_level": 3,
                "acks": "all",
                "enable.idempotence": True,
                **settings,
            }
        )

    def _consumer(self, topic: str) -> Consumer:
        consumer = Consumer(
            {
                "bootstrap.servers": self._bootstrap,
                "group.id": topic,
                "enable.auto.commit": False,
                "isolation.level": "read_committed",
                "fetch.queue.backoff.ms": 1,
            }
        )
        consumer.assign([TopicPartition(topic, 0, 0)])
        return consumer

    def _round_trip(self, out: str, back: str) -> float:
        producer, consumer = self._producer(), self._consumer(back)

        def once() -> None:
            producer.produce(out, PAYLOAD, partition=0)
            while (message := consumer.poll(1.0)) is None or message.error() is not None:
                producer.poll(0)

        try:
            return timed(once, ROUNDS)
        finally:
            consumer.close()
            producer.flush(10)

    def one_hop(self) -> float:
        """From produce to consume, in milliseconds."""
        with self._topics(1) as (topic,):
            return self._round_trip(topic, topic)

    def two_hops(self) -> float:
        """To another process and back, in milliseconds."""
        with self._topics(2) as (out, back):
            echo = subprocess.Popen([sys.executable, Path(__file__).parent / "echo.py", self._bootstrap, out, back])
            try:
                return self._round_trip(out, back)
            finally:
                echo.terminate()
                echo.wait()

    def transaction(self) -> float:
        """One record and the offsets of a group, in milliseconds."""
        with self._topics(1) as (topic,):
            producer, consumer = (
                self._producer(**{"transactional.id": topic, "retry.backoff.ms": "10"}),
                self._consumer(topic),
            )
            producer.init_transactions(30)
            group = consumer.consumer_group_metadata()
            offset = 0

            def once() -> None:
                nonlocal offset
                offset += 1
                producer.begin_transaction()
                producer.produce(topic, PAYLOAD, partition=0)
                producer.send_offsets_to_transaction([TopicPartition(topic, 0, offset)], group, 30)
                producer.commit_transaction(30)

            try:
                return timed(once, 300)
            finally:
                consumer.close()

    def figures(self) -> list[Figure]:
        """All of them."""
        return [
            Figure("floor", "one hop, produce to consume, p50", self.one_hop(), "ms"),
            Figure("floor", "two hops, through another process, p50", self.two_hops(), "ms"),
            Figure("floor", "transaction of 1 record with offsets, p50", self.transaction(), "ms"),
        ]
