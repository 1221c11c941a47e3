"""The broker port in a process that does not own the path: all is asked of the one that does, through its socket."""

from __future__ import annotations

import threading
from collections import deque
from time import monotonic
from typing import TYPE_CHECKING, Any, NoReturn

import durably.errors
from durably.broker.embedded_broker import MAX_RECORD_BYTES, check_size
from durably.broker.embedded_channel import Channel, connect
from durably.broker.embedded_log import identity_of
from durably.broker.port import TP, End, GroupMember, GroupState, Message, TopicState
from durably.errors import BrokerError, BrokerUnreachable, ConfigurationError, UnknownTopic

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from durably_schemas.catalogue import Topic

    from durably.broker.acl import Acl
    from durably.broker.port import Consumer, Headers, Listener, OnAck, Transactions

# Records that may be unacknowledged before a send waits. Few enough that their answers always fit into the socket's
# buffer: otherwise the owner could wait for us to read answers, while we wait for it to read records.
IN_FLIGHT = 128
POLL_SECONDS = 1.0  # the longest single wait that is asked of the owner, so that it notices soon when we are gone


def _rebuild(error: list[str]) -> BrokerError:
    found = getattr(durably.errors, error[0], BrokerError)
    return found(error[1]) if issubclass(found, BrokerError) else BrokerError(error[1])


class _Line:
    """A connection with the path that errors name. Questions are answered in order."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            self.channel: Channel = connect(folder)
        except OSError as error:
            raise self.gone() from error

    def gone(self) -> BrokerUnreachable:
        return BrokerUnreachable(f"embedded:{self._folder}: the process that had it open is gone; open it anew")

    def ask(self, *question: object) -> Any:
        try:
            self.channel.send([question])
            error, result = self.channel.receive()[0]
        except ConnectionError as lost:
            raise self.gone() from lost
        except BaseException:
            # An interrupted question leaves its answer on the line, where the next one would take it for its own.
            self.channel.stop()
            raise
        if error:
            raise _rebuild(error)
        return result


class RemoteProducer:
    """A `Producer`. Records go out at once; acknowledgements are taken in by poll and flush."""

    def __init__(self, broker: RemoteBroker, line: _Line) -> None:
        self._broker = broker
        self._line = line
        self._waiting: deque[OnAck | None] = deque()
        self._lock = threading.RLock()
        self._closed = False

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
        """As `Producer.send`."""
        check_size(key, value, headers)
        if not self._broker.partitions(topic):
            raise UnknownTopic(f"{self._broker.url} has no topic {topic!r}: create it first")
        while len(self._waiting) >= IN_FLIGHT:
            self.poll(0.1)
        with self._lock:
            try:
                self._line.channel.send([("send", topic, value, key, partition, headers)])
            except ConnectionError as lost:
                raise self._line.gone() from lost
            self._waiting.append(on_ack)

    def poll(self, timeout: float = 0) -> None:
        """As `Producer.poll`."""
        if not self._waiting:
            return
        due: list[tuple[OnAck | None, Exception | None, int]] = []
        if timeout > 0:
            self._line.channel.readable(timeout)
        with self._lock:
            try:
                for error, offset in self._line.channel.receive(0):
                    due.append((self._waiting.popleft(), _rebuild(error) if error else None, offset or 0))
            except ConnectionError:
                due += [(on_ack, self._line.gone(), -1) for on_ack in self._waiting]
                self._waiting.clear()
        for on_ack, error, offset in due:
            if on_ack:
                on_ack(error, -1 if error else offset)

    def flush(self, timeout: float) -> int:
        """As `Producer.flush`."""
        deadline = monotonic() + timeout
        while self._waiting and (left := deadline - monotonic()) > 0:
            self.poll(left)
        return len(self._waiting)

    def close(self) -> None:
        """As `Producer.close`."""
        if not self._closed:
            self._closed = True
            self.flush(5)
            self._line.channel.close()


class RemoteReader:
    """A `Reader`."""

    def __init__(self, line: _Line, positions: Mapping[TP, int]) -> None:
        self._line = line
        line.ask("read", list(positions.items()))

    def poll(self, timeout: float, limit: int = 500) -> list[Message | End]:
        """As `Reader.poll`."""
        deadline = monotonic() + timeout
        while True:
            left = deadline - monotonic()
            found = self._line.ask("poll", max(0.0, min(left, POLL_SECONDS)), limit)
            if found or left <= POLL_SECONDS:
                return [_record(fields) for fields in found]

    def seek(self, tp: TP, offset: int) -> None:
        """As `Reader.seek`."""
        self._line.ask("seek", tp, offset)

    def close(self) -> None:
        """As `Reader.close`."""
        self._line.channel.close()


def _record(fields: list[Any]) -> Message | End:
    if len(fields) == len(End._fields):
        return End(*fields)
    fields[6] = [(name, data) for name, data in fields[6]]
    return Message(*fields)


class RemoteBroker:
    """A `Broker` without consumers and transactions, which only the owner of the path has."""

    max_record_bytes = MAX_RECORD_BYTES

    def __init__(self, folder: Path) -> None:
        self.url = f"embedded:{folder}"
        self._folder = folder
        self._lock = threading.Lock()
        self._line = _Line(folder)
        self._known: dict[str, int] = {}

    def identity(self, topic: str, timeout: float = 10) -> str:  # noqa: ARG002
        """As `Broker.identity`."""
        return identity_of(self._folder, topic)

    def _ask(self, *question: object) -> Any:
        with self._lock:
            return self._line.ask(*question)

    def _refuse(self, what: str) -> NoReturn:
        raise ConfigurationError(
            f"{self.url} is open in another process, such as a `durably dev` that runs already, and {what} must run in "
            "the process that owns the path: end that one first, or use another path or kafka://"
        )

    def producer(self) -> RemoteProducer:
        """As `Broker.producer`."""
        return RemoteProducer(self, _Line(self._folder))

    def transactions(self, transactional_id: str, timeout: float = 15) -> Transactions:  # noqa: ARG002
        """Raises `ConfigurationError`."""
        self._refuse("a processor")

    def consumer(
        self,
        group: str,  # noqa: ARG002
        topic: str,  # noqa: ARG002
        listener: Listener,  # noqa: ARG002
        *,
        companions: Sequence[str] = (),  # noqa: ARG002
        paused: bool = False,  # noqa: ARG002
        instance_id: str | None = None,  # noqa: ARG002
    ) -> Consumer:
        """Raises `ConfigurationError`."""
        self._refuse("a processor or worker")

    def reader(self, positions: Mapping[TP, int], *, committed: bool = True) -> RemoteReader:  # noqa: ARG002
        """As `Broker.reader`; what is not committed is not in the log."""
        line = _Line(self._folder)
        try:
            return RemoteReader(line, positions)
        except BaseException:
            line.channel.close()
            raise

    def _offsets(self, what: str, tps: Iterable[TP], *more: object) -> dict[TP, int]:
        asked = list(tps)
        return dict(zip(asked, self._ask(what, asked, *more), strict=True))

    def end_offsets(self, tps: Iterable[TP], *, committed: bool = False, timeout: float = 30) -> dict[TP, int]:  # noqa: ARG002
        """As `Broker.end_offsets`."""
        return self._offsets("end_offsets", tps)

    def start_offsets(self, tps: Iterable[TP], *, timeout: float = 30) -> dict[TP, int]:  # noqa: ARG002
        """As `Broker.start_offsets`."""
        return self._offsets("start_offsets", tps)

    def offsets_at(self, tps: Iterable[TP], timestamp: int, *, timeout: float = 30) -> dict[TP, int]:  # noqa: ARG002
        """As `Broker.offsets_at`."""
        return self._offsets("offsets_at", tps, timestamp)

    def partitions(self, topic: str, timeout: float = 10) -> int:  # noqa: ARG002
        """As `Broker.partitions`."""
        known = self._known.get(topic, 0)
        if not known and (found := self.describe([topic])):
            known = self._known[topic] = found[topic].partitions
        return known

    def group_metadata_of(self, group: str, tps: Iterable[TP], timeout: float = 30) -> dict[TP, str]:  # noqa: ARG002
        """As `Broker.group_metadata_of`."""
        asked = list(tps)
        return dict(zip(asked, self._ask("group_metadata_of", asked, group), strict=True))

    def group_state(self, group: str, tps: Iterable[TP], timeout: float = 10) -> GroupState:  # noqa: ARG002
        """As `Broker.group_state`."""
        members, offsets = self._ask("group_state", list(tps), group)
        return GroupState(
            [GroupMember(client, host, [TP(*tp) for tp in owned]) for client, host, owned in members],
            {TP(*tp): offset for tp, offset in offsets},
        )

    def describe(self, names: Iterable[str], timeout: float = 30) -> dict[str, TopicState]:  # noqa: ARG002
        """As `Broker.describe`."""
        return {name: TopicState(*state) for name, state in self._ask("describe", list(names)).items()}

    def topics(self, timeout: float = 30) -> list[str]:  # noqa: ARG002
        """As `Broker.topics`."""
        return list(self._ask("topics"))

    def require(self, acls: Iterable[Acl], timeout: float = 10) -> None:
        """As `Broker.require`: who reaches the folder may do everything."""

    def create(self, topics: Iterable[Topic], timeout: float = 30) -> None:  # noqa: ARG002
        """As `Broker.create`."""
        self._ask("create", list(topics))

    def truncate(self, offsets: Mapping[TP, int], timeout: float = 30) -> None:  # noqa: ARG002
        """Raises `ConfigurationError`."""
        self._refuse("a processor")

    def close(self) -> None:
        """As `Broker.close`."""
        self._line.channel.close()
