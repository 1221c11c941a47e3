"""Errors: how they travel from steps to workflows, and from runs to their callers."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from durably import (
    DurablyError,
    FatalError,
    RunBlockedError,
    RunFailedError,
    SerializationError,
    StepError,
    get_step_metadata,
    sleep,
    step,
    workflow,
)


class Declined(Exception):
    """Of the user's own."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message, code)
        self.code = code

    def __str__(self) -> str:
        return f"{self.args[0]} ({self.code})"


def _local_error() -> Exception:
    class Hidden(Exception):
        """Cannot be imported by its name."""

    return Hidden("out of sight")


@step(max_retries=0)
async def declines(kind: str) -> None:
    if kind == "fatal":
        raise FatalError("no")
    if kind == "local":
        raise _local_error()
    if kind == "system exit":
        raise SystemExit(3)
    if kind == "cancelled":
        raise asyncio.CancelledError("by itself")
    if kind == "group":
        raise ExceptionGroup("both", [ValueError("a"), Declined("b", 2)])
    try:
        raise KeyError("inner")
    except KeyError as e:
        raise Declined("card", 51) from e


@step
async def book(what: str) -> str:
    if what == "nothing":
        raise FatalError("there is nothing to book")
    return what


@step
async def undo(what: str) -> str:
    return f"undone {what}"


@workflow
async def catches(kind: str) -> list[Any]:
    try:
        await declines(kind)
    except Exception as e:
        return [type(e).__name__, str(e), repr(e.__cause__)]
    return []


def test_a_steps_exception_reaches_the_workflow_as_its_own_class_with_its_cause(system):
    assert system.client.start(catches, "own").result(30) == ["Declined", "card (51)", "KeyError('inner')"]
    assert system.client.start(catches, "fatal").result(30) == ["FatalError", "no", "None"]


@workflow
async def looks_inside() -> list[Any]:
    try:
        await declines("own")
    except Declined as e:
        return [e.code, any("in declines" in note for note in e.__notes__)]
    return []


def test_a_steps_exception_keeps_its_attributes_and_the_steps_traceback_as_a_note(system):
    assert system.client.start(looks_inside).result(30) == [51, True]


def test_an_exception_whose_class_cannot_be_found_is_a_step_error_that_names_it(system):
    name, message, _ = system.client.start(catches, "local").result(30)
    assert name == StepError.__name__
    assert "Hidden" in message
    assert "out of sight" in message


def test_whatever_a_step_raises_is_a_failure_of_the_step_and_of_nothing_else(system):
    runs = [system.client.start(catches, kind) for kind in ("system exit", "cancelled")]
    assert [run.result(30)[0] for run in runs] == [StepError.__name__] * 2
    assert system.client.start(catches, "own").result(30)[0] == "Declined", "the worker goes on"


@workflow
async def takes_a_group_apart() -> list[str]:
    said = []
    try:
        await declines("group")
    except* ValueError as e:
        said += [f"ValueError {x}" for x in e.exceptions]
    except* Declined as e:
        said += [f"Declined {x}" for x in e.exceptions]
    return said


def test_an_exception_group_keeps_its_members(system):
    assert system.client.start(takes_a_group_apart).result(30) == ["ValueError a", "Declined b (2)"]


@workflow
async def fails(kind: str) -> None:
    await declines(kind)


@workflow
async def fails_by_its_own_code() -> None:
    await sleep(0)
    raise Declined("no step needed", 7)


def test_an_uncaught_exception_fails_the_run_and_is_the_cause_that_its_caller_sees(system):
    runs = [system.client.start(fails, "own"), system.client.start(fails_by_its_own_code)]
    causes = []
    for run in runs:
        with pytest.raises(RunFailedError) as raised:
            run.result(30)
        assert raised.value.run_id == run.id
        causes.append(raised.value.cause)
    assert [(type(cause), cause.code) for cause in causes] == [(Declined, 51), (Declined, 7)]
    assert isinstance(causes[0].__cause__, KeyError)
    assert any("in declines" in note for note in causes[0].__notes__), "where the step raised it"
    assert any("in fails " in note or "in fails\n" in note for note in causes[0].__notes__), "and where it passed"
    assert any("in fails_by_its_own_code" in note for note in causes[1].__notes__)


def test_a_failed_run_says_why_in_its_summary_and_its_log(system):
    run = system.client.start(fails, "own")
    with pytest.raises(RunFailedError):
        run.result(30)
    error = run.describe().error
    assert error.type.endswith(":Declined")
    assert error.message == "card (51)"
    assert error.cause.type == "builtins:KeyError"
    assert "in fails" in error.traceback
    assert "durably_processor" not in error.traceback, "frames that are none of the user's"
    assert run.events()[-1].data.error == error


@workflow
async def books_a_trip() -> list[str]:
    compensations = []
    try:
        for what in ("flight", "hotel", "nothing"):
            booked = await book(what)
            compensations.append(lambda booked=booked: undo(booked))
    except FatalError:
        return [await compensate() for compensate in reversed(compensations)]
    return []


def test_a_saga_undoes_in_reverse_what_had_been_done(system):
    assert system.client.start(books_a_trip).result(30) == ["undone hotel", "undone flight"]


@workflow
async def collects() -> list[str]:
    results = await asyncio.gather(book("a"), book("nothing"), declines("own"), return_exceptions=True)
    return [x if isinstance(x, str) else type(x).__name__ for x in results]


def test_gather_returns_exceptions_beside_results(system):
    assert system.client.start(collects).result(30) == ["a", "FatalError", "Declined"]


@workflow
async def returns_what_cannot_travel() -> Any:
    await book("a")
    return {"fine": 1, "not": [object()]}


def test_a_result_that_cannot_travel_fails_the_run_and_names_its_path(system):
    with pytest.raises(RunFailedError, match=r"\['not'\]\[0\]") as raised:
        system.client.start(returns_what_cannot_travel).result(30)
    assert isinstance(raised.value.cause, SerializationError)


@workflow
async def one_argument(n: int) -> int:
    return n


def test_arguments_are_checked_where_the_signature_is_known_and_fail_the_run_elsewhere(system):
    client = system.client
    for args in ((), (1, 2)):
        with pytest.raises(TypeError, match="one_argument"):
            client.start(one_argument, *args)
    with pytest.raises(SerializationError, match="'n'"):
        client.start(one_argument, object())
    with pytest.raises(RunFailedError, match="one_argument"):
        client.start("one_argument", 1, 2, 3).result(30)
    with pytest.raises(RunFailedError, match="'n'"):
        client.start("one_argument", "not a number").result(30)


def test_a_workflow_that_nobody_knows_blocks_its_run_and_says_what_there_is(system):
    run = system.client.start("nowhere", 1)
    with pytest.raises(RunBlockedError, match="unknown workflow 'nowhere'"):
        run.result(30)
    assert run.status() == "blocked"
    run.cancel()


@workflow
async def ends_the_process() -> None:
    raise SystemExit(3)


@workflow
async def interrupts() -> None:
    raise KeyboardInterrupt


@workflow
async def never_yields() -> None:
    while True:
        pass


def test_workflow_code_cannot_end_its_processor(system):
    stuck = [system.client.start(w) for w in (ends_the_process, interrupts)]
    others = [system.client.start(catches, "fatal") for _ in range(4)]
    for run in stuck:
        with pytest.raises((RunFailedError, RunBlockedError)):
            run.result(30)
        run.cancel()
    assert [run.result(30)[0] for run in others] == ["FatalError"] * 4


def test_an_endless_loop_blocks_its_run_and_nothing_else(lone_system):
    lone_system.start_processor(activation_limit=0.3)
    lone_system.start_worker()
    stuck = lone_system.client.start(never_yields)
    others = [lone_system.client.start(catches, "fatal") for _ in range(4)]
    with pytest.raises(RunBlockedError):
        stuck.result(30)
    assert [run.result(30)[0] for run in others] == ["FatalError"] * 4


@step(max_retries=1, backoff="5ms")
async def fails_differently() -> None:
    raise ValueError(f"attempt {get_step_metadata().attempt}")


@workflow
async def forwards_an_error() -> Any:
    try:
        await fails_differently()
    except ValueError as e:
        return await describes(e)


@step
async def describes(error: Any) -> list[Any]:
    return [type(error).__name__, str(error)]


def test_an_exception_is_a_value_that_can_be_handed_on(system):
    assert system.client.start(forwards_an_error).result(30) == ["ValueError", "attempt 2"]


def test_every_error_of_ours_is_a_durably_error():
    import durably

    ours = [getattr(durably, name) for name in durably.__all__]
    classes = [x for x in ours if isinstance(x, type) and issubclass(x, BaseException)]
    assert len(classes) > 20
    assert all(issubclass(cls, DurablyError) for cls in classes)
