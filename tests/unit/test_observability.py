"""What processes tell of themselves: counts, spans, log lines, health. The tests are Kafka."""

from __future__ import annotations

import http.client
import io
import json
import logging
import re
import sys
import urllib.error
import urllib.request
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import structlog
from durably import health, step
from durably.authoring import Registry, registry, workflow
from durably.errors import ConfigurationError, RegistrationError
from durably.observability import logs, tracing
from durably.observability.endpoint import Endpoint
from durably.observability.metrics import METRICS, Exposition, Histogram
from durably.observability.tracing import Trace, start_span
from durably.payloads import load
from durably_processor import traces
from durably_processor.observer import Observer
from durably_processor.traces import RunTraces
from durably_schemas import events as ev
from durably_schemas import records as rec
from engine_bench import Bench, step_result
from harness import until
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased
from partition_lab import CATALOGUE, CODEC, T0, Lab, content, rebuilt, requests
from prometheus_client import REGISTRY, Gauge
from prometheus_client.parser import text_string_to_metric_families
from unit.gateway_under_test import gateway_under_test

ROOT = Path(__file__).parents[2]
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
STATE = "vendor=a,other=b"
HEADERS = (("traceparent", PARENT.encode()), ("tracestate", STATE.encode()), ("x", b"1"))
START = rec.StartRun(run_id="r1", workflow="chain", input=rec.Payload(content_type="", data=b""), requested_at=0)


def provided(monkeypatch, **options):
    """A provider of tracers for this test alone, and what its spans are exported to."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(**options)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    for module in (tracing, traces):
        monkeypatch.setattr(module, "provider", lambda: provider)
    return exporter


@pytest.fixture
def spans(monkeypatch):
    return provided(monkeypatch)


def watched(folder, *, counting=True):
    """A lab whose turns are counted and traced, and the observer."""
    run_traces = RunTraces()
    lab = Lab(folder)
    observer = Observer(lab.registry, counting=counting, traces=run_traces)
    lab.options = {"traces": run_traces, "observer": observer}
    lab.take_over(lab.positions)
    return lab, observer


def settle(lab, observer, *messages):
    """A turn and its commit, as a processor tells the observer of them."""
    part = lab.settle(*messages)
    observer.committed([part], 0.01)
    return part


def through(lab, observer, part, error=None):
    """Answers all requests until there are none."""
    while asked := requests(part, early=True) + requests(part, early=False):
        part = settle(lab, observer, *(lab.answer(r, error) for r in asked))
    return part


# -- traces ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parent",
    [b"", b"00", PARENT.encode() + b"-1", PARENT.replace("00-", "ff-").encode(), b"00-" + b"0" * 32 + PARENT[35:].encode(),
     PARENT.upper().encode(), PARENT.replace("b7ad6b7169203331", "0" * 16).encode(), b"\xff" * 55],
)  # fmt: skip
def test_a_traceparent_that_is_none_is_left_out(parent):
    assert Trace.of([("traceparent", parent), ("tracestate", b"a=b")]) is None


def test_a_place_in_a_trace_travels_in_headers():
    place = Trace.of(HEADERS)
    assert place == Trace(PARENT, STATE)
    assert (f"{place.trace_id:032x}", f"{place.span_id:016x}", place.sampled) == (PARENT[3:35], PARENT[36:52], True)
    assert place.headers == HEADERS[:2]
    assert Trace.at(place.trace_id, place.span_id, sampled=True, state=STATE) == place
    for bad in (b"x" * 513, b"a\nb", b""):
        assert Trace.of([HEADERS[0], ("tracestate", bad)]) == Trace(PARENT)


def started(lab, headers=HEADERS, name="chain", n=2):
    return lab.start(name, n)._replace(headers=headers)


@pytest.mark.usefixtures("guarded")
def test_without_opentelemetry_the_callers_trace_goes_through_to_the_steps_and_survives_in_the_log(lab, tmp_path):
    part = lab.settle(started(lab))
    assert part.early[0].headers == HEADERS[:2]
    created = CODEC.decode_as(rec.Event, part.events[0][1]).data
    assert (created.traceparent, created.tracestate) == (PARENT, STATE)
    with rebuilt(lab, tmp_path) as (store, _):
        assert content(store, b"re") == content(lab.store, b"re")
        assert store.state("r1").header.traceparent == PARENT
    asked = requests(part, early=True)
    lab.take_over({CATALOGUE.commands: 1, CATALOGUE.results: 0, CATALOGUE.signals: 0})
    part = lab.settle(lab.answer(asked[0]))
    assert (part.early + part.outputs)[0].headers == HEADERS[:2], "another owner finds it in its store"


@pytest.mark.usefixtures("guarded")
def test_the_span_of_a_run_is_made_once_by_whoever_ends_it_and_is_what_its_steps_have_named(tmp_path, spans):
    lab, observer = watched(tmp_path)
    part = settle(lab, observer, started(lab))
    named = Trace.of(part.early[0].headers)
    assert (named.trace_id, named.state) == (Trace(PARENT).trace_id, STATE)
    assert not spans.get_finished_spans()

    asked = requests(part, early=True)
    lab.take_over({CATALOGUE.commands: 1, CATALOGUE.results: 0, CATALOGUE.signals: 0})  # another process
    lab.now += 7_000
    part = settle(lab, observer, lab.answer(asked[0]))
    assert Trace.of((part.early + part.outputs)[0].headers) == named
    lost = lab.turn(lab.answer(requests(part, early=True)[0]))
    assert [h.status for h in lost.ended] == ["completed"]
    assert not spans.get_finished_spans(), "what is not committed has not happened"
    observer.committed([lab.commit(lost)], 0.01)
    (span,) = spans.get_finished_spans()
    assert (span.context.trace_id, span.context.span_id) == (named.trace_id, named.span_id)
    assert f"{span.parent.span_id:016x}" == PARENT[36:52]
    assert (span.name, span.attributes["durably.status"]) == ("run chain", "completed")
    assert (span.start_time, span.end_time) == (T0 * 1_000_000, (T0 + 7_000) * 1_000_000)


@pytest.mark.usefixtures("guarded")
def test_a_run_that_nobody_traced_has_a_trace_of_its_own(tmp_path, spans):
    lab, observer = watched(tmp_path)
    command = started(lab, headers=(("traceparent", b"none"),))
    part = settle(lab, observer, command)
    named = Trace.of(part.early[0].headers)
    assert named.sampled
    lab.store.close()
    again, _ = watched(tmp_path / "again")
    assert Trace.of(again.turn(command).early[0].headers) == named, "the same after a crash"
    again.store.close()
    lab.store = type(lab.store)(tmp_path / "store")
    lab.take_over({CATALOGUE.commands: 1, CATALOGUE.results: 0, CATALOGUE.signals: 0})
    part = settle(lab, observer, *(lab.answer(r, ValueError("no")) for r in requests(part, early=True)))
    lab.now += 60_000
    through(lab, observer, settle(lab, observer), ValueError("no"))
    (span,) = spans.get_finished_spans()
    assert span.parent is None
    assert (span.context.trace_id, span.context.span_id) == (named.trace_id, named.span_id)
    assert (span.status.is_ok, span.status.description) == (False, "ValueError: no")
    lab.store.close()


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("headers", [(), (("traceparent", PARENT[:-2].encode() + b"00"),)])
def test_what_is_not_sampled_says_so_to_the_steps_and_has_no_span(tmp_path, monkeypatch, headers):
    spans = provided(monkeypatch, sampler=ParentBased(ALWAYS_OFF))
    lab, observer = watched(tmp_path)
    part = settle(lab, observer, started(lab, headers=headers, n=1))
    assert not Trace.of(part.early[0].headers).sampled
    through(lab, observer, part)
    assert not spans.get_finished_spans()


@pytest.mark.usefixtures("guarded")
def test_an_exporter_that_fails_does_not_stop_the_commits(tmp_path, spans, monkeypatch, caplog):
    lab, observer = watched(tmp_path)

    def broken(span):
        raise OSError("no collector")

    monkeypatch.setattr(spans, "export", broken)
    monkeypatch.setattr(RunTraces, "ended", lambda *_: broken(None))
    through(lab, observer, settle(lab, observer, started(lab)))
    assert "the span of run r1" in caplog.text


def test_a_client_makes_a_span_of_a_start_that_its_caller_is_the_parent_of(spans):
    with start_span(START, HEADERS) as headers:
        inner = Trace.of(headers)
    with (
        tracing.provider().get_tracer("app").start_as_current_span("checkout") as current,
        start_span(START, HEADERS) as h,
    ):
        nested = Trace.of(h)
    start, second, _ = spans.get_finished_spans()
    assert (start.name, start.context.span_id, f"{start.parent.span_id:016x}") == (
        "start chain", inner.span_id, PARENT[36:52],
    )  # fmt: skip
    assert second.parent.span_id == current.get_span_context().span_id, "what is current comes before headers"
    assert nested.trace_id == current.get_span_context().trace_id


def test_a_process_without_a_provider_makes_no_spans():
    assert tracing.provider() is None
    with start_span(START) as none, start_span(START, HEADERS) as handed_on:
        assert (none, handed_on) == ((), HEADERS[:2])


# -- metrics -----------------------------------------------------------------------------------------------------------


def told(observer):
    """The counts that are not zero, by metric and labels."""
    return {(name, labels): n for name, labels, n in observer.samples() if not isinstance(n, Histogram) and n}


@pytest.mark.usefixtures("guarded")
def test_what_is_committed_is_counted_by_workflow_and_step(tmp_path):
    lab, observer = watched(tmp_path)
    lab.registry.steps["doing"] = registry.steps["doing"]
    lab.turn(lab.start("chain", 2))
    assert told(observer) == {}, "nothing is committed"
    lab.take_over({CATALOGUE.commands: 0, CATALOGUE.results: 0, CATALOGUE.signals: 0})
    part = settle(lab, observer, lab.logs[CATALOGUE.commands][0])
    (request,) = requests(part, early=True)
    settle(lab, observer, lab.answer(request, ValueError("no")))
    lab.take_over({CATALOGUE.commands: 1, CATALOGUE.results: 1, CATALOGUE.signals: 0})  # names come of the store
    lab.now += 60_000
    through(lab, observer, settle(lab, observer))
    settle(
        lab, observer, lab.put(CATALOGUE.commands, msgspec.structs.replace(START, run_id="r2", workflow="unheard-of"))
    )
    settle(lab, observer, lab.put(CATALOGUE.commands, b"noise", key=b"k"))
    assert told(observer) == {
        ("durably_runs_started_total", ("chain",)): 1,
        ("durably_runs_finished_total", ("chain", "completed")): 1,
        ("durably_runs_blocked_total", ("(other)",)): 1,
        ("durably_steps_requested_total", ("doing", "default")): 2,
        ("durably_steps_completed_total", ("doing",)): 2,
        ("durably_steps_retried_total", ("doing",)): 1,
        ("durably_dead_letters_total", ("processor",)): 1,
    }
    assert lab.partition.figures.blocked == 1
    lab.take_over({CATALOGUE.commands: 3, CATALOGUE.results: 3, CATALOGUE.signals: 0})
    assert lab.partition.figures.blocked == 1
    assert (observer.commits.count, observer.records.count) == (7, 7), "one for each transaction"


@pytest.mark.usefixtures("guarded")
def test_what_a_run_was_copied_with_is_not_counted_again(tmp_path):
    lab, observer = watched(tmp_path)
    lab.registry.steps["doing"] = registry.steps["doing"]
    part = settle(lab, observer, lab.start("chain", 3))
    for _ in range(2):
        part = settle(lab, observer, lab.answer(requests(part, early=True)[0]))
    back = rec.ResetRun(run_id="r1", new_run_id="r2", to_event=9, requested_at=0)
    ended = settle(lab, observer, lab.put(CATALOGUE.commands, back))
    through(lab, observer, settle(lab, observer, *lab.signals(ended)))
    assert told(observer) == {
        ("durably_runs_started_total", ("chain",)): 2,
        ("durably_runs_finished_total", ("chain", "cancelled")): 1,
        ("durably_runs_finished_total", ("chain", "completed")): 1,
        ("durably_steps_requested_total", ("doing", "default")): 4,
        ("durably_steps_completed_total", ("doing",)): 3,
    }


def test_a_histogram_counts_into_buckets_as_prometheus_has_them():
    histogram = Histogram((0.1, 1.0))
    for value in (0.05, 0.1, 0.5, 7):
        histogram.observe(value)
    assert histogram.read() == ([("0.1", 2), ("1.0", 3), ("+Inf", 4)], 7.65)


def test_prometheus_reads_our_metrics_and_those_of_the_users_code():
    mine = Gauge("observability_test_gauge", "of a user's module")
    histogram = Histogram((1.0,))
    histogram.observe(2)
    samples = [
        ("durably_steps_failed_total", ("a",), 2),
        ("durably_turn_seconds", (), histogram),
        ("durably_steps_failed_total", ("b",), 3),
    ]
    try:
        mine.set(4)
        body, content_type = Exposition([lambda: samples[:2], lambda: samples[2:]]).write("text/plain")
    finally:
        REGISTRY.unregister(mine)
    found = {f.name: f for f in text_string_to_metric_families(body.decode())}
    assert content_type.startswith("text/plain")
    failed = {s.labels["step"]: s.value for s in found["durably_steps_failed"].samples}
    assert failed == {"a": 2, "b": 3}
    assert [s.value for s in found["durably_turn_seconds"].samples] == [0, 1, 1, 2]
    assert found["observability_test_gauge"].samples[0].value == 4


def test_metrics_are_named_as_prometheus_wants_them():
    for name, metric in METRICS.items():
        assert name.startswith("durably_")
        assert (metric.kind == "counter") == name.endswith("_total"), name
        assert metric.says.endswith("."), name


def test_without_the_extra_metrics_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ConfigurationError, match=r"durably\[metrics\]"):
        Exposition([])


def test_a_gateway_counts_the_runs_that_it_lists_and_hands_the_trace_of_a_request_on():
    with gateway_under_test() as gateway:
        body = {"workflow": "greet", "run_id": "r1"}
        sent = {"traceparent": PARENT, "tracestate": STATE}
        assert gateway.api("POST", "/runs", json=body, headers=sent).status_code in {200, 201}
        assert gateway.broker.headers[0] == HEADERS[:2]
        gateway.processor.start("r2")
        gateway.processor.complete("r2", 1)
        part = gateway.app.state.gateway
        until(lambda: part.unready is None and ("durably_runs", ("completed",), 1) in part.samples())
        counts = {labels[0]: n for _, labels, n in part.samples()}
        assert counts == {"pending": 0, "running": 1, "blocked": 0, "completed": 1, "failed": 0, "cancelled": 0}
        assert part.dead is None


# -- the endpoint ------------------------------------------------------------------------------------------------------


def ask(url):
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as e:
        with e:
            return e.code, e.read().decode()


def test_the_endpoint_says_whether_all_parts_live_and_are_ready():
    part = SimpleNamespace(dead=None, unready="partitions 1 are being restored", samples=list)
    other = SimpleNamespace(dead=None, unready=None, samples=lambda: [("durably_worker_slots", (), 7)])
    with closing(Endpoint("0", [part, other])) as endpoint:
        assert endpoint.url.startswith("http://127.0.0.1:")
        assert ask(f"{endpoint.url}/livez") == (200, "ok\n")
        assert ask(f"{endpoint.url}/readyz") == (503, "partitions 1 are being restored\n")
        part.unready = None
        assert ask(f"{endpoint.url}/readyz") == (200, "ok\n")
        other.dead = "it stands still"
        assert ask(f"{endpoint.url}/livez?verbose") == (503, "it stands still\n")
        assert ask(f"{endpoint.url}/readyz") == (503, "it stands still\n")
        status, body = ask(f"{endpoint.url}/metrics")
        assert (status, "durably_worker_slots 7.0" in body) == (200, True)
        assert ask(f"{endpoint.url}/")[0] == 404
        with pytest.raises(ConfigurationError, match="choose another with --metrics"):
            Endpoint(endpoint.url.removeprefix("http://"), [])


def test_a_part_that_fails_to_tell_is_told_of_in_the_log(caplog):
    part = SimpleNamespace(dead=None, unready=None, samples=lambda: 1 // 0)
    with closing(Endpoint("0", [part])) as endpoint:
        with pytest.raises(http.client.RemoteDisconnected):
            ask(f"{endpoint.url}/metrics")
        assert ask(f"{endpoint.url}/livez") == (200, "ok\n")
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("address", ["", "host", "host:port", "host:99999", "[::1"])
def test_an_address_that_is_none_is_refused(address):
    with pytest.raises(ConfigurationError, match="HOST:PORT"):
        Endpoint(address, [])


# -- logs --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def lines():
    """The lines that are logged as JSON; logging is as it was afterwards."""
    root, out = logging.getLogger(), io.StringIO()
    before = root.handlers[:], root.level, logging.getLogRecordFactory()
    root.handlers.clear()  # not to be closed
    logs.configure("json", out)
    logs.configure("json", out)  # twice is as once
    yield lambda: [json.loads(line) for line in out.getvalue().splitlines()]
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    logging.setLogRecordFactory(before[2])
    structlog.reset_defaults()


def test_a_line_of_json_has_its_level_its_extras_and_its_traceback(lines):
    try:
        raise ValueError("deep")
    except ValueError:
        logging.getLogger("durably.x").exception("it %s", "broke", extra={"run_id": "r9"})
    structlog.get_logger("app").error("said", n=1)
    logging.getLogger("app").debug("not wanted")
    broke, said = lines()
    assert {**broke, "timestamp": "", "exception": ""} == {
        "event": "it broke", "run_id": "r9", "logger": "durably.x", "level": "error", "timestamp": "", "exception": "",
    }  # fmt: skip
    assert "ValueError: deep" in broke["exception"]
    assert (said["event"], said["n"], said["logger"]) == ("said", 1, "app")


@pytest.mark.usefixtures("guarded")
def test_a_line_of_a_workflow_names_its_run_and_comes_once_however_often_it_is_replayed(lines):
    @step
    async def observability_said(x: int) -> int:
        return x

    async def talkative() -> None:
        for n in range(3):
            logging.getLogger("app").warning("before %s", n)
            await observability_said(n)

    bench = Bench(talkative)
    while bench.open:
        bench.run.evict()
        bench.result(bench.open[0])
    assert bench.status == "completed"
    assert [(line["event"], line["run_id"], line["workflow"]) for line in lines()] == [
        (f"before {n}", "wrun_1", "wf") for n in range(3)
    ]


def test_text_shows_no_local_variables(capsys):
    root, before = logging.getLogger(), logging.getLogRecordFactory()
    handlers, level = root.handlers[:], root.level
    root.handlers.clear()
    out = io.StringIO()
    try:
        logs.configure("text", out)
        password = "2retnuh"[::-1]
        try:
            raise ValueError(len(password))
        except ValueError:
            logging.getLogger("app").exception("it broke")
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.setLogRecordFactory(before)
        structlog.reset_defaults()
    assert "ValueError: 7" in out.getvalue()
    assert "hunter2" not in out.getvalue()


# -- health ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("guarded")
def test_a_round_trip_through_a_queue_leaves_no_run_behind(lab):
    to = rec.ReplyTo(partition=2, request_id="q/1")

    def asked(queue):
        command = rec.StartRun(
            run_id="probe", workflow=health.WORKFLOW, input=START.input, requested_at=0,
            attributes={health.QUEUE: queue}, reply_to=to,
        )  # fmt: skip
        return lab.put(CATALOGUE.commands, command)

    part = lab.settle(asked("default"))
    (request,) = requests(part, early=False)
    assert (part.events, part.answers, part.early) == ([], [], [])
    assert Registry().step(request.step) is health.answer, "every worker has it"
    lab.now += 30
    part = lab.settle(
        lab.put(CATALOGUE.results, step_result(request, rec.StepSucceeded(result=request.input), lab.now))
    )
    ((reply_to, make),) = part.answers
    assert (reply_to, part.events) == (to, [])
    assert load(make().result) == {"worker": "w", "took_ms": 30}
    assert lab.store.state("probe") is None

    part = lab.settle(asked("nowhere"))
    assert not part.outputs
    assert "durably topics create --queue nowhere" in part.answers[0][1]().message


@pytest.mark.parametrize(
    "step_id",
    ["step_1", "durably.health/1/2", "durably.health/x/2/r", "durably.health/-1/2/r", "durably.health//2/r",
     f"durably.health/{'9' * 5_000}/2/r"],
)  # fmt: skip
def test_a_step_of_a_run_is_no_round_trip(step_id):
    assert health.Asker.of(step_id) is None


def test_no_workflow_takes_the_name_of_the_round_trips():
    with pytest.raises(RegistrationError, match=r"'durably\.health' is durably's own name"):

        @workflow(name=health.WORKFLOW)
        async def observability_usurper() -> None: ...


# -- what is written about them ----------------------------------------------------------------------------------------

_NAME = re.compile(r"\bdurably_[a-z_]+")


def series(metric):
    """The names under which Prometheus has a metric."""
    return (
        {metric + suffix for suffix in ("_bucket", "_sum", "_count")}
        if METRICS[metric].kind == "histogram"
        else {metric}
    )


def expressions(node):
    """All PromQL of a dashboard, wherever in it."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from [value] if key in {"expr", "query"} and isinstance(value, str) else expressions(value)
    elif isinstance(node, list):
        for item in node:
            yield from expressions(item)


def test_the_dashboard_asks_for_metrics_that_there_are():
    dashboard = json.loads((ROOT / "deploy/grafana/durably.json").read_text())
    known = set().union(*(series(metric) for metric in METRICS))
    asked = {name for expression in expressions(dashboard) for name in _NAME.findall(expression)}
    assert asked
    assert asked <= known
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    assert all(panel["type"] == "row" or panel["targets"] for panel in dashboard["panels"])


def test_the_page_lists_all_metrics_with_their_labels():
    page = (ROOT / "docs/observability.md").read_text()
    listed = dict(re.findall(r"^\| `(durably_\w+)` \| ([^|]*) \|", page, re.MULTILINE))
    assert {name: ", ".join(f"`{label}`" for label in metric.labels) for name, metric in METRICS.items()} == {
        name: labels.strip() for name, labels in listed.items()
    }


def test_every_type_of_event_is_counted_or_known_not_to_be():
    from durably_processor import observer

    counted = {*observer._STEP_ENDS, *observer._RUN_ENDS, ev.StepCreated, ev.StepRetrying, ev.RunStarted, ev.RunBlocked}
    assert not counted & observer._UNCOUNTED
    assert counted | observer._UNCOUNTED <= ev.TYPE_OF.keys()
