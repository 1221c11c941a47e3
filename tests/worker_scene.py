"""A worker on a fake broker, and what a processor would do to it. Test modules bind its fixtures to names of their own."""

import time

import pytest
from durably import authoring, payloads
from durably.authoring import Registry
from durably.broker.port import TP, Committed
from durably.worker import Worker
from durably_schemas import Catalogue, Codec
from durably_schemas.records import Reply, StepRequest, StepResult
from fake_broker import FakeBroker

CATALOGUE = Catalogue(partitions=2)
REQUESTS = CATALOGUE.requests("default")
CODEC = Codec()


@pytest.fixture
def registry(monkeypatch):
    fresh = Registry()
    monkeypatch.setattr(authoring, "registry", fresh)
    monkeypatch.setattr("durably.worker.intake.POLL", 0.02)
    monkeypatch.setattr("durably.worker.outbox.RETRY", 0.1)
    return fresh


@pytest.fixture
def broker():
    broker = FakeBroker()
    broker.create(CATALOGUE.topics())
    return broker


@pytest.fixture
def start(broker, registry):
    """Starts workers; stops them at the end."""
    workers = []

    def start(drain=1.0, **options):
        options = {"lease_after": 5.0, "heartbeat_every": 0.05, "lease_ttl": 0.3, **options}
        worker = Worker(broker, CATALOGUE, registry, **options)
        before = len(broker.groups["durably.worker.default"].owner)
        worker.start()
        until(lambda: len(broker.groups["durably.worker.default"].owner) > before or before)
        workers.append((worker, drain))
        return worker

    yield start
    for worker, drain in workers:
        worker.stop(drain)
        worker.join()
        assert worker.error is None


def until(condition, timeout=5.0):
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "in vain"
        time.sleep(0.002)


def request(definition, *args, step_id="s1", attempt=1, payload=None, name=None, timeout=None):
    return StepRequest(
        run_id="run-1",
        step_id=step_id,
        step=name or definition.name,
        attempt=attempt,
        fingerprint="f",
        input=payload or payloads.dump(([list(args), {}]), "input"),
        workflow="flow",
        workflow_started_at=1_000,
        scheduled_at=2_000,
        timeout=definition.timeout_ms if definition and timeout is None else timeout,
    )


def ask_for(broker, *requests, partition=0, headers=()):
    for r in requests:
        broker.append(REQUESTS, CODEC.encode(r), key=b"k", partition=partition, headers=headers)


def sent(broker, kind, topic=None):
    return [r for m in broker.records(topic or CATALOGUE.results) if isinstance(r := CODEC.decode(m.value), kind)]


def results(broker, count):
    until(lambda: len(sent(broker, StepResult)) >= count)
    return sent(broker, StepResult)


def committed(broker, partition=0):
    return broker.groups["durably.worker.default"].committed.get(TP(REQUESTS, partition), Committed(-1, "")).offset


def answer(broker, question, what, execution=1):
    """Answers a claim, or a heartbeat."""
    reply = Reply(request_id=question.reply_to.request_id, claim=what, execution=execution)
    broker.append(CATALOGUE.replies, CODEC.encode(reply), partition=question.reply_to.partition)
