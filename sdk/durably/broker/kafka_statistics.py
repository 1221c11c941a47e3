"""What librdkafka counts, for whoever reads the metrics of a process: see ``statistics.interval.ms``."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from durably.observability.metrics import Sample

SILENT = 3
"""Intervals without news after which a handle has been closed."""
_MICROSECOND = 1e-6


class Statistics:
    """The latest of each handle of a connection. Told on the threads that poll them, asked from any.

    Args:
        interval: milliseconds between two of a handle.
    """

    def __init__(self, interval: int) -> None:
        self._lasts = SILENT * interval / 1000
        self._latest: dict[str, tuple[float, dict[str, Any]]] = {}  # by the handle's name, with when it was heard

    def heard(self, text: str) -> None:
        """The ``stats_cb`` of every handle that is polled."""
        told = json.loads(text)
        self._latest[told["name"]] = time.monotonic(), told

    def samples(self) -> Iterable[Sample]:
        """Those of the handles that are still there."""
        oldest = time.monotonic() - self._lasts
        for name, (heard, told) in self._latest.copy().items():
            if heard < oldest:
                self._latest.pop(name, None)
                continue
            client = (name,)
            yield "durably_kafka_requests_total", client, told["tx"]
            yield "durably_kafka_sent_bytes_total", client, told["tx_bytes"]
            yield "durably_kafka_received_bytes_total", client, told["rx_bytes"]
            yield "durably_kafka_queued_records", client, told["msg_cnt"]
            trips = [broker["rtt"]["p99"] for broker in told["brokers"].values() if broker.get("rtt", {}).get("cnt")]
            if trips:
                yield "durably_kafka_round_trip_seconds", client, max(trips) * _MICROSECOND
