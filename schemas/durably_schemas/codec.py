"""Avro on the wire: single-object encoding out; single-object encoding or the Confluent wire format in.

Our own schemas are compiled (`durably_schemas.compiled`); fastavro parses them, fingerprints them, and reads what other
versions of them wrote.

Single-object encoding (Avro 1.12 specification, "Single-object encoding"): the bytes ``C3 01``, the CRC-64-AVRO
fingerprint of the writer's schema in canonical form, little-endian, then the body. Confluent wire format: a zero
byte, the schema's id in a Schema Registry as four bytes, big-endian, then the body.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from io import BytesIO
from typing import Any, TypeVar

import fastavro
from fastavro._read_py import schemaless_reader
from fastavro.schema import fingerprint as avro_fingerprint
from fastavro.schema import to_parsing_canonical_form

from durably_schemas import events, records
from durably_schemas.compiled import Compiler

MARKER = b"\xc3\x01"
HEADER = 10  # marker and fingerprint

R = TypeVar("R", bound=records.Record)
Json = dict[str, Any]

RECORDS: tuple[type[records.Record], ...] = (
    records.StartRun, records.ResumeHook, records.CancelRun, records.QueryRun,
    records.StepRequest, records.StepResult, records.StepHeartbeat, records.StepClaim,
    records.Event, records.RunSummary, records.Reply, records.StreamChunk, records.DeadLetter,
    records.ClaimToken, records.TokenGranted, records.TokenRefused, records.ReleaseToken, records.HookDelivery,
    records.WatchRun, records.ChildFinished, records.Snapshot, records.ResetRun, records.RunCopied,
)  # fmt: skip


class CodecError(ValueError):
    """Bytes that are none of our records, or a record that does not fit its schema."""


def schema_of(name: str) -> Json:
    """The shipped Avro schema of a record, as JSON. Raises `KeyError` for a name that is no record."""
    if name not in {cls.__name__ for cls in RECORDS}:
        raise KeyError(name)
    schema: Json = json.loads(files("durably_schemas").joinpath("avro", f"{name}.avsc").read_text())
    return schema


def fingerprint_of(schema: Json) -> bytes:
    """CRC-64-AVRO of the canonical form, in the byte order of single-object encoding."""
    return bytes.fromhex(avro_fingerprint(to_parsing_canonical_form(schema), "CRC-64-AVRO"))


@cache
def _released() -> dict[bytes, Json]:
    """The schemas of every release, by fingerprint: what they wrote is read for as long as a log may be kept."""
    versions = files("durably_schemas").joinpath("released").iterdir()
    found = [json.loads(path.read_text()) for version in versions for path in version.iterdir()]
    return {fingerprint_of(schema): schema for schema in found}


def _plain(schema: Any) -> Any:
    """The schema without logical types and docs: instants stay integers, and neither is part of the canonical form."""
    if isinstance(schema, dict):
        return {k: _plain(v) for k, v in schema.items() if k not in ("logicalType", "doc")}
    return [_plain(s) for s in schema] if isinstance(schema, list) else schema


_CLASSES: dict[str, type[records.Record]] = {
    f"{module.__name__}.{name}": cls
    for module in (records, events)
    for name, cls in vars(module).items()
    if isinstance(cls, type) and issubclass(cls, records.Record) and cls.__module__ == module.__name__
}


def _class_of(full_name: str) -> type[records.Record]:
    namespace, _, name = full_name.rpartition(".")
    return _CLASSES[f"durably_schemas.{'events' if namespace.endswith('events') else 'records'}.{name}"]


class _Shape:
    """One record type: its schema, and the functions compiled from it."""

    def __init__(self, cls: type[records.Record]) -> None:
        schema = schema_of(cls.__name__)
        self.cls = cls
        self.name = cls.__name__
        self.parsed = fastavro.parse_schema(_plain(schema))
        self.fingerprint = fingerprint_of(schema)
        self.header = MARKER + self.fingerprint
        self.encode, self.decode = Compiler(_class_of).compile(schema)

    def transcoded(self, data: bytes, skip: int, writer: Any) -> bytes:
        """What another version of the schema wrote, as this version writes it (Avro's schema resolution)."""
        body = BytesIO(data)
        body.seek(skip)
        # In Python: fastavro's compiled reader recurses on the C stack, and deep nesting would end the process.
        raw = schemaless_reader(body, writer, self.parsed, return_record_name=True)
        if body.read(1):
            raise ValueError("bytes are left over")
        out = BytesIO()
        fastavro.schemaless_writer(out, self.parsed, raw)
        return out.getvalue()


class Codec:
    """Encodes and decodes records. Safe to share between threads.

    Args:
        registry: the schema, as JSON, for an id of the Confluent wire format; without it that format is refused.
    """

    def __init__(self, registry: Callable[[int], Json] | None = None) -> None:
        self._registry = registry
        self._writers: dict[bytes | int, tuple[_Shape, Any]] = {
            s.fingerprint: (s, None) for s in _SHAPES.values()
        }  # writer's schema: None where it is the shipped one

    def encode(self, record: records.Record) -> bytes:
        """The record in single-object encoding. Raises `CodecError` when a field does not fit the schema."""
        shape = _SHAPES[type(record)]
        try:
            parts = [shape.header]
            shape.encode(record, parts.extend)
            return b"".join(parts)
        except Exception as e:
            raise CodecError(f"this {shape.name} does not fit its schema: {e}: {_shown(record)}") from e

    def decode(self, data: bytes | None) -> records.Record:
        """The record in these bytes. Raises `CodecError`, saying what they are instead."""
        if not data:
            raise CodecError("an empty value")
        shape, writer, at = self._recognise(data)
        try:
            if writer is not None:
                data, at = shape.transcoded(data, at, writer), 0
            record: records.Record
            record, end = shape.decode(data, at)
        except Exception as e:
            raise CodecError(f"not a readable {shape.name}: {type(e).__name__}: {e}") from e
        if end != len(data):
            raise CodecError(
                f"{'bytes are left over behind' if end < len(data) else 'bytes are missing in'} this {shape.name}"
            )
        return record

    def decode_as(self, cls: type[R], data: bytes | None) -> R:
        """`decode`, for a caller that accepts one type only."""
        record = self.decode(data)
        if not isinstance(record, cls):
            raise CodecError(f"a {type(record).__name__} where a {cls.__name__} was expected")
        return record

    def _recognise(self, data: bytes) -> tuple[_Shape, Any, int]:
        if data[:2] == MARKER:
            writer = data[2:HEADER]
            if writer not in self._writers:
                self._writers[writer] = self._of_release(writer)
            return *self._writers[writer], HEADER
        if data[0] == 0 and len(data) >= 5:
            schema_id = int.from_bytes(data[1:5], "big")
            if schema_id not in self._writers:
                self._writers[schema_id] = self._look_up(schema_id)
            return *self._writers[schema_id], 5
        raise CodecError(f"neither single-object encoded Avro nor the Confluent wire format: starts with {data[:4]!r}")

    def _of_release(self, writer: bytes) -> tuple[_Shape, Any]:
        schema = _released().get(writer)
        if schema is None:
            raise CodecError(f"unknown schema fingerprint {writer.hex()}: a newer release wrote this, or none of ours")
        return next(s for s in _SHAPES.values() if s.name == schema["name"]), fastavro.parse_schema(_plain(schema))

    def _look_up(self, schema_id: int) -> tuple[_Shape, Any]:
        if self._registry is None:
            raise CodecError(
                f"in the Confluent wire format (schema id {schema_id}), but no schema registry is configured"
            )
        schema = self._registry(schema_id)
        name = str(schema.get("name"))
        full_name = name if "." in name else f"{schema.get('namespace', '')}.{name}"
        shape = next((s for s in _SHAPES.values() if f"durably.{s.name}" == full_name), None)
        if shape is None:
            raise CodecError(f"schema id {schema_id} is {full_name}, none of our records")
        try:
            return shape, fastavro.parse_schema(_plain(schema))
        except Exception as e:
            raise CodecError(f"the schema with id {schema_id} is none: {type(e).__name__}: {e}") from e


def _shown(record: records.Record) -> str:
    try:
        return f"{record!r:.300}"
    except RecursionError:
        return "nested too deeply to be shown"


_SHAPES = {cls: _Shape(cls) for cls in RECORDS}
