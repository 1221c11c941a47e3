"""Typed channels: durably's records as values of Faust topics, for a user's own agents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from durably_schemas import Codec
from durably_schemas.records import Record
from faust.exceptions import ValueDecodeError
from faust.topics import Topic

from durably_connectors.faust.message import message_of

if TYPE_CHECKING:
    from faust.types import EventT
    from faust.types import Message as RawMessage

    from durably_connectors.faust.app import App


class RecordTopic(Topic):
    """A topic of records: events carry the key as text and the value as a record; None where it was taken back.

    A value that is no such record is a dead letter before Faust, which forgets it, is told.

    Args:
        app: whose.
        record: the type of the values.
        options: of Faust's own topic.
    """

    def __init__(self, app: App, *, record: type[Record], **options: Any) -> None:
        self._record = record
        self._durably = app
        self._codec = Codec()
        super().__init__(app, **({"key_type": str, "value_type": bytes} | options))

    async def decode(self, message: RawMessage, *, propagate: bool = False) -> EventT[Any]:  # noqa: ARG002 - as Faust has it
        """The event of a message. Raises `ValueDecodeError` when its dead letter is durable."""
        try:
            value = None if message.value is None else self._codec.decode_as(self._record, message.value)
            key = None if message.key is None else message.key.decode()
        except ValueError as e:
            reason = f"{type(e).__name__}: {e}"
            await self._durably.delivery.dead_letter(message_of(message), reason, self._durably.conf.id)
            raise ValueDecodeError(str(e)) from e
        return self._create_event(key, value, message.headers, message=message)

    def clone(self, *, is_iterator: bool | None = None, **options: Any) -> RecordTopic:
        """A channel of the same records."""
        return cast("RecordTopic", super().clone(is_iterator=is_iterator, record=self._record, **options))

    async def on_value_decode_error(self, exc: Exception, message: RawMessage) -> None:
        """It is a dead letter already; Faust would end the agent."""

    def _compile_decode(self) -> None:
        """Faust would put a function of its schema in the place of `decode`."""
