"""What the advance thread hands to the committer: the consequences of what it has read, by partition."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from durably.broker.port import TP, Headers
from durably.errors import BrokerError, RecordTooLarge, UnknownTopic
from durably_schemas.records import Reply, ReplyTo

from durably_processor.engine.state import Header
from durably_processor.state.store import Changes, Store


class Refused(BrokerError):
    """Kafka will never take what a run sends; ``why`` is its answer. Trying again would stop all other runs as well."""

    def __init__(self, run_id: str, why: BrokerError) -> None:
        super().__init__(f"run {run_id}: {why}")
        self.run_id = run_id
        self.why = why


class Output(NamedTuple):
    """A record to be written. ``run_id``: whose step-request it is."""

    topic: str
    value: bytes
    key: bytes
    partition: int | None = None
    run_id: str | None = None
    headers: Headers = ()

    def failure(self, error: Exception) -> Exception:
        """What a broker's answer to it means."""
        if self.run_id is not None and isinstance(error, RecordTooLarge | UnknownTopic):
            return Refused(self.run_id, error)
        return error


Counter = tuple[str, tuple[str, ...]]
"""A metric of `durably.observability.metrics`, and the values of its labels."""
Answer = tuple[ReplyTo, Callable[[], Reply | None]]
"""To whom, and how to make the reply once everything that it speaks of is committed and applied; None: say nothing."""


class Dispatch:
    """Requests that went out ahead of their transaction, which must not be committed before they are durable."""

    __slots__ = ("acked", "error", "sent")

    def __init__(self) -> None:
        self.sent = 0
        self.acked: list[int] = []  # appended to by whichever thread polls: an append is atomic
        self.error: Exception | None = None

    def on_ack(self, output: Output, error: Exception | None, offset: int) -> None:
        """The broker's answer to one of them."""
        if error is not None:
            self.error = output.failure(error)
        self.acked.append(offset)

    @property
    def done(self) -> bool:
        """All of them are durable, or one never will be."""
        return len(self.acked) == self.sent or self.error is not None


class Part:
    """The consequences for one partition, and the store that they are applied to."""

    __slots__ = (
        "answers",
        "changes",
        "copies",
        "counts",
        "created",
        "deleted",
        "early",
        "ended",
        "events",
        "offsets",
        "outputs",
        "store",
        "summaries",
        "urgent",
    )

    def __init__(self, store: Store) -> None:
        self.store = store
        self.events: list[tuple[bytes, bytes]] = []  # (key, value)
        self.outputs: list[Output] = []
        self.early: list[Output] = []
        self.copies: list[tuple[bytes, bytes | None]] = []  # (key, value) for snapshots
        self.summaries: dict[bytes, bytes | None] = {}  # the latest of each run; None: it is purged
        self.changes: Changes = {}
        self.created: set[bytes] = set()  # keys of changes that RocksDB has never seen
        self.deleted: list[bytes] = []  # keys of changes that are deletions
        self.offsets: dict[TP, int] = {}
        self.answers: list[Answer] = []
        self.urgent = False  # somebody waits for the commit
        self.ended: list[Header] = []  # runs whose end is to be told
        self.counts: dict[Counter, int] = {}  # what is counted of it, where somebody looks

    def change(self, changes: Changes, created: set[bytes], deleted: Iterable[bytes]) -> None:
        """Adds changes. What is created and deleted before it ever reached RocksDB leaves no trace.

        ``deleted``: the keys whose change is a deletion.
        """
        self.changes.update(changes)
        for key in deleted:
            if key in self.created:
                self.created.discard(key)
                del self.changes[key]
            else:
                self.deleted.append(key)
        self.created |= created

    def merge(self, later: Part) -> None:
        """Adds what came after."""
        self.events += later.events
        self.copies += later.copies
        self.outputs += later.outputs
        self.summaries.update(later.summaries)
        self.change(later.changes, later.created, later.deleted)
        self.offsets.update(later.offsets)
        self.answers += later.answers
        self.ended += later.ended
        for counter, number in later.counts.items():
            self.counts[counter] = self.counts.get(counter, 0) + number
        self.urgent |= later.urgent


class Turn:
    """One pass of the advance thread.

    Args:
        number: counted up; what is acknowledged is told by the last number.
        acked: the last turn that was acknowledged when this one began.
    """

    __slots__ = ("acked", "dispatch", "number", "parts")

    def __init__(self, number: int, acked: int) -> None:
        self.number = number
        self.acked = acked
        self.parts: dict[int, Part] = {}
        self.dispatch = Dispatch()

    def part(self, partition: int, store: Store) -> Part:
        """The part of a partition."""
        part = self.parts.get(partition)
        if part is None:
            part = self.parts[partition] = Part(store)
        return part
