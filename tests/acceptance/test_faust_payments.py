"""The example that joins payments with running workflows: whichever comes first, each order is paid once."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from durably import RunNotFoundError
from durably.broker.port import TP, Message
from durably_schemas.catalogue import Topic
from harness import until
from installation import Installation

if TYPE_CHECKING:
    from durably.broker.port import Broker

FOLDER = Path(__file__).parents[2] / "examples" / "payments"


def contents(broker: Broker, topic: str) -> list[dict]:
    """The values on a topic."""
    tps = [TP(topic, p) for p in range(broker.partitions(topic))]
    reader, found, ended = broker.reader(dict.fromkeys(tps, 0)), [], set()
    while len(ended) < len(tps):
        for item in reader.poll(1.0):
            if isinstance(item, Message):
                found.append(json.loads(item.value))
            else:
                ended.add(item.partition)
    reader.close()
    return found


@pytest.mark.kafka
@pytest.mark.timeout(180)
def test_each_order_is_paid_once_whichever_comes_first(kafka: str, namespace: str, tmp_path: Path) -> None:
    environment = {"SHOP": f"{namespace}.shop", "DURABLY_CONNECTORS_PORT": "0"}
    shop = Installation(kafka, namespace, tmp_path, FOLDER / "shop.py", partitions=3, environment=environment)
    try:
        for name in ("orders", "payments", "purchases", "refunds"):
            topic = f"{namespace}.shop.{name}"
            shop.broker.create([Topic(name=topic, partitions=3, config={}, key="", written_by="", records=())])
        producer = shop.broker.producer()

        def put(topic: str, value: dict) -> None:
            key = f"purchase-{value['order']}".encode()
            producer.send(f"{namespace}.shop.{topic}", json.dumps(value).encode(), key=key)
            assert producer.flush(30) == 0

        def result(order: str) -> object:
            run = shop.client.get_run(f"purchase-{order}")

            def begun() -> bool:
                with contextlib.suppress(RunNotFoundError):
                    return bool(run.status())
                return False

            until(begun, 60)
            return run.result(60)

        shop.start("processor", "p")
        shop.start("worker", "w")
        put("payments", {"id": "a", "order": "early", "cents": 5})
        put("payments", {"id": "b", "order": "early", "cents": 5})  # twice
        put("payments", {"order": "early"})  # none at all
        shop.module = FOLDER / "connectors.py"
        connectors = shop.start("connectors", "c")
        until(lambda: contents(shop.broker, f"{namespace}.shop.refunds"), 60)
        connectors.kill()  # what it keeps is kept on Kafka
        connectors.wait(10)
        put("orders", {"order": "early", "cents": 5})
        put("orders", {"order": "late", "cents": 10})
        shop.start("connectors", "c")
        assert result("early") == {"order": "early", "due": 0, "parcel": "parcel-early"}
        put("payments", {"id": "c", "order": "late", "cents": 7})
        late = result("late")
        assert late == {"order": "late", "due": 3, "parcel": "parcel-late"}
        put("payments", {"id": "d", "order": "late", "cents": 7})  # again, though it is over
        until(lambda: {x["id"] for x in contents(shop.broker, f"{namespace}.shop.refunds")} == {"b", "d"}, 30)
        until(
            lambda: {x["order"] for x in contents(shop.broker, f"{namespace}.shop.purchases")} == {"early", "late"}, 30
        )
        letters = shop.broker.end_offsets([TP(shop.catalogue.dead_letters, p) for p in range(3)])
        assert sum(letters.values()) >= 1
        producer.close()
    finally:
        shop.close()
