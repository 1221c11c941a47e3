"""Bytes from anybody: the codec gives a record or a `CodecError`, in little time and little memory, and reads as fastavro does."""

from __future__ import annotations

import tracemalloc
from functools import cache
from io import BytesIO
from typing import Any

import fastavro
import pytest
from durably_schemas import Codec, CodecError
from durably_schemas import records as rec
from durably_schemas.codec import HEADER, MARKER, RECORDS, fingerprint_of, schema_of
from durably_schemas.compiled import DEPTH, varint
from fuzz.avro_values import plain, values
from fuzz.budget import budget
from hypothesis import given
from hypothesis import strategies as st

CODEC = Codec()
NAMES = [cls.__name__ for cls in RECORDS]


@cache
def parsed(name: str) -> Any:
    return fastavro.parse_schema(plain(schema_of(name)))


@cache
def header(name: str) -> bytes:
    return MARKER + fingerprint_of(schema_of(name))


@cache
def written(name: str) -> st.SearchStrategy[bytes]:
    """Valid records of a type, as fastavro writes them."""

    def write(value: Any) -> bytes:
        out = BytesIO()
        fastavro.schemaless_writer(out, parsed(name), value)
        return header(name) + out.getvalue()

    return values(plain(schema_of(name)), {}).map(write)


def _overlong(bits: int) -> bytes:
    """A varint that goes on for longer than any long does."""
    return b"\xff" * (bits // 7) + b"\x01"


LENGTHS = st.one_of(
    st.integers(-(2**63), 2**63 - 1).map(varint),
    st.sampled_from([2**31 - 1, 2**31, 2**40, 2**62, -(2**63), 2**63 - 1, -1]).map(varint),
    st.integers(64, 200).map(_overlong),
)
PIECES = st.one_of(st.binary(max_size=6), LENGTHS)


@st.composite
def damaged(draw: st.DrawFn, names: list[str] = NAMES) -> bytes:
    """A valid record in which a few places were overwritten, cut out, doubled or filled with lengths that lie."""
    data = bytearray(draw(st.sampled_from(names).flatmap(written)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        upto = draw(st.integers(at, min(len(data), at + 12)))
        data[at:upto] = draw(st.one_of(PIECES, st.just(bytes(data[at:upto]) * 2)))
    return bytes(data)


@budget(400)
@given(st.one_of(damaged(), st.builds(lambda name, body: header(name) + body, st.sampled_from(NAMES), st.binary())))
def test_damaged_bytes_are_a_record_or_a_codec_error_and_what_is_read_fastavro_reads_alike(data: bytes) -> None:
    try:
        record = CODEC.decode(data)
    except CodecError:
        return
    body = BytesIO(data[HEADER:])
    name = type(record).__name__
    alike = BytesIO()
    fastavro.schemaless_writer(
        alike, parsed(name), fastavro.schemaless_reader(body, parsed(name), None, return_record_name=True)
    )
    assert CODEC.encode(record)[HEADER:] == alike.getvalue()
    assert not body.read()


@budget(150)
@given(damaged())
def test_lengths_that_lie_take_no_memory(data: bytes) -> None:
    tracemalloc.start()
    try:
        CODEC.decode(data)
    except CodecError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1_000_000 + 100 * len(data)


@budget(60)
@given(st.sampled_from(NAMES).flatmap(written))
def test_a_record_that_is_cut_off_anywhere_is_refused(data: bytes) -> None:
    for end in range(len(data)):
        with pytest.raises(CodecError):
            CODEC.decode(data[:end])
    with pytest.raises(CodecError, match="left over"):
        CODEC.decode(data + b"\0")


@budget(200)
@given(st.binary(min_size=8, max_size=8), st.binary(max_size=40))
def test_an_unknown_fingerprint_is_named(fingerprint: bytes, body: bytes) -> None:
    with pytest.raises(CodecError, match=f"unknown schema fingerprint {fingerprint.hex()}"):
        CODEC.decode(MARKER + fingerprint + body)


def test_a_long_has_64_bits() -> None:
    def command(requested_at: bytes) -> bytes:
        return header("CancelRun") + b"\x02r\0" + requested_at + b"\0"

    assert CODEC.decode_as(rec.CancelRun, command(b"\xff" * 9 + b"\x01")).requested_at == -(2**63)
    for beyond in (b"\xff" * 9 + b"\x03", b"\xff" * 9 + b"\x7f", b"\x80" * 10 + b"\x01", b"\x80" * 10 + b"\x00"):
        with pytest.raises(CodecError, match="64 bits"):
            CODEC.decode(command(beyond))


def failed(depth: int) -> rec.RunSummary:
    """The summary of a run whose error has a cause that has one, and so on."""
    error: rec.Error | None = None
    for _ in range(depth):
        error = rec.Error(type="T", message="m", cause=error)
    return rec.RunSummary(run_id="r", workflow="w", status="failed", created_at=0, events=1, error=error)


def failed_bytes(depth: int) -> bytes:
    """The same, without a writer that might refuse it."""
    flat = CODEC.encode(failed(1))
    error = b"\x02T\x02m\0\0\0"
    at = flat.index(error)
    return flat[:at] + (error[:-1] + b"\x02") * (depth - 1) + error + flat[at + len(error) :]


def test_causes_may_nest_to_one_depth_wherever_they_are_read() -> None:
    assert CODEC.decode(failed_bytes(DEPTH)) == failed(DEPTH)
    assert CODEC.encode(failed(DEPTH)) == failed_bytes(DEPTH)
    for depth in (DEPTH + 1, 500, 150_000):
        with pytest.raises(CodecError, match="nested deeper"):
            CODEC.decode(failed_bytes(depth))
    for depth in (DEPTH + 1, 5_000):
        with pytest.raises(CodecError, match="nested deeper"):
            CODEC.encode(failed(depth))


# -- the Confluent wire format -----------------------------------------------------------------------------------------


@cache
def older(name: str, left_out: frozenset[str]) -> Any:
    """The schema of a writer that does not know some of the fields with a default."""
    schema = plain(schema_of(name))
    schema["fields"] = [f for f in schema["fields"] if not (f["name"] in left_out and "default" in f)]
    return schema


def registered(name: str, left_out: frozenset[str] = frozenset()) -> Codec:
    return Codec(registry=lambda _: older(name, left_out))


PREFIX = b"\0" + (7).to_bytes(4, "big")


@budget(60)
@given(st.data(), st.sampled_from(NAMES))
def test_what_another_version_wrote_is_read_or_refused(data: st.DataObject, name: str) -> None:
    optional = [f["name"] for f in schema_of(name)["fields"] if "default" in f]
    left_out = data.draw(st.frozensets(st.sampled_from(optional), max_size=1) if optional else st.just(frozenset()))
    codec = registered(name, left_out)
    schema = older(name, left_out)
    if _is_whole(schema):
        value = data.draw(values(schema, {}))
        out = BytesIO()
        fastavro.schemaless_writer(out, fastavro.parse_schema(schema), value)
        record = codec.decode(PREFIX + out.getvalue())
        assert type(record).__name__ == name
        assert CODEC.decode(CODEC.encode(record)) == record
    noise = data.draw(st.one_of(st.binary(max_size=60), damaged([name]).map(lambda b: b[HEADER:])))
    try:
        record = codec.decode(PREFIX + noise)
    except CodecError:
        return
    assert type(record).__name__ == name


def _is_whole(schema: Any) -> bool:
    """Whether every type that it refers to is still defined in it: a field that was left out may have done so."""
    try:
        fastavro.parse_schema(schema)
    except fastavro.schema.UnknownType:
        return False
    return True


def test_another_versions_record_may_be_nested_however_deep_it_likes() -> None:
    codec = registered("RunSummary", frozenset({"hooks"}))
    for depth in (DEPTH + 1, 500, 5_000, 150_000):  # in fastavro's compiled reader the third ends the process
        with pytest.raises(CodecError):
            codec.decode(PREFIX + failed_bytes(depth)[HEADER:-1])
    assert codec.decode(PREFIX + failed_bytes(DEPTH)[HEADER:-1]) == failed(DEPTH)


JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "fields", "name"]), inner),
    max_leaves=8,
)


@budget(150)
@given(JSONS, st.binary(max_size=20))
def test_a_registry_that_gives_no_schema_of_ours_is_a_codec_error(fields: Any, body: bytes) -> None:
    codec = Codec(registry=lambda _: {"type": "record", "name": "CancelRun", "namespace": "durably", "fields": fields})
    with pytest.raises(CodecError):
        codec.decode(PREFIX + body)
