"""Errors as problem details (RFC 9457): which of ours has which status, and how it looks."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from durably.errors import (
    BrokerError,
    ConfigurationError,
    DurablyError,
    HookNotFoundError,
    RecordTooLarge,
    RunNotFoundError,
    SerializationError,
)
from durably.jsonable import to_json
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fastapi import FastAPI
    from starlette.requests import Request

MEDIA_TYPE = "application/problem+json"
_URN = "urn:durably:problem:"


class Problem(Exception):
    """What a request cannot have, and why.

    Args:
        status: the HTTP status.
        kind: what the problem is called in its ``type``, a URN.
        detail: what is wrong here, and the remedy.
        headers: of the response.
        **more: further members of the document.
    """

    def __init__(
        self, status: int, kind: str, detail: str, headers: Mapping[str, str] | None = None, **more: Any
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.kind = kind
        self.detail = detail
        self.headers = dict(headers or {})
        self.more = more

    def response(self) -> Response:
        """The document, as a response."""
        document = {
            "type": f"{_URN}{self.kind}",
            "title": self.kind.replace("-", " ").capitalize(),
            "status": self.status,
            "detail": self.detail,
            **self.more,
        }
        return Response(to_json(document), self.status, self.headers, media_type=MEDIA_TYPE)


def of(error: Exception) -> Problem:
    """The problem that one of our own errors is."""
    match error:
        case Problem():
            return error
        case RunNotFoundError():
            return Problem(404, "run-not-found", str(error), run_id=error.run_id)
        case HookNotFoundError():
            return Problem(404, "hook-not-found", str(error), token=error.token)
        case RecordTooLarge():
            return Problem(413, "too-large", str(error))
        case SerializationError():
            return Problem(422, "unreadable", str(error))
        case TimeoutError():
            return Problem(504, "no-answer", str(error))
        case BrokerError() | ConfigurationError():
            return Problem(503, "unavailable", str(error))
        case _:
            return Problem(409, "refused", str(error))


def described(document: dict[str, Any]) -> dict[str, Any]:
    """An OpenAPI document in which problems have their own media type; FastAPI knows one for all models."""
    for path in document["paths"].values():
        for operation in path.values():
            for response in operation["responses"].values():
                content = response.get("content", {})
                if content.get("application/json", {}).get("schema") == {"$ref": "#/components/schemas/Problem"}:
                    content[MEDIA_TYPE] = content.pop("application/json")
    return document


def install(app: FastAPI) -> None:
    """Gives every error of an application this form."""

    async def known(_: Request, error: Exception) -> Response:
        return of(error).response()

    async def by_status(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        phrase = HTTPStatus(error.status_code).phrase.lower().replace(" ", "-")
        kind = "too-large" if error.status_code == 413 else phrase  # whose phrase depends on Python's version
        return Problem(error.status_code, kind, str(error.detail), error.headers).response()

    async def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        found = [{"at": ".".join(map(str, e["loc"])), "problem": _said(e)} for e in error.errors()]
        detail = "; ".join(f"{e['at']}: {e['problem']}" for e in found)
        return Problem(422, "invalid-request", detail, errors=found).response()

    async def unforeseen(_: Request, error: Exception) -> Response:
        return Problem(500, "internal-error", f"an error that nobody foresaw: {type(error).__name__}").response()

    async def gone(*_: object) -> Response:
        return Problem(400, "client-gone", "the client went before its body was complete").response()  # to nobody

    for kind in (Problem, DurablyError, TimeoutError):
        app.add_exception_handler(kind, known)
    app.add_exception_handler(ClientDisconnect, gone)
    app.add_exception_handler(HTTPException, by_status)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Exception, unforeseen)


def _said(error: Mapping[str, Any]) -> str:
    """What pydantic says of one field; of a body that is no JSON, why."""
    why = error.get("ctx", {}).get("error") if error["type"] == "json_invalid" else None
    return error["msg"] if why is None else f"{error['msg']}: {why}"
