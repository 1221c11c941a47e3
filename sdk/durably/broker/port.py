"""The broker port: all that durably needs of a log with partitions, groups and transactions.

Two adapters implement it, `durably.broker.kafka` and `durably.broker.embedded`; one suite,
``tests/conformance/test_broker_port.py``, holds both to the sentences below.

Everything here is synchronous. A `Producer` may be shared between threads; a `Consumer`, a `Reader` and a
`Transactions` belong to one thread at a time. Timeouts are in seconds, instants in milliseconds since the epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from durably_schemas.catalogue import Topic

from durably.broker.acl import Acl

Headers = Sequence[tuple[str, bytes]]


class TP(NamedTuple):
    """A partition of a topic."""

    topic: str
    partition: int


class Message(NamedTuple):
    """A record as it was read. ``timestamp`` is the log's own, in milliseconds."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Headers


class End(NamedTuple):
    """The reader has taken everything below ``offset``, the end of what is readable just now."""

    topic: str
    partition: int
    offset: int


class Committed(NamedTuple):
    """A group's committed offset (the next to read) and the text stored with it; offset -1: none."""

    offset: int
    metadata: str


class GroupMember(NamedTuple):
    """Who consumes in a group: what it calls itself, where it runs, and the partitions that it has."""

    client: str
    host: str
    partitions: Sequence[TP]


class GroupState(NamedTuple):
    """A group as it is, for who looks on: its members, and the next offset that it will read of each partition.

    A partition for which nothing is committed has none.
    """

    members: Sequence[GroupMember]
    offsets: Mapping[TP, int]


class TopicState(NamedTuple):
    """A topic as it is."""

    partitions: int
    config: Mapping[str, str]


OnAck = Callable[[Exception | None, int], None]
"""Called once with (error, offset) when a record is durable or has failed for good; from within ``poll`` or ``flush``."""


class Producer(Protocol):
    """A plain idempotent producer. ``key`` chooses the partition (murmur2) where ``partition`` is not given."""

    def send(
        self,
        topic: str,
        value: bytes | None,
        *,
        key: bytes | None = None,
        partition: int | None = None,
        headers: Headers = (),
        on_ack: OnAck | None = None,
    ) -> None:
        """Hands a record over; it is durable when ``on_ack`` says so.

        Raises `RecordTooLarge` and `UnknownTopic` at once where the broker's answer can be foreseen.
        """

    def poll(self, timeout: float = 0) -> None:
        """Runs callbacks that are due."""

    def flush(self, timeout: float) -> int:
        """Waits until all that was sent is acknowledged; returns how many records are still not."""

    def close(self) -> None:
        """Flushes for a bounded time and lets go."""


class Transactions(Protocol):
    """A transactional producer. Any error raised here means: close it, and take over with a new one.

    `Fenced` is raised where another producer has the same transactional id by now, or the group has moved on; it is
    ``stale`` where the same may be committed with newer metadata of the group.
    """

    def init(self, timeout: float) -> None:
        """Fences predecessors with the same transactional id and resolves what they left open."""

    def begin(self) -> None:
        """Begins a transaction."""

    def send(
        self,
        topic: str,
        value: bytes | None,
        *,
        key: bytes | None = None,
        partition: int | None = None,
        headers: Headers = (),
        on_ack: OnAck | None = None,
    ) -> None:
        """As `Producer.send`, within the transaction."""

    def commit(self, offsets: Mapping[TP, Committed], group: object, timeout: float) -> None:
        """Commits the records and the group's offsets as one; every ``on_ack`` has run when it returns.

        ``group`` is what `Consumer.group_metadata` returned when the inputs were polled. Raises `BrokerError`.
        """

    def close(self) -> None:
        """Lets go without committing. What is open is aborted, or resolved by whoever comes next."""


class Listener(Protocol):
    """Told of rebalances, on the polling thread, within `Consumer.poll`. Partition numbers, not topics."""

    def on_assigned(self, partitions: Sequence[int]) -> None:
        """These are ours now, paused at the committed offsets when the consumer was made with ``paused``."""

    def on_revoked(self, partitions: Sequence[int]) -> None:
        """These will be somebody else's when this returns."""

    def on_lost(self, partitions: Sequence[int]) -> None:
        """These are somebody else's already: nothing may be committed for them."""


class Consumer(Protocol):
    """A member of a group. It subscribes to one topic; the same partitions of ``companions`` come with it."""

    def poll(self, timeout: float, limit: int = 500) -> list[Message | End]:
        """Waits for the first record, then takes what else is there, up to about ``limit``. Empty on timeout.

        Records of one partition come in order; read_committed. An `End` follows whenever a partition is exhausted
        (the first one also when it is empty). Raises `BrokerError` for what will not heal by itself.
        """

    def group_metadata(self) -> object:
        """What fences this member's commits; to be taken after a poll, on the polling thread."""

    def committed(self, tps: Iterable[TP], timeout: float) -> dict[TP, Committed]:
        """The group's offsets, stable: transactions that are still open have been waited for."""

    def rewind(self, positions: Mapping[TP, int]) -> None:
        """Reads on from these offsets; records already fetched beyond them are dropped. Leaves them paused."""

    def pause(self, tps: Iterable[TP]) -> None:
        """Delivers nothing from these partitions until `resume`."""

    def resume(self, tps: Iterable[TP]) -> None:
        """Ends a pause."""

    def commit(self, offsets: Mapping[TP, Committed], *, wait: bool = False) -> None:
        """Commits outside of a transaction. Raises `Fenced` when waited for and the member is no longer one."""

    def close(self) -> None:
        """Leaves the group; ``on_revoked`` is called for what is still assigned."""


class Reader(Protocol):
    """Reads given partitions without a group, from given offsets."""

    def poll(self, timeout: float, limit: int = 500) -> list[Message | End]:
        """As `Consumer.poll`."""

    def seek(self, tp: TP, offset: int) -> None:
        """Reads on from there; also adds a partition."""

    def close(self) -> None:
        """Lets go."""


class Broker(Protocol):
    """A connection to a broker. Thread-safe."""

    url: str
    max_record_bytes: int

    def producer(self) -> Producer:
        """A new plain producer."""

    def transactions(self, transactional_id: str, timeout: float = 15) -> Transactions:
        """A new transactional producer; ``timeout``: after how long the broker aborts what it left open."""

    def consumer(
        self,
        group: str,
        topic: str,
        listener: Listener,
        *,
        companions: Sequence[str] = (),
        paused: bool = False,
        instance_id: str | None = None,
    ) -> Consumer:
        """A new member of a group, which starts at the beginning of a partition that has no committed offset.

        ``instance_id`` makes membership static (KIP-345): a restart within the session timeout does not rebalance.
        """

    def reader(self, positions: Mapping[TP, int], *, committed: bool = True) -> Reader:
        """A new reader. ``committed=False`` reads records of open and aborted transactions too."""

    def end_offsets(self, tps: Iterable[TP], *, committed: bool = False, timeout: float = 30) -> dict[TP, int]:
        """The next offset of each: the high watermark, or with ``committed`` the last stable offset."""

    def start_offsets(self, tps: Iterable[TP], *, timeout: float = 30) -> dict[TP, int]:
        """The first offset still retained of each."""

    def offsets_at(self, tps: Iterable[TP], timestamp: int, *, timeout: float = 30) -> dict[TP, int]:
        """The first offset of each with this timestamp or a later one; the end where there is none."""

    def partitions(self, topic: str, timeout: float = 10) -> int:
        """How many partitions the topic has; 0 where it does not exist. Asked once, then remembered."""

    def identity(self, topic: str, timeout: float = 10) -> str:
        """What tells this topic from every other of the same name: made anew, or in another cluster."""

    def group_metadata_of(self, group: str, tps: Iterable[TP], timeout: float = 30) -> dict[TP, str]:
        """The text stored with a group's offsets, as of the last transaction that ended: open ones are not waited for."""

    def group_state(self, group: str, tps: Iterable[TP], timeout: float = 10) -> GroupState:
        """The members of a group, and its offsets of these partitions; without any where there is no such group."""

    def describe(self, names: Iterable[str], timeout: float = 30) -> dict[str, TopicState]:
        """The topics that exist, of those named."""

    def topics(self, timeout: float = 30) -> list[str]:
        """The names of all topics."""

    def require(self, acls: Iterable[Acl], timeout: float = 10) -> None:
        """Raises `AccessDenied`, which names them all, where we are not granted some of these, whoever they name.

        That is told of existing topics by their full names: other resources say so when they are used.
        """

    def create(self, topics: Iterable[Topic], timeout: float = 30) -> None:
        """Creates topics; those that exist stay as they are."""

    def truncate(self, offsets: Mapping[TP, int], timeout: float = 30) -> None:
        """Drops the records of each below an offset, for good. A few of them may stay; none from there on is touched."""

    def close(self) -> None:
        """Closes the connection, not what was made from it."""
