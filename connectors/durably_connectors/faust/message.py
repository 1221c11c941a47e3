"""A message of any topic, as a connector sees it, and the names that are derived from where it lies."""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from faust.types import Message as RawMessage

_LONGEST_TOPIC = 100  # characters of a topic's name in a name that is derived


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """A message of any topic.

    Attributes:
        topic: where it lies.
        partition: of the topic.
        offset: in the partition.
        timestamp: the record's own, in milliseconds since the epoch.
        key: as bytes, or None.
        value: as its connector's ``value=`` says.
        headers: by name; of several with one name the last.
    """

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: Any
    headers: dict[str, bytes]

    @property
    def place(self) -> str:
        """A name for the message: the same at each delivery, and no other message's.

        The timestamp is part of it, since a topic that is deleted and made anew counts its offsets from 0 again: what
        comes there would pass for what came before.
        """
        topic = self.topic
        if len(topic) > _LONGEST_TOPIC:
            topic = f"{topic[:_LONGEST_TOPIC]}~{blake2b(topic.encode(), digest_size=8).hexdigest()}"
        return f"{topic}-{self.partition}-{self.offset}-{self.timestamp}"


def message_of(raw: RawMessage) -> Message:
    """A message of Faust's, with its key and value as bytes."""
    return Message(
        topic=raw.topic,
        partition=raw.partition,
        offset=raw.offset,
        timestamp=round((raw.timestamp or 0) * 1000),
        key=raw.key,
        value=raw.value,
        headers={name: value or b"" for name, value in _pairs(raw.headers)},
    )


def _pairs(headers: Any) -> list[tuple[str, bytes | None]]:
    return list(headers.items()) if isinstance(headers, dict) else list(headers or ())
