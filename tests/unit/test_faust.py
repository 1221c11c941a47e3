"""The parts of the Faust connectors, each by itself: no Kafka, and no Faust where it has no say."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import MutableMapping
from io import BytesIO
from types import SimpleNamespace

import fastavro
import msgspec
import pytest
from aiohttp import web
from durably.cli import connectors as command
from durably.errors import (
    BrokerUnreachable,
    ConfigurationError,
    DurablyError,
    Fenced,
    HookNotFoundError,
    RecordTooLarge,
    RunNotFoundError,
)
from durably.identifiers import checked_run_id
from durably.settings import Settings
from durably_connectors.faust import (
    IGNORE,
    App,
    KafkaTopic,
    Message,
    Outcome,
    Row,
    SqlTable,
    declared,
    delivery,
    intake,
    monitor,
    monitors,
    server,
    sink,
    sql,
    tally,
    transport,
    trigger,
    triggers,
    values,
)
from durably_connectors.faust.credentials import credentials
from durably_connectors.faust.delivery import Delivery
from durably_connectors.faust.intake import Intake, Later, tried
from durably_connectors.faust.transport import Ledger
from durably_schemas import Catalogue, Codec
from durably_schemas import events as ev
from durably_schemas.codec import MARKER, fingerprint_of
from durably_schemas.records import DeadLetter, Error, Payload, RunSummary, StartRun
from fake_broker import FakeBroker
from faust.events import Event
from faust.exceptions import ValueDecodeError
from faust.types import TP
from faust.types.tuples import ConsumerMessage
from hypothesis import given
from hypothesis import strategies as st
from mode.utils.queues import FlowControlEvent
from sqlalchemy import create_engine, text
from sqlalchemy.dialects import postgresql
from typer.testing import CliRunner

CATALOGUE = Catalogue(partitions=2)
CODEC = Codec()
NOTHING = Payload(content_type="application/json", data=b"null")


def message(value=b"{}", *, offset=7, key=None, topic="orders") -> Message:
    return Message(
        topic=topic, partition=3, offset=offset, timestamp=1_700_000_000_000, key=key, value=value, headers={}
    )


@pytest.fixture(autouse=True)
def _hurry(monkeypatch):
    monkeypatch.setattr(intake, "RETRY", 0.001)
    monkeypatch.setattr(delivery, "RETRY", 0.001)
    monkeypatch.setattr(triggers, "_LOOK_AGAIN", 0.001)


@pytest.fixture
def fresh(monkeypatch):
    """Nothing is declared yet."""
    registry = declared.Connectors()
    for module in (triggers, monitors):
        monkeypatch.setattr(module, "declared", registry)
    monkeypatch.setattr("durably_connectors.faust.sinks.declared", registry)
    return registry


@pytest.fixture
def broker():
    broker = FakeBroker()
    broker.create(CATALOGUE.topics())
    return broker


def letters(broker) -> list[DeadLetter]:
    return [CODEC.decode_as(DeadLetter, m.value) for m in broker.records(CATALOGUE.dead_letters)]


# -- what may be committed ---------------------------------------------------------------------------------------------

PARTITION = TP("orders", 0)
CHANGELOG = TP("shop-known-changelog", 0)


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=30),
    st.lists(st.integers(0, 40), max_size=80),
)
def test_nothing_is_committed_beyond_a_record_that_is_not_done(gaps, choices):
    ledger, given_out, undone, offset = Ledger(), [], [], 0
    assert ledger.committable(PARTITION) is None
    for choice in choices or [0]:
        if choice % 2 and undone:
            ledger.acknowledged(PARTITION, undone.pop(choice % len(undone)))
        elif len(given_out) < len(gaps):
            offset += gaps[len(given_out)]  # markers of transactions, aborted and compacted records lie between
            ledger.handed_out(PARTITION, offset)
            given_out.append(offset)
            undone.append(offset)
        if given_out:
            assert ledger.committable(PARTITION) == (min(undone) if undone else given_out[-1] + 1)


class Faked(transport.Consumer):
    """A consumer without Kafka: the records of one partition, whose committed offset is given."""

    def __init__(self, committed):
        self.app = SimpleNamespace(
            topics=SimpleNamespace(acks_enabled_for=lambda topic: topic == PARTITION.topic),
            tables=SimpleNamespace(changelog_topics={CHANGELOG.topic}),
            consumer_generation_id=1,
            flow_control=FlowControlEvent(initially_suspended=False),
        )
        self.given_out: list[SimpleNamespace] = []
        self.sought: list[TP] = []
        self._at = committed
        self._ledger, self._unacked_messages, self._n_acked = Ledger(), set(), 0
        self._read_offset, self._committed_offset = {PARTITION: committed}, {PARTITION: committed}
        self._thread = SimpleNamespace(seek_to_beginning=self._begin)

    async def _deliver(self, message):
        self.given_out.append(message)

    async def _begin(self, *tps):
        self.sought += tps

    async def seek_to_committed(self):
        return {PARTITION: self._at, CHANGELOG: None}

    async def read(self, *offsets):
        """Hands records out as Faust does: told of each gap first."""
        last = None
        for offset in offsets:
            if last is not None and offset - last > 1:
                await self._add_gap(PARTITION, last + 1, offset)
            found = Named(topic=PARTITION.topic, tp=PARTITION, offset=offset, acked=False, generation_id=1)
            await self._hand_out(found)
            last = offset

    def done(self, *offsets):
        for message in self.given_out:
            if message.offset in offsets:
                assert self.ack(message)
                assert not self.ack(message)


class Named(SimpleNamespace):
    """A message; one is not another."""

    __hash__ = object.__hash__


@pytest.mark.parametrize(
    ("committed", "read", "done", "commits"),
    [
        (31, [31, 32], [32], 31),  # Faust itself commits 33 here,
        (None, [0, 1, 5], [1, 5], 0),  # 6,
        (None, [0, 2, 3], [0, 3], 2),  # and 4: the record behind a transaction's marker is lost in a crash
        (None, [0, 2, 3], [0, 2, 3], 4),
    ],
)
def test_a_consumer_commits_no_hole(committed, read, done, commits):
    consumer = Faked(committed)
    asyncio.run(consumer.read(*read))
    consumer.done(*done)
    assert list(consumer._filter_tps_with_pending_acks()) == [PARTITION]
    assert consumer._new_offset(PARTITION) == commits


@pytest.mark.parametrize(("committed", "begins"), [(None, [PARTITION]), (0, [PARTITION]), (4, [])])
def test_a_partition_without_a_committed_offset_is_read_from_its_beginning_again(committed, begins):
    consumer = Faked(committed)

    async def scenario():
        await consumer.read(4, 5)
        await consumer.perform_seek()

    asyncio.run(scenario())
    assert consumer.sought == begins  # and no changelog, which is read by itself
    assert consumer._read_offset[PARTITION] == consumer._committed_offset[PARTITION] == (committed or None)
    assert consumer._new_offset(PARTITION) is None


def test_what_a_rebalance_skips_is_acknowledged_and_not_committed():
    consumer = Faked(None)
    asyncio.run(consumer.read(0, 1, 2))
    consumer.done(0)
    consumer.app.flow_control.suspend()
    consumer.done(1)
    consumer.app.flow_control.resume()
    assert consumer._new_offset(PARTITION) == 1
    consumer.app.consumer_generation_id = 2
    consumer.done(2)
    asyncio.run(consumer.read(1, 2))  # again
    assert consumer._new_offset(PARTITION) == 1


def unconnected(scenario) -> None:
    """Runs a scenario with an app that takes records, but for Kafka."""

    async def whole():
        app = App("shop", Settings(url="kafka://a:1"))
        app.consumer_generation_id = 1
        app.flow_control.resume()
        await scenario(app)
        app.consumer._thread.thread_loop.close()

    asyncio.run(whole())


def test_what_a_stream_of_ones_own_has_passed_may_be_committed():
    async def scenario(app):
        app.consumer._ledger.handed_out(PARTITION, 5)
        channel = app.raw("orders").clone(is_iterator=True)
        app.topics._acking_topics.add("orders")
        found = ConsumerMessage("orders", 0, 5, 1.0, 0, [], b"k", b"v", None, tp=PARTITION, generation_id=1)
        found.incref()
        await channel.put(Event(app, b"k", b"v", [], found))
        records = aiter(app.stream(channel))
        assert await anext(records) == b"v"
        assert app.consumer._new_offset(PARTITION) == 5
        await records.aclose()
        assert app.consumer._new_offset(PARTITION) == 6

    unconnected(scenario)


def test_a_partition_that_goes_leaves_nothing_of_itself(monkeypatch):
    async def scenario(app):
        consumer, done = app.consumer, []

        async def note(*of):
            done.append(of)

        monkeypatch.setattr(consumer, "commit", note)
        monkeypatch.setattr(consumer, "_on_partitions_revoked", note)
        consumer._ledger.handed_out(PARTITION, 5)
        consumer._buffered_partitions.add(PARTITION)
        assert consumer.flow_active
        await consumer.on_partitions_revoked({PARTITION})
        assert done == [(), ({PARTITION},)]  # committed first
        assert not consumer.flow_active
        assert not app.flow_control.is_active()
        assert consumer._ledger.committable(PARTITION) is None
        consumer.on_buffer_drop(PARTITION)  # its queue has room again
        assert PARTITION not in consumer._active_partitions

    unconnected(scenario)


def test_streams_are_given_nothing_between_their_tables_and_their_offsets():
    async def scenario(app):
        told = []

        def note(what):
            def noted(*_):
                told.append((what, app.consumer.flow_active, app.flow_control.is_active()))

            return noted

        async def seek():
            note("sought")()

        async def fetch():
            note("fetches")()

        consumer = app.consumer
        consumer.assignment = lambda: {PARTITION}
        consumer.resume_partitions, consumer.perform_seek = note("opened"), seek
        app._fetcher = SimpleNamespace(maybe_start=fetch)
        consumer.resume_flow()  # for the changelogs
        await app.tables.recovery.on_recovery_completed(1)
        assert told == [("opened", False, False), ("sought", False, False), ("fetches", True, True)]

    unconnected(scenario)


def test_tables_are_waited_for_however_long_kafka_takes():
    async def scenario(app):
        answered = asyncio.get_running_loop().create_future()
        waiting = asyncio.create_task(app.tables.recovery._wait(answered, timeout=0.01))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        answered.set_result(None)
        await waiting

    unconnected(scenario)


def test_a_flush_waits_for_every_acknowledgement_and_tells_of_one_that_failed(monkeypatch):
    taken = []
    monkeypatch.setattr(transport.aiokafka.Producer, "send_soon", lambda _, fut: taken.append(fut))

    async def scenario(app):
        producer = app.producer
        await producer.flush()
        for _ in range(2):
            producer.send_soon(asyncio.get_running_loop().create_future())
        flushing = asyncio.create_task(producer.flush())
        taken[0].set_result(None)
        await asyncio.sleep(0.2)  # Faust gives up after half of this
        assert not flushing.done()
        taken[1].set_result(None)
        await flushing
        producer.send_soon(asyncio.get_running_loop().create_future())
        taken[2].set_exception(OSError("lost"))
        for _ in range(2):  # what is lost stays so
            with pytest.raises(OSError, match="lost"):
                await producer.flush()

    unconnected(scenario)


def test_a_flush_does_not_wait_for_a_producer_that_has_crashed(monkeypatch):
    monkeypatch.setattr(transport.aiokafka.Producer, "send_soon", lambda _, fut: None)

    async def scenario(app):
        app.producer.send_soon(asyncio.get_running_loop().create_future())
        flushing = asyncio.create_task(app.producer.flush())
        await asyncio.sleep(0.01)
        await app.producer.buffer.crash(OSError("too large"))
        with pytest.raises(OSError, match="too large"):
            await flushing
        assert app.crashed
        await app._producer_flush(app.log)  # nothing keeps it from ending

    unconnected(scenario)


def test_what_is_acknowledged_after_a_rebalance_commits_nothing():
    ledger = Ledger()
    ledger.handed_out(PARTITION, 5)
    ledger.forget([PARTITION])
    ledger.acknowledged(PARTITION, 5)
    assert ledger.committable(PARTITION) is None
    assert ledger.partitions() == []


# -- intake ------------------------------------------------------------------------------------------------------------


class Stream:
    """Events of a Faust stream, as far as an intake looks at them."""

    def __init__(self, messages):
        self.acked: list[int] = []
        self._messages = messages

    def noack(self):
        return self

    async def events(self):
        for m in self._messages:
            raw = SimpleNamespace(
                topic=m.topic, partition=m.partition, offset=m.offset, timestamp=m.timestamp / 1000, key=m.key,
                value=m.value, headers=[("a", b"1"), ("b", None)],
            )  # fmt: skip
            yield SimpleNamespace(message=raw, ack=lambda m=m: self.acked.append(m.offset))


class Handler:
    """Does with each message what a test says; notes the order of beginnings and ends."""

    name = "handler"

    def __init__(self, does):
        self.does = does
        self.notes: list[tuple[str, int]] = []

    def lane(self, message):
        return message.key

    async def handle(self, message):
        self.notes.append(("begin", message.offset))
        await self.does(message)
        self.notes.append(("end", message.offset))


async def taken_in(broker, stream, handler):
    out = Delivery(broker, CATALOGUE)
    running = Intake(handler, out)
    try:
        await running.run(stream)
        await running.drain(5)
    finally:
        await out.close()


def test_a_record_is_acknowledged_when_it_is_done_and_not_when_its_handler_raised_for_now(broker):
    attempts = {1: 3, 2: 1}

    async def does(message):
        assert message.headers == {"a": b"1", "b": b""}
        assert message.timestamp == 1_700_000_000_000
        attempts[message.offset] -= 1
        if attempts[message.offset]:
            assert message.offset not in stream.acked
            raise Later("the engine is away")

    stream = Stream([message(offset=1), message(offset=2)])
    asyncio.run(taken_in(broker, stream, Handler(does)))
    assert attempts == {1: 0, 2: 0}
    assert sorted(stream.acked) == [1, 2]
    assert letters(broker) == []


def test_what_cannot_be_handled_is_a_dead_letter_before_it_is_acknowledged(broker):
    async def does(message):
        raise ValueError("no order")

    stream = Stream([message(b"poison", offset=4, key=b"k")])
    broker.failing = BrokerUnreachable("away")

    async def scenario():
        task = asyncio.create_task(taken_in(broker, stream, Handler(does)))
        await asyncio.sleep(0.05)
        assert stream.acked == []  # the broker is away, and the message waits
        broker.failing = None
        await task

    asyncio.run(scenario())
    assert stream.acked == [4]
    (letter,) = letters(broker)
    assert (letter.topic, letter.partition, letter.offset, letter.key, letter.value) == (
        "orders",
        3,
        4,
        b"k",
        b"poison",
    )
    assert (letter.reason, letter.component) == ("ValueError: no order", "handler")


def test_messages_with_one_key_are_handled_in_their_order_and_others_meanwhile(broker):
    release = asyncio.Event()

    async def does(message):
        if message.offset == 1:
            await release.wait()
        if message.offset == 3:
            release.set()

    handler = Handler(does)
    stream = Stream([message(offset=1, key=b"a"), message(offset=2, key=b"a"), message(offset=3, key=b"b")])
    asyncio.run(taken_in(broker, stream, handler))
    assert handler.notes.index(("end", 3)) < handler.notes.index(("end", 1)) < handler.notes.index(("begin", 2))


def test_what_takes_too_long_at_the_end_is_given_up_unacknowledged(broker):
    async def scenario():
        out = Delivery(broker, CATALOGUE)
        stream = Stream([message()])
        running = Intake(Handler(lambda _: asyncio.sleep(3600)), out)
        await running.run(stream)
        await running.drain(0.01)
        await out.close()
        return stream.acked

    assert asyncio.run(scenario()) == []


def test_what_comes_at_the_end_is_left_for_the_next_process(broker):
    begun = asyncio.Event()

    async def does(message):
        begun.set()

    async def scenario():
        out = Delivery(broker, CATALOGUE)
        stream = Stream([message()])
        handler = Handler(does)
        running = Intake(handler, out)
        await running.drain(1)
        await running.run(stream)
        await out.close()
        return handler.notes, stream.acked

    assert asyncio.run(scenario()) == ([], [])
    assert not begun.is_set()


# -- delivery ----------------------------------------------------------------------------------------------------------


def test_a_producer_that_failed_for_good_is_replaced(broker):
    async def scenario():
        out = Delivery(broker, CATALOGUE)
        before = out._producer
        broker.failing = Fenced("another process")
        sending = asyncio.create_task(out.send(CATALOGUE.commands, b"x", b"k"))
        async with asyncio.timeout(5):
            while out._producer is before:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.001)
        broker.failing = None
        await sending
        await out.close()

    asyncio.run(scenario())
    assert [m.value for m in broker.records(CATALOGUE.commands)] == [b"x"]


def test_a_message_that_is_too_large_for_a_dead_letter_leaves_one_that_says_where_it_lies(broker):
    broker.max_record_bytes = 2_000

    async def scenario():
        out = Delivery(broker, CATALOGUE)
        with pytest.raises(RecordTooLarge):
            await out.send(CATALOGUE.commands, b"x" * 2_000)
        await out.dead_letter(message(b"x" * 2_000, offset=9), "too large", "t")
        await out.close()

    asyncio.run(scenario())
    (letter,) = letters(broker)
    assert (letter.offset, letter.value, letter.reason) == (9, None, "too large")


# -- values ------------------------------------------------------------------------------------------------------------

ORDER = {"type": "record", "name": "Order", "fields": [{"name": "number", "type": "long"}]}


def avro(value, schema=ORDER) -> bytes:
    body = BytesIO()
    fastavro.schemaless_writer(body, fastavro.parse_schema(schema), value)
    return body.getvalue()


def decoded(form, data, schema=None):
    return asyncio.run(values.decoder(form, schema)(data))


def test_each_format_reads_its_values(tmp_path):
    single = MARKER + fingerprint_of(ORDER) + avro({"number": 5})
    (tmp_path / "order.avsc").write_text(json.dumps(ORDER))
    assert decoded("json", b'{"number": 5}') == {"number": 5}
    assert decoded("avro", single, tmp_path / "order.avsc") == {"number": 5}
    assert decoded("avro", single, [json.dumps(ORDER)]) == {"number": 5}
    assert decoded("text", "é".encode()) == "é"
    assert decoded("bytes", b"\xff") == b"\xff"
    assert decoded(len, b"four") == 4


@pytest.mark.parametrize(
    ("form", "schema", "data"),
    [
        ("json", None, b"{"),
        ("json", None, None),
        ("text", None, b"\xff"),
        ("avro", ORDER, b'{"number": 5}'),
        ("avro", ORDER, MARKER + b"12345678" + avro({"number": 5})),
        ("avro", ORDER, MARKER + fingerprint_of(ORDER) + avro({"number": 5}) + b"x"),
    ],
)
def test_bytes_that_are_something_else_are_no_value(form, schema, data):
    with pytest.raises((ValueError, msgspec.DecodeError)):
        decoded(form, data, schema)


@pytest.mark.parametrize(
    ("form", "schema"), [("avro", None), ("json", ORDER), ("xml", None), ("avro", "none.avsc"), ("registry", None)]
)
def test_a_format_that_cannot_work_is_refused_where_it_is_declared(form, schema, monkeypatch):
    monkeypatch.delenv(values.REGISTRY, raising=False)
    with pytest.raises(ConfigurationError):
        values.decoder(form, schema)


def test_a_schema_registry_is_asked_once_for_each_schema_and_waited_for_when_it_is_away():
    money = {"type": "record", "name": "Money", "fields": [{"name": "cents", "type": "long"}]}
    paid = {"type": "record", "name": "Paid", "fields": [{"name": "amount", "type": "Money"}]}
    asked: list[str] = []
    status = [503]

    async def answer(request):
        asked.append(request.path)
        if status[0] != 200:
            return web.Response(status=status[0])
        found = {
            "/schemas/ids/1": {
                "schema": json.dumps(paid),
                "references": [{"name": "Money", "subject": "money", "version": 2}],
            },
            "/subjects/money/versions/2": {"schema": json.dumps(money)},
            "/schemas/ids/3": {"schema": "syntax", "schemaType": "PROTOBUF"},
        }.get(request.path)
        return web.json_response(found, status=404 if found is None else 200)

    async def scenario():
        app = web.Application()
        app.router.add_get("/{path:.*}", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        registry = values.Registry(f"http://127.0.0.1:{port}/")
        whole = {"type": "record", "name": "Paid", "fields": [{"name": "amount", "type": money}]}
        data = b"\x00\x00\x00\x00\x01" + avro({"amount": {"cents": 5}}, whole)
        with pytest.raises(Later, match="503"):
            await registry.decode(data)
        status[0] = 200
        assert await registry.decode(data) == {"amount": {"cents": 5}}
        assert await registry.decode(data) == {"amount": {"cents": 5}}
        assert asked == ["/schemas/ids/1", "/schemas/ids/1", "/subjects/money/versions/2"]
        for poison in (b"{}", b"\x00\x00\x00\x00\x02x", b"\x00\x00\x00\x00\x03x"):
            with pytest.raises(ValueError, match=r"wire format|404|PROTOBUF"):
                await registry.decode(poison)
        await runner.cleanup()
        with pytest.raises(Later, match="does not answer"):
            await values.Registry(f"http://127.0.0.1:{port}").decode(data)

    asyncio.run(scenario())


# -- triggers ----------------------------------------------------------------------------------------------------------


def test_every_message_has_a_name_of_its_own_that_may_be_a_run_id():
    places = [
        message(),
        message(offset=8),
        message(topic="x" * 249),
        message(topic="x" * 248 + "y"),
        msgspec.structs.replace(message(), partition=4),
        msgspec.structs.replace(message(), timestamp=1),  # of a topic that was made anew
    ]
    names = {checked_run_id(f"wrun-{m.place}") for m in places}
    assert len(names) == len(places)
    assert message().place == "orders-3-7-1700000000000"


@pytest.mark.parametrize(
    ("made", "expected"),
    [((1, 2), ((1, 2), {})), ({"a": 1}, ((), {"a": 1})), ([1], (([1],), {})), (({"a": 1},), (({"a": 1},), {}))],
)
def test_what_a_trigger_returns_are_the_arguments(made, expected):
    assert triggers.arguments(made) == expected


class Client:
    """Hooks that are there, or come after some questions."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.resumed: list[tuple] = []

    async def resume_hook(self, token, payload, resume_id):
        self.resumed.append((token, payload, resume_id))
        if isinstance(answer := self.answers.pop(0), Exception):
            raise answer


def handled_by(fresh, broker, found, client=None):
    """What becomes of a message by the only trigger there is."""
    (only,) = fresh.all()

    async def scenario():
        out = Delivery(broker, CATALOGUE)
        only._app = SimpleNamespace(delivery=out, client=client)
        await tried(lambda: only.handle(found), found, out, only.name)
        await out.close()

    asyncio.run(scenario())
    return [CODEC.decode_as(StartRun, m.value) for m in broker.records(CATALOGUE.commands)]


def test_a_message_becomes_the_same_start_at_every_delivery(fresh, broker):
    @trigger(topic="orders", workflow="fulfil")
    def order(m):
        return (m.value["number"],)

    one, two = (handled_by(fresh, broker, message(b'{"number": 5}'))[-1] for _ in range(2))
    assert one.run_id == two.run_id == "wrun-orders-3-7-1700000000000"
    assert (one.workflow, one.input) == (two.workflow, two.input)
    assert one.nonce != two.nonce  # the first one counts; its tokens are not to be guessed


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (b"{", "DecodeError"),
        (b"[5]", "TypeError"),
        (b'{"no": 5}', "KeyError"),
        (b'{"number": "a|b"}', "ConfigurationError"),
    ],
)
def test_what_cannot_be_mapped_is_a_dead_letter_with_the_reason(fresh, broker, value, why):
    @trigger(topic="orders", workflow="fulfil", key="order-{number}")
    def named_order(m):
        return m.value

    assert handled_by(fresh, broker, message(value)) == []
    (letter,) = letters(broker)
    assert letter.value == value
    assert letter.reason.startswith(why)
    assert letter.component.endswith("named_order")


def test_a_reason_that_is_no_unicode_is_told_all_the_same(fresh, broker):
    @trigger(topic="orders", workflow="fulfil")
    def surrogate(m):
        raise ValueError("half a pair: \ud800")

    handled_by(fresh, broker, message(b"{}"))
    assert letters(broker)[0].reason == "ValueError: half a pair: ?"


def test_a_key_names_the_run_and_ignore_starts_none(fresh, broker):
    @trigger(topic="orders", workflow="fulfil", key=lambda m: f"order-{m.value['number']}")
    def some(m):
        return IGNORE if m.value["number"] < 0 else m.value

    assert [r.run_id for r in handled_by(fresh, broker, message(b'{"number": 5}'))] == ["order-5"]
    assert len(handled_by(fresh, broker, message(b'{"number": -5}'))) == 1
    assert letters(broker) == []


def test_a_payment_waits_for_its_hook_and_for_the_engine_and_keeps_its_name(fresh, broker):
    @trigger(topic="payments", token="payment-{number}")
    def payment(m):
        return m.value["cents"]

    client = Client(HookNotFoundError("not yet", "t"), TimeoutError("no processor"), BrokerUnreachable("away"), None)
    handled_by(fresh, broker, message(b'{"number": 5, "cents": 9}'), client)
    assert client.resumed == [("payment-5", 9, "orders-3-7-1700000000000")] * 4
    assert letters(broker) == []


def test_a_payment_that_nobody_waits_for_is_a_dead_letter_in_the_end(fresh, broker):
    @trigger(topic="payments", token="payment-{number}", patience="20ms")
    def lost_payment(m):
        return m.value

    client = Client(*(HookNotFoundError("no open hook", "t") for _ in range(10_000)))
    handled_by(fresh, broker, message(b'{"number": 5}'), client)
    assert len(client.resumed) > 1
    assert letters(broker)[0].reason == "HookNotFoundError: no open hook"


# -- declarations ------------------------------------------------------------------------------------------------------


def test_a_declaration_that_cannot_work_is_refused(fresh):
    with pytest.raises(ConfigurationError, match="needs a workflow"):
        trigger(topic="orders")
    with pytest.raises(ConfigurationError, match="needs a workflow"):
        trigger(topic="orders", workflow="a", token="b")
    with pytest.raises(ConfigurationError, match="needs outcomes"):
        sink(KafkaTopic("x"))
    with pytest.raises(ConfigurationError, match="no events of type run_ended"):
        sink(KafkaTopic("x"), events={"run_ended"})
    with pytest.raises(ConfigurationError, match="less than a minute"):
        monitor(keep="59s")
    trigger(topic="orders", workflow="a")(print)
    trigger(topic="orders", workflow="b", key="b-{number}")(len)
    trigger(topic="orders", token="c")(repr)
    with pytest.raises(ConfigurationError, match="both runs would have one ID"):
        trigger(topic="orders", workflow="d")(min)
    monitor()
    with pytest.raises(ConfigurationError, match="two connectors are named"):
        monitor()
    with pytest.raises(ConfigurationError, match=r"mysql is not supported|cannot be reached"):
        SqlTable("mysql://localhost/x", "t")


@pytest.mark.parametrize(
    "kafka",
    [
        {"security.protocol": "SASL_SSL", "sasl.mechanism": "OAUTHBEARER"},
        {"security.protocol": "SASL_PLAINTEXT"},
        {"security.protocol": "SSL", "ssl.keystore.location": "x"},
    ],
)
def test_security_that_faust_cannot_do_is_not_left_out_in_silence(kafka):
    with pytest.raises(ConfigurationError, match="Faust's client"):
        credentials(kafka)


def test_an_app_listens_on_loopback_and_connects_as_the_installation_says():
    properties = {"security.protocol": "SASL_PLAINTEXT", "sasl.mechanism": "SCRAM-SHA-512", "sasl.username": "ada",
                  "sasl.password": "s3cret", "session.timeout.ms": "6000"}  # fmt: skip
    app = App("shop", Settings(url="kafka://a:1,b:2", namespace="n", kafka=properties))
    assert (app.conf.id, app.conf.web_bind, app.conf.broker_session_timeout) == ("n.connectors.shop", "127.0.0.1", 6)
    assert [str(url) for url in app.conf.broker_consumer] == ["kafka://a:1", "kafka://b:2"]
    assert (app.conf.broker_credentials.username, app.conf.broker_credentials.mechanism.value) == (
        "ada",
        "SCRAM-SHA-512",
    )
    with pytest.raises(ConfigurationError, match="connectors need Kafka"):
        App("shop", Settings(url="embedded:x"))


def test_a_record_that_is_none_is_a_dead_letter_before_faust_forgets_it(broker):
    app = App("shop", Settings(url="kafka://a:1"))

    def found(value):
        return SimpleNamespace(
            topic="durably.events", partition=1, offset=5, timestamp=1.0, key=b"run-1", value=value, headers=[]
        )

    event = ev.event("run-1", 1, 5, ev.RunStarted())

    async def scenario():
        app._delivery = Delivery(broker, CATALOGUE)
        channel = app.events.clone(is_iterator=True)
        read = await channel.decode(found(CODEC.encode(event)))
        assert (read.key, read.value) == ("run-1", event)
        assert (await channel.decode(found(None))).value is None
        with pytest.raises(ValueDecodeError):
            await channel.decode(found(b"poison"))
        await app._delivery.close()

    asyncio.run(scenario())
    (letter,) = letters(broker)
    assert (letter.offset, letter.value, letter.component) == (5, b"poison", "durably.connectors.shop")


def test_an_app_writes_where_processes_of_durably_do(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    app = App("shop", Settings(url="kafka://a:1", data_dir=tmp_path / "data" / "of-all"))
    app._create_directories()
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert [path.name for path in (tmp_path / "data" / "of-all").iterdir()] == ["connectors-shop"]


def test_a_module_without_an_app_gets_one_of_its_name(fresh, monkeypatch, tmp_path):
    ran = []
    (tmp_path / "faustpkg").mkdir()
    (tmp_path / "faustpkg" / "faustshop.py").write_text("value = 1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(server, "declared", fresh)
    monkeypatch.setattr(App, "attach", lambda app, connectors: ran.append((app, connectors)))
    monkeypatch.setattr(server, "_run", lambda app, ready: asyncio.sleep(0))
    settings = Settings(url="kafka://a:1", namespace="n")
    with pytest.raises(ConfigurationError, match="declares no connector"):
        server.run_connectors(settings, "faustpkg.faustshop", name=None, port=None, ready=print)
    monitor()
    for name, port in ((None, None), ("other", 0)):
        server.run_connectors(settings, "faustpkg.faustshop", name=name, port=port, ready=print)
    assert [app.conf.id for app, _ in ran] == ["n.connectors.faustshop", "n.connectors.other"]
    assert [app.conf.web_enabled for app, _ in ran] == [True, False]
    assert [connectors for _, connectors in ran] == [fresh.all()] * 2
    for apps, why in (("a = App('a')", "makes its App by itself"), ("a, b = App('a'), App('b')", "has 2 Apps")):
        module = tmp_path / f"own{len(apps)}.py"
        module.write_text(f"from durably_connectors.faust import App\n{apps}")
        with pytest.raises(ConfigurationError, match=why):
            server.run_connectors(settings, str(module), name="other", port=None, ready=print)


@pytest.mark.parametrize("crashes", ["start", "later"])
def test_an_app_that_crashes_is_stopped_and_says_why(crashes):
    class Crashing(SimpleNamespace):
        async def start(self):
            if crashes == "start":
                raise OSError("port 8234 is taken")
            self.crashed, self.crash_reason = True, OSError("port 8234 is taken")

        async def stop(self):
            self.stopped = True

    app = Crashing(
        crashed=False, crash_reason=None, stopped=False, on_rebalance_complete=SimpleNamespace(connect=lambda _: None)
    )
    with pytest.raises(DurablyError, match="OSError: port 8234 is taken"):
        asyncio.run(server._run(app, print))
    assert app.stopped


def test_what_breaks_while_an_app_is_stopped_is_no_crash():
    class Stopping(SimpleNamespace):
        async def start(self):
            os.kill(os.getpid(), signal.SIGTERM)

        async def stop(self):
            self.crashed, self.crash_reason = True, AssertionError()

    app = Stopping(crashed=False, crash_reason=None, on_rebalance_complete=SimpleNamespace(connect=lambda _: None))
    asyncio.run(server._run(app, print))
    assert app.crashed


def test_an_app_that_cannot_leave_is_left(monkeypatch):
    class Ended(BaseException):
        pass

    def end(status):
        raise Ended(status)

    monkeypatch.setattr(server, "_LEAVE", 0.01)
    monkeypatch.setattr(server.os, "_exit", end)
    with pytest.raises(Ended, match="1"):
        asyncio.run(server._left(SimpleNamespace(stop=lambda: asyncio.sleep(60))))


def test_without_the_extra_the_command_names_it(monkeypatch):
    from durably.cli.app import app

    def missing(name):
        raise ModuleNotFoundError("No module named 'faust'", name="faust")

    monkeypatch.setattr(command.importlib, "import_module", missing)
    result = CliRunner().invoke(app, ["connectors", "shop.py", "--url", "kafka://a:1"])
    assert result.exit_code == 1
    assert "connectors need faust: pip install 'durably[faust]'" in result.stderr


# -- tables ------------------------------------------------------------------------------------------------------------


def row(run_id="r1", seq=3, value=1, at=5) -> Row:
    return Row(run_id=run_id, seq=seq, at=at, kind="completed", workflow="w", value=value)


def stored(path):
    with create_engine(f"sqlite:///{path}").begin() as connection:
        return [tuple(found) for found in connection.execute(text("select run_id, seq, value from t order by 1, 2"))]


def test_a_row_is_there_once_however_often_it_is_delivered(tmp_path):
    async def scenario():
        for _ in range(2):  # the second is another process
            table = SqlTable(f"sqlite:///{tmp_path}/x.db", "t")
            await asyncio.gather(*(table.put(row(f"r{n % 50}", 3, {"n": n % 50}), None) for n in range(200)))
            await table.put(row("r0", 4, "later"), None)

    asyncio.run(scenario())
    assert stored(tmp_path / "x.db") == sorted(
        [*((f"r{n}", 3, f'{{"n": {n}}}') for n in range(50)), ("r0", 4, '"later"')]
    )


def test_a_row_at_fault_harms_no_other_and_a_database_that_is_away_is_waited_for(tmp_path):
    async def scenario():
        table = SqlTable(f"sqlite:///{tmp_path}/x.db", "t")
        answers = await asyncio.gather(
            table.put(row("r1"), None), table.put(row("r2", at=None), None), table.put(row("r3"), None),
            return_exceptions=True,
        )  # fmt: skip
        away = SqlTable(f"sqlite:///{tmp_path}/none/x.db", "t")
        with pytest.raises(Later):
            await away.put(row(), None)
        return answers

    one, two, three = asyncio.run(scenario())
    assert (one, three) == (None, None)
    assert type(two).__name__ == "IntegrityError"
    assert [r[0] for r in stored(tmp_path / "x.db")] == ["r1", "r3"]


def test_postgresql_is_asked_to_upsert(tmp_path):
    table = SqlTable(f"sqlite:///{tmp_path}/x.db", "t")._table
    statement = str(sql.upsert(table, "postgresql").compile(dialect=postgresql.dialect()))
    assert "ON CONFLICT (run_id, seq) DO UPDATE SET at = excluded.at" in statement


# -- counts ------------------------------------------------------------------------------------------------------------


def history(runs: int = 4) -> list[ev.Event]:
    """The events of a partition: runs of two workflows that overlap, with steps that are retried and fail."""
    log = []
    for n in range(runs):
        name, at = f"run-{n}", 50_000 + n * 7_000
        data = [
            ev.RunCreated(workflow=f"w{n % 2}", input=NOTHING),
            ev.RunStarted(),
            ev.StepCreated(step="pay", queue="default", input=NOTHING, fingerprint="f", max_retries=1,
                           backoff=ev.Backoff(initial_ms=1, factor=2, max_ms=3)),
            ev.StepRetrying(attempt=2, error=Error(type="E", message="m"), retry_at=1),
            ev.StepFailed(attempt=2, error=Error(type="E", message="m")) if n == 1 else
            ev.StepCompleted(attempt=2, result=NOTHING),
            ev.RunFailed(error=Error(type="E", message="m")) if n == 1 else ev.RunCompleted(result=NOTHING),
        ]  # fmt: skip
        log += [
            ev.event(name, seq, at + seq * 3_000, one, "s1" if one.__class__.__name__.startswith("Step") else None)
            for seq, one in enumerate(data, 1)
        ]
    return sorted(log, key=lambda e: e.at)


class Changelog(MutableMapping):
    """Rows, and each change of them in its order: what survives a crash is any beginning of these."""

    def __init__(self, changes=()):
        self.changes = list(changes)
        self.rows: dict[bytes, bytes] = {}
        for name, value in self.changes:
            if value is None:
                self.rows.pop(name, None)
            else:
                self.rows[name] = value

    def __getitem__(self, name):
        return self.rows[name]

    def __setitem__(self, name, value):
        self.changes.append((name, value))
        self.rows[name] = value

    def __delitem__(self, name):
        self.changes.append((name, None))
        del self.rows[name]

    def __iter__(self):
        return iter(self.rows)

    def __len__(self):
        return len(self.rows)


def counted(log, rows=None, begin=0):
    rows = Changelog() if rows is None else rows
    for offset, event in list(enumerate(log))[begin:]:
        tally.count(rows, 0, offset, event)
    return rows


def test_what_is_counted_is_what_happened():
    sums = monitors.summed(tally.counts(counted(history()).items()))
    totals = {(workflow, step): c for (window, workflow, step), c in sums.items() if window == tally.TOTAL}
    assert {key: (c.started, c.completed, c.failed, c.retried) for key, c in totals.items()} == {
        ("w0", ""): (2, 2, 0, 0), ("w1", ""): (2, 1, 1, 0), ("w0", "pay"): (2, 2, 0, 2), ("w1", "pay"): (2, 1, 1, 2),
    }  # fmt: skip
    assert totals["w0", ""].milliseconds == 2 * 15_000
    assert totals["w0", "pay"].milliseconds == 2 * 6_000
    assert 5_000 < totals["w0", "pay"].percentile(0.5) <= 10_000
    minutes = {window for window, _, _ in sums if window != tally.TOTAL}
    assert minutes == {0, 60_000}
    assert sum(c.started for (w, _, step), c in sums.items() if w != tally.TOTAL and not step) == 4


@given(st.data())
def test_a_crash_at_any_point_and_a_redelivery_from_any_earlier_one_count_nothing_twice(data):
    log = history()
    whole = counted(log)
    died_at = data.draw(st.integers(0, len(log)), "events counted")
    changes = counted(log[:died_at]).changes
    survived = Changelog(changes[: data.draw(st.integers(0, len(changes)), "changes that survived")])
    # What is committed never goes beyond what has survived: the changelog is flushed before a commit.
    safe = next(
        offset for offset in range(died_at + 1)
        if offset == died_at or len(counted(log[: offset + 1]).changes) > len(survived.changes)
    )  # fmt: skip
    begin = data.draw(st.integers(0, safe), "committed offset")
    assert counted(log, survived, begin).rows == whole.rows


def test_a_run_with_many_open_steps_has_small_rows_and_leaves_none():
    begun = [ev.event("wide", 1, 5, ev.RunCreated(workflow="w", input=NOTHING))]
    called = ev.StepCreated(step="pay", queue="default", input=NOTHING, fingerprint="f", max_retries=0,
                            backoff=ev.Backoff(initial_ms=1, factor=2, max_ms=3))  # fmt: skip
    begun += [ev.event("wide", n, 5, called, f"s{n}") for n in range(2, 500)]
    rows = counted(begun)
    assert len(rows) > 500
    assert max(len(row) for _, row in rows.changes) < 200
    ended = ev.event("wide", 500, 9, ev.RunCancelled())
    tally.count(rows, 0, len(begun), ended)
    (runs, steps), _ = zip(
        *((c, key) for key, c in tally.counts(rows.items()) if key.window == tally.TOTAL), strict=True
    )
    assert (runs.cancelled, steps.started) == (1, 498)
    assert len(rows) == 4


def test_old_minutes_go_and_totals_stay():
    rows = counted(history())
    tally.count(rows, 1, 0, history()[0])
    tally.expire(rows, 0, 60_000)
    kept = {(key.partition, key.window) for key, _ in tally.counts(rows.items())}
    assert kept == {(0, tally.TOTAL), (0, 60_000), (1, tally.TOTAL), (1, 0)}


def test_a_percentile_lies_within_its_bucket():
    row = tally.Count()
    assert row.percentile(0.5) is None
    for ms in (3, 3, 3, 3, 150, 10**9):
        row.took(ms)
    assert 2 < row.percentile(0.5) <= 5
    assert 100 < row.percentile(0.8) <= 200
    assert row.percentile(1) == tally.BUCKETS[-1]


def test_prometheus_is_told_names_that_need_escaping_and_buckets_that_add_up():
    count = tally.Count(started=2, completed=2)
    count.took(3)
    count.took(10**9)
    lines = monitors.as_prometheus(
        {(tally.TOTAL, 'a"b\\c\n', "s"): count, (60_000, "w", "s"): tally.Count()}
    ).splitlines()
    assert 'durably_steps_started_total{workflow="a\\"b\\\\c\\n",step="s"} 2' in lines
    buckets = [int(line.rpartition(" ")[2]) for line in lines if line.startswith("durably_steps_seconds_bucket")]
    assert buckets == sorted(buckets)
    assert (buckets[0], buckets[2], buckets[-1]) == (0, 1, 2)
    assert not any("60000" in line for line in lines)


def test_an_outcome_is_passed_on_under_its_run_and_seq(broker):
    broker.create([SimpleNamespace(name="out", partitions=1)])

    async def scenario():
        out = Delivery(broker, CATALOGUE)
        await KafkaTopic("out").put(row(value={"cents": 5}), out)
        await KafkaTopic("out", key=lambda r: r.kind).put(row(value=b"raw"), out)
        await out.close()

    asyncio.run(scenario())
    one, two = broker.records("out")
    assert (one.key, one.value) == (b"r1", b'{"cents":5}')
    assert one.headers == (("durably-run", b"r1"), ("durably-seq", b"3"))
    assert (two.key, two.value) == (b"completed", b"raw")


def test_an_outcome_whose_result_was_purged_is_a_dead_letter_and_not_none(fresh, broker):
    passed, answers = [], ["parcel-5", RunNotFoundError("purged", "run-5")]

    class To:
        def topics(self):
            return []

        async def put(self, row, delivery):
            passed.append(row)

    @sink(To(), outcomes={"ship"})
    def shipped(outcome: Outcome):
        return outcome.result

    class Engine:
        def get_run(self, run_id):
            return self

        async def result(self, _):
            if isinstance(answer := answers.pop(0), Exception):
                raise answer
            return answer

    summary = RunSummary(run_id="run-5", workflow="ship", status="completed", created_at=1, events=7, completed_at=3)
    for one in (summary, summary, msgspec.structs.replace(summary, workflow="other"),
                msgspec.structs.replace(summary, status="running", completed_at=None)):  # fmt: skip
        handled_by(fresh, broker, message(CODEC.encode(one)), Engine())
    handled_by(fresh, broker, message(None), Engine())
    assert passed == [Row(run_id="run-5", seq=7, at=3, kind="completed", workflow="ship", value="parcel-5")]
    (letter,) = letters(broker)
    assert letter.reason.startswith("RunNotFoundError")
