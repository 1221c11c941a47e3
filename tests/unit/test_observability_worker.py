"""What a worker tells of the steps that it runs."""

from __future__ import annotations

import pytest
import worker_scene
from durably import FatalError, step
from durably.observability import tracing
from durably.observability.logs import about
from durably.observability.metrics import Histogram
from durably.observability.tracing import Trace
from durably.worker import intake
from durably_schemas.records import StepFailed
from opentelemetry import trace as otel
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from worker_scene import ask_for, request, results, until

broker, registry, start = worker_scene.broker, worker_scene.registry, worker_scene.start  # fixtures
pytestmark = pytest.mark.usefixtures("registry")

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
HEADERS = (("traceparent", PARENT.encode()), ("tracestate", b"a=b"))


@pytest.fixture
def spans(monkeypatch):
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "provider", lambda: provider)
    return exporter


def test_a_step_runs_within_its_span_on_a_thread_and_on_the_loop_alike(broker, start, spans):
    seen = {}

    @step
    async def observed_on_the_loop():
        seen["loop"] = otel.get_current_span().get_span_context().span_id, about()

    @step
    def observed_on_a_thread():
        seen["thread"] = otel.get_current_span().get_span_context().span_id, about()

    worker = start(counting=True)
    asked = request(observed_on_the_loop), request(observed_on_a_thread, step_id="s2", attempt=2)
    ask_for(broker, *asked, headers=HEADERS)
    results(broker, 2)
    until(lambda: len(spans.get_finished_spans()) == 2)
    made = {span.name: span for span in spans.get_finished_spans()}
    for name, where in (("observed_on_the_loop", "loop"), ("observed_on_a_thread", "thread")):
        span = made[f"step {name}"]
        assert seen[where][0] == span.context.span_id
        assert (span.context.trace_id, span.parent.span_id) == (Trace(PARENT).trace_id, Trace(PARENT).span_id)
        assert span.context.trace_state.to_header() == "a=b"
        assert span.kind is otel.SpanKind.CONSUMER
    assert seen["thread"][1] == {
        "run_id": "run-1", "workflow": "flow", "step": "observed_on_a_thread", "step_id": "s2", "attempt": 2,
    }  # fmt: skip
    assert made["step observed_on_a_thread"].attributes == {
        "durably.run_id": "run-1",
        "durably.workflow": "flow",
        "durably.step": "observed_on_a_thread",
        "durably.step_id": "s2",
        "durably.attempt": 2,
        "durably.worker": worker.worker_id,
    }


@pytest.mark.parametrize("plain", [False, True])
def test_what_an_attempt_raises_is_the_error_of_its_span_and_counted_as_a_failure(broker, start, spans, plain, caplog):
    def breaks():
        raise FatalError("declined")

    async def breaks_too():
        raise FatalError("declined")

    worker = start(counting=True)
    definition = step(name="observed_breaking")(breaks if plain else breaks_too)
    ask_for(broker, request(definition), headers=HEADERS)
    (result,) = results(broker, 1)
    assert isinstance(result.outcome, StepFailed)
    until(spans.get_finished_spans)
    (span,) = spans.get_finished_spans()
    assert (span.status.is_ok, "declined" in span.status.description) == (False, True)
    assert [event.name for event in span.events] == ["exception"]
    counts = {(name, labels): n.count for name, labels, n in worker.samples() if isinstance(n, Histogram)}
    assert counts == {
        ("durably_step_schedule_to_start_seconds", ("observed_breaking",)): 1,
        ("durably_step_start_to_close_seconds", ("observed_breaking", "failed")): 1,
    }
    (line,) = [r for r in caplog.records if "declined" in r.getMessage()]
    assert (line.run_id, line.step, line.attempt) == ("run-1", "observed_breaking", 1)


def test_a_request_that_no_registered_step_is_for_makes_no_label(broker, start):
    worker = start(counting=True)
    ask_for(broker, request(None, name="made_up_by_somebody", timeout=1000))
    results(broker, 1)
    samples = list(worker.samples())
    assert not any("made_up_by_somebody" in labels for _, labels, _ in samples)
    assert ("durably_dead_letters_total", ("worker",), 1) in samples


def test_a_worker_is_ready_when_partitions_are_assigned_and_dead_when_it_does_not_poll(start, monkeypatch):
    worker = start()
    assert (worker.dead, worker.unready) == (None, None)
    assert list(worker.samples()) == [], "nobody reads them"
    monkeypatch.setattr(intake, "LIVE", -1.0)
    assert "nothing has been polled of durably.requests.default" in worker.dead


def test_a_worker_whose_thread_has_broken_is_dead(broker, start, monkeypatch):
    from durably.worker import Worker

    def broken(self, consumer):
        raise RuntimeError("gone")

    monkeypatch.setattr(intake.Intake, "turn", broken)
    worker = Worker(broker, worker_scene.CATALOGUE, worker_scene.authoring.registry)
    assert worker.unready == "nothing of durably.requests.default is assigned to it yet"
    worker.start()
    until(lambda: worker.dead == "RuntimeError: gone")
    worker.join()
