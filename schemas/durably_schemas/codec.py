"""Avro on the wire: single-object encoding out; single-object encoding or the Confluent wire format in.

Single-object encoding (Avro 1.12 specification, "Single-object encoding"): the bytes ``C3 01``, the CRC-64-AVRO
fingerprint of the writer's schema in canonical form, little-endian, then the body. Confluent wire format: a zero
byte, the schema's id in a Schema Registry as four bytes, big-endian, then the body.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.resources import files
from io import BytesIO
from typing import Any, TypeVar

import fastavro
import msgspec
from fastavro.schema import fingerprint as avro_fingerprint
from fastavro.schema import to_parsing_canonical_form

from durably_schemas import events, records

MARKER = b"\xc3\x01"
HEADER = 10  # marker and fingerprint

R = TypeVar("R", bound=records.Record)
Json = dict[str, Any]

RECORDS: tuple[type[records.Record], ...] = (
    records.StartRun, records.ResumeHook, records.CancelRun, records.QueryRun,
    records.StepRequest, records.StepResult, records.StepHeartbeat, records.StepClaim,
    records.Event, records.RunSummary, records.Reply, records.StreamChunk, records.DeadLetter,
    records.ClaimToken, records.TokenGranted, records.TokenRefused, records.ReleaseToken, records.HookDelivery,
    records.ChildFinished,
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


_To = Callable[[Any], Any]


class _Shapes:
    """Conversions between our records and what fastavro reads and writes, built once from a schema.

    Only fields that hold records need any: the rest of a record is copied as it is.
    """

    def __init__(self) -> None:
        self._named: dict[str, tuple[_To, _To]] = {}

    def of(self, schema: Any) -> tuple[_To, _To] | None:
        """(to Avro, from Avro) for a schema, or None where a value goes as it is."""
        if isinstance(schema, str):
            return self._named.get(schema)
        if isinstance(schema, list):
            return self._union(schema)
        if schema["type"] == "array":
            return self._array(self.of(schema["items"]))
        return self._record(schema) if schema["type"] == "record" else None

    def _array(self, item: tuple[_To, _To] | None) -> tuple[_To, _To]:
        if item is None:
            return list, tuple
        to, back = item
        return lambda xs: [to(x) for x in xs], lambda xs: tuple([back(x) for x in xs])

    def _union(self, branches: list[Any]) -> tuple[_To, _To] | None:
        named = {}
        for branch in branches:
            shape = self.of(branch)
            if shape is not None:
                named[branch if isinstance(branch, str) else f"{branch['namespace']}.{branch['name']}"] = shape
        if not named:
            return None
        if len(named) == 1:
            ((to, back),) = named.values()
            return lambda x: None if x is None else to(x), lambda x: None if x is None else back(x[1])
        tos = {_class_of(name): (name, shape[0]) for name, shape in named.items()}
        backs = {name: shape[1] for name, shape in named.items()}

        def to_avro(x: Any) -> Any:
            name, convert = tos[type(x)]
            return name, convert(x)

        return to_avro, lambda x: backs[x[0]](x[1])

    def _record(self, schema: Json) -> tuple[_To, _To]:
        name = f"{schema['namespace']}.{schema['name']}"
        nested: list[tuple[str, _To, _To]] = []
        cls = _class_of(name)
        asdict = msgspec.structs.asdict

        def to_avro(x: Any) -> Any:
            d = asdict(x)
            for field, to, _ in nested:
                d[field] = to(d[field])
            return d

        def from_avro(d: Any) -> Any:
            for field, _, back in nested:
                d[field] = back(d[field])
            return cls(**d)

        self._named[name] = (to_avro, from_avro)  # before its fields: a record may refer to itself
        for field in schema["fields"]:
            shape = self.of(field["type"])
            if shape is not None:
                nested.append((field["name"], *shape))
        return self._named[name]


class _Shape:
    """One record type: how to write it, and how to make it of what was read."""

    def __init__(self, cls: type[records.Record]) -> None:
        schema = schema_of(cls.__name__)
        self.cls = cls
        self.name = cls.__name__
        self.parsed = fastavro.parse_schema(_plain(schema))
        self.fingerprint = fingerprint_of(schema)
        self.header = MARKER + self.fingerprint
        to_avro, from_avro = _Shapes()._record(schema)
        self.to_avro, self.from_avro = to_avro, from_avro


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
        out = BytesIO()
        out.write(shape.header)
        try:
            fastavro.schemaless_writer(out, shape.parsed, shape.to_avro(record))
        except Exception as e:
            raise CodecError(f"this {shape.name} does not fit its schema: {e}: {record!r:.300}") from e
        return out.getvalue()

    def decode(self, data: bytes | None) -> records.Record:
        """The record in these bytes. Raises `CodecError`, saying what they are instead."""
        shape, writer, skip = self._recognise(data)
        body = BytesIO(data)
        body.seek(skip)
        try:
            if writer is None:
                raw = fastavro.schemaless_reader(body, shape.parsed, None, return_record_name=True)
            else:
                raw = fastavro.schemaless_reader(body, writer, shape.parsed, return_record_name=True)
            record: records.Record = shape.from_avro(raw)
        except Exception as e:
            raise CodecError(f"not a readable {shape.name}: {type(e).__name__}: {e}") from e
        if body.read(1):
            raise CodecError(f"bytes are left over behind this {shape.name}")
        return record

    def decode_as(self, cls: type[R], data: bytes | None) -> R:
        """`decode`, for a caller that accepts one type only."""
        record = self.decode(data)
        if not isinstance(record, cls):
            raise CodecError(f"a {type(record).__name__} where a {cls.__name__} was expected")
        return record

    def _recognise(self, data: bytes | None) -> tuple[_Shape, Any, int]:
        if not data:
            raise CodecError("an empty value")
        if data[:2] == MARKER:
            known = self._writers.get(data[2:HEADER])
            if known is None:
                raise CodecError(f"unknown schema fingerprint {data[2:HEADER].hex()}")
            return *known, HEADER
        if data[0] == 0 and len(data) >= 5:
            schema_id = int.from_bytes(data[1:5], "big")
            if schema_id not in self._writers:
                self._writers[schema_id] = self._look_up(schema_id)
            return *self._writers[schema_id], 5
        raise CodecError(f"neither single-object encoded Avro nor the Confluent wire format: starts with {data[:4]!r}")

    def _look_up(self, schema_id: int) -> tuple[_Shape, Any]:
        if self._registry is None:
            raise CodecError(f"in the Confluent wire format (schema id {schema_id}), but no schema registry is configured")
        schema = self._registry(schema_id)
        name = str(schema.get("name"))
        full_name = name if "." in name else f"{schema.get('namespace', '')}.{name}"
        shape = next((s for s in _SHAPES.values() if f"durably.{s.name}" == full_name), None)
        if shape is None:
            raise CodecError(f"schema id {schema_id} is {full_name}, none of our records")
        return shape, fastavro.parse_schema(_plain(schema))


_SHAPES = {cls: _Shape(cls) for cls in RECORDS}
