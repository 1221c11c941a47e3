"""A worker on real brokers: what is asked for is answered, and after a restart it asks before it runs."""

import time

import pytest
from durably import authoring, payloads
from durably.authoring import Registry, step
from durably.broker import connect
from durably.broker.port import TP, Message
from durably.worker import Worker
from durably_schemas import Catalogue, Codec
from durably_schemas.records import Reply, StepClaim, StepRequest, StepResult

CODEC = Codec()


class Listener:
    def on_assigned(self, partitions): ...
    def on_revoked(self, partitions): ...
    def on_lost(self, partitions): ...


@pytest.fixture
def registry(monkeypatch):
    fresh = Registry()
    monkeypatch.setattr(authoring, "registry", fresh)
    return fresh


def test_results_come_and_requests_left_behind_are_asked_about(broker_url, namespace, registry):
    @step
    async def double(x: int) -> int:
        return 2 * x

    @step
    def stuck() -> None:
        time.sleep(60)

    catalogue = Catalogue(namespace=namespace, partitions=2)
    broker = connect(broker_url)
    broker.create(catalogue.topics())
    producer = broker.producer()
    results = [TP(catalogue.results, p) for p in range(2)]
    reader = broker.reader(dict.fromkeys(results, 0))
    requests = catalogue.requests("default")

    def ask(step_id, definition, *args):
        request = StepRequest(
            run_id="run",
            step_id=step_id,
            step=definition.name,
            attempt=1,
            fingerprint="f",
            input=payloads.dump_arguments(definition.fn, args, {}, "input"),
            workflow="flow",
            workflow_started_at=1,
            scheduled_at=1,
        )
        producer.send(requests, CODEC.encode(request), key=step_id.encode())
        assert producer.flush(10) == 0

    def take(kind, count):
        found, until = {}, time.monotonic() + 30
        while len(found) < count:
            assert time.monotonic() < until, found
            for item in reader.poll(0.1):
                if isinstance(item, Message):
                    record = CODEC.decode(item.value)
                    if isinstance(record, StepClaim):
                        reply = Reply(request_id=record.reply_to.request_id, claim=claims[record.step_id], execution=2)
                        producer.send(catalogue.replies, CODEC.encode(reply), partition=record.reply_to.partition)
                        asked.append(record.step_id)
                    if isinstance(record, kind):
                        found[record.step_id] = record
        return found

    asked, claims = [], {"first": "OPEN", "stuck": "DONE", "second": "OPEN"}
    ask("first", double, 2)
    worker = Worker(broker, catalogue, registry)
    worker.start()
    assert payloads.load(take(StepResult, 1)["first"].outcome.result) == 4
    ask("stuck", stuck)
    time.sleep(0.3)
    worker.stop(0)
    worker.join()
    assert worker.error is None

    ask("second", double, 3)
    worker = Worker(broker, catalogue, registry)
    worker.start()
    assert payloads.load(take(StepResult, 1)["second"].outcome.result) == 6
    if "stuck" not in asked:
        take(StepClaim, 1)
    assert asked.count("first") == 1
    time.sleep(0.5)
    worker.stop(5)
    worker.join()
    assert worker.error is None

    tps = [TP(requests, p) for p in range(2)]
    consumer = broker.consumer(f"{namespace}.worker.default", requests, Listener())
    committed = consumer.committed(tps, 10)
    consumer.close()
    ends = broker.end_offsets(tps)
    assert {tp: max(0, committed[tp].offset) for tp in tps} == ends
    reader.close()
    producer.close()
    broker.close()
