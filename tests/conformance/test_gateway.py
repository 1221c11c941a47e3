"""The gateway before a whole installation: what an HTTP client sees, on each broker and while processors come and go."""

from __future__ import annotations

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import httpx
import pytest
from durably import create_hook, create_webhook, get_writable, step, workflow
from durably.client import AsyncClient
from durably.hooks import WEBHOOK_PATH
from durably.web import Headers, Request, Response, fetch
from durably_connectors.http import GatewayThread, create_gateway
from harness import System, until

if TYPE_CHECKING:
    from collections.abc import Iterator


class Http:
    """A gateway on loopback, and a client that calls it."""

    def __init__(self, system: System, **options: Any) -> None:
        self._client = AsyncClient(system.url, namespace=system.namespace)
        self._thread = GatewayThread(lambda: create_gateway(self._client, **options), 0)
        self.url = self._thread.url
        self._thread.start()
        self._http = httpx.Client(base_url=self.url, timeout=60, trust_env=False, verify=False)

    def api(self, method: str, path: str, **options: Any) -> Any:
        response = self._http.request(method, f"/api/v1{path}", **options)
        assert response.status_code < 400, response.text
        return response.json()

    def call(self, token: str, method: str = "POST", **options: Any) -> httpx.Response:
        return self._http.request(method, f"{WEBHOOK_PATH}{quote(token, safe='')}", **options)

    def lines(self, path: str, **options: Any) -> Iterator[str]:
        with self._http.stream("GET", f"/api/v1{path}", **options) as response:
            yield from response.iter_lines()

    def close(self) -> None:
        self._http.close()
        self._thread.stop()
        asyncio.run(self._client.close())


@pytest.fixture(scope="module")
def gateway(_system: System) -> Iterator[Http]:
    made = Http(_system)
    yield made
    made.close()


# -- runs --------------------------------------------------------------------------------------------------------------


@step(name="gateway.double")
async def double(n: int) -> int:
    return 2 * n


@workflow
async def doubled(n: int, times: int = 1) -> dict[str, int]:
    for _ in range(times):
        n = await double(n)
    return {"n": n}


def test_a_run_is_started_awaited_looked_at_and_listed(system: System, gateway: Http) -> None:
    run_id = system.fresh("rest/ä")
    path = f"/runs/{quote(run_id, safe='')}"
    asked = {"workflow": "doubled", "kwargs": {"n": 3, "times": 2}, "run_id": run_id, "attributes": {"team": run_id}}
    assert gateway.api("POST", "/runs", json=asked)["run_id"] == run_id
    assert gateway.api("GET", f"{path}/result?wait=60")["result"] == {"n": 12}
    assert gateway.api("POST", "/runs", json=asked)["existing"]
    assert gateway.api("GET", path)["status"] == "completed"
    types = [event["type"] for event in gateway.api("GET", f"{path}/events")["events"]]
    assert (types[0], types[-1], types.count("step_completed")) == ("run_created", "run_completed", 2)
    query = {"attribute": f"team={run_id}", "status": "completed", "workflow": "doubled"}
    listed = until(lambda: gateway.api("GET", "/runs", params=query)["runs"])
    assert [run["run_id"] for run in listed] == [run_id]


def test_a_run_is_done_again(system: System, gateway: Http) -> None:
    first = system.client.start(doubled, 5)
    first.result(60)
    again = gateway.api("POST", f"/runs/{first.id}/rerun")["run_id"]
    assert again != first.id
    assert gateway.api("GET", f"/runs/{again}/result?wait=60")["result"] == {"n": 10}


# -- hooks -------------------------------------------------------------------------------------------------------------


@workflow
async def approved(token: str) -> Any:
    async with create_hook(token=token, metadata={"for": token}) as hook:
        return await hook


def test_a_hook_is_found_and_resumed_by_curl(system: System, gateway: Http) -> None:
    token = system.fresh("ship/7 ä")
    path = f"/hooks/{quote(token, safe='')}"
    run = system.client.start(approved, token)
    system.hook(token)
    assert gateway.api("GET", path)["metadata"] == {"for": token}
    assert [hook["token"] for hook in gateway.api("GET", f"/runs/{run.id}/hooks")["hooks"]] == [token]
    listed = until(
        lambda: [h for h in gateway.api("GET", "/hooks?workflow=approved&limit=100")["hooks"] if h["token"] == token]
    )
    assert listed[0]["run_id"] == run.id
    sent = gateway.api("POST", path, content=b'{"by": "Ada"}', headers={"content-type": "application/json"})
    assert sent["run_id"] == run.id
    assert run.result(60) == {"by": "Ada"}


@workflow
async def collected(token: str, n: int) -> list[Any]:
    async with create_hook(token=token) as hook:
        return [await hook for _ in range(n)]


def test_a_delivery_that_is_repeated_counts_once(system: System, gateway: Http) -> None:
    token = system.fresh("repeated")
    run = system.client.start(collected, token, 2)
    system.hook(token)
    for value, key in ((1, "a"), (1, "a"), (2, "b")):
        gateway.api("POST", f"/hooks/{token}", json=value, headers={"Idempotency-Key": f"{token}-{key}"})
    assert run.result(60) == [1, 2]


# -- webhooks ----------------------------------------------------------------------------------------------------------


@step
async def described(request: Request) -> dict[str, Any]:
    body = await request.bytes()
    return {
        "method": request.method,
        "query": request.url.partition("?")[2],
        "kind": request.headers.get_list("x-kind"),
        "length": len(body),
        "ends": [body[:2], body[-2:]],
    }


@workflow
async def receives(token: str, n: int, read: str, respond_with: Any = None) -> list[Any]:
    async with create_webhook(token=token, respond_with=respond_with) as webhook:
        got = []
        for _ in range(n):
            request = await webhook
            if read == "in a step":
                got.append(await described(request))
            else:
                got.append([request.method, await request.json()])
        return got


def test_requests_of_any_method_reach_the_workflow_in_their_order(system: System, gateway: Http) -> None:
    token = system.fresh("any/ä")
    run = system.client.start(receives, token, 3, "in a step")
    system.hook(token)
    for method in ("GET", "PUT", "HEAD"):
        answer = gateway.call(token, method, params={"q": "1 2"}, headers=[("X-Kind", "a"), ("X-Kind", "b")])
        assert (answer.status_code, answer.content) == (202, b"")
    nothing = {"query": "q=1+2", "kind": ["a", "b"], "length": 0, "ends": [b"", b""]}
    expected = [{"method": method, **nothing} for method in ("GET", "PUT", "HEAD")]
    got = run.result(60)
    assert [{**one, "query": one["query"].replace("%20", "+")} for one in got] == expected
    assert gateway.call(token).status_code == 404, "the hook was given back"


def test_a_workflow_reads_json_itself(system: System, gateway: Http) -> None:
    token = system.fresh("json")
    run = system.client.start(receives, token, 1, "in the workflow")
    system.hook(token)
    gateway.call(token, json={"n": [1, 2]})
    assert run.result(60) == [["POST", {"n": [1, 2]}]]


@pytest.mark.parametrize("read", ["in a step", "in the workflow"])
def test_a_large_body_arrives_whole(read: str, system: System, gateway: Http) -> None:
    token = system.fresh("large")
    run = system.client.start(receives, token, 1, read)
    system.hook(token)
    if read == "in a step":
        body = b"ab" + b"x" * 3_000_000 + b"yz"
        gateway.call(token, content=body)
        assert [(one["length"], one["ends"]) for one in run.result(60)] == [(len(body), [b"ab", b"yz"])]
    else:
        text = "x" * 400_000  # more than travels within a request, and less than a record may hold
        gateway.call(token, content=json.dumps(text).encode())
        assert run.result(60) == [["POST", text]]


@workflow
async def says_thanks(token: str) -> int:
    seen = 0
    async with create_webhook(token=token, respond_with=Response.json({"thanks": True}, status=201)) as webhook:
        async for _ in webhook:
            seen += 1
            if seen == 2:
                break
    return seen


def test_a_static_response_is_given_each_time(system: System, gateway: Http) -> None:
    token = system.fresh("static")
    run = system.client.start(says_thanks, token)
    system.hook(token)
    for _ in range(2):
        answer = gateway.call(token)
        assert (answer.status_code, answer.json()) == (201, {"thanks": True})
    assert run.result(60) == 2


@step
async def respond(request: Request) -> int:
    asked = await request.json()
    await request.respond_with(Response.json({"sum": sum(asked)}, headers=Headers({"X-Step": "1"})))
    return sum(asked)


@step
def respond_in_a_thread(request: Request) -> int:
    asked = json.loads(request.bytes_sync())
    request.respond_with_sync(Response.json({"sum": sum(asked)}, headers={"X-Step": "1"}))
    return sum(asked)


@workflow
async def answers(token: str, n: int) -> int:
    total = 0
    async with create_webhook(token=token, respond_with="manual") as webhook:
        for i in range(n):
            request = await webhook
            total += await (respond_in_a_thread if i % 2 else respond)(request)
    return total


def test_a_step_answers_the_call_that_waits(system: System, gateway: Http) -> None:
    token = system.fresh("manual")
    run = system.client.start(answers, token, 6)
    system.hook(token)
    with ThreadPoolExecutor(6) as pool:
        calls = list(pool.map(lambda n: gateway.call(token, json=[n, 1]), range(6)))
    assert [(c.status_code, c.json(), c.headers["x-step"]) for c in calls] == [
        (200, {"sum": n + 1}, "1") for n in range(6)
    ]
    assert run.result(60) == sum(n + 1 for n in range(6))


def test_plain_hooks_and_unknown_tokens_are_an_empty_404(system: System, gateway: Http) -> None:
    token = system.fresh("plain")
    run = system.client.start(approved, token)
    system.hook(token)
    for path in (token, "nobody", "hook_x.nobody"):
        answer = gateway.call(path)
        assert (answer.status_code, answer.content) == (404, b"")
    system.client.resume_hook(token, "by its own door")
    assert run.result(60) == "by its own door"


@workflow
async def tells_its_url() -> str:
    async with create_webhook() as webhook:
        await announce(webhook.url)
        return (await webhook).method


@step
async def announce(url: str) -> None:
    await get_writable("urls").write(url)


def test_the_url_of_a_webhook_is_where_the_gateway_is(lone_system: System) -> None:
    gateway = Http(lone_system)
    try:
        lone_system.start_processor(gateway_url=f"{gateway.url}/")
        lone_system.start_worker()
        run = lone_system.client.start(tells_its_url)
        url = next(run.stream("urls"))
        assert url.startswith(f"{gateway.url}{WEBHOOK_PATH}hook_")
        assert httpx.patch(url, trust_env=False).status_code == 202
        assert run.result(60) == "PATCH"
    finally:
        gateway.close()


# -- streams -----------------------------------------------------------------------------------------------------------


@step
async def narrate(n: int) -> None:
    async with get_writable("story") as out:
        for i in range(n):
            await out.write({"i": i})


@workflow
async def told(n: int) -> None:
    await narrate(n)


def test_a_stream_is_followed_and_taken_up_again(system: System, gateway: Http) -> None:
    run = system.client.start(told, 5)
    path = f"/runs/{run.id}/streams/story"
    until(lambda: run.describe().started_at)
    lines = list(gateway.lines(path))
    assert [line for line in lines if line.startswith("data")] == [
        *(f'data: {{"i":{i}}}' for i in range(5)),
        "data: {}",
    ]
    again = [line for line in gateway.lines(path, headers={"Last-Event-ID": "2"}) if line.startswith("id")]
    assert again == ["id: 3", "id: 4"]
    run.result(60)
    assert gateway.api("GET", f"/runs/{run.id}/streams") == {"streams": ["story"]}


# -- fetch -------------------------------------------------------------------------------------------------------------


@workflow
async def fetches(url: str) -> Any:
    response = await fetch(url, method="POST", json={"by": "fetch"})
    return [response.status, await response.json()]


def test_a_workflow_fetches_by_a_recorded_step(system: System, gateway: Http) -> None:
    token = system.fresh("fetched")
    waiting = system.client.start(answers, token, 1)
    system.hook(token)
    run = system.client.start(fetches, f"{gateway.url}/api/v1/hooks/nobody")
    status, problem = run.result(60)
    assert (status, problem["type"]) == (404, "urn:durably:problem:hook-not-found")
    assert system.types(run.id).count("step_completed") == 1
    gateway.call(token, json=[1])
    assert waiting.result(60) == 1


def test_a_client_calls_a_webhook_without_a_gateway(system: System) -> None:
    token = system.fresh("direct")
    run = system.client.start(answers, token, 1)
    system.hook(token)
    answer = system.client.resume_webhook(token, Request("POST", "https://example.com/", body="[20, 22]"))
    assert (answer.status, json.loads(answer.bytes_sync())) == (200, {"sum": 42})
    assert run.result(60) == 42


def test_many_senders_at_once_lose_nothing(system: System, gateway: Http) -> None:
    token = system.fresh("many")
    run = system.client.start(receives, token, 40, "in the workflow")
    system.hook(token)
    start = threading.Barrier(8)

    def send(worker: int) -> list[int]:
        start.wait()
        return [gateway.call(token, json=worker * 5 + n).status_code for n in range(5)]

    with ThreadPoolExecutor(8) as pool:
        assert {status for statuses in pool.map(send, range(8)) for status in statuses} == {202}
    assert sorted(value for _, value in run.result(60)) == list(range(40))
