"""A real installation for integration tests: a Kafka broker in a container, a processor and a worker on threads."""

from __future__ import annotations

import os
import socket
import time
import uuid
from typing import TYPE_CHECKING, Any, Self

import msgspec

from durably.broker import connect
from durably.client import AsyncClient, Client
from durably.errors import ConfigurationError
from durably.installation import processor_module
from durably.settings import Settings

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

IMAGE = "apache/kafka:4.4.0"
"""Where ``DURABLY_KAFKA_IMAGE`` names no other."""
READY = 90.0
"""Seconds that a broker has to answer."""
PARTITIONS = 2
"""Of each topic: with one, nothing that partitions do would be seen."""
CONCURRENCY = 20

_SETTINGS = {
    "node.id": "1",
    "process.roles": "broker,controller",
    "controller.listener.names": "CONTROLLER",
    "controller.quorum.voters": "1@localhost:9093",
    "inter.broker.listener.name": "INNER",
    "listener.security.protocol.map": "OUTER:PLAINTEXT,INNER:PLAINTEXT,CONTROLLER:PLAINTEXT",
    "listeners": "OUTER://:9092,INNER://localhost:19092,CONTROLLER://localhost:9093",
    "offsets.topic.replication.factor": "1",
    "offsets.topic.num.partitions": "4",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "transaction.state.log.num.partitions": "4",
    "group.initial.rebalance.delay.ms": "0",
}


class KafkaContainer:
    """A single broker without security, on a port of this host; by Testcontainers. A context manager.

    Args:
        image: an image that takes settings as ``apache/kafka`` does.

    Attributes:
        bootstrap: its ``host:port``, once it has been entered.

    Raises:
        ConfigurationError: Testcontainers is not installed.
        TimeoutError: the broker does not answer.
    """

    def __init__(self, image: str | None = None) -> None:
        try:
            from testcontainers.core.container import DockerContainer
        except ModuleNotFoundError as e:
            raise ConfigurationError(
                "durably_kafka starts a broker by Testcontainers, which is not installed: pip install durably[testing], "
                "or name a broker by --durably-kafka=host:port"
            ) from e
        self._port = _free_port()
        self.bootstrap = f"127.0.0.1:{self._port}"
        self._container = DockerContainer(image or os.environ.get("DURABLY_KAFKA_IMAGE", IMAGE))
        advertised = {"advertised.listeners": f"OUTER://{self.bootstrap},INNER://localhost:19092"}
        for name, value in (_SETTINGS | advertised).items():
            self._container.with_env("KAFKA_" + name.upper().replace(".", "_"), value)
        self._container.with_env("KAFKA_HEAP_OPTS", "-Xms256m -Xmx512m")
        # A client is told the advertised address, so it must be known before the container is there.
        self._container.ports["9092/tcp"] = ("127.0.0.1", self._port)  # type: ignore[assignment]

    def __enter__(self) -> Self:
        self._container.start()
        try:
            self._wait()
        except BaseException:
            self._container.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._container.stop()

    def _wait(self) -> None:
        from confluent_kafka import KafkaException
        from confluent_kafka.admin import AdminClient

        admin = AdminClient({"bootstrap.servers": self.bootstrap, "log_level": 0, "reconnect.backoff.max.ms": 200})
        deadline = time.monotonic() + READY
        while True:
            try:
                if admin.list_topics(timeout=1).brokers:
                    return
            except KafkaException:  # not yet
                pass
            if time.monotonic() > deadline:
                said = b"".join(self._container.get_logs()).decode(errors="replace")[-2000:]
                raise TimeoutError(f"the broker at {self.bootstrap} did not answer within {READY:g} s:\n{said}")
            time.sleep(0.1)


class Installation:
    """A processor and a worker for all that is registered, in a fresh namespace. A context manager.

    Args:
        url: the broker, ``kafka://host:port`` or ``embedded:PATH``.
        folder: for the processor's RocksDB.

    Attributes:
        url, namespace: what clients need; topics of the namespace stay on the broker.
    """

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        self.namespace = f"test-{uuid.uuid4().hex[:12]}"
        settings = Settings.from_environment(url=url, namespace=self.namespace, partitions=PARTITIONS)
        self._settings = msgspec.structs.replace(settings, data_dir=folder)

    def client(self, **options: Any) -> Client:
        """A client for threads, to be closed by the caller. ``options``: see `durably.Client`."""
        return Client(self.url, namespace=self.namespace, **options)

    def async_client(self, **options: Any) -> AsyncClient:
        """A client for tasks, to be closed by the caller. ``options``: see `durably.AsyncClient`."""
        return AsyncClient(self.url, namespace=self.namespace, **options)

    def __enter__(self) -> Self:
        self._guards = processor_module("engine.guards")
        self._guarding = self._guards.install()
        self._broker = connect(self.url, self._settings.kafka)
        self._dev = processor_module("dev").Dev(self._settings, self._broker, ("default",), CONCURRENCY)
        self._dev.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._dev.stop()
        self._broker.close()
        if self._guarding:
            self._guards.uninstall()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port
