"""One trace a run, counts, and the health of an installation, on each broker and through a failover."""

from __future__ import annotations

import json
import threading
from collections import Counter
from typing import TYPE_CHECKING
from urllib.request import urlopen

import checker
import pytest
from durably import step, workflow
from durably.client.liveness import queue_trips, queues_of
from durably.observability import tracing
from durably.observability.endpoint import Endpoint
from durably_processor import traces
from harness import until
from opentelemetry import trace as otel
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families

if TYPE_CHECKING:
    from harness import System

GO = threading.Event()
BEGUN = threading.Event()


@step(max_retries=1, backoff="10ms")
async def observed_first(n: int) -> int:
    with otel.get_tracer_provider().get_tracer("x").start_as_current_span("never recorded"):
        pass
    with tracing.provider().get_tracer("app").start_as_current_span("within"):
        return n + 1


@step
def observed_second(n: int) -> int:
    BEGUN.set()
    assert GO.wait(60)
    return n + 1


@workflow
async def observed_child(n: int) -> int:
    return await observed_first(n)


@workflow
async def observed(n: int) -> int:
    from durably import start

    return await observed_second(await observed_first(n)) + await (await start(observed_child, n)).result()


def read(url: str) -> dict[str, float]:
    """The samples of an endpoint by their name and labels."""
    with urlopen(f"{url}/metrics", timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return {s.name + json.dumps(s.labels, sort_keys=True): s.value for f in families for s in f.samples}


@pytest.mark.timeout(180)
def test_a_run_is_one_trace_and_is_counted_once_although_its_processor_dies(
    lone_system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    for module in (tracing, traces):
        monkeypatch.setattr(module, "provider", lambda: provider)
    GO.clear()
    BEGUN.clear()
    system = lone_system
    worker = system.start_worker(("default",), counting=True)
    first = system.start_processor("first", counting=True)
    with provider.get_tracer("app").start_as_current_span("checkout") as checkout:
        run = system.client.start(observed, 1)
    assert BEGUN.wait(60)
    system.processors.remove(first)
    first.crash(committed=False)
    second = system.start_processor("second", counting=True)
    GO.set()
    assert run.result(60) == 5

    def ended() -> dict[str, list]:
        found: dict[str, list] = {}
        for span in exporter.get_finished_spans():
            found.setdefault(span.name, []).append(span)
        return found if {"run observed", "run observed_child"} <= found.keys() else {}

    spans = until(ended)
    assert {s.context.trace_id for each in spans.values() for s in each} == {checkout.get_span_context().trace_id}
    (start,), (whole,), (child,) = spans["start observed"], spans["run observed"], spans["run observed_child"]
    assert start.parent.span_id == checkout.get_span_context().span_id
    assert whole.parent.span_id == start.context.span_id
    assert child.parent.span_id == whole.context.span_id
    # The crash came before the commit, so that its step may have run twice: both belong to the one run.
    assert {s.parent.span_id for s in spans["step observed_second"]} == {whole.context.span_id}
    parents = Counter(s.parent.span_id for s in spans["step observed_first"])
    assert parents.keys() == {whole.context.span_id, child.context.span_id}
    within = {s.parent.span_id for s in spans["within"]}
    assert within == {s.context.span_id for s in spans["step observed_first"]}
    assert whole.attributes["durably.run_id"] == run.id

    endpoint = Endpoint("0", [second._processor, worker])
    try:
        with urlopen(f"{endpoint.url}/readyz", timeout=10) as answer:
            assert answer.status == 200
        until(lambda: not any(v for k, v in read(endpoint.url).items() if k.startswith("durably_lag_records")))
        found = read(endpoint.url)
    finally:
        endpoint.close()
    assert found['durably_runs_finished_total{"status": "completed", "workflow": "observed"}'] == 1
    assert found['durably_steps_completed_total{"step": "observed_second"}'] == 1
    assert found['durably_partitions{"state": "active"}'] == 3
    assert found['durably_step_start_to_close_seconds_count{"outcome": "succeeded", "step": "observed_second"}'] >= 1
    assert found["durably_worker_slots{}"] == 100
    assert found["durably_worker_slots_in_use{}"] == 0
    assert found["durably_commit_seconds_count{}"] > 0


def test_a_round_trip_through_each_queue_says_who_serves_it(lone_system: System) -> None:
    system = lone_system
    system.start_processor()
    worker = system.start_worker(("default",))
    connection = system.client._connection
    assert queues_of(connection, 10) == ["default", "other"]
    served = queue_trips(connection, ["default", "nowhere"], 30)
    assert (served[0].queue, served[0].worker, served[0].problem) == ("default", worker.worker_id, None)
    assert 0 <= served[0].took_ms <= 30_000
    assert "durably topics create --queue nowhere" in served[1].problem
    (unserved,) = queue_trips(connection, ["other"], 1)
    assert "start `durably worker MODULE --queue other`" in unserved.problem
    assert not system.client.runs()
    assert list(checker.read(system.broker, system.catalogue.events)) == []
