"""The command line over a scripted processor: what it prints, and how it ends."""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import durably.broker
import pytest
from durably import installation, payload_codec, payloads
from durably.broker.port import TopicState
from durably.cli import gateway, output
from durably.cli.app import app
from durably.cli.watch import RunView
from durably.client import connection
from durably.errors import ConfigurationError
from durably_schemas import Catalogue, events
from durably_schemas.catalogue import partition_for
from durably_schemas.codec import RECORDS
from durably_schemas.records import CancelRun, Error, Origin, ResetRun, StartRun, StreamChunk, StreamWritten
from rich.console import Console
from typer.testing import CliRunner, Result
from unit.scripted_broker import ScriptedBroker, ScriptedProcessor
from unit.scripted_hooks import ScriptedHooks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

URL = ["--url", "kafka://scripted:1"]
Invoke = "Callable[..., Result]"


@pytest.fixture
def broker() -> ScriptedBroker:
    return ScriptedBroker(Catalogue(partitions=3))


@pytest.fixture
def processor(broker: ScriptedBroker) -> ScriptedProcessor:
    return ScriptedProcessor(broker)


@pytest.fixture
def durably_(broker: ScriptedBroker, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Invokes a command; the broker is the scripted one."""
    monkeypatch.setattr(durably.broker, "connect", lambda url, kafka, own: broker)
    monkeypatch.setattr(connection, "_TICK", 0.01)
    for name in [name for name in os.environ if name.startswith("DURABLY_")]:
        monkeypatch.delenv(name)

    def invoke(*arguments: str, url: bool = True) -> Result:
        return CliRunner().invoke(app, [*arguments, *(URL if url else [])], env={"COLUMNS": "200"})

    return invoke


def text(view: RunView, now: int) -> str:
    out = io.StringIO()
    Console(file=out, width=120).print(view.render(now))
    return out.getvalue()


# starting


def test_start_sends_json_arguments_and_prints_the_runs_id(broker: ScriptedBroker, durably_: Any) -> None:
    result = durably_("start", "greet", '"Ada"', "2", '{"a": [1]}', "--run-id", "r1", "--attribute", "team=a=b")
    assert (result.exit_code, result.stdout) == (0, "r1\n")
    (command,) = broker.sent
    assert isinstance(command, StartRun)
    assert (command.workflow, command.attributes) == ("greet", {"team": "a=b"})
    assert (command.input.content_type, json.loads(command.input.data)) == (payloads.JSON, ["Ada", 2, {"a": [1]}])


def test_start_takes_keyword_arguments_as_one_object(broker: ScriptedBroker, durably_: Any) -> None:
    result = durably_("start", "greet", "--input", '{"name": "Ada"}', "--json")
    assert json.loads(result.stdout)["run_id"].startswith("wrun_")
    assert json.loads(broker.sent[0].input.data) == {"name": "Ada"}


def test_start_waits_for_the_result(broker: ScriptedBroker, processor: ScriptedProcessor, durably_: Any) -> None:
    processor.start("r1")
    processor.complete("r1", {"text": "Ada"})
    assert durably_("start", "greet", "--run-id", "r1", "--wait").stdout == '{"text":"Ada"}\n'
    result = durably_("start", "greet", "--run-id", "r1", "--wait", "--json")
    assert json.loads(result.stdout) == {"run_id": "r1", "status": "completed", "result": {"text": "Ada"}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hello"], """double quotes within single ones: '"hello"'"""),
        (["1", "--input", "{}"], "not both"),
        (["--input", "[1]"], "must be a JSON object"),
        (["--attribute", "team"], "is not KEY=VALUE"),
        (["--delay", "soon"], "no duration"),
        (["--run-id", "a|b"], "has a '|'"),
        (["\udcff"], "is not JSON"),
        (["[" * 5_000], "is not JSON"),
    ],
)
def test_a_mistake_in_the_arguments_is_a_usage_error(
    arguments: list[str], message: str, broker: ScriptedBroker, durably_: Any
) -> None:
    result = durably_("start", "greet", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert broker.sent == []


def test_what_is_sent_is_encoded_as_the_process_is_set_to(broker: ScriptedBroker, durably_: Any, zipped: None) -> None:
    hooks = ScriptedHooks(broker)
    hooks.open("t")
    secret = json.dumps("s" * 5_000)
    assert durably_("start", "greet", secret).exit_code == 0
    assert durably_("hooks", "resume", "t", secret).exit_code == 0
    for sent in (broker.sent[0].input, hooks.received[0].payload):
        assert sent.content_type == "application/json;codec=gzip"
        assert b"sss" not in sent.data


@pytest.fixture
def zipped() -> Iterator[None]:
    payload_codec.install(payload_codec.Gzip())
    yield
    payload_codec.install()


def test_a_stream_shows_what_it_cannot_read_as_bytes(
    broker: ScriptedBroker, processor: ScriptedProcessor, durably_: Any
) -> None:
    processor.start("r1")
    sealed = payloads.Payload(content_type="application/x-sealed", data=b"\0")
    chunk = StreamChunk(run_id="r1", namespace="log", writer="w", n=0, kind="DATA", at=0, payload=sealed)
    broker.put(broker.catalogue.streams, chunk, key="r1")
    processor.chunk("r1", "log", 1, "readable")
    processor.chunk("r1", "log", 2, end=True)
    result = durably_("stream", "r1", "log")
    assert (result.exit_code, result.stdout) == (
        0,
        '{"content_type":"application/x-sealed","base64":"AA=="}\nreadable\n',
    )


def test_a_workflow_needs_a_name(broker: ScriptedBroker, durably_: Any) -> None:
    result = durably_("start", "")
    assert (result.exit_code, broker.sent) == (1, [])
    assert "the workflow's name is empty" in result.stderr


# errors


@pytest.mark.parametrize(
    "arguments",
    [
        ("runs", "show", "a|b"),
        ("runs", "events", " "),
        ("runs", "cancel", "x" * 201),
        ("runs", "rerun", "r1", "--run-id", "a|b"),
        ("runs", "watch", "a|b"),
        ("stream", "a|b"),
        ("hooks", "list", "--run", "a|b"),
    ],
)
def test_what_can_be_no_run_is_refused_before_anybody_is_asked(
    arguments: tuple[str, ...], broker: ScriptedBroker, durably_: Any
) -> None:
    result = durably_(*arguments)
    assert (result.exit_code, broker.sent) == (2, [])
    assert "use 1 to 200 bytes" in " ".join(result.stderr.replace("│", " ").split())


def test_json_may_be_asked_for_before_the_command(processor: ScriptedProcessor, durably_: Any) -> None:
    processor.start("r1")
    assert json.loads(durably_("--json", "runs", "show", "r1").stdout)["run_id"] == "r1"
    assert json.loads(durably_("--json", "runs", "show", "nobody").stderr)["type"] == "RunNotFoundError"


def test_the_version_is_that_of_the_distribution(durably_: Any) -> None:
    result = durably_("--version", url=False)
    assert (result.exit_code, result.stdout) == (0, f"{version('durably')}\n")


def test_an_error_is_one_line_on_stderr_and_status_1(processor: ScriptedProcessor, durably_: Any) -> None:
    result = durably_("runs", "show", "nobody")
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", "error: there is no run nobody\n")
    result = durably_("runs", "show", "nobody", "--json")
    assert json.loads(result.stderr) == {"error": "there is no run nobody", "type": "RunNotFoundError"}


def test_a_failed_run_ends_waiting_with_status_1(processor: ScriptedProcessor, durably_: Any) -> None:
    processor.start("r1")
    error = Error(type="shop:OutOfStock", message="no tea")
    processor.end("r1", "failed", events.RunFailed(error=error), error)
    result = durably_("start", "greet", "--run-id", "r1", "--wait", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stderr)["type"] == "RunFailedError"
    assert "OutOfStock: no tea" in json.loads(result.stderr)["error"]


def test_without_a_url_the_way_to_give_one_is_named(durably_: Any) -> None:
    result = durably_("runs", "list", url=False)
    assert result.exit_code == 1
    assert "--url or set DURABLY_URL" in result.stderr


def test_a_traceback_needs_verbose(
    durably_: Any, processor: ScriptedProcessor, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise KeyError("lost")

    monkeypatch.setattr("durably.client.listing._latest", fail)
    result = durably_("runs", "list")
    assert (result.exit_code, result.stderr) == (1, "unexpected error: KeyError: 'lost'; --verbose shows where\n")
    assert "Traceback" in durably_("runs", "list", "--verbose").stderr


# looking


def test_runs_are_listed_as_a_table_or_as_json(processor: ScriptedProcessor, durably_: Any) -> None:
    processor.start("r1")
    processor.start("r2", workflow="other")
    processor.change("r2", attributes={"team": "eu"})
    processor.complete("r1", 1)
    table = durably_("runs", "list").stdout
    assert "r1" in table
    assert "team=eu" in table
    assert [
        run["run_id"] for run in json.loads(durably_("runs", "list", "--json", "--attribute", "team=eu").stdout)
    ] == ["r2"]
    assert json.loads(durably_("runs", "list", "--status", "completed", "--json").stdout)[0]["run_id"] == "r1"
    assert durably_("runs", "list", "--status", "done").exit_code == 2
    assert json.loads(durably_("runs", "list", "--build", "v1", "--json").stdout) == []
    processor.change("r1", build="v1", version=2, origin=Origin(run_id="r0", events=5))
    assert [run["run_id"] for run in json.loads(durably_("runs", "list", "--build", "v1", "--json").stdout)] == ["r1"]
    shown = " ".join(durably_("runs", "show", "r1").stdout.split())
    assert "version 2 build v1 origin r0 (its first 5 events)" in shown


def test_a_run_and_its_log_are_shown_with_their_values(processor: ScriptedProcessor, durably_: Any) -> None:
    processor.start("r1")
    processor.complete("r1", {"n": 1})
    assert "completed" in durably_("runs", "show", "r1").stdout
    assert json.loads(durably_("runs", "show", "r1", "--json").stdout)["workflow"] == "greet"
    log = json.loads(durably_("runs", "events", "r1", "--json").stdout)
    assert [(e["seq"], e["type"]) for e in log] == [(1, "run_created"), (2, "run_completed")]
    assert log[1]["data"]["result"] == {"n": 1}
    assert '{"n":1}' in durably_("runs", "events", "r1").stdout


def test_cancel_carries_its_reason(broker: ScriptedBroker, processor: ScriptedProcessor, durably_: Any) -> None:
    processor.start("r1")
    assert "r1 is cancelled" in durably_("runs", "cancel", "r1", "--reason", "enough").stdout
    assert [c.reason for c in broker.sent if isinstance(c, CancelRun)] == ["enough"]


def test_a_stream_is_printed_to_its_end(processor: ScriptedProcessor, durably_: Any) -> None:
    processor.start("r1")
    for n, value in enumerate(["a", {"b": 1}]):
        processor.chunk("r1", "log", n, value)
    processor.chunk("r1", "", 0, writer="end", end=True)
    assert durably_("stream", "r1", "log").stdout == 'a\n{"b":1}\n'
    assert durably_("stream", "r1", "log", "--from", "1").stdout == '{"b":1}\n'
    assert durably_("stream", "r1", "log", "--json", "--from", "-2").stdout == '"a"\n{"b":1}\n'
    assert "there is no run r2" in durably_("stream", "r2").stderr


def test_watching_follows_the_events_as_they_come_and_ends_with_the_run(
    processor: ScriptedProcessor, durably_: Any
) -> None:
    processor.start("r1")
    timer = threading.Timer(0.05, processor.complete, ("r1", 7))
    timer.start()
    lines = durably_("runs", "watch", "r1", "--json").stdout.splitlines()
    assert [json.loads(line)["type"] for line in lines] == ["run_created", "run_completed"]
    assert "completed" in durably_("runs", "watch", "r1").stdout


def test_the_view_of_a_run_shows_steps_waits_hooks_and_streams() -> None:
    view, at = RunView("r1"), 1_000_000
    error = Error(type="builtins:OSError", message="busy")
    value = payloads.dump({"ok": 1}, "value")
    written = (StreamWritten(namespace="log", writer="w", partition=0, first_offset=0, chunks=3),)
    log: list[tuple[events.EventData, str | None]] = [
        (events.RunCreated(workflow="greet", input=value), None),
        (events.RunStarted(), None),
        (_step("charge", "default"), "step_1"),
        (_step("render", "gpu"), "step_2"),
        (events.StepRetrying(attempt=2, error=error, retry_at=at), "step_1"),
        (events.StepCompleted(attempt=2, result=value, streams=written), "step_1"),
        (events.WaitCreated(due_at=at), "wait_1"),
        (events.HookCreated(token="ship-7"), "hook_1"),
        (events.ChildCreated(child_run_id="c1", workflow="pack", input=value), "child_1"),
    ]
    for seq, (data, of) in enumerate(log, 1):
        view.take(events.event("r1", seq, at + seq * 100, data, of))
    shown = text(view, at + 2_000)
    for part in (
        "greet",
        "running",
        "9 events",
        "1.90 s",
        "charge",
        '{"ok":1}',
        "300 ms",
        "on gpu",
        "ship-7",
        "pack c1",
    ):
        assert part in shown
    assert "stream log: 3 chunks" in shown
    view.take(events.event("r1", 10, at + 3_000, events.RunFailed(error=error)))
    assert "OSError: busy" in text(view, at + 9_000)
    assert "9.0" not in text(view, at + 9_000)  # nothing runs on after the end


def _step(name: str, queue: str) -> events.StepCreated:
    backoff = events.Backoff(initial_ms=1, factor=1.0, max_ms=1)
    value = payloads.dump([[], {}], "value")
    return events.StepCreated(step=name, queue=queue, input=value, fingerprint="f", max_retries=3, backoff=backoff)


def test_a_run_is_done_again(broker: ScriptedBroker, processor: ScriptedProcessor, durably_: Any) -> None:
    durably_("start", "greet", '"Ada"', "--run-id", "r1", "--attribute", "team=eu")
    assert durably_("runs", "rerun", "r1", "--run-id", "r2").stdout == "r2\n"
    again = json.loads(durably_("runs", "rerun", "r1", "--json").stdout)
    assert (again["rerun_of"], again["run_id"].startswith("wrun_")) == ("r1", True)
    starts = [c for c in broker.sent if isinstance(c, StartRun)]
    assert len({(c.workflow, c.input.data, c.attributes["team"]) for c in starts}) == 1
    assert "has a '|'" in durably_("runs", "rerun", "r1", "--run-id", "a|b").stderr
    assert "there is no run nobody" in durably_("runs", "rerun", "nobody").stderr


def test_a_run_is_reset_to_an_event(broker: ScriptedBroker, processor: ScriptedProcessor, durably_: Any) -> None:
    durably_("start", "greet", '"Ada"', "--run-id", "r1")
    told = json.loads(durably_("runs", "reset", "r1", "--to-event", "1", "--reason", "again", "--json").stdout)
    (command,) = [c for c in broker.sent if isinstance(c, ResetRun)]
    assert told == {"run_id": command.new_run_id, "reset_of": "r1", "to_event": 1}
    assert (command.run_id, command.to_event, command.reason) == ("r1", 1, "again")
    assert durably_("runs", "reset", "r1", "--to-event", "1").stdout.startswith("wrun_")
    refused = durably_("runs", "reset", "r1", "--to-event", "9")
    assert refused.exit_code == 1
    assert "no event 9" in refused.stderr
    assert "there is no run nobody" in durably_("runs", "reset", "nobody", "--to-event", "1").stderr


# hooks


@pytest.fixture
def hooks(broker: ScriptedBroker) -> ScriptedHooks:
    return ScriptedHooks(broker)


def test_hooks_are_listed_and_shown_with_their_metadata(hooks: ScriptedHooks, durably_: Any) -> None:
    hooks.open("ship-7", metadata={"order": 7})
    hooks.open("hook_aaaaaaaaaaaaaaaaaaaaaa.r2", "r2", webhook=True, response="manual")
    hooks.start("r3", "other")
    table = durably_("hooks", "list").stdout
    assert "ship-7" in table
    assert "webhook" in table
    assert '{"order":7}' in table
    assert [h["token"] for h in json.loads(durably_("hooks", "list", "--run", "r1", "--json").stdout)] == ["ship-7"]
    assert json.loads(durably_("hooks", "list", "--workflow", "other", "--json").stdout) == []
    assert len(json.loads(durably_("hooks", "list", "--limit", "1", "--json").stdout)) == 1
    assert json.loads(durably_("hooks", "show", "ship-7", "--json").stdout)["metadata"] == {"order": 7}
    assert "manual" in durably_("hooks", "show", "hook_aaaaaaaaaaaaaaaaaaaaaa.r2").stdout
    assert "ship-7" in durably_("runs", "show", "r1").stdout
    assert "may not have come that far yet" in durably_("hooks", "show", "nobody").stderr


def test_a_hook_is_resumed_with_json(hooks: ScriptedHooks, durably_: Any) -> None:
    hooks.open("t")
    assert durably_("hooks", "resume", "t", '{"by": "Ada"}').stdout == "run r1 has it\n"
    assert json.loads(durably_("hooks", "resume", "t", "--resume-id", "d", "--json").stdout)["run_id"] == "r1"
    durably_("hooks", "resume", "t", "--resume-id", "d")
    assert [payloads.load(r.payload) for r in hooks.received] == [{"by": "Ada"}, None]
    assert durably_("hooks", "resume", "t", "{").exit_code == 2
    assert durably_("hooks", "resume", "nobody").exit_code == 1


# topics, schemas, health


@pytest.mark.parametrize("command", [("topics", "create"), ("topics", "check"), ("worker", "x.py"), ("dev", "x.py")])
def test_a_queue_must_have_a_name_that_a_topic_can_have(command: tuple[str, ...], durably_: Any) -> None:
    result = durably_(*command, "--queue", "bad/queue!")
    assert result.exit_code == 2
    assert "queue 'bad/queue!': letters, digits" in " ".join(result.stderr.replace("│", " ").split())


def test_a_folder_that_cannot_be_made_is_named(durably_: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = durably_("schemas", "export", str(tmp_path / "file" / "x"), url=False)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: cannot write to {tmp_path / 'file' / 'x'}: ")


def test_topics_are_created_once_with_the_count_that_the_installation_has(
    durably_: Any, broker: ScriptedBroker
) -> None:
    broker.states.clear()
    created = json.loads(durably_("topics", "create", "--partitions", "5", "--json").stdout)
    assert (len(created["created"]), created["existing"], created["partitions"]) == (10, [], 5)
    again = json.loads(durably_("topics", "create", "--queue", "gpu", "--json").stdout)
    assert again["created"] == ["durably.requests.gpu"]
    assert broker.states["durably.requests.gpu"].partitions == 5
    build = json.loads(durably_("topics", "create", "--queue", "gpu", "--build", "v2", "--json").stdout)
    assert build["created"] == ["durably.requests.gpu.v2"]
    assert "build 'v/2': letters, digits" in durably_("topics", "create", "--build", "v/2").stderr.replace("│", " ")
    refused = durably_("topics", "create", "--partitions", "6")
    assert refused.exit_code == 1
    assert "5 partitions, but 6 are asked for" in refused.stderr


def test_check_says_what_differs_and_the_remedy(durably_: Any, broker: ScriptedBroker) -> None:
    assert durably_("topics", "check").exit_code == 0
    stamped = {"cleanup.policy": "delete", "message.timestamp.type": "LogAppendTime"}
    broker.states["durably.events"] = TopicState(3, {**stamped, "retention.ms": "604800000", "retention.bytes": "-1"})
    broker.states["durably.runs"] = TopicState(2, stamped)
    broker.states["durably.replies"] = TopicState(3, {**stamped, "message.timestamp.type": "CreateTime"})
    del broker.states["durably.streams"]
    result = durably_("topics", "check", "--json")
    assert result.exit_code == 1
    problems = [(p["topic"], p["problem"]) for p in json.loads(result.stdout)["problems"]]
    assert problems == [
        ("durably.events", "retention.ms is '604800000' and must be '-1'"),
        ("durably.runs", "2 partitions where 3 are needed"),
        ("durably.runs", "cleanup.policy is 'delete' and must be 'compact'"),
        ("durably.replies", "message.timestamp.type is 'CreateTime' and must be 'LogAppendTime'"),
        ("durably.streams", "missing"),
    ]


def test_export_writes_every_schema_and_the_catalogue(durably_: Any, tmp_path: Path) -> None:
    assert durably_("schemas", "export", str(tmp_path / "out"), "--namespace", "shop", url=False).exit_code == 0
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {f"{record.__name__}.avsc" for record in RECORDS} | {"topics.json"}
    topics = json.loads((tmp_path / "out" / "topics.json").read_text())
    assert {"shop.commands", "shop.requests.default"} <= {topic["name"] for topic in topics}
    assert json.loads((tmp_path / "out" / "StartRun.avsc").read_text())["name"] == "StartRun"


def test_health_asks_the_owner_of_every_partition(processor: ScriptedProcessor, durably_: Any) -> None:
    result = durably_("health", "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 0
    assert report["healthy"]
    assert [p["partition"] for p in report["partitions"]] == [0, 1, 2]
    assert all(p["latency_ms"] >= 0 for p in report["partitions"])
    assert "3 partitions answer" in durably_("health").stdout


def test_health_names_the_partition_that_nobody_owns(
    processor: ScriptedProcessor, broker: ScriptedBroker, durably_: Any
) -> None:
    def all_but_one(command: Any) -> None:
        if partition_for(command.run_id.encode(), 3) != 1:
            processor.take(command)

    broker.on_command = all_but_one
    result = durably_("health", "--timeout", "0.1")
    assert result.exit_code == 1
    assert "nobody answers for partition 1" in result.stdout


def test_health_asks_a_worker_of_each_queue_and_says_which_has_none(
    processor: ScriptedProcessor, broker: ScriptedBroker, durably_: Any
) -> None:
    broker.create(Catalogue(partitions=3).topics(("gpu",)))
    report = json.loads(durably_("health", "--json", "--timeout", "0.3").stdout)
    assert not report["healthy"]
    served, unserved = report["queues"]
    assert (served["queue"], served["worker"], served["took_ms"], served["problem"]) == ("default", "w1", 3, None)
    assert served["latency_ms"] >= 0
    assert "start `durably worker MODULE --queue gpu`" in unserved["problem"]
    only = durably_("health", "--queue", "default")
    assert (only.exit_code, "w1 answers in" in only.stdout) == (0, True)
    assert durably_("health", "--no-workers").exit_code == 0


def test_health_asks_the_gateway_that_is_named(processor: ScriptedProcessor, durably_: Any) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as nobody:
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
    report = json.loads(durably_("health", "--json", "--gateway", url).stdout)
    assert not report["healthy"]
    assert "start `durably gateway`" in report["gateway"]["problem"]
    assert "use the base of a URL" in durably_("health", "--gateway", "file:///etc").stderr


def test_health_without_topics_names_them(broker: ScriptedBroker, durably_: Any) -> None:
    broker.states.clear()
    result = durably_("health", "--json")
    assert result.exit_code == 1
    assert "durably topics create" in json.loads(result.stdout)["topics"][0]


# processes


class FakeGateway:
    """A gateway that notes when it is started and stopped."""

    def __init__(self, notes: list[Any], url: str) -> None:
        self.notes, self.url = notes, url

    def start(self) -> None:
        self.notes.append("gateway started")

    def stop(self) -> None:
        self.notes.append("gateway stopped")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was asked of the modules that are found by name."""
    noted: list[Any] = []

    class Fake:
        @staticmethod
        def run_processor(settings: Any, modules: Any, ready: Any, metrics: str | None) -> None:
            ready()
            noted.append((settings.url, list(modules), metrics))

        @staticmethod
        def run_dev(settings: Any, modules: Any, ready: Any, **options: Any) -> None:
            ready()
            noted.append((settings.url, settings.gateway_url, list(modules), options))

        @staticmethod
        def local_gateway(settings: Any, port: int) -> FakeGateway:
            if port == 99:
                raise ConfigurationError("cannot listen on 127.0.0.1 port 99")
            return FakeGateway(noted, f"http://127.0.0.1:{port}")

        @staticmethod
        def serve(settings: Any, *, ready: Any, **options: Any) -> None:
            ready("http://127.0.0.1:8233")
            noted.append((settings.url, options))

    monkeypatch.setattr(installation.importlib, "import_module", lambda name: Fake)
    return noted


def test_processes_are_found_by_name_and_given_settings_and_modules(durably_: Any, calls: list[Any]) -> None:
    assert "processor ready" in durably_("processor", "a.py", "b", "--metrics", "9464").stderr
    options = ["--path", "x/y", "--queue", "gpu", "--concurrency", "3", "--port", "0"]
    assert "--url embedded:x/y" in durably_("dev", "a.py", *options).stderr
    assert calls == [
        ("kafka://scripted:1", ["a.py", "b"], "9464"),
        ("embedded:x/y", None, ["a.py"], {"queues": ("gpu",), "concurrency": 3, "metrics": None}),
    ]
    assert "durably dev has a broker of its own" in durably_("dev", "a.py").stderr


def test_a_form_of_logs_that_there_is_not_is_refused(durably_: Any, calls: list[Any]) -> None:
    result = durably_("processor", "a.py", "--log-format", "xml")
    assert (result.exit_code, calls) == (1, [])
    assert "use text or json" in result.stderr


def test_dev_has_a_gateway_beside_it(durably_: Any, calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "gateway at http://127.0.0.1:8233" in durably_("dev", "a.py", url=False).stderr
    started, (_, gateway_url, *_rest), stopped = calls
    assert (started, gateway_url, stopped) == ("gateway started", "http://127.0.0.1:8233", "gateway stopped")
    monkeypatch.setenv("DURABLY_GATEWAY_URL", "https://hooks.example.com")
    durably_("dev", "a.py", "--port", "9000", url=False)
    assert calls[4][1] == "https://hooks.example.com"


def test_dev_does_without_a_gateway_unless_its_port_was_asked_for(
    durably_: Any, calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway, "PORT", 99)
    result = durably_("dev", "a.py", url=False)
    assert (result.exit_code, calls[0][1]) == (0, None)
    assert "no gateway: cannot listen" in result.stderr
    assert "gateway at" not in result.stderr
    assert durably_("dev", "a.py", "--port", "99", url=False).exit_code == 1
    assert len(calls) == 1


def test_the_gateway_is_given_its_address_and_token(
    durably_: Any, calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "gateway ready: http://127.0.0.1:8233, for kafka://scripted:1" in durably_("gateway").stderr
    monkeypatch.setenv("DURABLY_GATEWAY_TOKEN", "s3cret")
    monkeypatch.setenv("DURABLY_METRICS", "127.0.0.1:9464")
    durably_("gateway", "--host", "0.0.0.0", "--port", "80", "--projection", "runs.sqlite")
    local = {"host": "127.0.0.1", "port": 8233, "token": None, "projection": None, "metrics": None}
    public = {"host": "0.0.0.0", "port": 80, "token": "s3cret", "projection": Path("runs.sqlite")}
    assert calls == [("kafka://scripted:1", local), ("kafka://scripted:1", {**public, "metrics": "127.0.0.1:9464"})]


def test_without_the_extra_the_gateway_names_it(durably_: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError("No module named 'uvicorn'", name="uvicorn")

    monkeypatch.setattr(gateway.importlib, "import_module", missing)
    result = durably_("gateway")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "needs uvicorn: pip install 'durably[http]'" in result.stderr


def test_a_gateway_for_everybody_needs_a_token(durably_: Any) -> None:
    result = durably_("gateway", "--host", "0.0.0.0", "--port", "0")
    assert result.exit_code == 1
    assert "DURABLY_GATEWAY_TOKEN" in result.stderr


def test_an_installation_without_the_processor_says_so(durably_: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name, name=name)

    monkeypatch.setattr(installation.importlib, "import_module", missing)
    assert "this installation has no processor" in durably_("processor", "a").stderr


def test_a_worker_drains_for_as_long_as_it_is_told(
    durably_: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drains: list[float] = []

    class Fake:
        error = None

        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def start(self) -> None:
            signal.raise_signal(signal.SIGTERM)

        def stop(self, drain_timeout: float) -> None:
            drains.append(drain_timeout)

        def join(self) -> None:
            pass

    monkeypatch.setattr("durably.worker.Worker", Fake)
    module = tmp_path / "cli_drained_module.py"
    module.write_text("")
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        assert durably_("worker", str(module), "--drain", "1h30m").exit_code == 0
        assert durably_("worker", str(module)).exit_code == 0
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
    assert drains == [5400, 30]
    refused = durably_("worker", str(module), "--drain", "soon")
    assert (refused.exit_code, "--drain (DURABLY_DRAIN): 'soon' is no duration" in refused.stderr) == (1, True)


def test_a_worker_needs_its_modules_and_its_topics(durably_: Any, tmp_path: Path) -> None:
    missing = durably_("worker", str(tmp_path / "none.py"))
    assert missing.exit_code == 1
    assert "cannot load" in missing.stderr
    module = tmp_path / "cli_worker_module.py"
    module.write_text("")
    result = durably_("worker", str(module), "--queue", "gpu")
    assert result.exit_code == 1
    assert "durably.requests.gpu: create them with `durably topics create --queue gpu`" in result.stderr
    result = durably_("worker", str(module), "--build", "v2")
    assert (
        "durably.requests.default.v2: create them with `durably topics create --queue default --build v2`"
        in result.stderr
    )


def test_every_command_has_the_common_options() -> None:
    def commands(group: Any) -> list[Any]:
        found = list(getattr(group, "commands", {}).values())
        return [c for one in found for c in (commands(one) if hasattr(one, "commands") else [one])]

    from typer.main import get_command

    found = commands(get_command(app))
    assert len(found) == 23
    for one in found:
        assert {"url", "namespace", "json", "verbose"} <= {parameter.name for parameter in one.params}


def test_help_starts_without_loading_a_client_or_a_broker() -> None:
    heavy = ("confluent_kafka", "rocksdict", "durably.client", "durably.broker.kafka", "durably.worker")
    code = f"import sys, durably.cli.app; print([m for m in sys.modules if m.startswith({heavy})])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_values_that_json_has_no_form_for_are_printed_as_text() -> None:
    assert json.loads(output.to_json({(1, 2): [{3}, 1 << 70, UUID(int=1)]})) == {
        "(1, 2)": [[3], 1 << 70, str(UUID(int=1))]
    }
    assert output.length(90_061_000) == "1 d 1 h 1 min 1 s"


def test_help_is_quick() -> None:
    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before, command = spent(), Path(sys.executable).parent / "durably"
    done = subprocess.run([command, "--help"], capture_output=True, text=True, check=True)
    assert "processor" in done.stdout
    assert spent() - before < 1  # of processor time; about a third of that where nothing else runs


@pytest.mark.parametrize("command", ["processor MODULE", "dev MODULE --path x", "runs list"])
@pytest.mark.parametrize(("variable", "value"), [("STANDBY", "true"), ("RETENTION", "5x"), ("RETENTION", "0")])
def test_every_command_reads_the_settings_of_a_processor_alike(
    command: str, variable: str, value: str, durably_: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"DURABLY_{variable}", value)
    result = durably_(*command.split())
    assert result.exit_code == 1
    assert f"DURABLY_{variable} is '{value}': use " in result.stderr


# permissions


def test_acls_are_commands_of_kafkas_own_with_the_reason_above_each(durably_: Any) -> None:
    result = durably_("acls", "--role", "worker", "--principal", "User:mail", "--queue", "mail", "--starts-runs")
    lines, topic = result.stdout.splitlines(), "--topic durably.requests.mail"
    assert lines[:2] == [
        "# its input",
        f"kafka-acls.sh --bootstrap-server scripted:1 --add --allow-principal User:mail --operation Read {topic}",
    ]
    assert any(line.endswith("--operation Write --topic durably.commands") for line in lines)
    assert not any(line.endswith("--topic durably.events") for line in lines)
    result = durably_("acls", "--role", "worker", "--principal", "User:mail", "--build", "v2")
    assert "--topic durably.requests.default.v2\n" in result.stdout


def test_acls_as_json_are_one_object_on_each_line(durably_: Any) -> None:
    result = durably_("acls", "--role", "processor", "--principal", "User:p", "--format", "json")
    acls = [json.loads(line) for line in result.stdout.splitlines()]
    (transactions,) = [acl for acl in acls if acl["resource"] == "transactional-id"]
    assert (transactions["name"], transactions["prefixed"], transactions["operation"]) == (
        "durably.processor.", True, "Write",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--role", "client", "--principal", "ada"], "use User:NAME"),
        (["--role", "client", "--principal", "User:ada", "--starts-runs"], "no choice of the role 'client'"),
        (["--role", "king", "--principal", "User:ada"], "'king' is not one of"),
        (["--role", "client", "--principal", "User:ada", "--url", "embedded:x"], "has no ACLs"),
    ],
)
def test_acls_that_cannot_be_are_refused(arguments: list[str], message: str, durably_: Any) -> None:
    result = durably_("acls", *arguments, url="--url" not in arguments)
    assert result.exit_code in {1, 2}
    assert message in " ".join(result.stderr.replace("│", " ").split())
