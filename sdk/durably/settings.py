"""Settings: from arguments, else from the environment, else the default."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import msgspec
from durably_schemas import Catalogue
from durably_schemas.catalogue import PARTITIONS

from durably.builds import checked_build
from durably.durations import milliseconds
from durably.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping

Dispatch = Literal["early", "committed"]

URL_FORMS = "kafka://host:port[,host:port…] or embedded:PATH"
EMBEDDED = "embedded:"
EMBEDDED_PARTITIONS = 4
KAFKA_PREFIX = "DURABLY_KAFKA_"
SHORTEST_RETENTION_MS = 20_000
"""Twice what the clocks of brokers may differ by. Readers of streams begin so much before a run does, and must not find
there what an older run with its ID has left."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What every process of durably needs to know.

    Attributes:
        url: where the broker is: ``kafka://host:port`` or ``embedded:PATH``.
        namespace: the prefix of all topics, so that several installations share one cluster.
        partitions: of every topic, when topics are created; 12 on Kafka, 4 on the embedded broker.
        kafka: properties for librdkafka, such as ``sasl.mechanism``.
        dispatch: ``"committed"`` holds every step-request back until its cause is committed.
        data_dir: where a processor keeps its RocksDB; ``.durably``, or a folder on the embedded broker's path.
        group_instance_id: makes a processor a static member of its group (KIP-345).
        gateway_url: where people reach the gateway, ``https://hooks.example.com``: the base of webhooks' URLs.
        retention: milliseconds that processors keep runs for after their end; None: for ever.
        standby: whether a processor keeps copies of the stores of partitions that others own.
        code_version: what runs record as the code that executed them; made of the workflows' source when not given.
        build: which deployment this process belongs to; runs of pinned workflows keep to the workers of theirs.
    """

    url: str
    namespace: str = "durably"
    partitions: int = PARTITIONS
    kafka: dict[str, str] = {}
    dispatch: Dispatch = "early"
    data_dir: Path = Path(".durably")
    group_instance_id: str | None = None
    gateway_url: str | None = None
    retention: int | None = None
    standby: bool = False
    code_version: str | None = None
    build: str | None = None

    @property
    def catalogue(self) -> Catalogue:
        """The topics of this installation."""
        return Catalogue(self.namespace, self.partitions)

    @classmethod
    def from_environment(
        cls,
        environ: Mapping[str, str] | None = None,
        *,
        url: str | None = None,
        namespace: str | None = None,
        partitions: int | None = None,
        kafka: Mapping[str, str] | None = None,
        dispatch: Dispatch | None = None,
        data_dir: str | Path | None = None,
        group_instance_id: str | None = None,
        gateway_url: str | None = None,
        retention: str | None = None,
        standby: bool | None = None,
        code_version: str | None = None,
        build: str | None = None,
    ) -> Settings:
        """Settings from arguments, and where one is None, from ``DURABLY_*`` in the environment.

        Raises:
            ConfigurationError: no URL, or a value that cannot be; names the variable, the value and the remedy.
        """
        source = _Source(os.environ if environ is None else environ)
        where = source.text("url", url)
        if where is None:
            raise ConfigurationError(f"no broker is named: give --url or set DURABLY_URL, to {URL_FORMS}")
        embedded = where.startswith(EMBEDDED)
        return cls(
            url=where,
            namespace=source.namespace(namespace),
            partitions=source.partitions(partitions, EMBEDDED_PARTITIONS if embedded else PARTITIONS),
            kafka={**source.kafka(), **(kafka or {})},
            dispatch=source.dispatch(dispatch),
            data_dir=Path(source.text("data_dir", data_dir) or _home(where)),
            group_instance_id=source.text("group_instance_id", group_instance_id),
            gateway_url=source.gateway_url(gateway_url),
            retention=source.retention(retention),
            standby=source.standby(standby),
            code_version=source.text("code_version", code_version),
            build=source.build(build),
        )


def _home(url: str) -> Path:
    """Where a processor's RocksDB lies by default: on the embedded broker's own path, which no two processors share."""
    return Path(url.removeprefix(EMBEDDED)) / "processor" if url.startswith(EMBEDDED) else Path(".durably")


class _Source:
    """An environment, and arguments that stand before it. An empty variable counts as one that is not set."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ

    def text(self, name: str, given: str | Path | None) -> str | None:
        return str(given) if given is not None else self._environ.get(f"DURABLY_{name.upper()}") or None

    def namespace(self, given: str | None) -> str:
        value = self.text("namespace", given)
        try:
            return Catalogue(value or "durably").namespace
        except ValueError:
            raise self._bad("namespace", given, value, "use letters, digits, '.', '_' and '-'") from None

    def partitions(self, given: int | None, default: int) -> int:
        value = self.text("partitions", None if given is None else str(given))
        if value is None:
            return default
        if not value.isascii() or not value.isdigit() or int(value) < 1:
            raise self._bad("partitions", given, value, "use a whole number, 1 or more")
        return int(value)

    def gateway_url(self, given: str | None) -> str | None:
        value = self.text("gateway_url", given)
        if value is not None and not value.startswith(("http://", "https://")):
            raise self._bad("gateway_url", given, value, "use the base of a URL, such as https://hooks.example.com")
        return value

    def retention(self, given: str | None) -> int | None:
        value = self.text("retention", given)
        if value is None:
            return None
        try:
            length = milliseconds(value)
        except ValueError:
            length = 0
        if length < SHORTEST_RETENTION_MS:
            raise self._bad("retention", given, value, 'use a duration of 20 s or more, such as "30d"')
        return length

    def standby(self, given: bool | None) -> bool:
        value = self.text("standby", None if given is None else str(int(given)))
        if value not in {None, "0", "1"}:
            raise self._bad("standby", given, value, "use 1 or 0")
        return value == "1"

    def build(self, given: str | None) -> str | None:
        value = self.text("build", given)
        try:
            return None if value is None else checked_build(value)
        except ValueError:
            raise self._bad("build", given, value, "use 1 to 64 letters, digits, '.', '_' and '-'") from None

    def dispatch(self, given: Dispatch | None) -> Dispatch:
        value = self.text("dispatch", given) or "early"
        if value not in get_args(Dispatch):
            raise self._bad("dispatch", given, value, 'use "early" or "committed"')
        return cast("Dispatch", value)

    def kafka(self) -> dict[str, str]:
        """``DURABLY_KAFKA_SASL_MECHANISM`` is librdkafka's ``sasl.mechanism``."""
        return {
            name.removeprefix(KAFKA_PREFIX).lower().replace("_", "."): value
            for name, value in self._environ.items()
            if name.startswith(KAFKA_PREFIX) and name != KAFKA_PREFIX
        }

    @staticmethod
    def _bad(name: str, given: Any, value: str | None, remedy: str) -> ConfigurationError:
        origin = f"DURABLY_{name.upper()}" if given is None else name
        return ConfigurationError(f"{origin} is {value!r}: {remedy}")
