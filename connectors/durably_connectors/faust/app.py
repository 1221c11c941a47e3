"""A Faust app beside an installation: the connectors of a module, and what a user's own agents need."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import faust
from durably import broker
from durably.client import AsyncClient
from durably.errors import ConfigurationError
from durably.settings import Settings
from durably_schemas.catalogue import Topic
from durably_schemas.records import Event, Record, RunSummary, StreamChunk

from durably_connectors.faust.channels import RecordTopic
from durably_connectors.faust.credentials import credentials
from durably_connectors.faust.delivery import Delivery
from durably_connectors.faust.intake import Handler, Intake, tried
from durably_connectors.faust.message import message_of
from durably_connectors.faust.recovery import Tables
from durably_connectors.faust.transport import Stream, Transport

if TYPE_CHECKING:
    from collections.abc import Iterable

    from durably.broker.port import Broker
    from faust.types import EventT

    from durably_connectors.faust.declared import Connector

OnEvent = Callable[["EventT[Any]"], Awaitable[None]]

logger = logging.getLogger("durably.connectors")

KAFKA = "kafka://"
PORT = 8234
_DRAIN = 5.0  # seconds that records in the works have to be done when the app ends


class App(faust.App):
    """A Faust app on the broker of an installation, which loses nothing (`durably_connectors.faust.transport`).

    It reads committed records only, acknowledges by offset, listens on loopback, and declares no topics by itself: those
    of its tables are made when it starts, as the brokers replicate by default.

    Args:
        name: which instances share the work: ``<namespace>.connectors.<name>`` is the consumer group.
        settings: where the installation is; by default as the environment says.
        options: what else Faust can be told; it stands before what is set here.

    Raises:
        ConfigurationError: not on Kafka, or secured in a way that Faust's client cannot do.

    Attributes:
        settings: of the installation.
        events: the log of every run, as a Faust topic of `Event`.
        runs: the latest `RunSummary` of each run.
        streams: what steps write, as `StreamChunk`.
    """

    def __init__(self, name: str, settings: Settings | None = None, **options: Any) -> None:
        self.settings = settings or Settings.from_environment()
        self.catalogue = self.settings.catalogue
        if not self.settings.url.startswith(KAFKA):
            raise ConfigurationError(
                f"connectors need Kafka, and the broker is {self.settings.url}: use kafka://host:port"
            )
        addresses = self.settings.url.removeprefix(KAFKA).rstrip("/").split(",")
        self._broker: Broker | None = None
        self._delivery: Delivery | None = None
        self._durably: AsyncClient | None = None
        self._intakes: list[Intake] = []
        self._owned_topics: list[Topic] = []
        ours: dict[str, Any] = {
            "broker": ";".join(KAFKA + address for address in addresses),
            "broker_credentials": credentials(self.settings.kafka),
            "broker_client_id": "durably-connectors",
            "broker_commit_interval": 1.0,
            "broker_session_timeout": int(self.settings.kafka.get("session.timeout.ms", 10_000)) / 1000,
            "broker_heartbeat_interval": int(self.settings.kafka.get("heartbeat.interval.ms", 1_000)) / 1000,
            "consumer_auto_offset_reset": "earliest",
            "datadir": self.settings.data_dir / f"connectors-{name}",
            "Stream": Stream,
            "TableManager": Tables,
            "stream_wait_empty": False,  # what is in the works may wait for minutes, and a rebalance cannot
            "store": "memory://",
            "table_standby_replicas": 0,
            "topic_allow_declare": False,
            "topic_disable_leader": True,
            "web_bind": "127.0.0.1",
            "web_host": "127.0.0.1",
            "web_port": PORT,
            # Faust's own pages show tables and settings.
            "web_tables_enabled": False, "web_graph_enabled": False, "web_metrics_enabled": False,
            "web_router_enabled": False, "web_stats_enabled": False,
        }  # fmt: skip
        super().__init__(f"{self.settings.namespace}.connectors.{name}", **(ours | options))
        self.events = self.records(self.catalogue.events, Event)
        self.runs = self.records(self.catalogue.runs, RunSummary)
        self.streams = self.records(self.catalogue.streams, StreamChunk)

    @property
    def installation(self) -> Broker:
        """The installation's broker, by our own client."""
        if self._broker is None:
            self._broker = broker.connect(self.settings.url, self.settings.kafka)
        return self._broker

    @property
    def delivery(self) -> Delivery:
        """What sends durably. To be used while the app runs."""
        if self._delivery is None:
            self._delivery = Delivery(self.installation, self.catalogue)
        return self._delivery

    @property
    def client(self) -> AsyncClient:
        """A client of the installation, for agents: starting runs, resuming hooks, asking. Closed with the app."""
        if self._durably is None:
            self._durably = AsyncClient(self.installation, namespace=self.settings.namespace)
        return self._durably

    def records(self, topic: str, record: type[Record]) -> RecordTopic:
        """A Faust topic whose keys are texts and whose values are records; what is none goes to the dead letters."""
        return RecordTopic(self, topics=[topic], record=record)

    def raw(self, topic: str) -> Any:
        """A Faust topic of bytes: decoding is not left to Faust, which drops what it cannot decode."""
        return self.topic(topic, key_type=bytes, value_type=bytes, key_serializer="raw", value_serializer="raw")

    def take(self, topic: str, handler: Handler) -> None:
        """Has every message of a topic handled: until it is done, or in the dead letters."""

        async def take(stream: Any) -> None:
            intake = Intake(handler, self.delivery)
            self._intakes.append(intake)
            await intake.run(stream)

        self.agent(self.raw(topic), name=handler.name)(take)

    def each(self, topic: Any) -> Callable[[OnEvent], OnEvent]:
        """Has a function called with each event of a topic, one after the other; it may change tables.

        An event is acknowledged when the function has returned. One for which it raises goes to the dead letters, but
        for `Later`, which means: again in a while. (Faust acknowledges an event whose agent has raised, and it is gone.)

        Args:
            topic: one of durably's, such as `events`, or any topic of Faust's.
        """

        def declare(fn: OnEvent) -> OnEvent:
            name = f"{fn.__module__}.{fn.__qualname__}"

            async def take(stream: Any) -> None:
                async for event in stream.noack().events():
                    await tried(partial(fn, event), message_of(event.message), self.delivery, name)
                    event.ack()

            self.agent(topic, name=name)(take)
            return fn

        return declare

    def table_of(self, name: str) -> Any:
        """A Faust table of bytes by bytes, for agents whose topics have as many partitions as durably's.

        Its changelog is made when the app starts, and replicated as the brokers do by default.

        Raises:
            ConfigurationError: durably's topics are missing.
        """
        partitions = self.installation.partitions(self.catalogue.events)
        if not partitions:
            raise ConfigurationError(f"{self.settings.url} lacks {self.catalogue.events}: run `durably topics create`")
        self._owned_topics.append(
            Topic(
                name=f"{self.conf.id}-{name}-changelog",
                partitions=partitions,
                config={"cleanup.policy": "compact"},
                key="row",
                written_by="connectors",
                records=(),
            )
        )
        return self.Table(name, partitions=partitions, key_type=bytes, value_type=bytes)

    def attach(self, connectors: Iterable[Connector]) -> None:
        """Adds connectors. Raises `ConfigurationError` where topics are missing that they read or write."""
        wanted: set[str] = {self.catalogue.commands, self.catalogue.dead_letters}
        for connector in connectors:
            wanted.update(connector.topics(self.catalogue))
            connector.attach(self)
        self.installation.create(self._owned_topics)
        missing = sorted(wanted - set(self.installation.describe(wanted)))
        if missing:
            raise ConfigurationError(
                f"{self.settings.url} lacks {', '.join(missing)}: create those of durably with `durably topics create`, "
                f"and your own with Kafka's tools"
            )

    async def on_stop(self) -> None:
        """Ends what is in the works, and commits it."""
        if self._consumer is not None:
            self._consumer.stop_flow()
        await asyncio.gather(*(intake.drain(_DRAIN) for intake in self._intakes))
        if self._consumer is not None and not self.crashed:
            try:
                await self._consumer.commit()
            except Exception as e:  # the rest is to be stopped all the same
                logger.warning("the last commit failed, and what it was for is delivered again: %s", e)
                await self.crash(e)
        await super().on_stop()

    async def on_shutdown(self) -> None:
        """Lets go, when nothing runs any more that could find it gone."""
        await super().on_shutdown()
        if self._durably is not None:
            await self._durably.close()
        if self._delivery is not None:
            await self._delivery.close()
        if self._broker is not None:
            self._broker.close()
        self._durably = self._delivery = self._broker = None

    def _create_directories(self) -> None:
        self.conf.datadir.parent.mkdir(parents=True, exist_ok=True)
        super()._create_directories()

    async def _producer_flush(self, logger: Any) -> None:
        if not self.crashed:  # what was lost by then is made again by the next process
            await super()._producer_flush(logger)

    def _new_transport(self) -> Transport:
        return Transport(self.conf.broker_consumer, self)

    def _new_producer_transport(self) -> Transport:
        return Transport(self.conf.broker_producer, self)
