"""The REST API over a scripted processor, through a real server on loopback."""

from __future__ import annotations

import socket
import threading
import time
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx
import msgspec
import pytest
from durably import failures, payload_codec, payloads
from durably.errors import BrokerUnreachable, ConfigurationError
from durably_connectors.http import create_gateway, runs
from durably_connectors.http import gateway as gateway_module
from durably_connectors.http.security import checked_binding, is_loopback
from durably_connectors.http.server import bind
from durably_schemas import events
from durably_schemas.records import CancelRun, Error, ResumeHook, StartRun
from fastapi import FastAPI
from unit.gateway_under_test import GatewayUnderTest, gateway_under_test, serving
from unit.scripted_broker import ScriptedBroker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


pytestmark = pytest.mark.usefixtures("quick_gateway")


@pytest.fixture
def gateway() -> Iterator[GatewayUnderTest]:
    with gateway_under_test() as made:
        yield made


def problem(response: Any, status: int, kind: str) -> dict[str, Any]:
    """The problem document of a response that must be this one."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    document = response.json()
    assert (document["type"], document["status"]) == (f"urn:durably:problem:{kind}", status)
    assert document["title"]
    return document


JSON = {"content-type": "application/json"}

# starting


def test_a_run_is_started_with_json(gateway: GatewayUnderTest) -> None:
    asked = {
        "workflow": "greet",
        "args": ["Ada", 2],
        "run_id": "order/7 ä",
        "attributes": {"team": "eu"},
        "delay": "1h",
    }
    response = gateway.api("POST", "/runs", json=asked)
    assert (response.status_code, response.json()) == (
        201,
        {"run_id": "order/7 ä", "status": "running", "existing": False},
    )
    (command,) = gateway.broker.sent
    assert isinstance(command, StartRun)
    assert (command.workflow, command.attributes) == ("greet", {"team": "eu"})
    assert (command.input.content_type, msgspec.json.decode(command.input.data)) == (payloads.JSON, ["Ada", 2])
    assert command.start_at == command.requested_at + 3_600_000
    assert len(command.nonce) >= 22
    found = gateway.http.get(response.url.join(response.headers["location"]))
    assert found.json()["run_id"] == "order/7 ä"


def test_starting_an_existing_run_answers_with_it(gateway: GatewayUnderTest) -> None:
    gateway.processor.start("r1")
    gateway.processor.complete("r1", 1)
    response = gateway.api("POST", "/runs", json={"workflow": "greet", "run_id": "r1"})
    assert (response.status_code, response.json()) == (200, {"run_id": "r1", "status": "completed", "existing": True})


@pytest.mark.parametrize(
    ("given", "sent"),
    [({"kwargs": {"n": 1}}, {"n": 1}), ({"input": {"n": 1}}, {"n": 1}), ({"input": [1]}, [1]), ({}, [])],
)
def test_arguments_come_by_position_or_by_name(given: Any, sent: Any, gateway: GatewayUnderTest) -> None:
    assert gateway.api("POST", "/runs", json={"workflow": "greet", **given}).status_code == 201
    assert msgspec.json.decode(gateway.broker.sent[0].input.data) == sent


def test_a_start_is_durable_without_a_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "_ANSWER", 0.05)
    with gateway_under_test() as gateway:
        gateway.processor.deaf = 99
        response = gateway.api("POST", "/runs", json={"workflow": "greet"})
        assert (response.status_code, response.json()["status"]) == (202, "pending")
        assert len({c.run_id for c in gateway.broker.sent}) == 1


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "workflow"),
        ({"workflow": ""}, "workflow"),
        ({"workflow": "w", "arg": [1]}, "arg"),
        ({"workflow": "w", "args": [1], "kwargs": {"a": 1}}, "one of args, kwargs and input"),
        ({"workflow": "w", "run_id": "a|b"}, "has a '|'"),
        ({"workflow": "w", "delay": "soon"}, "no duration"),
        ({"workflow": "w", "attributes": {"a": 1}}, "attributes"),
        ({"workflow": "w", "attributes": {"a": "x" * 20_000}}, "pass long texts as arguments"),
        ({"workflow": "w", "delay": True}, "delay"),
        ({"workflow": "w", "delay": 1e300}, "1e+300"),
        ('{"workflow": "w", "args": [NaN]}', "JSON decode error: JSON is malformed"),
        ('{"workflow": "w", "kwargs": {"n": -Infinity}}', "JSON decode error"),
        ('{"workflow": "w", "args": [1e400]}', "Number out of range"),
        ('{"workflow": "w", "args": ["\\ud800x"]}', "JSON decode error"),
        ('{"workflow": "w", "attributes": {"a": "\\udc00."}}', "JSON decode error"),
        ('{"workflow": "w", "args": ' + "[" * 5_000 + "]" * 5_000 + "}", "nested too deeply"),
        (b'{"workflow": "\xff"}', "JSON decode error"),
        ("", "body: Field required"),
    ],
)
def test_a_bad_start_says_what_is_wrong(body: Any, said: str, gateway: GatewayUnderTest) -> None:
    given = {"json": body} if isinstance(body, dict) else {"content": body, "headers": JSON}
    assert said in problem(gateway.api("POST", "/runs", **given), 422, "invalid-request")["detail"]
    assert not gateway.broker.sent


def test_what_is_sent_is_encoded_as_the_process_is_set_to(gateway: GatewayUnderTest, zipped: None) -> None:
    gateway.processor.open("t")
    secret = "s" * 5_000
    gateway.api("POST", "/runs", json={"workflow": "w", "args": [secret]})
    gateway.api("POST", "/hooks/t", json=secret)
    gateway.api("POST", "/hooks/t", content=payloads.dump([1], "v").data, headers={"content-type": payloads.MSGPACK})
    start, resumed, _ = (c for c in gateway.broker.sent if isinstance(c, StartRun | ResumeHook))
    for sent, value in ((start.input, [secret]), (resumed.payload, secret)):
        assert sent.content_type == "application/json;codec=gzip"
        assert payloads.load(sent) == value
        assert b"sss" not in sent.data


@pytest.fixture
def zipped() -> Iterator[None]:
    payload_codec.install(payload_codec.Gzip())
    yield
    payload_codec.install()


def test_a_start_must_say_that_it_is_json(gateway: GatewayUnderTest) -> None:
    response = gateway.api("POST", "/runs", content='{"workflow": "w"}', headers={"content-type": "text/plain"})
    assert response.status_code == 422
    assert not gateway.broker.sent


# looking


def test_runs_are_listed_page_by_page_newest_first(gateway: GatewayUnderTest) -> None:
    for n in range(5):
        gateway.processor.start(f"r{n}", "greet" if n % 2 else "other")
        gateway.processor.change(
            f"r{n}", created_at=1_700_000_000_000 + n // 2, attributes={"n": str(n), "team": "a=b"}
        )
    gateway.processor.change("r1", attributes={"n": "1", "team": "a=b", "a=b": "c%3D"})
    gateway.processor.complete("r3", 1)
    pages, cursor = [], None
    while True:
        page = gateway.api("GET", "/runs", params={"limit": 2, **({"cursor": cursor} if cursor else {})}).json()
        pages.append([run["run_id"] for run in page["runs"]])
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert pages == [["r4", "r3"], ["r2", "r1"], ["r0"]]
    some = {
        "workflow=greet": ["r3", "r1"],
        "status=completed": ["r3"],
        "status=completed&status=running&workflow=other": ["r4", "r2", "r0"],
        "attribute=n=2": ["r2"],
        "attribute=n=2&attribute=team=a%3Db": ["r2"],
        "attribute=n=2&attribute=team=b": [],
        "attribute=a%253Db=c%253D": ["r1"],
        "attribute=a=b%253Dc%253D": [],
        "created_from=2023-11-14T22:13:20.001Z&created_to=2023-11-14T22:13:20.002": ["r3", "r2"],
    }
    for query, expected in some.items():
        found = gateway.http.get(f"/api/v1/runs?{query}").json()["runs"]
        assert [run["run_id"] for run in found] == expected, query


def test_the_list_follows_what_happens(gateway: GatewayUnderTest) -> None:
    assert gateway.api("GET", "/runs").json() == {"runs": [], "next_cursor": None}
    gateway.processor.start("r1")
    deadline = threading.Event()
    while not (found := gateway.api("GET", "/runs").json()["runs"]):
        assert not deadline.wait(0.01)
    assert found[0]["run_id"] == "r1"


@pytest.mark.parametrize(
    ("query", "status", "kind"),
    [
        ("cursor=x", 400, "bad-cursor"),
        ("cursor=WzEsMl0=", 400, "bad-cursor"),
        ("cursor=" + b64encode(b'[%d,"r1"]' % 10**30).decode(), 400, "bad-cursor"),
        ("status=done", 422, "invalid-request"),
        ("limit=0", 422, "invalid-request"),
        ("attribute=team", 422, "invalid-request"),
    ],
)
def test_a_bad_listing_says_what_is_wrong(query: str, status: int, kind: str, gateway: GatewayUnderTest) -> None:
    problem(gateway.http.get(f"/api/v1/runs?{query}"), status, kind)


def test_a_run_is_described(gateway: GatewayUnderTest) -> None:
    gateway.processor.start("a/b")
    assert gateway.api("GET", "/runs/a%2Fb").json()["status"] == "running"
    missing = problem(gateway.api("GET", "/runs/nobody"), 404, "run-not-found")
    assert (missing["detail"], missing["run_id"]) == ("there is no run nobody", "nobody")
    problem(gateway.api("GET", "/runs/a%7Cb"), 400, "bad-run-id")


def test_a_log_is_paged_with_its_values_readable(gateway: GatewayUnderTest) -> None:
    gateway.processor.page = 2
    gateway.processor.start("r1")
    gateway.processor.event(
        "r1", events.StepCompleted(attempt=1, result=payloads.dump({1: b"\xff", 2: {3}}, "v")), "s1"
    )
    gateway.processor.complete("r1", {"n": 1})
    first = gateway.api("GET", "/runs/r1/events").json()
    assert [e["type"] for e in first["events"]] == ["run_created", "step_completed"]
    assert first["events"][1]["data"]["result"] == {"1": "/w==", "2": [3]}
    rest = gateway.api("GET", f"/runs/r1/events?from_seq={first['next_seq']}").json()
    assert (rest["events"][0]["data"]["result"], rest["next_seq"]) == ({"n": 1}, None)
    problem(gateway.api("GET", "/runs/nobody/events"), 404, "run-not-found")
    for impossible in (0, 10**26, -1):
        problem(gateway.api("GET", f"/runs/r1/events?from_seq={impossible}"), 422, "invalid-request")


def test_a_value_that_is_nested_too_deeply_to_be_shown_is_shown_as_bytes(gateway: GatewayUnderTest) -> None:
    gateway.processor.start("r1")
    for depth in range(100, 1_200, 50):
        deep = payloads.Payload(content_type=payloads.JSON, data=b"[" * depth + b"]" * depth)
        gateway.processor.event("r1", events.RunCompleted(result=deep))
        shown = gateway.api("GET", f"/runs/r1/events?from_seq={depth // 50}")
        assert shown.status_code == 200, depth
    assert shown.json()["events"][0]["data"]["result"]["content_type"] == payloads.JSON


def test_what_an_error_carries_is_readable(gateway: GatewayUnderTest) -> None:
    gateway.processor.start("r1")
    raised = KeyError("tea", 3)
    raised.add_note("the last one")
    raised.type = "attribute"  # type: ignore[attr-defined]
    error = failures.to_error(raised)
    gateway.processor.end("r1", "failed", events.RunFailed(error=error), error)
    found = problem(gateway.api("GET", "/runs/r1/result"), 409, "run-failed")["error"]
    assert (found["type"], found["message"]) == ("builtins:KeyError", "('tea', 3)")
    assert found["data"] == {"args": ["tea", 3], "attributes": {"type": "attribute"}, "notes": ["the last one"]}
    foreign = Error(type="shop", message="m", data=payloads.Payload(content_type=payloads.JSON, data=b'{"type":"x"}'))
    gateway.processor.event("r1", events.RunFailed(error=foreign))
    assert gateway.api("GET", "/runs/r1/events").json()["events"][-1]["data"]["error"]["data"] == {"type": "x"}


def test_a_payload_that_cannot_be_read_here_is_shown_as_bytes(gateway: GatewayUnderTest) -> None:
    gateway.processor.start("r1")
    secret = payloads.Payload(content_type="application/x-sealed", data=b"\x00\x01")
    gateway.processor.event("r1", events.RunCompleted(result=secret))
    shown = gateway.api("GET", "/runs/r1/events").json()["events"][-1]["data"]["result"]
    assert shown == {"content_type": "application/x-sealed", "base64": "AAE="}


# results


def test_a_result_is_waited_for(gateway: GatewayUnderTest) -> None:
    gateway.processor.start("r1")
    assert gateway.api("GET", "/runs/r1/result").status_code == 202
    early = gateway.api("GET", "/runs/r1/result?wait=0.05")
    assert (early.status_code, early.json()) == (202, {"run_id": "r1", "status": "running"})
    threading.Timer(0.1, gateway.processor.complete, ("r1", {"n": 1})).start()
    done = gateway.api("GET", "/runs/r1/result?wait=20")
    assert (done.status_code, done.json()) == (200, {"run_id": "r1", "status": "completed", "result": {"n": 1}})
    assert gateway.api("GET", "/runs/r1/result").json()["result"] == {"n": 1}
    problem(gateway.api("GET", "/runs/r1/result?wait=301"), 422, "invalid-request")
    problem(gateway.api("GET", "/runs/nobody/result"), 404, "run-not-found")


def test_who_waits_for_a_result_is_answered_when_the_server_stops(gateway: GatewayUnderTest) -> None:
    gateway.processor.start("r1")
    stopping = threading.Timer(0.2, gateway.thread.stop)
    stopping.start()
    early = gateway.api("GET", "/runs/r1/result?wait=60")
    assert (early.status_code, early.json()["status"]) == (202, "running")
    stopping.join()


def test_nobody_waits_for_a_client_that_has_gone(gateway: GatewayUnderTest) -> None:
    gateway.processor.start("r1")
    asked = gateway.app.state.gateway.connection._questions
    calls = [socket.create_connection(("127.0.0.1", httpx.URL(gateway.url).port)) for _ in range(50)]
    for call in calls:
        call.sendall(b"GET /api/v1/runs/r1/result?wait=300 HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert soon(lambda: len(gateway.processor.runs["r1"].waiting) == 50)
    assert len(asked) == 50
    for call in calls:
        call.close()
    assert soon(lambda: not asked)


@pytest.mark.parametrize(
    ("status", "data", "said"),
    [
        ("failed", events.RunFailed, "failed: OutOfStock: no tea"),
        ("blocked", events.RunBlocked, "is blocked: OutOfStock: no tea"),
    ],
)
def test_an_unsuccessful_end_is_a_conflict(status: str, data: Any, said: str, gateway: GatewayUnderTest) -> None:
    gateway.processor.start("r1")
    error = Error(type="shop:OutOfStock", message="no tea")
    gateway.processor.end("r1", status, data(error=error), error)
    found = problem(gateway.api("GET", "/runs/r1/result"), 409, f"run-{status}")
    assert said in found["detail"]
    assert (found["run_status"], found["error"]["type"]) == (status, "shop:OutOfStock")


def test_a_run_is_cancelled_with_a_reason(gateway: GatewayUnderTest) -> None:
    gateway.processor.start("r1")
    response = gateway.api("POST", "/runs/r1/cancel", json={"reason": "enough"})
    assert (response.status_code, response.json()["status"]) == (200, "cancelled")
    assert [c.reason for c in gateway.broker.sent if isinstance(c, CancelRun)] == ["enough"]
    half = gateway.api("POST", "/runs/r1/cancel", content=b'{"reason": "\\ud800."}', headers=JSON)
    problem(half, 422, "invalid-request")
    assert gateway.api("POST", "/runs/r1/cancel").status_code == 200
    problem(gateway.api("GET", "/runs/r1/result"), 409, "run-cancelled")
    problem(gateway.api("POST", "/runs/nobody/cancel"), 404, "run-not-found")


def test_a_run_is_done_again(gateway: GatewayUnderTest) -> None:
    gateway.api("POST", "/runs", json={"workflow": "greet", "args": ["Ada"], "run_id": "r1", "attributes": {"a": "b"}})
    response = gateway.api("POST", "/runs/r1/rerun", json={"run_id": "r2"})
    assert (response.status_code, response.json()["run_id"]) == (201, "r2")
    first, second = (c for c in gateway.broker.sent if isinstance(c, StartRun))
    assert (second.workflow, second.input, second.attributes) == (first.workflow, first.input, first.attributes)
    assert gateway.api("POST", "/runs/r1/rerun").json()["run_id"].startswith("wrun_")
    problem(gateway.api("POST", "/runs/nobody/rerun"), 404, "run-not-found")
    problem(gateway.api("POST", "/runs/r1/rerun", json={"run_id": "|"}), 400, "bad-run-id")


# hooks

ADDRESS = "/hooks/ship%2F7%20%C3%A4"
TOKEN = "ship/7 ä"


def test_hooks_are_looked_up_and_listed(gateway: GatewayUnderTest) -> None:
    gateway.processor.open(TOKEN, metadata={"order": 7})
    gateway.processor.open("hook_aaaaaaaaaaaaaaaaaaaaaa.r2", "r2", webhook=True, response="manual")
    gateway.processor.start("r3")
    hook = gateway.api("GET", ADDRESS).json()
    assert (hook["token"], hook["run_id"], hook["metadata"], hook["webhook"]) == (TOKEN, "r1", {"order": 7}, False)
    assert [h["token"] for h in gateway.api("GET", "/runs/r1/hooks").json()["hooks"]] == [TOKEN]
    listed = gateway.api("GET", "/hooks").json()
    assert [(h["run_id"], h["response"]) for h in listed["hooks"]] == [("r2", "manual"), ("r1", None)]
    webhook, plain = listed["hooks"]
    assert webhook["url"].endswith("/.well-known/workflow/v1/webhook/hook_aaaaaaaaaaaaaaaaaaaaaa.r2")
    assert webhook["url"].startswith("http://127.0.0.1:")
    assert plain["url"] is None
    first = gateway.api("GET", "/hooks?limit=1").json()
    second = gateway.api("GET", f"/hooks?limit=1&cursor={first['next_cursor']}").json()
    assert [h["run_id"] for h in (*first["hooks"], *second["hooks"])] == ["r2", "r1"]
    assert problem(gateway.api("GET", "/hooks/nobody"), 404, "hook-not-found")["token"] == "nobody"
    problem(gateway.api("GET", "/hooks/" + "a" * 1025), 400, "bad-token")
    problem(gateway.api("GET", "/runs/nobody/hooks"), 404, "run-not-found")


@pytest.mark.parametrize(
    ("media", "body", "value"),
    [
        ("application/json", b'{"by": "Ada"}', {"by": "Ada"}),
        ("application/merge-patch+json; charset=utf-8", b"[1]", [1]),
        ("application/msgpack", payloads.dump({1, 2}, "v").data, {1, 2}),
        ("text/plain; charset=utf-8", "grüß".encode(), "grüß"),
        ("application/octet-stream", b"\xff\x00", b"\xff\x00"),
        ("application/x-www-form-urlencoded", b"a=1", b"a=1"),
        ("", b"", None),
    ],
)
def test_a_hook_is_resumed_with_any_content(media: str, body: bytes, value: Any, gateway: GatewayUnderTest) -> None:
    gateway.processor.open(TOKEN)
    response = gateway.api("POST", ADDRESS, content=body, headers={"content-type": media} if media else {})
    assert (response.status_code, response.json()["run_id"]) == (200, "r1")
    assert payloads.load(gateway.processor.received[0].payload) == value


def test_an_idempotency_key_makes_a_delivery_count_once(gateway: GatewayUnderTest) -> None:
    gateway.processor.open("t")
    for _ in range(2):
        response = gateway.api("POST", "/hooks/t", json=1, headers={"Idempotency-Key": "d-1"})
        assert response.json()["resume_id"] == "d-1"
    for _ in range(2):
        gateway.api("POST", "/hooks/t", json=2)
    assert gateway.processor.received[0].resume_id == "d-1"
    assert len(gateway.processor.received) == 3
    problem(gateway.api("POST", "/hooks/t", json=1, headers={"Idempotency-Key": "x" * 256}), 422, "invalid-request")


def test_what_is_not_what_it_says_resumes_nothing(gateway: GatewayUnderTest) -> None:
    gateway.processor.open("t")
    for body in (b"{", b"[" * 5_000 + b"]" * 5_000, b"NaN", b'"\xff"'):
        problem(gateway.api("POST", "/hooks/t", content=body, headers=JSON), 400, "not-json")
    msgpack = {"content-type": "application/msgpack"}
    for body in (b"\xc1", b"\x91" * 5_000 + b"\x01", b"\xa1\xff"):
        problem(gateway.api("POST", "/hooks/t", content=body, headers=msgpack), 400, "not-msgpack")
    problem(gateway.api("POST", "/hooks/t", content=b"\xff", headers={"content-type": "text/plain"}), 400, "not-text")
    problem(gateway.api("POST", "/hooks/nobody", json=1), 404, "hook-not-found")
    problem(gateway.api("POST", "/hooks/t", content=b"x" * 200_000), 413, "too-large")
    assert not gateway.processor.received


# limits, errors, security


def test_a_body_over_the_limit_is_refused_however_it_comes() -> None:
    with gateway_under_test(max_body=1000) as gateway:
        gateway.processor.open("t")
        problem(gateway.api("POST", "/hooks/t", content=b"x" * 1001), 413, "too-large")
        problem(gateway.api("POST", "/hooks/t", content=iter([b"x" * 600, b"x" * 600])), 413, "too-large")
        body = {"workflow": "x" * 1000}
        problem(gateway.api("POST", "/runs", json=body), 413, "too-large")
        assert not gateway.processor.received
        assert gateway.api("POST", "/hooks/t", content=b"x" * 1000).status_code == 200


def test_a_body_that_declares_too_much_is_refused_before_it_is_sent() -> None:
    with gateway_under_test(max_body=1000) as gateway, connected(gateway) as call:
        call.sendall(b"POST /api/v1/hooks/t HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1001\r\n\r\n")
        assert call.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_a_client_that_goes_while_it_sends_is_no_error(
    gateway: GatewayUnderTest, caplog: pytest.LogCaptureFixture
) -> None:
    gateway.processor.open("t", webhook=True)
    for path in (b"/api/v1/hooks/t", b"/api/v1/runs", b"/.well-known/workflow/v1/webhook/t"):
        with connected(gateway) as call:
            call.sendall(b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\nx" % path)
            time.sleep(0.1)
    gateway.thread.stop()
    assert not gateway.processor.received
    assert not [record for record in caplog.records if record.name.startswith("uvicorn")]


def connected(gateway: GatewayUnderTest) -> socket.socket:
    return socket.create_connection(("127.0.0.1", httpx.URL(gateway.url).port), timeout=10)


def soon(holds: Callable[[], bool]) -> bool:
    """Whether something comes to hold within seconds."""
    until = time.monotonic() + 10
    while not holds():
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


def test_all_who_come_while_the_broker_is_down_wait_for_one_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = []

    def down(self: ScriptedBroker, topic: str, timeout: float = 10.0) -> int:
        attempts.append(topic)
        time.sleep(0.5)
        raise BrokerUnreachable("nobody answers")

    monkeypatch.setattr(ScriptedBroker, "partitions", down)
    with gateway_under_test() as gateway, ThreadPoolExecutor(40) as pool:
        began = time.monotonic()
        found = list(pool.map(lambda _: httpx.get(f"{gateway.url}/api/v1/runs/r1", trust_env=False), range(40)))
        assert time.monotonic() - began < 5
        assert {response.status_code for response in found} == {503}
        assert len(attempts) < 10


def test_readiness_is_bounded_whatever_the_broker_does(
    gateway: GatewayUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway_module, "_BROKER", 0.1)
    hangs, asked = threading.Event(), []

    def topics(self: ScriptedBroker, timeout: float = 30.0) -> list[str]:
        asked.append(timeout)
        hangs.wait(20)
        return []

    monkeypatch.setattr(ScriptedBroker, "topics", topics)
    for _ in range(3):
        ready = gateway.http.get("/ready", timeout=5)
        assert (ready.status_code, ready.json()["problem"]) == (503, "memory: does not answer within 0.1 s")
    assert asked == [0.1]
    hangs.set()


def test_without_an_answer_the_owner_of_the_partition_is_named() -> None:
    with gateway_under_test(timeout=0.05) as gateway:
        gateway.processor.deaf = 99
        assert "start `durably processor`" in problem(gateway.api("GET", "/runs/r1"), 504, "no-answer")["detail"]


def test_without_topics_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "_COMPLETE", 0.05)
    with gateway_under_test() as gateway:
        gateway.broker.states.clear()
        assert "durably topics create" in problem(gateway.api("GET", "/runs/r1"), 503, "unavailable")["detail"]
        listing = gateway.api("GET", "/runs")
        assert "durably topics create" in problem(listing, 503, "not-ready")["detail"]
        assert listing.headers["retry-after"] == "5"
        ready = gateway.http.get("/ready")
        assert (ready.status_code, ready.json()["healthy"]) == (503, False)


def test_what_is_not_there_is_a_problem_too(gateway: GatewayUnderTest) -> None:
    problem(gateway.http.get("/nowhere"), 404, "not-found")
    problem(gateway.api("DELETE", "/runs/r1"), 405, "method-not-allowed")


def test_health_and_readiness(gateway: GatewayUnderTest) -> None:
    assert gateway.http.get("/health").json() == {"healthy": True}
    assert (gateway.http.head("/health").status_code, gateway.http.head("/health").content) == (200, b"")
    gateway.api("GET", "/runs")
    assert gateway.http.get("/ready").json() == {"healthy": True, "problem": None}


def test_every_processor_is_asked(gateway: GatewayUnderTest) -> None:
    report = gateway.api("GET", "/processors").json()
    assert report["healthy"]
    assert [p["partition"] for p in report["partitions"]] == [0, 1, 2]
    gateway.broker.on_command = lambda command: None
    dead = gateway.api("GET", "/processors?timeout=0.05")
    assert (dead.status_code, dead.json()["healthy"]) == (503, False)
    assert {p["latency_ms"] for p in dead.json()["partitions"]} == {None}


def test_with_a_token_the_api_needs_it_and_health_does_not() -> None:
    with gateway_under_test(token="s3cret-ä") as gateway:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic s3cret"}):
            response = gateway.api("GET", "/runs", headers=headers)
            problem(response, 401, "unauthorized")
            assert response.headers["www-authenticate"] == "Bearer"
        right = {b"Authorization": "Bearer s3cret-ä".encode("latin-1")}
        assert gateway.api("GET", "/runs", headers=right).status_code == 200
        assert gateway.http.get("/health").status_code == 200


def test_every_route_of_the_api_asks_for_the_token_before_it_reads_a_body() -> None:
    with gateway_under_test(token="s3cret") as gateway:
        for path, methods in gateway.http.get("/openapi.json").json()["paths"].items():
            for method in methods:
                if path.startswith("/api/"):
                    with connected(gateway) as call:  # it promises a body that does not come
                        head = f"{method.upper()} {path.replace('{', 'a').replace('}', '')} HTTP/1.1\r\nHost: localhost"
                        call.sendall(f"{head}\r\nContent-Length: 9\r\n\r\n".encode())
                        assert call.recv(1000).startswith(b"HTTP/1.1 401 "), (method, path)


def test_an_empty_token_is_no_token() -> None:
    with pytest.raises(ConfigurationError, match="token is empty"):
        create_gateway("embedded:x", token=" ")


def test_no_page_of_another_site_reaches_a_gateway_without_a_token() -> None:
    with gateway_under_test() as gateway:  # on a thread, where it is for this machine whatever it was made for
        gateway.processor.start("r1")
        host = gateway.url.removeprefix("http://")
        problem(gateway.api("GET", "/runs/r1", headers={"Host": "rebound.example.com"}), 403, "forbidden")
        problem(gateway.api("GET", "/runs/r1", headers={"Host": "["}), 403, "forbidden")
        problem(gateway.api("GET", "/runs/r1", headers={"Origin": "http://["}), 403, "forbidden")
        cross = {"Origin": "https://evil.example.com"}
        assert "evil" in problem(gateway.api("POST", "/runs/r1/cancel", headers=cross), 403, "forbidden")["detail"]
        assert not [c for c in gateway.broker.sent if isinstance(c, CancelRun)]
        for headers in ({"Origin": f"http://{host}"}, {"Host": "localhost:8233"}, {"Host": "[::1]:8233"}):
            assert gateway.api("GET", "/runs/r1", headers=headers).status_code == 200, headers


def test_only_loopback_does_without_a_token() -> None:
    for host in ("127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost"):
        assert is_loopback(host)
        checked_binding(host, None)
    for host in ("0.0.0.0", "::", "192.168.1.7", "example.com"):
        with pytest.raises(ConfigurationError, match=r"DURABLY_GATEWAY_TOKEN.*or listen on 127.0.0.1"):
            checked_binding(host, None)
        checked_binding(host, "secret")


def test_answers_do_not_wait_for_delayed_acknowledgements() -> None:
    with bind("127.0.0.1", 0) as listening:
        assert listening.proto == socket.IPPROTO_TCP  # which is how asyncio knows for what to set TCP_NODELAY


def test_a_port_that_is_taken_names_the_option() -> None:
    with bind("127.0.0.1", 0) as taken, pytest.raises(ConfigurationError, match="choose another with --port"):
        bind("127.0.0.1", taken.getsockname()[1])


# the application


def test_openapi_describes_every_route_with_its_models(gateway: GatewayUnderTest) -> None:
    document = gateway.http.get("/openapi.json").json()
    operations = {
        (method, path): operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    assert {(method, path) for method, path in operations if path.startswith("/api/v1/runs")} == {
        ("post", "/api/v1/runs"),
        ("get", "/api/v1/runs"),
        ("get", "/api/v1/runs/{run_id}"),
        ("get", "/api/v1/runs/{run_id}/events"),
        ("get", "/api/v1/runs/{run_id}/result"),
        ("post", "/api/v1/runs/{run_id}/cancel"),
        ("post", "/api/v1/runs/{run_id}/rerun"),
        ("get", "/api/v1/runs/{run_id}/hooks"),
        ("get", "/api/v1/runs/{run_id}/streams"),
        ("get", "/api/v1/runs/{run_id}/streams/{namespace}"),
    }
    assert ("post", "/.well-known/workflow/v1/webhook/{token}") in operations
    for (method, path), operation in operations.items():
        assert operation["summary"], path
        assert operation["operationId"].isidentifier()
        if path.startswith("/api/"):
            assert operation["security"] == [{"HTTPBearer": []}], path
            assert {"400", "401", "403", "404", "409", "413", "422", "503", "504"} <= operation["responses"].keys(), (
                path
            )
            names = {p["name"] for p in operation.get("parameters", []) if p["in"] == "path"}
            assert names == {part[1:-1] for part in path.split("/") if part.startswith("{")}, (method, path)


def test_mounted_under_a_prefix_it_opens_by_itself() -> None:
    with gateway_under_test() as gateway:
        outer = FastAPI()
        outer.mount("/durable", gateway.app)
        gateway.processor.open("a/b", webhook=True)
        with serving(outer) as url:
            assert gateway.http.get(f"{url}/durable/api/v1/runs").json()["runs"][0]["run_id"] == "r1"
            hooked = gateway.http.post(f"{url}/durable/.well-known/workflow/v1/webhook/a%2Fb?x=%20", content=b"hi")
            assert hooked.status_code == 202
            request = payloads.load(gateway.processor.received[0].payload)
            assert request.url == f"{url}/durable/.well-known/workflow/v1/webhook/a%2Fb?x=%20"
