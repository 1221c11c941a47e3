"""What comes in, as JSON or as a form: read by one strict parser each, whatever the route."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import parse_qs

import msgspec
from starlette.requests import Request

from durably_connectors.http.problems import Problem


def parsed(body: bytes) -> Any:
    """The value of a JSON text.

    Python's own parser takes NaN, Infinity, numbers beyond a float's range and half surrogates, none of which can be
    written again. This one refuses them.

    Raises:
        ValueError: it is no JSON, or nested too deeply.
    """
    try:
        return msgspec.json.decode(body)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


async def form(request: Request) -> dict[str, str]:
    """The fields of an HTML form, the first of each name. Raises `Problem` with 400 where it is none."""
    try:
        found = parse_qs((await request.body()).decode(), keep_blank_values=True, max_num_fields=20, errors="strict")
    except ValueError as e:
        raise Problem(400, "not-a-form", f"the body is no form: {e}") from None
    return {name: values[0] for name, values in found.items()}


class StrictRequest(Request):
    """A request whose JSON is what `parsed` takes."""

    async def json(self) -> Any:
        """The body. Raises `json.JSONDecodeError`, which FastAPI turns into a validation error."""
        try:
            return parsed(await self.body())
        except ValueError as e:
            raise json.JSONDecodeError(str(e), "", 0) from None
