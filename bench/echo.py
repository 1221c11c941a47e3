"""A process that copies each record from one topic to another: the second hop of the raw floor.

python bench/echo.py BOOTSTRAP FROM TO
"""

from __future__ import annotations

import sys

from confluent_kafka import Consumer, Producer, TopicPartition


def main(bootstrap: str, source: str, target: str) -> None:
    """Copies until it is ended."""
    producer = Producer({"bootstrap.servers": bootstrap, "linger.ms": 0, "acks": "all"})
    consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": source, "fetch.queue.backoff.ms": 1})
    consumer.assign([TopicPartition(source, 0, 0)])
    while True:
        message = consumer.poll(1.0)
        if message is not None and message.error() is None:
            producer.produce(target, message.value(), partition=0)
            producer.poll(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
