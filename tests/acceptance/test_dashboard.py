"""The dashboard in a browser: headless Chromium, before an installation on the embedded broker.

Chromium is the one of Playwright (``playwright install chromium``), or one that is installed beside it.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest
from dashboard_scene import HOSTILE, Scene, scene
from durably import payloads
from durably.client.starting import StartOptions
from durably_schemas import Codec
from durably_schemas.records import DeadLetter
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

if TYPE_CHECKING:
    from collections.abc import Iterator

TOKEN = "the gateway's secret"
INSTALLED = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
HOSTILE_RUN = "hostile/<b>1</b>"
RUNS = "/runs/order-0"
PAGES = [
    "/", RUNS, "/runs/expense-7", f"/runs/{quote(HOSTILE_RUN, safe='')}", "/runs/changing-1", "/streams/order-0",
    "/hooks", "/workflows?window=1h", "/workflows/dash.order?window=1h", "/queues", "/dead-letters", "/blocked", "/login",
]  # fmt: skip
DESK: dict[str, Any] = {"viewport": {"width": 1280, "height": 860}}
PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        own = Path(playwright.chromium.executable_path)
        path = own if own.exists() else next(filter(None, map(shutil.which, INSTALLED)), None)
        if path is None:
            pytest.fail(
                "there is no Chromium: install it with `playwright install --with-deps chromium`, or, on Debian, "
                "`apt-get install chromium`",
                pytrace=False,
            )
        # The sandbox of Chromium cannot be had in every container; what it is shown here is our own.
        launched = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-background-networking"]
        )
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def at_work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with scene(tmp_path_factory.mktemp("dashboard")) as made:
        made.happen()
        with made.working():
            made.client.resume_hook("dash-changing", 1)  # which replays the run by code that is another
            yield made


@pytest.fixture(scope="module")
def url(at_work: Scene) -> Iterator[str]:
    with at_work.gateway() as gateway:
        yield f"{gateway.url}/dashboard"


@pytest.fixture
def desk(browser: Browser) -> Iterator[BrowserContext]:
    with browser.new_context(**DESK) as context:
        yield context


@pytest.fixture
def page(desk: BrowserContext) -> Iterator[Page]:
    page = desk.new_page()
    wrong = complaints(page)
    yield page
    assert not wrong


def complaints(page: Page) -> list[str]:
    """What a page complains of while it is looked at: scripts that fail, and what its policy refuses."""
    found: list[str] = []
    page.on("console", lambda message: found.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: found.append(str(error)))
    return found


@pytest.mark.parametrize("look", [DESK, PHONE], ids=["desk", "phone"])
def test_every_page_fits_runs_nothing_of_others_and_complains_of_nothing(
    browser: Browser, url: str, look: dict[str, Any]
) -> None:
    with browser.new_context(**look) as context:
        page = context.new_page()
        wrong = complaints(page)
        for path in PAGES:
            page.goto(url + path)
            expect(page.locator("html.scripted")).to_be_attached()
            width = page.evaluate("document.documentElement.scrollWidth")
            assert width <= look["viewport"]["width"], f"{path} is {width} wide"
            assert page.evaluate("window.hacked") is None, path
            unnamed = page.locator("input:not([type=hidden]), select, textarea").evaluate_all(
                "fields => fields.filter(field => !field.labels.length).map(field => field.outerHTML)"
            )
            assert unnamed == [], path
        assert wrong == []


def test_what_others_wrote_is_text(page: Page, url: str) -> None:
    page.goto(f"{url}/runs/{quote(HOSTILE_RUN, safe='')}")
    expect(page.get_by_role("heading", level=1)).to_have_text(HOSTILE_RUN)
    expect(page.locator("[data-part=outcome] .message").first).to_have_text(HOSTILE)
    page.goto(f"{url}/dead-letters")
    page.get_by_text("Its ").click()
    expect(page.locator("pre").first).to_contain_text(HOSTILE)


def test_a_run_shows_its_steps_attempts_waits_children_and_streams(page: Page, url: str) -> None:
    page.goto(url + RUNS)
    names = page.locator(".g-text").all_inner_texts()
    assert sorted(names) == ["dash.charge", "dash.label", "dash.pack", "sleep"]
    charge = page.locator(".g-item", has_text="dash.charge")
    assert charge.locator("rect.b-failed").count() == 2
    assert charge.locator("rect.b-completed").count() == 1
    charge.locator("summary").first.click()
    expect(charge.locator("pre").last).to_contain_text("r-0")
    rows = page.get_by_role("table", name="The same as a table").get_by_role("row")
    assert rows.count() == 5
    page.locator(".g-item", has_text="dash.label").locator("summary").first.click()
    page.get_by_role("link", name=re.compile("^Run wrun_")).click()
    expect(page.locator(".over")).to_contain_text("child of order-0")
    page.get_by_role("link", name="order-0").click()
    page.get_by_role("link", name=re.compile("default")).click()
    expect(page.locator(".stream li")).to_have_count(3)


def press(page: Page, *keys: str) -> None:
    """Presses keys, as soon as there is a script to hear them."""
    expect(page.locator("html.scripted")).to_be_attached()
    for key in keys:
        page.keyboard.press(key)


def test_keys_lead_everywhere(page: Page, url: str) -> None:
    page.goto(f"{url}/?id=order")
    press(page, "?")
    expect(page.get_by_role("dialog")).to_be_visible()
    press(page, "Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    press(page, "/")
    expect(page.get_by_label("Run ID begins with")).to_be_focused()
    page.keyboard.type("ex")
    press(page, "Enter")
    expect(page).to_have_url(re.compile("id=ex"))
    press(page, "j")
    expect(page.locator("tr.chosen")).to_have_attribute("data-row", "expense-7")
    press(page, "Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("expense-7")
    press(page, "j", "j", "k", "Enter")
    expect(page.locator(".g-item.chosen[open] .g-text")).to_have_text("dash.pack")
    for key, title in (("w", "Workflows"), ("q", "Queues"), ("b", "Blocked runs"), ("r", "Runs")):
        press(page, "g", key)
        expect(page.get_by_role("heading", level=1)).to_have_text(title)


def test_what_happens_shows_by_itself_and_leaves_alone_what_one_writes(page: Page, url: str, at_work: Scene) -> None:
    page.goto(f"{url}/?id=live-")
    expect(page.locator(".live:not(.off)")).to_be_visible()
    page.get_by_label("Attribute").fill("team=")
    at_work.client.options(run_id="live-1").start("dash.approval", "live-1")
    expect(page.locator("tr[data-row=live-1]")).to_be_visible()
    expect(page.get_by_label("Attribute")).to_have_value("team=")
    page.goto(f"{url}/runs/live-1")
    expect(page.locator("form.resume")).to_be_visible()
    page.locator(".g-item", has_text="dash.pack").locator("summary").first.click()
    page.get_by_label("Payload, JSON").fill('{"by": "Ada"}')
    at_work.client.resume_hook("approve-live-1", {"by": "Grace"})
    expect(page.locator(".title .badge")).to_have_text("completed")
    expect(page.locator("[data-part=output] pre")).to_contain_text("Grace")


def test_a_stream_is_followed_to_its_end(page: Page, url: str, at_work: Scene) -> None:
    at_work.client.options(run_id="speech-1").start("dash.speech", 30)
    page.goto(f"{url}/runs/speech-1")
    page.get_by_role("link", name=re.compile("default")).click()
    expect(page.locator(".stream li")).to_have_count(30)
    assert page.locator(".stream pre").all_inner_texts() == [f'"line {n}"' for n in range(30)]
    expect(page.locator("[data-stream-state]")).to_have_text("ended")


def test_buttons_resume_a_hook_rerun_and_cancel(page: Page, url: str, at_work: Scene) -> None:
    at_work.client.options(run_id="buttons").start("dash.approval", "buttons")
    page.goto(f"{url}/runs/buttons")
    page.get_by_label("Payload, JSON").fill('{"by": "Ada"}')
    page.get_by_role("button", name="Resume").click()
    expect(page.locator(".said")).to_contain_text("has the payload")
    expect(page.locator(".title .badge")).to_have_text("completed")
    assert at_work.client.get_run("buttons").result(30) == {"decision": {"by": "Ada"}}
    page.get_by_role("button", name="Rerun").click()
    expect(page.locator(".said")).to_contain_text("new run")
    expect(page.get_by_role("heading", level=1)).not_to_have_text("buttons")
    page.get_by_text("Cancel…").click()
    page.get_by_label("Reason, for its log").fill("by mistake")
    page.get_by_role("button", name="Cancel the run").click()
    expect(page.locator(".title .badge")).to_have_text("cancelled")
    page.get_by_role("heading", name="Log").click()
    expect(page.locator("table.log")).to_contain_text("by mistake")


def test_blocked_runs_say_what_was_expected_and_what_was_found(page: Page, url: str) -> None:
    page.goto(f"{url}/blocked")
    expect(page.locator(".expected pre")).to_contain_text("dash.label_of")
    expect(page.locator(".found pre")).to_contain_text("dash.pack")


def test_queues_have_their_lag_and_their_readers(page: Page, url: str) -> None:
    page.goto(f"{url}/queues")
    assert page.locator(".queue h2").first.inner_text() == "processors"
    for name in ("processors", "default", "mail"):  # there may be more, of other steps in this process
        card = page.locator(".queue", has=page.get_by_role("heading", name=name, exact=True))
        expect(card.locator(".members li")).to_have_count(1)
        expect(card.locator(".badge")).to_have_text(["up to date"], timeout=20_000)
    expect(page.locator(".chip.s-completed")).to_have_count(3)  # of partitions, whose processors answer


def test_a_dead_letter_is_sent_again(page: Page, url: str, at_work: Scene) -> None:
    options = StartOptions(run_id="late-1").named()
    start = options.command("dash.nightly", payloads.dump([[], {}], "the input"))
    letter = DeadLetter(
        topic="durably.commands", partition=0, offset=0, key=b"late-1", value=Codec().encode(start), reason="too new",
        component="processor", at=1,
    )  # fmt: skip
    at_work.put("durably.dead-letters", Codec().encode(letter))
    page.goto(f"{url}/dead-letters")
    page.locator(".letter", has_text="StartRun").get_by_role("button", name="Send again").click()
    expect(page.locator(".said")).to_contain_text("sent again")
    page.goto(f"{url}/runs/late-1")
    expect(page.locator(".title .badge")).to_have_text("running")


def test_without_scripts_all_of_it_can_be_read_and_done(browser: Browser, url: str, at_work: Scene) -> None:
    at_work.client.options(run_id="plain-1").start("dash.approval", "plain-1")
    with browser.new_context(java_script_enabled=False, **DESK) as context:
        page = context.new_page()
        page.goto(f"{url}/runs/plain-1")
        for _ in range(50):
            if page.locator("form.resume").count():
                break
            page.reload()
        page.get_by_label("Payload, JSON").fill("7")
        page.get_by_role("button", name="Resume").click()
        expect(page.locator(".said")).to_be_visible()
        assert at_work.client.get_run("plain-1").result(30) == {"decision": 7}
        page.goto(f"{url}/")
        page.get_by_label("Run ID begins with").fill("plain-")
        page.get_by_role("button", name="Find").click()
        page.get_by_role("link", name="plain-1").click()
        expect(page.locator("[data-part=output] pre")).to_contain_text("7")
        expect(page.locator(".g-text").first).to_have_text("dash.pack")


def test_a_gateway_with_a_token_asks_for_it_once(page: Page, at_work: Scene) -> None:
    with at_work.gateway(token=TOKEN) as gateway:
        page.goto(f"{gateway.url}/dashboard{RUNS}")
        page.get_by_label("Token").fill(TOKEN)
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading", level=1)).to_have_text("order-0")
        (cookie,) = page.context.cookies()
        assert (cookie["httpOnly"], cookie["sameSite"], cookie["path"]) == (True, "Strict", "/dashboard")
        assert page.evaluate("document.cookie") == ""
        page.get_by_role("button", name="Rerun").click()
        expect(page.locator(".said")).to_contain_text("new run")
        page.get_by_role("button", name="Log out").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("Log in")
