"""What librdkafka tells of a connection."""

from __future__ import annotations

import pytest
from durably.broker import connect
from durably_schemas import Catalogue
from harness import until


@pytest.mark.kafka
def test_librdkafkas_statistics_are_metrics_where_it_is_told_to_count(kafka: str, namespace: str) -> None:
    catalogue = Catalogue(namespace, 1)
    broker = connect(f"kafka://{kafka}", {"statistics.interval.ms": "100"})
    try:
        broker.create(catalogue.topics())
        producer = broker.producer()
        producer.send(catalogue.commands, b"x", key=b"k")
        assert producer.flush(30) == 0

        def told() -> dict[str, float]:
            producer.poll(0.1)
            return {name: value for name, _, value in broker.statistics.samples()}  # type: ignore[attr-defined]

        found = until(lambda: (t := told()).get("durably_kafka_sent_bytes_total") and t)
        assert found["durably_kafka_requests_total"] > 0
        assert found["durably_kafka_received_bytes_total"] > 0
        assert found["durably_kafka_queued_records"] == 0
        producer.close()
        until(lambda: not list(broker.statistics.samples()))  # type: ignore[attr-defined]
    finally:
        broker.close()
