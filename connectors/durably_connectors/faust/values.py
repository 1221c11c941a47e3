"""What the bytes of a message mean: JSON, Avro in single-object encoding, Avro by a Schema Registry, or as a function says."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Awaitable, Callable
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import aiohttp
import fastavro
import msgspec
from durably.errors import ConfigurationError
from durably_schemas.codec import HEADER, MARKER, fingerprint_of

from durably_connectors.faust.intake import Later

Format = Literal["json", "avro", "registry", "bytes", "text"]
Decoder = Callable[[bytes], Any]
Schema = str | Path | dict[str, Any]

REGISTRY = "DURABLY_SCHEMA_REGISTRY"
"""The variable of the environment that holds the Schema Registry's URL."""
_TIMEOUT = aiohttp.ClientTimeout(total=10)
_SERVER_ERROR = 500


def decoder(form: Format | Decoder, schema: Schema | list[Schema] | None) -> Callable[[bytes | None], Awaitable[Any]]:
    """The function that makes a value of bytes; it raises what the bytes deserve, or `Later`.

    Args:
        form: the format, or a plain function of the bytes.
        schema: for ``"avro"``, one or more: JSON, or the path of an ``.avsc``.

    Raises:
        ConfigurationError: an unknown format, or a schema that is missing, or that cannot be read.
    """
    if form == "avro":
        if schema is None:
            raise ConfigurationError('value="avro" needs the schema: give schema="order.avsc", or a list of versions')
        return _present(_SingleObject(schema if isinstance(schema, list) else [schema]).decode)
    if schema is not None:
        raise ConfigurationError(f'a schema is given for value={form!r}: only value="avro" has one')
    if form == "registry":
        return _present(Registry().decode)
    plain: dict[str, Decoder] = {"json": msgspec.json.decode, "text": bytes.decode, "bytes": bytes}
    if callable(form):
        return _present(form)
    if form in plain:
        return _present(plain[form])
    raise ConfigurationError(
        f'value={form!r} is no format: use "json", "avro", "registry", "text", "bytes", or a function'
    )


def _present(decode: Callable[[bytes], Any]) -> Callable[[bytes | None], Awaitable[Any]]:
    async def decoded(data: bytes | None) -> Any:
        if data is None:
            raise ValueError("the message has no value: a tombstone")
        value = decode(data)
        return await value if inspect.isawaitable(value) else value

    return decoded


class _SingleObject:
    """Avro behind the fingerprint of its schema (Avro 1.12 specification, "Single-object encoding")."""

    def __init__(self, schemas: list[Schema]) -> None:
        self._schemas = dict(map(self._read, schemas))

    def decode(self, data: bytes) -> Any:
        if data[:2] != MARKER:
            raise ValueError(f"not in Avro's single-object encoding: starts with {data[:4]!r}")
        schema = self._schemas.get(data[2:HEADER])
        if schema is None:
            raise ValueError(f"the fingerprint {data[2:HEADER].hex()} is of none of the schemas that were given")
        return _read_all(data, HEADER, schema)

    @staticmethod
    def _read(given: Schema) -> tuple[bytes, Any]:
        try:
            schema = given if isinstance(given, dict) else json.loads(_text(given))
            return fingerprint_of(schema), fastavro.parse_schema(schema)
        except Exception as e:  # a file that is missing, no JSON, no schema
            raise ConfigurationError(f"schema {given!r:.200} cannot be read: {type(e).__name__}: {e}") from e


def _text(given: str | Path) -> str:
    return given if isinstance(given, str) and given.lstrip().startswith("{") else Path(given).read_text()


class Registry:
    """Avro in the Confluent wire format; schemas come from a Schema Registry, each once.

    Args:
        url: the registry's; by default the environment's `REGISTRY`. User and password may stand in it.

    Raises:
        ConfigurationError: no URL.
    """

    def __init__(self, url: str | None = None) -> None:
        found = url or os.environ.get(REGISTRY)
        if not found:
            raise ConfigurationError(f'value="registry" needs a Schema Registry: set {REGISTRY} to its URL')
        self._url = found.rstrip("/")
        self._schemas: dict[int, Any] = {}

    async def decode(self, data: bytes) -> Any:
        """The value. Raises `Later` where the registry does not answer, `ValueError` for bytes that are something else."""
        if len(data) < 5 or data[0] != 0:
            raise ValueError(f"not in the Confluent wire format: starts with {data[:5]!r}")
        schema_id = int.from_bytes(data[1:5], "big")
        if schema_id not in self._schemas:
            named: dict[str, Any] = {}
            self._schemas[schema_id] = await self._parsed(await self._ask(f"schemas/ids/{schema_id}"), named)
        return _read_all(data, 5, self._schemas[schema_id])

    async def _parsed(self, found: dict[str, Any], named: dict[str, Any]) -> Any:
        if (kind := found.get("schemaType", "AVRO")) != "AVRO":
            raise ValueError(f"a schema of type {kind}: only Avro is understood")
        for reference in found.get("references", ()):
            subject, version = reference["subject"], reference["version"]
            await self._parsed(await self._ask(f"subjects/{subject}/versions/{version}"), named)
        return fastavro.parse_schema(json.loads(found["schema"]), named_schemas=named)

    async def _ask(self, path: str) -> dict[str, Any]:
        try:
            async with (
                aiohttp.ClientSession(timeout=_TIMEOUT) as session,
                session.get(f"{self._url}/{path}") as response,
            ):
                if response.status >= _SERVER_ERROR or response.status in {401, 403, 429}:
                    raise Later(f"the Schema Registry at {self._url} answers {response.status} for {path}")
                if response.status != 200:
                    raise ValueError(f"the Schema Registry has no {path}: {response.status}")
                body: dict[str, Any] = await response.json(content_type=None)
                return body
        except (aiohttp.ClientError, TimeoutError) as e:
            raise Later(f"the Schema Registry at {self._url} does not answer: {type(e).__name__}: {e}") from e


def _read_all(data: bytes, at: int, schema: Any) -> Any:
    body = BytesIO(data)
    body.seek(at)
    value = fastavro.schemaless_reader(body, schema, None)
    if body.read(1):
        raise ValueError("bytes are left over behind the value")
    return value
