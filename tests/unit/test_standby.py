"""Copies of stores: kept up to date, let go of at once, taken up again."""

from __future__ import annotations

import threading

import harness
import pytest
from durably.broker import connect
from durably.broker.port import TP
from durably_processor import standby
from durably_processor.restore import Restore
from durably_processor.standby import Standby
from durably_processor.state.store import Store
from partition_lab import CATALOGUE, CODEC, content, finish, publish, requests

DERIVED = b"erotbckm"


@pytest.fixture
def log(lab, tmp_path, monkeypatch):
    """A broker that has what the lab has committed."""
    monkeypatch.setattr(standby, "PAUSE", 0.01)
    part = lab.settle(lab.start("chain", 5))
    for n in range(30):
        lab.settle(lab.start("chain", 1, f"r{n}-more"))
    lab.settle(*map(lab.answer, requests(part, early=True)))
    broker = connect(f"embedded:{tmp_path}/broker")
    broker.create(CATALOGUE.topics())
    publish(lab, broker)
    yield broker
    broker.close()


def copy_is_whole(keeper: Standby, broker) -> bool:
    store = keeper._stores.get(0)
    return (
        store is not None and store.checkpoint == broker.end_offsets([TP(CATALOGUE.events, 0)])[TP(CATALOGUE.events, 0)]
    )


def test_a_copy_that_was_let_go_is_what_its_owner_begins_with(lab, log, tmp_path):
    keeper = Standby(log, CATALOGUE, CODEC, tmp_path)
    keeper.start()
    harness.until(lambda: copy_is_whole(keeper, log))
    keeper.let_go([0])
    known = len(lab.events)
    lab.settle(lab.start("chain", 0, "later"))
    publish(lab, log, since=known)
    store = Store(tmp_path / "partition-0")  # which would be refused if it were open
    restore = Restore(0, store, log, CATALOGUE, CODEC)
    finish(restore)
    assert restore.count == len(lab.events) - known
    assert content(store, DERIVED) == content(lab.store, DERIVED)
    store.close()

    keeper.keep(0)
    known = len(lab.events)
    lab.settle(lab.start("chain", 0, "last"))
    publish(lab, log, since=known)
    harness.until(lambda: copy_is_whole(keeper, log))
    keeper.stop()
    store = Store(tmp_path / "partition-0")
    assert content(store, DERIVED) == content(lab.store, DERIVED)
    store.close()


def test_a_partition_is_let_go_in_the_middle_of_its_reading(lab, log, tmp_path, monkeypatch):
    monkeypatch.setattr("durably_processor.restore.POLLED", 1)
    monkeypatch.setattr("durably_processor.restore.AT_ONCE", 5)
    step, reading, go_on = Restore.step, threading.Event(), threading.Event()

    def slow(self, seconds):
        reading.set()
        go_on.wait(10)
        return step(self, 0.001)

    monkeypatch.setattr(Restore, "step", slow)
    keeper = Standby(log, CATALOGUE, CODEC, tmp_path)
    keeper.start()
    assert reading.wait(10)
    letting_go = threading.Thread(target=keeper.let_go, args=([0],))
    letting_go.start()
    go_on.set()
    letting_go.join(10)
    assert not letting_go.is_alive()
    monkeypatch.setattr(Restore, "step", step)
    store = Store(tmp_path / "partition-0")
    finish(Restore(0, store, log, CATALOGUE, CODEC))
    assert content(store, DERIVED) == content(lab.store, DERIVED)
    keeper.stop()
    store.close()


def test_a_broker_that_does_not_answer_ends_nothing(log, tmp_path, monkeypatch, caplog):
    from durably.errors import BrokerUnreachable

    asked = log.end_offsets
    failing = threading.Event()
    failing.set()

    def refuses(*args, **options):
        if failing.is_set():
            raise BrokerUnreachable("away")
        return asked(*args, **options)

    monkeypatch.setattr(log, "end_offsets", refuses)
    keeper = Standby(log, CATALOGUE, CODEC, tmp_path)
    keeper.start()
    harness.until(lambda: "not brought up to date: away" in caplog.text)
    failing.clear()
    harness.until(lambda: copy_is_whole(keeper, log))
    keeper.stop()
