"""Brokers: where durably's topics live."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

from durably.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from durably.broker.port import Broker

__all__ = ["connect"]


def connect(url: str, kafka: Mapping[str, str] = MappingProxyType({}), *, own: bool = True) -> Broker:
    """Opens a connection to a broker. Nothing is asked of Kafka yet.

    Args:
        url: ``kafka://host:port``, with further brokers after commas, or ``embedded:PATH``.
        kafka: properties of librdkafka, such as ``{"security.protocol": "SASL_SSL"}``; of no use to an embedded broker.
        own: whether to open an embedded path that no process has open. Clients do not: they would stand in the way of
            the processor, which must own it.

    Raises:
        ConfigurationError: of another form, or a property that is not to be set.
        BrokerUnreachable: no process has the embedded path open, and it is not to be owned.
    """
    # Either adapter brings a native library along, and a process needs one of them only.
    scheme, _, rest = url.partition(":")
    if scheme == "kafka" and rest.startswith("//"):
        from durably.broker.kafka import KafkaBroker

        return KafkaBroker(rest.removeprefix("//"), kafka)
    if scheme == "embedded" and rest:
        from durably.broker.embedded import open_embedded

        return open_embedded(rest, own=own)
    raise ConfigurationError(
        f"{url!r} names no broker: use kafka://host:port, kafka://host:port,host:port, or embedded:PATH"
    )
