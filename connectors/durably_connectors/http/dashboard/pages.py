"""The pages, and what their buttons do."""

from __future__ import annotations

import asyncio
from collections import Counter
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlencode

from durably import payloads
from durably.client import AsyncRun
from durably.client.exchange import answer_async, query
from durably.client.hooks import resume_hook_async, run_hooks_async
from durably.client.liveness import round_trips
from durably.client.outcome import summary_of
from durably.client.stream import shown_async
from durably.errors import DurablyError
from durably.streams import checked_namespace
from durably_schemas import events as ev
from durably_schemas.records import TERMINAL, Event, Payload, RunStatus, RunSummary, StepRequest
from fastapi import APIRouter, Request
from starlette.responses import RedirectResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from durably_connectors.http import documents, hooks, streams
from durably_connectors.http.dashboard import charts, letters, session
from durably_connectors.http.dashboard.queues import queues as asked_queues
from durably_connectors.http.dashboard.render import PATH, base_of, now_ms, page, segment
from durably_connectors.http.dashboard.session import PageRoute, PublicRoute
from durably_connectors.http.dashboard.timeline import Timeline
from durably_connectors.http.gateway import Gateway, GatewayOf
from durably_connectors.http.problems import Problem
from durably_connectors.http.projection import RunQuery
from durably_connectors.http.runs import RunId, asked_list, listed, pair

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from durably_connectors.http.projection import Count, Projection
    from durably_connectors.http.security import Guard

STATUSES: tuple[RunStatus, ...] = ("running", "pending", "blocked", "failed", "completed", "cancelled")
"""As they are shown: what goes on comes first."""
RUNS, HOOKED, BLOCKED = 50, 20, 20
"""Runs on a page of each list."""
EVENTS = 3_000
"""The latest entries of a run's log that its page is made of; the first one is always there."""
EVENTS_SHOWN = 300
CHUNKS = 200
"""The latest values of a stream that a page shows; what comes then is added to them."""
TOOK = 20_000
"""Completed runs, the newest, that a plot of durations is made of."""
PERCENTS = (50, 95)
_EVERY = 1.0  # seconds between two looks for something new
_PROCESSORS = 2.0  # seconds for a processor to answer
_SAID = {
    "cancelled": "The run was asked to end; its cleanup may still run steps.",
    "started": "This is a new run with the same workflow, input and attributes.",
    "resumed": "The run has the payload.",
    "sent": "The record was sent again.",
}

router = APIRouter(prefix=PATH, route_class=PageRoute, include_in_schema=False)
"""What only who has the token may see."""
public = APIRouter(prefix=PATH, route_class=PublicRoute, include_in_schema=False)
"""What leads there."""


class _Static(StaticFiles):
    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(session.HEADERS)
        response.headers["Cache-Control"] = "no-cache"  # asked for anew, and answered by 304 where it is the same
        return response


static = Mount(f"{PATH}/static", _Static(packages=[("durably_connectors.http.dashboard", "static")]))
"""The style sheet and the scripts, which hold no secret."""


async def _front(request: Request) -> Response:
    return RedirectResponse(base_of(request) + "/")


front = Route("/", _front, include_in_schema=False)
"""Leads people who know only the gateway's address to the dashboard."""


# -- logging in ----------------------------------------------------------------------------------------------------


@public.get("/login")
async def login_page(request: Request) -> Response:
    """Asks for the token."""
    return page(request, "login.html", next=_local(request.query_params.get("next", "/")), wrong=False)


@public.post("/login")
async def login(request: Request) -> Response:
    """Gives a browser that has sent the token a cookie, and goes where it wanted to be."""
    guard: Guard = request.app.state.guard
    form = await _form(request)
    back = _local(form.get("next", "/"))
    if guard.asks and not guard.knows(form.get("token", "")):
        response: Response = page(request, "login.html", next=back, wrong=True)
        response.status_code = 401
        return response
    response = RedirectResponse(base_of(request) + back, 303)
    if guard.asks:
        session.log_in(request, response)
    return response


@public.post("/logout")
async def logout(request: Request) -> Response:
    """Takes the cookie away."""
    response = RedirectResponse(f"{base_of(request)}/login", 303)
    session.log_out(request, response)
    return response


def _local(path: str) -> str:
    """A path below the dashboard's own: a login leads nowhere else."""
    return path if path.startswith("/") and not path.startswith(("//", "/\\")) else "/"


async def _form(request: Request) -> dict[str, str]:
    """The fields of a form, the first of each name. Raises `Problem` where it is no text."""
    try:
        found = parse_qs((await request.body()).decode(), keep_blank_values=True, max_num_fields=20, errors="strict")
    except ValueError as e:
        raise Problem(400, "not-a-form", f"the body is no form: {e}") from None
    return {name: values[0] for name, values in found.items()}


# -- runs ----------------------------------------------------------------------------------------------------------


@router.get("")
@router.get("/")
async def runs(request: Request, gateway: GatewayOf) -> Response:
    """The list of runs, filtered, page by page."""
    asked = {name: value for name, value in request.query_params.multi_items() if value}
    statuses = [status for status in STATUSES if status in request.query_params.getlist("status")]
    wanted = RunQuery(
        id_prefix=asked.get("id", ""),
        workflow=asked.get("workflow"),
        statuses=statuses,
        attributes=dict([_attribute(asked["attribute"])]) if "attribute" in asked else {},
        created_from=_instant(asked, "from"),
        created_to=_instant(asked, "to"),
    )
    found = await listed(gateway, wanted, RUNS, asked.get("cursor"))
    counts = await asked_list(gateway, lambda projection: projection.counts())
    totals = Counter[str]()
    for count in counts:
        totals[count.status] += count.runs
    kept = [(name, value) for name, value in request.query_params.multi_items() if value and name != "cursor"]
    return page(
        request,
        "runs.html",
        runs=found.runs,
        next=urlencode([*kept, ("cursor", found.cursor)]) if found.cursor else None,
        first=urlencode(kept) if "cursor" in asked else None,
        asked=asked,
        filtered=bool(kept),
        statuses=[(status, status in statuses, totals[status]) for status in STATUSES],
        workflows=sorted({count.workflow for count in counts}),
    )


def _attribute(text: str) -> tuple[str, str]:
    if "=" not in text[1:]:
        raise Problem(400, "bad-attribute", f"the attribute {text!r:.100} is none: write it as NAME=VALUE")
    return pair(text)


def _instant(asked: dict[str, str], name: str) -> int | None:
    if name not in asked:
        return None
    try:
        at = datetime.fromisoformat(asked[name])
        return round((at if at.tzinfo is not None else at.replace(tzinfo=UTC)).timestamp() * 1000)
    except (ValueError, OverflowError):
        raise Problem(400, "bad-instant", f"{asked[name]!r:.100} is no instant: 2026-11-23T23:45 is one") from None


@router.get("/live")
async def live(gateway: GatewayOf) -> Response:
    """Says, as server-sent events, that the list of runs has changed."""

    async def changes() -> int:
        return gateway.projection.changes

    return _live(gateway, changes)


@router.get("/live/{run_id:path}")
async def live_run(gateway: GatewayOf, run_id: RunId) -> Response:
    """Says, as server-sent events, that a run's log has grown."""
    run = AsyncRun[Any](gateway.connection, run_id)
    await run.describe()
    seen = 0

    async def entries() -> int:
        nonlocal seen
        found = await _events_from(gateway, run_id, seen + 1)
        while found:
            seen = found[-1].seq
            found = await _events_from(gateway, run_id, seen + 1)
        return seen

    return _live(gateway, entries)


def _live(gateway: Gateway, look: Callable[[], Awaitable[object]]) -> Response:
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # the second is for nginx
    return StreamingResponse(_changes(gateway, look), media_type="text/event-stream", headers=headers)


async def _changes(gateway: Gateway, look: Callable[[], Awaitable[object]]) -> AsyncIterator[bytes]:
    """An event whenever what ``look`` returns is another, until the client goes or the server stops."""
    leaving, last, silent = gateway.leaving(), await look(), 0.0
    try:
        yield b"retry: 2000\n\n"
        while not leaving.done():
            await asyncio.wait({leaving}, timeout=_EVERY)
            try:
                found = await look()
            except (DurablyError, TimeoutError):  # the browser comes back by itself, and asks anew
                return
            silent += _EVERY
            if found != last:
                last, silent = found, 0.0
                yield b"data: changed\n\n"
            elif silent >= streams.HEARTBEAT:
                silent = 0.0
                yield b": still here\n\n"
    finally:
        leaving.cancel()


# -- one run -------------------------------------------------------------------------------------------------------


@router.get("/runs/{run_id:path}")
async def run(request: Request, gateway: GatewayOf, run_id: RunId) -> Response:
    """One run: its timeline, values, hooks, streams and log."""
    summary = await AsyncRun[Any](gateway.connection, run_id).describe()
    ended = summary.status in TERMINAL
    log, open_hooks = await asyncio.gather(_log(gateway, summary), _none() if ended else _hooks(gateway, run_id))
    timeline = Timeline(log)
    return page(
        request,
        "run.html",
        run=summary,
        ended=ended,
        timeline=timeline,
        axis=timeline.axis(now_ms()),
        events=log[-EVENTS_SHOWN:],
        left_out=summary.events - min(len(log), EVENTS_SHOWN),
        cut=summary.events > len(log),
        hooks=open_hooks,
        webhook_url=lambda token: gateway.webhook_url(token, request),
        said=_SAID.get(request.query_params.get("said", "")),
    )


async def _none() -> list[Any]:
    return []


async def _hooks(gateway: Gateway, run_id: str) -> list[Any]:
    return [hook.record for hook in await run_hooks_async(gateway.connection, run_id)]


async def _events_from(gateway: Gateway, run_id: str, seq: int) -> list[Event]:
    reply = await answer_async(gateway.connection, run_id, query(run_id, "EVENTS", seq))
    summary_of(reply, run_id)
    return [gateway.connection.codec.decode_as(Event, data) for data in reply.events]


async def _log(gateway: Gateway, summary: RunSummary) -> list[Event]:
    """The log of a run; of a long one the first entry, and the latest."""
    begin = max(1, summary.events - EVENTS + 1)
    found = [] if begin == 1 else (await _events_from(gateway, summary.run_id, 1))[:1]
    while page_ := await _events_from(gateway, summary.run_id, begin):
        found += page_
        begin = page_[-1].seq + 1
    return found


@router.post("/runs/{run_id:path}")
async def act(request: Request, gateway: GatewayOf, run_id: RunId) -> Response:
    """Cancels a run, or starts another one like it."""
    form, run_ = await _form(request), AsyncRun[Any](gateway.connection, run_id)
    match form.get("action"):
        case "cancel":
            await run_.cancel(form.get("reason") or None)
            return _back(request, run_id, "cancelled")
        case "rerun":
            return _back(request, (await run_.rerun()).id, "started")
        case other:
            raise Problem(400, "bad-action", f"there is no action {other!r:.50}")


def _back(request: Request, run_id: str, said: str) -> Response:
    return RedirectResponse(f"{base_of(request)}/runs/{segment(run_id)}?said={said}", 303)


@router.get("/streams/{run_id:path}")
async def stream(request: Request, gateway: GatewayOf, run_id: RunId) -> Response:
    """What is in a stream of a run; a script adds what comes."""
    name, run_ = _stream(request), AsyncRun[Any](gateway.connection, run_id)
    info = await run_.stream_info(name)
    first = max(0, info.tail_index + 1 - CHUNKS)
    values = []
    if first <= info.tail_index:
        reading = shown_async(gateway.connection, run_id, name, first, AsyncRun)
        try:
            async for value in reading:
                values.append(value)
                if first + len(values) > info.tail_index:
                    break
        finally:
            await reading.aclose()  # type: ignore[attr-defined]
    return page(
        request,
        "stream.html",
        run_id=run_id,
        name=name,
        values=list(enumerate(values, first)),
        next=first + len(values),
        done=info.done,
    )


@router.get("/follow/{run_id:path}")
async def follow(request: Request, gateway: GatewayOf, run_id: RunId) -> Response:
    """A stream of a run as server-sent events, as the API has it."""
    start = request.query_params.get("start", "0")
    if not (start.isascii() and start.isdigit()) or len(start) > 18:
        raise Problem(400, "bad-start", f"{start!r:.50} is no index")
    return await streams.follow(gateway, run_id, _stream(request), int(start), request.headers.get("last-event-id"))


def _stream(request: Request) -> str:
    name = request.query_params.get("name") or "default"
    try:
        checked_namespace(name)
    except DurablyError as e:
        raise Problem(400, "bad-namespace", str(e)) from None
    return name


# -- hooks ---------------------------------------------------------------------------------------------------------


@router.get("/hooks")
async def hooks_page(request: Request, gateway: GatewayOf) -> Response:
    """Open hooks, with a form for each."""
    found = await listed(gateway, RunQuery(with_hooks=True), HOOKED, request.query_params.get("cursor"))
    of_runs = await asyncio.gather(*(hooks.hooks_of(gateway, run_) for run_ in found.runs))
    return page(
        request,
        "hooks.html",
        hooks=[
            (run_, hook.record) for run_, some in zip(found.runs, of_runs, strict=True) for hook in some
        ],
        webhook_url=lambda token: gateway.webhook_url(token, request),
        next=urlencode({"cursor": found.cursor}) if found.cursor else None,
        said=_SAID.get(request.query_params.get("said", "")),
    )  # fmt: skip


@router.post("/hooks")
async def resume(request: Request, gateway: GatewayOf) -> Response:
    """Hands a payload to a hook: JSON, or nothing."""
    form = await _form(request)
    text = form.get("payload", "").strip()
    if text:
        try:
            documents.parsed(text.encode())
        except ValueError as e:
            raise Problem(
                400, "not-json", f'the payload is no JSON: {e}; a text stands in quotes, "like this"'
            ) from None
        payload = payloads.encode(Payload(content_type=payloads.JSON, data=text.encode()))
    else:
        payload = payloads.dump(None, "the payload")
    run_ = await resume_hook_async(gateway.connection, form.get("token", ""), payload)
    return _back(request, run_.run_id, "resumed")


# -- workflows -----------------------------------------------------------------------------------------------------


@router.get("/workflows")
async def workflows(request: Request, gateway: GatewayOf) -> Response:
    """All workflows: how many of their runs there are, and how long they take."""
    window, since, slot = _window(request)

    def asked(projection: Projection) -> list[dict[str, Any]]:
        by_workflow: dict[str, list[Count]] = {}
        for count in projection.counts(since, slot):
            by_workflow.setdefault(count.workflow, []).append(count)
        return [
            {
                "name": name,
                "statuses": _by_status(counts),
                "columns": charts.columns(counts, since, slot)[0],
                "durations": _durations(projection, name, since),
            }
            for name, counts in sorted(by_workflow.items())
        ]

    found = await asked_list(gateway, asked)
    return page(
        request, "workflows.html", workflows=found, window=window, windows=list(charts.WINDOWS), statuses=STATUSES
    )


@router.get("/workflows/{name:path}")
async def workflow(request: Request, gateway: GatewayOf, name: str) -> Response:
    """One workflow: how many runs over time, and how long they took."""
    window, since, slot = _window(request)

    def asked(projection: Projection) -> dict[str, Any]:
        counts = [count for count in projection.counts(since, slot) if count.workflow == name]
        took = projection.took(name, since, TOOK)
        columns, top = charts.columns(counts, since, slot)
        ran, waited = sorted(run_.ran for run_ in took), sorted(run_.waited for run_ in took)
        return {
            "statuses": _by_status(counts),
            "columns": columns,
            "top": top,
            "latency": charts.latency(took, since, slot, PERCENTS),
            "sample": len(took),
            "ran": [(percent, charts.percentile(ran, percent)) for percent in (50, 90, 95, 99, 100)],
            "waited": [(percent, charts.percentile(waited, percent)) for percent in (50, 90, 95, 99, 100)],
        }

    found = await asked_list(gateway, asked)
    latest = await listed(gateway, RunQuery(workflow=name), 10, None)
    return page(
        request, "workflow.html", name=name, window=window, windows=list(charts.WINDOWS), since=since, slot=slot,
        runs=latest.runs, order=STATUSES, **found,
    )  # fmt: skip


def _window(request: Request) -> tuple[str, int, int]:
    """What a plot is about: its name, where it begins, and how many milliseconds a part of it has."""
    name = request.query_params.get("window", "24h")
    if name not in charts.WINDOWS:
        raise Problem(400, "bad-window", f"{name!r:.50} is none of {', '.join(charts.WINDOWS)}")
    slot = charts.WINDOWS[name] // charts.SLOTS
    end = (now_ms() // slot + 1) * slot  # so that columns stay where they are
    return name, end - slot * charts.SLOTS, slot


def _by_status(counts: list[Count]) -> Counter[str]:
    totals = Counter[str]()
    for count in counts:
        totals[count.status] += count.runs
    return totals


def _durations(projection: Projection, name: str, since: int) -> list[int | None]:
    ran = sorted(run_.ran for run_ in projection.took(name, since, 1_000))
    return [charts.percentile(ran, percent) for percent in PERCENTS]


# -- what stands behind it -----------------------------------------------------------------------------------------


@router.get("/queues")
async def queues(request: Request, gateway: GatewayOf) -> Response:
    """Queues with their lag and workers, and who owns the partitions."""
    connection = gateway.connection
    found, trips = await asyncio.gather(
        asyncio.to_thread(asked_queues, connection.broker, connection.catalogue),
        asyncio.to_thread(round_trips, connection, _PROCESSORS),
    )
    return page(request, "queues.html", queues=found, trips=trips, url=connection.broker.url)


@router.get("/dead-letters")
async def dead_letters(request: Request, gateway: GatewayOf) -> Response:
    """The latest dead letters."""
    found = await asyncio.to_thread(letters.latest, gateway.connection)
    said = _SAID.get(request.query_params.get("said", ""))
    return page(request, "dead_letters.html", letters=found.found, more=found.more, said=said)


@router.post("/dead-letters")
async def replay(request: Request, gateway: GatewayOf) -> Response:
    """Sends the record of a dead letter again."""
    form = await _form(request)
    place = [form.get(name, "") for name in ("partition", "offset")]
    if not all(text.isascii() and text.isdigit() and len(text) <= 18 for text in place):
        raise Problem(400, "bad-place", "a dead letter has a partition and an offset")
    partition, offset = map(int, place)
    letter = await asyncio.to_thread(letters.letter_at, gateway.connection, partition, offset)
    if isinstance(letter.record, StepRequest):
        await _wanted(gateway, letter.record)
    await asyncio.to_thread(letters.send_again, gateway.connection, letter)
    return RedirectResponse(f"{base_of(request)}/dead-letters?said=sent", 303)


async def _wanted(gateway: Gateway, asked: StepRequest) -> None:
    """Raises `Problem` with 409 where the run no longer waits for this attempt: its step would run once more."""
    attempt = 0
    for event in await AsyncRun[Any](gateway.connection, asked.run_id).events():
        if event.correlation_id == asked.step_id:
            match event.data:
                case ev.StepCreated():
                    attempt = 1
                case ev.StepRetrying(attempt=following):
                    attempt = following
                case ev.StepCompleted() | ev.StepFailed() | ev.StepCancelled():
                    attempt = 0
        elif isinstance(event.data, ev.RunCompleted | ev.RunFailed | ev.RunCancelled):
            attempt = 0
    if attempt != asked.attempt:
        raise Problem(
            409, "not-wanted", f"run {asked.run_id} no longer waits for attempt {asked.attempt} of step {asked.step}"
        )


@router.get("/blocked")
async def blocked(request: Request, gateway: GatewayOf) -> Response:
    """Blocked runs, each with what was expected and what was found."""
    found = await listed(gateway, RunQuery(statuses=["blocked"]), BLOCKED, request.query_params.get("cursor"))
    differences = await asyncio.gather(*(_difference(gateway, run_) for run_ in found.runs))
    return page(
        request,
        "blocked.html",
        runs=list(zip(found.runs, differences, strict=True)),
        next=urlencode({"cursor": found.cursor}) if found.cursor else None,
    )


async def _difference(gateway: Gateway, summary: RunSummary) -> ev.RunBlocked | None:
    """Why a run is blocked: the entry stands near the end that its log had when its summary was written."""
    try:
        found = await _events_from(gateway, summary.run_id, max(1, summary.events - 50))
    except (DurablyError, TimeoutError):  # it has gone, or its processor has
        return None
    return next((event.data for event in reversed(found) if isinstance(event.data, ev.RunBlocked)), None)
