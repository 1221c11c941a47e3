"""The fault proxy does to real Kafka what its methods say; other tests rest on it."""

from __future__ import annotations

import time
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING

import pytest
from durably.broker import connect
from durably.broker.port import TP
from durably.errors import BrokerUnreachable
from durably_schemas import Catalogue
from fault_proxy import FaultProxy
from harness import until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from durably.broker.port import Broker, Transactions

pytestmark = pytest.mark.kafka


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def proxy(kafka: str, stack: ExitStack) -> FaultProxy:
    return stack.enter_context(FaultProxy(kafka))


@pytest.fixture
def broker(proxy: FaultProxy, stack: ExitStack) -> Broker:
    return stack.enter_context(closing(connect(f"kafka://{proxy.bootstrap}")))


@pytest.fixture
def log(kafka: str, stack: ExitStack, namespace: str) -> tuple[Broker, TP]:
    """A topic, and a connection to it that goes round the proxy."""
    direct = stack.enter_context(closing(connect(f"kafka://{kafka}")))
    catalogue = Catalogue(namespace, 1)
    direct.create(catalogue.topics())
    return direct, TP(catalogue.events, 0)


def written(broker: Broker, stack: ExitStack, tp: TP) -> Transactions:
    producer = stack.enter_context(closing(broker.transactions(tp.topic)))
    producer.init(20)
    producer.begin()
    producer.send(tp.topic, b"1", partition=0)
    return producer


def test_an_answer_is_lost_after_its_request_was_carried_out(proxy, broker, stack, log):
    direct, tp = log
    producer = written(broker, stack, tp)
    proxy.drop_answers("EndTxn")
    with pytest.raises(BrokerUnreachable):
        producer.commit({}, None, 2)
    assert proxy.struck == {"EndTxn": 1}
    until(lambda: direct.end_offsets([tp]) == {tp: 2})  # the record, and the marker of the commit
    assert direct.end_offsets([tp], committed=True) == {tp: 2}


def test_a_lost_request_is_never_carried_out(proxy, broker, stack, log):
    direct, tp = log
    producer = written(broker, stack, tp)
    proxy.drop_requests("EndTxn", 10)
    with pytest.raises(BrokerUnreachable):
        producer.commit({}, None, 2)
    assert proxy.struck == {"EndTxn": 1}
    assert direct.end_offsets([tp], committed=True) == {tp: 0}


def test_what_is_held_comes_late(proxy, broker, stack, log):
    _, tp = log
    producer = written(broker, stack, tp)
    proxy.delay("AddOffsetsToTxn", 60)  # nobody asks for it here
    proxy.delay("EndTxn", 0.7)
    began = time.monotonic()
    producer.commit({}, None, 20)
    assert time.monotonic() - began >= 0.7
    assert proxy.struck == {"EndTxn": 1}


def test_a_held_request_is_carried_out_though_its_client_has_gone(proxy, broker, stack, log):
    direct, tp = log
    producer = written(broker, stack, tp)
    proxy.delay_requests("EndTxn", 2)
    with pytest.raises(BrokerUnreachable):
        producer.commit({}, None, 0.5)
    producer.close()
    until(lambda: direct.end_offsets([tp], committed=True) == {tp: 2})


def test_nothing_passes_in_a_pause_and_what_gathered_passes_after_it(proxy, broker, log):
    _, tp = log
    with closing(broker.producer()) as producer:
        producer.send(tp.topic, b"1", partition=0)
        assert producer.flush(20) == 0
        proxy.pause()
        producer.send(tp.topic, b"2", partition=0)
        assert producer.flush(0.5) == 1
        proxy.resume()
        assert producer.flush(20) == 0


def test_clients_come_back_after_a_cut_and_only_through_the_proxy(proxy, broker, log):
    _, tp = log
    with closing(broker.producer()) as producer:
        producer.send(tp.topic, b"1", partition=0)
        assert producer.flush(20) == 0
        before = proxy.seen["ApiVersions"]  # what a client asks on each new connection
        proxy.cut()
        producer.send(tp.topic, b"2", partition=0)
        assert producer.flush(20) == 0
        assert proxy.seen["ApiVersions"] > before
        assert proxy.seen["Produce"] >= 2


def test_an_api_that_does_not_exist_is_refused(proxy):
    with pytest.raises(ValueError, match="EndTransaction"):
        proxy.drop_answers("EndTransaction")
