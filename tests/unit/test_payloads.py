"""What travels comes back the same; what cannot is named by its path."""

import contextlib
import dataclasses
import math
import subprocess
import sys
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum, StrEnum
from typing import Any
from uuid import UUID

import msgspec
import pytest
from durably import payloads
from durably.errors import SerializationError
from durably.payloads import JSON, MSGPACK, dump, dump_arguments, fingerprint, load, load_arguments
from durably.streams import Writable
from durably_schemas.records import Payload
from hypothesis import given
from hypothesis import strategies as st

zones = st.none() | st.timedeltas(min_value=timedelta(hours=-23), max_value=timedelta(hours=23)).map(timezone)
scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
    | st.datetimes(timezones=zones) | st.dates() | st.times(timezones=zones) | st.timedeltas()
    | st.decimals(allow_nan=False) | st.uuids()
)  # fmt: skip
hashables = st.recursive(
    scalars, lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=4), max_leaves=6
)
values = st.recursive(
    hashables,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(hashables, inner, max_size=4)
        | st.tuples(inner, inner)
        | st.sets(hashables, max_size=4)
    ),
    max_leaves=12,
)


def same(a: Any, b: Any) -> bool:
    """Equal, and of equal types all the way down; sets and keys by membership."""
    if type(a) is not type(b):
        return False
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    return a == b


@given(values)
def test_a_value_comes_back_as_it_was(value):
    assert same(load(dump(value, "it")), value)


@given(st.lists(hashables, unique=True, max_size=6))
def test_equal_sets_have_equal_bytes(items):
    other: set[Any] = set()
    for item in reversed(items):
        other.add(item)
    assert dump(set(items), "it") == dump(other, "it")


def test_bytes_do_not_depend_on_the_hash_seed():
    code = (
        "from durably.payloads import dump; import sys;"
        "sys.stdout.write(dump({'a', 'b', 'c', ('d', frozenset('xyz'))}, 'it').data.hex())"
    )
    outs = {
        subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": s}, capture_output=True, check=True).stdout
        for s in ("1", "2")
    }
    assert len(outs) == 1


def test_not_a_number_and_infinities_travel():
    nan, inf = load(dump([math.nan, -math.inf], "it"))
    assert math.isnan(nan)
    assert inf == -math.inf


@dataclasses.dataclass
class Line:
    sku: str
    price: Decimal
    tags: set[str] = dataclasses.field(default_factory=set)


class Order(msgspec.Struct):
    lines: list[Line]
    at: datetime


class Tagged(msgspec.Struct, tag=True, array_like=True):
    x: int


class Colour(Enum):
    RED = "red"


class Size(StrEnum):
    BIG = "big"


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (Line("a", Decimal("1.50"), {"x"}), Line),
        (Order([Line("a", Decimal(1))], datetime(2024, 1, 1, tzinfo=UTC)), Order),
        (Tagged(3), Tagged),
        ([Colour.RED, Size.BIG], tuple[Colour, Size]),
        ({UUID(int=1): date(2024, 1, 1)}, dict[UUID, date]),
        (1 << 70, int),
        ((1, "a"), tuple[int, str]),
        (Writable("run", "out"), Writable),
        ([Writable("run", "out")], list[Writable]),
    ],
)
def test_annotations_bring_the_types_back(value, hint):
    back = load(dump(value, "it"), hint)
    assert back == (tuple(value) if hint == tuple[Colour, Size] else value)


def test_without_annotation_objects_are_dicts_and_enums_their_values():
    assert load(dump([Line("a", Decimal("1.5"), {"x"}), Colour.RED, Tagged(1)], "it")) == [
        {"sku": "a", "price": Decimal("1.5"), "tags": {"x"}},
        "red",
        ["Tagged", 1],
    ]


def test_json_is_converted_by_annotation_and_else_taken_as_it_is():
    text = b'{"lines": [{"sku": "a", "price": "1.5"}], "at": "2024-01-01T00:00:00Z"}'
    payload = Payload(content_type="application/json; charset=utf-8", data=text)
    assert load(payload, Order) == Order([Line("a", Decimal("1.5"))], datetime(2024, 1, 1, tzinfo=UTC))
    assert load(payload)["at"] == "2024-01-01T00:00:00Z"
    assert load(Payload(content_type=JSON, data=b'{"1": "AQ=="}'), dict[int, bytes]) == {1: b"\1"}


def cyclic() -> list[Any]:
    inner: dict[str, Any] = {}
    inner["back"] = [inner]
    return [0, inner]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": [1, {2, object}]}, r"it\['a'\]\[1\]"),
        ([Line("a", object())], r"it\[0\]\.price: <object object"),  # type: ignore[arg-type]
        (cyclic(), r"it\[1\]\['back'\]\[0\]: contains itself"),
        ({(1, object()): 2}, r"it\[.*\]\[1\]: <object object"),
        ({Line: 1}, "it"),
        ("\ud800", "not valid Unicode"),
        (lambda: 0, "<function"),
    ],
)
def test_what_cannot_travel_is_named_by_its_path_and_the_remedy(value, message):
    with pytest.raises(SerializationError, match=message):
        dump(value, "it")


def test_nesting_is_bounded():
    deep: list[Any] = []
    for _ in range(payloads.DEPTH):
        deep = [deep]
    with pytest.raises(SerializationError, match="nested deeper"):
        dump(deep, "it")


def test_shared_references_are_copied():
    shared = [1]
    a, b = load(dump([shared, shared], "it"))
    assert a == b == [1]
    assert a is not b


@given(st.binary(max_size=40), st.sampled_from([MSGPACK, JSON, "text/plain", ""]))
def test_bytes_from_anywhere_are_read_or_refused(data, content_type):
    with contextlib.suppress(SerializationError):
        load(Payload(content_type=content_type, data=data))


@given(st.integers(-128, 127), st.binary(max_size=12))
def test_extensions_from_anywhere_are_read_or_refused(code, data):
    with contextlib.suppress(SerializationError):
        load(Payload(content_type=MSGPACK, data=msgspec.msgpack.encode(msgspec.msgpack.Ext(code, data))))


def charge(order: Line, cents: int = 0, /, *more: date, currency: str = "EUR", **labels: int) -> str:
    return f"{order}{cents}{more}{currency}{labels}"


def test_arguments_come_back_converted():
    payload = dump_arguments(charge, (Line("a", Decimal(1)), 2, date(2024, 1, 1)), {"currency": "USD", "x": 1}, "c")
    args, kwargs = load_arguments(payload, charge)
    assert args == [Line("a", Decimal(1)), 2, date(2024, 1, 1)]
    assert kwargs == {"currency": "USD", "x": 1}
    assert payloads.result_type(charge) is str


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((), {}, r"charge\(\): missing a required argument: 'order'"),
    ],
)
def test_arguments_are_checked_against_the_signature(args, kwargs, message):
    with pytest.raises(TypeError, match=message):
        dump_arguments(charge, args, kwargs, "c")


@pytest.mark.parametrize(
    ("args", "kwargs", "path"),
    [
        (({"items": [1, object()]},), {}, r"the call of charge: argument 'order'\['items'\]\[1\]: <object"),
        ((Line("a", object()),), {}, r"argument 'order'\.price"),  # type: ignore[arg-type]
        ((1, 2, 3, object()), {}, r"argument '\*more'\[1\]: "),
        ((1,), {"currency": object()}, r"argument 'currency': "),
    ],
)
def test_an_argument_that_cannot_travel_is_named(args, kwargs, path):
    with pytest.raises(SerializationError, match=path):
        dump_arguments(charge, args, kwargs, "the call of charge")


def of(text: str) -> Payload:
    return Payload(content_type=JSON, data=text.encode())


def greet(name: str, times: int = 1) -> None: ...


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('["Ada", 2]', (["Ada", 2], {})),
        ('{"name": "Ada"}', ([], {"name": "Ada"})),
    ],
)
def test_json_arguments_by_position_and_by_name(text, found):
    assert load_arguments(of(text), greet) == found


def test_json_null_means_no_arguments():
    assert load_arguments(of("null"), lambda: None) == ([], {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("null", "'name'"),
        ('["Ada", "two"]', "'times'"),
        ('{"name": "Ada", "age": 3}', "'age'"),
        ("3", "a list"),
        ("[", "not readable"),
    ],
)
def test_arguments_that_do_not_fit_name_the_parameter(text, message):
    with pytest.raises(SerializationError, match=message):
        load_arguments(of(text), greet)


def test_an_annotation_that_cannot_be_evaluated_leaves_the_others():
    def fn(a: "Missing", b: date) -> None: ...  # noqa: F821

    assert load_arguments(of('["x", "2024-01-01"]'), fn) == (["x", date(2024, 1, 1)], {})


def test_fingerprints_tell_name_type_and_data_apart():
    p = Payload(content_type=JSON, data=b"1")
    prints = {
        fingerprint("a", p),
        fingerprint("b", p),
        fingerprint("a", Payload(content_type=MSGPACK, data=b"1")),
        fingerprint("a", Payload(content_type=JSON, data=b"2")),
    }
    assert len(prints) == 4
    assert all(len(f) == 16 and int(f, 16) >= 0 for f in prints)
    assert fingerprint("a", p) == fingerprint("a", p)


def test_naive_times_stay_naive():
    assert load(dump(time(1, 2, 3, 4), "it")) == time(1, 2, 3, 4)
