"""A worker reports each step once, loses none, asks before it runs what may have run, and leaves in good order."""

import asyncio
import contextlib
import contextvars
import threading
import time
from collections.abc import AsyncIterator, Iterator

import pytest
import worker_scene
from durably import payloads, runtime
from durably.authoring import step
from durably.broker.port import TP, Message
from durably.errors import BrokerError, DurablyError, FatalError, RetryableError, StepTimeoutError
from durably.failures import to_exception
from durably.streams import Readable, Writable, get_writable
from durably.worker import Worker
from durably.worker.attempt import Attempt
from durably.worker.claims import Claims
from durably.worker.leases import Leases
from durably.worker.replies import Replies
from durably.worker.salvage import salvaged
from durably.worker.steps import Steps
from durably.worker.tracker import Tracker
from durably.worker.writers import UNACKNOWLEDGED
from durably_schemas.records import (
    DeadLetter,
    Error,
    Payload,
    StepClaim,
    StepFailed,
    StepHeartbeat,
    StepResult,
    StepSucceeded,
    StreamChunk,
)
from hypothesis import given
from hypothesis import strategies as st
from worker_scene import CATALOGUE, CODEC, REQUESTS, answer, ask_for, committed, request, results, sent, until

broker, registry, start = worker_scene.broker, worker_scene.registry, worker_scene.start  # fixtures
pytestmark = pytest.mark.usefixtures("registry")


# What is below the low-water mark is finished.


@given(st.data())
def test_the_mark_never_passes_what_is_not_released(data):
    gaps = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=20))
    offsets = [sum(gaps[: i + 1]) for i in range(len(gaps))]
    tracker, taken, released, marks = Tracker(TP("t", 0), 0), [], set(), [-1]
    for offset in offsets:
        tracker.take(offset)
        taken.append(offset)
        for done in data.draw(st.lists(st.sampled_from(taken), max_size=3)):
            tracker.release(done)
            released.add(done)
        waiting = [o for o in taken if o not in released]
        assert tracker.mark() == (min(waiting) if waiting else offset + 1)
        if (due := tracker.due()) is not None:
            marks.append(due.offset)
        assert tracker.due() is None
    assert marks == sorted(set(marks))


def test_an_exhausted_partition_has_no_lag():
    tracker = Tracker(TP("t", 0), 0)
    assert tracker.mark() == -1
    tracker.exhausted(7)
    assert tracker.mark() == 7
    tracker.take(7)
    tracker.exhausted(9)
    assert tracker.mark() == 7
    tracker.release(7)
    assert tracker.mark() == 9


# What a step returns or raises is its result.


def test_async_and_plain_steps_return_and_their_offsets_are_committed(broker, start):
    @step
    async def double(x: int) -> int:
        await asyncio.sleep(0)
        return 2 * x

    @step
    def triple(x: int) -> int:
        return 3 * x

    start()
    ask_for(
        broker, request(double, 2), request(triple, 2, step_id="s2"), headers=[("traceparent", b"00-1"), ("x", b"")]
    )
    found = {r.step_id: r for r in results(broker, 2)}
    assert {k: payloads.load(r.outcome.result) for k, r in found.items()} == {"s1": 4, "s2": 6}
    assert found["s1"].fingerprint == "f"
    assert found["s1"].started_at <= found["s1"].finished_at
    assert all(m.headers == (("traceparent", b"00-1"),) for m in broker.records(CATALOGUE.results))
    assert all(m.key == b"run-1" for m in broker.records(CATALOGUE.results))
    until(lambda: committed(broker) == 2)


class Odd(BaseException):
    pass


@pytest.mark.parametrize(
    ("exc", "fatal", "retry_after"),
    [
        (ValueError("x"), False, None),
        (FatalError("x"), True, None),
        (RetryableError("x", retry_after="2s"), False, 2000),
        (RetryableError("x"), False, None),
        (RetryableError("x", retry_after=-1), False, None),
        (RetryableError("x", retry_after=10**400), False, None),
        (ExceptionGroup("g", [ValueError("x"), FatalError("y")]), True, None),
        (BaseExceptionGroup("g", [Odd("x")]), False, None),
        (KeyboardInterrupt(), False, None),
        (SystemExit(3), False, None),
        (asyncio.CancelledError(), False, None),
    ],
)
@pytest.mark.parametrize("is_async", [True, False])
def test_what_a_step_raises_is_its_failure_and_not_the_workers(broker, start, exc, fatal, retry_after, is_async):
    def fail():
        raise exc

    async def fail_async():
        raise exc

    failing = step(name="failing")(fail_async if is_async else fail)
    fine = step(name="fine")(lambda: 1)
    start()
    ask_for(broker, request(failing), request(fine, step_id="s2"))
    outcome = {r.step_id: r.outcome for r in results(broker, 2)}["s1"]
    assert (outcome.fatal, outcome.retry_after) == (fatal, retry_after)
    assert outcome.error.type.endswith(type(exc).__qualname__)


def test_a_result_that_cannot_travel_or_is_too_large_fails_for_good(broker, start):
    broker.max_record_bytes = 5_000
    opaque = step(name="opaque")(lambda: [object()])
    large = step(name="large")(lambda: "x" * 5_000)

    @step
    def verbose():
        raise ValueError("x" * 5_000)

    start()
    ask_for(broker, request(opaque), request(large, step_id="s2"), request(verbose, step_id="s3"))
    found = {r.step_id: r.outcome for r in results(broker, 3)}
    assert found["s1"].fatal
    assert "result of step opaque" in found["s1"].error.message
    assert found["s2"].fatal
    assert "reference" in found["s2"].error.message
    assert "holds 5,000" in found["s2"].error.message
    assert not found["s3"].fatal
    assert found["s3"].error.type == "builtins:ValueError"


def test_a_result_that_is_not_what_the_function_says_fails_for_good(broker, start):
    @step
    async def count() -> int:
        return "three"

    @step
    def names() -> list[str]:
        return ["Ada", 7]

    @step
    async def fine() -> tuple[int, ...]:
        return (1, 2)

    start()
    ask_for(broker, request(count), request(names, step_id="s2"), request(fine, step_id="s3"))
    found = {r.step_id: r.outcome for r in results(broker, 3)}
    for step_id, name in (("s1", "count"), ("s2", "names")):
        assert found[step_id].fatal
        assert found[step_id].error.type == "durably.errors:SerializationError"
        assert f"the result of step {name}" in found[step_id].error.message
    assert payloads.load(found["s3"].result) == (1, 2)


@pytest.mark.parametrize("is_async", [True, False])
@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda *_: StepFailed(error=Error(type="x", message="y"), retry_after=1 << 70), "does not fit its record"),
        (lambda *_: 1 / 0, "failed cannot be told: ZeroDivisionError"),
    ],
)
def test_a_failure_that_fits_no_record_is_reported_as_one_that_does(
    broker, start, monkeypatch, made, message, is_async
):
    def fail():
        raise ValueError

    async def fail_async():
        raise ValueError

    failing = step(name="failing")(fail_async if is_async else fail)
    fine = step(name="fine")(lambda: 1)
    monkeypatch.setattr("durably.worker.execution.failed", made)
    start(concurrency=1)
    ask_for(broker, request(failing), request(fine, step_id="s2"))
    found = {r.step_id: r.outcome for r in results(broker, 2)}
    assert found["s1"].fatal
    assert message in found["s1"].error.message
    assert isinstance(found["s2"], StepSucceeded)
    until(lambda: committed(broker) == 2)


def test_the_context_reaches_threads_and_nested_calls(broker, start):
    tenant = contextvars.ContextVar("tenant")
    tenant.set("acme")

    def look():
        m, w = runtime.get_step_metadata(), runtime.get_workflow_metadata()
        return [m.step_id, m.step_name, m.attempt, m.run_id, w.workflow_name, w.started_at.timestamp(), tenant.get()]

    @step
    async def nested():
        return [await asyncio.to_thread(look), await asyncio.create_task(asyncio.to_thread(look))]

    plain = step(name="plain")(look)
    start()
    ask_for(broker, request(nested), request(plain, step_id="s2", attempt=3))
    found = {r.step_id: payloads.load(r.outcome.result) for r in results(broker, 2)}
    assert found["s1"] == [["s1", "nested", 1, "run-1", "flow", 1.0, "acme"]] * 2
    assert found["s2"] == ["s2", "plain", 3, "run-1", "flow", 1.0, "acme"]


def test_a_plain_function_around_an_async_one_is_awaited(broker, start):
    async def inner(x):
        return x + 1

    wrapped = step(name="wrapped")(lambda x: inner(x - 0))
    start()
    ask_for(broker, request(wrapped, 1))
    assert payloads.load(results(broker, 1)[0].outcome.result) == 2


def test_timeouts_end_async_steps_and_give_plain_ones_up(broker, start):
    release, ended = threading.Event(), []

    @step(timeout="30ms")
    async def slow():
        try:
            await asyncio.sleep(9)
        finally:
            ended.append("slow")

    @step(timeout="30ms")
    def stuck():
        release.wait(5)
        ended.append("stuck")
        return 1

    @step(timeout="5s")
    async def own():
        raise TimeoutError("mine")

    start(concurrency=1)
    ask_for(broker, request(slow), request(stuck, step_id="s2"), request(own, step_id="s3"))
    found = {r.step_id: r.outcome for r in results(broker, 3)}
    release.set()
    for s in ("s1", "s2"):
        assert isinstance(to_exception(found[s].error), StepTimeoutError)
        assert not found[s].fatal
    assert found["s3"].error.type == "builtins:TimeoutError"
    until(lambda: ended == ["slow", "stuck"])
    assert len(sent(broker, StepResult)) == 3


# What cannot be run is reported, and stops nothing.


def test_bad_requests_become_dead_letters_and_failures_where_they_can_be_read(broker, start):
    @step
    def greet(name: str) -> str:
        return name

    start()
    broker.append(REQUESTS, b"garbage", key=b"k", partition=0)
    ask_for(
        broker,
        request(None, name="unknown", step_id="s1", timeout=0),
        request(greet, 7, step_id="s2"),
        request(greet, step_id="s3", payload=Payload(content_type="application/msgpack", data=b"\xc1")),
        request(greet, "Ada", step_id="s4"),
    )
    found = {r.step_id: r.outcome for r in results(broker, 4)}
    assert all(isinstance(found[s], StepFailed) and found[s].fatal for s in ("s1", "s2", "s3"))
    assert "'unknown'" in found["s1"].error.message
    assert "'name'" in found["s2"].error.message
    assert isinstance(found["s4"], StepSucceeded)
    letters = sent(broker, DeadLetter, CATALOGUE.dead_letters)
    assert sorted(letter.offset for letter in letters) == [0, 1, 2, 3]
    assert {letter.value for letter in letters if letter.offset == 0} == {b"garbage"}
    until(lambda: committed(broker) == 5)


def test_a_request_of_another_version_fails_the_attempt_that_it_asks_for(broker, start):
    def other_version(of, fingerprint=b"\1" * 8):
        return CODEC.encode(of)[:2] + fingerprint + CODEC.encode(of)[10:] + b"what newer versions add"

    asked = request(None, name="charge", step_id="s1", attempt=2, timeout=0)
    start()
    broker.append(REQUESTS, other_version(asked), key=b"s1", partition=0)
    broker.append(REQUESTS, b"\0\0\0\0\7" + CODEC.encode(asked)[10:], key=b"s1", partition=0)  # Confluent's format
    broker.append(REQUESTS, other_version(asked), key=b"s2", partition=0)  # not what its key says
    broker.append(REQUESTS, CODEC.encode(asked)[:20], key=b"s1", partition=0)
    broker.append(REQUESTS, None, key=b"s1", partition=0)
    until(lambda: committed(broker) == 5)
    found = sent(broker, StepResult)
    assert [(r.run_id, r.step_id, r.attempt, r.fingerprint) for r in found] == [("run-1", "s1", 2, "f")] * 2
    for r in found:
        assert not r.outcome.fatal  # the next attempt may find a worker that knows the version
        assert r.outcome.error.type == "durably.errors:SerializationError"
        assert "step charge cannot be decoded by this worker" in r.outcome.error.message
    assert "unknown schema fingerprint" in found[0].outcome.error.message
    assert len(sent(broker, DeadLetter, CATALOGUE.dead_letters)) == 5


@given(st.binary(), st.binary())
def test_nothing_is_salvaged_from_noise(key, value):
    for mark in (b"", b"\xc3\x01", b"\0"):
        found = salvaged(Message("t", 0, 0, 0, key, mark + value, ()))
        assert found is None or found.step_id.encode() == key


def test_a_worker_that_can_run_nothing_says_so(broker, registry, caplog):
    def told(*queues):
        caplog.clear()
        worker = Worker(broker, CATALOGUE, registry, queues=queues)
        worker._check_steps()
        worker.join()
        return [r.getMessage() for r in caplog.records]

    (message,) = told("default")
    assert "no step is registered" in message
    step(name="render", queue="gpu")(lambda: 1)
    (message,) = told("default", "other")
    assert "serves default, other, but its steps are for gpu" in message
    assert not told("default", "gpu")
    assert not told("gpu.v1"), "what is left of a build"
    assert told("gpus")


def test_a_worker_says_so_only_when_nothing_was_registered_after_a_while(broker, start, monkeypatch, caplog):
    monkeypatch.setattr("durably.worker.worker.SETTLED", 0.05)
    start()
    until(lambda: "no step is registered" in caplog.text)
    caplog.clear()
    start()
    step(name="late")(lambda: 1)
    time.sleep(0.15)
    assert "no step is registered" not in caplog.text


def test_a_result_that_was_not_acknowledged_holds_its_offset_and_is_sent_again(broker, start):
    fine = step(name="fine")(lambda: 1)
    start(heartbeat_every=0.02)
    broker.failing = BrokerError("down")
    ask_for(broker, request(fine))
    time.sleep(0.3)
    assert committed(broker) == 0
    broker.failing = None
    results(broker, 1)
    until(lambda: committed(broker) == 1)


# Asking before running again.


def test_a_request_older_than_the_assignment_is_asked_about_and_run_only_when_open(broker, start):
    ran = []

    @step
    async def work(x: int) -> int:
        ran.append(x)
        out = get_writable()
        await out.write(x)
        return x

    ask_for(broker, *(request(work, i, step_id=f"s{i}") for i in range(4)))
    start()
    until(lambda: len(sent(broker, StepClaim)) == 4)
    assert ran == []
    for claim in sent(broker, StepClaim):
        answer(broker, claim, {"s0": "OPEN", "s1": "LEASED", "s2": "DONE", "s3": "OPEN"}[claim.step_id], 7)
    ask_for(broker, request(work, 9, step_id="s9"))
    found = results(broker, 3)
    assert {r.step_id for r in found} == {"s0", "s3", "s9"}
    assert sorted(ran) == [0, 3, 9]
    writers = {r.step_id: r.streams[0].writer for r in found}
    assert writers == {"s0": "s0/1/7", "s3": "s3/1/7", "s9": "s9/1/1"}
    until(lambda: committed(broker) == 5)


@pytest.mark.parametrize("leaves", [True, False])
def test_an_answer_that_comes_while_its_partition_goes_is_left_to_the_next_owner(
    broker, start, registry, monkeypatch, leaves
):
    ran, answered, go_on, told = [], threading.Event(), threading.Event(), threading.Event()
    work = step(name="work")(lambda: ran.append(1))
    tell = Steps.answered

    def late(self, *args):
        answered.set()
        go_on.wait(5)
        tell(self, *args)
        told.set()

    monkeypatch.setattr(Steps, "answered", late)
    ask_for(broker, request(work), partition=1)
    first = Worker(broker, CATALOGUE, registry, concurrency=1)
    (intake,) = first._intakes
    flush = intake._producer.flush

    def slow_flush(timeout):  # the partition is being given up, and its mark not yet committed
        go_on.set()
        told.wait(5)
        return flush(timeout)

    first.start()
    until(lambda: sent(broker, StepClaim))
    monkeypatch.setattr(intake._producer, "flush", slow_flush)
    answer(broker, sent(broker, StepClaim)[0], "OPEN", 2)
    assert answered.wait(5)
    if leaves:
        first.stop(0)
    start()
    until(lambda: len(sent(broker, StepClaim)) == 2)
    assert told.is_set()
    assert ran == []
    assert intake._capacity.free == 1
    answer(broker, sent(broker, StepClaim)[1], "OPEN", 2)
    results(broker, 1)
    assert ran == [1]
    first.stop(1)
    first.join()


class Ticks:
    """A clock that stands still until told."""

    def __init__(self):
        self.t = 1000.0

    def now(self):
        return int(self.t * 1000)

    def monotonic(self):
        return self.t


class Recorder:
    """Stands for the outbox."""

    def __init__(self):
        self.claims, self.beats = [], []

    def claim(self, attempt, reply_to):
        self.claims.append(reply_to.request_id)

    def heartbeat(self, attempt, ttl, reply_to=None):
        attempt.beat_at = CLOCK.t
        self.beats.append((CLOCK.t, ttl))

    def send_again(self):
        pass


CLOCK = Ticks()


def test_claims_are_sent_again_with_growing_pauses_until_they_are_answered(broker):
    outbox, start_time = Recorder(), CLOCK.t
    replies = Replies(broker, CATALOGUE.replies, codec=CODEC, start_thread=lambda *_: None, clock=CLOCK)
    claims = Claims(replies, outbox, lambda *_: None, clock=CLOCK)
    claims.about("attempt")
    times = []
    while CLOCK.t < start_time + 60:
        before = len(outbox.claims)
        claims.ask(0)
        times += [CLOCK.t - start_time] * (len(outbox.claims) - before)
        CLOCK.t += 0.5
    assert times[:7] == [0, 1, 3, 7, 15, 25, 35]
    assert len(set(outbox.claims)) == 1


# Leases.


def test_heartbeats_begin_after_a_while_and_come_regularly(broker):
    outbox, given_up = Recorder(), []
    attempt = Attempt(request(None, name="s", timeout=0), None, None)
    attempt.started = begun = CLOCK.t
    replies = Replies(broker, CATALOGUE.replies, codec=CODEC, start_thread=lambda *_: None, clock=CLOCK)
    leases = Leases(
        lambda: [attempt],
        outbox,
        replies,
        give_up=given_up.append,
        cancel=lambda _: None,
        after=5,
        every=4,
        ttl=20,
        clock=CLOCK,
    )
    while CLOCK.t < begun + 14:
        CLOCK.t = max(leases.look(), CLOCK.t)
    assert [(t - begun, ttl) for t, ttl in outbox.beats] == [(5, 20), (9, 20), (13, 20)]
    attempt.deadline = CLOCK.t + 0.25
    assert leases.look() == attempt.deadline
    assert not given_up
    CLOCK.t = attempt.deadline
    leases.look()
    assert given_up == [attempt]


def test_a_long_step_becomes_a_lease_and_frees_its_offset_even_while_it_blocks_the_loop(broker, start):
    go = threading.Event()

    @step
    async def rude():
        go.wait(5)

    start(lease_after=0.05)
    ask_for(broker, request(rude))
    until(lambda: committed(broker) == 1 and len(sent(broker, StepHeartbeat)) >= 3)
    beats = sent(broker, StepHeartbeat)
    assert [b.lease_until for b in beats] == sorted(b.lease_until for b in beats)
    assert not sent(broker, StepResult)
    go.set()
    assert isinstance(results(broker, 1)[0].outcome, StepSucceeded)


def test_an_unacknowledged_heartbeat_frees_nothing(broker, start):
    go = threading.Event()
    slow = step(name="slow")(lambda: go.wait(5))
    start(lease_after=0.02, heartbeat_every=0.2, lease_ttl=5.0)
    broker.muted = True
    ask_for(broker, request(slow))
    until(lambda: sent(broker, StepHeartbeat))
    time.sleep(0.3)
    assert committed(broker) == 0
    broker.muted = False
    until(lambda: committed(broker) == 1)
    go.set()


def test_a_rebalance_turns_what_runs_into_leases_and_the_next_owner_asks(broker, start):
    go, ran = threading.Event(), []

    def work(x):
        ran.append(x)
        go.wait(5)
        return x

    work = step(name="work")(work)
    start(concurrency=1)
    ask_for(broker, request(work, 1), request(work, 2, step_id="s2"), partition=1)
    until(lambda: ran == [1])
    time.sleep(0.15)  # the second one waits for a slot
    start()
    until(lambda: sent(broker, StepHeartbeat))
    claim = sent(broker, StepClaim)
    until(lambda: sent(broker, StepClaim))
    (claim,) = sent(broker, StepClaim)
    assert claim.step_id == "s2"  # the first is a lease, released and committed before the partition went
    answer(broker, claim, "OPEN", 2)
    until(lambda: ran == [1, 2])
    go.set()
    assert {r.step_id for r in results(broker, 2)} == {"s1", "s2"}
    until(lambda: committed(broker, 1) == 2)


# Leaving.


def test_a_drain_finishes_what_runs_and_takes_nothing_more(broker, registry):
    go, ran = threading.Event(), []

    def work(x):
        ran.append(x)
        go.wait(5)

    work = step(name="work")(work)
    worker = Worker(broker, CATALOGUE, registry)
    worker.start()
    until(lambda: len(broker.groups["durably.worker.default"].owner) == 2)
    ask_for(broker, request(work, 1))
    until(lambda: ran)
    worker.stop(5)
    time.sleep(0.12)
    ask_for(broker, request(work, 2, step_id="s2"))
    time.sleep(0.12)
    go.set()
    worker.join()
    assert worker.error is None
    assert ran == [1]
    assert [r.step_id for r in sent(broker, StepResult)] == ["s1"]
    assert committed(broker) == 1
    assert not broker.groups["durably.worker.default"].members


def test_what_outlives_the_drain_is_left_to_others_and_its_lease_ended(broker, registry):
    cancelled = []

    @step
    async def endless():
        with contextlib.suppress(BaseException):
            await asyncio.sleep(60)
        cancelled.append(1)

    worker = Worker(broker, CATALOGUE, registry, lease_after=0.05, heartbeat_every=60, lease_ttl=100)
    worker.start()
    until(lambda: len(broker.groups["durably.worker.default"].owner) == 2)
    ask_for(broker, request(endless))
    until(lambda: sent(broker, StepHeartbeat))
    ask_for(broker, request(endless, step_id="s2"), partition=1)
    time.sleep(0.02)
    worker.stop(0)
    worker.join()
    assert worker.error is None
    assert len(cancelled) == 2
    assert not sent(broker, StepResult)
    beats = sent(broker, StepHeartbeat)
    assert beats[-1].lease_until <= time.time() * 1000


@pytest.mark.parametrize("asked", [True, False])
def test_a_queue_that_is_left_takes_nothing_from_another(broker, start, asked):
    begun, go = asyncio.Event(), threading.Event()
    other = CATALOGUE.requests("other")
    broker.create(CATALOGUE.topics(("other",)))

    @step
    async def work():
        begun.set()
        await asyncio.to_thread(go.wait, 5)

    if asked:
        broker.append(other, CODEC.encode(request(work)), key=b"k", partition=0)
    worker = start(queues=("default", "other"))
    until(lambda: len(broker.groups["durably.worker.other"].owner) == 2)
    if not asked:
        broker.append(other, CODEC.encode(request(work)), key=b"k", partition=0)
    until(lambda: sent(broker, StepClaim) if asked else begun.is_set())
    worker._intakes[0].drain(time.monotonic())
    worker._polling[0].join(5)
    assert not worker._polling[0].is_alive()
    for claim in sent(broker, StepClaim):
        answer(broker, claim, "OPEN")
    until(begun.is_set)
    go.set()
    assert isinstance(results(broker, 1)[0].outcome, StepSucceeded)


def test_an_error_of_the_broker_stops_the_worker_and_is_told(broker, registry, monkeypatch):
    worker = Worker(broker, CATALOGUE, registry)
    monkeypatch.setattr(broker, "consumer", lambda *a, **k: (_ for _ in ()).throw(BrokerError("no such topic")))
    worker.start()
    worker.join()
    assert isinstance(worker.error, BrokerError)


def test_a_producer_that_takes_nothing_any_more_stops_the_worker(broker, registry, monkeypatch):
    fine = step(name="fine")(lambda: 1)
    worker = Worker(broker, CATALOGUE, registry, heartbeat_every=0.01)
    worker.start()
    until(lambda: len(broker.groups["durably.worker.default"].owner) == 2)
    check = broker.check

    def refuse(topic, value):
        if topic == CATALOGUE.results:
            raise BrokerError("fatal")
        check(topic, value)

    monkeypatch.setattr(broker, "check", refuse)
    monkeypatch.setattr("durably.worker.outbox.RETRY", 0.001)
    ask_for(broker, request(fine))
    worker.join()
    assert "cannot be sent" in str(worker.error)


def test_a_worker_that_never_started_can_be_let_go(broker, registry):
    worker = Worker(broker, CATALOGUE, registry)
    worker.stop()
    worker.join()
    worker.join()


def test_a_worker_without_room_stays_in_its_group_and_takes_on_later(broker, start, monkeypatch):
    monkeypatch.setattr("durably.worker.intake.HOLD", 0.02)
    go, ran = threading.Event(), []

    def work(x):
        ran.append(x)
        go.wait(5)

    work = step(name="work")(work)
    start(concurrency=2)
    ask_for(broker, *(request(work, i, step_id=f"s{i}") for i in range(9)))
    consumer = broker.groups["durably.worker.default"].members[0]
    until(lambda: consumer.paused)
    assert len(ran) == 2
    go.set()
    results(broker, 9)
    until(lambda: committed(broker) == 9)
    assert not consumer.paused


# Streams.


def chunks(broker):
    return [
        (c.namespace, c.n, c.kind, c.payload and payloads.load(c.payload))
        for c in sent(broker, StreamChunk, CATALOGUE.streams)
    ]


def test_chunks_are_numbered_closed_and_told_of_in_the_result(broker, start):
    @step
    async def talk(out: Writable):
        async with out:
            for i in range(3):
                await out.write(i)
        await get_writable("log").write("said")

    @step
    def talk_sync():
        with get_writable() as out:
            out.write_sync("x")

    start()
    ask_for(broker, request(talk, Writable("run-1", "default")))
    (result,) = results(broker, 1)
    assert chunks(broker) == [
        ("default", 1, "DATA", 0), ("default", 2, "DATA", 1), ("default", 3, "DATA", 2), ("default", 4, "END", None),
        ("log", 1, "DATA", "said"),
    ]  # fmt: skip
    assert [(s.namespace, s.writer, s.first_offset, s.chunks) for s in result.streams] == [
        ("default", "s1/1/1", 0, 3),
        ("log", "s1/1/1", 4, 1),
    ]
    ask_for(broker, request(talk_sync, step_id="s2"))
    assert results(broker, 2)[1].streams[0].chunks == 1


def test_the_result_waits_for_the_last_acknowledgement_and_writing_waits_for_room(broker, start):
    at = []

    @step
    async def talk():
        out = get_writable()
        for i in range(UNACKNOWLEDGED + 1):
            at.append(i)
            await out.write(i)

    start()
    broker.muted = True
    ask_for(broker, request(talk))
    until(lambda: len(at) == UNACKNOWLEDGED + 1)
    time.sleep(0.05)
    assert len(sent(broker, StreamChunk, CATALOGUE.streams)) == UNACKNOWLEDGED
    assert not sent(broker, StepResult)
    broker.muted = False
    assert results(broker, 1)[0].streams[0].chunks == UNACKNOWLEDGED + 1


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        ("close twice", "closed by this step"),
        ("foreign", "belongs to run other"),
        ("opaque", "a chunk for stream"),
        ("large", "a record holds"),
    ],
)
def test_misuse_of_a_stream_fails_the_step_with_a_reason(broker, start, misuse, message):
    broker.max_record_bytes = 2000

    @step
    async def talk():
        out = get_writable()
        match misuse:
            case "close twice":
                await out.close()
                await out.close()
                await out.write(1)
            case "foreign":
                await Writable("other", "x").write(1)
            case "opaque":
                await out.write(object())
            case "large":
                await out.write("x" * 2000)

    start()
    ask_for(broker, request(talk))
    assert message in results(broker, 1)[0].outcome.error.message


def test_a_step_that_was_given_up_writes_nothing_more(broker, start):
    go, errors = threading.Event(), []

    @step(timeout="20ms")
    def stuck():
        go.wait(5)
        try:
            get_writable().write_sync(1)
        except Exception as e:
            errors.append(str(e))

    start()
    ask_for(broker, request(stuck))
    results(broker, 1)
    go.set()
    until(lambda: errors)
    assert "is over" in errors[0]
    assert not chunks(broker)


@pytest.mark.parametrize("fails", [True, False])
@pytest.mark.parametrize("is_async", [True, False])
def test_what_a_step_leaves_running_writes_nothing_behind_its_result(broker, start, is_async, fails):
    reported, refused, left = threading.Event(), [], []

    def go_on():
        reported.wait(5)
        try:
            get_writable().write_sync("late")
        except DurablyError as e:
            refused.append(str(e))

    async def go_on_async():
        await asyncio.to_thread(reported.wait, 5)
        try:
            await get_writable().write("late")
        except DurablyError as e:
            refused.append(str(e))

    @step(name="talk")
    async def talk():
        left.append(asyncio.create_task(go_on_async()))
        await get_writable().write("in time")
        return 1 // (not fails)

    @step(name="talk_sync")
    def talk_sync():
        left.append(threading.Thread(target=contextvars.copy_context().run, args=(go_on,)))
        left[0].start()
        get_writable().write_sync("in time")
        return 1 // (not fails)

    start()
    ask_for(broker, request(talk if is_async else talk_sync))
    (result,) = results(broker, 1)
    reported.set()
    until(lambda: refused)
    assert "await what writes before the step returns" in refused[0]
    assert chunks(broker) == [("default", 1, "DATA", "in time")]
    assert result.streams[0].chunks == 1
    assert isinstance(result.outcome, StepFailed if fails else StepSucceeded)


def test_what_a_step_yields_goes_to_a_stream_whose_handle_is_its_result(broker, start):
    async def count_async(n):
        for i in range(n):
            yield i

    def count(n):
        yield from range(n)

    @step
    async def from_async(n: int):
        return count_async(n)

    @step
    def plain(n: int):
        return count(n)

    @step
    async def generator(n: int) -> AsyncIterator[int]:
        for i in range(n):
            yield i

    @step
    def plain_generator(n: int) -> Iterator[int]:
        yield from range(n)

    @step
    async def broken():
        async for i in count_async(2):
            del i
        return (1 / 0 for _ in range(1))

    start()
    steps = [from_async, plain, generator, plain_generator]
    ask_for(broker, *(request(s, 3, step_id=f"s{i}") for i, s in enumerate(steps)), request(broken, step_id="s9"))
    found = {r.step_id: r for r in results(broker, 5)}
    assert found["s9"].outcome.error.type == "builtins:ZeroDivisionError"
    for step_id in ("s0", "s1", "s2", "s3"):
        (written,) = found[step_id].streams
        assert written.chunks == 3
        kinds = [(n, kind, value) for namespace, n, kind, value in chunks(broker) if namespace == written.namespace]
        assert kinds == [(1, "DATA", 0), (2, "DATA", 1), (3, "DATA", 2), (4, "END", None)]
        assert payloads.load(found[step_id].outcome.result) == Readable("run-1", written.namespace)
