"""Streams as server-sent events, over a scripted processor, through a real server on loopback."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from durably import chunks, payloads
from durably_connectors.http import streams
from durably_schemas import events
from durably_schemas.records import Payload, StreamChunk, StreamWritten
from unit.gateway_under_test import GatewayUnderTest, gateway_under_test

if TYPE_CHECKING:
    from collections.abc import Iterator

PATH = "/api/v1/runs/r1/streams/log"


pytestmark = pytest.mark.usefixtures("quick_gateway")


@pytest.fixture
def gateway() -> Iterator[GatewayUnderTest]:
    with gateway_under_test() as made:
        made.processor.start("r1")
        yield made


def written(gateway: GatewayUnderTest, *values: Any, namespace: str = "log", end: bool = True) -> None:
    for n, value in enumerate(values):
        gateway.processor.chunk("r1", namespace, n, value)
    if end:
        gateway.processor.chunk("r1", namespace, len(values), end=True)


def followed(gateway: GatewayUnderTest, url: str = PATH, **options: Any) -> list[dict[str, str]]:
    """The events of a stream to its end: their fields, without comments."""
    with gateway.http.stream("GET", url, **options) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        text = "".join(response.iter_text())
    blocks = (block.splitlines() for block in text.split("\n\n") if block)
    fields = [dict(line.split(": ", 1) for line in lines if not line.startswith(":")) for lines in blocks]
    return [found for found in fields if "data" in found]


def test_each_value_is_an_event_with_its_index(gateway: GatewayUnderTest) -> None:
    written(gateway, {"a": 1}, "x\ny", b"\xff\x00")
    assert followed(gateway) == [
        {"id": "0", "data": '{"a":1}'},
        {"id": "1", "data": '"x\\ny"'},
        {"id": "2", "event": "bytes", "data": "/wA="},
        {"event": "end", "data": "{}"},
    ]


@pytest.mark.parametrize(
    ("query", "headers", "first"),
    [
        ("?start_index=2", {}, 2),
        ("?start_index=-1", {}, 4),
        ("?start_index=-99", {}, 0),
        ("", {"Last-Event-ID": "2"}, 3),
        ("?start_index=1", {"Last-Event-ID": "3"}, 4),
        ("", {"Last-Event-ID": "4"}, 5),
    ],
)
def test_it_goes_on_where_it_is_told_to(
    query: str, headers: dict[str, str], first: int, gateway: GatewayUnderTest
) -> None:
    written(gateway, *range(5))
    got = followed(gateway, PATH + query, headers=headers)
    assert [(e["id"], e["data"]) for e in got[:-1]] == [(str(n), str(n)) for n in range(first, 5)]
    assert got[-1]["event"] == "end"


@pytest.mark.parametrize("event_id", ["", "x", "-1", "٣", "9" * 5_000])
def test_what_is_no_index_is_refused(event_id: str, gateway: GatewayUnderTest) -> None:
    response = gateway.http.get(PATH, headers={b"Last-Event-ID": event_id.encode()})
    assert response.status_code == 400
    assert response.json()["type"] == "urn:durably:problem:bad-last-event-id"


def test_values_that_cannot_be_read_here_are_shown_as_bytes_and_hide_no_others(gateway: GatewayUnderTest) -> None:
    sealed = Payload(content_type="application/x-sealed", data=b"\x00\x01")
    for n, payload in enumerate((payloads.dump(1, "v"), sealed, payloads.dump(3, "v"))):
        chunk = StreamChunk(run_id="r1", namespace="log", writer="w", n=n, kind="DATA", at=0, payload=payload)
        gateway.broker.put(gateway.processor.catalogue.streams, chunk, key="r1")
    gateway.processor.chunk("r1", "log", 3, end=True)
    assert [event["data"] for event in followed(gateway)] == [
        "1",
        '{"content_type":"application/x-sealed","base64":"AAE="}',
        "3",
        "{}",
    ]


def test_values_come_as_they_are_written_and_silence_is_filled(
    gateway: GatewayUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "HEARTBEAT", 0.05)
    written(gateway, 1, end=False)
    seen: list[str] = []
    with gateway.http.stream("GET", PATH) as response:
        for line in response.iter_lines():
            seen.append(line)
            if line == ": still here" and seen.count(line) == 2:
                gateway.processor.chunk("r1", "log", 1, 2)
                gateway.processor.chunk("r1", "log", 2, end=True)
    assert [line for line in seen if line.startswith("data")] == ["data: 1", "data: 2", "data: {}"]


def test_a_reader_that_leaves_lets_go_of_its_stream(gateway: GatewayUnderTest) -> None:
    written(gateway, 1, end=False)
    for _ in range(3):
        with gateway.http.stream("GET", PATH) as response:
            assert next(line for line in response.iter_lines() if line.startswith("data")) == "data: 1"
    deadline = time.monotonic() + 10
    while any(thread.name.startswith("durably-stream") for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_server_that_stops_lets_its_readers_come_back(gateway: GatewayUnderTest) -> None:
    written(gateway, 1, end=False)
    stopping = threading.Thread(target=gateway.thread.stop)
    began = time.monotonic()
    with gateway.http.stream("GET", PATH) as response:
        lines = response.iter_lines()
        assert next(line for line in lines if line.startswith("data")) == "data: 1"
        stopping.start()
        assert [line for line in lines if line.startswith("event")] == []  # nothing says that the stream has ended
    stopping.join()
    assert time.monotonic() - began < 3


def test_names_are_percent_decoded(gateway: GatewayUnderTest) -> None:
    written(gateway, 1, namespace="a/b ä")
    assert followed(gateway, "/api/v1/runs/r1/streams/a%2Fb%20%C3%A4")[0]["data"] == "1"


def test_the_streams_of_a_run_are_listed(gateway: GatewayUnderTest) -> None:
    chunk = StreamWritten(namespace="log", writer="w", partition=0, first_offset=0, chunks=1)
    done = events.StepCompleted(attempt=1, result=gateway.processor.runs["r1"].log[0].data.input, streams=(chunk,))
    gateway.processor.event("r1", done, "step_1")
    assert gateway.api("GET", "/runs/r1/streams").json() == {"streams": ["log"]}


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/api/v1/runs/nobody/streams/log", {}, 404),
        ("/api/v1/runs/nobody/streams", {}, 404),
        (PATH, {"Last-Event-ID": "x"}, 400),
        (PATH, {"Last-Event-ID": "-1"}, 400),
        (f"{PATH}?start_index=x", {}, 422),
        ("/api/v1/runs/r1/streams/" + "x" * 257, {}, 400),
    ],
)
def test_what_cannot_be_followed_is_a_problem(
    path: str, headers: dict[str, str], status: int, gateway: GatewayUnderTest
) -> None:
    response = gateway.http.get(path, headers=headers)
    assert (response.status_code, response.headers["content-type"]) == (status, "application/problem+json")


def test_what_ends_a_stream_is_told_to_its_reader(gateway: GatewayUnderTest) -> None:
    gateway.processor.chunk("r1", "log", 0, 1)
    told = chunks.dump_error(ValueError("the sensor is broken"), "log")
    end = StreamChunk(run_id="r1", namespace="log", writer="w", n=1, kind="END", at=0, payload=told)
    gateway.broker.put(gateway.broker.catalogue.streams, end, key="r1")
    assert followed(gateway) == [
        {"id": "0", "data": "1"},
        {"event": "failed", "data": '{"type":"ValueError","detail":"the sensor is broken"}'},
    ]
