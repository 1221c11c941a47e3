"""Exceptions survive the log: class, arguments, causes and where they were raised."""

import asyncio
import sys
import types

import pytest
from durably.errors import FatalError, RunNotFoundError, StepError
from durably.failures import CAUSES, DATA, TRACEBACK, to_error, to_exception
from durably_schemas.records import Error


class PaymentDeclined(Exception):
    def __init__(self, code: int, reason: str) -> None:
        super().__init__(code, reason)
        self.code = code


class Awkward(Exception):
    def __init__(self, *, needed: int) -> None:
        super().__init__("message", needed)


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


@pytest.mark.parametrize(
    "exc",
    [
        Awkward(needed=1),
        ValueError(object()),
        StopIteration(1),
        asyncio.CancelledError(),
        KeyboardInterrupt(),
        ExceptionGroup("several", [ValueError("x")]),
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
