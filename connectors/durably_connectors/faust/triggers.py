"""Triggers: messages of any topic start runs, or resume hooks; each counts once, however often it is delivered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING, Any

from durably.authoring import WorkflowDefinition
from durably.client.starting import StartOptions, call
from durably.durations import Duration, milliseconds
from durably.errors import BrokerError, ConfigurationError, HookNotFoundError, RecordTooLarge
from msgspec.structs import replace

from durably_connectors.faust.declared import IGNORE, declared
from durably_connectors.faust.intake import Later
from durably_connectors.faust.values import Decoder, Format, Schema, decoder

if TYPE_CHECKING:
    from durably_schemas import Catalogue

    from durably_connectors.faust.app import App
    from durably_connectors.faust.message import Message

Mapping_ = Callable[["Message"], Any]
Namer = str | Callable[["Message"], str]
_LOOK_AGAIN = 0.5  # seconds until a hook that was not there is looked for again


def trigger(
    *,
    topic: str,
    workflow: WorkflowDefinition[..., Any] | str | None = None,
    token: Namer | None = None,
    key: Namer | None = None,
    value: Format | Decoder = "json",
    schema: Schema | list[Schema] | None = None,
    patience: Duration = "1m",
) -> Callable[[Mapping_], Mapping_]:
    """Declares that each message of a topic starts a run, or resumes a hook.

    The function that it decorates makes of a `Message` what the workflow gets as arguments (a tuple: by position, a
    dict: by name, anything else: the only one), or what the hook gets as its payload; `IGNORE`: nothing is done. It may
    be called several times for one message, and should do nothing else.

    Args:
        topic: where the messages are.
        workflow: what is started; or
        token: of the hook that is resumed: a template such as ``"payment-{order}"``, of the value's fields, or a
            function of the message.
        key: names the run, or the delivery to the hook, likewise: messages with one key count once. By default the
            message's own place is its name, so that each counts.
        value: how values are to be read.
        schema: of values in Avro's single-object encoding.
        patience: how long a hook may not be there yet, before the message goes to the dead letters.

    Raises:
        ConfigurationError: neither a workflow nor a token, or both; a format that is none; a second trigger that starts
            runs for one topic, and none of them has a key.
    """
    if (workflow is None) == (token is None):
        raise ConfigurationError(f"the trigger for topic {topic!r} needs a workflow to start, or the token of a hook")
    decode = decoder(value, schema)
    for_so_long = milliseconds(patience) / 1000

    def declare(fn: Mapping_) -> Mapping_:
        name = f"{fn.__module__}.{fn.__qualname__}"
        if token is not None:
            declared.add(_Resume(name, topic, fn, decode, key, token, for_so_long))
        else:
            assert workflow is not None
            if key is None and any(isinstance(x, _Start) and (x.topic, x.key) == (topic, None) for x in declared.all()):
                raise ConfigurationError(
                    f"two triggers start a run for each message of {topic!r}, and both runs would have one ID: give one a key="
                )
            declared.add(_Start(name, topic, fn, decode, key, workflow))
        return fn

    return declare


class _Trigger:
    """What both kinds share."""

    def __init__(self, name: str, topic: str, fn: Mapping_, decode: Any, key: Namer | None) -> None:
        self.name = name
        self.topic = topic
        self._fn = fn
        self._decode = decode
        self.key = key
        self._app: App

    def topics(self, catalogue: Catalogue) -> list[str]:  # noqa: ARG002 - as `Connector` says
        return [self.topic]

    def attach(self, app: App) -> None:
        self._app = app
        app.take(self.topic, self)

    def lane(self, message: Message) -> Hashable:
        """Messages with one key are about one thing, and come in their order."""
        return None if message.key is None else (message.partition, message.key)

    async def handle(self, message: Message) -> None:
        decoded = replace(message, value=await self._decode(message.value))
        made = self._fn(decoded)
        if made is not IGNORE:
            await self._act(decoded, made)

    async def _act(self, message: Message, made: Any) -> None:
        raise NotImplementedError


class _Start(_Trigger):
    """Starts runs."""

    def __init__(
        self,
        name: str,
        topic: str,
        fn: Mapping_,
        decode: Any,
        key: Namer | None,
        workflow: WorkflowDefinition[..., Any] | str,
    ) -> None:
        super().__init__(name, topic, fn, decode, key)
        self._workflow = workflow

    async def _act(self, message: Message, made: Any) -> None:
        run_id = f"wrun-{message.place}" if self.key is None else named(self.key, message)
        args, kwargs = arguments(made)
        workflow, payload, _ = call(self._workflow, args, kwargs)
        command = StartOptions(run_id=run_id).named().command(workflow, payload)
        await self._app.delivery.command(run_id, command)


class _Resume(_Trigger):
    """Resumes hooks. The engine is asked: a payload for a hook that is not there would be lost without a word."""

    def __init__(
        self, name: str, topic: str, fn: Mapping_, decode: Any, key: Namer | None, token: Namer, patience: float
    ) -> None:
        super().__init__(name, topic, fn, decode, key)
        self._token = token
        self._patience = patience

    async def _act(self, message: Message, made: Any) -> None:
        token = named(self._token, message)
        resume_id = message.place if self.key is None else named(self.key, message)
        until = time.monotonic() + self._patience
        while True:
            try:
                await self._app.client.resume_hook(token, made, resume_id=resume_id)
                return
            except HookNotFoundError:
                if time.monotonic() >= until:
                    raise
                await asyncio.sleep(_LOOK_AGAIN)
            except RecordTooLarge:
                raise
            except (BrokerError, TimeoutError) as e:
                raise Later(str(e)) from e


def arguments(made: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a function returned, as a call's arguments."""
    if isinstance(made, tuple):
        return made, {}
    if isinstance(made, Mapping):
        return (), dict(made)
    return (made,), {}


def named(namer: Namer, message: Message) -> str:
    """The name that a template, or a function, gives a message."""
    if callable(namer):
        return namer(message)
    if not isinstance(message.value, Mapping):
        raise TypeError(f"{namer!r} names fields, and the value is a {type(message.value).__name__}")
    return namer.format_map(message.value)
