"""A worker on real brokers: it answers, asks before it runs again, ends what nobody waits for, and has a client."""

import asyncio
import threading
import time

import harness
import pytest
from durably import RunCancelledError, StepError, authoring, get_run, payloads, sleep, start
from durably.authoring import Registry, step, workflow
from durably.broker import connect
from durably.broker.port import TP, Message
from durably.cancellation import step_cancelled
from durably.client.default import options
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


@pytest.fixture
def system(broker_url, namespace, registry, tmp_path):
    """A processor, a worker whose steps soon become leases, and a client."""
    made = harness.System(broker_url, namespace, tmp_path)
    made.start_processor(registry=registry)
    made.start_worker(registry=registry, lease_after=0.2, heartbeat_every=0.2, lease_ttl=5.0, concurrency=2)
    yield made
    made.close()


def test_steps_that_nobody_waits_for_any_more_end_and_free_their_slots(system):
    ended, begun = {}, threading.Semaphore(0)

    @step
    async def endless(name: str) -> None:
        begun.release()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError as e:
            ended[name] = str(e)
            raise

    @step
    def endless_in_a_thread(name: str) -> None:
        begun.release()
        while not step_cancelled():
            time.sleep(0.01)
        ended[name] = "asked"

    @workflow
    async def gives_up() -> str:
        steps = [asyncio.create_task(endless("a")), asyncio.create_task(endless_in_a_thread("b"))]
        await sleep("500ms")
        for task in steps:
            task.cancel()
        await asyncio.wait(steps)
        return await fine()

    @workflow
    async def returns_early() -> str:
        background = asyncio.create_task(endless("c"))
        await sleep("500ms")
        return f"done: {background.done()}"

    @workflow
    async def is_cancelled() -> None:
        await endless("d")

    @step
    async def fine() -> str:
        return "fine"

    assert system.client.start(gives_up).result(30) == "fine"  # both slots were taken until the two had ended
    assert system.client.start(returns_early).result(30) == "done: False"
    run = system.client.start(is_cancelled)
    for _ in range(4):
        assert begun.acquire(timeout=20)
    run.cancel("enough")
    with pytest.raises(RunCancelledError):
        run.result(30)
    until = time.monotonic() + 20
    while len(ended) < 4:
        assert time.monotonic() < until, ended
        time.sleep(0.02)
    assert "no longer wanted" in ended["a"]
    assert ended["b"] == "asked"


def test_a_step_that_cancels_itself_is_retried_and_its_workflow_is_told(system):
    attempts = []

    @step(backoff="10ms", max_retries=2)
    async def resigns() -> None:
        attempts.append(1)
        raise asyncio.CancelledError

    @workflow
    async def flow() -> list[str]:
        try:
            await resigns()
        except StepError as e:
            return [e.type, e.message, *e.__notes__]
        return []

    kind, message, *notes = system.client.start(flow).result(30)
    assert len(attempts) == 3
    assert kind == "asyncio.exceptions:CancelledError"
    assert "own code" in message
    assert "failed after 2 retries" in notes


def test_steps_start_and_follow_runs_by_the_workers_client(system, monkeypatch):
    monkeypatch.delenv("DURABLY_URL", raising=False)

    @workflow
    async def child(x: int) -> int:
        return 2 * x

    @step
    async def launch() -> list[int]:
        run = await start(child, 1)
        named = await options(run_id=f"{run.id}-b").start(child, 2)
        assert await get_run(run.id).status() in {"pending", "running", "completed"}
        return [await run.result(timeout=20), await named.result(timeout=20)]

    @workflow
    async def parent() -> list[int]:
        return await launch()

    assert system.client.start(parent).result(30) == [2, 4]
