"""Hooks from outside, over a scripted processor: looking up, resuming, calling webhooks; sync and async alike."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from durably import payloads
from durably.client import connection as connection_module
from durably.client import hooks
from durably.client.connection import Connection
from durably.errors import (
    ConfigurationError,
    DurablyError,
    HookNotFoundError,
    RecordTooLarge,
    RunNotFoundError,
    SerializationError,
)
from durably.web import Request, Response
from durably_schemas import Catalogue
from durably_schemas.records import Payload, QueryRun, Reply, ReplyTo, ResumeHook
from unit.scripted_broker import UNREADABLE, ScriptedBroker
from unit.scripted_hooks import ScriptedHooks

DEFAULT = "hook_aaaaaaaaaaaaaaaaaaaaaa.r1"
URL = "https://hooks.example.com/x"
Call = Callable[..., Any]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "_TICK", 0.01)


@pytest.fixture
def broker() -> ScriptedBroker:
    return ScriptedBroker(Catalogue(partitions=3))


@pytest.fixture
def processor(broker: ScriptedBroker) -> ScriptedHooks:
    return ScriptedHooks(broker)


@pytest.fixture
def connection(broker: ScriptedBroker) -> Iterator[Connection]:
    made = Connection(broker, broker.catalogue, timeout=5)
    yield made
    made.close()


@pytest.fixture(params=["sync", "async"])
def call(request: pytest.FixtureRequest, connection: Connection) -> Call:
    """Calls a function of the module by its name, or its async twin."""

    def sync(name: str, *args: Any, **options: Any) -> Any:
        return getattr(hooks, name)(connection, *args, **options)

    def twin(name: str, *args: Any, **options: Any) -> Any:
        return asyncio.run(getattr(hooks, f"{name}_async")(connection, *args, **options))

    return sync if request.param == "sync" else twin


@pytest.mark.parametrize("name", ["resume_hook", "get_hook", "run_hooks", "resume_webhook"])
def test_twins_take_the_same(name: str) -> None:
    sync, twin = getattr(hooks, name), getattr(hooks, f"{name}_async")
    assert inspect.signature(sync) == inspect.signature(twin)


# resuming


@pytest.mark.parametrize(("token", "key"), [(DEFAULT, b"r1"), ("ship-7", b"ship-7"), ("ä/b c", "ä/b c".encode())])
def test_a_payload_goes_where_its_token_is_looked_after(
    token: str, key: bytes, call: Call, processor: ScriptedHooks, broker: ScriptedBroker
) -> None:
    processor.open(token)
    run = call("resume_hook", token, {"by": "Ada"})
    assert (run.run_id, run.status) == ("r1", "running")
    (command,) = processor.received
    assert (command.token, payloads.load(command.payload)) == (token, {"by": "Ada"})
    assert {m.key for log in broker.logs.values() for m in log if m.topic == broker.catalogue.commands} == {key}


def test_a_second_resume_of_one_id_is_dropped_and_answered_alike(call: Call, processor: ScriptedHooks) -> None:
    processor.open("t")
    first = call("resume_hook", "t", 1, "delivery-1")
    assert call("resume_hook", "t", 1, "delivery-1") == first
    call("resume_hook", "t", 2)
    call("resume_hook", "t", 2)
    assert [payloads.load(r.payload) for r in processor.received] == [1, 2, 2]


def test_a_payload_record_is_sent_as_it_is(call: Call, processor: ScriptedHooks) -> None:
    processor.open("t")
    given = Payload(content_type="application/json", data=b'{"a": 1}')
    call("resume_hook", "t", given)
    assert processor.received[0].payload == given


@pytest.mark.parametrize("token", ["nobody", DEFAULT])
def test_an_unknown_token_says_that_it_may_be_early(token: str, call: Call, processor: ScriptedHooks) -> None:
    with pytest.raises(HookNotFoundError, match=token) as missing:
        call("resume_hook", token, 1)
    assert missing.value.token == token
    with pytest.raises(HookNotFoundError, match="may not have come that far yet"):
        call("get_hook", token)


@pytest.mark.parametrize("token", ["", "a\nb", "x" * 1025, 7])
def test_what_can_be_no_token_is_refused_at_once(token: Any, call: Call, broker: ScriptedBroker) -> None:
    for name in ("resume_hook", "get_hook"):
        with pytest.raises(ConfigurationError, match="use 1 to 1024 bytes of printable text"):
            call(name, token, *([1] if name == "resume_hook" else []))
    assert not broker.sent


@pytest.mark.parametrize("token", ["hook_cut", "hook_cut.", "hook_a.b|c"])
def test_a_mangled_default_token_is_not_found(token: str, call: Call, broker: ScriptedBroker) -> None:
    with pytest.raises(HookNotFoundError):
        call("get_hook", token)
    assert not broker.sent


def test_what_cannot_travel_is_told_before_anything_is_sent(call: Call, broker: ScriptedBroker) -> None:
    with pytest.raises(SerializationError, match="the payload for hook t"):
        call("resume_hook", "t", object())
    with pytest.raises(RecordTooLarge, match="this ResumeHook for t takes"):
        call("resume_hook", "t", b"x" * 200_000)
    assert not broker.sent


@pytest.mark.parametrize(
    ("resume_id", "said"),
    [
        ("", "names no delivery"),
        (7, "names no delivery"),
        ("\ud800", "is no Unicode text"),
        ("ä" * 513, "has 1,026 bytes: use 1 to 1,024"),
    ],
)
def test_what_names_no_delivery_is_refused_at_once(
    resume_id: Any, said: str, call: Call, processor: ScriptedHooks, broker: ScriptedBroker
) -> None:
    processor.open("t")
    with pytest.raises(ConfigurationError, match=said):
        call("resume_hook", "t", 1, resume_id)
    assert not broker.sent
    call("resume_hook", "t", 1, "ä" * 512)
    assert processor.received[0].resume_id == "ä" * 512


def test_without_an_answer_the_error_names_the_id_to_try_again_with(
    broker: ScriptedBroker, processor: ScriptedHooks
) -> None:
    processor.deaf = 99
    impatient = Connection(broker, broker.catalogue, timeout=0.05)
    try:
        with pytest.raises(TimeoutError, match=r"for hook t within .* resume_id='d-1', which counts once"):
            hooks.resume_hook(impatient, "t", 1, "d-1")
        with pytest.raises(TimeoutError, match="resume_id='d-2'"):
            asyncio.run(hooks.resume_hook_async(impatient, "t", 1, "d-2"))
    finally:
        impatient.close()


def test_a_refusal_is_an_error_with_its_reason(
    call: Call, processor: ScriptedHooks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(command: ResumeHook) -> None:
        processor.reply(command.reply_to, Reply(request_id="", status="REFUSED", message="not today"))

    monkeypatch.setattr(processor, "resume", refuse)
    with pytest.raises(DurablyError, match="hook t: not today"):
        call("resume_hook", "t", 1)


# looking up


def test_a_hook_is_shown_with_its_metadata(call: Call, processor: ScriptedHooks) -> None:
    opened = processor.open("t", metadata={"order": 7})
    hook = call("get_hook", "t")
    assert (hook.token, hook.hook_id, hook.run_id, hook.received) == ("t", opened.hook_id, "r1", 0)
    assert (hook.webhook, hook.response, hook.metadata) == (False, None, {"order": 7})
    assert hook.created_at == datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC)
    assert repr(hook) == "<hook t of run r1>"


def test_a_custom_token_is_asked_for_at_its_owner_and_then_at_the_run(
    call: Call, processor: ScriptedHooks, broker: ScriptedBroker
) -> None:
    processor.open("t")
    processor.open(DEFAULT)
    call("get_hook", "t")
    call("get_hook", DEFAULT)
    asked = [(c.run_id, c.token) for c in broker.sent if isinstance(c, QueryRun)]
    assert asked == [("", "t"), ("r1", "t"), ("r1", DEFAULT)]


def test_a_hook_that_is_closed_between_the_two_questions_is_not_found(
    call: Call, processor: ScriptedHooks, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor.open("t")
    ask = processor.ask

    def ask_and_close(command: QueryRun) -> None:
        ask(command)
        processor.hooks.clear()

    monkeypatch.setattr(processor, "ask", ask_and_close)
    with pytest.raises(HookNotFoundError):
        call("get_hook", "t")


def test_the_hooks_of_a_run_are_listed(call: Call, processor: ScriptedHooks) -> None:
    processor.open("a")
    processor.open("b", webhook=True, response="manual")
    processor.open("c", "r2")
    assert [(h.token, h.webhook, h.response) for h in call("run_hooks", "r1")] == [
        ("a", False, None),
        ("b", True, "manual"),
    ]
    with pytest.raises(RunNotFoundError):
        call("run_hooks", "nobody")


# webhooks


def test_a_webhook_answers_202_by_default_or_what_it_was_made_with(call: Call, processor: ScriptedHooks) -> None:
    processor.open("w", webhook=True)
    processor.open("s", webhook=True, response=Response.text("thanks", status=201))
    sent = Request("post", URL, {"X-Kind": "ping"}, "hello")
    answer = call("resume_webhook", "w", sent)
    assert (answer.status, answer.body) == (202, b"")
    answer = call("resume_webhook", "s", sent)
    assert (answer.status, answer.body) == (201, b"thanks")
    got = payloads.load(processor.received[0].payload)
    assert (got.method, got.url, got.headers["x-kind"], got.body) == ("POST", URL, "ping", b"hello")
    assert payloads.load(processor.received[0].payload)._respond_to is None


def test_a_plain_hook_takes_no_requests(call: Call, processor: ScriptedHooks) -> None:
    processor.open("plain")
    with pytest.raises(HookNotFoundError, match=r"plain hook's.*use resume_hook"):
        call("resume_webhook", "plain", Request("GET", URL))
    assert not processor.received


def respond(processor: ScriptedHooks, response: Response) -> Callable[[ResumeHook], None]:
    """What a step does, later, on its worker's thread."""

    def on_resume(command: ResumeHook) -> None:
        to = payloads.load(command.payload)._respond_to
        reply = Reply(request_id="", run_id="r1", result=payloads.dump(response, "response"))
        threading.Timer(0.05, processor.reply, (to, reply)).start()

    return on_resume


def test_a_manual_webhook_waits_for_the_response_of_a_step(call: Call, processor: ScriptedHooks) -> None:
    processor.open("m", webhook=True, response="manual")
    processor.on_resume = respond(processor, Response.json({"ok": True}, status=418))
    answer = call("resume_webhook", "m", Request("PUT", URL, body=b"x"))
    assert (answer.status, answer.body) == (418, b'{"ok":true}')


def test_a_manual_webhook_without_a_response_says_that_the_run_has_the_request(
    call: Call, processor: ScriptedHooks, connection: Connection
) -> None:
    processor.open("m", webhook=True, response="manual")
    with pytest.raises(TimeoutError, match=r"run r1 has the request, but no step .* within 0.05 s"):
        call("resume_webhook", "m", Request("GET", URL), timeout=0.05)
    assert len(processor.received) == 1
    assert not connection._expected


def test_an_expected_reply_fails_with_its_reader_and_with_its_client(
    connection: Connection, broker: ScriptedBroker, processor: ScriptedHooks
) -> None:
    to, reply = connection.expect()
    processor.reply(ReplyTo(partition=to.partition, request_id="of another one"), Reply(request_id=""))
    processor.reply(to, Reply(request_id="", run_id="r9"))
    assert reply.result(5).run_id == "r9"
    _, lost = connection.expect()
    with broker.changed:
        broker.breaks = UNREADABLE
        broker.changed.notify_all()
    with pytest.raises(type(UNREADABLE), match="the reader is broken"):
        lost.result(5)
    broker.breaks = None
    _, waiting = connection.expect()
    connection.close()
    with pytest.raises(DurablyError, match="client was closed"):
        waiting.result(5)
