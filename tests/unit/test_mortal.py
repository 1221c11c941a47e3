"""The broker that dies does nothing after its death, but for the last commit that it may have left."""

from __future__ import annotations

import checker
import pytest
from durably.broker import connect
from durably.broker.port import TP, Committed
from durably_schemas import Catalogue, Codec
from durably_schemas import events as ev
from mortal import Dead, MortalBroker


class _Nobody:
    """Hears of rebalances, and does nothing."""

    def on_assigned(self, partitions):
        pass

    on_revoked = on_lost = on_assigned


@pytest.fixture
def scene(tmp_path):
    broker, catalogue = connect(f"embedded:{tmp_path}/b"), Catalogue("c", 1)
    broker.create(catalogue.topics())
    mortal = MortalBroker(broker)
    consumer = mortal.consumer("group", catalogue.commands, _Nobody())
    consumer.poll(0.5)
    transactions, producer = mortal.transactions("t"), mortal.producer()
    transactions.init(5)
    yield broker, catalogue, mortal, consumer, transactions, producer
    consumer.close()
    transactions.close()
    producer.close()
    broker.close()


def _commit(catalogue, consumer, transactions):
    value = Codec().encode(ev.event("r", 1, 1, ev.RunStarted()))
    transactions.begin()
    transactions.send(catalogue.events, value, key=b"r", partition=0)
    transactions.commit({TP(catalogue.commands, 0): Committed(0, "")}, consumer.group_metadata(), 5)


def test_the_living_commit(scene):
    broker, catalogue, _, consumer, transactions, _ = scene
    _commit(catalogue, consumer, transactions)
    assert len(checker.read(broker, catalogue.events)) == 1


@pytest.mark.parametrize("after_commit", [False, True])
def test_the_dead_commit_nothing_or_once_more_without_knowing_it(scene, after_commit):
    broker, catalogue, mortal, consumer, transactions, _ = scene
    mortal.die(after_commit=after_commit)
    with pytest.raises(Dead):
        _commit(catalogue, consumer, transactions)
    assert len(checker.read(broker, catalogue.events)) == int(after_commit)


def test_the_dead_send_and_release_nothing(scene):
    broker, catalogue, mortal, consumer, _, producer = scene
    mortal.die(after_commit=False)
    with pytest.raises(Dead):
        producer.send(catalogue.commands, b"x", key=b"x")
    with pytest.raises(Dead):
        consumer.commit({TP(catalogue.commands, 0): Committed(0, "")}, wait=True)
    with pytest.raises(Dead):
        mortal.transactions("t").init(5)
    assert broker.end_offsets([TP(catalogue.commands, 0)]) == {TP(catalogue.commands, 0): 0}
