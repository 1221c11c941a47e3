"""What a user sees, on the embedded broker and on Apache Kafka alike."""

from __future__ import annotations

import asyncio
import threading
import time
from datetime import UTC, datetime, timedelta

import harness
import pytest
from durably import (
    FatalError,
    RecordTooLarge,
    RetryableError,
    RunBlockedError,
    RunCancelledError,
    RunFailedError,
    RunNotFoundError,
    StepTimeoutError,
    get_step_metadata,
    get_workflow_metadata,
    get_writable,
    sleep,
    step,
    workflow,
)
from durably.authoring import Registry
from durably.broker.port import TP
from durably_schemas import Codec, records

EXECUTIONS: list[tuple[str, object]] = []


class Declined(Exception):
    """Of the user's own."""


@step
async def add(a: int, b: int) -> int:
    return a + b


@step
def add_in_a_thread(a: int, b: int) -> int:
    assert threading.current_thread() is not threading.main_thread()
    return a + b


@step(backoff="10ms")
async def flaky(key: str, failures: int) -> int:
    meta = get_step_metadata()
    EXECUTIONS.append((key, meta.attempt))
    if meta.attempt <= failures:
        raise RuntimeError(f"attempt {meta.attempt}")
    return meta.attempt


@step(max_retries=5)
async def busy(key: str) -> float:
    meta = get_step_metadata()
    if meta.attempt == 1:
        raise RetryableError("busy", retry_after="200ms")
    return meta.attempt


@step(backoff="20ms")
async def declines(kind: str) -> None:
    if kind == "fatal":
        raise FatalError("no")
    try:
        raise KeyError("inner")
    except KeyError as e:
        raise Declined("card") from e


@step(timeout="200ms", max_retries=0)
async def slow() -> None:
    await asyncio.sleep(30)


@step(queue="other")
async def elsewhere() -> str:
    return get_step_metadata().step_name


@step
async def narrate(n: int, namespace: str | None = None) -> int:
    out = get_writable(namespace)
    for i in range(n):
        await out.write({"i": i})
    return n


@workflow
async def sequential(n: int) -> int:
    total = 0
    for i in range(n):
        total = await add(total, i)
    return total


@workflow
async def mixed(n: int) -> list[int]:
    return await asyncio.gather(*(add(i, i) if i % 2 else add_in_a_thread(i, i) for i in range(n)))


@workflow
async def retried(key: str, failures: int) -> int:
    return await flaky(key, failures)


@workflow
async def waits_for_busy() -> float:
    return await busy("x")


@workflow
async def catches(kind: str) -> list[str]:
    try:
        await declines(kind)
    except (Declined, FatalError) as e:
        return [type(e).__name__, str(e), repr(e.__cause__)]
    return []


@workflow
async def fails() -> None:
    await declines("own")


@workflow
async def times_out() -> str:
    try:
        await slow()
    except StepTimeoutError as e:
        return str(e)
    return "not reached"


@workflow
async def naps(seconds: float) -> float:
    before = time.time()
    await sleep(seconds)
    return round(time.time() - before, 3)


@workflow
async def sleeps_long() -> str:
    try:
        await sleep("1h")
    finally:
        await add(1, 1)
    return "not reached"


@workflow
async def races() -> str:
    try:
        async with asyncio.timeout(0.2):
            await sleep("1h")
    except TimeoutError:
        return "timeout"
    return "not reached"


@workflow
async def describes_itself() -> list[str]:
    meta = get_workflow_metadata()
    return [meta.run_id, meta.workflow_name, await elsewhere()]


@workflow
async def inlines(n: int) -> int:
    return await sequential(n) + await sequential(n)


@workflow
async def streams(n: int) -> int:
    await narrate(n)
    await narrate(2, "zusätzlich")
    return n


@workflow
async def never_yields() -> None:
    while True:
        pass


@pytest.fixture
def system(broker_url, namespace, tmp_path):
    system = harness.System(broker_url, namespace, tmp_path)
    yield system
    system.close()


@pytest.fixture
def running(system):
    system.start_processor()
    system.start_worker()
    return system


def test_every_way_to_run_steps(running):
    client = running.client
    runs = [
        client.start(sequential, 5),
        client.start(mixed, 6),
        client.start(inlines, 4),
        client.start(describes_itself),
    ]
    assert runs[0].result(30) == 10
    assert runs[1].result(30) == [0, 2, 4, 6, 8, 10]
    assert runs[2].result(30) == 12
    assert runs[3].result(30) == [runs[3].id, "describes_itself", "elsewhere"]
    events = runs[0].events()
    assert [e.seq for e in events] == list(range(1, len(events) + 1))
    assert [e.type for e in events].count("step_created") == 5


def test_failures_are_retried_and_arrive_as_what_they_were(running):
    client = running.client
    flaked = client.start(retried, running.namespace, 2)
    late = client.start(waits_for_busy)
    own, fatal = client.start(catches, "own"), client.start(catches, "fatal")
    failed = client.start(fails)
    timed = client.start(times_out)
    assert flaked.result(30) == 3
    assert [a for key, a in EXECUTIONS if key == running.namespace] == [1, 2, 3]
    assert late.result(30) == 2
    assert fatal.result(30) == ["FatalError", "no", "None"]
    assert timed.result(30)
    own_run = client.start(fails)
    with pytest.raises(RunFailedError) as raised:
        own_run.result(60)
    assert isinstance(raised.value.cause, Declined)
    assert isinstance(raised.value.cause.__cause__, KeyError)
    assert own.result(60) == ["Declined", "card", "KeyError('inner')"]
    with pytest.raises(RunFailedError):
        failed.result(60)


def test_time(running):
    client = running.client
    nap, race = client.start(naps, 0.3), client.start(races)
    delayed = client.options(delay="300ms").start(sequential, 1)
    assert delayed.status() == "pending"
    assert nap.result(30) >= 0.3
    assert race.result(30) == "timeout"
    assert delayed.result(30) == 0
    past = client.options(delay=datetime.now(UTC) - timedelta(days=1)).start(sequential, 1)
    assert past.result(30) == 0


def test_a_second_start_attaches_to_the_first(running):
    client = running.client
    first = client.options(run_id="order-7", attributes={"customer": "Ada"}).start(sequential, 3)
    second = client.options(run_id="order-7").start(sequential, 99)
    assert first.result(30) == second.result(30) == 3
    assert first.describe().attributes == {"customer": "Ada"}
    assert [r.run_id for r in client.runs(workflow="sequential", status="completed")] == ["order-7"]


def test_cancelling(running):
    client = running.client
    run = client.start(sleeps_long)
    while run.describe().status == "pending" or len(run.events()) < 3:
        time.sleep(0.02)
    run.cancel(reason="enough")
    with pytest.raises(RunCancelledError):
        run.result(30)
    assert "step_completed" in [e.type for e in run.events()]
    run.cancel()
    assert run.status() == "cancelled"
    pending = client.options(delay="1h").start(sequential, 1)
    pending.cancel()
    assert pending.status() == "cancelled"


def test_what_is_unknown_is_said_so(running):
    client = running.client
    with pytest.raises(RunNotFoundError):
        client.get_run("nobody").status()
    with pytest.raises(RunNotFoundError):
        client.get_run("nobody").result(10)
    with pytest.raises(RunNotFoundError):
        client.get_run("nobody").cancel()
    with pytest.raises(RunBlockedError, match="unknown workflow 'nowhere'"):
        client.start("nowhere", 1).result(30)
    with pytest.raises(RunFailedError, match="sequential"):
        client.start("sequential", 1, 2, 3).result(30)


def test_an_endless_loop_blocks_its_run_and_nothing_else(running):
    stuck = running.client.start(never_yields)
    others = [running.client.start(sequential, 2) for _ in range(4)]
    with pytest.raises(RunBlockedError):
        stuck.result(30)
    assert [r.result(30) for r in others] == [1] * 4


def test_streams_are_read_live_from_any_index_and_end_with_the_run(running):
    run = running.client.start(streams, 5)
    assert [c["i"] for c in run.stream()] == [0, 1, 2, 3, 4]
    assert [c["i"] for c in run.stream("zusätzlich")] == [0, 1]
    assert [c["i"] for c in run.stream(start_index=3)] == [3, 4]
    assert [c["i"] for c in run.stream(start_index=-2)] == [3, 4]
    assert list(running.client.start(sequential, 1).stream()) == []


def test_what_cannot_be_read_goes_to_dead_letters_and_the_rest_goes_on(running):
    producer = running.broker.producer()
    commands = running.catalogue.commands
    codec = Codec()
    start = records.StartRun(
        run_id="r",
        workflow="sequential",
        input=records.Payload(content_type="application/json", data=b"[1]"),
        requested_at=0,
    )
    bad = [
        (b"nonsense", b"k", 0),
        (codec.encode(start), b"other-key", 0),
        (codec.encode(records.CancelRun(run_id="x", requested_at=1))[:-1], b"x", 1),
    ]
    for value, key, partition in bad:
        producer.send(commands, value, key=key, partition=partition)
    assert producer.flush(10) == 0
    assert [running.client.start(sequential, 2).result(30) for _ in range(4)] == [1] * 4
    letters = read(running, running.catalogue.dead_letters, 3)
    assert sorted((x.value, x.key) for x in letters) == sorted((v, k) for v, k, _ in bad)
    assert all(x.reason and x.topic == commands for x in letters)


def read(system, topic, count):
    codec = Codec()
    tps = {TP(topic, p): 0 for p in range(system.broker.partitions(topic))}
    reader = system.broker.reader(tps)
    found, deadline = [], time.monotonic() + 20
    while len(found) < count and time.monotonic() < deadline:
        found += [codec.decode(m.value) for m in reader.poll(0.2) if hasattr(m, "value")]
    reader.close()
    return found


def test_a_processor_that_restarts_goes_on_where_it_was(system):
    processor = system.start_processor()
    system.start_worker()
    client = system.client
    runs = [client.start(naps, 1.0) for _ in range(5)]
    chains = [client.start(sequential, 40) for _ in range(5)]
    time.sleep(0.1)
    system.stop_processor(processor)
    system.start_processor()
    assert all(r.result(30) >= 1.0 for r in runs)
    assert [r.result(30) for r in chains] == [sum(range(40))] * 5


def test_a_store_that_is_lost_is_rebuilt_from_the_topic(system):
    processor = system.start_processor("a")
    system.start_worker()
    done = system.client.start(sequential, 3)
    parked = system.client.start(naps, 1.5)
    assert done.result(30) == 3
    while len(parked.events()) < 3:
        time.sleep(0.02)
    system.stop_processor(processor)
    system.start_processor("b")
    assert done.describe().status == "completed"
    assert [e.seq for e in done.events()] == list(range(1, 13))
    assert parked.result(30) >= 1.5


def test_two_processors_share_the_partitions(system):
    first = system.start_processor("a")
    second = system.start_processor("b")
    system.start_worker()
    runs = [system.client.start(sequential, 10) for _ in range(20)]
    assert [r.result(60) for r in runs] == [45] * 20
    late = [system.client.start(sequential, 30) for _ in range(10)]
    system.stop_processor(second)
    assert [r.result(60) for r in late] == [435] * 10
    assert first.error is None


def test_a_blocked_run_goes_on_under_code_that_fits(system):
    old, new = Registry(), Registry()
    for r in (old, new):
        r.steps.update({s.name: s for s in (add, elsewhere)})

    @workflow(name="evolving")
    async def before() -> int:
        await add(1, 1)
        await sleep(4)  # longer than it takes to stop the processor
        return await add(2, 2)

    from durably.authoring import WorkflowDefinition

    async def after() -> str:
        return await elsewhere()

    old.workflows["evolving"] = before
    new.workflows["evolving"] = WorkflowDefinition("evolving", after)
    system.start_worker()
    processor = system.start_processor(registry=old)
    run = system.client.start("evolving")
    while len(run.events()) < 6:
        time.sleep(0.02)
    system.stop_processor(processor)
    processor = system.start_processor(registry=new)
    with pytest.raises(RunBlockedError, match="expected"):
        run.result(30)
    system.stop_processor(processor)
    system.start_processor(registry=old)
    assert run.result(30) == 4
    types = [e.type for e in run.events()]
    assert types.count("run_blocked") == types.count("run_unblocked") == 1


def test_bad_circumstances_are_named(system):
    from durably import ConfigurationError
    from durably_processor.processor import Processor
    from durably_schemas import Catalogue

    running = system.start_processor("shared")
    twin = Processor(system.broker, system.catalogue, Registry(), system.folder / "shared")
    with pytest.raises(ConfigurationError, match="in use"):
        twin.run()
    missing = Processor(system.broker, Catalogue(system.namespace + "x", 2), Registry(), system.folder / "x")
    with pytest.raises(ConfigurationError, match="durably topics create"):
        missing.run()
    wrong = Processor(system.broker, Catalogue(system.namespace, 7), Registry(), system.folder / "y")
    with pytest.raises(ConfigurationError, match="7 partitions"):
        wrong.run()
    assert running.error is None


@step(max_retries=0)
async def inflate(n: int) -> str:
    return "x" * n


@step
async def known_to_no_worker() -> None:
    """Registered where the workflow runs, and nowhere else."""


@workflow
async def too_much(where: str) -> list[str]:
    try:
        if where == "argument":
            await add("x" * 2_000_000, 1)  # type: ignore[arg-type]
        await inflate(2_000_000)
    except RecordTooLarge as e:
        return [str(e)]
    return []


@workflow
async def asks_for_the_unknown() -> None:
    await known_to_no_worker()


def test_what_is_too_large_is_refused_where_it_arises(running):
    client = running.client
    with pytest.raises(RecordTooLarge, match="reference"):
        client.start(inflates_nothing, "x" * 2_000_000)
    for where in ("argument", "result"):
        (message,) = client.start(too_much, where).result(30)
        assert "reference" in message
    assert client.start(sequential, 2).result(30) == 1, "nobody stopped"


@workflow
async def inflates_nothing(text: str) -> int:
    return len(text)


def test_a_step_that_no_worker_knows_fails_clearly_and_is_kept(system):
    few = Registry()
    few.steps["add"] = add
    system.start_processor()
    system.start_worker(registry=few)
    with pytest.raises(RunFailedError, match="known_to_no_worker"):
        system.client.start(asks_for_the_unknown).result(30)
    (letter,) = read(system, system.catalogue.dead_letters, 1)
    assert "known_to_no_worker" in letter.reason
