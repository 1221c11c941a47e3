"""Exceptions survive the log: class, arguments, causes and where they were raised."""

import asyncio
import dataclasses
import json
import subprocess
import sys
import time
import types
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import Any, Self

import msgspec
import pydantic
import pytest
from durably import failures
from durably.errors import (
    FatalError,
    HookConflictError,
    NonDeterminismError,
    RetryableError,
    RunNotFoundError,
    StepError,
)
from durably.failures import CAUSES, DATA, HELD_DEEP, MEMBERS, MESSAGE, TRACEBACK, to_error, to_exception
from durably.serialization import serializable
from durably_schemas.records import Error, Payload
from hypothesis import given
from hypothesis import strategies as st


class PaymentDeclined(Exception):
    def __init__(self, code: int, reason: str) -> None:
        super().__init__(code, reason)
        self.code = code


class Awkward(Exception):
    def __init__(self, *, needed: int) -> None:
        super().__init__("message", needed)


class Declined(Exception):
    """Keyword-only parameters."""

    def __init__(self, *, code: int, account: str) -> None:
        super().__init__(f"{code} for {account}")
        self.code = code
        self.account = account


class Prefixed(Exception):
    """Makes a message of its argument; made of the message it would make it once more."""

    def __init__(self, what: str) -> None:
        super().__init__(f"cannot {what}")


class Missing(FileNotFoundError):
    def __init__(self, *, path: str) -> None:
        super().__init__(2, "missing", path)
        self.extra = [path]


@dataclasses.dataclass
class Rejected(Exception):
    code: int
    reasons: list[str]


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    code: int


class Group(ExceptionGroup):
    def __new__(cls, members: list[Exception], *, where: str) -> Self:
        self = super().__new__(cls, f"in {where}", members)
        self.where = where
        return self

    def __init__(self, members: list[Exception], *, where: str) -> None:
        super().__init__()


class Choosy(ExceptionGroup):
    def __init__(self, message: str, members: list[Exception]) -> None:
        if not all(isinstance(m, KeyError) for m in members):
            raise TypeError


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError


def raised(exc: BaseException, cause: BaseException | None = None) -> BaseException:
    try:
        raise exc from cause
    except BaseException as e:
        return e


def test_a_class_comes_back_with_its_attributes_and_the_traceback_as_a_note():
    back = to_exception(to_error(raised(PaymentDeclined(7, "no money"))))
    assert isinstance(back, PaymentDeclined)
    assert back.code == 7
    assert "in raised" in back.__notes__[0]


def test_the_cause_chain_comes_back():
    try:
        try:
            raise KeyError("inner")
        except KeyError:
            raise PaymentDeclined(1, "outer")  # noqa: B904
    except PaymentDeclined as e:
        back = to_exception(to_error(e))
    assert isinstance(back.__cause__, KeyError)
    assert back.__cause__.args == ("inner",)


def test_a_suppressed_context_is_no_cause():
    assert to_error(raised(ValueError("x"), None)).cause is None


def test_the_chain_is_bounded_also_where_it_is_a_ring():
    exc: BaseException = ValueError("0")
    for i in range(20):
        exc = raised(ValueError(str(i)), exc)
    error, depth = to_error(exc), 0
    while error is not None:
        error, depth = error.cause, depth + 1
    assert depth == CAUSES
    a, b = ValueError("a"), ValueError("b")
    a.__cause__, b.__cause__ = b, a
    assert to_error(a).cause.cause is None


def invalid() -> Exception:
    try:
        pydantic.TypeAdapter(int).validate_python("no number")
    except pydantic.ValidationError as e:
        return e
    raise AssertionError


def decoded(data: bytes) -> Exception:
    try:
        data.decode()
    except UnicodeDecodeError as e:
        return e
    raise AssertionError


def parsed(text: str) -> Exception:
    try:
        json.loads(text)
    except json.JSONDecodeError as e:
        return e
    raise AssertionError


def with_attributes() -> Exception:
    exc = ValueError("x")
    exc.code, exc.at, exc.file, exc.__dict__[3] = 5, datetime(2024, 1, 1, tzinfo=UTC), sys.stdout, 4
    return exc


EACH = [
    Awkward(needed=1),
    Declined(code=7, account="a"),
    Prefixed("do it"),
    Missing(path="a/b"),
    Rejected(1, ["a"]),
    Rejected(code=1, reasons=["a"]),
    Frozen(3),
    KeyError("k"),
    OSError(2, "no", "file"),
    PermissionError("only a text"),
    ConnectionResetError(104, "gone"),
    decoded(b"\xff"),
    parsed("{"),
    subprocess.CalledProcessError(3, ["ls", "-l"], output=b"out", stderr=b"err"),
    subprocess.TimeoutExpired("ls", 3.5),
    ImportError("no", name="n", path="p"),
    msgspec.ValidationError("Expected `int`"),
    RetryableError("later", retry_after=timedelta(seconds=3)),
    NonDeterminismError("differs", "a", "b"),
    HookConflictError("taken", "token", "run-1"),
    with_attributes(),
]


@pytest.mark.parametrize("exc", EACH, ids=lambda e: type(e).__name__)
def test_class_arguments_and_attributes_come_back(exc):
    before = vars(exc).copy()
    for told in (exc, raised(exc)):
        back = to_exception(to_error(told))
        assert type(back) is type(exc)
        assert (back.args, str(back)) == (exc.args, str(exc))
        found = {k: v for k, v in vars(back).items() if k != "__notes__"}
        assert found == {k: v for k, v in before.items() if k != 3 and v is not sys.stdout}


def test_what_is_kept_beside_the_attributes_comes_back():
    assert to_exception(to_error(Missing(path="a/b"))).filename == "a/b"
    assert to_exception(to_error(OSError(2, "no", "file"))).filename == "file"
    assert to_exception(to_error(ImportError("no", name="n"))).name == "n"
    assert to_exception(to_error(decoded(b"a\xff"))).start == 1


def test_notes_come_back_before_the_traceback():
    exc = raised(Frozen(1))
    failures.add_note(exc, "on Friday")
    failures.add_note(exc, "at noon")
    back = to_exception(to_error(exc))
    assert back.__notes__[:2] == ["on Friday", "at noon"]
    assert back.__notes__[2].startswith("Recorded where it was raised:\n")
    assert "Friday" not in back.__notes__[2]
    assert len(to_exception(to_error(back)).__notes__) == 3, "that nobody raised again"


def test_a_group_comes_back_with_its_members():
    inner = ExceptionGroup("inner", [raised(Declined(code=1, account="a"), KeyError("k"))])
    back = to_exception(to_error(raised(ExceptionGroup("outer", [ValueError(1), inner]))))
    assert (type(back), back.message, len(back.exceptions)) == (ExceptionGroup, "outer", 2)
    declined = back.exceptions[1].exceptions[0]
    assert (type(declined), declined.code, type(declined.__cause__)) == (Declined, 1, KeyError)
    assert "in raised" in declined.__notes__[0]
    matched, rest = back.split(Declined)
    assert len(matched.exceptions) == len(rest.exceptions) == 1


def test_a_group_of_anything_comes_back_as_a_group_of_exceptions():
    back = to_exception(
        to_error(BaseExceptionGroup("all", [KeyboardInterrupt(), asyncio.CancelledError(), KeyError(1)]))
    )
    assert (type(back), back.message) == (ExceptionGroup, "all")
    assert [type(member) for member in back.exceptions] == [StepError, StepError, KeyError]
    assert back.exceptions[0].type == "builtins:KeyboardInterrupt"


def test_groups_of_the_users_own_come_back():
    back = to_exception(to_error(Group([KeyError(1)], where="here")))
    assert (type(back), back.message, back.where, back.exceptions[0].args) == (Group, "in here", "here", (1,))
    fits = to_exception(to_error(Choosy("m", [KeyError(1)])))
    assert (type(fits), fits.message) == (Choosy, "m")


def test_a_group_whose_class_is_not_here_is_a_group_all_the_same():
    error = to_error(Group([KeyError(1)], where="here"))
    back = to_exception(msgspec.structs.replace(error, type="gone:Group"))
    assert (type(back), back.exceptions[0].args) == (ExceptionGroup, (1,))
    assert back.__notes__ == ["Recorded as gone:Group, which cannot be rebuilt here"]


def test_the_members_of_a_group_are_bounded_however_many_and_deep_they_are():
    many = ExceptionGroup("many", [raised(ValueError("x" * 5000 + str(i))) for i in range(1000)])
    error = to_error(many)
    assert len(msgspec.msgpack.encode(error)) < DATA + 2 * TRACEBACK + MEMBERS * 300
    back = to_exception(error)
    assert len(back.exceptions) == MEMBERS
    assert back.__notes__[0] == f"{1000 - MEMBERS} more of its exceptions are not recorded"
    deep: Exception = ValueError("core")
    for i in range(50):
        deep = ExceptionGroup(str(i), [deep])
    back = to_exception(to_error(deep))
    for _ in range(CAUSES - 1):
        back = back.exceptions[0]
    assert type(back) is StepError, "a group without members is none"
    assert back.__notes__ == ["1 more of its exceptions are not recorded"]


def test_a_group_that_is_its_own_members_cause_comes_to_an_end():
    member = KeyError(1)
    group = ExceptionGroup("g", [member])
    member.__cause__ = group
    back = to_exception(to_error(group))
    assert back.exceptions[0].__cause__ is None


def test_an_attribute_that_cannot_be_read_takes_nothing_else_with_it():
    @serializable(name="durably-tests.gone-later")
    @dataclasses.dataclass
    class Details:
        x: int

    exc = Declined(code=7, account="a")
    exc.details = Details(1)
    error = to_error(exc)
    assert to_exception(error).details == Details(1)
    unknown = msgspec.structs.replace(error.data, data=error.data.data.replace(b"gone-later", b"gone-since"))
    back = to_exception(msgspec.structs.replace(error, data=unknown))
    assert (type(back), back.code, hasattr(back, "details")) == (Declined, 7, False)


@given(
    st.binary(max_size=60),
    st.sampled_from(["application/msgpack", "application/json", "x", "application/msgpack;codec=gzip"]),
)
def test_data_from_anywhere_is_taken_or_left(data, content_type):
    error = Error(type="ValueError", message="bad", data=Payload(content_type=content_type, data=data))
    assert isinstance(to_exception(error), Exception)
    assert failures.revealed(error).type == "ValueError"


@pytest.mark.parametrize(
    "exc",
    [
        ValueError(object()),
        StopIteration(1),
        asyncio.CancelledError(),
        KeyboardInterrupt(),
        invalid(),
        type("Local", (Exception,), {})("x"),
    ],
)
def test_what_cannot_be_rebuilt_is_a_step_error_that_names_it(exc):
    back = to_exception(to_error(exc))
    assert type(back) is StepError
    assert type(exc).__qualname__ in back.type


def test_the_traceback_of_a_group_tells_its_members():
    assert "ValueError: hidden" in to_error(raised(ExceptionGroup("g", [raised(ValueError("hidden"))]))).traceback


def test_nothing_is_imported_on_the_word_of_a_record():
    name = "durably_test_never_imported"
    assert type(to_exception(Error(type=f"{name}:Boom", message="x"))) is StepError
    assert name not in sys.modules


def test_only_exceptions_are_made():
    hits = []
    module = types.ModuleType("durably_test_trap")
    module.Trap = lambda *a: hits.append(a)
    sys.modules[module.__name__] = module
    try:
        for name in ("durably_test_trap:Trap", "builtins:SystemExit", "builtins:print", "os:system", "eval"):
            assert type(to_exception(Error(type=name, message="x"))) is StepError
    finally:
        del sys.modules[module.__name__]
    assert not hits


def test_a_bare_name_of_a_foreign_language_may_be_a_builtin():
    back = to_exception(Error(type="ValueError", message="bad"))
    assert type(back) is ValueError
    assert back.args == ("bad",)
    assert str(to_exception(Error(type="TypeMismatch", message="bad"))) == "TypeMismatch: bad"


@pytest.mark.parametrize(
    "exc", [FatalError("x"), RunNotFoundError("gone", "wrun_1"), StepError("m", "T"), OSError(2, "no")]
)
def test_errors_of_our_own_and_builtins_come_back(exc):
    back = to_exception(to_error(exc))
    assert type(back) is type(exc)
    assert str(back) == str(exc)


def test_an_unprintable_exception_is_recorded_all_the_same():
    assert "RuntimeError" in to_error(raised(Unprintable("\ud800"))).message


def test_sizes_are_bounded():
    error = to_error(raised(ValueError("x" * 10 * TRACEBACK, b"y" * DATA)))
    assert len(error.message) <= TRACEBACK
    assert len(error.traceback) <= TRACEBACK + 10
    assert error.data is None


class Wrapped(Exception):
    def __init__(self, message: str, orig: BaseException) -> None:
        super().__init__(message, orig)
        self.orig = orig


class Holder(Exception):
    pass


def wrapped(levels: int) -> BaseException:
    exc: BaseException = ValueError("core")
    for _ in range(levels):
        exc = raised(Wrapped("w", exc), exc)
    return exc


def ring(n: int) -> BaseException:
    """Exceptions each of which holds all of them, in two ways, and is caused by another."""
    ones = [Holder(str(i)) for i in range(n)]
    for i, one in enumerate(ones):
        one.all, one.more, one.__cause__ = list(ones), tuple(ones), ones[(i + 1) % n]
    return ones[0]


def grouped(depth: int, width: int) -> BaseException:
    exc: Exception = ValueError("x" * 300)
    for _ in range(depth):
        exc = raised(ExceptionGroup("g" * 300, [exc] * width))
    return exc


def with_many(make: Callable[[int], Any], n: int) -> BaseException:
    exc = Holder("many")
    for i in range(n):
        setattr(exc, f"a{i}", make(i))
    return exc


def doubled(levels: int) -> Any:
    value: Any = ()
    for _ in range(levels):
        value = (value, value)
    return value


def by_enum() -> BaseException:
    members = Enum("Members", {"ONE": Holder("member")})
    members.ONE.value.first = members.ONE.value.second = members.ONE
    return with_many(lambda _: members.ONE, 2)


def noted(note: str, n: int) -> BaseException:
    exc = raised(ValueError("noted"))
    exc.__notes__ = [note] * n
    return exc


@pytest.mark.parametrize(
    "make",
    [
        lambda: wrapped(60),
        lambda: ring(2),
        lambda: ring(60),
        lambda: grouped(2, 64),
        lambda: grouped(9, 64),
        lambda: with_many(lambda _: doubled(100), 1),
        lambda: with_many(lambda i: [i] * 1000, 20_000),
        lambda: with_many(lambda _: ["x" * 100_000] * 100_000, 5),
        lambda: with_many(lambda i: Holder("y" * 900 + str(i)), 500),
        by_enum,
        lambda: noted("n" * 100, 100_000),
        lambda: raised(ValueError("😀" * 50_000 + "\ud800" * 9)),
        lambda: type("T" * 100_000, (Exception,), {})("long name"),
    ],
)
def test_whatever_an_exception_holds_its_record_is_small_and_soon_made(make):
    exc = make()
    before = time.perf_counter()
    error = to_error(exc)
    assert time.perf_counter() - before < 2, "some of these would go on for ever, and none may hold up a worker"
    assert len(msgspec.msgpack.encode(error)) < 128 * 1024
    assert isinstance(to_exception(error), Exception)


trees = st.recursive(
    st.builds(ValueError, st.text(max_size=300), st.binary(max_size=3000)),
    lambda inner: (
        st.builds(ExceptionGroup, st.text(max_size=300), st.lists(inner, min_size=1, max_size=70))
        | st.builds(lambda e, c: raised(Wrapped("w", e), c), inner, inner)
        | st.builds(lambda e, f: with_many(lambda i: (e, f, i), 3), inner, inner)
    ),
    max_leaves=150,
)


@given(trees)
def test_the_record_of_any_exception_is_bounded(exc):
    error = to_error(raised(exc))
    assert len(msgspec.msgpack.encode(error)) < MESSAGE + TRACEBACK + DATA + 4096
    assert isinstance(to_exception(error), Exception)


def test_exceptions_within_exceptions_come_back_some_levels_deep():
    back = to_exception(to_error(wrapped(2)))
    assert (type(back), type(back.orig), type(back.orig.orig)) == (Wrapped, Wrapped, ValueError)
    assert type(back.args[1].args[1]) is ValueError
    assert back.__notes__[0].startswith("Recorded where it was raised")
    assert not hasattr(back.orig, "__notes__"), "only what was raised says where"
    deep = to_exception(to_error(wrapped(20)))
    for _ in range(HELD_DEEP - 1):
        deep = deep.orig
    assert not hasattr(deep.orig, "orig")


def test_an_exception_that_leads_back_to_itself_loses_only_the_way_back():
    outer, inner = Holder("outer"), Holder("inner")
    outer.context, inner.parent, inner.code = [inner], outer, 5
    back = to_exception(to_error(outer))
    assert (back.context[0].code, hasattr(back.context[0], "parent")) == (5, False)


def test_the_first_members_of_a_group_leave_room_for_the_others():
    back = to_exception(to_error(ExceptionGroup("g", [ValueError("m" * 9000, i) for i in range(MEMBERS)])))
    assert len(back.exceptions) == MEMBERS
    nested = to_exception(to_error(grouped(2, MEMBERS)))
    assert any("more of its exceptions are not recorded" in note for note in nested.__notes__)


class OddArgs(Exception):
    args = 5


class OddNotes(Exception):
    @property
    def __notes__(self) -> list[str]:
        raise ValueError("no notes")


class OddAccess(Exception):
    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(name)


class OddCause(Exception):
    __cause__ = 5
    __context__ = property(lambda self: 1 / 0)
    __reduce__ = None


class OddGroup(ExceptionGroup):
    exceptions = 5
    message = property(lambda self: 1 / 0)


@pytest.mark.parametrize("cls", [OddArgs, OddNotes, OddAccess, OddCause])
def test_a_class_that_is_odd_about_itself_is_recorded_all_the_same(cls):
    error = to_error(raised(cls("what it says")))
    assert (error.type, error.message) == (f"{__name__}:{cls.__qualname__}", "what it says")
    assert isinstance(to_exception(error), cls)


def test_a_group_that_is_odd_about_itself_is_recorded_all_the_same():
    error = to_error(raised(OddGroup("what it says", [KeyError(1)])))
    assert error.type == f"{__name__}:OddGroup"
    assert isinstance(to_exception(error), ExceptionGroup)


def test_a_class_without_a_proper_module_is_recorded_all_the_same():
    class Unformattable:
        def __format__(self, spec: str) -> str:
            raise RuntimeError

    error = to_error(type("NoModule", (Exception,), {"__module__": Unformattable()})("m"))
    assert "class" in error.type
    assert error.message == "m"


def test_reading_a_record_runs_no_code_that_its_type_names():
    asked = []

    class Lazy:
        def __getattr__(self, name: str) -> Any:
            asked.append(name)
            raise AttributeError(name)

        @property
        def __class__(self) -> type:
            asked.append("__class__")
            return type

    class LazyModule(types.ModuleType):
        def __getattribute__(self, name: str) -> Any:
            asked.append(name)
            raise AttributeError(name)

    plain, loading = types.ModuleType("durably_test_conf"), LazyModule("durably_test_loading")
    plain.settings = Lazy()
    plain.__getattr__ = asked.append
    sys.modules |= {"durably_test_conf": plain, "durably_test_loading": loading, "durably_test_proxy": Lazy()}
    try:
        for name in ("conf:settings", "conf:settings.DEBUG", "conf:absent", "loading:Error", "proxy:Error"):
            assert type(to_exception(Error(type=f"durably_test_{name}", message="m"))) is StepError
    finally:
        for name in ("conf", "loading", "proxy"):
            del sys.modules[f"durably_test_{name}"]
    assert asked == []


class Outer:
    class Inner(Exception):
        pass


def test_a_nested_class_comes_back():
    assert type(to_exception(to_error(Outer.Inner("m")))) is Outer.Inner


@pytest.mark.parametrize("name", ["__notes__", "__cause__", "__class__", "__dict__"])
def test_attributes_of_pythons_own_are_not_set_by_a_record(name):
    told = failures.Told(args=b"\x91\xa1m", attributes={name: b"\x01", "code": b"\x05"}, notes=["a"])
    data = Payload(content_type="application/msgpack", data=msgspec.msgpack.encode(told))
    back = to_exception(Error(type="ValueError", message="m", data=data))
    assert (type(back), back.code, back.__notes__, back.__cause__) == (ValueError, 5, ["a"], None)


def test_a_note_that_cannot_be_added_is_left_out():
    exc = ValueError("m")
    exc.__notes__ = 5
    failures.add_note(exc, "note")
    assert exc.__notes__ == 5
