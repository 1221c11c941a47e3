"""The dashboard's pages over a scripted processor: who may see them, what they escape, and what their buttons send."""

from __future__ import annotations

import re
import time
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import httpx
import pytest
from dashboard_scene import HOSTILE
from durably import failures, payloads
from durably_connectors.http import create_gateway
from durably_connectors.http.dashboard import letters, listing, run, session
from durably_connectors.http.dashboard.render import _environment
from durably_schemas import events
from durably_schemas.records import CancelRun, DeadLetter, Payload, ResumeHook, StartRun, StepRequest
from durably_schemas.records import Error as ErrorRecord
from fastapi import FastAPI
from unit.gateway_under_test import GatewayUnderTest, gateway_under_test, serving
from unit.scripted_broker import CODEC

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.usefixtures("quick_gateway")

TOKEN = "a secret of the gateway"
PAGES = ["/", "/hooks", "/workflows", "/workflows/greet", "/dead-letters", "/blocked", "/runs/r1", "/streams/r1"]


@pytest.fixture
def gateway() -> Iterator[GatewayUnderTest]:
    with gateway_under_test() as made:
        yield made


@pytest.fixture
def guarded_gateway() -> Iterator[GatewayUnderTest]:
    with gateway_under_test(token=TOKEN) as made:
        yield made


def get(gateway: GatewayUnderTest, path: str, **options: Any) -> httpx.Response:
    return gateway.http.get(f"/dashboard{path}", **options)


def post(gateway: GatewayUnderTest, path: str, origin: str | None = None, **fields: str) -> httpx.Response:
    """A form, sent from a page of the dashboard unless it is said to come from elsewhere."""
    headers = {"Origin": gateway.url if origin is None else origin}
    return gateway.http.post(f"/dashboard{path}", data=fields, headers=headers)


def shown(gateway: GatewayUnderTest, path: str, text: str) -> str:
    """A page, as soon as it has this text: the list of runs is a moment behind."""
    deadline = time.monotonic() + 10
    while True:
        response = get(gateway, path)
        assert response.status_code == 200, response.text
        if text in response.text:
            return response.text
        assert time.monotonic() < deadline, response.text
        time.sleep(0.02)


def is_guarded(response: httpx.Response) -> bool:
    policy = response.headers.get("content-security-policy", "")
    return "default-src 'none'" in policy and "unsafe" not in policy and response.headers["x-frame-options"] == "DENY"


# -- who may see it ------------------------------------------------------------------------------------------------


def test_on_its_own_machine_it_asks_for_nothing_and_every_answer_is_guarded_by_a_policy(
    gateway: GatewayUnderTest,
) -> None:
    gateway.processor.start("r1")
    shown(gateway, "/", "r1")
    gateway.processor.complete("r1", 1)
    for path in [
        *PAGES,
        "/login",
        "/static/dashboard.css",
        "/static/dashboard.js",
        "/static/keys.js",
        "/static/icon.svg",
    ]:
        response = get(gateway, path)
        assert response.status_code == 200, (path, response.text)
        assert is_guarded(response), path
    assert gateway.http.get("/", follow_redirects=True).url.path == "/dashboard/"
    for path in ("/runs/none", "/nothing", "/runs/a%7Cb"):
        response = get(gateway, path)
        assert response.status_code in (400, 404)
    assert "<title>run-not-found · durably</title>" in get(gateway, "/runs/none").text
    assert is_guarded(get(gateway, "/runs/none"))


@pytest.mark.parametrize("path", [*PAGES, "/queues", "/live", "/live/r1", "/follow/r1", "/runs/a%3Fb%23c"])
def test_with_a_token_every_page_leads_to_the_login_and_back(guarded_gateway: GatewayUnderTest, path: str) -> None:
    response = get(guarded_gateway, path)
    assert response.status_code == 303
    assert response.headers["location"] == f"/dashboard/login?next={quote(path, safe='')}"
    assert f'name="next" value="{path}"' in get(guarded_gateway, f"/login?next={quote(path, safe='')}").text


def test_who_logs_in_has_a_cookie_that_scripts_and_other_sites_cannot_use_and_that_does_not_tell_the_token(
    guarded_gateway: GatewayUnderTest,
) -> None:
    wrong = post(guarded_gateway, "/login", token="wrong", next="/")
    assert (wrong.status_code, "set-cookie" in wrong.headers) == (401, False)
    assert "This is not the token" in wrong.text
    right = post(guarded_gateway, "/login", token=TOKEN, next="/hooks?cursor=1")
    assert (right.status_code, right.headers["location"]) == (303, "/dashboard/hooks?cursor=1")
    cookie = right.headers["set-cookie"]
    assert TOKEN not in cookie
    attributes = {part.strip().lower() for part in cookie.split(";")[1:]}
    assert {"httponly", "samesite=strict", "path=/dashboard"} <= attributes
    assert get(guarded_gateway, "/").status_code == 200
    assert "Log out" in get(guarded_gateway, "/").text
    assert guarded_gateway.api("GET", "/runs").status_code == 401, "the API asks for the token itself"
    post(guarded_gateway, "/logout")
    assert get(guarded_gateway, "/").status_code == 303


def test_a_cookie_is_secure_where_the_gateway_is_reached_by_tls() -> None:
    with gateway_under_test(token=TOKEN, public_url="https://durably.example") as gateway:
        response = post(gateway, "/login", token=TOKEN, next="/", origin="https://durably.example")
        assert "; secure" in response.headers["set-cookie"].lower()


def test_the_token_itself_opens_it_too(guarded_gateway: GatewayUnderTest) -> None:
    assert get(guarded_gateway, "/", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200
    assert get(guarded_gateway, "/", headers={"Authorization": "Bearer other"}).status_code == 303


def test_a_ticket_that_is_old_forged_or_of_another_token_opens_nothing(
    guarded_gateway: GatewayUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = guarded_gateway.app.state.guard
    good = session.ticket(guard)
    until, signature = good.split(".")
    other = create_gateway(guarded_gateway.app.state.gateway.client, token="another").state.guard
    assert session.is_valid(guard, good)
    for bad in (
        "", ".", until, f"{int(until) + 1}.{signature}", f"{until}.", f"{until}.{signature[:-1]}", session.ticket(other),
        f"-{good}", f"{until}\u0661.{signature}", "9" * 500 + f".{signature}",
    ):  # fmt: skip
        assert not session.is_valid(guard, bad), bad
    monkeypatch.setattr(session.time, "time", lambda: float(until) + 1)
    assert not session.is_valid(guard, good)


@pytest.mark.parametrize("next_", ["//evil.example", "https://evil.example", "/\\evil.example", "evil", ""])
def test_a_login_leads_nowhere_else(guarded_gateway: GatewayUnderTest, next_: str) -> None:
    response = post(guarded_gateway, "/login", token=TOKEN, next=next_)
    assert response.headers["location"] == "/dashboard/"


@pytest.mark.parametrize("token", [None, TOKEN])
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "none"},
    ],
    ids=str,
)
def test_a_page_of_another_site_changes_nothing(token: str | None, headers: dict[str, str]) -> None:
    with gateway_under_test(token=token) as gateway:
        gateway.processor.open("t", "r1")
        if token is not None:
            post(gateway, "/login", token=token, next="/")
        assert get(gateway, "/").status_code == 200
        before = len(gateway.broker.sent)
        for path, fields in (
            ("/runs/r1", {"action": "cancel"}),
            ("/runs/r1", {"action": "rerun"}),
            ("/hooks", {"token": "t"}),
            ("/dead-letters", {"partition": "0", "offset": "0"}),
            ("/login", {"token": TOKEN}),
            ("/logout", {}),
        ):
            response = gateway.http.post(f"/dashboard{path}", data=fields, headers=headers)
            assert response.status_code == 403, (path, response.text)
        assert len(gateway.broker.sent) == before


def test_a_host_that_is_not_this_machine_is_refused_without_a_token(gateway: GatewayUnderTest) -> None:
    for path in ("/", "/login", "/runs/r1"):
        assert get(gateway, path, headers={"Host": "evil.example"}).status_code == 403


def test_a_proxy_that_has_another_name_may_pass_forms_on() -> None:
    with gateway_under_test(token=TOKEN, public_url="https://durably.example/x") as gateway:
        assert post(gateway, "/login", token=TOKEN, origin="https://durably.example").status_code == 303
        fetched = {"Sec-Fetch-Site": "same-origin", "Origin": "https://unknown.example"}
        response = gateway.http.post("/dashboard/login", data={"token": TOKEN}, headers=fetched)
        assert response.status_code == 303


# -- what is escaped -----------------------------------------------------------------------------------------------


class Elements(HTMLParser):
    """The elements of a page, and their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def assert_harmless(text: str) -> None:
    """Nothing of `HOSTILE` has become an element or an attribute, and nothing was evaluated."""
    assert "7 * 7" in text
    for tag, attributes in Elements(text).found:
        assert not any(name.startswith("on") or name == "style" for name in attributes), (tag, attributes)
        if tag == "script":
            assert attributes.keys() == {"type", "src"}, attributes
        if tag == "img":
            assert str(attributes["src"]).endswith("/static/icon.svg"), attributes
    assert "<script>window" not in text


def test_nothing_that_others_wrote_becomes_markup(gateway: GatewayUnderTest) -> None:
    processor, run_id = gateway.processor, HOSTILE
    processor.start(run_id, HOSTILE).log[0] = events.event(
        run_id, 1, 5, events.RunCreated(workflow=HOSTILE, input=payloads.dump([[HOSTILE], {}], "x"))
    )  # fmt: skip
    processor.event(run_id, events.HookCreated(token=HOSTILE, metadata=payloads.dump(HOSTILE, "x")), HOSTILE)
    processor.event(
        run_id, events.ChildCreated(child_run_id=HOSTILE, workflow=HOSTILE, input=payloads.dump(1, "x")), "c"
    )
    error = ErrorRecord(type=HOSTILE, message=HOSTILE, traceback=HOSTILE, data=payloads.dump({HOSTILE: HOSTILE}, "x"))
    processor.event(run_id, events.RunBlocked(error=error, expected=HOSTILE, found=HOSTILE, code_version=HOSTILE))
    processor.open(HOSTILE, run_id, metadata=HOSTILE)
    processor.change(run_id, status="blocked", error=error, attributes={HOSTILE: HOSTILE}, code_version=HOSTILE)
    processor.chunk(run_id, "default", 0, HOSTILE)
    letter = DeadLetter(
        topic=gateway.broker.catalogue.commands, partition=0, offset=1, key=HOSTILE.encode(), value=HOSTILE.encode(),
        reason=HOSTILE, component=HOSTILE, at=1,
    )  # fmt: skip
    gateway.broker.put(gateway.broker.catalogue.dead_letters, letter, key="k")
    shown(gateway, "/", "7 * 7")
    name = quote(HOSTILE, safe="")
    for path in (
        "/", f"/?id={name}&workflow={name}&attribute=a%3D{name}", "/hooks", "/blocked", "/dead-letters", "/workflows",
        f"/workflows/{name}", f"/runs/{name}", f"/streams/{name}", f"/runs/{name}missing", f"/?cursor={name}",
        f"/?from={name}", f"/login?next=/{name}", f"/?attribute={name}", f"/workflows?window={name}",
    ):  # fmt: skip
        assert_harmless(get(gateway, path).text)


def test_no_template_has_an_inline_script_or_style_or_trusts_a_value() -> None:
    for name in _environment.list_templates():
        source = _environment.loader.get_source(_environment, name)[0]
        assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:|\|\s*safe|autoescape", source), name
        assert all("src=" in tag for tag in re.findall(r"<script[^>]*>", source)), name


# -- what it shows -------------------------------------------------------------------------------------------------


def test_runs_are_found_by_id_workflow_status_attribute_and_time_page_by_page(
    gateway: GatewayUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "RUNS", 2)
    for n in range(5):
        gateway.processor.start(f"order-{n}", "fulfil")
        gateway.processor.change(f"order-{n}", created_at=1_000_000 * n, attributes={"team=": "a=b" if n == 1 else "c"})
    gateway.processor.start("other")
    gateway.processor.complete("other", 1)
    shown(gateway, "/?status=completed", "/runs/other")

    def listed(asked: str) -> list[str]:
        text = get(gateway, f"/?{asked}").text
        return re.findall(r'data-row="([^"]*)"', text)

    assert listed("id=order-3") == ["order-3"]
    assert listed("id=order-") == ["order-4", "order-3"]
    assert listed("workflow=greet&status=&attribute=&from=") == ["other"]
    assert listed("status=completed&status=failed") == ["other"]
    assert listed("attribute=team%253D%3Da%3Db") == ["order-1"]
    assert listed("from=1970-01-01T00:15&to=1970-01-01T00:34") == ["order-2", "order-1"]
    older = re.search(r'rel="next" href="\?([^"]*)"', get(gateway, "/?id=order-").text)
    assert older is not None
    assert listed(older[1].replace("&amp;", "&")) == ["order-2", "order-1"]
    assert "attribute=team%253D%3Da%3Db" in get(gateway, "/?id=order-1").text, "a chip asks for what it shows"
    assert "No run matches" in get(gateway, "/?id=nothing").text


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("/?cursor=x", "is none"), ("/?attribute=x", "NAME=VALUE"), ("/?from=yesterday", "is no instant"),
        ("/workflows?window=1y", "is none of"), ("/streams/r1?name=" + "x" * 5_000, "a text of 1 to"),
        ("/follow/r1?start=-1", "no index"), ("/live?seen=x", "no number"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_a_page_that_says_why(gateway: GatewayUnderTest, asked: str, said: str) -> None:
    gateway.processor.start("r1")
    response = get(gateway, asked)
    assert response.status_code == 400
    assert said in response.text
    assert response.headers["content-type"].startswith("text/html")


def test_a_long_log_is_shown_by_its_beginning_and_its_end(
    gateway: GatewayUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "EVENTS", 20)
    gateway.processor.page = 7
    gateway.processor.start("long", "greet", None)
    for n in range(50):
        gateway.processor.event("long", events.WaitCreated(due_at=n), f"wait_{n}")
    gateway.processor.change("long")
    text = get(gateway, "/runs/long").text
    assert "wait_49" in text
    assert "wait_10" not in text
    assert "The latest 20 rows" in text
    assert '<td data-label="Seq" class="number">1</td>' in text


def test_a_failed_step_shows_its_error_with_its_cause(gateway: GatewayUnderTest) -> None:
    try:
        try:
            raise KeyError("inner")
        except KeyError as inner:
            raise ValueError("outer") from inner
    except ValueError as error:
        told = failures.to_error(error)
    gateway.processor.start("r1")
    gateway.processor.end("r1", "failed", events.RunFailed(error=told), error=told)
    text = get(gateway, "/runs/r1").text
    assert text.index("builtins:ValueError") < text.index("caused by") < text.index("builtins:KeyError")


def test_workflows_have_counts_and_percentiles_of_what_has_completed(gateway: GatewayUnderTest) -> None:
    now = time.time_ns() // 1_000_000
    for n in range(10):
        gateway.processor.start(f"r{n}")
        gateway.processor.change(
            f"r{n}", status="completed", created_at=now - 60_000, started_at=now - 59_000,
            completed_at=now - 59_000 + 1000 * n,
        )  # fmt: skip
    gateway.processor.start("open")
    shown(gateway, "/workflows", "10 completed")
    text = get(gateway, "/workflows/greet").text
    assert re.findall(r'class="number" data-label="(\w+)">([^<]*)<', text) == [
        ("p50", "4 s"), ("p90", "8 s"), ("p95", "9 s"), ("p99", "9 s"), ("longest", "9 s"),
        ("p50", "1 s"), ("p90", "1 s"), ("p95", "1 s"), ("p99", "1 s"), ("longest", "1 s"),
    ]  # fmt: skip


def test_a_page_hears_of_what_has_happened_since_it_was_asked_for(gateway: GatewayUnderTest) -> None:
    gateway.processor.start("r1")
    shown(gateway, "/", "r1")
    for path, change in (
        ("/", lambda: gateway.processor.start("r2")),
        ("/runs/r1", lambda: gateway.processor.complete("r1", 2)),
    ):
        listens = re.search(r'data-live="([^"]*)"', get(gateway, path).text)
        assert listens is not None
        with gateway.http.stream("GET", listens[1]) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            lines = response.iter_lines()
            assert next(lines) == "retry: 2000"
            change()
            assert next(line for line in lines if line.startswith("data")) == "data: changed"
        with gateway.http.stream("GET", listens[1]) as response:  # a browser that was away meanwhile
            assert next(line for line in response.iter_lines() if line.startswith("data")) == "data: changed"
    assert "data-live" not in get(gateway, "/runs/r1").text, "it has ended"


def test_below_an_application_of_somebody_elses_every_link_has_its_prefix(gateway: GatewayUnderTest) -> None:
    gateway.processor.start("r1")
    app = FastAPI()
    app.mount("/durably", create_gateway(gateway.app.state.gateway.client, token=TOKEN))
    with serving(app) as url, httpx.Client(base_url=url, trust_env=False, verify=False, follow_redirects=True) as http:
        page = http.get("/durably/")
        assert page.url.path == "/durably/dashboard/login"
        sent = http.post("/durably/dashboard/login", data={"token": TOKEN, "next": "/runs/r1"}, headers={"Origin": url})
        assert sent.url.path == "/durably/dashboard/runs/r1"
        links = re.findall(r'(?:href|src|action)="([^"]*)"', sent.text)
        assert links
        assert all(link.startswith("/durably/dashboard/") or link == "#main" for link in links), links


# -- what its buttons do -------------------------------------------------------------------------------------------


def test_a_run_is_cancelled_with_a_reason_and_started_again(gateway: GatewayUnderTest) -> None:
    gateway.processor.start("a/b")
    response = post(gateway, "/runs/a%2Fb", action="cancel", reason="too late")
    assert (response.status_code, response.headers["location"]) == (303, "/dashboard/runs/a%2Fb?said=cancelled")
    assert [c.reason for c in gateway.broker.sent if isinstance(c, CancelRun)] == ["too late"]
    again = post(gateway, "/runs/a%2Fb", action="rerun")
    (command,) = [c for c in gateway.broker.sent if isinstance(c, StartRun)]
    assert again.headers["location"] == f"/dashboard/runs/{command.run_id}?said=started"
    assert command.workflow == "greet"
    assert post(gateway, "/runs/a%2Fb", action="delete").status_code == 400
    assert post(gateway, "/runs/none", action="cancel").status_code == 404


def test_a_hook_is_resumed_with_json_or_nothing(gateway: GatewayUnderTest) -> None:
    gateway.processor.open("t/1", "r1", metadata={"amount": 5})
    assert "t/1" in shown(gateway, "/hooks", "t/1")
    response = post(gateway, "/hooks", token="t/1", payload=' {"ok": true} ')
    assert (response.status_code, response.headers["location"]) == (303, "/dashboard/runs/r1?said=resumed")
    post(gateway, "/hooks", token="t/1", payload="")
    sent = [payloads.load(c.payload) for c in gateway.broker.sent if isinstance(c, ResumeHook)]
    assert sent == [{"ok": True}, None]
    wrong = post(gateway, "/hooks", token="t/1", payload="yes")
    assert (wrong.status_code, "a text stands in quotes" in wrong.text) == (400, True)
    assert post(gateway, "/hooks", token="none", payload="1").status_code == 404
    assert post(gateway, "/hooks", payload="1").status_code == 400
    assert gateway.http.post("/dashboard/hooks", content=b"\xff", headers={"Origin": gateway.url}).status_code == 400


def put_letter(gateway: GatewayUnderTest, value: bytes | None, **fields: Any) -> None:
    catalogue = gateway.broker.catalogue
    letter = {"topic": catalogue.commands, "partition": 1, "offset": 5, "key": b"r9", "reason": "bad", "at": 1}
    record = DeadLetter(**{**letter, "component": "processor", "value": value, **fields})
    gateway.broker.put(catalogue.dead_letters, record, partition=0)


def test_a_dead_letter_is_sent_again_to_where_it_was_found(gateway: GatewayUnderTest) -> None:
    start = StartRun(
        run_id="r9", workflow="greet", input=Payload(content_type="application/json", data=b"[]"), requested_at=1
    )
    put_letter(gateway, CODEC.encode(start))
    text = get(gateway, "/dead-letters").text
    assert "StartRun" in text
    response = post(gateway, "/dead-letters", partition="0", offset="0")
    assert (response.status_code, response.headers["location"]) == (303, "/dashboard/dead-letters?said=sent")
    assert gateway.broker.sent == [start]
    for place in (("0", "7"), ("9", "0")):
        assert post(gateway, "/dead-letters", partition=place[0], offset=place[1]).status_code == 404
    for bad in ("-1", "x", "", "\u0661", "9" * 40):
        assert post(gateway, "/dead-letters", partition=bad, offset="0").status_code == 400


def test_what_cannot_or_must_not_be_sent_again_is_not(gateway: GatewayUnderTest) -> None:
    catalogue = gateway.broker.catalogue
    put_letter(gateway, b"half", reason=f"too long (its value {letters.CUT}; the whole is at the place named)")
    put_letter(gateway, None)
    put_letter(gateway, b"forged", topic=catalogue.signals)
    put_letter(gateway, b"forged", topic=catalogue.events)
    gateway.broker.put(catalogue.dead_letters, StartRun(
        run_id="r", workflow="w", input=Payload(content_type="", data=b""), requested_at=1
    ), partition=0)  # fmt: skip
    text = get(gateway, "/dead-letters").text
    assert text.count("Cannot be sent again") == 5
    assert "Send again" not in text
    for offset in range(5):
        assert post(gateway, "/dead-letters", partition="0", offset=str(offset)).status_code == 409
    assert not gateway.broker.sent


def test_a_step_request_is_sent_again_only_while_its_run_waits_for_it(gateway: GatewayUnderTest) -> None:
    catalogue, processor = gateway.broker.catalogue, gateway.processor
    nothing = Payload(content_type="application/json", data=b"[]")
    request = StepRequest(
        run_id="r1", step_id="s1", step="pay", attempt=2, fingerprint="f", input=nothing, workflow="greet",
        workflow_started_at=1, scheduled_at=1,
    )  # fmt: skip
    put_letter(gateway, CODEC.encode(request), topic=catalogue.requests("default"))
    processor.start("r1")
    created = events.StepCreated(
        step="pay", queue="default", input=nothing, fingerprint="f", max_retries=3,
        backoff=events.Backoff(initial_ms=1, factor=1, max_ms=1),
    )  # fmt: skip
    error = ErrorRecord(type="E", message="m")

    def sent() -> int:
        return post(gateway, "/dead-letters", partition="0", offset="0").status_code

    processor.event("r1", created, "s1")
    assert sent() == 409, "the first attempt is open, and not the second"
    processor.event("r1", events.StepRetrying(attempt=2, error=error, retry_at=1), "s1")
    assert sent() == 303
    processor.event("r1", events.StepCompleted(attempt=2, result=nothing), "s1")
    assert sent() == 409, "it has ended"
