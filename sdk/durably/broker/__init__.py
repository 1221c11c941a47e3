"""Brokers: where durably's topics live."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

from durably.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from durably.broker.port import Broker

__all__ = ["connect"]


def connect(url: str, kafka: Mapping[str, str] = MappingProxyType({})) -> Broker:
    """Opens a connection to a broker. Nothing is asked of it yet.

    Args:
        url: ``kafka://host:port``, with further brokers after commas, or ``embedded:PATH``.
        kafka: properties of librdkafka, such as ``{"security.protocol": "SASL_SSL"}``; of no use to an embedded broker.

    Raises:
        ConfigurationError: of another form, or a property that is not to be set.
    """
    # Either adapter brings a native library along, and a process needs one of them only.
    scheme, _, rest = url.partition(":")
    if scheme == "kafka" and rest.startswith("//"):
        from durably.broker.kafka import KafkaBroker

        return KafkaBroker(rest.removeprefix("//"), kafka)
    if scheme == "embedded" and rest:
        from durably.broker.embedded import open_embedded

        return open_embedded(rest)
    raise ConfigurationError(
        f"{url!r} names no broker: use kafka://host:port, kafka://host:port,host:port, or embedded:PATH"
    )
