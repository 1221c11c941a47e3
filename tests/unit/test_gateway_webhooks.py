"""Webhooks over a scripted processor, through a real server on loopback."""

from __future__ import annotations

import http.client
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from durably import payloads
from durably.streams import Readable
from durably.web import INLINE_BODY, Request, Response
from durably_schemas.records import Reply, ResumeHook, StreamChunk
from unit.gateway_under_test import GatewayUnderTest, gateway_under_test

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PATH = "/.well-known/workflow/v1/webhook/"


pytestmark = pytest.mark.usefixtures("quick_gateway")


@pytest.fixture
def gateway() -> Iterator[GatewayUnderTest]:
    with gateway_under_test(response_timeout=5) as made:
        yield made


def received(gateway: GatewayUnderTest) -> list[Request]:
    return [payloads.load(command.payload) for command in gateway.processor.received]


def answer(gateway: GatewayUnderTest, response: Response) -> None:
    """Lets a step of the run respond to what is received."""

    def on_resume(command: ResumeHook) -> None:
        to = payloads.load(command.payload)._respond_to
        reply = Reply(request_id="", run_id="r1", result=payloads.dump(response, "response"))
        threading.Timer(0.02, gateway.processor.reply, (to, reply)).start()

    gateway.processor.on_resume = on_resume


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD", "PROPFIND", "brew"])
def test_any_method_arrives(method: str, gateway: GatewayUnderTest) -> None:
    gateway.processor.open("t", webhook=True)
    response = gateway.http.request(method, f"{PATH}t?a=1&b=%20x", headers=[("X-Two", "1"), ("X-Two", "2")])
    assert (response.status_code, response.content) == (202, b"")
    (request,) = received(gateway)
    assert (request.method, request.url) == (method.upper(), f"{gateway.url}{PATH}t?a=1&b=%20x")
    assert request.headers.get_list("x-two") == ["1", "2"]
    assert request.body == b""


def test_a_get_may_have_a_body_when_it_comes_from_outside(gateway: GatewayUnderTest) -> None:
    gateway.processor.open("t", webhook=True)
    gateway.http.request("GET", f"{PATH}t", content=b"odd")
    assert received(gateway)[0].body == b"odd"


@pytest.mark.parametrize("token", ["a/b", "ä b", "100%25", "x/", "hook_aaaaaaaaaaaaaaaaaaaaaa.r1", "a?b#c"])
def test_a_token_is_percent_decoded(token: str, gateway: GatewayUnderTest) -> None:
    from urllib.parse import quote

    gateway.processor.open(token, webhook=True)
    url = f"{PATH}{quote(token, safe='')}"
    assert gateway.http.post(url).status_code == 202
    assert received(gateway)[0].url == gateway.url + url


@pytest.mark.parametrize("token", ["nobody", "", "hook_cut", "hook_a.b%7Cc", "%0a", "%FF", "x" * 1025, "plain"])
def test_what_is_no_webhook_is_an_empty_404(token: str, gateway: GatewayUnderTest) -> None:
    gateway.processor.open("plain")
    for method in ("GET", "POST"):
        response = gateway.http.request(method, f"{PATH}{token}", content=b"x")
        assert response.status_code == 404
        assert response.content == b"" or token == "%0a"  # which is no path that anything is routed for
    assert not gateway.processor.received


def test_a_static_response_is_given_each_time(gateway: GatewayUnderTest) -> None:
    response = Response(
        "grüße", 201, [("X-A", "1"), ("X-A", "2"), ("Content-Length", "999"), ("Content-Type", "text/x")]
    )
    gateway.processor.open("t", webhook=True, response=response)
    for _ in range(2):
        got = gateway.http.post(f"{PATH}t")
        assert (got.status_code, got.text) == (201, "grüße")
        assert got.headers.get_list("x-a") == ["1", "2"]
        assert got.headers["content-type"] == "text/x"
    head = gateway.http.head(f"{PATH}t")
    assert (head.status_code, head.content) == (201, b"")


def test_a_bodiless_response_has_no_body(gateway: GatewayUnderTest) -> None:
    gateway.processor.open("t", webhook=True, response=Response(status=204))
    assert gateway.http.post(f"{PATH}t").status_code == 204
    gateway.processor.open("r", webhook=True, response=Response.redirect("https://example.com/x"))
    got = gateway.http.get(f"{PATH}r")
    assert (got.status_code, got.headers["location"]) == (302, "https://example.com/x")


def test_a_manual_response_is_waited_for(gateway: GatewayUnderTest) -> None:
    gateway.processor.open("m", webhook=True, response="manual")
    answer(gateway, Response.json({"sum": 3}, status=201))
    got = gateway.http.post(f"{PATH}m", json={"a": 1})
    assert (got.status_code, got.json(), got.headers["content-type"]) == (201, {"sum": 3}, "application/json")


def test_calls_that_wait_at_once_get_each_their_own_response(gateway: GatewayUnderTest) -> None:
    gateway.processor.open("m", webhook=True, response="manual")

    def echo(command: ResumeHook) -> None:
        request = payloads.load(command.payload)
        reply = Reply(request_id="", result=payloads.dump(Response(request.body), "response"))
        threading.Timer(0.05, gateway.processor.reply, (request._respond_to, reply)).start()

    gateway.processor.on_resume = echo
    got: dict[int, bytes] = {}
    callers = [
        threading.Thread(target=lambda n=n: got.update({n: gateway.http.post(f"{PATH}m", content=str(n)).content}))
        for n in range(8)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert got == {n: str(n).encode() for n in range(8)}


def test_a_manual_response_that_does_not_come_is_a_504_that_says_so() -> None:
    with gateway_under_test(response_timeout=0.05) as gateway:
        gateway.processor.open("m", webhook=True, response="manual")
        got = gateway.http.post(f"{PATH}m")
        assert (got.status_code, got.headers["content-type"]) == (504, "application/problem+json")
        assert "run r1 has the request, but no step of it has responded within 0.05 s" in got.json()["detail"]
        assert len(gateway.processor.received) == 1


def test_nobody_waits_for_the_response_to_a_client_that_has_gone() -> None:
    with gateway_under_test(response_timeout=300) as gateway:
        gateway.processor.open("m", webhook=True, response="manual")
        expected = gateway.app.state.gateway.connection._expected
        calls = [http.client.HTTPConnection(gateway.url.removeprefix("http://")) for _ in range(20)]
        for call in calls:
            call.request("POST", f"{PATH}m", body=b"x")
        assert soon(lambda: len(gateway.processor.received) == 20)
        assert len(expected) == 20
        for call in calls:
            call.close()
        assert soon(lambda: not expected)
        assert len(gateway.processor.received) == 20  # what they sent is the run's all the same


def test_who_waits_for_a_response_is_answered_when_the_server_stops(gateway: GatewayUnderTest) -> None:
    gateway.processor.open("m", webhook=True, response="manual")
    stopping = threading.Timer(0.3, gateway.thread.stop)
    stopping.start()
    began = time.monotonic()
    got = gateway.http.post(f"{PATH}m")
    assert (got.status_code, time.monotonic() - began < 3) == (504, True)
    assert "run r1 has the request, but the gateway stops" in got.json()["detail"]
    stopping.join()


def soon(holds: Callable[[], bool]) -> bool:
    """Whether something comes to hold within seconds."""
    until = time.monotonic() + 10
    while not holds():
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


def test_every_call_counts_unless_the_sender_names_it(gateway: GatewayUnderTest) -> None:
    gateway.processor.open("t", webhook=True)
    gateway.processor.open("u", webhook=True)
    for _ in range(2):
        gateway.http.post(f"{PATH}t", content=b"same")
    for token in ("t", "t", "u"):  # one key of two senders, each at a webhook of its own
        gateway.http.post(f"{PATH}{token}", content=b"named", headers={"Idempotency-Key": "k"})
    assert [r.token for r in gateway.processor.received] == ["t", "t", "t", "u"]
    assert [r.resume_id for r in gateway.processor.received[2:]] == ["k", "k"]
    bad = gateway.http.post(f"{PATH}t", headers={"Idempotency-Key": "k" * 256})
    assert bad.status_code == 400


# bodies


@pytest.mark.parametrize("size", [0, 1, INLINE_BODY])
def test_a_body_travels_within_the_request(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with gateway_under_test() as gateway:
        gateway.broker.max_record_bytes = 1_000_000
        gateway.processor.open("t", webhook=True)
        gateway.http.post(f"{PATH}t", content=b"x" * size)
        assert received(gateway)[0].body == b"x" * size


def test_a_large_body_becomes_a_stream_of_the_run(gateway: GatewayUnderTest) -> None:
    gateway.broker.max_record_bytes = 1_000_000
    gateway.processor.open("t", webhook=True)
    pieces = [bytes([n]) * 100_000 for n in range(20)]
    assert gateway.http.post(f"{PATH}t", content=iter(pieces)).status_code == 202
    (request,) = received(gateway)
    assert isinstance(request.body, Readable)
    assert request.body.run_id == "r1"
    assert request.body.namespace.startswith("webhook-")
    written = [c for c in gateway.broker.sent if isinstance(c, StreamChunk)]
    assert {(c.run_id, c.namespace) for c in written} == {("r1", request.body.namespace)}
    assert [c.n for c in written] == list(range(1, len(written) + 1))
    assert [c.kind for c in written] == ["DATA"] * (len(written) - 1) + ["END"]
    assert b"".join(c.payload.data for c in written[:-1]) == b"".join(pieces)
    assert written[0].payload.content_type == "application/octet-stream"


def test_a_response_with_a_stream_for_its_body_is_streamed(gateway: GatewayUnderTest) -> None:
    gateway.processor.open("m", webhook=True, response="manual")
    answer(gateway, Response(Readable("r1", "big"), headers={"content-type": "image/png"}))
    for n, piece in enumerate([b"ab", b"c"]):
        gateway.processor.chunk("r1", "big", n, piece)
    gateway.processor.chunk("r1", "big", 2, end=True)
    got = gateway.http.get(f"{PATH}m")
    assert (got.status_code, got.content, got.headers["content-type"]) == (200, b"abc", "image/png")


def test_a_body_that_breaks_off_resumes_nothing(gateway: GatewayUnderTest) -> None:
    gateway.processor.open("t", webhook=True)
    host, port = gateway.url.removeprefix("http://").split(":")
    broken = http.client.HTTPConnection(host, int(port))
    broken.putrequest("POST", f"{PATH}t")
    broken.putheader("Content-Length", "1000")
    broken.endheaders(b"only this")
    time.sleep(0.05)
    broken.close()
    time.sleep(0.1)
    assert not gateway.processor.received
    assert gateway.http.post(f"{PATH}t").status_code == 202


def test_a_body_over_the_limit_is_a_413_that_resumes_nothing() -> None:
    with gateway_under_test(max_body=300_000) as gateway:
        gateway.broker.max_record_bytes = 1_000_000
        gateway.processor.open("t", webhook=True)
        got: Any = gateway.http.post(f"{PATH}t", content=iter([b"x" * 100_000] * 4))
        assert (got.status_code, got.json()["type"]) == (413, "urn:durably:problem:too-large")
        assert not gateway.processor.received


def test_no_token_is_asked_for_and_no_proxy_is_believed() -> None:
    with gateway_under_test(token="s3cret") as gateway:
        gateway.processor.open("t", webhook=True)
        forwarded = {
            "X-Forwarded-Host": "evil.example.com",
            "X-Forwarded-Proto": "https",
            "Origin": "https://x.example",
        }
        assert gateway.http.post(f"{PATH}t", headers=forwarded).status_code == 202
        assert received(gateway)[0].url == f"{gateway.url}{PATH}t"


def test_the_public_url_stands_in_what_workflows_see() -> None:
    with gateway_under_test(public_url="https://hooks.example.com/durable/") as gateway:
        gateway.processor.open("a/b", webhook=True)
        gateway.http.post(f"{PATH}a%2Fb?x=1")
        assert received(gateway)[0].url == f"https://hooks.example.com/durable{PATH}a%2Fb?x=1"


def test_without_a_processor_the_sender_may_try_again() -> None:
    with gateway_under_test(timeout=0.05) as gateway:
        gateway.processor.deaf = 99
        got = gateway.http.post(f"{PATH}t")
        assert (got.status_code, got.json()["type"]) == (504, "urn:durably:problem:no-answer")
