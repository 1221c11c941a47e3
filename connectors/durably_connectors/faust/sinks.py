"""Sinks: the outcomes of runs, and chosen events, on any topic or in a table."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable
from typing import TYPE_CHECKING, Any, Literal, Protocol

import msgspec
from durably.authoring import WorkflowDefinition
from durably.errors import BrokerError, ConfigurationError
from durably.jsonable import to_json
from durably_schemas import Codec
from durably_schemas.events import TYPE_OF
from durably_schemas.records import TERMINAL, Error, Event, RunStatus, RunSummary

from durably_connectors.faust.declared import IGNORE, declared
from durably_connectors.faust.intake import Later

if TYPE_CHECKING:
    from durably_schemas import Catalogue

    from durably_connectors.faust.app import App
    from durably_connectors.faust.delivery import Delivery
    from durably_connectors.faust.message import Message

Workflow = WorkflowDefinition[..., Any] | str
_ANSWER = 30.0  # seconds that the engine has to tell a result


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How a run ended.

    Attributes:
        run_id: the run's.
        seq: the number of its last event.
        workflow: by name.
        status: ``completed``, ``failed`` or ``cancelled``.
        attributes: of the run.
        created_at: milliseconds since the epoch.
        completed_at: likewise.
        result: what the workflow returned; None where it did not.
        error: what it raised.
    """

    run_id: str
    seq: int
    workflow: str
    status: RunStatus
    attributes: dict[str, str]
    created_at: int
    completed_at: int | None
    result: Any = None
    error: Error | None = None


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """What a sink hands to where it leads. ``run_id`` and ``seq`` name it; a later delivery of it is equal.

    Attributes:
        run_id: the run's.
        seq: the number of the event that it is about.
        at: the event's time, in milliseconds since the epoch.
        kind: an event type, or the status that a run ended with.
        workflow: by name, where it is known: of outcomes.
        value: what the user's function made of it.
    """

    run_id: str
    seq: int
    at: int
    kind: str
    workflow: str | None
    value: Any


class Destination(Protocol):
    """Where a sink leads to."""

    def topics(self) -> list[str]:
        """The topics that must be there."""

    async def put(self, row: Row, delivery: Delivery) -> None:
        """Returns when the row is durable. Raises `Later`, or something else for what can never be put there."""


class KafkaTopic:
    """A topic: the value as JSON, unless it is bytes; the headers ``durably-run`` and ``durably-seq`` name it.

    A record may come again after a crash; whoever must not count it twice looks at the headers.

    Args:
        name: of the topic.
        key: makes the record's key; the run's ID by default.
    """

    def __init__(self, name: str, *, key: Callable[[Row], str] | None = None) -> None:
        self._name = name
        self._key = key

    def topics(self) -> list[str]:
        """See `Destination`."""
        return [self._name]

    async def put(self, row: Row, delivery: Delivery) -> None:
        """See `Destination`."""
        key = row.run_id if self._key is None else self._key(row)
        value = row.value if isinstance(row.value, bytes) else to_json(row.value)
        headers = (("durably-run", row.run_id.encode()), ("durably-seq", str(row.seq).encode()))
        await delivery.send(self._name, value, key.encode(), headers)


def sink(
    to: Destination,
    *,
    outcomes: Workflow | Collection[Workflow] | Literal["all"] | None = None,
    events: Collection[str] = (),
) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    """Declares that outcomes of runs, or events of some types, are passed on.

    The function that it decorates makes of an `Outcome`, or of an `Event`, the value that is passed on; `IGNORE`: nothing.

    Args:
        to: `KafkaTopic`, `SqlTable`, or a `Destination` of one's own.
        outcomes: of which workflows, or ``"all"``; or
        events: of which types, such as ``{"step_failed", "run_blocked"}``.

    Raises:
        ConfigurationError: neither is given, or both, or a type of event that there is not.
    """
    if (outcomes is None) == (not events):
        raise ConfigurationError("a sink needs outcomes=, or events=")
    if unknown := sorted(set(events) - set(TYPE_OF.values())):
        raise ConfigurationError(f"there are no events of type {', '.join(unknown)}: use {', '.join(TYPE_OF.values())}")

    def declare(fn: Callable[[Any], Any]) -> Callable[[Any], Any]:
        name = f"{fn.__module__}.{fn.__qualname__}"
        if outcomes is None:
            declared.add(_Events(name, to, fn, frozenset(events)))
        else:
            declared.add(_Outcomes(name, to, fn, _names(outcomes)))
        return fn

    return declare


def _names(outcomes: Workflow | Collection[Workflow]) -> frozenset[str] | None:
    """The workflows by name; None: all of them."""
    if outcomes == "all":
        return None
    several = [outcomes] if isinstance(outcomes, str | WorkflowDefinition) else outcomes
    return frozenset(one if isinstance(one, str) else one.name for one in several)


class _Sink:
    """What both kinds share."""

    def __init__(self, name: str, to: Destination, fn: Callable[[Any], Any]) -> None:
        self.name = name
        self._to = to
        self._fn = fn
        self._codec = Codec()
        self._app: App

    def topics(self, catalogue: Catalogue) -> list[str]:
        return [self._source(catalogue), *self._to.topics()]

    def attach(self, app: App) -> None:
        self._app = app
        app.take(self._source(app.catalogue), self)

    def lane(self, message: Message) -> Hashable:
        """What is about one run is passed on in its order."""
        return message.key

    async def handle(self, message: Message) -> None:
        raise NotImplementedError

    def _source(self, catalogue: Catalogue) -> str:
        raise NotImplementedError

    async def _put(self, source: Event | Outcome, **of: Any) -> None:
        value = self._fn(source)
        if value is not IGNORE:
            await self._to.put(Row(run_id=source.run_id, seq=source.seq, value=value, **of), self._app.delivery)


class _Events(_Sink):
    def __init__(self, name: str, to: Destination, fn: Callable[[Any], Any], types: frozenset[str]) -> None:
        super().__init__(name, to, fn)
        self._types = types

    async def handle(self, message: Message) -> None:
        event = self._codec.decode_as(Event, message.value)
        if event.type in self._types:
            await self._put(event, at=event.at, kind=event.type, workflow=None)

    def _source(self, catalogue: Catalogue) -> str:
        return catalogue.events


class _Outcomes(_Sink):
    """A run's last summary says how it ended, and the engine what came of it."""

    def __init__(self, name: str, to: Destination, fn: Callable[[Any], Any], workflows: frozenset[str] | None) -> None:
        super().__init__(name, to, fn)
        self._workflows = workflows

    async def handle(self, message: Message) -> None:
        if message.value is None:  # the run has been purged
            return
        run = self._codec.decode_as(RunSummary, message.value)
        if run.status not in TERMINAL or (self._workflows is not None and run.workflow not in self._workflows):
            return
        outcome = Outcome(
            run_id=run.run_id,
            seq=run.events,
            workflow=run.workflow,
            status=run.status,
            attributes=run.attributes,
            created_at=run.created_at,
            completed_at=run.completed_at,
            result=await self._result(run.run_id) if run.status == "completed" else None,
            error=run.error,
        )
        await self._put(outcome, at=run.completed_at or run.created_at, kind=run.status, workflow=run.workflow)

    def _source(self, catalogue: Catalogue) -> str:
        return catalogue.runs

    async def _result(self, run_id: str) -> Any:
        """Raises `RunNotFoundError` where the run has been purged meanwhile: its result is gone, and not None."""
        try:
            return await self._app.client.get_run(run_id).result(_ANSWER)
        except (BrokerError, TimeoutError) as e:
            raise Later(str(e)) from e
