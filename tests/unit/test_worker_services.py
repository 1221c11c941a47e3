"""What steps are offered beside their streams: a client of the worker's own, and the way back to a gateway."""

import asyncio

import msgspec
import pytest
import worker_scene
from durably import children, payloads, runtime
from durably.authoring import step, workflow
from durably.client import default
from durably.errors import BrokerError, DurablyError
from durably.runtime import step_context
from durably_schemas.records import Reply, ReplyTo, StartRun
from worker_scene import CATALOGUE, ask_for, request, results, sent, until

broker, registry, start = worker_scene.broker, worker_scene.registry, worker_scene.start  # fixtures
pytestmark = pytest.mark.usefixtures("registry")

TO = ReplyTo(partition=1, request_id="gateway-7")


def response(value="hello"):
    return payloads.dump(value, "the response")


def test_steps_share_the_workers_clients_which_close_with_it(broker, start, monkeypatch):
    monkeypatch.delenv("DURABLY_URL", raising=False)

    @workflow
    async def child(x: int) -> int:
        return x

    @step
    async def launch(x: int) -> str:
        seen.append(step_context.get().services.client())
        return (await default.start(child, x)).id

    @step
    async def launch_named(x: int) -> str:
        seen.append(step_context.get().services.client())
        assert default.get_run("mine").id == "mine"
        return (await default.options(run_id="mine", attributes={"a": "b"}).start("child", x)).id

    @step
    def launch_sync(x: int) -> str:
        seen_sync.append(step_context.get().services.sync_client())
        return seen_sync[-1].start(child, x).id

    seen, seen_sync = [], []
    worker = start()
    ask_for(
        broker,
        request(launch, 1),
        request(launch_named, 2, step_id="s2"),
        request(launch_sync, 3, step_id="s3"),
        request(launch_sync, 4, step_id="s4"),
    )
    ids = {payloads.load(r.outcome.result) for r in results(broker, 4)}
    started = {c.run_id: c for c in sent(broker, StartRun, CATALOGUE.commands)}
    assert set(started) == ids
    assert started["mine"].attributes == {"a": "b"}
    assert len(set(seen)) == len(set(seen_sync)) == 1
    worker.stop(1)
    worker.join()
    with pytest.raises(DurablyError, match="closed"):
        seen_sync[0].start(child, 5)
    with pytest.raises(DurablyError, match="closed"):
        asyncio.run(seen[0].start(child, 5))


def test_a_step_that_outlives_its_worker_gets_no_client(broker, start):
    services = []
    look = step(name="look")(lambda: services.append(step_context.get().services))
    worker = start()
    ask_for(broker, request(look))
    results(broker, 1)
    worker.stop(1)
    worker.join()
    for client in (services[0].client, services[0].sync_client):
        with pytest.raises(DurablyError, match="has stopped"):
            client()


def test_responses_go_to_the_gateways_partition_and_are_durable(broker, start):
    @step
    async def respond():
        await step_context.get().services.respond(TO, response())

    @step
    def respond_sync():
        step_context.get().services.respond_sync(TO, response("sync"))

    start()
    ask_for(broker, request(respond), request(respond_sync, step_id="s2"))
    results(broker, 2)
    replies = [m for m in broker.records(CATALOGUE.replies) if m.partition == TO.partition]
    assert len(replies) == 2
    found = sent(broker, Reply, CATALOGUE.replies)
    assert {(r.request_id, r.run_id) for r in found} == {("gateway-7", "run-1")}
    assert {payloads.load(r.result) for r in found} == {"hello", "sync"}


@pytest.mark.parametrize("is_async", [True, False])
def test_a_response_that_is_not_acknowledged_fails_the_step_with_a_reason(broker, start, monkeypatch, is_async):
    monkeypatch.setattr("durably.worker.services.RESPOND", 0.1)

    async def respond():
        await step_context.get().services.respond(TO, response())

    def respond_sync():
        step_context.get().services.respond_sync(TO, response())

    responding = step(name="respond")(respond if is_async else respond_sync)
    start()
    broker.muted = True
    ask_for(broker, request(responding))
    until(lambda: sent(broker, Reply, CATALOGUE.replies))
    until(lambda: results(broker, 1))
    broker.muted = False
    assert "not acknowledged within 0.1 s" in results(broker, 1)[0].outcome.error.message


def test_a_response_that_cannot_be_sent_or_is_too_large_says_so(broker, start):
    @step
    async def respond(text: str):
        try:
            await step_context.get().services.respond(TO, response(text))
        finally:
            broker.failing = None

    start()
    broker.failing = BrokerError("down")
    ask_for(broker, request(respond, "hello"))
    assert "could not be sent: down" in results(broker, 1)[0].outcome.error.message
    broker.max_record_bytes = 3000
    ask_for(broker, request(respond, "x" * 2990, step_id="s2"))
    until(lambda: len(results(broker, 1)) == 2)
    assert "keep large data elsewhere" in results(broker, 2)[1].outcome.error.message


def test_steps_know_where_the_gateway_is(broker, start):
    look = step(name="look")(lambda: runtime.get_workflow_metadata().url)
    start()
    ask_for(broker, msgspec.structs.replace(request(look), workflow_url="https://hooks.example"))
    assert payloads.load(results(broker, 1)[0].outcome.result) == "https://hooks.example"


# In workflow code.


@pytest.mark.parametrize(
    "call",
    [
        lambda: default.resume_hook("token", 1),
        lambda: default.get_hook_by_token("token"),
        lambda: default.resume_webhook("token", None),
    ],
)
def test_what_only_a_step_can_do_says_so_in_a_workflow(monkeypatch, call):
    monkeypatch.setattr(default, "workflow_context", object)
    with pytest.raises(DurablyError, match="call it in a step"):
        asyncio.run(call())


def test_in_a_workflow_starts_and_runs_are_the_workflows_own(monkeypatch):
    calls = []

    async def child_start(workflow, *args, **kwargs):
        calls.append((workflow, args, kwargs))
        return "child"

    monkeypatch.setattr(default, "workflow_context", object)
    monkeypatch.setattr(children, "start", child_start)
    monkeypatch.setattr(children, "get_run", lambda run_id: f"run {run_id}")
    monkeypatch.setattr(children, "options", lambda **options: options)
    assert asyncio.run(default.start("flow", 1, x=2)) == "child"
    assert calls == [("flow", (1,), {"x": 2})]
    assert default.get_run("a") == "run a"
    assert default.options(run_id="a", on_parent_end="cancel")["on_parent_end"] == "cancel"
    assert default.options(run_id="a") == {
        "run_id": "a", "attributes": None, "delay": None, "on_parent_end": "abandon",
    }  # fmt: skip


def test_outside_of_a_workflow_a_run_has_no_parent():
    with pytest.raises(DurablyError, match="on_parent_end='cancel'"):
        default.options(on_parent_end="cancel")
