"""Dead letters: the latest ones, and sending one again."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

from durably.broker.port import TP, End, Message
from durably.errors import BrokerUnreachable
from durably_schemas import CodecError
from durably_schemas.records import DeadLetter

from durably_connectors.http.problems import Problem

if TYPE_CHECKING:
    from collections.abc import Mapping

    from durably.client.connection import Connection
    from durably_schemas import Catalogue

LATEST = 50
"""Letters of each partition that are shown."""
CUT = "is cut short"
"""What the reason says of a letter that has not the whole record."""
_READ = 5.0  # seconds
_SENT = 10.0  # seconds until a record that is sent again must be acknowledged


class Letter(NamedTuple):
    """A dead letter, and where it lies. ``letter`` is None where it can itself not be read."""

    partition: int
    offset: int
    at: int
    letter: DeadLetter | None
    record: Any
    fixed: str | None

    @property
    def sort(self) -> str:
        """What kind of record it holds, as far as that can be told."""
        return type(self.record).__name__ if self.record is not None else "Unreadable record"


class Letters(NamedTuple):
    """The latest letters, newest first; and whether there are older ones."""

    found: list[Letter]
    more: bool


def latest(connection: Connection) -> Letters:
    """What lies in the topic, as far as it can be read within a few seconds. Raises `BrokerError`."""
    broker, topic = connection.broker, connection.catalogue.dead_letters
    tps = [TP(topic, number) for number in range(connection.partitions(topic))]
    starts, ends = broker.start_offsets(tps), broker.end_offsets(tps, committed=True)
    wanted = {tp: max(starts[tp], ends[tp] - LATEST) for tp in tps if ends[tp] > starts[tp]}
    found = [_read(connection, message) for message in _messages(connection, wanted)]
    found.sort(key=lambda letter: (letter.at, letter.offset), reverse=True)
    return Letters(found, more=any(wanted[tp] > starts[tp] for tp in wanted))


def letter_at(connection: Connection, partition: int, offset: int) -> Letter:
    """The letter at a place. Raises `Problem` with 404 where there is none, and `BrokerError`."""
    place = TP(connection.catalogue.dead_letters, partition)
    broker, messages = connection.broker, list[Message]()
    if partition < connection.partitions(place.topic) and offset < broker.end_offsets([place], committed=True)[place]:
        messages = _messages(connection, {place: max(offset, broker.start_offsets([place])[place])}, 1)
    if not messages or messages[0].offset != offset:
        raise Problem(404, "letter-not-found", f"there is no dead letter {partition}/{offset}: it is no longer kept")
    return _read(connection, messages[0])


def send_again(connection: Connection, found: Letter) -> None:
    """Puts the record of a letter where it was found, once more: at the end of its topic, by its key.

    A command or a result may be sent again and again: a start attaches to the run that it has made, a resume is known
    by its id, and a result counts while its attempt is open. A step-request has its step run as often as it is sent.

    Raises:
        Problem: with 409 where it cannot be sent.
        BrokerError: it could not be written, or perhaps was not.
    """
    letter = found.letter
    if letter is None or found.fixed is not None:
        raise Problem(409, "not-sendable", found.fixed or "the letter itself cannot be read")
    told: list[Exception | None] = []
    producer = connection.broker.producer()
    try:
        by_key = None if letter.key is not None else letter.partition
        producer.send(
            letter.topic, letter.value, key=letter.key, partition=by_key, on_ack=lambda error, _: told.append(error)
        )
        producer.flush(_SENT)
    finally:
        producer.close()
    if not told:
        raise BrokerUnreachable(
            f"nobody has acknowledged the record of dead letter {found.partition}/{found.offset}: it may have been sent"
        )
    if told[0] is not None:
        raise told[0]


def _messages(connection: Connection, positions: Mapping[TP, int], most: int | None = None) -> list[Message]:
    found: list[Message] = []
    if not positions:
        return found
    reader, ended = connection.broker.reader(positions), set[TP]()
    try:
        until = time.monotonic() + _READ
        while len(ended) < len(positions) and time.monotonic() < until and (most is None or len(found) < most):
            for item in reader.poll(0.2):
                if isinstance(item, End):
                    ended.add(TP(item.topic, item.partition))
                else:
                    found.append(item)
    finally:
        reader.close()
    return found


def _read(connection: Connection, message: Message) -> Letter:
    try:
        letter = connection.codec.decode_as(DeadLetter, message.value or b"")
    except CodecError:
        return Letter(message.partition, message.offset, message.timestamp, None, None, "the letter cannot be read")
    try:
        record = None if letter.value is None else connection.codec.decode(letter.value)
    except CodecError:
        record = None
    return Letter(
        message.partition, message.offset, message.timestamp, letter, record, _fixed(connection.catalogue, letter)
    )


def _fixed(catalogue: Catalogue, letter: DeadLetter) -> str | None:
    """Why it cannot be sent again, or None."""
    if letter.value is None or CUT in letter.reason:
        return "the letter has not the whole record, which was too large"
    # What processors write is theirs: nobody else may forge it, and so not the gateway.
    if letter.topic in (catalogue.commands, catalogue.results) or letter.topic.startswith(catalogue.requests("x")[:-1]):
        return None
    return f"only processors write to {letter.topic}"
