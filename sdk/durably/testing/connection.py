"""A client's connection without threads: what it sends lies in memory at once, and answers are handed to it."""

from __future__ import annotations

from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

from durably_schemas import CodecError
from durably_schemas.records import QueryRun, Record, Reply, ReplyTo

from durably.broker.port import TP, Message
from durably.client import AsyncClient, Client
from durably.client.connection import Connection
from durably.client.feeds import Feeds
from durably.identifiers import ulid

if TYPE_CHECKING:
    from collections.abc import Callable

    from durably_schemas import Catalogue

    from durably.broker.port import Headers, Producer
    from durably.testing.broker import MemoryBroker

T = TypeVar("T")

PARTITION = 0
"""Of ``replies``."""


class _Question:
    """A command that waits for its reply. ``waiting``: for something that may take its time, such as a run's end."""

    __slots__ = ("future", "key", "record", "waiting")

    def __init__(self, key: str, record: Record) -> None:
        self.key = key
        self.record = record
        self.future: Future[Reply] = Future()
        self.waiting = isinstance(record, QueryRun) and record.what == "RESULT"


class LocalConnection(Connection):
    """What clients in a test use. May be called from any thread; somebody must call `deliver`.

    Args:
        broker: in memory.
        catalogue: of the topics.
        now: the clock.
    """

    def __init__(self, broker: MemoryBroker, catalogue: Catalogue, now: Callable[[], int]) -> None:
        super().__init__(broker, catalogue)
        self._memory = broker
        self._now = now
        self._asked: dict[str, _Question] = {}
        self._addresses: dict[str, Future[Reply]] = {}
        self._reader = broker.reader({TP(catalogue.replies, PARTITION): 0})

    # -- as of a connection ----------------------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        """Always."""
        return True

    @property
    def is_listening(self) -> bool:
        """Always."""
        return True

    def now(self) -> int:
        """The test's time."""
        return self._now()

    def open(self) -> Producer:
        """A producer."""
        return self._memory.producer()

    def listen(self) -> int:
        """The partition that answers come to."""
        return PARTITION

    def opening(self) -> Future[Producer]:
        """Done."""
        return _done(self.open())

    def listening(self) -> Future[int]:
        """Done."""
        return _done(PARTITION)

    def send(self, key: str, record: Record, topic: str | None = None, *, headers: Headers = ()) -> Future[None]:
        """Writes a record; it is durable at once."""
        topic = topic or self.catalogue.commands
        self._memory.append(topic, self._encoded(key, record), key.encode(), headers=headers)
        return _done(None)

    def ask(self, key: str, command: Callable[[ReplyTo], Record], headers: Headers = ()) -> Future[Reply]:
        """Sends a command; its reply comes with a later `deliver`."""
        request_id = ulid()
        question = _Question(key, command(ReplyTo(partition=PARTITION, request_id=request_id)))
        value = self._encoded(key, question.record)
        self._asked[request_id] = question
        question.future.add_done_callback(lambda _: self._asked.pop(request_id, None))
        self._memory.append(self.catalogue.commands, value, key.encode(), headers=headers)
        return question.future

    def expect(self) -> tuple[ReplyTo, Future[Reply]]:
        """An address for a reply that no command of ours asks for."""
        to, future = ReplyTo(partition=PARTITION, request_id=ulid()), Future[Reply]()
        self._addresses[to.request_id] = future
        future.add_done_callback(lambda _: self._addresses.pop(to.request_id, None))
        return to, future

    def close(self) -> None:
        """Nothing is held."""

    # -- driven by the environment ---------------------------------------------------------------------------------

    def deliver(self) -> bool:
        """Settles what has been answered; False where nothing came."""
        found = [item for item in self._reader.poll(0) if isinstance(item, Message)]
        for message in found:
            try:
                reply = self.codec.decode_as(Reply, message.value)
            except CodecError:
                continue  # nobody here has asked for it
            question = self._asked.get(reply.request_id)
            future = question.future if question is not None else self._addresses.get(reply.request_id)
            if future is not None:
                with suppress(InvalidStateError):
                    future.set_result(reply)
        return bool(found)

    def waiting(self) -> dict[str | None, list[Future[Reply]]]:
        """What waits for as long as it takes, by the run whose end it waits for; None: for a step's response."""
        found: dict[str | None, list[Future[Reply]]] = {}
        for question in self._questions_asked():
            if question.waiting:
                found.setdefault(question.key, []).append(question.future)
        if self._addresses:
            found[None] = list(self._addresses.values())
        return found

    def ask_again(self) -> None:
        """Sends what is unanswered once more, as every client does after a while."""
        for question in self._questions_asked():
            self._memory.append(
                self.catalogue.commands, self._encoded(question.key, question.record), question.key.encode()
            )

    def fail(self, error: BaseException) -> None:
        """Whoever waits for anything is told this."""
        for future in [*(question.future for question in self._questions_asked()), *self._addresses.values()]:
            with suppress(InvalidStateError):
                future.set_exception(error)

    def _questions_asked(self) -> list[_Question]:
        return list(self._asked.values())  # a copy: other threads ask, too


class LocalClient(AsyncClient):
    """A client for tasks, on a `LocalConnection`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._feeds = Feeds(connection)


class LocalSyncClient(Client):
    """Its twin for threads: the thread of the event loop must not wait with it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._feeds = Feeds(connection)


def _done(value: T) -> Future[T]:
    future: Future[T] = Future()
    future.set_result(value)
    return future
