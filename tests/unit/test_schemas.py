"""The wire contract: what is written can be read, by us, by fastavro, and by every other version."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import fastavro
import pytest
from durably_schemas import Catalogue, Codec, CodecError, records
from durably_schemas.catalogue import murmur2, partition_for
from durably_schemas.codec import RECORDS, _released, fingerprint_of, schema_of
from fuzz.avro_values import plain, values
from hypothesis import given, settings
from hypothesis import strategies as st

RELEASED = sorted((Path(__file__).parents[2] / "schemas" / "durably_schemas" / "released").iterdir())
CODEC = Codec()
NAMES = [cls.__name__ for cls in RECORDS]


@pytest.mark.parametrize("name", NAMES)
def test_our_bytes_are_fastavros_bytes(name):
    schema = plain(schema_of(name))
    parsed = fastavro.parse_schema(schema)
    header = b"\xc3\x01" + fingerprint_of(schema)

    @settings(max_examples=25, deadline=None)
    @given(values(schema, {}))
    def check(value):
        out = BytesIO()
        fastavro.schemaless_writer(out, parsed, value)
        data = header + out.getvalue()
        assert CODEC.encode(CODEC.decode(data)) == data

    check()


def test_records_have_the_fields_and_defaults_of_their_schemas():
    for cls in RECORDS:
        fields = {f["name"]: f for f in schema_of(cls.__name__)["fields"]}
        assert set(cls.__struct_fields__) == set(fields), cls


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(NAMES), st.binary(max_size=60), st.integers(0, 200))
def test_whatever_the_bytes_are_decoding_gives_a_record_or_a_codec_error(name, noise, cut):
    header = b"\xc3\x01" + fingerprint_of(schema_of(name))
    for data in (noise, header + noise, (header + noise)[:cut]):
        try:
            record = CODEC.decode(data)
        except CodecError:
            continue
        assert type(record).__name__ == name


def test_a_record_that_does_not_fit_is_refused_with_its_name():
    with pytest.raises(CodecError, match="CancelRun"):
        CODEC.encode(records.CancelRun(run_id=None, requested_at=1))  # type: ignore[arg-type]
    with pytest.raises(CodecError, match="CancelRun"):
        CODEC.encode(records.CancelRun(run_id="r", requested_at=2**64))


def test_what_an_earlier_release_wrote_is_read(monkeypatch):
    writer = schema_of("CancelRun")
    del writer["fields"][1]
    out = BytesIO()
    fastavro.schemaless_writer(
        out, fastavro.parse_schema(plain(writer)), {"run_id": "r", "requested_at": 5, "reply_to": None}
    )
    data = b"\xc3\x01" + fingerprint_of(writer) + out.getvalue()
    with pytest.raises(CodecError, match="a newer release wrote this"):
        Codec().decode(data)
    monkeypatch.setattr("durably_schemas.codec._released", lambda: {fingerprint_of(writer): writer})
    assert Codec().decode(data) == records.CancelRun(run_id="r", requested_at=5)


def test_every_release_is_known_by_its_fingerprints():
    released = [json.loads(path.read_text()) for version in RELEASED for path in version.glob("*.avsc")]
    assert all(_released()[fingerprint_of(schema)]["name"] == schema["name"] for schema in released)


def test_the_confluent_wire_format_is_read_through_a_registry():
    writer = schema_of("CancelRun")
    del writer["fields"][1]  # an older producer, that has never heard of reason
    out = BytesIO()
    fastavro.schemaless_writer(
        out, fastavro.parse_schema(plain(writer)), {"run_id": "r", "requested_at": 5, "reply_to": None}
    )
    data = b"\0" + (7).to_bytes(4, "big") + out.getvalue()
    codec = Codec(registry=lambda number: {7: writer}[number])
    assert codec.decode(data) == records.CancelRun(run_id="r", requested_at=5)
    with pytest.raises(CodecError, match="no schema registry"):
        Codec().decode(data)
    foreign = Codec(registry=lambda _: {"type": "record", "name": "Other", "namespace": "x", "fields": []})
    with pytest.raises(CodecError, match=r"x\.Other"):
        foreign.decode(data)


def resolves(reader: Any, writer: Any, readers: dict[str, Any], writers: dict[str, Any]) -> str | None:
    """Why a reader's schema cannot read what a writer's wrote (Avro 1.12, "Schema Resolution"); None when it can."""
    if isinstance(writer, list):
        reasons = [resolves(reader, branch, readers, writers) for branch in writer]
        return next((r for r in reasons if r), None)
    if isinstance(reader, list):
        reasons = [resolves(branch, writer, readers, writers) for branch in reader]
        return None if None in reasons else f"no branch for {name_of(writer)}"
    if isinstance(reader, str) and reader == writer:
        return None  # a primitive, or a named type that is compared where it is defined
    reader, writer = (
        readers.get(reader, reader) if isinstance(reader, str) else reader,
        (writers.get(writer, writer) if isinstance(writer, str) else writer),
    )
    if isinstance(reader, str) or isinstance(writer, str):
        promotions = {("int", "long"), ("int", "double"), ("long", "double"), ("string", "bytes"), ("bytes", "string")}
        same = reader == writer or (name_of(writer), name_of(reader)) in promotions
        return None if same else f"{name_of(writer)} is not {name_of(reader)}"
    kind = reader["type"]
    if kind != writer["type"]:
        return f"{name_of(writer)} is not {name_of(reader)}"
    if kind in ("array", "map"):
        part = "items" if kind == "array" else "values"
        return resolves(reader[part], writer[part], readers, writers)
    if kind not in ("record", "enum"):
        return None
    readers[name_of(reader)], writers[name_of(writer)] = reader, writer
    if name_of(reader) != name_of(writer):
        return f"{name_of(writer)} is not {name_of(reader)}"
    if kind == "enum":
        gone = set(writer["symbols"]) - set(reader["symbols"])
        return f"{name_of(reader)} lacks {gone}" if gone and "default" not in reader else None
    written = {f["name"]: f for f in writer["fields"]}
    for field in reader["fields"]:
        if field["name"] not in written:
            if "default" not in field:
                return f"{name_of(reader)}.{field['name']} has no default"
        elif reason := resolves(field["type"], written[field["name"]]["type"], readers, writers):
            return f"{name_of(reader)}.{field['name']}: {reason}"
    return None


def name_of(schema: Any) -> str:
    if isinstance(schema, str):
        return schema
    return f"{schema['namespace']}.{schema['name']}" if "name" in schema else schema["type"]


@pytest.mark.parametrize("version", RELEASED, ids=lambda p: p.name)
def test_every_version_reads_every_other(version):
    """FULL_TRANSITIVE: change a schema only in ways that old readers and old logs survive."""
    for path in sorted(version.glob("*.avsc")):
        then, now = json.loads(path.read_text()), schema_of(path.stem)
        assert resolves(now, then, {}, {}) is None, path
        assert resolves(then, now, {}, {}) is None, path


def test_the_newest_pin_is_what_is_shipped():
    """After a change: check that the test above passes, then add a folder named for the next version."""
    newest = RELEASED[-1]
    assert {p.stem for p in newest.glob("*.avsc")} == set(NAMES)
    for name in NAMES:
        assert json.loads((newest / f"{name}.avsc").read_text()) == schema_of(name)


def test_the_compatibility_check_finds_what_breaks():
    schema = schema_of("StartRun")
    without_default = json.loads(json.dumps(schema))
    without_default["fields"].append({"name": "new", "type": "string"})
    assert resolves(without_default, schema, {}, {}) is not None
    retyped = json.loads(json.dumps(schema))
    retyped["fields"][0]["type"] = "long"
    assert resolves(retyped, schema, {}, {}) is not None
    with_default = json.loads(json.dumps(schema))
    with_default["fields"].append({"name": "new", "type": "string", "default": ""})
    assert resolves(with_default, schema, {}, {}) is None
    assert resolves(schema, with_default, {}, {}) is None


def test_a_type_that_several_files_define_is_the_same_in_all():
    seen: dict[str, Any] = {}

    def shape(schema: Any) -> Any:
        """A schema by the names of the types in it; each of those is compared where it is defined."""
        if isinstance(schema, list):
            return [shape(each) for each in schema]
        if isinstance(schema, dict) and schema["type"] in ("record", "enum"):
            fields = [(f["name"], shape(f["type"]), f.get("default")) for f in schema.get("fields", [])]
            mine = fields or schema.get("symbols")
            assert seen.setdefault(name_of(schema), mine) == mine
            return name_of(schema)
        return schema

    for name in NAMES:
        shape(schema_of(name))
    assert "durably.RunStatus" in seen


def test_murmur2_is_javas():
    # Known answers of org.apache.kafka.common.utils.UtilsTest.
    answers = {b"21": -973932308, b"foobar": -790332482, b"a-little-bit-long-string": -985981536,
               b"a-little-bit-longer-string": -1486304829, b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8": -58897971}  # fmt: skip
    for key, answer in answers.items():
        assert murmur2(key) == answer & 0xFFFFFFFF
    assert partition_for(b"21", 12) == (-973932308 & 0x7FFFFFFF) % 12


def test_the_catalogue_names_every_topic_and_refuses_bad_names():
    catalogue = Catalogue("shop", 6)
    topics = {t.name: t for t in catalogue.topics(("default", "gpu"))}
    assert len(topics) == 11
    assert topics["shop.requests.gpu"].key == "step ID"
    assert topics["shop.runs"].config["cleanup.policy"] == "compact"
    assert topics["shop.events"].config["retention.ms"] == "-1"
    assert {r for t in topics.values() for r in t.records} == set(NAMES)
    for bad in ("", "a/b", "x" * 201):
        with pytest.raises(ValueError, match="letters"):
            catalogue.requests(bad)
    with pytest.raises(ValueError, match="partitions"):
        Catalogue("x", 0)
