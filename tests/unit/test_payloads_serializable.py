"""Instances of classes that are marked come back as instances; those that cannot be are named."""

import dataclasses
from datetime import date
from enum import Enum, Flag
from typing import Any

import attrs
import msgspec
import pydantic
import pytest
from durably.errors import DeterminismError, RegistrationError, SerializationError
from durably.payloads import JSON, MSGPACK, dump, dump_arguments, load
from durably.serialization import serializable
from durably_schemas.records import Payload


@dataclasses.dataclass
class Plain:
    due: date


@serializable
@dataclasses.dataclass
class Data:
    x: int
    children: "list[Data]" = dataclasses.field(default_factory=list)
    plain: Plain | None = None
    doubled: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.doubled = 2 * self.x


@serializable
@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    x: int
    seen: str = dataclasses.field(init=False, default="no")


@serializable
class Record(msgspec.Struct, frozen=True, tag=True, array_like=True, rename="camel"):
    line_items: tuple[Plain, ...]


@serializable
@attrs.define
class Attributes:
    _hidden: int
    made: int = attrs.field(init=False, default=7)


class Nested(pydantic.BaseModel):
    due: date


@serializable
class Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    address: str = pydantic.Field(alias="e-mail")
    nested: Nested | None = None

    @pydantic.computed_field
    @property
    def domain(self) -> str:
        return self.address.partition("@")[2]


@serializable(name="colour")
class Colour(Enum):
    RED = (1, "red")


@serializable
class Rights(Flag):
    READ = 1
    WRITE = 2


@serializable(name="durably-tests.Money")
class Money:
    """Knows for itself how it travels."""

    def __init__(self, cents: int) -> None:
        self.cents = cents

    def __durably_dump__(self) -> Any:
        return self.cents

    @classmethod
    def __durably_load__(cls, data: Any) -> "Money":
        return cls(data)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Money) and other.cents == self.cents

    def __hash__(self) -> int:
        return hash(self.cents)


EACH = [
    Data(1, [Data(2)], Plain(date(2024, 1, 1))),
    Frozen(1),
    Record((Plain(date(2024, 1, 1)),)),
    Attributes(3),
    Model.model_validate({"e-mail": "a@b.org", "nested": {"due": "2024-01-01"}}),
    Colour.RED,
    Rights.READ | Rights.WRITE,
    Money(5),
]


@pytest.mark.parametrize("value", EACH, ids=lambda v: type(v).__name__)
def test_an_instance_comes_back_with_and_without_an_annotation(value):
    for wrapped, hint in [(value, Any), ([value], Any), (value, type(value)), ({"a": value}, dict[str, type(value)])]:
        back = load(dump(wrapped, "it"), hint)
        assert back == wrapped
        inner = back[0] if isinstance(back, list) else back["a"] if isinstance(back, dict) else back
        assert type(inner) is type(value)


def test_what_the_constructor_does_not_take_is_kept():
    value = Data(1)
    value.doubled = 5
    frozen = Frozen(1)
    object.__setattr__(frozen, "seen", "yes")
    back = load(dump([value, frozen], "it"))
    assert (back[0].doubled, back[1].seen) == (5, "yes")


def test_it_is_a_key_and_a_member_where_it_hashes():
    assert load(dump({Money(1): {Money(2), Colour.RED}}, "it")) == {Money(1): {Money(2), Colour.RED}}


def test_a_class_travels_as_its_name():
    assert load(dump([Money, Data], "it")) == [Money, Data]
    with pytest.raises(SerializationError, match="a class travels only when it is marked"):
        dump(Plain, "it")


def test_a_union_of_marked_classes_takes_either():
    assert load(dump([Data(1), Frozen(2), Money(3)], "it"), list[Data | Frozen | Money]) == [
        Data(1),
        Frozen(2),
        Money(3),
    ]


def test_json_is_read_by_annotation():
    def of(text: bytes) -> Payload:
        return Payload(content_type=JSON, data=text)

    assert load(of(b'["Record", [{"due": "2024-01-01"}]]'), Record) == Record((Plain(date(2024, 1, 1)),))
    assert load(of(b"3"), Rights) == Rights.READ | Rights.WRITE
    assert load(of(b"[5]"), list[Money]) == [Money(5)]


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ([Data(1, plain=object())], r"it\[0\]\.plain: <object"),  # type: ignore[arg-type]
        (Attributes(object()), r"it\._hidden: <object"),  # type: ignore[arg-type]
    ],
)
def test_a_field_that_cannot_travel_is_named(value, path):
    with pytest.raises(SerializationError, match=path):
        dump(value, "it")


def test_a_field_that_does_not_fit_is_named():
    with pytest.raises(SerializationError, match=r"test_payloads_serializable:Data\.x does not fit int: .*`str`"):
        load(dump(Data("a"), "it"))  # type: ignore[arg-type]


def test_a_child_of_a_marked_class_must_be_marked_too():
    class Child(Data): ...

    with pytest.raises(SerializationError, match=r"derives from the serializable Data, .* mark it @serializable, too"):
        dump(Child(1), "it")


def altered(value: Any, old: bytes, new: bytes) -> Payload:
    data = dump(value, "it").data
    assert old in data
    return Payload(content_type=MSGPACK, data=data.replace(old, new))


def test_a_class_that_is_unknown_here_is_named_and_never_imported():
    with pytest.raises(SerializationError, match=r"'durably-tests.Mooey' is unknown here: import the module"):
        load(altered(Money(1), b"Money", b"Mooey"))
    with pytest.raises(SerializationError, match=r"ran as a script: give it a name="):
        load(altered(Money(1), b"durably-tests.Money", b"__main__:fgijk.Money"))


def test_a_field_that_was_added_since_takes_its_default():
    older = serializable(name="durably-tests.Grown")(dataclasses.make_dataclass("Grown", ["x"]))
    payload = dump(older(1), "it")
    newer = dataclasses.make_dataclass("Grown", ["x", ("y", int, dataclasses.field(default=2))])
    serializable(name="durably-tests.Grown")(newer)
    assert load(payload) == newer(1, 2)


def test_a_field_that_nobody_knows_any_more_is_an_error_that_says_so():
    with pytest.raises(SerializationError, match=r"unexpected keyword argument 'childrex'.*need a default"):
        load(altered(Data(1), b"children", b"childrex"))


def test_two_classes_of_one_name_are_refused():
    def again() -> type:
        @serializable(name="durably-tests.Twice")
        class Twice:
            def __durably_dump__(self) -> int:
                return 1

            @classmethod
            def __durably_load__(cls, data: Any) -> "Twice":
                return cls()

        return Twice

    again()
    newest = again()  # the same place, loaded once more
    assert type(load(dump(newest(), "it"))) is newest
    with pytest.raises(RegistrationError, match=r"two serializable classes are named 'durably-tests.Twice'.*name="):
        serializable(name="durably-tests.Twice")(dataclasses.make_dataclass("Other", []))


class Half:
    def __durably_dump__(self) -> int:
        return 1


@dataclasses.dataclass
class Secretive:
    x: int
    seed: dataclasses.InitVar[int]


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (Half, "has __durably_dump__ and not its counterpart"),
        (Secretive, "because of seed: define __durably_dump__ and __durably_load__"),
        (type("Anything", (), {}), "put @serializable above the decorator"),
        (3, "is no class"),
    ],
)
def test_a_class_that_cannot_be_rebuilt_is_refused_when_it_is_marked(cls, message):
    with pytest.raises(RegistrationError, match=message):
        serializable(cls)


def test_a_name_is_a_text():
    with pytest.raises(RegistrationError, match="name=''"):
        serializable(name="")(Plain)


def test_a_load_method_that_raises_is_told():
    @serializable
    class Picky:
        def __durably_dump__(self) -> int:
            return 1

        @classmethod
        def __durably_load__(cls, data: Any) -> "Picky":
            raise LookupError("never")

    with pytest.raises(SerializationError, match="Picky cannot be made of what was written: LookupError: never"):
        load(dump(Picky(), "it"))


def test_what_workflow_code_must_not_do_is_not_taken_for_bad_data():
    @serializable
    class Opens:
        def __init__(self, where: str) -> None:
            self.where = where

        def __durably_dump__(self) -> str:
            if self.where == "dump":
                raise DeterminismError("open()")
            return self.where

        @classmethod
        def __durably_load__(cls, data: str) -> "Opens":
            raise DeterminismError("open()")

    payload = dump(Opens("load"), "it")
    for act in (
        lambda: dump(Opens("dump"), "it"),
        lambda: dump_arguments(lambda x: None, (Opens("dump"),), {}, "it"),
        lambda: load(payload),
    ):
        with pytest.raises(DeterminismError):
            act()
