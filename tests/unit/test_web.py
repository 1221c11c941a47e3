"""Requests, responses and headers as values, and `fetch` against a server on loopback."""

from __future__ import annotations

import asyncio
import builtins
import threading
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from durably import payloads, web
from durably.errors import ConfigurationError, DurablyError, FatalError
from durably.runtime import StepContext, step_context
from durably.streams import Readable
from durably.web import BUILTIN_STEPS, INLINE_BODY, Headers, Request, Response, fetch
from durably_schemas.records import ReplyTo
from hypothesis import given
from hypothesis import strategies as st

URL = "https://example.com/x?y=1"


def travelled(value: Any) -> Any:
    return payloads.load(payloads.dump(value, "value"))


# headers


def test_headers_have_names_in_any_case_several_values_and_an_order() -> None:
    headers = Headers([("Set-Cookie", "a=1"), ("X-Kind", " ping\t"), ("set-cookie", "b=2")])
    assert headers["X-KIND"] == "ping"
    assert headers["Set-cookie"] == "a=1, b=2"
    assert headers.get_list("SET-COOKIE") == ["a=1", "b=2"]
    assert (list(headers), len(headers)) == (["set-cookie", "x-kind"], 2)
    assert ("X-kind" in headers, "x-none" in headers, 7 in headers) == (True, False, False)
    assert headers.pairs[0] == ("Set-Cookie", "a=1")
    assert headers.get("x-none") is None
    with pytest.raises(KeyError):
        headers["x-none"]


def test_headers_are_equal_whatever_they_were_made_of() -> None:
    assert Headers({"A": "1"}) == Headers([("a", "1")]) == {"A": "1"}
    assert Headers({"A": "1"}) != {"A": "2"}
    assert hash(Headers({"A": "1"})) == hash(Headers([("a", "1")]))
    assert Headers(Headers({"A": "1"})).pairs == (("A", "1"),)


@pytest.mark.parametrize(
    "pair",
    [
        *[(name, "x") for name in ("", "a b", "a:", "ä")],
        *[("a", value) for value in ("x\r\ny", "\0", "→", 1, "\x1b[0m", "\x7f", "\x01")],
    ],
)
def test_what_http_does_not_allow_is_no_header(pair: Any) -> None:
    with pytest.raises(ValueError, match="header"):
        Headers([pair])


CONTROLS = [*(chr(n) for n in range(32) if chr(n) != "\t"), "\x7f"]
pairs = st.lists(
    st.tuples(st.text("aZ0-_", min_size=1), st.text(st.characters(max_codepoint=255, exclude_characters=CONTROLS))),
    max_size=5,
)


@given(pairs)
def test_headers_travel(given_pairs: list[tuple[str, str]]) -> None:
    headers = Headers(given_pairs)
    assert travelled(headers).pairs == headers.pairs


# requests


def test_a_request_is_checked_and_its_method_is_upper_case() -> None:
    request = Request("post", URL, {"A": "1"}, "grüß")
    assert (request.method, request.url, request.headers["a"], request.body) == ("POST", URL, "1", "grüß".encode())
    assert repr(request) == f"<Request POST {URL}>"


@pytest.mark.parametrize(
    ("method", "url", "body", "said"),
    [
        ("", URL, b"", "method ''"),
        ("PO ST", URL, b"", "method"),
        ("get", URL, b"x", "a GET request has no body"),
        ("HEAD", URL, "x", "a HEAD request has no body"),
        ("GET", "/relative", b"", "is no URL"),
        ("GET", "ftp://example.com", b"", "is no URL"),
        ("GET", "https://", b"", "is no URL"),
        ("GET", "https://[x", b"", "is no URL"),
        ("GET", "https://example.com:99999", b"", "is no URL"),
        ("GET", None, b"", "is no URL"),
    ],
)
def test_what_is_no_request_says_so(method: str, url: Any, body: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Request(method, url, body=body)


def test_a_request_travels_with_its_body_and_its_address() -> None:
    to = ReplyTo(partition=3, request_id="q")
    sent = Request.received("GET", URL, [("A", "1"), ("a", "2")], b"\xff", to)
    got = travelled([sent])[0]
    assert (got.method, got.url, got.headers.pairs, got.body) == ("GET", URL, (("A", "1"), ("a", "2")), b"\xff")
    assert got._respond_to == to
    stream = travelled(Request.received("POST", URL, None, Readable("r1", "webhook-1")))
    assert stream.body == Readable("r1", "webhook-1")


def test_bodies_are_read_as_bytes_text_and_json() -> None:
    request = Request("POST", URL, {"content-type": "application/json"}, '{"a": "ü"}')

    async def read() -> None:
        assert await request.bytes() == request.bytes_sync() == '{"a": "ü"}'.encode()
        assert await request.json() == {"a": "ü"}
        assert await request.text() == '{"a": "ü"}'
        latin = Request("POST", URL, {"Content-Type": 'text/plain; Charset="ISO-8859-1"'}, "ü".encode("latin-1"))
        assert await latin.text() == "ü"
        for kind in ("text/plain; charset=nonsense", "text/plain", ""):
            assert await Request("POST", URL, {"content-type": kind}, b"\xffx").text() == "\ufffdx"
        with pytest.raises(ValueError, match=r"the body of POST https.* is no JSON"):
            await Request("POST", URL, body="{").json()

    asyncio.run(read())


# responses


def test_responses_are_made_in_one_call() -> None:
    made = Response.json({"a": [1]}, status=201, headers={"X": "1"})
    assert (made.status, made.body, made.headers["content-type"]) == (201, b'{"a":[1]}', "application/json")
    assert Response.json(1, headers={"Content-Type": "application/problem+json"}).headers.pairs == (
        ("Content-Type", "application/problem+json"),
    )
    made = Response.text("grüß")
    assert (made.body, made.headers["content-type"]) == ("grüß".encode(), "text/plain; charset=utf-8")
    moved = Response.redirect("/elsewhere")
    assert (moved.status, moved.headers["location"], moved.body) == (302, "/elsewhere", b"")
    assert Response("x").body == b"x"
    assert (Response(status=204).ok, Response(status=404).ok) == (True, False)


def test_the_same_names_read_where_there_is_a_response() -> None:
    async def read() -> None:
        response = Response.json({"a": 1})
        assert await response.json() == {"a": 1}
        assert await response.text() == '{"a":1}'
        assert await response.bytes() == response.bytes_sync() == b'{"a":1}'
        with pytest.raises(ValueError, match="the body of <Response 200> is no JSON"):
            await Response("{").json()

    asyncio.run(read())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Response(status=199), "use 200 to 599"),
        (lambda: Response(status=600), "use 200 to 599"),
        (lambda: Response(status=True), "use 200 to 599"),
        (lambda: Response("x", 204), "a response with status 204 has no body"),
        (lambda: Response("x", 205), "has no body"),
        (lambda: Response("x", 304), "has no body"),
        (lambda: Response(headers={"a": "b\n"}), "header a"),
        (lambda: Response.redirect("/", 200), "301, 302, 303, 307, 308"),
    ],
)
def test_what_is_no_response_says_so(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize("body", [None, {"a": 1}, 7, [b"x"], object()])
def test_a_body_is_bytes_or_text(body: Any) -> None:
    with pytest.raises(TypeError, match=r"the body of this Response is .* for JSON Response\.json\(value\)"):
        Response(body)
    with pytest.raises(TypeError, match=r"the body of this Request is .* for JSON json\.dumps\(value\)"):
        Request("POST", URL, body=body)
    with pytest.raises(TypeError, match="the body of this Response"):
        Response.received(body, 200, None)


@pytest.mark.parametrize("body", [bytearray(b"xy"), memoryview(b"xy"), "xy", b"xy"])
def test_whatever_is_bytes_is_kept_as_such(body: Any) -> None:
    assert type(Response(body).body) is type(Request("POST", URL, body=body).body) is bytes
    assert travelled(Response(body)).body == b"xy"


def test_a_response_travels() -> None:
    got = travelled({"x": Response(b"\x00", 418, [("A", "1"), ("A", "2")])})["x"]
    assert (got.status, got.body, got.headers.pairs) == (418, b"\x00", (("A", "1"), ("A", "2")))
    assert travelled(Response(Readable("r", "n"))).body == Readable("r", "n")


# in steps and workflows


class FakeServices:
    """What a worker offers to a step, as far as requests need it."""

    def __init__(self) -> None:
        self.responded: list[tuple[ReplyTo, Any]] = []

    async def respond(self, to: ReplyTo, payload: payloads.Payload) -> None:
        self.respond_sync(to, payload)

    def respond_sync(self, to: ReplyTo, payload: payloads.Payload) -> None:
        self.responded.append((to, payloads.load(payload)))


class FakeWriters:
    """The streams of a step, in memory."""

    def __init__(self) -> None:
        self.streams: dict[str, list[Any]] = {}

    async def write(self, namespace: str, value: Any) -> None:
        self.streams.setdefault(namespace, []).append(value)

    def end(self, namespace: str) -> None:
        self.streams[namespace].append(None)


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> Iterator[StepContext]:
    """What runs in the test is in a step."""
    context = StepContext(
        run_id="r1", workflow_name="w", workflow_started_at=0, step_id="s1", step_name="s", attempt=2, execution=1,
        started_at=0, writers=FakeWriters(), services=FakeServices(),
    )  # fmt: skip
    token = step_context.set(context)
    yield context
    step_context.reset(token)


class FakeRun:
    """The run of a workflow, which records what steps it calls."""

    def __init__(self) -> None:
        self.called: list[tuple[str, Any]] = []

    async def call_step(self, definition: Any, args: Any, kwargs: Any) -> bytes:
        self.called.append((definition.name, args))
        return b"from the step"


def in_a_workflow(code: Any) -> FakeRun:
    run = FakeRun()

    async def main() -> None:
        asyncio.get_running_loop().workflow_context = run
        await code()

    asyncio.run(main())
    return run


ADDRESS = ReplyTo(partition=1, request_id="q")


def test_a_step_responds_once(step: StepContext) -> None:
    for sync in (True, False):
        request = Request.received("POST", URL, None, b"", ADDRESS)
        if sync:
            request.respond_with_sync(Response.text("a"))
        else:
            asyncio.run(request.respond_with(Response.text("a")))
        with pytest.raises(DurablyError, match="has its response already"):
            request.respond_with_sync(Response.text("b"))
    assert [(to, r.body) for to, r in step.services.responded] == [(ADDRESS, b"a")] * 2


def test_only_a_response_to_a_request_that_waits_is_one(step: StepContext) -> None:
    with pytest.raises(DurablyError, match="respond_with='manual'"):
        Request("GET", URL).respond_with_sync(Response())
    with pytest.raises(TypeError, match=r"no durably\.web\.Response"):
        Request.received("GET", URL, None, b"", ADDRESS).respond_with_sync({"status": 200})
    assert step.services.responded == []


def test_responding_works_in_a_step_only(step: StepContext) -> None:
    request = Request.received("GET", URL, None, b"", ADDRESS)

    async def respond() -> None:
        with pytest.raises(DurablyError, match="works in a step only: pass the request to a step"):
            await request.respond_with(Response())

    in_a_workflow(respond)
    step_context.set(None)
    asyncio.run(respond())


def test_a_workflow_reads_a_stream_by_a_recorded_step_and_bytes_at_once() -> None:
    handle = Readable("r1", "webhook-1")

    async def read() -> None:
        assert await Request.received("POST", URL, None, handle).bytes() == b"from the step"
        assert await Response(handle).text() == "from the step"
        assert await Request("POST", URL, body="inline").text() == "inline"

    assert in_a_workflow(read).called == [("durably.request_body", (handle,))] * 2


def test_a_step_reads_the_stream_itself(step: StepContext, monkeypatch: pytest.MonkeyPatch) -> None:
    async def pieces(self: Readable) -> AsyncIterator[bytes]:
        for piece in (b"ab", b"c"):
            yield piece

    monkeypatch.setattr(Readable, "__aiter__", pieces)
    monkeypatch.setattr(Readable, "__iter__", lambda self: iter((b"ab", b"c")))
    request = Request.received("POST", URL, None, Readable("r1", "webhook-1"))
    assert asyncio.run(request.bytes()) == request.bytes_sync() == b"abc"


def test_the_steps_that_every_worker_knows() -> None:
    assert [s.name for s in BUILTIN_STEPS] == ["durably.fetch", "durably.request_body"]
    assert all(s.is_async for s in BUILTIN_STEPS)


# fetch


class Echo(BaseHTTPRequestHandler):
    """Says what it was asked; ``/big`` answers with many bytes, ``/gone`` with 410, ``/moved`` with a redirect."""

    def do_GET(self) -> None:
        size = int(self.headers.get("content-length", 0))
        got = self.rfile.read(size)
        body = b"x" * (3 * INLINE_BODY) if self.path == "/big" else f"{self.command} {self.path} ".encode() + got
        self.send_response({"/gone": 410, "/moved": 302, "/odd": 999}.get(self.path, 200))
        self.send_header("X-Type", self.headers.get("content-type", ""))
        self.send_header("X-Given", self.headers.get("x-given", ""))
        self.send_header("X-Utf8", "→".encode().decode("latin-1"))
        self.send_header("Set-Cookie", "a=1")
        self.send_header("Set-Cookie", "b=2")
        if self.path == "/moved":
            self.send_header("Location", "/there")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_PUT = do_GET  # noqa: N815 - as the standard library calls them

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Echo) as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{made.server_port}"
        made.shutdown()
        thread.join()


def test_fetch_sends_what_it_is_given(server: str) -> None:
    async def main() -> None:
        got = await fetch(f"{server}/a?b=1", headers={"X-Given": "1"})
        assert (got.status, await got.text(), got.headers["x-given"]) == (200, "GET /a?b=1 ", "1")
        assert got.headers.get_list("set-cookie") == ["a=1", "b=2"]
        got = await fetch(f"{server}/p", method="post", json={"n": 1})
        assert (await got.text(), got.headers["x-type"]) == ('POST /p {"n":1}', "application/json")
        got = await fetch(f"{server}/p", method="PUT", body="ü", headers=Headers({"Content-Type": "text/x"}))
        assert (await got.text(), got.headers["x-type"]) == ("PUT /p ü", "text/x")
        assert await (await fetch(f"{server}/moved")).text() == "GET /there "
        assert (await fetch(f"{server}/gone")).status == 410
        odd = travelled(await fetch(f"{server}/odd"))
        assert (odd.status, odd.ok, odd.headers["x-utf8"].encode("latin-1")) == (999, False, "→".encode())

    asyncio.run(main())


@pytest.mark.parametrize(
    "headers", [None, {"A": "1"}, [("A", "1"), ("A", "2")], Headers([("A", "1"), ("a", "2")])], ids=type
)
def test_the_arguments_of_a_fetch_travel(headers: Any) -> None:
    given = {"headers": headers, "timeout": "5s", "body": b"x"}
    sent = payloads.dump_arguments(fetch.fn, (URL,), given, "step durably.fetch")
    args, kwargs = payloads.load_arguments(sent, fetch.fn)
    assert (args, Headers(kwargs.pop("headers")).pairs) == ([URL], Headers(headers).pairs)
    assert kwargs == {"timeout": "5s", "body": b"x"}


def test_a_response_that_was_fetched_travels(server: str) -> None:
    got = travelled(asyncio.run(fetch(f"{server}/a")))
    assert (got.status, got.body) == (200, b"GET /a ")


@pytest.mark.parametrize(
    ("url", "options", "said"),
    [
        ("/relative", {}, "is no URL"),
        ("http://x", {"body": "b"}, "a GET request has no body"),
        ("http://x", {"method": "POST", "body": "b", "json": 1}, "body or json, not both"),
        ("http://x", {"headers": {"a b": "c"}}, "header name"),
        ("http://x", {"timeout": "soon"}, "no duration"),
        ("http://x", {"method": "POST", "json": object()}, "unsupported"),
    ],
)
def test_a_fetch_that_cannot_be_sent_is_not_retried(url: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(FatalError, match=said):
        asyncio.run(fetch(url, **options))


def test_a_large_body_becomes_a_stream_in_a_step_and_stays_bytes_elsewhere(server: str, step: StepContext) -> None:
    got = asyncio.run(fetch(f"{server}/big"))
    assert got.body == Readable("r1", "fetch-s1-2.1")
    written = step.writers.streams["fetch-s1-2.1"]
    assert b"".join(written[:-1]) == b"x" * (3 * INLINE_BODY)
    assert written[-1] is None
    step_context.set(None)
    assert len(asyncio.run(fetch(f"{server}/big")).body) == 3 * INLINE_BODY


def test_without_httpx_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name == "httpx":
            raise ModuleNotFoundError("No module named 'httpx'", name="httpx")
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigurationError, match=r"pip install 'durably\[http\]'"):
        web._httpx()
