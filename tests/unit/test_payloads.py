"""What travels comes back the same; what cannot is named by its path."""

import contextlib
import dataclasses
import math
import subprocess
import sys
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Collection, Container, Iterable
from datetime import UTC, date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from enum import Enum, StrEnum
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Annotated, Any, Literal, NamedTuple, TypedDict
from uuid import UUID
from zoneinfo import ZoneInfo

import msgspec
import pydantic
import pytest
from durably import failures, payload_types, payloads, step, workflow
from durably.client import AsyncRun
from durably.conversion import hints_of
from durably.errors import RecordTooLarge, SerializationError
from durably.payloads import JSON, MSGPACK, dump, dump_arguments, fingerprint, load, load_arguments
from durably.streams import Readable, Writable
from durably_schemas.records import Payload
from hypothesis import given
from hypothesis import strategies as st

zones = st.none() | st.timedeltas(min_value=timedelta(hours=-23), max_value=timedelta(hours=23)).map(timezone)
names = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
paths = st.builds(Path, names) | st.builds(PurePosixPath, names) | st.builds(PureWindowsPath, names)
scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
    | st.datetimes(timezones=zones) | st.dates() | st.times(timezones=zones) | st.timedeltas()
    | st.decimals(allow_nan=False) | st.uuids() | paths
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


@pytest.mark.parametrize(
    "value",
    [
        datetime(2024, 10, 27, 2, 30, tzinfo=ZoneInfo("Europe/Berlin"), fold=1),
        datetime(2024, 10, 27, 2, 30, tzinfo=ZoneInfo("Europe/Berlin")),
        datetime(2024, 7, 1, tzinfo=ZoneInfo("UTC")),
        datetime(2024, 7, 1, 1, fold=1),
        datetime(2024, 7, 1, 1, tzinfo=timezone(timedelta(hours=2, minutes=3)), fold=1),
        time(2, 30, tzinfo=ZoneInfo("Europe/Berlin")),
        time(2, 30, tzinfo=ZoneInfo("Europe/Berlin"), fold=1),
        time(2, 30, fold=1),
        time(2, 30, tzinfo=timezone(timedelta(hours=2, minutes=3)), fold=1),
    ],
)
def test_time_zones_come_back_by_name_and_folds_with_them(value):
    back = load(dump(value, "it"))
    assert (back, back.fold, back.utcoffset(), back.tzinfo) == (value, value.fold, value.utcoffset(), value.tzinfo)
    assert type(back.tzinfo) is type(value.tzinfo)


def test_a_time_zone_that_is_unknown_here_is_named():
    data = dump(datetime(2024, 7, 1, tzinfo=ZoneInfo("Europe/Berlin")), "it").data.replace(b"Berlin", b"Atlant")
    with pytest.raises(SerializationError, match=r"'Europe/Atlant' is unknown here: .* tzdata"):
        load(Payload(content_type=MSGPACK, data=data))


@pytest.mark.parametrize("raw", [bytearray(b"ab"), memoryview(b"ab"), memoryview(b"xaxb")[1::2]])
def test_raw_data_come_back_as_bytes(raw):
    assert load(dump([raw, raw], "it")) == [b"ab", b"ab"]


def test_integers_have_no_bound():
    for value in (1 - (1 << 50_000), 1 << 64, -(1 << 63) - 1, 255 << 64):
        assert load(dump(value, "it")) == value


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
        (-(1 << 63) - 1, int),
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


class Point(NamedTuple):
    x: int
    y: int = 0


class Row(TypedDict):
    id: UUID
    due: date | None


@dataclasses.dataclass
class Cat:
    lives: int


@dataclasses.dataclass
class Dog:
    name: str


@pytest.mark.parametrize(
    ("text", "hint", "found"),
    [
        ('"2024-01-02"', date, date(2024, 1, 2)),
        ('"PT90S"', timedelta, timedelta(seconds=90)),
        ('"1.50"', Decimal, Decimal("1.50")),
        ('["AQI="]', list[bytes], [b"\1\2"]),
        ('"a/b"', Path, Path("a/b")),
        ('"red"', Colour, Colour.RED),
        ('"a"', Literal["a", "b"], "a"),
        ("[1]", Point, Point(1)),
        ('{"id": "00000000-0000-0000-0000-000000000001", "due": null}', Row, {"id": UUID(int=1), "due": None}),
        ('{"1": ["2024-01-02"]}', dict[int, set[date]], {1: {date(2024, 1, 2)}}),
        ('[{"name": "Rex"}, {"lives": 9}]', list[Cat | Dog], [Dog("Rex"), Cat(9)]),
        ('{"a": [{"lives": 9}, null]}', dict[str, tuple[Cat | Dog | None, ...]], {"a": (Cat(9), None)}),
        ('[{"lives": 9}, 1]', tuple[Cat | Dog, int], (Cat(9), 1)),
        ('"x"', Annotated[Path | int, "of a file, or its descriptor"], Path("x")),
        ("3", Path | int, 3),
    ],
)
def test_json_becomes_what_the_annotation_says(text, hint, found):
    back = load(Payload(content_type=JSON, data=text.encode()), hint)
    assert back == found
    assert type(back) is type(found)


@pytest.mark.parametrize(
    ("text", "hint", "message"),
    [
        (
            '{"lines": [{"sku": 1, "price": 1}], "at": "2024-01-01"}',
            Order,
            r"the value\.lines\[0\]\.sku does not fit Order",
        ),
        ('[{"name": 1}]', list[Cat | Dog], r"the value\[0\] does not fit .*Cat.*the value\[0\]\.name does not fit Dog"),
        ("[1]", tuple[Cat | Dog, int], "has 1 items"),
        ("3", list[Cat | Dog], "got int"),
        ("3", dict[str, Cat | Dog], "got int"),
        ('"x"', Literal["a"], "'x'"),
        ("3", Path, "expected Path, got int"),
    ],
)
def test_a_misfit_is_named_by_its_path(text, hint, message):
    with pytest.raises(SerializationError, match=message):
        load(Payload(content_type=JSON, data=text.encode()), hint)


def test_a_text_is_no_base64_where_msgpack_has_bytes():
    with pytest.raises(SerializationError, match="Expected `bytes`, got `str`"):
        load(dump("AQ==", "it"), bytes)


def test_annotations_that_nothing_can_be_held_against_are_left_alone():
    assert load(dump([1], "it"), Iterable[int]) == [1]
    assert load(dump(step_of_this_file, "it"), Callable[[int], int]) is step_of_this_file


class Email(pydantic.BaseModel):
    address: str = pydantic.Field(alias="e-mail")

    @pydantic.computed_field
    @property
    def domain(self) -> str:
        return self.address.partition("@")[2]


def test_pydantic_models_are_read_by_field_and_by_alias():
    email = Email.model_validate({"e-mail": "a@b.org"})
    assert load(dump([email], "it"), list[Email]) == [email]
    assert load(Payload(content_type=JSON, data=b'{"e-mail": "a@b.org"}'), Email) == email


@step
async def step_of_this_file(x: int) -> int:
    return x


@workflow
async def workflow_of_this_file() -> None: ...


def test_steps_and_workflows_are_found_by_name():
    assert load(dump([step_of_this_file, step_of_this_file], "it")) == [step_of_this_file] * 2
    assert load(dump(workflow_of_this_file, "it")) is workflow_of_this_file


def test_a_step_keeps_its_options():
    other = step_of_this_file.options(queue="gpu", timeout="3s", backoff="2s")
    back = load(dump(other, "it"))
    assert (back.fn, back.queue, back.timeout_ms, back.backoff, back.max_retries) == (
        other.fn, "gpu", 3000, other.backoff, 3,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (step_of_this_file, "no step named 'step_of_thiz_file' is registered here: load the module"),
        (workflow_of_this_file, "no workflow named 'workflow_of_thiz_file' is registered here"),
    ],
)
def test_what_is_not_registered_here_is_named(value, message):
    data = dump(value, "it").data.replace(b"_this_", b"_thiz_")
    with pytest.raises(SerializationError, match=message):
        load(Payload(content_type=MSGPACK, data=data))


class Handle:
    __durably_run_handle__ = True

    def __init__(self, run_id: str) -> None:
        self.id = run_id


def test_a_run_travels_as_its_id(monkeypatch):
    monkeypatch.setattr(payload_types, "run_handle", Handle)
    one = Handle("run-1")
    back = load(dump([one, one], "it"), list[AsyncRun[str]])
    assert [(type(run), run.id) for run in back] == [(Handle, "run-1")] * 2


def test_streams_travel_as_their_names():
    both = [Readable("run-1", "out"), Writable("run-1", "out")]
    back = load(dump(both, "it"))
    assert list(map(type, back)) == [Readable, Writable]
    assert back == both


class Declined(Exception):
    def __init__(self, *, code: int) -> None:
        super().__init__(f"code {code}")
        self.code = code


def test_exceptions_are_values():
    try:
        raise Declined(code=5) from KeyError("a")
    except Declined as e:
        e.add_note("on Friday")
        error = e
    group = ExceptionGroup("all", [error, ExceptionGroup("some", [ValueError(1)])])
    back = load(dump({"results": [1, group]}, "it"))["results"][1]
    declined = back.exceptions[0]
    assert (type(declined), declined.code, str(declined)) == (Declined, 5, "code 5")
    assert declined.__notes__ == ["on Friday"], "and not where it was raised"
    assert (type(declined.__cause__), declined.__cause__.args) == (KeyError, ("a",))
    assert back.exceptions[1].exceptions[0].args == (1,)


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


@dataclasses.dataclass(frozen=True)
class Price:
    cents: int


@dataclasses.dataclass(frozen=True)
class Basket:
    prices: list[int]


def shared(thing: Any) -> list[Any]:
    return [thing, {"again": thing}]


@pytest.mark.parametrize(
    ("value", "first", "second"),
    [
        (shared([]), r"\[0\]", r"it\[1\]\['again'\]"),
        (shared({1}), r"\[0\]", r"it\[1\]\['again'\]"),
        (shared({"a": 1}), r"\[0\]", r"it\[1\]\['again'\]"),
        (shared(Line("a", Decimal(1))), r"\[0\]", r"it\[1\]\['again'\]"),
        (shared(Order([], datetime(2024, 1, 1))), r"\[0\]", r"it\[1\]\['again'\]"),
        (shared(ValueError("x")), r"\[0\]", r"it\[1\]\['again'\]"),
        (shared(Basket([1])), r"\[0\]\.prices", r"it\[1\]\['again'\]\.prices"),
        (shared(([1], 2)), r"\[0\]\[0\]", r"it\[1\]\['again'\]\[0\]"),
        ({(1, 2): (a := [1]), "b": a}, r"\[\(1, 2\)\]", r"it\['b'\]"),
    ],
)
def test_what_is_mutable_may_stand_in_one_place_only(value, first, second):
    with pytest.raises(SerializationError, match=rf"{second}: appears twice, first at {first}; .* pass a copy"):
        dump(value, "it")


@pytest.mark.parametrize(
    "thing",
    [
        "a", 1 << 80, b"b", (), (1, ("x",)), frozenset({1}), Decimal(1), date(2024, 1, 1), Colour.RED, Price(1),
        Writable("run", "out"), Path("a"), None,
    ],
)  # fmt: skip
def test_what_is_immutable_may_stand_anywhere(thing):
    dump(shared(thing), "it")


def test_what_an_enum_holds_is_no_part_of_the_value():
    class Listed(Enum):
        A = [1]  # noqa: RUF012

    assert load(dump([Listed.A, Listed.A], "it")) == [[1], [1]]


def test_temporaries_are_not_taken_for_each_other():
    made = dataclasses.make_dataclass(
        "Fresh", ["items"], namespace={"items": property(lambda self: [1, 2])}, init=False
    )
    assert load(dump([made() for _ in range(50)], "it")) == [{"items": [1, 2]}] * 50


def test_arguments_that_share_are_named_by_their_parameters():
    lines = [1]
    with pytest.raises(SerializationError, match=r"the call: argument 'b'\['x'\]: appears twice, first at 'a';"):
        dump_arguments(lambda a, b: None, (lines, {"x": lines}), {}, "the call")
    with pytest.raises(SerializationError, match=r"argument 'b': appears twice, first at 'a'\[0\];"):
        dump_arguments(lambda a, b: None, ([lines],), {"b": lines}, "the call")


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


def counts() -> dict[str, int]: ...
def finds() -> Line | None: ...
def says(): ...


def test_a_result_is_checked_where_it_arises():
    assert load(payloads.dump_result(counts, {"a": 1}, "it")) == {"a": 1}
    assert load(payloads.dump_result(finds, Line("a", Decimal(1)), "it"))["sku"] == "a"
    assert load(payloads.dump_result(says, (1,), "it")) == (1,)
    with pytest.raises(SerializationError, match=r"the result of step x\[...\] does not fit dict\[str, int\]: .*`str`"):
        payloads.dump_result(counts, {"a": "b"}, "the result of step x")
    with pytest.raises(SerializationError, match=r"the result of step x\.sku does not fit"):
        payloads.dump_result(finds, Line(1, Decimal(1)), "the result of step x")  # type: ignore[arg-type]
    with pytest.raises(SerializationError, match="<object object"):
        payloads.dump_result(says, object(), "it")


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


@pytest.mark.parametrize("code", [2, 4, 11, 17, 19])
def test_nesting_from_anywhere_is_bounded(code):
    data = b"\x90"
    for _ in range(2000):
        data = msgspec.msgpack.encode([msgspec.msgpack.Ext(code, data)])
    with pytest.raises(SerializationError):
        load(Payload(content_type=MSGPACK, data=data))


def test_what_is_too_large_is_told_in_the_same_words_everywhere():
    error = RecordTooLarge.of("the result of step x", 2_000_000, 1_000_000)
    assert str(error).startswith("the result of step x takes 2,000,000 bytes, and a record holds 1,000,000: keep large")
    assert "reference" in str(error)
    assert "message.max.bytes" in str(error)


class Seasonal(tzinfo):
    """Without a date it has no offset."""

    def utcoffset(self, dt: datetime | None) -> timedelta | None:
        return None if dt is None else timedelta(hours=1)


def test_a_time_whose_zone_has_no_name_is_refused():
    with pytest.raises(SerializationError, match="has a zone without a name"):
        dump(time(10, tzinfo=Seasonal()), "it")


@dataclasses.dataclass(frozen=True)
class Point:
    x: int


class Solid(msgspec.Struct, frozen=True):
    x: int


class Listed(Enum):
    ONE = (1, [2])


class Pair(NamedTuple):
    point: Any
    n: int


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({Point(1)}, r"it\[0\]: "),
        (frozenset({(1, (Point(1), 2))}), r"it\[0\]\[1\]\[0\]: "),
        ({"a": {(Point(1),): 1}}, r"it\['a'\]\[\(Point\(x=1\),\)\]\[0\]: "),
        ({Pair(Point(1), 2): 1}, r"it\[.*\]\[0\]: "),
        ({Listed.ONE}, r"it\[0\]\[1\]: "),
        ({1: {Solid(1)}}, r"it\[1\]\[0\]: "),
    ],
)
def test_what_would_come_back_without_a_hash_is_no_key_and_no_member(value, path):
    with pytest.raises(SerializationError, match=rf"^{path}.*can be no key and no member of a set; .*@serializable"):
        dump(value, "it")


def test_keys_come_late_and_nested_without_being_written_again_and_again():
    value: dict[Any, Any] = {}
    for _ in range(100):
        value = {"inner": value, "n": 1, (1, 2): 3, "more": 4}
    assert same(load(dump(value, "it")), value)
    value[(1, 2)] = value
    with pytest.raises(SerializationError, match="contains itself"):
        dump(value, "it")


@pytest.mark.parametrize("key", [2**70, -(2**70), 2**64, -(2**63) - 1])
def test_keys_are_integers_of_any_size(key):
    assert load(dump({"a": 1, key: 2, 5: 3}, "it")) == {"a": 1, key: 2, 5: 3}


def caught(line: str) -> Exception:
    try:
        exec(f"{line}raise ValueError('no money')")
    except ValueError as e:
        return e
    raise AssertionError


def test_where_an_exception_was_raised_is_no_part_of_a_steps_input():
    def notify(e: Any) -> None: ...

    first, later = caught(""), caught("\n\n")
    again = failures.to_exception(failures.to_error(first))
    again.__cause__ = failures.to_exception(failures.to_error(later))
    found = [payloads.plain_arguments(notify, (e,), {}, "it") for e in (first, later)]
    assert found[0] == found[1]
    back = load_arguments(payloads.plain_arguments(notify, (again,), {}, "it"), notify)[0][0]
    assert (type(back), back.args, type(back.__cause__)) == (ValueError, ("no money",), ValueError)
    assert not hasattr(back, "__notes__")
    assert not hasattr(back.__cause__, "__notes__")


@dataclasses.dataclass
class Card:
    amount: int


@dataclasses.dataclass
class Refund:
    amount: int


@dataclasses.dataclass
class Transfer:
    amount: int
    iban: str = "none"


@dataclasses.dataclass
class Wire:
    amount: int
    iban: int


class Cheque(msgspec.Struct, rename={"amount": "sum"}):
    amount: int
    number: int = 0


class Model(pydantic.BaseModel):
    amount: int
    when: date = date(2030, 1, 1)


class Voucher(TypedDict):
    amount: int
    code: str


@pytest.mark.parametrize("value", [Card(5), Transfer(5, "DE1"), Transfer(5), Cheque(5, 2), Model(amount=5)])
def test_a_union_of_classes_loses_nothing(value):
    def pay(
        how: Card | Transfer | Cheque | Model, more: list[Transfer | Card] | None
    ) -> Card | Transfer | Cheque | Model: ...

    assert load_arguments(dump_arguments(pay, (value, [Transfer(1, "a"), Card(2)]), {}, "c"), pay) == (
        [value, [Transfer(1, "a"), Card(2)]],
        {},
    )
    assert load(payloads.dump_result(pay, value, "r"), payloads.result_type(pay)) == value


@pytest.mark.parametrize(
    ("value", "hint", "found"),
    [
        ({"amount": 5, "iban": "a"}, Card | Transfer, Transfer(5, "a")),
        ([{"amount": 5, "iban": "a"}], list[Card] | list[Transfer], [Transfer(5, "a")]),
        ({"a": {"amount": 5, "iban": "a"}}, dict[str, Card] | dict[str, Transfer], {"a": Transfer(5, "a")}),
        ([1, {"amount": 5, "iban": "a"}], tuple[int, Card] | tuple[int, Transfer], (1, Transfer(5, "a"))),
        ({"amount": 5}, dict | Card, Card(5)),
        ({"amount": 5, "more": 1}, Card | dict[str, int], {"amount": 5, "more": 1}),
        ({"amount": 5, "more": 1}, Card | Path, Card(5)),
        ({"amount": 5, "code": "c"}, Card | Voucher, {"amount": 5, "code": "c"}),
        ({"amount": 5, "code": "c"}, Annotated[Card, "x"] | Voucher | None, {"amount": 5, "code": "c"}),
        ([1], list[int] | set[Card] | tuple[float, ...], [1]),
    ],
)
def test_of_a_union_that_is_taken_which_has_all_fields(value, hint, found):
    assert load(dump(value, "it"), hint) == found


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        ({"amount": 5}, Card | Refund, r"Card and Refund fit; mark the classes @serializable"),
        ({"amount": 5, "iban": "a", "x": 1}, Card | Transfer, "no option has all of its fields"),
        ({"amount": 5, "iban": "a"}, Card | Wire, "no option has all of its fields"),
        ([{"amount": 5}], list[Card] | list[Refund], r"list\[Card\] and list\[Refund\] fit"),
    ],
)
def test_a_union_that_does_not_tell_is_refused(value, hint, message):
    with pytest.raises(SerializationError, match=f"ambiguous for .*{message}"):
        load(dump(value, "it"), hint)


def test_a_result_that_its_annotation_does_not_tell_apart_is_refused():
    def pays() -> Card | Refund: ...

    with pytest.raises(SerializationError, match="ambiguous"):
        payloads.dump_result(pays, Refund(1), "the result")


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ([Card(1)], Iterable[Card]),
        ((Card(1), Transfer(2, "a")), Iterable[Card | Transfer]),
        ([Card(1)], Collection[Card]),
        ([Card(1)], Container[Card]),
        ({"a": [Card(1)]}, dict[str, Iterable[Card]]),
        (OrderedDict(b=1, a=2), OrderedDict),
        (OrderedDict(b=Card(1)), OrderedDict[str, Card]),
        (Counter("aab"), Counter[str]),
        (Counter("aab"), Counter),
        (defaultdict(int, a=1), defaultdict[str, int]),
        (defaultdict(list, a=[Card(1)]), defaultdict[str, list[Card]]),
        (defaultdict(None, a=1), defaultdict[str, int | None]),
    ],
)
def test_annotations_of_the_collections_bring_their_types_back(value, hint):
    back = load(dump(value, "it"), hint)
    assert same(back, value)
    assert getattr(back, "default_factory", None) is getattr(value, "default_factory", None)


def test_a_misfit_within_an_iterable_is_named():
    with pytest.raises(SerializationError, match=r"does not fit Iterable\[Card\]: \[1\]\.amount does not fit Card"):
        load(dump([Card(1), {"amount": "x"}], "it"), Iterable[Card])


def test_annotations_need_not_hash():
    def counts() -> Annotated[int, {"unit": "s"}]: ...

    assert load(payloads.dump_result(counts, 1, "it"), payloads.result_type(counts)) == 1
    with pytest.raises(SerializationError, match="does not fit"):
        payloads.dump_result(counts, "x", "it")


def test_inherited_fields_are_converted_where_one_of_the_child_cannot_be_evaluated():
    @dataclasses.dataclass
    class Base:
        line: Line

    @dataclasses.dataclass
    class Child(Base):
        other: "NotImported" = None  # noqa: F821
        more: Line | None = None

    hints = hints_of(Child)
    assert (hints["line"], hints["other"], hints["more"]) == (Line, Any, Line | None)
