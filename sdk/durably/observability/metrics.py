"""Metrics: which there are, and how they are written for Prometheus.

Who works counts in plain numbers; what Prometheus wants is made of them when it asks. Labels have few values: names of
workflows and steps that are registered, queues, partitions; never an ID. Latencies of steps are measured by workers,
with the worker's clock where only it is concerned.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from durably.errors import BrokerError, ConfigurationError

if TYPE_CHECKING:
    from prometheus_client.core import Metric as Family

    from durably.broker.port import TP, Broker

OTHER = "(other)"
"""What labels say of workflows and steps that are not registered here."""
_ASKING = 2.0  # seconds that the broker has to say how far topics reach, when somebody reads the metrics


class Metric(NamedTuple):
    """What is measured: how Prometheus takes it, what it says, and its labels."""

    kind: Literal["counter", "gauge", "histogram"]
    says: str
    labels: tuple[str, ...] = ()


METRICS: dict[str, Metric] = {
    # of processors
    "durably_runs_started_total": Metric("counter", "Runs whose workflow has begun.", ("workflow",)),
    "durably_runs_finished_total": Metric("counter", "Runs that have ended.", ("workflow", "status")),
    "durably_runs_blocked_total": Metric("counter", "How often runs were blocked.", ("workflow",)),
    "durably_steps_requested_total": Metric("counter", "Steps that workflows have called.", ("step", "queue")),
    "durably_steps_completed_total": Metric("counter", "Steps that have a result.", ("step",)),
    "durably_steps_failed_total": Metric("counter", "Steps that have failed for good.", ("step",)),
    "durably_steps_retried_total": Metric("counter", "Attempts that failed and are followed by another.", ("step",)),
    "durably_steps_cancelled_total": Metric("counter", "Steps whose workflow did not want them any more.", ("step",)),
    "durably_turn_seconds": Metric("histogram", "How long a turn of the advance thread took that had records."),
    "durably_commit_seconds": Metric("histogram", "How long a transaction took, with what it writes to RocksDB."),
    "durably_commit_records": Metric("histogram", "Records of a transaction, without offsets."),
    "durably_partitions": Metric("gauge", "Partitions that this processor owns.", ("state",)),
    "durably_restore_ratio": Metric("gauge", "How far a partition is that is being restored; 1: done.", ("partition",)),
    "durably_take_overs_total": Metric("counter", "How often this processor has distrusted what it had in memory."),
    "durably_runs_in_memory": Metric("gauge", "Runs that are live, parked at their await."),
    "durably_runs_blocked": Metric("gauge", "Runs that wait for other code."),
    "durably_timers_due": Metric("gauge", "Timers that are due within a minute or two."),
    "durably_records_parked": Metric("gauge", "Records that wait, after a take-over, for what they are about."),
    "durably_stall_seconds": Metric("gauge", "Since when the advance thread has not passed."),
    # of processors and workers
    "durably_lag_records": Metric(
        "gauge", "Offsets of an input that are still to be taken in.", ("topic", "partition")
    ),
    "durably_dead_letters_total": Metric("counter", "Records that could not be handled.", ("component",)),
    # of workers
    "durably_step_schedule_to_start_seconds": Metric(
        "histogram",
        "From when an attempt was asked for, by the log's clock, until it began, by the worker's.",
        ("step",),
    ),
    "durably_step_start_to_close_seconds": Metric("histogram", "How long an attempt took.", ("step", "outcome")),
    "durably_worker_slots": Metric("gauge", "Steps that may run at once."),
    "durably_worker_slots_in_use": Metric("gauge", "Slots that are taken, also by requests that are asked about."),
    "durably_worker_leases": Metric("gauge", "Steps that run under a lease, with heartbeats."),
    # of gateways
    "durably_runs": Metric("gauge", "Runs that are listed, by their status.", ("status",)),
    # of processors and workers on Kafka, where librdkafka has an interval
    "durably_kafka_requests_total": Metric("counter", "Requests that were sent to brokers.", ("client",)),
    "durably_kafka_sent_bytes_total": Metric("counter", "Bytes that were sent to brokers.", ("client",)),
    "durably_kafka_received_bytes_total": Metric("counter", "Bytes that were received from brokers.", ("client",)),
    "durably_kafka_queued_records": Metric("gauge", "Records that a producer still holds.", ("client",)),
    "durably_kafka_round_trip_seconds": Metric("gauge", "The p99 of the slowest broker, of one interval.", ("client",)),
}


class Histogram:
    """Counts observations by buckets. Thread-safe.

    Args:
        bounds: the upper bounds of the buckets but the last, which has none.
    """

    __slots__ = ("_bounds", "_counts", "_lock", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        self._lock = threading.Lock()

    def observe(self, value: float) -> None:
        """Counts one."""
        at = bisect_left(self._bounds, value)
        with self._lock:
            self._counts[at] += 1
            self._sum += value

    @property
    def count(self) -> int:
        """How many there were."""
        return sum(self._counts)

    def read(self) -> tuple[list[tuple[str, float]], float]:
        """The buckets as Prometheus has them, each with all below it, and the sum."""
        with self._lock:
            counts, total = list(self._counts), self._sum
        return list(zip((*map(str, self._bounds), "+Inf"), accumulate(counts), strict=True)), total


Sample = tuple[str, tuple[str, ...], "float | Histogram"]
"""A metric's name, the values of its labels, and its own."""
Source = Callable[[], Iterable[Sample]]


class Exposition:
    """What Prometheus reads: the sources' samples, and whatever else this process has registered with its client.

    Raises:
        ConfigurationError: prometheus-client is not installed.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        try:
            import prometheus_client
        except ModuleNotFoundError as e:
            raise ConfigurationError(f"metrics need {e.name}: pip install 'durably[metrics]'") from e
        self._sources = sources
        self._everything = prometheus_client.CollectorRegistry()
        self._users = prometheus_client.REGISTRY
        self._everything.register(self)

    def collect(self) -> Iterator[Family]:
        """As prometheus-client asks for it."""
        yield from families(sample for source in self._sources for sample in source())
        yield from self._users.collect()

    def write(self, accept: str) -> tuple[bytes, str]:
        """The text, and its content type, as an ``Accept`` header wants it."""
        from prometheus_client.exposition import choose_encoder

        encode, content_type = choose_encoder(accept)
        return encode(self._everything), content_type


def families(samples: Iterable[Sample]) -> Iterator[Family]:
    """Samples as prometheus-client has them, those of one metric together."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

    made: dict[str, Any] = {}
    kinds: dict[str, Any] = {
        "counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily,
    }  # fmt: skip
    for name, labels, value in samples:
        metric = METRICS[name]
        family = made.get(name)
        if family is None:
            family = made[name] = kinds[metric.kind](name, metric.says, labels=metric.labels)
        if isinstance(value, Histogram):
            buckets, total = value.read()
            family.add_metric(labels, buckets, total)
        else:
            family.add_metric(labels, value)
    yield from made.values()


def of_broker(broker: Broker, positions: Mapping[TP, int]) -> Iterator[Sample]:
    """How far these positions are behind, and what librdkafka counts where it is the broker's client."""
    yield from _lags(broker, positions)
    statistics: Any = getattr(broker, "statistics", None)  # the embedded broker has none
    if statistics is not None:
        yield from statistics.samples()


def _lags(broker: Broker, positions: Mapping[TP, int]) -> Iterator[Sample]:
    """How far these positions are behind what can be read; nothing where the broker does not say so at once."""
    try:
        ends = broker.end_offsets(positions, committed=True, timeout=_ASKING) if positions else {}
    except BrokerError:
        return
    for tp, position in positions.items():
        yield "durably_lag_records", (tp.topic, str(tp.partition)), max(0, ends[tp] - position)
