"""The harness's workflows in a processor whose commits are not what they should be: the checker must find out.

CHAOS_SABOTAGE=unfenced   each transaction has an id of its own, and no generation: nobody can be fenced
CHAOS_SABOTAGE=plain      no transactions: records go out one by one, offsets behind them
"""

from __future__ import annotations

import os
import uuid
from typing import TYPE_CHECKING, Any

import confluent_kafka as ck
from durably.broker.kafka import KafkaBroker, KafkaTransactions

from chaos import workflows  # noqa: F401 - registers them

if TYPE_CHECKING:
    from collections.abc import Mapping

    from durably.broker.port import TP, Committed


class Unfenced(KafkaTransactions):
    """Transactions that anybody may commit at any time."""

    def __init__(self, broker: KafkaBroker, transactional_id: str, timeout: float) -> None:
        super().__init__(broker, f"{transactional_id}.{uuid.uuid4().hex}", timeout)
        # A consumer that never joins has no member id and no generation, which a coordinator must take on trust.
        group = f"{os.environ['DURABLY_NAMESPACE']}.processor"
        self._stranger = ck.Consumer({"bootstrap.servers": broker.address, "group.id": group})

    def commit(self, offsets: Mapping[TP, Committed], group: object, timeout: float) -> None:
        super().commit(offsets, self._stranger.consumer_group_metadata(), timeout)


class Plain(Unfenced):
    """Records that are there at once and for good, whatever becomes of the offsets."""

    def __init__(self, broker: KafkaBroker, transactional_id: str, timeout: float) -> None:
        super().__init__(broker, transactional_id, timeout)
        self._plain = broker.producer()

    def send(self, *args: Any, **options: Any) -> None:
        self._plain.send(*args, **options)
        self._plain.flush(10)

    def close(self) -> None:
        self._plain.close()
        super().close()


SABOTAGE = {"unfenced": Unfenced, "plain": Plain}[os.environ["CHAOS_SABOTAGE"]]
KafkaBroker.transactions = lambda self, transactional_id, timeout=15: SABOTAGE(self, transactional_id, timeout)  # type: ignore[method-assign]
