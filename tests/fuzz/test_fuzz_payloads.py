"""Payloads from anybody: a value or a `SerializationError`, in little time and memory, and nothing is imported or run for it."""

from __future__ import annotations

import ast
import dataclasses
import gzip
import sys
import time
import tracemalloc
import zlib
from datetime import date, datetime, timedelta
from datetime import time as clock_time
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

import msgspec
import pytest
from durably import RegistrationError, failures, jsonable, payload_codec, payloads, serializable, step
from durably.durations import LONGEST
from durably.errors import PayloadCodecError, SerializationError
from durably.payload_codec import LARGEST, Gzip
from durably.payloads import JSON, MSGPACK
from durably.streams import Readable, Writable
from durably_schemas.records import Error, Payload
from fuzz.budget import budget
from hypothesis import given
from hypothesis import strategies as st
from msgspec.msgpack import Ext

encode = msgspec.msgpack.Encoder().encode


class Colour(Enum):
    RED = 1
    ODD = (1, 2)


@serializable(name="fuzzed-point")
@dataclasses.dataclass
class Point:
    x: int
    tags: list[str] = dataclasses.field(default_factory=list)


class Tagged(msgspec.Struct, tag=True):
    x: int


@step
async def fuzzed_step(point: Point, *, colour: Colour = Colour.RED, path: Path | None = None) -> int | None:
    return point.x


HINTS: list[Any] = [
    Any, int, float, str, bytes, bool, None, list[int], dict[str, Any], dict[int, str], tuple[int, ...], tuple[int, str],
    set[str], frozenset[int], datetime, date, clock_time, timedelta, Decimal, UUID, Path, Colour, Point, Tagged,
    int | str, Decimal | int, Point | Tagged, list[Point] | dict[str, Point], Literal["a", 1], type[Point], Readable,
    Exception, list[Path | Colour],
]  # fmt: skip

NAMES = st.sampled_from(
    [
        "fuzzed-point",
        "fuzzed_step",
        "builtins:ValueError",
        "builtins:BaseExceptionGroup",
        "x",
        "Europe/Berlin",
        "America",
    ]
)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.floats(), st.text(st.characters(exclude_categories=["Cs"]), max_size=12), NAMES,
    st.integers(-(2**63), 2**64 - 1), st.binary(max_size=12),
    st.sampled_from(["2026-01-01T00:00:00", "9999-12-31", "24:00", "1e999999999", "NaN", "sNaN", "../etc", "\0"]),
)  # fmt: skip
CODES = st.one_of(st.integers(1, 23), st.integers(-128, 127))


def _extended(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    told = st.fixed_dictionaries(
        {},
        optional={
            "type": NAMES, "message": st.text(max_size=5), "args": inner.map(encode), "made_of": inner.map(encode),
            "attributes": st.dictionaries(st.sampled_from(["args", "__class__", "__cause__", "x", ""]), inner.map(encode)),
            "notes": st.lists(st.text(max_size=3), max_size=2), "members": st.lists(inner, max_size=2), "cause": inner,
        },
    )  # fmt: skip
    contents = st.one_of(
        inner.map(encode), st.binary(max_size=8), NAMES.map(str.encode), st.tuples(NAMES, inner).map(encode), told.map(encode),
        st.lists(st.integers(-(10**15), 10**15), max_size=4).map(encode),
        st.tuples(SCALARS, SCALARS, SCALARS).map(encode), st.integers(0, 9000).map(lambda n: b"\x7f" * n),
    )  # fmt: skip
    return st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(SCALARS, inner, max_size=3),
        st.builds(Ext, CODES, contents),
    )


WRITTEN = st.recursive(SCALARS, _extended, max_leaves=12).map(encode)
"""msgpack of anything, with extension types of ours in which anything stands."""


@st.composite
def damaged(draw: st.DrawFn, whole: st.SearchStrategy[bytes] = WRITTEN) -> bytes:
    data = bytearray(draw(whole))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        data[at : draw(st.integers(at, min(len(data), at + 4)))] = draw(st.binary(max_size=5))
    return bytes(data)


BYTES = st.one_of(WRITTEN, damaged(), st.binary(max_size=40))
JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | NAMES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=12,
).map(msgspec.json.encode)
PAYLOADS = st.one_of(
    st.builds(Payload, content_type=st.just(MSGPACK), data=BYTES),
    st.builds(Payload, content_type=st.just(JSON), data=st.one_of(JSONS, damaged(JSONS), st.binary(max_size=40))),
    st.builds(
        Payload,
        content_type=st.one_of(
            st.text(max_size=30),
            st.sampled_from([f"{MSGPACK};codec=gzip", f"{JSON} ; codec=gzip,", f"{MSGPACK};codec="]),
        ),
        data=st.one_of(BYTES, BYTES.map(gzip.compress), damaged(BYTES.map(gzip.compress))),
    ),
)


@budget(1_000)
@given(PAYLOADS, st.sampled_from(HINTS))
def test_a_payload_of_any_bytes_is_a_value_or_a_serialization_error(payload: Payload, hint: Any) -> None:
    imported = set(sys.modules)
    try:
        value = payloads.load(payload, hint)
    except SerializationError as e:
        assert str(e)
    else:
        shown = jsonable.to_json(value)
        msgspec.json.decode(shown)
        try:
            payloads.dump(value, "it")
        except SerializationError as e:
            assert str(e)
    msgspec.json.decode(jsonable.to_json(payload))
    assert {name for name in set(sys.modules) - imported if not name.startswith(("zoneinfo", "_zoneinfo"))} == set()


@budget(300)
@given(PAYLOADS)
def test_arguments_of_any_bytes_fit_or_are_a_serialization_error(payload: Payload) -> None:
    try:
        args, kwargs = payloads.load_arguments(payload, fuzzed_step.fn)
    except SerializationError as e:
        assert str(e)
    else:
        assert all(isinstance(point, Point) for point in (*args, *(v for k, v in kwargs.items() if k == "point")))


ERRORS = st.recursive(
    st.none(),
    lambda cause: st.builds(
        Error,
        type=st.one_of(NAMES, st.text(max_size=10), st.sampled_from(["sys:exit", "os:error", ":", "a:b:c", "builtins:a.b"])),
        message=st.text(max_size=5),
        traceback=st.none() | st.text(max_size=5),
        data=st.none() | PAYLOADS,
        cause=cause,
    ),
    max_leaves=4,
).filter(lambda error: error is not None)  # fmt: skip


@budget(400)
@given(ERRORS)
def test_any_error_is_an_exception_and_can_be_shown_and_recorded_again(error: Error) -> None:
    exc = failures.to_exception(error)
    assert isinstance(exc, Exception)
    msgspec.json.decode(jsonable.to_json(error))
    failures.summed_up(error)
    again = failures.to_error(exc)
    assert isinstance(failures.to_exception(again), Exception)


# -- what is written comes back, or is refused -------------------------------------------------------------------------


@st.composite
def graphs(draw: st.DrawFn) -> tuple[list[Any], bool]:
    """Containers that hold each other, the first of which is given away; and whether they form a tree."""
    n = draw(st.integers(1, 6))
    nodes: list[Any] = [[] if draw(st.booleans()) else {} for _ in range(n)]
    edges = draw(st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=8))
    reached: dict[int, list[int]] = {i: [] for i in range(n)}
    for a, b in edges:
        if isinstance(nodes[a], list):
            nodes[a].append(nodes[b])
        else:
            nodes[a][len(nodes[a])] = nodes[b]
        reached[a].append(b)
    seen, open_ones, tree = {0}, [0], True
    while open_ones:
        for b in reached[open_ones.pop()]:
            tree = tree and b not in seen
            if b not in seen:
                seen.add(b)
                open_ones.append(b)
    return nodes[0], tree


@budget(300)
@given(graphs())
def test_what_is_shared_or_contains_itself_is_refused_and_all_else_comes_back(graph: tuple[Any, bool]) -> None:
    value, tree = graph
    if tree:
        assert payloads.load(payloads.dump(value, "it")) == value
    else:
        with pytest.raises(SerializationError, match=r"^it"):
            payloads.dump(value, "it")


VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.binary(), st.datetimes(),
        st.datetimes(timezones=st.timezones()), st.dates(), st.times(), st.timedeltas(), st.decimals(allow_nan=False),
        st.uuids(), st.sampled_from([Path("/a"), 10**4000, -(2**64)]),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)  # fmt: skip


@budget(300)
@given(VALUES)
def test_every_value_of_the_types_that_travel_comes_back_and_can_be_shown(value: Any) -> None:
    payload = payloads.dump(value, "it")
    assert payloads.load(payload) == value
    assert payloads.dump(payloads.load(payload), "it") == payload
    msgspec.json.decode(jsonable.to_json(value))


# -- what would take long, or much ---------------------------------------------------------------------------------


def _nested(levels: int) -> bytes:
    data = b"\xc0"
    for _ in range(levels):
        data = encode(Ext(2, b"\x91" + data))
    return data


@pytest.mark.parametrize(
    "data",
    [
        b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff",
        b"\xc9\xff\xff\xff\xff\x02", b"\xdd\x00\xff\xff\xff" * 1_000, b"\x91" * 1_000_000, b"\x81\xc0" * 500_000,
        _nested(3_000), encode(Ext(9, b"1e" + b"9" * 500_000)), encode(Ext(9, b"9" * 900_000)),
        encode(Ext(5, b"2" * 900_000)), encode([Ext(8, encode([10**18, 10**18, 10**18]))]),
    ],
    ids=lambda data: f"{data[:6].hex()}-{len(data)}",
)  # fmt: skip
@pytest.mark.parametrize("hint", [Any, int, float, str, dict[str, int]])
def test_bytes_that_promise_much_are_refused_at_little_cost(data: bytes, hint: Any) -> None:
    payload = Payload(content_type=MSGPACK, data=data)
    tracemalloc.start()
    began = time.process_time()
    try:
        payloads.load(payload, hint)
    except SerializationError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 20_000_000
    assert time.process_time() - began < 5


def test_a_bomb_of_compressed_data_is_refused_before_it_has_gone_off() -> None:
    packer = zlib.compressobj(9, wbits=31)
    bomb = b"".join([*(packer.compress(bytes(1 << 20)) for _ in range(256)), packer.flush()])
    tracemalloc.start()
    with pytest.raises(PayloadCodecError, match="larger than"):
        payload_codec.decode(Payload(content_type=f"{MSGPACK};codec=gzip", data=bomb))
    assert tracemalloc.get_traced_memory()[1] < 3 * LARGEST
    tracemalloc.stop()


def test_a_payload_goes_through_each_codec_once() -> None:
    # Else some bytes that decompress to themselves would be decompressed as often as the content type says.
    data = b"\x01" * 4_000
    twice = gzip.compress(gzip.compress(data))
    with pytest.raises(PayloadCodecError, match="twice"):
        payload_codec.decode(Payload(content_type=f"{MSGPACK};codec=gzip,gzip", data=twice))
    with pytest.raises(PayloadCodecError, match="twice"):
        payload_codec.decode(Payload(content_type=f"{MSGPACK};codec=gzip;codec=gzip", data=twice))
    assert payload_codec.decode(Payload(content_type=f"{MSGPACK};codec=gzip", data=gzip.compress(data))).data == data


@budget(200)
@given(st.one_of(st.binary(max_size=60), damaged(st.binary(max_size=60).map(gzip.compress))))
def test_gzip_gives_bytes_or_says_what_is_wrong(data: bytes) -> None:
    try:
        out = payload_codec.decode(Payload(content_type=f"{MSGPACK};codec=gzip", data=data)).data
    except PayloadCodecError as e:
        assert "gzip" in str(e)
    else:
        assert Gzip().decode(gzip.compress(out)) == out


# -- handles -----------------------------------------------------------------------------------------------------------

OPTIONS = st.one_of(
    SCALARS,
    st.fixed_dictionaries(
        {},
        optional={
            "queue": st.one_of(SCALARS, st.just("gpu")),
            "max_retries": st.one_of(SCALARS, st.integers()),
            "timeout_ms": st.one_of(SCALARS, st.integers()),
            "backoff": st.one_of(
                SCALARS,
                st.fixed_dictionaries(
                    {
                        "initial_ms": st.integers(-(2**63), 2**63 - 1),
                        "factor": st.floats(),
                        "max_ms": st.integers(0, 2**63),
                    }
                ),
            ),
            "fn": SCALARS,
            "name": SCALARS,
        },
    ),
)


@budget(300)
@given(OPTIONS)
def test_the_handle_of_a_step_has_options_that_the_step_could_have_been_given(options: Any) -> None:
    try:
        data = encode(Ext(15, encode(["fuzzed_step", options])))
    except OverflowError:
        return
    try:
        handle = payloads.load(Payload(content_type=MSGPACK, data=data))
    except SerializationError:
        return
    assert (handle.name, handle.fn) == ("fuzzed_step", fuzzed_step.fn)
    assert 0 <= handle.max_retries < 2**31
    assert all(0 <= ms <= LONGEST for ms in (handle.timeout_ms or 0, handle.backoff.initial_ms, handle.backoff.max_ms))
    assert handle.backoff.factor >= 1


def test_a_step_has_no_more_retries_than_a_record_can_count() -> None:
    with pytest.raises(RegistrationError, match="max_retries"):
        fuzzed_step.options(max_retries=2**31)


@budget(100)
@given(st.sampled_from([12, 13]), st.one_of(SCALARS, st.lists(SCALARS, max_size=3)))
def test_the_handle_of_a_stream_names_a_run_and_a_stream(code: int, content: Any) -> None:
    try:
        handle = payloads.load(Payload(content_type=MSGPACK, data=encode(Ext(code, encode(content)))))
    except SerializationError:
        return
    assert isinstance(handle, Readable | Writable)
    assert [handle.run_id, handle.namespace] == content
    assert all(isinstance(part, str) for part in content)


# -- what is shown -----------------------------------------------------------------------------------------------------


class Unshowable:
    def __str__(self) -> str:
        raise ValueError("no")

    def __hash__(self) -> int:
        return 1


@dataclasses.dataclass
class Holder:
    held: Any


HUGE = 10**5_000  # more digits than Python writes out


@pytest.mark.parametrize(
    "value",
    [HUGE, [HUGE], {HUGE: 1}, {(1, HUGE): 1}, Holder(HUGE), {frozenset([HUGE])}, Unshowable(), {Unshowable(): 1}],
    ids=["int", "list", "key", "tuple-key", "dataclass", "set", "str", "str-key"],
)  # fmt: skip
def test_whatever_a_run_holds_can_be_shown(value: Any) -> None:
    msgspec.json.decode(jsonable.to_json({"value": value, "ok": 1}))


# -- nothing runs ------------------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[2]
ROOMS = [ROOT / "schemas", ROOT / "sdk", ROOT / "processor", ROOT / "connectors"]
REFUSED_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "yaml", "jsonpickle"}
REFUSED_CALLS = {"eval", "exec", "__import__", "import_module", "find_spec"}
# Source that we have made of our own schemas; modules that a setting or the command line names, and our own, by a table.
ALLOWED = {
    ("durably_schemas/compiled.py", "exec"),
    ("durably/authoring.py", "import_module"),
    ("durably/__init__.py", "import_module"),
    ("durably/installation.py", "import_module"),
}


def _called(node: ast.AST) -> str:
    """The name of the function that a call is of; none where all it is given are constants."""
    if not isinstance(node, ast.Call) or all(isinstance(argument, ast.Constant) for argument in node.args):
        return ""
    return node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")


def test_no_package_unpickles_evaluates_or_imports_by_a_name_from_elsewhere() -> None:
    files = [(room, path) for room in ROOMS for path in room.rglob("*.py")]
    assert len(files) > 80
    found = set()
    for room, path in files:
        place = path.relative_to(room).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
                found |= {(place, name) for name in names if name.partition(".")[0] in REFUSED_MODULES}
            if (name := _called(node)) in REFUSED_CALLS:
                found.add((place, name))
    assert found == ALLOWED


def test_an_exception_of_a_module_that_is_not_imported_imports_nothing() -> None:
    assert "antigravity" not in sys.modules
    for name in ("antigravity:Error", "antigravity.x:Error", "os.path.antigravity:E"):
        assert type(failures.to_exception(Error(type=name, message="m"))).__name__ == "StepError"
    assert "antigravity" not in sys.modules
