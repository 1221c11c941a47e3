"""The shop's customers: makes its topics where they are missing, and sends orders and payments in any order.

    python customers.py 127.0.0.1:9092 --orders 20

Every third payment comes before its order, and every fifth is sent twice. An order has the same run and a payment the
same ID each time, so whoever runs this again changes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator

from confluent_kafka import KafkaError, KafkaException, Message, Producer
from confluent_kafka.admin import AdminClient, NewTopic

SHOP = os.environ.get("SHOP", "shop")  # what the names of its topics begin with
TOPICS = ("orders", "payments", "purchases", "refunds")


def create_topics(bootstrap: str, namespace: str) -> None:
    """Makes the topics, with as many partitions as durably's: payments are joined with runs, by partition."""
    admin = AdminClient({"bootstrap.servers": bootstrap})
    commands = admin.list_topics(f"{namespace}.commands", timeout=30).topics[f"{namespace}.commands"]
    if not commands.partitions:
        sys.exit(f"{bootstrap} lacks {namespace}.commands: run `durably topics create`")
    wanted = [NewTopic(f"{SHOP}.{name}", num_partitions=len(commands.partitions)) for name in TOPICS]
    for created in admin.create_topics(wanted).values():
        try:
            created.result(30)
        except KafkaException as e:
            if e.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise


def messages(count: int) -> Iterator[tuple[str, dict[str, object]]]:
    """What is sent: the topic, and the value."""
    for number in range(1, count + 1):
        order, cents = str(number), 1_000 + 35 * number
        ordered = ("orders", {"order": order, "cents": cents})
        paid = ("payments", {"id": f"payment-of-{order}", "order": order, "cents": cents})
        yield from (paid, ordered) if number % 3 == 0 else (ordered, paid)
        if number % 5 == 0:
            yield paid


def main() -> None:
    parser = argparse.ArgumentParser(description="Sends orders and payments to the shop.")
    parser.add_argument("bootstrap", help="host:port of a broker")
    parser.add_argument("--orders", type=int, default=20, help="how many")
    parser.add_argument("--namespace", default="durably", help="the prefix of durably's topics")
    args = parser.parse_args()

    create_topics(args.bootstrap, args.namespace)
    # The partitioner of Kafka's Java client, as durably's: a payment lies where its run does.
    producer = Producer(
        {"bootstrap.servers": args.bootstrap, "partitioner": "murmur2_random", "enable.idempotence": True}
    )
    failed: list[str] = []

    def acknowledged(error: KafkaError | None, message: Message) -> None:
        if error is not None:
            failed.append(f"{message.key()!r}: {error}")

    for topic, value in messages(args.orders):
        producer.produce(
            f"{SHOP}.{topic}",
            key=f"purchase-{value['order']}".encode(),
            value=json.dumps(value).encode(),
            on_delivery=acknowledged,
        )
    if producer.flush(60) or failed:
        sys.exit(f"not acknowledged: {failed or 'no answer from the broker within 60 s'}")
    print(f"{args.orders} orders and their payments sent")


if __name__ == "__main__":
    main()
