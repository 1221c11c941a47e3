"""Rules of correctness of streams: which chunks count, for every reader alike."""

from __future__ import annotations

import pytest
from durably.client.stream import ChunkOrder
from durably.payloads import dump
from durably_schemas.records import StreamChunk


def chunk(n: int, writer: str = "step/1/1", namespace: str = "default", *, end: bool = False) -> StreamChunk:
    payload = None if end else dump([writer, n], "chunk")
    kind = "END" if end else "DATA"
    return StreamChunk(run_id="r", namespace=namespace, writer=writer, n=n, kind=kind, payload=payload, at=0)


def counted(*chunks: StreamChunk) -> list[tuple[str, int]]:
    order = ChunkOrder("default")
    taken = [(c.writer, c.n) for c in chunks if order.accept(c) is not None]
    assert order.count == len(taken)
    return taken


@pytest.mark.parametrize("namespace", ["default", ""], ids=["of the stream", "of the run"])
def test_the_first_end_closes_and_what_follows_is_ignored(namespace):
    end = chunk(2, namespace=namespace, end=True)
    assert counted(chunk(1), end, chunk(3), chunk(1, "other"), end) == [("step/1/1", 1)]


def test_the_end_of_another_stream_closes_nothing():
    end = chunk(1, namespace="another", end=True)
    assert counted(chunk(1), end, chunk(2)) == [("step/1/1", 1), ("step/1/1", 2)]


def test_a_chunk_that_is_not_above_its_writers_last_is_dropped_and_not_counted():
    again = [chunk(1), chunk(2), chunk(1, "b"), chunk(2), chunk(1), chunk(3), chunk(1, "b"), chunk(2, "b")]
    assert counted(*again) == [("step/1/1", 1), ("step/1/1", 2), ("b", 1), ("step/1/1", 3), ("b", 2)]
