"""Runs that workflows start, and runs that they wait for."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from itertools import pairwise
from typing import Any

import checker
import durably
import pytest
from durably import (
    ConfigurationError,
    DurablyError,
    RunCancelledError,
    RunFailedError,
    RunNotFoundError,
    create_hook,
    get_run,
    get_workflow_metadata,
    sleep,
    start,
    step,
    workflow,
)
from durably_schemas import records
from harness import until

STARTED: Counter[str] = Counter()


class OutOfStock(Exception):
    """Of the user's own."""


@step
async def pick(item: str) -> str:
    return f"picked {item}"


@step
async def ship(order: str) -> None:
    STARTED[order] += 1


@workflow
async def packing(item: str, copies: int = 1) -> list[str]:
    return [await pick(item) for _ in range(copies)]


@workflow
async def out_of_stock(item: str) -> None:
    raise OutOfStock(item) from KeyError("shelf")


@workflow
async def waiting(token: str) -> Any:
    return await create_hook(token=token)


# -- results -----------------------------------------------------------------------------------------------------------


@workflow
async def has_a_child(item: str) -> list[Any]:
    child = await start(packing, item, copies=2)
    return [child.id, await child.result(), await child.result()]


def test_a_child_is_a_run_of_its_own_whose_result_its_parent_gets(system):
    run = system.client.start(has_a_child, "lamp")
    child_id, result, again = run.result(30)
    assert result == again == ["picked lamp"] * 2
    child = system.client.get_run(child_id)
    assert child.result(30) == result
    summary = child.describe()
    assert summary.workflow == "packing"
    assert (summary.parent.run_id, summary.parent.root_run_id) == (run.id, run.id)
    types = system.types(run.id)
    assert types.count("child_created") == types.count("child_completed") == 1
    assert "step_created" not in types, "its steps are in its own log"


@workflow
async def has_a_failing_child() -> list[Any]:
    child = await start(out_of_stock, "lamp")
    try:
        await child.result()
    except RunFailedError as e:
        cause = e.cause
        return [e.run_id == child.id, isinstance(cause, OutOfStock), str(cause), repr(cause and cause.__cause__)]
    return []


@workflow
async def is_careless() -> None:
    await (await start(out_of_stock, "chair")).result()


def test_a_childs_failure_is_an_error_with_its_own_exception_as_cause(system):
    assert system.client.start(has_a_failing_child).result(30) == [True, True, "lamp", "KeyError('shelf')"]
    careless = system.client.start(is_careless)
    with pytest.raises(RunFailedError, match="chair") as raised:
        careless.result(30)
    assert isinstance(raised.value.cause, RunFailedError)
    assert isinstance(raised.value.cause.cause, OutOfStock)


@workflow
async def has_a_cancelled_child(token: str) -> list[Any]:
    child = await start(waiting, token)
    await create_hook(token=f"{token}-gate")
    await child.cancel("too slow")
    await child.cancel("too slow")
    try:
        await child.result()
    except RunCancelledError as e:
        return [e.run_id == child.id, str(e)]
    return []


def test_a_parent_cancels_its_child_and_hears_of_it(system):
    token = system.fresh("slow")
    run = system.client.start(has_a_cancelled_child, token)
    child = system.client.get_run(system.hook(token).run_id)
    system.hook(f"{token}-gate")
    system.client.resume_hook(f"{token}-gate")
    matches, message = run.result(30)
    assert matches
    assert "too slow" in message
    with pytest.raises(RunCancelledError, match="too slow"):
        child.result(30)


@workflow
async def waits_for_a_child(token: str) -> Any:
    return await (await start(waiting, token)).result()


def test_a_child_that_others_cancel_is_an_error_in_its_parent(system):
    token = system.fresh("cancelled")
    run = system.client.start(waits_for_a_child, token)
    system.client.get_run(system.hook(token).run_id).cancel("from outside")
    with pytest.raises(RunFailedError, match="from outside") as raised:
        run.result(30)
    assert isinstance(raised.value.cause, RunCancelledError)


@workflow
async def starts_by_name(name: str) -> Any:
    return await (await start(name, "lamp")).result()


def test_a_child_may_be_started_by_the_name_of_its_workflow(system):
    assert system.client.start(starts_by_name, "packing").result(30) == ["picked lamp"]


@workflow
async def starts_wrongly() -> list[str]:
    said = []
    for attempt in (
        lambda: start(packing),  # type: ignore[call-arg]
        lambda: start(packing, 1, 2, 3),  # type: ignore[call-arg]
        lambda: start(pick, "lamp"),  # type: ignore[call-overload]
        lambda: start(packing, lambda: 1),  # type: ignore[arg-type]
        lambda: durably.options(run_id=get_workflow_metadata().run_id).start(packing, "x"),
        lambda: durably.options(run_id="a|b").start(packing, "x"),
        lambda: durably.options(on_parent_end="perish").start(packing, "x"),  # type: ignore[arg-type]
    ):
        try:
            await attempt()
        except (TypeError, DurablyError) as e:
            said.append(type(e).__name__)
    return said


def test_a_start_that_cannot_be_raises_in_the_workflow_and_records_nothing(system):
    run = system.client.start(starts_wrongly)
    wrong = ["TypeError", "TypeError", "TypeError", "SerializationError", "DurablyError"]
    assert run.result(30) == wrong + ["ConfigurationError"] * 2
    assert "child_created" not in system.types(run.id)
    assert issubclass(ConfigurationError, DurablyError)


# -- families ----------------------------------------------------------------------------------------------------------


@workflow
async def has_many(n: int) -> list[str]:
    children = [await start(packing, str(i)) for i in range(n)]
    results = await asyncio.gather(*(child.result() for child in children))
    return [item for result in results for item in result]


def test_fifty_children_at_once(system):
    run = system.client.start(has_many, 50)
    assert run.result(60) == [f"picked {i}" for i in range(50)]


@workflow
async def descends(depth: int) -> list[str]:
    own = get_workflow_metadata().run_id
    if depth == 0:
        return [own]
    return [own, *await (await start(descends, depth - 1)).result()]


def test_a_child_may_have_children_down_to_any_depth_and_all_know_the_root(system):
    run = system.client.start(descends, 10)
    line = run.result(60)
    assert line[0] == run.id
    assert len(set(line)) == 11
    for parent, child in pairwise(line):
        told = system.client.get_run(child).describe().parent
        assert (told.run_id, told.root_run_id) == (parent, run.id)


@workflow
async def races_children(slow: str, fast: str) -> Any:
    first, second = await start(waiting, slow), await start(waiting, fast)
    done, _ = await asyncio.wait(
        {asyncio.create_task(first.result()), asyncio.create_task(second.result())},
        return_when=asyncio.FIRST_COMPLETED,
    )
    (winner,) = done
    return [winner.result(), await first.result()]


def test_who_stops_waiting_for_a_child_takes_nothing_from_others(system):
    slow, fast = system.fresh("slow"), system.fresh("fast")
    run = system.client.start(races_children, slow, fast)
    system.hook(fast)
    system.client.resume_hook(fast, "fast")
    system.hook(slow)
    until(lambda: "child_completed" in system.types(run.id))
    system.client.resume_hook(slow, "slow")
    assert run.result(30) == ["fast", "slow"]


# -- the end of the parent ---------------------------------------------------------------------------------------------


@workflow
async def ends_before_its_child(token: str, policy: Any, how: str) -> str:
    child = await durably.options(on_parent_end=policy).start(waiting, token)
    await create_hook(token=f"{token}-gate")
    if how == "failed":
        raise ValueError(child.id)
    if how == "cancelled":
        await sleep("1h")
    return child.id


@pytest.mark.parametrize("how", ["completed", "failed", "cancelled"])
@pytest.mark.parametrize("policy", ["abandon", "cancel"])
def test_a_child_goes_on_after_its_parent_unless_it_is_to_be_cancelled_with_it(system, policy, how):
    token = system.fresh("orphan")
    parent = system.client.start(ends_before_its_child, token, policy, how)
    child = system.client.get_run(system.hook(token).run_id)
    system.hook(f"{token}-gate")
    system.client.resume_hook(f"{token}-gate")
    if how == "cancelled":
        until(lambda: "wait_created" in system.types(parent.id))
        parent.cancel()
    with contextlib.suppress(RunFailedError, RunCancelledError):
        parent.result(30)
    assert parent.status() == how
    if policy == "cancel":
        with pytest.raises(RunCancelledError, match=f"parent {parent.id} has ended"):
            child.result(30)
    else:
        assert system.hook(token).run_id == child.id
        system.client.resume_hook(token, "alone")
        assert child.result(30) == "alone"


@workflow
async def is_the_grandparent(token: str) -> None:
    await durably.options(on_parent_end="cancel").start(ends_before_its_child, token, "cancel", "cancelled")
    await create_hook(token=f"{token}-grand")


def test_cancelling_goes_down_the_generations(system):
    token = system.fresh("grandchild")
    run = system.client.start(is_the_grandparent, token)
    grandchild = system.client.get_run(system.hook(token).run_id)
    system.hook(f"{token}-grand")
    run.cancel()
    with pytest.raises(RunCancelledError):
        grandchild.result(30)
    with pytest.raises(RunCancelledError):
        system.client.get_run(grandchild.describe().parent.run_id).result(30)


# -- other runs --------------------------------------------------------------------------------------------------------


@workflow
async def starts_by_id(run_id: str, item: str) -> Any:
    child = await durably.options(run_id=run_id).start(packing, item)
    return [child.id, await child.result()]


def test_a_start_with_the_id_of_a_run_attaches_to_it_whoever_started_it(system):
    run_id = system.fresh("shared")
    first = system.client.options(run_id=run_id).start(packing, "first")
    others = [system.client.start(starts_by_id, run_id, "other") for _ in range(3)]
    assert [run.result(30) for run in others] == [[run_id, ["picked first"]]] * 3
    assert first.describe().parent is None
    ended = system.client.start(starts_by_id, run_id, "late")
    assert ended.result(30) == [run_id, ["picked first"]]


@workflow
async def starts_twice(run_id: str) -> Any:
    first = await durably.options(run_id=run_id).start(packing, "a")
    second = await durably.options(run_id=run_id).start(packing, "b")
    return [await first.result(), await second.result()]


def test_one_workflow_may_start_one_id_twice_and_has_one_child(system):
    run = system.client.start(starts_twice, system.fresh("double"))
    assert run.result(30) == [["picked a"], ["picked a"]]


@workflow
async def waits_for_anybodys(run_id: str) -> Any:
    return await get_run(run_id).result()


def test_any_run_can_be_waited_for_by_its_id(system):
    token = system.fresh("anybody")
    other = system.client.start(waiting, token)
    before = [system.client.start(waits_for_anybodys, other.id) for _ in range(3)]
    for run in before:
        until(lambda run=run: "child_created" in system.types(run.id))
    system.hook(token)
    system.client.resume_hook(token, "news")
    after = system.client.start(waits_for_anybodys, other.id)
    assert [run.result(30) for run in [*before, after]] == ["news"] * 4


@workflow
async def waits_for_nobody() -> list[str]:
    said = []
    for run_id in ("wrun_nobody", get_workflow_metadata().run_id):
        try:
            await get_run(run_id).result()
        except DurablyError as e:
            said.append(f"{type(e).__name__}: {e}")
    return said


def test_waiting_for_a_run_that_is_not_there_or_for_itself_is_an_error(system):
    unknown, itself = system.client.start(waits_for_nobody).result(30)
    assert "wrun_nobody" in unknown
    assert unknown.startswith(RunNotFoundError.__name__)
    assert "own end" in itself


@workflow
async def cancels_anybodys(run_id: str) -> str:
    other = get_run(run_id)
    await other.cancel("by another run")
    try:
        await other.result()
    except RunCancelledError as e:
        return str(e)
    return "not reached"


def test_any_run_can_be_cancelled_by_its_id(system):
    token = system.fresh("victim")
    other = system.client.start(waiting, token)
    system.hook(token)
    assert "by another run" in system.client.start(cancels_anybodys, other.id).result(30)
    assert other.status() == "cancelled"


# -- options -----------------------------------------------------------------------------------------------------------


@workflow
async def starts_with_options() -> Any:
    child = await durably.options(delay=0.05, attributes={"kind": "lamp"}).start(packing, "lamp")
    return [child.id, await child.result()]


def test_a_child_may_be_delayed_and_have_attributes(system):
    parent = system.client.start(starts_with_options)
    child_id, result = parent.result(30)
    child = system.client.get_run(child_id)
    assert result == ["picked lamp"]
    assert child.describe().attributes == {"kind": "lamp"}
    asked_for = next(e for e in parent.events() if e.type == "child_created")
    assert asked_for.data.start_at == asked_for.at + 50
    created, started = child.events()[:2]
    assert (created.type, started.type) == ("run_created", "run_started")
    assert started.at == max(created.at, asked_for.data.start_at)


@workflow
async def hands_its_child_on(token: str) -> Any:
    child = await start(waiting, token)
    return [await waits_for_a_handle(child.id), child.id]


@step
async def waits_for_a_handle(run_id: str) -> str:
    return await get_run(run_id).status()


def test_a_step_can_ask_about_any_run(system):
    token = system.fresh("asked")
    run = system.client.start(hands_its_child_on, token)
    status, child_id = run.result(30)
    assert status in {"pending", "running"}
    system.hook(token)
    system.client.resume_hook(token, 1)
    assert system.client.get_run(child_id).result(30) == 1


@step
async def starts_in_the_background(run_id: str, item: str) -> str:
    return (await durably.options(run_id=run_id).start(packing, item)).id


@step
async def waits_in_a_step(run_id: str) -> list[str]:
    return await get_run(run_id).result()


@workflow
async def spawns_in_a_step(run_id: str) -> list[str]:
    return await waits_in_a_step(await starts_in_the_background(run_id, "desk"))


def test_a_step_may_start_a_run_and_another_one_wait_for_it(system):
    run_id = system.fresh("background")
    assert system.client.start(spawns_in_a_step, run_id).result(30) == ["picked desk"]
    assert system.client.get_run(run_id).describe().parent is None


@workflow
async def ships(order: str) -> str:
    await ship(order)
    return get_workflow_metadata().run_id


@workflow
async def places(order: str) -> str:
    first = await pick(order)
    child = await start(ships, order)
    await pick(first)
    return await child.result()


def test_a_child_is_started_once_however_often_its_parent_is_replayed(system):
    orders = [system.fresh("order") for _ in range(20)]
    runs = [system.client.start(places, order) for order in orders]
    children = [run.result(60) for run in runs]
    assert len(set(children)) == 20
    if system.mode != "restart":  # there, an early request may have gone out twice
        assert {STARTED[order] for order in orders} == {1}
    commands = [record for _, record in checker.read(system.broker, system.catalogue.commands)]
    starts = Counter(record.run_id for record in commands if isinstance(record, records.StartRun))
    assert {starts[child] for child in children} == {1}
