"""The client over a scripted processor: commands, replies, results, streams, listings. No network."""

from __future__ import annotations

import asyncio
import inspect
import threading
from typing import Any

import msgspec
import pytest
from durably import payloads
from durably.authoring import workflow
from durably.broker.port import TP
from durably.client import AsyncClient, AsyncRun, AsyncStarter, Client, Run, Starter, connection, default
from durably.client import run as run_module
from durably.client.connection import Connection
from durably.client.stream import ChunkOrder, StreamReader
from durably.errors import (
    BrokerError,
    BrokerUnreachable,
    ConfigurationError,
    DurablyError,
    RecordTooLarge,
    RunBlockedError,
    RunCancelledError,
    RunFailedError,
    RunNotFoundError,
    SerializationError,
)  # fmt: skip
from durably.failures import to_error
from durably.identifiers import LONGEST_RUN_ID, Ulids, checked_run_id
from durably_schemas import Catalogue, Codec, events
from durably_schemas.catalogue import partition_for
from durably_schemas.records import Error, Event, QueryRun, ReplyTo, ResetRun, StartRun, StreamWritten
from hypothesis import given
from hypothesis import strategies as st
from unit.scripted_broker import UNREADABLE, ScriptedBroker, ScriptedProcessor

ERROR = to_error(ValueError("no such order"))


class Greeting(msgspec.Struct):
    text: str


@workflow
async def greet(name: str, times: int = 1) -> Greeting:
    return Greeting(name * times)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_TICK", 0.01)
    monkeypatch.setattr(run_module, "_STATUS_TIMEOUT", 0.05)


@pytest.fixture
def quick_resends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "FIRST_RESEND", 0.02)


def starts(broker: ScriptedBroker) -> list[StartRun]:
    return [record for record in broker.sent if isinstance(record, StartRun)]


def later(action: Any, *args: Any) -> threading.Timer:
    timer = threading.Timer(0.05, action, args)
    timer.start()
    return timer


# identifiers


@given(st.lists(st.integers(min_value=0, max_value=2**48 - 2), min_size=1, max_size=50))
def test_ulids_rise_strictly_whatever_the_clock_does(instants: list[int]) -> None:
    clock = iter(instants)
    make = Ulids(lambda: next(clock))
    made = [make() for _ in instants]
    assert made == sorted(set(made))
    assert {len(text) for text in made} == {26}


def test_a_ulid_begins_with_its_time() -> None:
    assert Ulids(lambda: 1_469_918_176_385)().startswith("01ARYZ6S41")  # the specification's example


@pytest.mark.parametrize("run_id", ["", "a|b", "a\nb", " a", "hook_1", "x" * (LONGEST_RUN_ID + 1), "\ud800"])
def test_a_run_id_that_no_run_may_have_is_refused_with_the_remedy(run_id: str, client: Client) -> None:
    with pytest.raises(ConfigurationError, match=r"use 1 to 200 .*printable"):
        client.options(run_id=run_id)


@pytest.mark.parametrize("run_id", ["order-7", "Ünïcode 7", "x" * LONGEST_RUN_ID])
def test_other_run_ids_are_taken_as_they_are(run_id: str) -> None:
    assert checked_run_id(run_id) == run_id


# starting


def test_a_start_is_a_record_on_commands_under_the_runs_key(broker: ScriptedBroker, client: Client) -> None:
    run = client.options(run_id="order-7", attributes={"team": "eu"}, delay="10s").start(greet, "Ada", times=2)
    (command,) = starts(broker)
    assert run.id == command.run_id == "order-7"
    assert (command.workflow, command.attributes, command.reply_to) == ("greet", {"team": "eu"}, None)
    assert payloads.load(command.input) == [["Ada"], {"times": 2}]
    assert command.start_at == command.requested_at + 10_000
    tp = TP(broker.catalogue.commands, partition_for(b"order-7", 3))
    assert [m.key for m in broker.logs[tp]] == [b"order-7"]


def test_a_run_without_an_own_id_gets_one(broker: ScriptedBroker, client: Client) -> None:
    first, second = client.start(greet, "Ada"), client.start("greet", "Ada", times=2)
    assert first.id.startswith("wrun_")
    assert first.id < second.id
    assert payloads.load(starts(broker)[1].input) == [["Ada"], {"times": 2}]


def test_arguments_are_checked_before_anything_is_sent(broker: ScriptedBroker, client: Client) -> None:
    with pytest.raises(TypeError, match="tmies"):
        client.start(greet, "Ada", tmies=2)  # type: ignore[call-arg]
    with pytest.raises(SerializationError, match="name"):
        client.start(greet, object())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="no workflow"):
        client.start(print)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="attribute"):
        client.options(attributes={"n": 1})  # type: ignore[dict-item]
    assert broker.sent == []


def test_a_start_that_nobody_acknowledges_is_an_error_that_says_how_to_be_sure(broker: ScriptedBroker) -> None:
    broker.acknowledges = False
    with Client(broker, timeout=0.05) as client, pytest.raises(BrokerUnreachable, match="start again with run_id='a'"):
        client.options(run_id="a").start(greet, "Ada")


def test_a_record_that_is_too_large_is_refused_with_both_sizes(broker: ScriptedBroker, client: Client) -> None:
    with pytest.raises(
        RecordTooLarge, match=r"takes 2\d\d,\d\d\d bytes, and a record holds 100,000: .*pass a reference"
    ):
        client.start(greet, "x" * 200_000)
    assert broker.sent == []


def test_missing_topics_are_named_with_the_command_that_creates_them() -> None:
    with (
        Client(ScriptedBroker(Catalogue(), topics=False)) as client,
        pytest.raises(ConfigurationError, match=r"durably\.commands.*durably topics create"),
    ):
        client.start(greet, "Ada")


# results


def test_a_result_is_waited_for_and_converted_by_the_return_annotation(
    processor: ScriptedProcessor, client: Client
) -> None:
    run = client.start(greet, "Ada")
    later(processor.complete, run.id, {"text": "Ada"})
    assert run.result(timeout=5) == Greeting("Ada")
    assert client.get_run(run.id).result() == Greeting("Ada")  # by the registered workflow's name
    assert run.status() == "completed"


def test_a_failed_run_raises_with_the_workflows_own_exception(processor: ScriptedProcessor, client: Client) -> None:
    run = client.start(greet, "Ada")
    processor.end(run.id, "failed", events.RunFailed(error=ERROR), ERROR)
    with pytest.raises(RunFailedError, match="ValueError: no such order") as failed:
        run.result()
    assert isinstance(failed.value.cause, ValueError)
    assert failed.value.__cause__ is failed.value.cause
    assert failed.value.run_id == run.id


def test_a_cancelled_run_raises(processor: ScriptedProcessor, client: Client) -> None:
    run = client.start(greet, "Ada")
    run.cancel("enough")
    with pytest.raises(RunCancelledError, match=run.id):
        run.result()


def test_a_blocked_run_raises_with_the_reason(processor: ScriptedProcessor, client: Client) -> None:
    run = client.start(greet, "Ada")
    processor.change(run.id, status="blocked", error=Error(type="X", message="expected charge, found refund"))
    with pytest.raises(RunBlockedError, match="expected charge, found refund"):
        run.result()


def test_an_unknown_run_is_an_error_in_every_method(processor: ScriptedProcessor, client: Client) -> None:
    run = client.get_run("nobody")
    for ask in (run.status, run.result, run.cancel, run.events, run.streams, run.describe):
        with pytest.raises(RunNotFoundError, match="nobody"):
            ask()


def test_a_timeout_names_the_run_and_how_far_it_is(processor: ScriptedProcessor, client: Client) -> None:
    run = client.start(greet, "Ada")
    with pytest.raises(TimeoutError, match=rf"run {run.id} has not ended within 0.01 s: it is running"):
        run.result(timeout=0.01)


def test_no_processor_is_said_to_be_missing(broker: ScriptedBroker) -> None:
    with Client(broker, timeout=0.01) as client, pytest.raises(TimeoutError, match=r"partition \d.*durably processor"):
        client.get_run("a").status()


# asking


@pytest.mark.usefixtures("quick_resends")
def test_a_question_is_sent_again_with_the_same_request_id_until_it_is_answered(
    broker: ScriptedBroker, processor: ScriptedProcessor, client: Client
) -> None:
    processor.start("a")
    processor.deaf = 3
    assert client.get_run("a").status() == "running"
    assert len({q.reply_to for q in broker.sent if isinstance(q, QueryRun)}) == 1
    assert len(broker.sent) == 4


@pytest.mark.usefixtures("quick_resends")
def test_nothing_is_sent_again_while_a_copy_is_on_its_way_nor_once_nobody_waits(
    broker: ScriptedBroker, processor: ScriptedProcessor, client: Client
) -> None:
    processor.deaf = 100
    broker.acknowledges = False
    with pytest.raises(TimeoutError):
        client.get_run("a").result(timeout=0.1)
    assert next(q.what for q in broker.sent if isinstance(q, QueryRun)) == "RESULT"
    assert len([q for q in broker.sent if isinstance(q, QueryRun) and q.what == "RESULT"]) == 1


def test_the_reply_partition_is_read_from_its_end_and_foreign_replies_are_ignored(
    broker: ScriptedBroker, processor: ScriptedProcessor, client: Client
) -> None:
    processor.start("a")
    for partition in range(3):
        broker.logs[TP(broker.catalogue.replies, partition)].append(None)  # type: ignore[arg-type]  # would not decode
    assert client.get_run("a").status() == "running"
    partition = client._connection.listen()
    processor.reply(ReplyTo(partition=partition, request_id="foreign"), processor_reply := _reply())
    assert processor_reply.status == "OK"
    assert client.get_run("a").status() == "running"


def _reply() -> Any:
    from durably_schemas.records import Reply

    return Reply(request_id="")


def test_a_broken_reader_fails_who_waits_and_the_next_question_gets_a_new_one(
    broker: ScriptedBroker, processor: ScriptedProcessor, client: Client
) -> None:
    run = client.start(greet, "Ada")

    def break_reader() -> None:
        with broker.changed:
            broker.breaks = UNREADABLE
            broker.changed.notify_all()

    later(break_reader)
    with pytest.raises(BrokerError, match="the reader is broken"):
        run.result()
    broker.breaks = None
    assert run.status() == "running"


def test_closing_fails_who_waits_and_a_closed_client_says_so(
    broker: ScriptedBroker, processor: ScriptedProcessor
) -> None:
    client = Client(broker)
    run = client.start(greet, "Ada")
    later(client.close)
    with pytest.raises(DurablyError, match="closed"):
        run.result()
    with pytest.raises(DurablyError, match="make a new one"):
        client.start(greet, "Ada")
    client.close()
    assert not broker.closed  # it was not the client's own


# the log, the listing


def test_events_come_in_order_over_all_pages(processor: ScriptedProcessor, client: Client) -> None:
    processor.page = 2
    run = client.start(greet, "Ada")
    for _ in range(4):
        processor.event(run.id, events.RunStarted())
    assert [event.seq for event in run.events()] == [1, 2, 3, 4, 5]


def test_streams_names_what_completed_steps_wrote(processor: ScriptedProcessor, client: Client) -> None:
    run = client.start(greet, "Ada")
    for names in (("log", "default"), ("log",)):
        written = tuple(
            StreamWritten(namespace=name, writer="w", partition=0, first_offset=0, chunks=1) for name in names
        )
        result = payloads.dump(None, "result")
        processor.event(run.id, events.StepCompleted(attempt=1, result=result, streams=written), "step_1")
    assert run.streams() == ["log", "default"]


def test_runs_are_listed_by_their_latest_summary_newest_first(processor: ScriptedProcessor, client: Client) -> None:
    for number in range(6):
        processor.start(f"r{number}", workflow="greet" if number % 2 else "other")
        processor.change(f"r{number}", created_at=1000 + number, attributes={"team": "eu" if number < 3 else "us"})
    processor.complete("r1", None)
    assert [s.run_id for s in client.runs()] == ["r5", "r4", "r3", "r2", "r1", "r0"]
    assert [s.run_id for s in client.runs(limit=2)] == ["r5", "r4"]
    assert [s.run_id for s in client.runs(workflow="greet")] == ["r5", "r3", "r1"]
    assert [s.run_id for s in client.runs(status="completed")] == ["r1"]
    assert [s.run_id for s in client.runs(status={"completed", "running"}, attributes={"team": "eu"})] == [
        "r2",
        "r1",
        "r0",
    ]


# streams


def test_a_stream_is_followed_to_its_end(processor: ScriptedProcessor, client: Client) -> None:
    run = client.start(greet, "Ada")
    processor.chunk(run.id, "default", 0, "a")

    def go_on() -> None:
        processor.chunk(run.id, "other", 0, "not this one")
        processor.chunk("somebody else", "default", 0, "nor this one")
        processor.chunk(run.id, "default", 1, {"b": 1})
        processor.chunk(run.id, "default", 2, end=True)
        processor.chunk(run.id, "default", 3, "after the end")

    later(go_on)
    assert list(run.stream()) == ["a", {"b": 1}]


def test_copies_are_dropped_and_another_attempts_chunks_are_not(processor: ScriptedProcessor, client: Client) -> None:
    run = client.start(greet, "Ada")
    for writer, n in (("s/1/1", 0), ("s/1/1", 1), ("s/1/1", 0), ("s/1/1", 1), ("s/2/1", 0), ("s/2/1", 1)):
        processor.chunk(run.id, "default", n, f"{writer}:{n}", writer=writer)
    processor.chunk(run.id, "", 0, writer="end", end=True)
    assert list(run.stream()) == ["s/1/1:0", "s/1/1:1", "s/2/1:0", "s/2/1:1"]
    assert list(run.stream(start_index=2)) == ["s/2/1:0", "s/2/1:1"]


@pytest.mark.parametrize(("start", "seen"), [(-2, "cd!"), (-4, "abcd!"), (-9, "abcd!"), (4, "!"), (9, "")])
def test_a_start_index_counts_from_either_end(
    start: int, seen: str, processor: ScriptedProcessor, client: Client
) -> None:
    run = client.start(greet, "Ada")
    for n, letter in enumerate("abcd"):
        processor.chunk(run.id, "log", n, letter)

    def go_on() -> None:
        processor.chunk(run.id, "log", 4, "!")
        processor.chunk(run.id, "", 0, writer="end", end=True)

    later(go_on)
    assert "".join(run.stream("log", start)) == seen


def test_the_end_as_of_now_is_not_moved_by_chunks_that_come_meanwhile(
    broker: ScriptedBroker, processor: ScriptedProcessor, client: Client
) -> None:
    processor.start("a")
    for n, letter in enumerate("abc"):
        processor.chunk("a", "default", n, letter)
    reader = StreamReader(client._connection, "a", None, -1, Run)
    reader._tail = reader._open()
    processor.chunk("a", "default", 3, "d")
    assert reader.next_batch() == ["c", "d"]
    reader.close()


def test_a_stream_that_was_never_written_ends_with_the_run(processor: ScriptedProcessor, client: Client) -> None:
    run = client.start(greet, "Ada")
    later(processor.complete, run.id, None)
    assert list(run.stream()) == []
    assert list(run.stream()) == []  # and at once when the run has ended before


def test_what_a_step_wrote_before_the_run_ended_is_read_also_without_an_end(
    processor: ScriptedProcessor, client: Client
) -> None:
    run = client.start(greet, "Ada")

    def go_on() -> None:
        processor.chunk(run.id, "default", 0, "a")
        processor.complete(run.id, None)

    later(go_on)
    assert list(run.stream()) == ["a"]


def test_a_stream_may_be_awaited_before_its_run_is_started(processor: ScriptedProcessor, client: Client) -> None:
    def go_on() -> None:
        processor.start("late")
        processor.chunk("late", "default", 0, "a")
        processor.complete("late", None)

    later(go_on)
    assert list(client.get_run("late").stream()) == ["a"]


def test_reading_below_the_retained_head_is_an_error_and_no_renumbering(
    broker: ScriptedBroker, processor: ScriptedProcessor, client: Client
) -> None:
    run = client.start(greet, "Ada")
    for n in range(3):
        processor.chunk(run.id, "default", n, n)
    partition = partition_for(run.id.encode(), 3)
    written = StreamWritten(namespace="default", writer="w", partition=partition, first_offset=0, chunks=3)
    result = payloads.dump(None, "result")
    processor.event(run.id, events.StepCompleted(attempt=1, result=result, streams=(written,)), "step_1")
    processor.complete(run.id, None)
    broker.heads[TP(broker.catalogue.streams, partition)] = 2
    with pytest.raises(DurablyError, match=r"the beginning of stream 'default'.* is gone.*retention.ms"):
        next(run.stream())
    assert list(run.stream("other")) == []


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 4)), max_size=30), st.data())
def test_repeating_what_came_before_changes_nothing(chunks: list[tuple[str, int]], data: st.DataObject) -> None:
    def accepted(written: list[tuple[str, int]]) -> list[tuple[str, int]]:
        order, found = ChunkOrder("default"), []
        for writer, n in written:
            record = _chunk(writer, n)
            if order.accept(record) is not None:
                found.append((writer, n))
        return found

    chunks = [("a", 0), ("b", 0), *chunks]
    again = data.draw(st.integers(0, len(chunks)))
    assert accepted(chunks[:again] + chunks[:again] + chunks[again:]) == accepted(chunks)


def _chunk(writer: str, n: int) -> Any:
    from durably_schemas.records import StreamChunk

    payload = payloads.dump(n, "chunk")
    return StreamChunk(run_id="a", namespace="default", writer=writer, n=n, kind="DATA", at=0, payload=payload)


# the twins


@pytest.mark.parametrize(("sync", "twin"), [(Client, AsyncClient), (Run, AsyncRun), (Starter, AsyncStarter)])
def test_the_twins_have_the_same_names_in_the_same_order(sync: type, twin: type) -> None:
    def public(cls: type) -> list[tuple[str, list[str]]]:
        return [
            (name, list(inspect.signature(method).parameters))
            for name, method in vars(cls).items()
            if not name.startswith("_") and callable(method)
        ]

    assert public(sync) == public(twin)


def test_the_async_twin_does_the_same(broker: ScriptedBroker, processor: ScriptedProcessor) -> None:
    async def go() -> None:
        async with AsyncClient(broker, timeout=5) as client:
            run = await client.options(run_id="a").start(greet, "Ada")
            assert await run.status() == "running"
            waiting = asyncio.create_task(run.result())
            processor.chunk("a", "default", 0, "x")
            await asyncio.sleep(0.02)
            processor.complete("a", {"text": "Ada"})
            assert await waiting == Greeting("Ada")
            assert [value async for value in run.stream()] == ["x"]
            assert [e.type for e in await run.events()] == ["run_created", "run_completed"]
            assert [s.run_id for s in await client.runs()] == ["a"]
            assert await run.streams() == []
            await run.cancel()
            with pytest.raises(RunNotFoundError):
                await client.get_run("b").result()
            other = await client.start("greet", "Ada")
            with pytest.raises(TimeoutError, match="it is running"):
                await other.result(timeout=0.01)

    asyncio.run(go())


def test_an_async_stream_that_is_left_early_leaves_nothing_behind(
    broker: ScriptedBroker, processor: ScriptedProcessor
) -> None:
    async def go() -> None:
        async with AsyncClient(broker, timeout=5) as client:
            processor.start("a")
            processor.chunk("a", "default", 0, "x")
            stream = client.get_run("a").stream()
            assert await anext(stream) == "x"
            await stream.aclose()  # type: ignore[attr-defined]

    asyncio.run(go())


def test_a_question_nobody_waits_for_is_forgotten(broker: ScriptedBroker, processor: ScriptedProcessor) -> None:
    async def go() -> Connection:
        async with AsyncClient(broker, timeout=5) as client:
            processor.start("a")
            waiting = asyncio.create_task(client.get_run("a").result())
            await asyncio.sleep(0.05)
            assert len(client._connection._questions) == 1
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            await asyncio.sleep(0)
            assert client._connection._questions == {}
            return client._connection

    asyncio.run(go())


def test_the_default_client_is_made_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DURABLY_URL", raising=False)
    with pytest.raises(ConfigurationError, match="DURABLY_URL"):
        default.get_run("a")


def test_a_run_is_started_again_with_the_same_input_and_attributes(
    broker: ScriptedBroker, processor: ScriptedProcessor, client: Client
) -> None:
    first = client.options(attributes={"team": "eu"}).start(greet, "Ada", times=2)
    second = first.rerun()
    third = first.rerun(run_id="again")
    assert third.id == "again"
    before, *after = starts(broker)
    assert [s.run_id for s in after] == [second.id, "again"]
    for made in after:
        assert (made.workflow, made.input, made.attributes) == (before.workflow, before.input, before.attributes)
    later(processor.complete, second.id, {"text": "Ada"})
    assert second.result(timeout=5) == Greeting("Ada")
    with pytest.raises(RunNotFoundError):
        client.get_run("nobody").rerun()
    fourth = client.rerun(first.id, new_id="fourth")
    assert (fourth.id, starts(broker)[-1].input) == ("fourth", before.input)
    assert [s.rerun_of for s in starts(broker)] == [None, first.id, first.id, first.id]


def test_a_reset_that_nobody_answers_names_the_run_that_may_come_of_it(broker: ScriptedBroker) -> None:
    async def asked() -> None:
        async with AsyncClient(broker, timeout=0.01) as client:
            await client.reset("a", 3)

    with Client(broker, timeout=0.01) as client:
        for act in (lambda: client.reset("a", 3), lambda: asyncio.run(asked())):
            with pytest.raises(
                TimeoutError, match=r"the reset of run a as run wrun_[^ ]*, which may come through"
            ) as e:
                act()
            new = next(record.new_run_id for record in reversed(broker.sent) if isinstance(record, ResetRun))
            assert new in str(e.value)


def test_every_start_has_a_nonce_of_its_own(broker: ScriptedBroker, client: Client) -> None:
    for _ in range(3):
        client.start(greet, "Ada")
    nonces = {command.nonce for command in starts(broker)}
    assert len(nonces) == 3
    assert min(map(len, nonces)) >= 22


def test_attributes_that_are_too_long_in_all_are_refused_with_the_remedy(client: Client) -> None:
    client.options(attributes={"a": "x" * 16_383})
    with pytest.raises(ConfigurationError, match=r"a, b have 16,385 characters.*pass long texts as arguments"):
        client.options(attributes={"a": "x" * 16_382, "b": "x"})


def test_scripted_events_are_what_the_codec_reads(processor: ScriptedProcessor) -> None:
    processor.start("a")
    log = processor.broker.logs[TP(processor.catalogue.events, partition_for(b"a", 3))]
    assert [Codec().decode_as(Event, message.value).seq for message in log] == [1]
