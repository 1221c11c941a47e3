"""Restoring from a real topic of events: it ends behind whatever lies at its tail, and has all that was committed."""

from __future__ import annotations

import time
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING

import pytest
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource
from durably.broker import connect
from durably.broker.port import TP
from durably.payloads import dump_arguments, encode
from durably_processor.restore import Restore
from durably_processor.state.store import Store
from durably_schemas import Catalogue, Codec
from durably_schemas import events as ev
from harness import until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from durably.broker.port import Broker, Transactions

pytestmark = pytest.mark.kafka
CODEC = Codec()


class Log:
    """Partition 0 of a topic of events."""

    def __init__(self, broker: Broker, namespace: str, stack: ExitStack) -> None:
        self.broker = broker
        self.catalogue = Catalogue(namespace, 1)
        self.broker.create(self.catalogue.topics())
        self.tp = TP(self.catalogue.events, 0)
        self._stack = stack

    def transaction(self, name: str, *run_ids: str) -> Transactions:
        """An open transaction in which these runs are created; its records are on the broker."""
        producer = self._stack.enter_context(closing(self.broker.transactions(f"{self.catalogue.namespace}.{name}")))
        producer.init(20)
        producer.begin()
        for run_id in run_ids:
            payload = encode(dump_arguments(lambda: None, (), {}, "input"))
            created = ev.RunCreated(workflow="w", input=payload)
            producer.send(
                self.tp.topic, CODEC.encode(ev.event(run_id, 1, 1, created)), key=run_id.encode(), partition=0
            )
        producer._client.flush(20)
        return producer

    def restore(self, folder: Path) -> tuple[Store, Restore]:
        store = Store(folder / "store")
        self._stack.callback(store.close)
        restore = Restore(0, store, self.broker, self.catalogue, CODEC)
        self._stack.callback(restore.close)
        return store, restore


@pytest.fixture
def log(kafka: str, namespace: str) -> Iterator[Log]:
    with ExitStack() as stack:
        broker = stack.enter_context(closing(connect(f"kafka://{kafka}")))
        yield Log(broker, namespace, stack)


def ended(restore: Restore) -> bool:
    return until(lambda: restore.step(0.2), timeout=60)


def test_a_restore_ends_behind_aborted_transactions_and_control_records(log, tmp_path):
    log.transaction("a", "kept").commit({}, None, 20)
    for n in range(3):
        log.transaction(f"b{n}", f"dropped-{n}").close()
    until(lambda: log.broker.end_offsets([log.tp], committed=True) == log.broker.end_offsets([log.tp]))
    store, restore = log.restore(tmp_path)
    assert ended(restore)
    assert store.checkpoint == log.broker.end_offsets([log.tp])[log.tp] == 8, "four records, and the marker of each"
    assert store.state("kept")
    assert not any(store.state(f"dropped-{n}") for n in range(3))


def test_a_restore_goes_on_beyond_a_last_stable_offset_that_lies_below_committed_events(log, tmp_path):
    open_ = log.transaction("open", "uncertain")
    log.transaction("other", "committed").commit({}, None, 20)
    assert log.broker.end_offsets([log.tp], committed=True)[log.tp] == 0
    store, restore = log.restore(tmp_path)
    for _ in range(5):
        assert not restore.step(0.1), "what is committed cannot be read yet, and must not be missed"
    open_.close()
    assert ended(restore)
    assert store.state("committed")
    assert not store.state("uncertain")


def test_a_restore_goes_on_from_where_it_was_interrupted(log, tmp_path):
    log.transaction("a", *(f"run-{n}" for n in range(50))).commit({}, None, 20)
    store, restore = log.restore(tmp_path)
    until(lambda: restore.step(0.001) or store.checkpoint)
    restore.close()
    at = store.checkpoint
    log.transaction("b", *(f"run-{n}" for n in range(50, 60))).commit({}, None, 20)
    restore = Restore(0, store, log.broker, log.catalogue, CODEC)
    assert ended(restore)
    assert store.checkpoint >= at
    assert all(store.state(f"run-{n}") for n in range(60))


@pytest.mark.timeout(180)
def test_a_restore_ends_where_compaction_has_left_gaps_up_to_the_tail(kafka, log, tmp_path):
    """`events` is kept whole; but nothing rests on that: offsets without a record are passed over wherever they are."""
    admin = AdminClient({"bootstrap.servers": kafka})
    settings = {
        "cleanup.policy": "compact", "segment.ms": "100", "min.cleanable.dirty.ratio": "0.0", "min.compaction.lag.ms": "0",
        "max.compaction.lag.ms": "100", "delete.retention.ms": "0",
    }  # fmt: skip
    entries = [
        ConfigEntry(name, value, incremental_operation=AlterConfigOpType.SET) for name, value in settings.items()
    ]
    resource = ConfigResource(ConfigResource.Type.TOPIC, log.tp.topic, incremental_configs=entries)
    for future in admin.incremental_alter_configs([resource]).values():
        future.result(20)
    log.transaction("a", "first", "second").commit({}, None, 20)
    with closing(log.broker.producer()) as producer:
        for n in range(30):  # of one key, so that all but the last are compacted away
            producer.send(log.tp.topic, CODEC.encode(_other(n)), key=b"gap", partition=0)
            producer.flush(20)
            time.sleep(0.02)
        time.sleep(0.2)
        producer.send(log.tp.topic, CODEC.encode(_other(30)), key=b"gap", partition=0)
        assert producer.flush(20) == 0

    def read() -> int:
        reader = log.broker.reader({log.tp: 0})
        end = log.broker.end_offsets([log.tp])[log.tp]
        seen, position = 0, 0
        while position < end:
            for item in reader.poll(1, 1000):
                seen += hasattr(item, "value")
                position = item.offset + hasattr(item, "value")
        reader.close()
        return seen

    until(lambda: read() < 10, timeout=90)
    store, restore = log.restore(tmp_path)
    assert ended(restore)
    assert store.checkpoint == log.broker.end_offsets([log.tp])[log.tp]
    assert store.state("first")
    assert store.state("second")


def _other(n: int) -> ev.Event:
    return ev.event("token|t|r|h", 1, n, ev.TokenClaimed(token="t", run_id="r", hook_id="h"), "h")
