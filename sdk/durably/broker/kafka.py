"""The broker port over Kafka, by confluent-kafka. Thin: the semantics are Kafka's own."""

# librdkafka names its own errors with a leading underscore; they are public.
# ruff: noqa: SLF001
from __future__ import annotations

import io
import threading
import time
import warnings
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

import confluent_kafka as ck
from confluent_kafka import (
    IsolationLevel,
    KafkaError,
    KafkaException,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # it re-exports them without saying so
    AclBinding,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ConfigResource,
    NewTopic,
    OffsetSpec,
    ResourcePatternType,
    ResourceType,
)
from msgspec.structs import replace

from durably.broker.acl import Acl, denied
from durably.broker.kafka_properties import KafkaProperties, log
from durably.broker.kafka_statistics import Statistics
from durably.broker.port import TP, Committed, End, GroupMember, GroupState, Message, TopicState
from durably.errors import (
    AccessDenied,
    BrokerError,
    BrokerUnreachable,
    ConfigurationError,
    Fenced,
    RecordTooLarge,
    UnknownTopic,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from concurrent.futures import Future

    from durably_schemas.catalogue import Topic

    from durably.broker.acl import Operation, Resource
    from durably.broker.port import Headers, Listener, OnAck

H = TypeVar("H")

UNREACHABLE_AFTER = 10.0
"""Seconds after which a broker that answers no question about its topics counts as unreachable."""
LASTING = 10.0
"""Seconds after which a refusal of who we are, each time we connect, is raised where we have been let in before."""
_AGAIN = 5.0  # seconds; librdkafka connects again after one at most, so a refusal that is older was the last
_TICK = 0.05  # seconds between two looks at whether we are refused
LET_GO = 5.0
"""Seconds that closing a handle may take when the broker does not answer."""

_FENCED = {
    KafkaError._FENCED, KafkaError.INVALID_PRODUCER_EPOCH, KafkaError.PRODUCER_FENCED,
    KafkaError.ILLEGAL_GENERATION, KafkaError.UNKNOWN_MEMBER_ID, KafkaError.FENCED_INSTANCE_ID,
    KafkaError.REBALANCE_IN_PROGRESS, KafkaError.STALE_MEMBER_EPOCH, KafkaError.FENCED_MEMBER_EPOCH,
}  # fmt: skip
_STALE = {KafkaError.ILLEGAL_GENERATION, KafkaError.REBALANCE_IN_PROGRESS, KafkaError.STALE_MEMBER_EPOCH}
_SILENT = {
    KafkaError._TIMED_OUT, KafkaError._TIMED_OUT_QUEUE, KafkaError._MSG_TIMED_OUT, KafkaError._TRANSPORT,
    KafkaError._ALL_BROKERS_DOWN, KafkaError._RESOLVE, KafkaError.REQUEST_TIMED_OUT,
}  # fmt: skip
_TOO_LARGE = {KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.RECORD_LIST_TOO_LARGE, KafkaError.INVALID_MSG_SIZE}
_NO_TOPIC = {
    KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION,
    KafkaError.UNKNOWN_TOPIC_ID,
}  # fmt: skip
# Who we say we are is not believed, or we do not believe the broker. After these librdkafka tries again for ever.
_UNKNOWN_USER = {
    KafkaError.SASL_AUTHENTICATION_FAILED, KafkaError.UNSUPPORTED_SASL_MECHANISM, KafkaError.ILLEGAL_SASL_STATE,
    KafkaError._AUTHENTICATION, KafkaError._SSL,
}  # fmt: skip
_AFTER_FATAL = {KafkaError._FATAL, KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT}
_DENIED: dict[int, Resource] = {
    KafkaError.TOPIC_AUTHORIZATION_FAILED: "topic",
    KafkaError.GROUP_AUTHORIZATION_FAILED: "group",
    KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED: "transactional-id",
    KafkaError.CLUSTER_AUTHORIZATION_FAILED: "cluster",
}
# What heals by itself while one goes on polling. _MAX_POLL_EXCEEDED is followed by on_lost and a new assignment.
_PASSING = _SILENT | {
    KafkaError._MAX_POLL_EXCEEDED, KafkaError._WAIT_COORD, KafkaError.COORDINATOR_NOT_AVAILABLE,
    KafkaError.COORDINATOR_LOAD_IN_PROGRESS, KafkaError.NOT_COORDINATOR, KafkaError.REBALANCE_IN_PROGRESS,
    KafkaError.LEADER_NOT_AVAILABLE, KafkaError.NOT_LEADER_FOR_PARTITION, KafkaError.OFFSET_OUT_OF_RANGE,
}  # fmt: skip
# What asking the right broker heals.
_LEADERSHIP = {
    KafkaError.NOT_LEADER_FOR_PARTITION, KafkaError.LEADER_NOT_AVAILABLE, KafkaError.FENCED_LEADER_EPOCH,
    KafkaError.UNKNOWN_LEADER_EPOCH, KafkaError._TRANSPORT, KafkaError.REPLICA_NOT_AVAILABLE,
}  # fmt: skip

_OPERATIONS: dict[Operation, AclOperation] = {
    "Alter": AclOperation.ALTER,
    "Create": AclOperation.CREATE,
    "Delete": AclOperation.DELETE,
    "Describe": AclOperation.DESCRIBE,
    "DescribeConfigs": AclOperation.DESCRIBE_CONFIGS,
    "Read": AclOperation.READ,
    "Write": AclOperation.WRITE,
}
_RESOURCES: dict[Resource, ResourceType] = {
    "topic": ResourceType.TOPIC,
    "group": ResourceType.GROUP,
    "transactional-id": ResourceType.TRANSACTIONAL_ID,
    "cluster": ResourceType.BROKER,  # so librdkafka calls the cluster
}
_LATEST: OffsetSpec = OffsetSpec.latest()  # type: ignore[no-untyped-call]
_EARLIEST: OffsetSpec = OffsetSpec.earliest()  # type: ignore[no-untyped-call]


def _kafka(tps: Iterable[TP]) -> list[TopicPartition]:
    return [TopicPartition(topic, partition) for topic, partition in tps]


def _positions(positions: Mapping[TP, int]) -> list[TopicPartition]:
    return [TopicPartition(topic, partition, offset) for (topic, partition), offset in positions.items()]


def _offsets(offsets: Mapping[TP, Committed]) -> list[TopicPartition]:
    return [TopicPartition(tp.topic, tp.partition, at.offset, at.metadata) for tp, at in offsets.items()]


class _Errors:
    """Turns librdkafka's errors into ours. One for all handles of a connection: they are the same user."""

    def __init__(self, address: str, user: str, principal: str) -> None:
        self.address = address
        self.principal = principal
        self._user = user
        self._met = False
        self._refusal: KafkaError | None = None
        self._first = self._last = 0.0  # when the refusals in a row were heard

    def heard(self, error: KafkaError) -> None:
        """The ``error_cb`` of every handle: what no call of it raises, lost connections above all."""
        log.warning("%s", error.str())
        # A server that wants no client without a certificate says so by an alert.
        if error.code() in _UNKNOWN_USER or "SSL routines" in error.str():
            now = time.monotonic()
            if now - self._last > _AGAIN:
                self._first = now
            self._refusal, self._last = error, now

    def let_in(self) -> None:
        """A broker has answered: from now on a refusal may be a broker that restarts, and has to last."""
        self._met = True

    def check_refusal(self, since: float = 0) -> None:
        """Raises `AccessDenied` where the last thing heard, after ``since``, is that we are not let in."""
        if self._refusal is None or self._last <= max(since, time.monotonic() - _AGAIN):
            return
        if not self._met or self._last - self._first > LASTING:
            raise self._unknown(self._refusal)

    def of(self, error: KafkaError, doing: str, operation: Operation = "Read", name: str = "") -> BrokerError:
        """Ours for one of librdkafka's.

        Args:
            error: what it says.
            doing: completes "while ...".
            operation: what was asked for, where the answer is that it is not granted.
            name: of the topic, group or transactional id.
        """
        code, said = error.code(), f"{error.str()} [{error.name()}]"
        if code in _FENCED:
            fenced = Fenced(f"another process took over while {doing}, which did not happen: {said}")
            fenced.stale = code in _STALE
            return fenced
        if code in _SILENT:
            try:
                self.check_refusal()
            except AccessDenied as refusal:
                return refusal
            return BrokerUnreachable(
                f"no answer from Kafka at {self.address} while {doing}: check that it runs there, that this machine "
                f"reaches it, and its security settings ({said})"
            )
        if code in _TOO_LARGE:
            return RecordTooLarge(
                f"a record is too large for Kafka at {self.address} while {doing}: pass a reference to the data, or "
                f"raise max.message.bytes of the topic and the Kafka property message.max.bytes ({said})"
            )
        if code in _NO_TOPIC:
            return UnknownTopic(
                f"a topic or partition is missing at {self.address} while {doing}: create it with "
                f"'durably topics create' ({said})"
            )
        if code in _UNKNOWN_USER:
            return self._unknown(error)
        if code in _DENIED and (name or _DENIED[code] == "cluster"):
            acl = Acl(principal=self.principal, operation=operation, resource=_DENIED[code], name=name)
            return denied([acl], self.address)
        if code in _DENIED:
            return AccessDenied(
                f"Kafka at {self.address} does not grant {self.principal} {doing}: give it the ACLs of its role, with "
                f"`durably acls --role ROLE --principal {self.principal} --apply` ({said})"
            )
        return BrokerError(f"Kafka at {self.address} failed while {doing}: {said}")

    def raised(self, error: KafkaException, doing: str, operation: Operation = "Read", name: str = "") -> BrokerError:
        """Ours for an exception of the client."""
        return self.of(error.args[0], doing, operation, name)

    def _unknown(self, error: KafkaError) -> AccessDenied:
        return AccessDenied(
            f"Kafka at {self.address} and {self._user} do not come together: check the Kafka properties "
            f"security.protocol, sasl.* and ssl.*, which are DURABLY_KAFKA_SECURITY_PROTOCOL and so on in the "
            f"environment ({error.str()} [{error.name()}])"
        )


def _bounded(close: Callable[[], object], what: str) -> None:
    """Runs ``close``, which waits for a broker that may not answer, and abandons it after a while."""

    def run() -> None:
        try:
            close()
        except KafkaException as error:
            # A fenced producer cannot abort what its successor has aborted.
            log.debug("%s: %s", what, error)

    thread = threading.Thread(target=run, name=f"close {what}", daemon=True)
    thread.start()
    thread.join(LET_GO)
    if thread.is_alive():
        log.warning("%s is abandoned: it did not close within %.0f s", what, LET_GO)


class _Producing:
    """What plain and transactional producers share: handing records over."""

    def __init__(self, broker: KafkaBroker, properties: dict[str, Any]) -> None:
        self._broker = broker
        self._errors = broker.errors
        self._known: set[str] = set()
        self._closed = False
        self._client = broker.handle(ck.Producer, properties)

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
        """See `Producer.send`."""
        if topic not in self._known:
            # Asked first, because a broker may be set to create what a producer names.
            if not self._broker.partitions(topic):
                raise self._broker.missing(topic)
            self._known.add(topic)
        delivered: Callable[[KafkaError | None, ck.Message], None] | None = None
        if on_ack is not None:
            told = on_ack

            def delivered(error: KafkaError | None, record: ck.Message) -> None:
                if error is None:
                    # A retry that the broker knows already is answered without an offset.
                    offset = record.offset()
                    told(None, -1 if offset is None else offset)
                else:
                    told(self._unwritten(error, topic), -1)

        try:
            self._client.produce(
                topic,
                value,
                key,
                -1 if partition is None else partition,
                delivered,
                headers=list(headers) if headers else None,
            )
        except KafkaException as error:
            raise self._failure(error, f"writing to {topic}", topic) from error
        except BufferError as error:
            raise BrokerError(
                f"Kafka at {self._broker.address} takes records more slowly than they come: 1 GB of them waits"
            ) from error

    def _failure(self, error: KafkaException, doing: str, name: str = "") -> BrokerError:
        return self._errors.raised(error, doing, "Write", name)

    def _unwritten(self, error: KafkaError, topic: str) -> BrokerError:
        return self._errors.of(error, f"writing to {topic}", "Write", topic)


class KafkaProducer(_Producing):
    """A plain idempotent producer."""

    _fatal: KafkaError | None = None
    """Why it is of no more use. librdkafka says so once; then it purges what it has, and takes nothing more."""

    def poll(self, timeout: float = 0) -> None:
        """See `Producer.poll`."""
        try:
            self._client.poll(timeout)
        except KafkaException as error:
            self._fatal = error.args[0]  # told to those who wait for acknowledgements

    def flush(self, timeout: float) -> int:
        """See `Producer.flush`."""
        try:
            return self._client.flush(timeout)
        except KafkaException as error:
            self._fatal = error.args[0]
            return len(self._client)

    def _failure(self, error: KafkaException, doing: str, name: str = "") -> BrokerError:
        return self._unwritten(error.args[0], name) if name else super()._failure(error, doing)

    def _unwritten(self, error: KafkaError, topic: str) -> BrokerError:
        if self._fatal is not None and error.code() in _AFTER_FATAL:
            error = self._fatal
        if error.code() == KafkaError.CLUSTER_AUTHORIZATION_FAILED:
            # To be idempotent takes Write on some topic (KIP-679): the user has it on none.
            acl = Acl(principal=self._errors.principal, operation="Write", resource="topic", name=topic)
            return denied([acl], self._errors.address)
        return super()._unwritten(error, topic)

    def close(self) -> None:
        """See `Producer.close`."""
        if self._closed:
            return
        self._closed = True
        if left := self.flush(LET_GO):
            log.warning("%d records were not acknowledged within %.0f s and may be lost", left, LET_GO)
            # Their callbacks run, with an error, in the flush.
            self._client.purge()
            self.flush(0)
        _bounded(self._client.close, "a producer")


class KafkaTransactions(_Producing):
    """A transactional producer."""

    def __init__(self, broker: KafkaBroker, transactional_id: str, timeout: float) -> None:
        super().__init__(broker, broker.properties.transactions(transactional_id, timeout))
        self._id = transactional_id
        self._first: BrokerError | None = None

    def _failure(self, error: KafkaException, doing: str, name: str = "") -> BrokerError:
        with suppress(KafkaException):  # the same error again, where it is a fatal one
            self._client.poll(0)  # what was heard meanwhile
        if error.args[0].code() == KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED:
            name = self._id
        # After a fatal error every call answers _FATAL; the first one says what it was.
        failure = self._errors.raised(error, f"{doing} as {self._id!r}", "Write", name)
        if error.args[0].code() == KafkaError._FATAL and self._first is not None:
            return type(self._first)(*self._first.args)
        if error.args[0].fatal():
            self._first = failure
        return failure

    def init(self, timeout: float) -> None:
        """See `Transactions.init`."""
        try:
            self._client.init_transactions(timeout)
        except KafkaException as error:
            raise self._failure(error, "resolving what a predecessor left open") from error

    def begin(self) -> None:
        """See `Transactions.begin`."""
        try:
            self._client.begin_transaction()
        except KafkaException as error:
            raise self._failure(error, "beginning a transaction") from error

    def commit(self, offsets: Mapping[TP, Committed], group: object, timeout: float) -> None:
        """See `Transactions.commit`.

        A group coordinator that is silent holds librdkafka until the transaction's own timeout, whatever ``timeout``
        says (librdkafka#5456): call this on a thread that may be left behind.
        """
        until = time.monotonic() + timeout
        try:
            # The records are on their way since `send`; this goes out beside them.
            if offsets:
                self._client.send_offsets_to_transaction(_offsets(offsets), group, timeout)
            self._client.commit_transaction(max(0.0, until - time.monotonic()))
        except KafkaException as error:
            raise self._failure(error, "committing a transaction") from error

    def close(self) -> None:
        """See `Transactions.close`."""
        if self._closed:
            return
        self._closed = True
        # The client's own close() waits without bound, and warns where the outcome of a commit is unknown.
        self._client.purge()
        try:
            self._client.abort_transaction(LET_GO)
        except KafkaException as error:
            # Nothing is open, or the next `init` with this id resolves it.
            log.debug("closing the transactional producer %r: %s", self._id, error)
        # Dropping the last reference ends its threads; a commit in flight elsewhere keeps its own.
        del self._client


class _Reading:
    """What consumers and readers share: taking records."""

    _passing = _PASSING

    def __init__(self, broker: KafkaBroker, properties: dict[str, Any]) -> None:
        self._errors = broker.errors
        self._raise_next: BrokerError | None = None
        self._group = properties["group.id"]
        self._client = broker.handle(ck.Consumer, properties)

    def _take(self, timeout: float, limit: int) -> list[Message | End]:
        if self._raise_next is not None:
            failure, self._raise_next = self._raise_next, None
            raise failure
        try:
            # consume(n, t) would wait for all n, or for all of t.
            first = self._client.poll(timeout)
            if first is None:
                self._errors.check_refusal()
                return []
            records = [first, *self._client.consume(limit - 1, 0)] if limit > 1 else [first]
        except KafkaException as error:
            raise self._errors.raised(error, "reading") from error
        new = tuple.__new__
        taken: list[Message | End] = []
        for record in records:
            problem = record.error()
            if problem is None:
                headers = record.headers()
                taken.append(
                    new(
                        Message,
                        (
                            record.topic(),
                            record.partition(),
                            record.offset(),
                            record.timestamp()[1],
                            record.key(),
                            record.value(),
                            tuple([(name, value or b"") for name, value in headers]) if headers else (),  # type: ignore[str-unpack]
                        ),
                    )
                )
            elif problem.code() == KafkaError._PARTITION_EOF:
                taken.append(new(End, (record.topic(), record.partition(), record.offset())))
            elif problem.code() in self._passing and not problem.fatal():
                log.warning("%s", problem.str())
            elif problem.code() == KafkaError.GROUP_AUTHORIZATION_FAILED:
                self._raise_next = self._errors.of(problem, f"joining group {self._group!r}", "Read", self._group)
            else:
                topic = record.topic()
                self._raise_next = self._errors.of(problem, f"reading {topic or 'a topic'}", "Read", topic or "")
        if self._raise_next is not None and not taken:
            failure, self._raise_next = self._raise_next, None
            raise failure
        return taken

    def _reassign(self, positions: Sequence[TopicPartition], *, paused: bool) -> None:
        # Assigning anew works in every state of a partition, where seek() wants it to be fetched already; and it
        # makes librdkafka drop what it has fetched.
        self._client.incremental_unassign(list(positions))
        self._client.incremental_assign(list(positions))
        if paused:
            self._client.pause(list(positions))


def _committed(
    client: ck.Consumer, tps: Iterable[TP], timeout: float, errors: _Errors, doing: str, group: str
) -> dict[TP, Committed]:
    """What a group has committed; of open transactions too, unless the client reads committed records only (KIP-447)."""
    try:
        found = client.committed(_kafka(tps), timeout)
    except KafkaException as error:
        raise errors.raised(error, doing, "Read", group) from error
    answer = {}
    for tp in found:
        if tp.error is not None:
            raise errors.of(tp.error, doing, "Read", group)
        answer[TP(tp.topic, tp.partition)] = Committed(max(tp.offset, -1), tp.metadata or "")
    return answer


def _assigned(assignment: bytes) -> list[TP]:
    """The partitions in a member's assignment: version, then topics, each with its numbers (ConsumerProtocolAssignment)."""
    found: list[TP] = []
    if not assignment:  # a group that is rebalancing
        return found
    data = io.BytesIO(assignment)

    def number(size: int) -> int:
        return int.from_bytes(data.read(size), "big", signed=True)

    number(2)
    for _ in range(number(4)):
        topic = data.read(number(2)).decode()
        found += [TP(topic, number(4)) for _ in range(number(4))]
    return found


class KafkaConsumer(_Reading):
    """A member of a group."""

    def __init__(
        self,
        broker: KafkaBroker,
        group: str,
        topic: str,
        listener: Listener,
        companions: Sequence[str],
        *,
        paused: bool,
        instance_id: str | None,
    ) -> None:
        super().__init__(broker, broker.properties.consumer(group, instance_id))
        self._topics = (topic, *companions)
        self._listener = listener
        self._paused = paused
        self._owned: set[int] = set()
        self._gone: set[int] = set()
        self._closed = False
        self._client.subscribe([topic], on_assign=self._assigned, on_revoke=self._revoked, on_lost=self._lost)

    def _all(self, partitions: Iterable[int]) -> list[TopicPartition]:
        return [TopicPartition(topic, partition) for partition in partitions for topic in self._topics]

    def _assigned(self, client: ck.Consumer, tps: list[TopicPartition]) -> None:
        partitions = [tp.partition for tp in tps]
        if self._closed or not partitions:
            return
        mine = self._all(partitions)
        client.incremental_assign(mine)
        # A pause outlives an assignment: a partition that comes back would still be paused by its last stay.
        (client.pause if self._paused else client.resume)(mine)
        self._owned.update(partitions)
        self._listener.on_assigned(partitions)

    def _revoked(self, client: ck.Consumer, tps: list[TopicPartition]) -> None:
        self._left(client, tps, self._listener.on_revoked)

    def _lost(self, client: ck.Consumer, tps: list[TopicPartition]) -> None:
        self._left(client, tps, self._listener.on_lost)

    def _left(self, client: ck.Consumer, tps: list[TopicPartition], tell: Callable[[Sequence[int]], None]) -> None:
        # librdkafka names the companions too where it revokes all that is assigned.
        partitions = sorted({tp.partition for tp in tps} & self._owned)
        if self._closed or not partitions:
            return
        self._gone.update(partitions)
        try:
            tell(partitions)
        finally:
            self._owned.difference_update(partitions)
            client.incremental_unassign(self._all(partitions))

    def poll(self, timeout: float, limit: int = 500) -> list[Message | End]:
        """See `Consumer.poll`."""
        self._gone.clear()
        taken = self._take(timeout, limit)
        # A rebalance may come between the records of one call: those before it are no longer ours.
        return [record for record in taken if record[1] in self._owned] if self._gone else taken

    def group_metadata(self) -> object:
        """See `Consumer.group_metadata`."""
        return self._client.consumer_group_metadata()

    def committed(self, tps: Iterable[TP], timeout: float) -> dict[TP, Committed]:
        """See `Consumer.committed`. With read_committed librdkafka asks for stable offsets (KIP-447)."""
        doing = f"reading the offsets of group {self._group!r}, or a transaction is still open"
        return _committed(self._client, tps, timeout, self._errors, doing, self._group)

    def rewind(self, positions: Mapping[TP, int]) -> None:
        """See `Consumer.rewind`."""
        try:
            self._reassign(_positions(positions), paused=True)
        except KafkaException as error:
            raise self._errors.raised(error, f"rewinding {sorted(positions)}") from error

    def pause(self, tps: Iterable[TP]) -> None:
        """See `Consumer.pause`."""
        try:
            self._client.pause(_kafka(tps))
        except KafkaException as error:
            raise self._errors.raised(error, "pausing") from error

    def resume(self, tps: Iterable[TP]) -> None:
        """See `Consumer.resume`."""
        try:
            self._client.resume(_kafka(tps))
        except KafkaException as error:
            raise self._errors.raised(error, "resuming") from error

    def commit(self, offsets: Mapping[TP, Committed], *, wait: bool = False) -> None:
        """See `Consumer.commit`."""
        if not offsets:
            return
        if self._closed:
            raise Fenced(f"a member of group {self._group!r} has left it and commits nothing any more")
        doing = f"committing offsets of group {self._group!r}"
        try:
            if not wait:
                self._client.commit(offsets=_offsets(offsets), asynchronous=True)
                return
            done = self._client.commit(offsets=_offsets(offsets), asynchronous=False)
        except KafkaException as error:
            raise self._errors.raised(error, doing, "Read", self._group) from error
        for tp in done:
            if tp.error is not None:
                raise self._errors.of(tp.error, doing, "Read", self._group)

    def close(self) -> None:
        """See `Consumer.close`."""
        if self._closed:
            return
        if self._owned:
            self._left(self._client, self._all(self._owned), self._listener.on_revoked)
        self._closed = True
        _bounded(self._client.close, f"a member of group {self._group!r}")


class KafkaReader(_Reading):
    """Reads given partitions."""

    # It joins no group; librdkafka asks for the coordinator of the one whose name it wants all the same.
    _passing = _PASSING | {KafkaError.GROUP_AUTHORIZATION_FAILED}

    def __init__(self, broker: KafkaBroker, positions: Mapping[TP, int], *, committed: bool) -> None:
        super().__init__(broker, broker.properties.reader(committed=committed))
        self._assigned = set(positions)
        self._client.incremental_assign(_positions(positions))

    def poll(self, timeout: float, limit: int = 500) -> list[Message | End]:
        """See `Reader.poll`."""
        return self._take(timeout, limit)

    def seek(self, tp: TP, offset: int) -> None:
        """See `Reader.seek`."""
        position = _positions({tp: offset})
        if tp in self._assigned:
            self._reassign(position, paused=False)
        else:
            self._assigned.add(tp)
            self._client.incremental_assign(position)

    def close(self) -> None:
        """See `Reader.close`."""
        _bounded(self._client.close, "a reader")


class KafkaBroker:
    """A Kafka cluster.

    Args:
        address: ``host:port``, with further brokers after commas.
        kafka: properties of librdkafka that the user adds or changes.

    Raises:
        ConfigurationError: an address or property is not as it must be.

    Attributes:
        statistics: what librdkafka counts, where the user has set ``statistics.interval.ms``.
    """

    def __init__(self, address: str, kafka: Mapping[str, str]) -> None:
        self.properties = KafkaProperties(address, kafka)
        self.address = self.properties.address
        self.url = f"kafka://{self.address}"
        self.max_record_bytes = self.properties.max_record_bytes
        self.errors = _Errors(self.address, self.properties.user, self.properties.principal)
        self._counts: dict[str, int] = {}
        self.statistics = Statistics(self.properties.statistics_interval)
        self._admin = self.handle(AdminClient, self.properties.admin())

    def handle(self, kind: Callable[[dict[str, Any]], H], properties: dict[str, Any]) -> H:
        """One of librdkafka's.

        Raises:
            ConfigurationError: a property that it refuses, such as a file that is not there.
            AccessDenied: no token could be had.
        """
        try:
            return kind({**properties, "error_cb": self.errors.heard, "stats_cb": self.statistics.heard})
        except KafkaException as error:
            if error.args[0].code() in _UNKNOWN_USER:
                raise self.errors.raised(error, "asking for a token") from error
            raise ConfigurationError(
                f"the Kafka properties cannot be used, {error.args[0].str()}: correct them, or the variables "
                f"DURABLY_KAFKA_* that they come from"
            ) from error

    def missing(self, topic: str) -> UnknownTopic:
        """The error for a topic that does not exist."""
        return UnknownTopic(f"topic {topic!r} does not exist at {self.address}: create it with 'durably topics create'")

    def _answer(self, future: Future[Any]) -> Any:
        """What the admin client answers. Raises `AccessDenied` as soon as we are not let in, where it would try on."""
        since = time.monotonic()
        while True:
            try:
                answer = future.result(_TICK)
            except TimeoutError:
                self._admin.poll(0)  # nobody else hears what it has to say
                self.errors.check_refusal(since)
            else:
                self.errors.let_in()
                return answer

    def _done(self, future: Future[Any], doing: str, operation: Operation = "Describe", name: str = "") -> Any:
        try:
            return self._answer(future)
        except KafkaException as error:
            raise self.errors.raised(error, doing, operation, name) from error

    def producer(self) -> KafkaProducer:
        """See `Broker.producer`."""
        return KafkaProducer(self, self.properties.producer())

    def transactions(self, transactional_id: str, timeout: float = 15) -> KafkaTransactions:
        """See `Broker.transactions`."""
        return KafkaTransactions(self, transactional_id, timeout)

    def consumer(
        self,
        group: str,
        topic: str,
        listener: Listener,
        *,
        companions: Sequence[str] = (),
        paused: bool = False,
        instance_id: str | None = None,
    ) -> KafkaConsumer:
        """See `Broker.consumer`."""
        return KafkaConsumer(self, group, topic, listener, companions, paused=paused, instance_id=instance_id)

    def reader(self, positions: Mapping[TP, int], *, committed: bool = True) -> KafkaReader:
        """See `Broker.reader`."""
        return KafkaReader(self, positions, committed=committed)

    def _list(self, tps: Iterable[TP], spec: OffsetSpec, level: IsolationLevel, timeout: float) -> dict[TP, int]:
        # The admin client asks the leader that it remembers, and does not look for the new one by itself: a topic that
        # has just been created, or a broker that has been restarted, would be refused for ever.
        deadline = time.monotonic() + timeout
        left = set(tps)
        found: dict[TP, int] = {}
        while left:
            futures = self._admin.list_offsets(
                dict.fromkeys(_kafka(left), spec),
                isolation_level=level,
                request_timeout=max(1.0, deadline - time.monotonic()),
            )
            for tp, future in futures.items():
                try:
                    found[TP(tp.topic, tp.partition)] = self._answer(future).offset
                except KafkaException as error:
                    if error.args[0].code() == KafkaError._NOENT and not self._count([tp.topic], timeout):
                        raise self.missing(tp.topic) from error  # where it may not be seen, that raised already
                    if error.args[0].code() not in _LEADERSHIP or time.monotonic() > deadline:
                        doing = f"asking for the offsets of {tp.topic}"
                        raise self.errors.raised(error, doing, "Describe", tp.topic) from error
            left -= found.keys()
            if left:
                time.sleep(0.05)
                self._admin.list_topics(timeout=UNREACHABLE_AFTER)  # learns the leaders anew
        return found

    def end_offsets(self, tps: Iterable[TP], *, committed: bool = False, timeout: float = 30) -> dict[TP, int]:
        """See `Broker.end_offsets`."""
        level = IsolationLevel.READ_COMMITTED if committed else IsolationLevel.READ_UNCOMMITTED
        return self._list(tps, _LATEST, level, timeout)

    def start_offsets(self, tps: Iterable[TP], *, timeout: float = 30) -> dict[TP, int]:
        """See `Broker.start_offsets`."""
        return self._list(tps, _EARLIEST, IsolationLevel.READ_UNCOMMITTED, timeout)

    def offsets_at(self, tps: Iterable[TP], timestamp: int, *, timeout: float = 30) -> dict[TP, int]:
        """See `Broker.offsets_at`."""
        found = self._list(tps, OffsetSpec.for_timestamp(timestamp), IsolationLevel.READ_UNCOMMITTED, timeout)
        later = [tp for tp, offset in found.items() if offset < 0]
        return found | self.end_offsets(later, timeout=timeout)

    def partitions(self, topic: str, timeout: float = 10) -> int:
        """See `Broker.partitions`."""
        count = self._counts.get(topic)
        return self._count([topic], timeout).get(topic, 0) if count is None else count

    def identity(self, topic: str, timeout: float = 10) -> str:
        """See `Broker.identity`: Kafka's topic id (KIP-516)."""
        future = self._admin.describe_topics(TopicCollection([topic]), request_timeout=min(timeout, UNREACHABLE_AFTER))
        uuid = self._done(future[topic], f"asking about topic {topic}", name=topic).topic_id
        return f"{uuid.get_most_significant_bits():x}:{uuid.get_least_significant_bits():x}"

    def group_metadata_of(self, group: str, tps: Iterable[TP], timeout: float = 30) -> dict[TP, str]:
        """See `Broker.group_metadata_of`."""
        return {tp: committed.metadata for tp, committed in self._group_offsets(group, tps, timeout).items()}

    def _group_offsets(self, group: str, tps: Iterable[TP], timeout: float) -> dict[TP, Committed]:
        # Not by the admin client: when its request to a coordinator times out, it never recovers, and the answer that
        # comes late ends the process (an assertion in rdkafka_queue.h). A consumer that does not join asks as well.
        asking = self.handle(ck.Consumer, self.properties.reader(committed=False, group=group))
        try:
            return _committed(asking, tps, timeout, self.errors, f"reading the offsets of group {group!r}", group)
        finally:
            asking.close()

    def group_state(self, group: str, tps: Iterable[TP], timeout: float = 10) -> GroupState:
        """See `Broker.group_state`. A group of the protocol of KIP-848 tells its offsets, and not its members."""
        offsets = self._group_offsets(group, tps, timeout)
        try:
            with warnings.catch_warnings():
                # It is deprecated for a call that asks the coordinator by the admin client: see above.
                warnings.simplefilter("ignore", DeprecationWarning)
                groups: Any = self._admin.list_groups(group, timeout)
        except KafkaException as error:
            raise self.errors.raised(error, f"asking for the members of group {group!r}", "Describe", group) from error
        members = [
            GroupMember(member.client_id, member.client_host.lstrip("/"), _assigned(member.assignment))
            for found in groups
            for member in found.members
        ]
        return GroupState(members, {tp: at.offset for tp, at in offsets.items() if at.offset >= 0})

    def _count(self, names: Sequence[str], timeout: float) -> dict[str, int]:
        futures = self._admin.describe_topics(
            TopicCollection(list(names)), request_timeout=min(timeout, UNREACHABLE_AFTER)
        )
        counts = {}
        for name, future in futures.items():
            try:
                counts[name] = len(self._done(future, f"asking about topic {name}", name=name).partitions)
            except UnknownTopic:
                continue
        self._counts |= counts
        return counts

    def describe(self, names: Iterable[str], timeout: float = 30) -> dict[str, TopicState]:
        """See `Broker.describe`."""
        wanted = list(dict.fromkeys(names))
        counts = self._count(wanted, timeout) if wanted else {}
        if not counts:
            return {}
        resources = [ConfigResource(ConfigResource.Type.TOPIC, name) for name in counts]
        futures = self._admin.describe_configs(resources, request_timeout=timeout)
        return {
            resource.name: TopicState(
                counts[resource.name],
                {
                    name: entry.value
                    for name, entry in self._done(
                        future, f"asking how topic {resource.name} is set", "DescribeConfigs", resource.name
                    ).items()
                    if entry.value is not None
                },
            )
            for resource, future in futures.items()
        }

    def topics(self, timeout: float = 30) -> list[str]:
        """See `Broker.topics`."""
        # The call hears nothing until its time is up, so it is given little at first: whoever is not let in learns it soon.
        since = time.monotonic()
        until, patience = since + min(timeout, UNREACHABLE_AFTER), 1.0
        while True:
            left = until - time.monotonic()
            try:
                found = sorted(self._admin.list_topics(timeout=min(patience, max(0.1, left))).topics)
            except KafkaException as error:
                self._admin.poll(0)
                self.errors.check_refusal(since)
                if left <= patience or error.args[0].code() not in _SILENT:
                    raise self.errors.raised(error, "asking for its topics") from error
                patience *= 2
            else:
                self.errors.let_in()
                return found

    def _meet(self, timeout: float) -> None:
        # What only the controller does may wait in vain for it, until its time is up, where it is the first thing that
        # is asked of a handle: so it learns first who is there.
        self.topics(timeout)

    def require(self, acls: Iterable[Acl], timeout: float = 10) -> None:
        """See `Broker.require`."""
        wanted = [acl for acl in acls if acl.resource == "topic" and not acl.prefixed]
        futures = self._admin.describe_topics(
            TopicCollection(list({acl.name: None for acl in wanted})),
            include_authorized_operations=True,
            request_timeout=min(timeout, UNREACHABLE_AFTER),
        )
        granted: dict[str, set[AclOperation] | None] = {}
        for name, future in futures.items():
            try:
                found = self._answer(future).authorized_operations
                granted[name] = None if found is None else set(found)  # None: a broker that does not tell
            except KafkaException as error:
                if error.args[0].code() != KafkaError.TOPIC_AUTHORIZATION_FAILED:
                    if error.args[0].code() not in _NO_TOPIC:
                        raise self.errors.raised(error, f"asking about topic {name}") from error
                    granted[name] = None
                else:
                    granted[name] = set()
        lacking = [
            replace(acl, principal=self.properties.principal)
            for acl in wanted
            if (operations := granted[acl.name]) is not None and _OPERATIONS[acl.operation] not in operations
        ]
        if lacking:
            raise denied(lacking, self.address)

    def grant(self, acls: Iterable[Acl], timeout: float = 30) -> None:
        """Adds ACLs; those that exist stay. Raises `BrokerError`: to alter ACLs is for Alter on the cluster."""
        wanted = [
            AclBinding(
                _RESOURCES[acl.resource],
                acl.name,
                ResourcePatternType.PREFIXED if acl.prefixed else ResourcePatternType.LITERAL,
                acl.principal,
                "*",
                _OPERATIONS[acl.operation],
                AclPermissionType.ALLOW,
            )
            for acl in acls
        ]
        self._meet(timeout)
        for future in self._admin.create_acls(wanted, request_timeout=timeout).values():
            try:
                self._answer(future)
            except KafkaException as error:
                if error.args[0].code() == KafkaError.SECURITY_DISABLED:
                    raise ConfigurationError(
                        f"Kafka at {self.address} has no authorizer, and lets everybody do everything: set "
                        f"authorizer.class.name on its brokers and controllers"
                    ) from error
                raise self.errors.raised(error, "adding ACLs", "Alter") from error

    def create(self, topics: Iterable[Topic], timeout: float = 30) -> None:
        """See `Broker.create`. The replication factor is the broker's ``default.replication.factor``."""
        until = time.monotonic() + timeout
        wanted = [NewTopic(t.name, t.partitions, -1, config=dict(t.config)) for t in topics]
        if not wanted:
            return
        self._meet(timeout)
        for name, future in self._admin.create_topics(wanted, request_timeout=timeout).items():
            try:
                self._answer(future)
            except KafkaException as error:
                if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                    raise self.errors.raised(error, f"creating topic {name}", "Create", name) from error
        # Metadata names a leader a moment before it leads. A producer that is quick enough would have its first batch
        # refused and its second taken: the broker accepts any sequence number from a producer that it does not know
        # there, and takes the first one's retry for a duplicate. So this waits until every leader answers.
        names = [topic.topic for topic in wanted]
        while True:
            try:
                counts = self._count(names, timeout)
                tps = [TP(name, n) for name in names for n in range(counts.get(name, 0))]
                self.end_offsets(tps, timeout=max(0.1, until - time.monotonic()))
                if len(counts) == len(set(names)):
                    return
                problem: BrokerError = UnknownTopic(f"Kafka at {self.address} does not show all of {names} yet")
            except BrokerError as error:
                problem = error
            if time.monotonic() > until:
                raise problem
            time.sleep(0.01)

    def truncate(self, offsets: Mapping[TP, int], timeout: float = 30) -> None:
        """See `Broker.truncate`. Files go when the broker next looks for what to delete."""
        for tp, future in self._admin.delete_records(_positions(offsets), request_timeout=timeout).items():
            self._done(future, f"truncating {tp.topic}", "Delete", tp.topic)

    def close(self) -> None:
        """See `Broker.close`."""
        self._counts.clear()
        admin = self._admin
        _bounded(lambda: admin.__exit__(None, None, None), "the connection")
