"""What nobody waits for any more is ended, may clean up, and is not reported; what ends by itself is."""

import asyncio
import contextlib
import threading
import time

import msgspec
import pytest
import worker_scene
from durably import cancellation, payloads, runtime
from durably.authoring import step
from durably.broker.port import Message
from durably.cancellation import step_cancelled
from durably.errors import BrokerError, DurablyError
from durably.streams import get_writable
from durably.worker import Worker
from durably_schemas.records import ReplyTo, StepHeartbeat, StepResult, StepSucceeded
from worker_scene import CATALOGUE, answer, ask_for, committed, request, results, sent, until

broker, registry, start = worker_scene.broker, worker_scene.registry, worker_scene.start  # fixtures
pytestmark = pytest.mark.usefixtures("registry")

SOON = {"lease_after": 0.05, "heartbeat_every": 0.05, "lease_ttl": 5.0}


def question(broker, step_id="s1"):
    """The first heartbeat of a step that asks whether it is still wanted."""

    def found():
        return [b for b in sent(broker, StepHeartbeat) if b.step_id == step_id and b.reply_to is not None]

    until(found)
    return found()[0]


def test_an_async_step_is_cancelled_with_a_reason_cleans_up_and_is_not_reported(broker, start):
    seen = []

    @step
    async def endless():
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError as e:
            seen.append((str(e), step_cancelled()))
            await asyncio.sleep(0.05)
            seen.append("clean")
            raise

    @step
    async def after():
        return 1

    start(concurrency=1, **SOON)
    ask_for(broker, request(endless), request(after, step_id="s2"))
    answer(broker, question(broker), "DONE")
    assert [r.step_id for r in results(broker, 1)] == ["s2"]
    assert seen[1:] == ["clean"]
    message, unwanted = seen[0]
    assert unwanted
    assert "step endless (s1, attempt 1) of run run-1" in message
    assert "its workflow cancelled it, or the run has ended" in message
    until(lambda: committed(broker) == 2)
    beats = len([b for b in sent(broker, StepHeartbeat) if b.step_id == "s1"])
    time.sleep(0.15)
    assert len([b for b in sent(broker, StepHeartbeat) if b.step_id == "s1"]) == beats


@pytest.mark.parametrize("what", ["LEASED", "OPEN"])
def test_a_step_that_is_wanted_goes_on(broker, start, what):
    go = asyncio.Event()

    @step
    async def patient():
        await go.wait()
        return step_cancelled()

    worker = start(**SOON)
    ask_for(broker, request(patient))
    for beat in range(3):
        until(lambda beat=beat: len([b for b in sent(broker, StepHeartbeat) if b.reply_to is not None]) > beat)
        answer(broker, question(broker), what)
    worker._loop.call_soon_threadsafe(go.set)
    assert payloads.load(results(broker, 1)[0].outcome.result) is False


def test_an_answer_to_somebody_else_cancels_nothing(broker, start):
    go = threading.Event()
    patient = step(name="patient")(lambda: go.wait(5))
    start(**SOON)
    ask_for(broker, request(patient))
    beat = question(broker)
    stray = msgspec.structs.replace(beat, reply_to=ReplyTo(partition=beat.reply_to.partition, request_id="other"))
    answer(broker, stray, "DONE")
    time.sleep(0.15)
    go.set()
    assert isinstance(results(broker, 1)[0].outcome, StepSucceeded)


def test_what_a_cancelled_step_returns_or_raises_instead_is_dropped(broker, start):
    @step
    async def stubborn():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        return 1

    @step
    async def clumsy():
        try:
            await asyncio.sleep(60)
        finally:
            raise ValueError("in its cleanup")

    start(**SOON)
    ask_for(broker, request(stubborn), request(clumsy, step_id="s2"))
    answer(broker, question(broker), "DONE")
    answer(broker, question(broker, "s2"), "DONE")
    until(lambda: committed(broker) == 2)
    time.sleep(0.1)
    assert not sent(broker, StepResult)


def test_a_cleanup_that_takes_too_long_loses_its_slot(broker, start):
    ended = []

    @step
    async def endless():
        try:
            await asyncio.sleep(60)
        finally:
            try:
                await asyncio.sleep(60)
            finally:
                ended.append(1)

    after = step(name="after")(lambda: 1)
    start(concurrency=1, cancel_grace=0.1, **SOON)
    ask_for(broker, request(endless), request(after, step_id="s2"))
    answer(broker, question(broker), "DONE")
    assert [r.step_id for r in results(broker, 1)] == ["s2"]
    until(lambda: ended)


def test_a_plain_function_is_told_when_it_asks(broker, start):
    @step
    def endless():
        while not step_cancelled():
            time.sleep(0.005)
        return 1

    after = step(name="after")(lambda: 1)
    start(concurrency=1, **SOON)
    ask_for(broker, request(endless), request(after, step_id="s2"))
    answer(broker, question(broker), "DONE")
    assert [r.step_id for r in results(broker, 1)] == ["s2"]
    until(lambda: committed(broker) == 2)


def test_a_plain_function_that_does_not_ask_keeps_its_slot_until_its_timeout(broker, start):
    go = threading.Event()

    @step(timeout="300ms")
    def deaf():
        go.wait(5)

    after = step(name="after")(lambda: 1)
    start(concurrency=1, **SOON)
    ask_for(broker, request(deaf), request(after, step_id="s2"))
    answer(broker, question(broker), "DONE")
    assert not sent(broker, StepResult)
    assert [r.step_id for r in results(broker, 1)] == ["s2"]
    go.set()


def test_the_coroutine_of_a_plain_function_is_cancelled_too(broker, start):
    seen = []

    async def inner(x):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError as e:
            seen.append(str(e))
            raise

    wrapped = step(name="wrapped")(lambda x: inner(x + 1))
    start(**SOON)
    ask_for(broker, request(wrapped, 1))
    answer(broker, question(broker), "DONE")
    until(lambda: committed(broker) == 1 and seen)
    assert "no longer wanted" in seen[0]
    assert not sent(broker, StepResult)


def test_a_plain_function_past_its_timeout_can_see_that(broker, start):
    seen = []

    @step(timeout="30ms")
    def slow():
        while not step_cancelled():
            time.sleep(0.005)
        seen.append(1)

    start()
    ask_for(broker, request(slow))
    assert "longer than 0.03 s" in results(broker, 1)[0].outcome.error.message
    until(lambda: seen)


def test_a_step_that_cancels_itself_has_failed(broker, start):
    @step
    async def resigned():
        asyncio.current_task().cancel()
        await asyncio.sleep(60)

    @step
    async def careless():
        task = asyncio.create_task(asyncio.sleep(60))
        task.cancel()
        await task

    start()
    ask_for(broker, request(resigned), request(careless, step_id="s2"))
    for result in results(broker, 2):
        assert not result.outcome.fatal
        assert result.outcome.error.type.endswith(":CancelledError")
        assert "own code" in result.outcome.error.message


def test_a_cancellation_that_a_failing_step_leaves_behind_does_not_hang_it(broker, start):
    @step
    async def messy():
        await get_writable().write(1)
        asyncio.current_task().cancel()
        raise ValueError("mine")

    start()
    broker.muted = True
    ask_for(broker, request(messy))
    assert results(broker, 1)[0].outcome.error.message == "mine"
    broker.muted = False


def test_what_a_dying_worker_cuts_off_is_not_the_steps_failure(broker, registry, monkeypatch):
    cut_off, running = [], threading.Event()

    @step
    async def endless():
        running.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cut_off.append(1)
            raise

    worker = Worker(broker, CATALOGUE, registry)
    worker.start()
    until(lambda: len(broker.groups["durably.worker.default"].owner) == 2)
    ask_for(broker, request(endless))
    assert running.wait(5)
    (consumer,) = broker.groups["durably.worker.default"].members

    def fail(timeout, limit=500):
        raise BrokerError("gone")

    monkeypatch.setattr(consumer, "poll", fail)
    worker.join()
    assert isinstance(worker.error, BrokerError)
    assert cut_off
    assert not sent(broker, StepResult)


def test_a_cancelled_step_that_outlives_the_drain_is_not_left_to_others(broker, registry):
    @step
    async def stubborn():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        shots.append(1)
        await asyncio.sleep(60)

    shots = []
    worker = Worker(broker, CATALOGUE, registry, **SOON)
    worker.start()
    until(lambda: len(broker.groups["durably.worker.default"].owner) == 2)
    ask_for(broker, request(stubborn))
    answer(broker, question(broker), "DONE")
    until(lambda: shots)
    beats = len(sent(broker, StepHeartbeat))
    worker.stop(0)
    worker.join()
    assert worker.error is None
    assert len(sent(broker, StepHeartbeat)) == beats  # none that ends a lease: nobody is to run it again
    assert not sent(broker, StepResult)
    assert committed(broker) == 1


def test_answers_are_read_again_after_an_error(broker, start, monkeypatch):
    monkeypatch.setattr("durably.worker.replies.FIRST", 0.01)
    errors = [BrokerError("no leader"), BrokerError("no leader")]
    end_offsets, reader = broker.end_offsets, broker.reader

    def flaky_ends(tps, **options):
        if len(errors) > 1 and next(iter(tps)).topic == CATALOGUE.replies:
            raise errors.pop()
        return end_offsets(tps, **options)

    def flaky_reader(positions, **options):
        made = reader(positions, **options)
        poll = made.poll

        def flaky_poll(timeout, limit=500):
            found = poll(timeout, limit)
            if errors and any(isinstance(item, Message) for item in found):
                raise errors.pop()
            return found

        made.poll = flaky_poll
        return made

    monkeypatch.setattr(broker, "end_offsets", flaky_ends)
    monkeypatch.setattr(broker, "reader", flaky_reader)
    ended = threading.Event()

    @step
    async def endless():
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    start(**SOON)
    ask_for(broker, request(endless))
    answer(broker, question(broker), "DONE")  # lost: reading it fails
    until(lambda: not errors)
    asked = len(sent(broker, StepHeartbeat))
    until(lambda: len([b for b in sent(broker, StepHeartbeat)[asked:] if b.reply_to is not None]) > 1)
    answer(broker, sent(broker, StepHeartbeat)[-1], "DONE")
    assert ended.wait(5)


def test_short_steps_ask_nothing_and_nobody_reads_the_answers(broker, start, monkeypatch):
    def refuse(positions, **options):
        raise AssertionError("nobody was asked anything")

    monkeypatch.setattr(broker, "reader", refuse)
    short = step(name="short")(lambda: 1)
    start()
    ask_for(broker, *(request(short, step_id=f"s{i}") for i in range(5)))
    results(broker, 5)
    time.sleep(0.1)
    assert not sent(broker, StepHeartbeat)


def test_elsewhere_nothing_is_ever_cancelled_and_a_workflow_must_not_ask(monkeypatch):
    assert step_cancelled() is False
    monkeypatch.setattr(cancellation, "workflow_context", object)
    with pytest.raises(DurablyError, match="works in a step"):
        step_cancelled()
    assert runtime.step_context.get() is None
