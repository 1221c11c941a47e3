"""Requests from anybody: the gateway answers all of them, never with 5xx, and as its OpenAPI document says."""

from __future__ import annotations

import logging
import socket
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import schemathesis
from fuzz.budget import budget
from hypothesis import given
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance
from unit.gateway_under_test import GatewayUnderTest, gateway_under_test

if TYPE_CHECKING:
    from collections.abc import Iterator

TOKEN = "order-7"


@pytest.fixture(scope="module")
def gateway() -> Iterator[GatewayUnderTest]:
    from durably.client import connection
    from durably_connectors.http import projection

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connection, "_TICK", 0.01)
        patch.setattr(projection, "_POLL", 0.02)
        with gateway_under_test() as made:
            made.processor.open(TOKEN, "r1", metadata={"n": 1})
            made.processor.open("web", "r1", webhook=True)
            made.processor.start("done")
            made.processor.complete("done", {"x": [1, b"y", 2**70]})
            for n in range(3):
                made.processor.chunk("done", "default", n + 1, n)
            made.processor.chunk("done", "default", 4, end=True)
            yield made


@pytest.fixture
def crashes(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What the server logs as an error."""
    caplog.set_level(logging.ERROR)
    return caplog


def test_every_operation_answers_what_its_document_says(gateway: GatewayUnderTest) -> None:
    schema = schemathesis.openapi.from_dict(gateway.app.openapi())
    schema.config.base_url = gateway.url
    checks = [not_a_server_error, content_type_conformance, response_schema_conformance]
    tried = 0
    for found in schema.get_all_operations():
        operation = found.ok()
        if operation.path.endswith("/streams/{namespace}") or operation.path == "/ready":
            continue  # a stream lasts as long as its run; and nobody is ready who has no processor
        tried += 1

        @budget(8)
        @given(operation.as_strategy())
        def check(case: Any) -> None:
            response = case.call(timeout=20)
            case.validate_response(response, checks=checks)

        check()
    assert tried >= 12


# -- what no client of HTTP would send -----------------------------------------------------------------------------


def raw(gateway: GatewayUnderTest, data: bytes) -> bytes:
    """What the server sends until it closes, or has answered."""
    host, port = httpx.URL(gateway.url).host, httpx.URL(gateway.url).port
    with socket.create_connection((host, port), timeout=10) as peer:
        try:
            peer.sendall(data)
            peer.shutdown(socket.SHUT_WR)
            answer = b""
            while piece := peer.recv(65536):
                answer += piece
        except ConnectionError:  # closed upon us, as a server may
            pass
    return answer


def statuses(answer: bytes) -> list[int]:
    return [int(line[9:12]) for line in answer.split(b"\r\n") if line.startswith(b"HTTP/1.1 ")]


HEADERS = st.lists(
    st.tuples(
        st.sampled_from(
            [
                b"Authorization", b"Host", b"Origin", b"Content-Type", b"Idempotency-Key", b"Last-Event-ID", b"Accept",
                b"Content-Length", b"Transfer-Encoding", b"Expect", b"X-Forwarded-Host", b"Content-Encoding", b"Upgrade",
            ]
        ),
        st.one_of(
            st.binary(max_size=12),
            st.sampled_from(
                [b"", b"Bearer x", b"-1", b"9" * 30, b"0x10", b"5", b"chunked", b"gzip", b"application/json", b"h2c",
                 b"application/msgpack", b"text/plain; charset=nonsense", b"a\r\nX-Smuggled: 1", b"a\nb", b"a\0b",
                 b"100-continue", b"http://[::1", b"[::1", b"x" * 9_000]
            ),
        ),
    ),
    max_size=4,
)  # fmt: skip
PATHS = st.one_of(
    st.binary(max_size=20).map(lambda tail: b"/" + tail),
    st.sampled_from(
        [b"/api/v1/runs", b"/api/v1/runs?limit=0", b"/api/v1/runs?cursor=%00", b"/api/v1/runs/%00", b"/api/v1/runs/%ff/result",
         b"/api/v1/runs/done/streams/default", b"/api/v1/runs/done/result?wait=nan", b"/api/v1/hooks/order-7", b"/webhooks/web",
         b"/.well-known/workflow/v1/webhook/web", b"/api/v1/runs?created_from=9999-12-31T23:59:59-14:00", b"/" + b"a" * 70_000,
         b"/api/v1/runs/../../etc", b"http://elsewhere/api/v1/runs", b"*", b"/api/v1/runs/" + b"%2F" * 500,
         b"/api/v1/runs?attribute==&status=x", b"/api/v1/runs?limit=99999999999999999999", b"/api/v1/runs/done/events?from_seq=1e5"]
    ),
)  # fmt: skip
BODIES = st.one_of(
    st.binary(max_size=30),
    st.sampled_from(
        [b'{"workflow": "w"}', b'{"workflow": "w", "args": [' + b"[" * 5_000, b'"\xff"', b"\x91" * 5_000, b"NaN",
         b'{"workflow": "w", "delay": 1e308}', b'{"workflow": "w", "run_id": "\\ud800"}', b"5\r\nhello\r\n0\r\n\r\n",
         b"FFFFFFFFFFFFFFFF\r\nx\r\n", b'{"workflow": "w", "delay": -1}', b'{"reason": "' + b"r" * 70_000 + b'"}']
    ),
)  # fmt: skip


@budget(60)
@given(
    st.sampled_from([b"GET", b"POST", b"PUT", b"HEAD", b"OPTIONS", b"G\0T", b""]), PATHS, HEADERS, BODIES, st.booleans()
)
def test_whatever_is_sent_no_answer_is_a_server_error(
    gateway: GatewayUnderTest,
    crashes: pytest.LogCaptureFixture,
    method: bytes,
    path: bytes,
    headers: Any,
    body: bytes,
    lies: bool,
) -> None:
    if not lies:
        headers = [*headers, (b"Content-Length", b"%d" % len(body))]
    lines = [
        method + b" " + path + b" HTTP/1.1",
        b"Host: localhost",
        *(name + b": " + value for name, value in headers),
    ]
    answer = raw(gateway, b"\r\n".join([*lines, b"Connection: close", b"", body]))
    assert all(status < 500 for status in statuses(answer)), answer
    assert b"\r\nx-smuggled" not in answer.lower()
    assert [record for record in crashes.records if record.exc_info] == []
    assert gateway.http.get("/api/v1/runs/done").status_code == 200


@budget(60)
@given(st.text(max_size=30))
def test_a_last_event_id_is_an_index_or_a_problem(gateway: GatewayUnderTest, text: str) -> None:
    try:
        sent = {"Last-Event-ID": text.encode("latin-1", "replace")}
        response = gateway.api("GET", "/runs/done/streams/default", headers=sent)
    except httpx.LocalProtocolError:
        return
    assert response.status_code in (200, 400), response.text


def test_a_gateway_with_a_token_tells_all_that_lack_it_the_same() -> None:
    with gateway_under_test(token="sécret") as guarded:

        @budget(60)
        @given(st.one_of(st.binary(max_size=20), st.just(b"Bearer s\xe9cret2"), st.just(b"Bearer ")))
        def check(value: bytes) -> None:
            try:
                response = guarded.api("GET", "/runs/r1", headers={"Authorization": value})
            except httpx.LocalProtocolError:
                return
            assert response.status_code in (400, 401)  # 400: the server takes no such header

        check()


@budget(60)
@given(st.binary(max_size=60), st.sampled_from(["PUT", "POST", "DELETE", "PATCH"]), st.text(max_size=20))
def test_a_webhook_takes_any_body(gateway: GatewayUnderTest, body: bytes, method: str, query: str) -> None:
    response = gateway.http.request(method, "/.well-known/workflow/v1/webhook/web", content=body, params={"q": query})
    assert response.status_code in (202, 404), response.text
