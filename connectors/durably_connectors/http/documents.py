"""JSON that comes in: read by one strict parser, whatever the route."""

from __future__ import annotations

import json
from typing import Any

import msgspec
from starlette.requests import Request


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


class StrictRequest(Request):
    """A request whose JSON is what `parsed` takes."""

    async def json(self) -> Any:
        """The body. Raises `json.JSONDecodeError`, which FastAPI turns into a validation error."""
        try:
            return parsed(await self.body())
        except ValueError as e:
            raise json.JSONDecodeError(str(e), "", 0) from None
