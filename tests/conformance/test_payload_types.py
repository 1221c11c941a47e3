"""User values on every way that they go: client, workflow, step, hook, child, and back."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

import msgspec
import pydantic
import pytest
from durably import (
    Run,
    RunFailedError,
    SerializationError,
    create_hook,
    get_run,
    start,
    step,
    workflow,
)
from durably.serialization import serializable
from durably_schemas.records import Payload


class Colour(enum.Enum):
    RED = "red"


class Point(NamedTuple):
    x: int
    y: int


class Line(msgspec.Struct):
    start: Point
    colour: Colour = Colour.RED


@dataclasses.dataclass
class Order:
    number: int
    at: datetime
    lines: list[Line]


class Customer(pydantic.BaseModel):
    name: str
    credit: Decimal


@serializable
@dataclasses.dataclass
class Money:
    cents: int
    currency: str


@serializable(name="tests.matrix")
class Matrix:
    """Says itself how it travels."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows = rows

    def __durably_dump__(self) -> Any:
        return [len(self.rows), self.rows]

    @classmethod
    def __durably_load__(cls, data: Any) -> Matrix:
        return cls(data[1])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Matrix) and self.rows == other.rows

    __hash__ = None  # type: ignore[assignment]


VALUES: dict[str, Any] = {
    "nothing": None,
    "truth": [True, False],
    "integers": [0, -1, 2**63, 2**64, -(2**200)],
    "floats": [0.1, -0.0, math.inf, -math.inf, 1e308],
    "texts": ["", "ünïcödé", "null \0 byte", "🚂", "line\nbreak"],
    "bytes": b"\x00\xff",
    "lists": [[], [1, [2, [3]]]],
    "dicts": {"a": 1, 2: "two", None: [], "nested": {"deep": {}}},
    "keys of other kinds": {(1, 2): "tuple", date(2024, 1, 1): "date", UUID(int=7): "uuid"},
    "tuples": (1, ("a", ()), [2]),
    "sets": [{1, 2}, frozenset({"x"}), set()],
    "datetimes": [datetime(2024, 2, 29, 12, 30, 15, 123456, UTC), datetime(2024, 1, 1)],
    "offsets": datetime(2024, 1, 1, tzinfo=timezone(timedelta(hours=5, minutes=30))),
    "dates": [date(1, 1, 1), time(23, 59, 59, 999999), timedelta(days=-1, microseconds=1)],
    "decimals": [Decimal("0.10"), Decimal("1e-30"), Decimal("-12345678901234567890.5")],
    "uuids": UUID("12345678-1234-5678-1234-567812345678"),
    "paths": Path("/etc/hosts"),
    "of a marked class": [Money(1250, "EUR"), {"inside": Money(1, "USD")}],
    "that says how it travels": Matrix([[1, 2], [3, 4]]),
}


@step
async def returns_it(value: Any) -> Any:
    return value


@workflow
async def carries(value: Any, token: str) -> list[Any]:
    by_step = await returns_it(value)
    by_child = await (await start(carries_on, value)).result()
    by_hook = await create_hook(token=token, metadata=value)
    assert by_step == by_child == by_hook == value
    return [value, by_step, by_child, by_hook]


@workflow
async def carries_on(value: Any) -> Any:
    return value


def test_a_value_comes_back_as_what_it_was_from_wherever_it_went(system):
    tokens = {kind: system.fresh("value") for kind in VALUES}
    runs = {kind: system.client.start(carries, VALUES[kind], token) for kind, token in tokens.items()}
    for kind, token in tokens.items():
        assert system.hook(token).metadata == VALUES[kind], kind
        system.client.resume_hook(token, VALUES[kind])
    for kind, run in runs.items():
        for carried in run.result(30):
            assert carried == VALUES[kind], kind
            assert _shape(carried) == _shape(VALUES[kind]), kind


def _shape(value: Any) -> Any:
    if isinstance(value, dict):
        return [type(value), [(_shape(k), _shape(v)) for k, v in value.items()]]
    if isinstance(value, list | tuple):
        return [type(value), [_shape(x) for x in value]]
    return type(value)


def test_nan_stays_nan(system):
    assert math.isnan(system.client.start(carries_on, float("nan")).result(30))


@step
async def knows_its_types(order: Order, customer: Customer, colour: Colour, point: Point) -> Order:
    assert isinstance(order, Order)
    assert isinstance(order.lines[0], Line)
    assert isinstance(customer, Customer)
    assert isinstance(colour, Colour)
    assert isinstance(point, Point)
    return order


@workflow
async def typed(order: Order, customer: Customer, colour: Colour, point: Point) -> Order:
    again = await knows_its_types(order, customer, colour, point)
    assert isinstance(again, Order)
    return again


ORDER = Order(7, datetime(2024, 1, 1, tzinfo=UTC), [Line(Point(1, 2))])


def test_annotated_arguments_and_results_are_of_their_types(system):
    customer = Customer(name="Ada", credit=Decimal("1.5"))
    assert system.client.start(typed, ORDER, customer, Colour.RED, Point(3, 4)).result(30) == ORDER


def test_a_foreign_json_input_becomes_what_the_annotations_say(system):
    said = {
        "order": {"number": 7, "at": "2024-01-01T00:00:00Z", "lines": [{"start": [1, 2], "colour": "red"}]},
        "customer": {"name": "Ada", "credit": "1.5"},
        "colour": "red",
        "point": [3, 4],
    }
    payload = Payload(content_type="application/json", data=json.dumps(said).encode())
    run = system.client.options(run_id=system.fresh("json")).start_payload("typed", payload)
    assert run.result(30) == ORDER


@pytest.mark.parametrize(
    "data",
    [b"{", b"[1]", b'{"order": 1}', b'"text"', b'{"unknown": 1}', b"\xff"],
)
def test_a_foreign_input_that_does_not_fit_fails_the_run(system, data):
    payload = Payload(content_type="application/json", data=data)
    run = system.client.options(run_id=system.fresh("misfit")).start_payload("typed", payload)
    with pytest.raises(RunFailedError) as raised:
        run.result(30)
    assert isinstance(raised.value.cause, SerializationError)


@workflow
async def calls_what_it_was_given(chosen: Any, n: int) -> Any:
    return await chosen(n)


@step
async def thirds(n: int) -> int:
    return n // 3


@step
async def maps(chosen: Any, items: list[int]) -> list[int]:
    return [await chosen(item) for item in items]


@workflow
async def hands_a_step_to_a_step(chosen: Any) -> list[int]:
    return await maps(chosen, [3, 6, 9])


def test_steps_and_workflows_are_values(system):
    assert system.client.start(calls_what_it_was_given, thirds, 9).result(30) == 3
    assert system.client.start(calls_what_it_was_given, carries_on, 9).result(30) == 9
    assert system.client.start(hands_a_step_to_a_step, thirds).result(30) == [1, 2, 3]


@workflow
async def returns_its_child(token: str) -> Any:
    return await start(awaits_a_token, token)


@workflow
async def awaits_a_token(token: str) -> Any:
    return await create_hook(token=token)


@step
async def asks_a_handle(run: Any) -> list[str]:
    return [run.id, await run.status()]


@workflow
async def hands_a_run_on(run_id: str) -> Any:
    return await asks_a_handle(get_run(run_id))


def test_runs_are_values(system):
    token = system.fresh("handle")
    parent = system.client.start(returns_its_child, token)
    child_id = system.hook(token).run_id
    assert system.client.start(hands_a_run_on, child_id).result(30) == [child_id, "running"]
    system.client.resume_hook(token, 1)
    child = parent.result(30)
    assert isinstance(child, Run)
    assert (child.id, child.result(30)) == (child_id, 1)


@pytest.mark.parametrize(
    "value",
    [lambda: 1, object(), iter([]), {"x": {object()}}, ["\ud800"], type("Local", (), {})()],
    ids=["lambda", "object", "iterator", "within", "surrogate", "instance"],
)
def test_what_cannot_travel_is_refused_before_anything_is_started(system, value):
    with pytest.raises(SerializationError, match="'value'"):
        system.client.start(carries_on, value=[value])


def test_what_contains_itself_or_stands_in_two_places_is_refused(system):
    circle: list[Any] = []
    circle.append(circle)
    with pytest.raises(SerializationError, match="itself"):
        system.client.start(carries_on, circle)
    shared = [1]
    with pytest.raises(SerializationError, match="twice"):
        system.client.start(carries_on, {"a": shared, "b": shared})
