"""The topics: their names, keys, partitions, clean-up, and who may write which records to them."""

from __future__ import annotations

import re

import msgspec

DAY_MS = 24 * 60 * 60 * 1000
PARTITIONS = 12
_NAME = re.compile(r"[A-Za-z0-9._-]{1,200}")


class Topic(msgspec.Struct, frozen=True, kw_only=True):
    """One topic as it is to be: ``partitions``, and Kafka's ``config`` for it."""

    name: str
    partitions: int
    config: dict[str, str]
    key: str
    written_by: str
    records: tuple[str, ...]


def _delete(ms: int) -> dict[str, str]:
    return {"cleanup.policy": "delete", "retention.ms": str(ms)}


class Catalogue(msgspec.Struct, frozen=True):
    """Every topic of one installation.

    Args:
        namespace: the prefix, so that several installations share a cluster; without the final dot.
        partitions: of the inputs and ``events``, which must be equal, and of every other topic.
    """

    namespace: str = "durably"
    partitions: int = PARTITIONS

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.namespace):
            raise ValueError(f"namespace {self.namespace!r}: letters, digits, '.', '_' and '-' only, 200 at most")
        if self.partitions < 1:
            raise ValueError(f"partitions {self.partitions}: at least 1")

    @property
    def commands(self) -> str:
        """Topic of StartRun, ResumeHook, CancelRun, ResetRun, QueryRun."""
        return f"{self.namespace}.commands"

    @property
    def results(self) -> str:
        """Topic of StepResult, StepHeartbeat, StepClaim."""
        return f"{self.namespace}.results"

    @property
    def signals(self) -> str:
        """Topic of what processors tell each other."""
        return f"{self.namespace}.signals"

    @property
    def events(self) -> str:
        """Topic of every run's log: the database."""
        return f"{self.namespace}.events"

    @property
    def snapshots(self) -> str:
        """Compacted topic of Snapshot: events that ``events`` itself need not keep any longer."""
        return f"{self.namespace}.snapshots"

    @property
    def runs(self) -> str:
        """Compacted topic of RunSummary."""
        return f"{self.namespace}.runs"

    @property
    def replies(self) -> str:
        """Topic of Reply."""
        return f"{self.namespace}.replies"

    @property
    def streams(self) -> str:
        """Topic of StreamChunk."""
        return f"{self.namespace}.streams"

    @property
    def dead_letters(self) -> str:
        """Topic of DeadLetter."""
        return f"{self.namespace}.dead-letters"

    def requests(self, queue: str) -> str:
        """Topic of a queue's StepRequests. Raises `ValueError` for a name that Kafka would refuse."""
        if not _NAME.fullmatch(queue):
            raise ValueError(f"queue {queue!r}: letters, digits, '.', '_' and '-' only, 200 at most")
        return f"{self.namespace}.requests.{queue}"

    def topics(self, queues: tuple[str, ...] = ("default",)) -> tuple[Topic, ...]:
        """All topics, with one ``requests`` topic for each queue.

        The brokers stamp all records, because a record's time is what a run begins at, what its log says, and what
        readers search for: with the clocks of whoever wrote them, one that is wrong would hide a run's first records.
        """
        processors = "processors, in their transaction"

        def topic(name: str, key: str, written_by: str, config: dict[str, str], *records: str) -> Topic:
            return Topic(
                name=name,
                partitions=self.partitions,
                config=config | {"message.timestamp.type": "LogAppendTime"},
                key=key,
                written_by=written_by,
                records=records,
            )

        return (
            topic(
                self.commands, "run ID, or the token of a custom-token hook", "clients, gateway, anyone",
                _delete(7 * DAY_MS), "StartRun", "ResumeHook", "CancelRun", "QueryRun", "WatchRun", "ResetRun",
            ),
            topic(
                self.results, "run ID", "workers",
                _delete(7 * DAY_MS), "StepResult", "StepHeartbeat", "StepClaim",
            ),
            topic(
                self.signals, "run ID or token", processors, _delete(7 * DAY_MS),
                "ClaimToken", "TokenGranted", "TokenRefused", "ReleaseToken", "HookDelivery", "ChildFinished",
                "RunCopied",
            ),
            topic(
                self.events, "run ID or token", processors,
                {"cleanup.policy": "delete", "retention.ms": "-1", "retention.bytes": "-1"}, "Event",
            ),
            topic(
                self.snapshots, "run ID and seq: explicit partition", processors,
                {"cleanup.policy": "compact"}, "Snapshot",
            ),
            topic(self.runs, "run ID", processors, {"cleanup.policy": "compact"}, "RunSummary"),
            *(topic(self.requests(q), "step ID", "processors", _delete(7 * DAY_MS), "StepRequest") for q in queues),
            topic(self.replies, "none: explicit partition", "processors, workers", _delete(10 * 60 * 1000), "Reply"),
            topic(self.streams, "run ID", "workers, processors", _delete(7 * DAY_MS), "StreamChunk"),
            topic(self.dead_letters, "as found", "processors, workers", _delete(30 * DAY_MS), "DeadLetter"),
        )  # fmt: skip


def murmur2(key: bytes) -> int:
    """The 32-bit murmur2 of Kafka's Java client (``org.apache.kafka.common.utils.Utils.murmur2``), unsigned."""
    m, mask = 0x5BD1E995, 0xFFFFFFFF
    h = 0x9747B28C ^ len(key)
    whole = len(key) & ~3
    for i in range(0, whole, 4):
        k = (int.from_bytes(key[i : i + 4], "little") * m) & mask
        k = ((k ^ (k >> 24)) * m) & mask
        h = ((h * m) & mask) ^ k
    if tail := key[whole:]:
        h = ((h ^ int.from_bytes(tail, "little")) * m) & mask
    h = ((h ^ (h >> 13)) * m) & mask
    return h ^ (h >> 15)


def partition_for(key: bytes, partitions: int) -> int:
    """Where Kafka's default partitioner puts a key, in any client with the Java default."""
    return (murmur2(key) & 0x7FFFFFFF) % partitions
