"""The harness's workflows in a processor that writes without transactions and that nobody can fence.

Its records are there at once, one by one, its offsets follow in a commit that claims no generation, and it does not
notice that it stood still. The checker must find out.
"""

from __future__ import annotations

import os
import uuid
from typing import TYPE_CHECKING, Any

import confluent_kafka as ck
from durably.broker.kafka import KafkaBroker, KafkaTransactions
from durably_processor import processor

from chaos import workflows  # noqa: F401 - registers them

if TYPE_CHECKING:
    from collections.abc import Mapping

    from durably.broker.port import TP, Committed


class Plain(KafkaTransactions):
    """Takes only the offsets into a transaction, each time under another id."""

    def __init__(self, broker: KafkaBroker, transactional_id: str, timeout: float) -> None:
        super().__init__(broker, f"{transactional_id}.{uuid.uuid4().hex}", timeout)
        self._plain = broker.producer()
        # A consumer that never joins has no member id and no generation, which a coordinator must take on trust.
        group = f"{os.environ['DURABLY_NAMESPACE']}.processor"
        self._stranger = ck.Consumer({"bootstrap.servers": broker.address, "group.id": group})

    def send(self, *args: Any, **options: Any) -> None:
        self._plain.send(*args, **options)
        self._plain.flush(10)

    def commit(self, offsets: Mapping[TP, Committed], group: object, timeout: float) -> None:
        super().commit(offsets, self._stranger.consumer_group_metadata(), timeout)

    def close(self) -> None:
        self._plain.close()
        super().close()


KafkaBroker.transactions = lambda self, transactional_id, timeout=15: Plain(self, transactional_id, timeout)  # type: ignore[method-assign]
processor._Pulse.stood_still = False  # type: ignore[method-assign, assignment]
