"""librdkafka's properties: what durably sets, what a user may set, and which handle takes which.

librdkafka warns of a consumer's property on a producer and the other way round, so each goes where it belongs.
The names of the two sets are those that its CONFIGURATION.md marks C and P.
"""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any

from durably.broker.acl import OURSELVES
from durably.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping

Properties = dict[str, Any]

log = logging.getLogger("durably.kafka")
# What an application does not listen to stays unsaid: every error that matters is raised.
log.addHandler(logging.NullHandler())

MAX_RECORD_BYTES = 1_000_000
"""librdkafka's default for ``message.max.bytes``; a broker's own is a little larger, for the batch around a record."""

_ADDRESS = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?")

# The exactly-once semantics rest on these.
_OURS_CONSUMER = {
    "enable.auto.commit": "false",
    "enable.auto.offset.store": "false",
    "enable.partition.eof": "true",
    "isolation.level": "read_committed",
    "auto.offset.reset": "earliest",
}
_OURS_PRODUCER = {"enable.idempotence": "true", "acks": "all", "partitioner": "murmur2_random"}
_OURS = {
    **_OURS_CONSUMER, **_OURS_PRODUCER,
    "request.required.acks": "all", "bootstrap.servers": "", "metadata.broker.list": "", "transactional.id": "",
    "group.id": "", "group.instance.id": "",
}  # fmt: skip

_CONSUMER = {
    "fetch.queue.backoff.ms": "1",
    # The broker holds a fetch for so long when there is nothing: an End comes that much after the last record.
    "fetch.wait.max.ms": "100",
}
_CLASSIC_GROUP = {
    "partition.assignment.strategy": "cooperative-sticky",
    "session.timeout.ms": "10000",
    "heartbeat.interval.ms": "1000",
}
_PRODUCER = {
    "linger.ms": "0",
    # One limit, in bytes (queue.buffering.max.kbytes, 1 GB), is enough.
    "queue.buffering.max.messages": "0",
}

_CONSUMER_ONLY = {
    *_OURS_CONSUMER, *_CONSUMER, *_CLASSIC_GROUP,
    "group.id", "group.instance.id", "group.protocol", "group.protocol.type", "group.remote.assignor",
    "coordinator.query.interval.ms", "max.poll.interval.ms", "auto.commit.interval.ms", "queued.min.messages",
    "queued.max.messages.kbytes", "fetch.message.max.bytes", "max.partition.fetch.bytes",
    "fetch.max.bytes", "fetch.min.bytes", "fetch.error.backoff.ms", "check.crcs", "allow.auto.create.topics",
    "client.rack",
}  # fmt: skip
_GROUP_ONLY = {
    *_CLASSIC_GROUP, "group.instance.id", "group.protocol", "group.protocol.type", "group.remote.assignor",
    "max.poll.interval.ms",
}  # fmt: skip
_PRODUCER_ONLY = {
    *_OURS_PRODUCER, *_PRODUCER, "request.required.acks",
    "transactional.id", "transaction.timeout.ms", "enable.gapless.guarantee", "queue.buffering.max.kbytes",
    "queue.buffering.max.ms", "message.send.max.retries", "retries", "queue.buffering.backpressure.threshold",
    "compression.codec", "compression.type", "compression.level", "batch.num.messages", "batch.size",
    "delivery.report.only.error", "sticky.partitioning.linger.ms", "request.timeout.ms", "message.timeout.ms",
    "delivery.timeout.ms",
}  # fmt: skip


STATISTICS = "statistics.interval.ms"


class KafkaProperties:
    """The properties of each kind of handle.

    Args:
        address: ``host:port``, with further brokers after commas.
        user: what the user adds or changes. ``oauth_cb`` is no property of librdkafka's but ``module:function``: it is
            called with the text of ``sasl.oauthbearer.config``, and returns a token and when that expires, in seconds
            since the epoch.

    Raises:
        ConfigurationError: an address of another form, or a property that is durably's own.
    """

    def __init__(self, address: str, user: Mapping[str, str]) -> None:
        self.address = address.rstrip("/")
        for part in self.address.split(","):
            if not _ADDRESS.fullmatch(part):
                raise ConfigurationError(
                    f"'kafka://{address}' names no broker: use kafka://host:port or kafka://host:port,host:port"
                )
        for name, value in user.items():
            if name in _OURS and str(value).lower() != _OURS[name]:
                must = f"it is always {_OURS[name]!r}" if _OURS[name] else "durably sets it"
                raise ConfigurationError(f"the Kafka property {name!r} cannot be {value!r}: {must}; leave it out")
        self._user: dict[str, Any] = dict(user)
        if callback := self._user.pop("oauth.cb", None) or self._user.get("oauth_cb"):
            from durably.authoring import load_object  # few connections need one

            self._user["oauth_cb"] = load_object(callback, "the Kafka property oauth_cb", "shop.tokens:fetch")
        self.max_record_bytes = self._number("message.max.bytes", MAX_RECORD_BYTES)
        self.statistics_interval = self._number(STATISTICS, 0)

    @property
    def user(self) -> str:
        """Who connects, and by what, in words."""
        protocol = str(self._user.get("security.protocol", "plaintext")).upper()
        if not protocol.startswith("SASL"):
            return f"its client by {protocol}"
        mechanism = self._user.get("sasl.mechanism") or self._user.get("sasl.mechanisms") or "GSSAPI"
        name = self._user.get("sasl.username")
        return f"{'its client' if name is None else f'user {name!r}'} by {protocol} with {mechanism}"

    @property
    def principal(self) -> str:
        """``User:NAME``, where that does not depend on how the brokers map certificates and tokens."""
        name = self._user.get("sasl.username")
        return OURSELVES if name is None else f"User:{name}"

    def _number(self, name: str, default: int) -> int:
        try:
            return int(self._user.get(name, default))
        except ValueError as error:
            raise ConfigurationError(f"the Kafka property {name!r} must be a number: {self._user[name]!r}") from error

    def _made(self, without: set[str], *parts: Mapping[str, Any]) -> Properties:
        properties: Properties = {"client.id": "durably", "reconnect.backoff.max.ms": "1000", "retry.backoff.ms": "10"}
        for part in parts:
            properties |= part
        properties |= {name: value for name, value in self._user.items() if name not in without}
        properties["bootstrap.servers"] = self.address
        return properties

    def admin(self) -> Properties:
        """Of the handle for topics and offsets."""
        # Nobody polls this handle, so its log lines and statistics would gather unread.
        return self._made(_CONSUMER_ONLY | _PRODUCER_ONLY | {STATISTICS}, {"log_level": 0})

    def producer(self) -> Properties:
        """Of a plain producer."""
        without = _CONSUMER_ONLY | {"transactional.id", "transaction.timeout.ms"}
        # One request at a time: a leader that has just been elected takes any sequence number from a producer it does
        # not know, so the second of two batches in flight may come first, and the retry of the first then counts as a
        # duplicate. It also makes batches larger where there is much to send; what is sent alone waits for nobody.
        own = {"max.in.flight.requests.per.connection": "1", "logger": log}
        return self._made(without, _OURS_PRODUCER, _PRODUCER, own)

    def transactions(self, transactional_id: str, timeout: float) -> Properties:
        """Of a transactional producer; ``timeout`` is the transaction's, in seconds."""
        own = {
            "transactional.id": transactional_id,
            "transaction.timeout.ms": round(timeout * 1000),
            # A commit that comes right after another finds that one's markers unwritten and is told to retry:
            # with 10 ms here, back-to-back transactions with offsets take 17 ms instead of 6.
            "retry.backoff.ms": "2",
            "logger": log,
        }
        return self._made(_CONSUMER_ONLY, _OURS_PRODUCER, _PRODUCER, own)

    def consumer(self, group: str, instance_id: str | None) -> Properties:
        """Of a member of a group."""
        # With KIP-848 the broker decides these three, and librdkafka refuses them.
        classic = {} if self._user.get("group.protocol") == "consumer" else _CLASSIC_GROUP
        # A commit of offsets that is waited for holds its thread, deaf to signals, until librdkafka has asked three times
        # for so long; its default is a minute. Whoever gets no answer for longer than a session is no member any more.
        own = {"group.id": group, "socket.timeout.ms": "10000", "logger": log}
        if instance_id is not None:
            own["group.instance.id"] = instance_id
        return self._made(_PRODUCER_ONLY, _OURS_CONSUMER, _CONSUMER, classic, own)

    def reader(self, *, committed: bool, group: str = "durably-readers") -> Properties:
        """Of a reader. librdkafka wants a group's name even where no group is meant."""
        own = {"group.id": group, "logger": log}
        if not committed:
            own["isolation.level"] = "read_uncommitted"
        return self._made(_PRODUCER_ONLY | _GROUP_ONLY, _OURS_CONSUMER, _CONSUMER, own)
