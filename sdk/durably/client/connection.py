"""A client's connection: commands out, acknowledgements and replies in, over the broker port."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import Future, InvalidStateError, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from durably_schemas import Catalogue, Codec, CodecError
from durably_schemas.records import Record, Reply, ReplyTo

from durably.broker.port import TP, Broker, Headers, Message, Producer, Reader
from durably.errors import (
    BrokerUnreachable,
    ConfigurationError,
    DurablyError,
    RecordTooLarge,
    SerializationError,
)
from durably.identifiers import ulid

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")

FIRST_RESEND = 1.0
LONGEST_RESEND = 10.0
_TICK = 0.1  # seconds until a closing connection is noticed, and until an ack is looked for again
_RECORD_OVERHEAD = 512  # what Kafka adds around one record in a batch, generously


@dataclass(slots=True, eq=False)
class _Question:
    """A command that waits for its reply. ``due``: when it is sent again; never while a copy is on its way."""

    key: str
    value: bytes
    future: Future[Reply]
    due: float
    delay: float
    headers: Headers
    on_its_way: bool = False


class Connection:
    """One producer for commands, and one partition of ``replies`` that is tailed from the first question on.

    Its methods return futures and may be called from any thread. Two daemon threads belong to it: one sleeps until
    something is unacknowledged, the other one reads replies and re-sends what has waited long enough.

    Args:
        broker: where to; closed with the connection where ``owned``.
        catalogue: which installation.
        timeout: seconds that callers wait for an acknowledgement, or for an answer that needs no waiting.
        owned: whether the broker was made for this connection.
    """

    def __init__(self, broker: Broker, catalogue: Catalogue, *, timeout: float = 30, owned: bool = False) -> None:
        self.broker = broker
        self.catalogue = catalogue
        self.codec = Codec()
        self.timeout = timeout
        self._owned = owned
        self._lock = threading.RLock()
        self._closed = threading.Event()
        self._unacknowledged = threading.Condition(self._lock)
        self._in_flight: set[Future[None]] = set()
        self._copies_in_flight = 0
        self._producer: Producer | None = None
        self._acks: threading.Thread | None = None
        self._replies: threading.Thread | None = None
        self._partition = -1
        self._questions: dict[str, _Question] = {}
        self._expected: dict[str, Future[Reply]] = {}
        self._attempts: dict[Callable[[], Any], Future[Any]] = {}

    @property
    def is_open(self) -> bool:
        """Whether `open` has been through, so that `send` does not block."""
        return self._producer is not None

    @property
    def is_listening(self) -> bool:
        """Whether `listen` has been through, so that `ask` does not block."""
        return self._replies is not None

    def now(self) -> int:
        """The time that starts are counted from, in milliseconds since the epoch."""
        return time.time_ns() // 1_000_000

    def open(self) -> Producer:
        """Checks the topics and makes the producer, where that is still to be done.

        Raises:
            ConfigurationError: topics are missing.
            BrokerUnreachable: nobody answers.
        """
        with self._lock:
            self._check_not_closed()
            if self._producer is not None:
                return self._producer
        return self.opening().result()

    def opening(self) -> Future[Producer]:
        """As `open`, without waiting. All who come while it is tried share one attempt, and its error."""
        return self._shared(self._open)

    def listen(self) -> int:
        """Positions a reader at the end of a partition of ``replies``, where that is still to be done.

        It happens before the first question is sent, so that no answer can come before the reader.
        """
        with self._lock:
            self._check_not_closed()
            if self._replies is not None:
                return self._partition
        return self.listening().result()

    def listening(self) -> Future[int]:
        """As `listen`, without waiting; shared as `opening`."""
        return self._shared(self._listen)

    def partitions(self, topic: str) -> int:
        """How many partitions a topic has. Raises `ConfigurationError`, naming all that are missing, for 0."""
        count = self.broker.partitions(topic)
        if count == 0:
            names = [t.name for t in self.catalogue.topics(())]
            missing = sorted(set(names) - set(self.broker.describe(names)))
            raise ConfigurationError(
                f"{self.broker.url} lacks topics of namespace {self.catalogue.namespace!r}: "
                f"{', '.join(missing) or topic}; create them with `durably topics create`"
            )
        return count

    def send(self, key: str, record: Record, topic: str | None = None, *, headers: Headers = ()) -> Future[None]:
        """Sends a record that asks for no reply; the future is done when the broker has it durably.

        Args:
            key: its routing key: a run's ID, or the custom token of a hook.
            record: a command, or what else a client may write.
            topic: where to; ``commands`` by default.
            headers: of the record.
        """
        topic = self.catalogue.commands if topic is None else topic
        value = self._encoded(key, record)
        future: Future[None] = Future()

        def on_ack(error: Exception | None, _: int) -> None:
            with self._lock:
                self._in_flight.discard(future)
            _settle(future, error)

        producer = self.open()
        with self._lock:
            self._in_flight.add(future)
            self._unacknowledged.notify()
        try:
            producer.send(topic, value, key=key.encode(), headers=headers, on_ack=on_ack)
        except BaseException:
            with self._lock:
                self._in_flight.discard(future)
            raise
        return future

    def ask(self, key: str, command: Callable[[ReplyTo], Record], headers: Headers = ()) -> Future[Reply]:
        """Sends a command until it is answered, always with the same request id.

        Args:
            key: its routing key: a run's ID, or the custom token of a hook.
            command: makes the record of the address that the answer goes to.
            headers: of the record.

        Returns:
            The reply to come. Cancelling it ends the re-sending.
        """
        with self._listening() as partition:
            request_id = ulid()
            record = command(ReplyTo(partition=partition, request_id=request_id))
            future: Future[Reply] = Future()
            question = _Question(
                key,
                self._encoded(key, record),
                future,
                time.monotonic() + FIRST_RESEND,
                FIRST_RESEND,
                headers,
            )
            self._questions[request_id] = question

        def forget(_: Future[Reply]) -> None:
            with self._lock:
                self._questions.pop(request_id, None)

        future.add_done_callback(forget)
        self._send_copy(question)
        return future

    def expect(self) -> tuple[ReplyTo, Future[Reply]]:
        """An address for a reply that no command asks for, such as a step's answer to a webhook.

        Returns:
            The address, and the reply to come. Cancelling it forgets the address.
        """
        with self._listening() as partition:
            to = ReplyTo(partition=partition, request_id=ulid())
            future: Future[Reply] = Future()
            self._expected[to.request_id] = future

        def forget(_: Future[Reply]) -> None:
            with self._lock:
                self._expected.pop(to.request_id, None)

        future.add_done_callback(forget)
        return to, future

    def close(self) -> None:
        """Flushes, stops the threads, and fails what still waits. May be called twice."""
        with self._lock:
            if self._closed.is_set():
                return
            self._closed.set()
            self._unacknowledged.notify_all()
            attempts = list(self._attempts.values())
        wait(attempts, 5)
        for thread in (self._replies, self._acks):
            if thread is not None and thread is not threading.current_thread():
                thread.join(5)
        if self._producer is not None:
            self._producer.close()
        with self._lock:
            waiting: list[Future[None] | Future[Reply]] = [
                *self._in_flight,
                *self._awaited(),
            ]
        for future in waiting:
            with suppress(InvalidStateError):
                future.set_exception(DurablyError("the client was closed before this was answered"))
        if self._owned:
            self.broker.close()

    def _shared(self, attempt: Callable[[], T]) -> Future[T]:
        """What an attempt that is under way will give; where none is, begins one, on a thread."""
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()  # so that no single one of those who wait can cancel it
        with self._lock:
            if (begun := self._attempts.get(attempt)) is not None:
                return begun
            self._attempts[attempt] = future

        def run() -> None:
            outcome: T | Exception
            try:
                outcome = attempt()
            except Exception as e:  # whatever it is, those who wait are told
                outcome = e
            with self._lock:
                del self._attempts[attempt]
            _settle(future, outcome)

        threading.Thread(target=run, name="durably-connecting", daemon=True).start()
        return future

    def _open(self) -> Producer:
        if self._producer is None:
            self.partitions(self.catalogue.commands)
            producer = self.broker.producer()
            with self._lock:
                if self._closed.is_set():
                    producer.close()
                self._check_not_closed()
                self._producer = producer
                self._acks = threading.Thread(target=self._collect_acks, name="durably-acks", daemon=True)
                self._acks.start()
        return self._producer

    def _listen(self) -> int:
        self.open()
        if self._replies is None:
            topic = self.catalogue.replies
            tp = TP(topic, random.randrange(self.partitions(topic)))  # noqa: S311 - spreads load
            reader = self.broker.reader(self.broker.end_offsets([tp]))
            with self._lock:
                if self._closed.is_set():
                    reader.close()
                self._check_not_closed()
                self._partition = tp.partition
                self._replies = threading.Thread(
                    target=self._read_replies, args=(reader,), name="durably-replies", daemon=True
                )
                self._replies.start()
        return self._partition

    @contextmanager
    def _listening(self) -> Iterator[int]:
        """The partition of ``replies``, and the lock: its reader, which may break at any time, is there within."""
        while True:
            self.listen()
            with self._lock:
                if self._replies is not None:
                    yield self._partition
                    return

    def _check_not_closed(self) -> None:
        if self._closed.is_set():
            raise DurablyError("this client is closed: make a new one")

    def _awaited(self) -> list[Future[Reply]]:
        """Every reply that is still to come. To be called with the lock held."""
        return [*(question.future for question in self._questions.values()), *self._expected.values()]

    def _encoded(self, key: str, record: Record) -> bytes:
        try:
            value = self.codec.encode(record)
        except CodecError as e:
            raise SerializationError(f"this {type(record).__name__} for {key} cannot be written: {e}") from e
        size = len(value) + len(key.encode()) + _RECORD_OVERHEAD
        if size > self.broker.max_record_bytes:
            raise RecordTooLarge.of(f"this {type(record).__name__} for {key}", size, self.broker.max_record_bytes)
        return value

    def _send_copy(self, question: _Question) -> None:
        def on_ack(error: Exception | None, _: int) -> None:
            with self._lock:
                question.on_its_way = False
                self._copies_in_flight -= 1
            # An unreachable broker may come back, and the next copy finds it; nothing else gets better by waiting.
            if error is not None and not isinstance(error, BrokerUnreachable):
                _settle(question.future, error)

        producer = self.open()
        with self._lock:
            question.on_its_way = True
            self._copies_in_flight += 1
            self._unacknowledged.notify()
        try:
            producer.send(
                self.catalogue.commands,
                question.value,
                key=question.key.encode(),
                headers=question.headers,
                on_ack=on_ack,
            )
        except Exception as e:
            on_ack(e, -1)

    def _collect_acks(self) -> None:
        assert self._producer is not None
        while True:
            with self._lock:
                while not (self._in_flight or self._copies_in_flight or self._closed.is_set()):
                    self._unacknowledged.wait()
                if self._closed.is_set():
                    return
            self._producer.poll(_TICK)

    def _read_replies(self, reader: Reader) -> None:
        try:
            while not self._closed.is_set():
                for item in reader.poll(self._until_next_resend()):
                    if isinstance(item, Message):
                        self._take(item)
                self._resend()
        except Exception as e:
            # This reader will not heal. Whoever waits is told; the next question starts a new one.
            with self._lock:
                self._replies = None
                waiting = self._awaited()
            for future in waiting:
                _settle(future, e)
        finally:
            reader.close()

    def _take(self, message: Message) -> None:
        try:
            reply = self.codec.decode_as(Reply, message.value)
        except CodecError:
            return  # somebody else's, by a version that this one does not know
        with self._lock:
            question = self._questions.get(reply.request_id)
            future = question.future if question is not None else self._expected.get(reply.request_id)
        if future is not None:
            _settle(future, reply)

    def _until_next_resend(self) -> float:
        now = time.monotonic()
        with self._lock:
            return max(0.0, min([_TICK, *(q.due - now for q in self._questions.values())]))

    def _resend(self) -> None:
        now = time.monotonic()
        with self._lock:
            due = [q for q in self._questions.values() if q.due <= now]
        for question in due:
            question.delay = min(2 * question.delay, LONGEST_RESEND)
            question.due = now + question.delay
            if not question.on_its_way:
                self._send_copy(question)


def _settle(future: Future[T], outcome: T | Exception) -> None:
    """Ends a future that its owner may have cancelled, or that another copy's answer may have ended."""
    with suppress(InvalidStateError):
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
