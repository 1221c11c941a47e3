"""Templates, and how values look in them. Everything is escaped: what a run carries was written by others."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

import msgspec
from durably import payloads
from durably.jsonable import plain, to_json
from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.responses import HTMLResponse, RedirectResponse, Response

if TYPE_CHECKING:
    from durably_schemas.records import Payload, RunStatus
    from starlette.requests import Request

PATH = "/dashboard"
"""Where the dashboard begins, below where the gateway is mounted."""
STATUSES: tuple[RunStatus, ...] = ("running", "pending", "blocked", "failed", "completed", "cancelled")
"""As they are shown: what goes on comes first."""
LONGEST_SHOWN = 20_000
"""Characters of a value on a page; the API has the whole."""
_SAID = {
    "cancelled": "The run was asked to end; its cleanup may still run steps.",
    "started": "This is a new run with the same workflow, input and attributes.",
    "resumed": "The run has the payload.",
    "sent": "The record was sent again.",
}
_UNITS = (("d", 86_400_000), ("h", 3_600_000), ("min", 60_000), ("s", 1000))


def now_ms() -> int:
    """Milliseconds since the epoch."""
    return time.time_ns() // 1_000_000


def base_of(request: Request) -> str:
    """The dashboard's path, as the browser knows it."""
    return f"{request.scope.get('root_path', '')}{PATH}"


def page(request: Request, template: str, **values: Any) -> HTMLResponse:
    """A page of HTML. A link in it is ``{{ base }}/…``."""
    shared = {
        "live": "",
        "base": base_of(request),
        "path": request.url.path.removeprefix(base_of(request)) or "/",
        "asks": request.app.state.guard.asks,
        "now": now_ms(),
        "said": _SAID.get(request.query_params.get("said", "")),
    }
    return HTMLResponse(_environment.get_template(template).render(shared | values))


def to_run(request: Request, run_id: str, said: str) -> Response:
    """Leads to the page of a run, which says what has been done."""
    return RedirectResponse(f"{base_of(request)}/runs/{segment(run_id)}?said={said}", 303)


def length(milliseconds: float | None) -> str:
    """A duration, in its two largest units.

    >>> [length(n) for n in (0, 999, 1500, 61_000, 3_600_000, 90_000_000)]
    ['0 ms', '999 ms', '1.5 s', '1 min 1 s', '1 h', '1 d 1 h']
    """
    if milliseconds is None:
        return "\u2013"
    if milliseconds < 1000:
        return f"{max(0, milliseconds):.0f} ms"
    if milliseconds < 60_000:
        return f"{milliseconds / 1000:.3g} s"
    parts: list[str] = []
    left = int(milliseconds)
    for unit, size in _UNITS:
        count, left = divmod(left, size)
        if count or parts:
            parts.append(f"{count} {unit}" if count else "")
    return " ".join(filter(None, parts[:2]))


def instant(milliseconds: int) -> str:
    """An instant in UTC, to the millisecond: ``2026-11-23 23:45:01.123Z``. One that no calendar has is a number."""
    try:
        at = datetime.fromtimestamp(milliseconds / 1000, UTC)
    except (ValueError, OverflowError, OSError):
        return f"{milliseconds} ms"
    return f"{at:%Y-%m-%d %H:%M:%S}.{at.microsecond // 1000:03d}Z"


def ago(milliseconds: int, now: int) -> str:
    """How long since, roughly, or until.

    >>> ago(0, 500), ago(0, 90_000), ago(7_200_000, 0)
    ('just now', '1 min ago', 'in 2 h')
    """
    past = now - milliseconds
    for unit, size in _UNITS:
        if abs(past) >= size:
            count = f"{abs(past) // size} {unit}"
            return f"{count} ago" if past > 0 else f"in {count}"
    return "just now"


def pretty(value: Any, longest: int = LONGEST_SHOWN) -> str:
    """A payload, record or user value as indented JSON, cut where it is long."""
    text = msgspec.json.format(to_json(value), indent=2).decode()
    if len(text) <= longest:
        return text
    return f"{text[:longest]}\n… {len(text) - longest:,} characters more: the API has all of it"


def short(value: Any) -> str:
    """A value in one line where it fits, else indented."""
    text = to_json(value).decode()
    return text if len(text) <= 160 else pretty(value, 4_000)


def arguments(payload: Payload) -> Any:
    """What a step or workflow is called with: a list of what is given by position, or an object of what is by name."""
    given = plain(payload)
    match given:
        case [[*args], dict(kwargs)] if payload.content_type.startswith(payloads.MSGPACK):
            return {"args": args, "kwargs": kwargs} if args and kwargs else kwargs or args
    return given


def line(value: Any, longest: int = 120) -> str:
    """A value in one line, cut where it is long."""
    text = to_json(value).decode()
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def pair(name: str, value: str) -> str:
    """An attribute as the list is asked for it: in its name, an equals sign is percent-encoded."""
    return f"{name.replace('%', '%25').replace('=', '%3D')}={value}"


def segment(text: str) -> str:
    """A part of a path: an id or a token, which may hold anything."""
    return quote(text, safe="")


def _environment_of() -> Environment:
    environment = Environment(
        loader=PackageLoader("durably_connectors.http.dashboard"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "length": length, "instant": instant, "ago": ago, "pretty": pretty, "line": line, "segment": segment,
        "query": urlencode, "plain": plain, "short": short, "arguments": arguments, "pair": pair,
        "grouped": lambda number: f"{number:,}",
    }  # fmt: skip
    return environment


_environment = _environment_of()
