"""HTTP, as workflows and steps see it: the `Request` that a webhook receives, a `Response`, and the step `fetch`.

Bodies up to `INLINE_BODY` bytes travel within the value. A larger one lies in a stream of the run: the value holds its
handle, and reading it is a step where a workflow reads it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from functools import cache
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Generic, Literal, ParamSpec, Self, TypeVar, overload
from urllib.parse import urlsplit

import msgspec
from durably_schemas.records import ReplyTo

from durably import payloads
from durably.authoring import DEFAULT_BACKOFF, StepDefinition
from durably.durations import Duration, milliseconds
from durably.errors import ConfigurationError, DurablyError, FatalError
from durably.runtime import StepContext, step_context, workflow_context
from durably.serialization import serializable
from durably.streams import Readable, get_writable

if TYPE_CHECKING:
    import ssl

    import httpx

P = ParamSpec("P")
R = TypeVar("R")
MakeT = TypeVar("MakeT")
ReadT = TypeVar("ReadT")
Body = bytes | Readable  # a name also because within the classes below `bytes` is a method
_Bytes = bytes

INLINE_BODY = 256 * 1024
"""Bytes of a body that travels within its request or response."""
CHUNK = 256 * 1024
"""Bytes of one chunk of a body that travels as a stream."""
MANUAL: Literal["manual"] = "manual"
"""What stands in the place of a webhook's response where a step is to give it."""

_TOKEN_CHARACTERS = frozenset("!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
_BODILESS = frozenset({HTTPStatus.NO_CONTENT, HTTPStatus.RESET_CONTENT, HTTPStatus.NOT_MODIFIED})
_REDIRECTS = frozenset({301, 302, 303, 307, 308})

HeaderTypes = Mapping[str, str] | Iterable[tuple[str, str]]
"""What headers may be given as: a mapping, or pairs in their order."""


@serializable(name="durably.Headers")
class Headers(Mapping[str, str]):
    """The headers of a message: names in any case, several values for a name, and their order kept.

    As a mapping it has each name once, in lower case, with its values joined by ``", "`` (RFC 9110, section 5.3).

    Args:
        headers: a mapping, or pairs.

    Raises:
        ValueError: a name or value that HTTP does not allow.
    """

    __slots__ = ("_pairs",)

    def __init__(self, headers: HeaderTypes | None = None) -> None:
        given: Iterable[tuple[str, str]] = headers or ()  # type: ignore[assignment]
        if isinstance(headers, Headers):
            given = headers.pairs
        elif isinstance(headers, Mapping):
            given = headers.items()
        self._pairs = tuple((_header_name(name), _header_value(name, value)) for name, value in given)

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Every header in its place, as it was written."""
        return self._pairs

    def get_list(self, name: str) -> list[str]:
        """All values of a name, in their order."""
        wanted = name.lower()
        return [value for key, value in self._pairs if key.lower() == wanted]

    def __getitem__(self, name: str) -> str:
        values = self.get_list(name)
        if not values:
            raise KeyError(name)
        return ", ".join(values)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and any(key.lower() == name.lower() for key, _ in self._pairs)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(key.lower() for key, _ in self._pairs))

    def __len__(self) -> int:
        return len({key.lower() for key, _ in self._pairs})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mapping) and dict(self) == dict(Headers(other))

    def __hash__(self) -> int:
        return hash(frozenset(self.items()))

    def __repr__(self) -> str:
        return f"Headers({list(self._pairs)!r})"

    def __durably_dump__(self) -> list[list[str]]:
        return [[name, value] for name, value in self._pairs]

    @classmethod
    def __durably_load__(cls, data: list[list[str]]) -> Self:
        return cls((name, value) for name, value in data)


@serializable(name="durably.Request")
class Request:
    """An HTTP request.

    Args:
        method: in any case.
        url: absolute, ``http`` or ``https``.
        headers: a mapping, or pairs.
        body: bytes, or text, which is sent as UTF-8.

    Attributes:
        method: in upper case.
        url: as given.
        headers: see `Headers`.
        body: the bytes, or the handle of the stream that holds them; `bytes`, `text` and `json` read both.

    Raises:
        ValueError: no method, no such URL, a bad header, or a body with GET or HEAD.
        TypeError: the body is something else.
    """

    __slots__ = ("_respond_to", "_responded", "body", "headers", "method", "url")

    def __init__(self, method: str, url: str, headers: HeaderTypes | None = None, body: Body | str = b"") -> None:
        self._set(method, url, headers, body, None)
        if self.body and self.method in {"GET", "HEAD"}:
            raise ValueError(f"a {self.method} request has no body: use another method, or put the data in the URL")

    @classmethod
    def received(
        cls, method: str, url: str, headers: HeaderTypes | None, body: Body, respond_to: ReplyTo | None = None
    ) -> Self:
        """As it came from outside, where also a GET may have a body.

        Args:
            method: see the class.
            url: see the class.
            headers: see the class.
            body: see the class.
            respond_to: where somebody waits for a response by a step.

        Raises:
            ValueError: no method, no such URL, or a bad header.
        """
        self = cls.__new__(cls)
        self._set(method, url, headers, body, respond_to)
        return self

    def _set(
        self, method: str, url: str, headers: HeaderTypes | None, body: Body | str, respond_to: ReplyTo | None
    ) -> None:
        if not _is_token(method):
            raise ValueError(f"method {method!r:.100} is none: use a word such as POST")
        self.method, self.url, self.headers = method.upper(), _url(url), Headers(headers)
        self.body = _content(body, "Request")
        self._respond_to = respond_to
        self._responded = False

    async def bytes(self) -> _Bytes:
        """The body. In a workflow, a step where it is a stream."""
        return await _read(self.body)

    async def text(self) -> str:
        """The body as text, by the charset that its content type names, else UTF-8."""
        return _text(await _read(self.body), self.headers)

    async def json(self) -> Any:
        """The body as JSON. Raises `ValueError` where it is none."""
        return _json(await _read(self.body), f"the body of {self.method} {self.url}")

    def bytes_sync(self) -> _Bytes:
        """As `bytes`, for steps that are plain functions."""
        return _read_sync(self.body)

    async def respond_with(self, response: Response) -> None:
        """Answers the HTTP call that waits at the webhook. In steps only; the first answer counts.

        Raises:
            DurablyError: not in a step, the webhook does not wait (``respond_with="manual"``), or answered already.
        """
        ctx, to, payload = self._response(response)
        await ctx.services.respond(to, payload)

    def respond_with_sync(self, response: Response) -> None:
        """As `respond_with`, for steps that are plain functions."""
        ctx, to, payload = self._response(response)
        ctx.services.respond_sync(to, payload)

    def _response(self, response: Response) -> tuple[StepContext, ReplyTo, Any]:
        ctx = None if workflow_context() is not None else step_context.get()
        if ctx is None:
            raise DurablyError("respond_with() works in a step only: pass the request to a step, and respond there")
        if self._respond_to is None:
            raise DurablyError(
                "nobody waits for a response to this request: create its webhook with respond_with='manual'"
            )
        if self._responded:
            raise DurablyError("this request has its response already: an HTTP call takes one")
        if not isinstance(response, Response):
            raise TypeError(f"{response!r:.100} is no durably.web.Response")
        payload = payloads.dump(response, f"the response to {self.method} {self.url}")
        self._responded = True
        return ctx, self._respond_to, payload

    def __repr__(self) -> str:
        return f"<Request {self.method} {self.url}>"

    def __durably_dump__(self) -> dict[str, Any]:
        to = self._respond_to
        return {
            "method": self.method,
            "url": self.url,
            "headers": self.headers.__durably_dump__(),
            "body": self.body,
            "respond_to": None if to is None else [to.partition, to.request_id],
        }

    @classmethod
    def __durably_load__(cls, data: dict[str, Any]) -> Self:
        headers = ((name, value) for name, value in data["headers"])
        to = data["respond_to"]
        respond_to = None if to is None else ReplyTo(partition=to[0], request_id=to[1])
        return cls.received(data["method"], data["url"], headers, data["body"], respond_to)


class _MakesAndReads(Generic[MakeT, ReadT]):
    """One name for two things, as in the Fetch standard: called on the class it makes, on an instance it reads."""

    def __init__(self, makes: Callable[..., Any], reads: Callable[..., Any]) -> None:
        self._makes = makes
        self._reads = reads
        self.__doc__ = f"{makes.__doc__}\n\nOn an instance: {reads.__doc__}"

    @overload
    def __get__(self, instance: None, owner: type) -> MakeT: ...
    @overload
    def __get__(self, instance: Response, owner: type) -> ReadT: ...
    def __get__(self, instance: Response | None, owner: type) -> Any:
        return self._makes.__get__(owner) if instance is None else self._reads.__get__(instance)


def _json_response(cls: type[Response], value: Any, status: int = 200, headers: HeaderTypes | None = None) -> Response:
    """``Response.json(value)``: a response with JSON for its body. Raises `TypeError` for what JSON has no form for."""
    return cls(msgspec.json.encode(value), status, _with_type(headers, "application/json"))


async def _json_of_response(response: Response) -> Any:
    """``await response.json()``: the body as JSON. Raises `ValueError` where it is none."""
    return _json(await _read(response.body), f"the body of {response!r}")


def _text_response(cls: type[Response], text: str, status: int = 200, headers: HeaderTypes | None = None) -> Response:
    """``Response.text(text)``: a response with a text, as UTF-8, for its body."""
    return cls(text.encode(), status, _with_type(headers, "text/plain; charset=utf-8"))


async def _text_of_response(response: Response) -> str:
    """``await response.text()``: the body as text, by the charset that its content type names, else UTF-8."""
    return _text(await _read(response.body), response.headers)


@serializable(name="durably.Response")
class Response:
    """An HTTP response: what a webhook answers, or what `fetch` got.

    Args:
        body: bytes, or text, which is sent as UTF-8.
        status: 200 to 599.
        headers: a mapping, or pairs.

    Attributes:
        status: the code.
        headers: see `Headers`.
        body: the bytes, or the handle of the stream that holds them; `bytes`, `text` and `json` read both.

    Raises:
        ValueError: another status, a bad header, or a body with 204, 205 or 304.
        TypeError: the body is something else; JSON is made by `Response.json`.
    """

    __slots__ = ("body", "headers", "status")

    def __init__(self, body: Body | str = b"", status: int = 200, headers: HeaderTypes | None = None) -> None:
        if isinstance(status, bool) or not isinstance(status, int) or not 200 <= status <= 599:
            raise ValueError(f"status {status!r} is none of a response: use 200 to 599")
        content = _content(body, "Response")
        if content and status in _BODILESS:
            raise ValueError(f"a response with status {status} has no body: use another status, or leave the body out")
        self.body, self.status, self.headers = content, int(status), Headers(headers)

    @classmethod
    def received(cls, body: Body, status: int, headers: HeaderTypes | None) -> Self:
        """As it came from outside, where servers have statuses and bodies of their own making."""
        self = cls.__new__(cls)
        self.body, self.status, self.headers = _content(body, "Response"), status, Headers(headers)
        return self

    json = _MakesAndReads["Callable[..., Response]", "Callable[[], Awaitable[Any]]"](_json_response, _json_of_response)
    text = _MakesAndReads["Callable[..., Response]", "Callable[[], Awaitable[str]]"](_text_response, _text_of_response)

    @classmethod
    def redirect(cls, url: str, status: int = 302) -> Self:
        """A response that sends the caller elsewhere. Raises `ValueError` for a status that does not."""
        if status not in _REDIRECTS:
            raise ValueError(f"status {status!r} is no redirect: use one of {', '.join(map(str, sorted(_REDIRECTS)))}")
        return cls(b"", status, {"location": url})

    @property
    def ok(self) -> bool:
        """Whether the status is 200 to 299."""
        return 200 <= self.status < 300

    async def bytes(self) -> _Bytes:
        """The body. In a workflow, a step where it is a stream."""
        return await _read(self.body)

    def bytes_sync(self) -> _Bytes:
        """As `bytes`, for steps that are plain functions."""
        return _read_sync(self.body)

    def __repr__(self) -> str:
        return f"<Response {self.status}>"

    def __durably_dump__(self) -> dict[str, Any]:
        return {"status": self.status, "headers": self.headers.__durably_dump__(), "body": self.body}

    @classmethod
    def __durably_load__(cls, data: dict[str, Any]) -> Self:
        return cls.received(data["body"], data["status"], ((name, value) for name, value in data["headers"]))


async def _fetch(
    url: str,
    *,
    method: str = "GET",
    headers: Headers | HeaderTypes | None = None,
    body: bytes | str | None = None,
    json: Any = None,
    timeout: Duration = "30s",  # noqa: ASYNC109 - of the HTTP exchange; the step's own is set by options()
) -> Response:
    """Fetches; the step `fetch`."""
    if body is not None and json is not None:
        raise FatalError(f"fetch({url!r}): give body or json, not both")
    content = body.encode() if isinstance(body, str) else body or b""
    try:
        sent = Headers(headers)
        if json is not None:
            content, sent = msgspec.json.encode(json), _with_type(sent, "application/json")
        request = Request(method, url, sent, content)
        seconds = milliseconds(timeout) / 1000
    except (ValueError, TypeError) as e:  # as wrong at the next attempt
        raise FatalError(f"fetch({url!r}): {e}") from e
    client = _httpx().AsyncClient(verify=_tls(), follow_redirects=True, timeout=seconds)
    async with (
        client,
        client.stream(request.method, url, headers=list(sent.pairs), content=content or None) as answer,
    ):
        # What httpx decodes on the way has no longer the length and coding that these headers speak of.
        gone = {b"content-encoding", b"content-length", b"transfer-encoding"}
        kept = [
            (name.decode("latin-1"), value.decode("latin-1"))
            for name, value in answer.headers.raw
            if name.lower() not in gone
        ]
        return Response.received(await _body_of(answer), answer.status_code, kept)


async def _body_of(answer: httpx.Response) -> Body:
    """What was answered: bytes, or in a step a stream where they are many."""
    ctx = step_context.get()
    start = b""
    pieces = answer.aiter_bytes(CHUNK)
    async for piece in pieces:
        start += piece
        if ctx is None or len(start) <= INLINE_BODY:
            continue
        # A namespace for each execution: what a failed one has written shall not be read as part of the next.
        out = get_writable(f"fetch-{ctx.step_id}-{ctx.attempt}.{ctx.execution}")
        await out.write(start)
        async for more in pieces:
            await out.write(more)
        await out.close()
        return Readable(out.run_id, out.namespace)
    return start


async def _request_body(body: Readable) -> bytes:
    """Reads a body that lies in a stream."""
    return b"".join([chunk async for chunk in body])


def _builtin(name: str, fn: Callable[P, Awaitable[R]]) -> StepDefinition[P, R]:
    return StepDefinition(
        name=name, fn=fn, queue="default", max_retries=3, timeout_ms=None, backoff=DEFAULT_BACKOFF, is_async=True
    )


fetch = _builtin("durably.fetch", _fetch)
"""Fetches a URL: ``response = await fetch(url, method="POST", json={"n": 1})``. In a workflow, a recorded step.

Args:
    url: absolute, ``http`` or ``https``. Redirects are followed.
    method: GET by default.
    headers: a mapping, or pairs.
    body: bytes, or text, which is sent as UTF-8.
    json: a value to send as JSON, in the place of a body.
    timeout: for connecting, and for each wait for data. Of the step as a whole: ``fetch.options(timeout=)``.

Returns:
    The `Response`, whatever its status.

Raises:
    FatalError: the request cannot be sent as it is; not retried.
    httpx.TransportError: nobody answers. In a workflow the step is retried first, and it may arrive as `StepError`.
    ConfigurationError: httpx is not installed.
"""

BUILTIN_STEPS: tuple[StepDefinition[..., Any], ...] = (
    fetch,
    request_body := _builtin("durably.request_body", _request_body),
)
"""The steps that every worker knows, without any module of the user's."""


def _content(body: object, of: str) -> Body:
    """The body of a message, as it is kept."""
    match body:
        case bytes() | Readable():
            return body
        case str():
            return body.encode()
        case bytearray() | memoryview():
            return bytes(body)
    remedy = "json.dumps(value)" if of == "Request" else "Response.json(value)"
    raise TypeError(
        f"the body of this {of} is {body!r:.100}: use bytes or text; for JSON {remedy}, and leave it out for none"
    )


async def _read(body: Body) -> bytes:
    if not isinstance(body, Readable):
        return body
    return await (request_body(body) if workflow_context() is not None else _request_body(body))


def _read_sync(body: Body) -> bytes:
    return b"".join(body) if isinstance(body, Readable) else body


def _text(data: bytes, headers: Headers) -> str:
    from email.message import Message  # the parser of parameters that Python has; slow to import

    described = Message()
    described["content-type"] = headers.get("content-type", "")
    try:
        return data.decode(described.get_content_charset("utf-8"), "replace")
    except LookupError:  # a charset that Python does not know
        return data.decode("utf-8", "replace")


def _json(data: bytes, what: str) -> Any:
    try:
        return msgspec.json.decode(data)
    except msgspec.DecodeError as e:
        raise ValueError(f"{what} is no JSON: {e}") from e


def _with_type(headers: HeaderTypes | None, media_type: str) -> Headers:
    given = Headers(headers)
    return given if "content-type" in given else Headers([*given.pairs, ("content-type", media_type)])


def _url(url: str) -> str:
    try:
        parts = urlsplit(url)
        good = parts.scheme in {"http", "https"} and bool(parts.hostname) and (parts.port is None or parts.port >= 0)
    except (ValueError, AttributeError, TypeError):
        good = False
    if not good:
        raise ValueError(
            f"{url!r:.200} is no URL that can be requested: use an absolute one, such as https://host/path"
        )
    return url


def _is_token(text: object) -> bool:
    return isinstance(text, str) and bool(text) and _TOKEN_CHARACTERS.issuperset(text)


def _header_name(name: str) -> str:
    if not _is_token(name):
        raise ValueError(f"header name {name!r:.100} is none: use letters, digits and -")
    return name


def _header_value(name: str, value: str) -> str:
    if not isinstance(value, str) or any((c < " " and c != "\t") or c == "\x7f" for c in value):
        raise ValueError(f"header {name} is {value!r:.100}: use a text of one line, without control characters")
    try:
        value.encode("latin-1")  # all that a header can carry (RFC 9110, section 5.5)
    except UnicodeEncodeError:
        raise ValueError(f"header {name} is {value!r:.100}: percent-encode what is not Latin-1") from None
    return value.strip(" \t")


def _httpx() -> Any:
    try:
        import httpx
    except ModuleNotFoundError as e:
        raise ConfigurationError("fetch() needs httpx in the worker: pip install 'durably[http]'") from e
    return httpx


@cache
def _tls() -> ssl.SSLContext:
    """Made once: reading the certificates costs more than a request."""
    import ssl  # a processor imports this module too, and has no use for it

    return ssl.create_default_context()
