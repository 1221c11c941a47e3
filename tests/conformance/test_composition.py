"""Putting workflows and steps together: calls in every direction, and the patterns that users build."""

from __future__ import annotations

import asyncio
from collections import Counter
from itertools import pairwise
from typing import Any

import durably
import pytest
from durably import (
    DurablyError,
    RetryableError,
    RunFailedError,
    create_hook,
    get_step_metadata,
    get_workflow_metadata,
    sleep,
    start,
    step,
    workflow,
)
from harness import until

CHARGED: Counter[str] = Counter()


@step
async def double(n: int) -> int:
    return 2 * n


@step
def halve(n: int) -> int:
    return n // 2


@step
async def quadruple(n: int) -> int:
    return await double(await double(n))


@step
def calls_a_plain_step(n: int) -> int:
    return halve(n)


@workflow
async def doubles(n: int) -> int:
    for _ in range(3):
        n = await double(n)
    return n


# -- calls in every direction ------------------------------------------------------------------------------------------


def test_a_step_outside_of_a_workflow_is_the_function():
    assert asyncio.run(quadruple(3)) == 12
    assert halve(8) == 4
    with pytest.raises(DurablyError, match="in a step only"):
        get_step_metadata()
    with pytest.raises(DurablyError, match="workflow or a step only"):
        get_workflow_metadata()


def test_a_workflow_outside_of_a_run_says_how_to_start_it():
    with pytest.raises(DurablyError, match=r"start\(doubles"):
        doubles(1)


@workflow
async def calls_steps_that_call_steps() -> list[int]:
    return [await quadruple(3), await calls_a_plain_step(8)]


def test_a_step_that_a_step_calls_is_a_plain_call_within_the_same_attempt(system):
    run = system.client.start(calls_steps_that_call_steps)
    assert run.result(30) == [12, 4]
    assert [e.data.step for e in run.events() if e.type == "step_created"] == ["quadruple", "calls_a_plain_step"]


@workflow
async def inlines(n: int) -> list[Any]:
    return [await doubles(n), await asyncio.gather(doubles(1), doubles(2)), get_workflow_metadata().workflow_name]


def test_a_workflow_that_a_workflow_calls_becomes_part_of_its_run(system):
    run = system.client.start(inlines, 5)
    assert run.result(30) == [40, [8, 16], "inlines"]
    types = system.types(run.id)
    assert types.count("step_completed") == 9
    assert "child_created" not in types


@step(max_retries=0)
async def calls_a_workflow() -> int:
    return await doubles(1)


@workflow
async def calls_a_workflow_in_a_step() -> int:
    return await calls_a_workflow()


def test_a_workflow_cannot_be_inlined_into_a_step(system):
    with pytest.raises(RunFailedError, match="outside of a run"):
        system.client.start(calls_a_workflow_in_a_step).result(30)


class Pricing:
    """Steps and workflows may be static methods."""

    @staticmethod
    @step(name="pricing.quote")
    async def quote(n: int) -> int:
        return n * 10

    @staticmethod
    @workflow(name="pricing.offer")
    async def offer(n: int) -> int:
        return await Pricing.quote(n)


def test_steps_and_workflows_may_be_static_methods_with_names_of_their_own(system):
    assert system.client.start(Pricing.offer, 3).result(30) == 30
    assert system.client.start("pricing.offer", 4).result(30) == 40


@workflow
async def recurses(n: int) -> int:
    return 0 if n == 0 else await double(1) + await recurses(n - 1)


def test_a_workflow_may_call_itself(system):
    assert system.client.start(recurses, 6).result(30) == 12


# -- patterns ----------------------------------------------------------------------------------------------------------


@workflow
async def in_batches(n: int, size: int) -> int:
    total = 0
    for first in range(0, n, size):
        total += sum(await asyncio.gather(*(double(i) for i in range(first, min(n, first + size)))))
    return total


def test_fan_out_in_batches(system):
    assert system.client.start(in_batches, 250, 50).result(60) == 250 * 249


@workflow
async def at_most_at_once(n: int, limit: int) -> list[int]:
    gate = asyncio.Semaphore(limit)
    running, most = 0, 0

    async def one(i: int) -> int:
        nonlocal running, most
        async with gate:
            running += 1
            most = max(most, running)
            result = await double(i)
            running -= 1
            return result

    results = await asyncio.gather(*(one(i) for i in range(n)))
    return [most, *results]


def test_a_semaphore_bounds_what_runs_at_once(system):
    most, *results = system.client.start(at_most_at_once, 20, 3).result(30)
    assert most == 3
    assert results == [2 * i for i in range(20)]


@workflow
async def is_approved_in_time(token: str, seconds: float) -> str:
    async with create_hook(token=token, metadata={"what": "order"}) as hook:
        try:
            async with asyncio.timeout(seconds):
                answer = await hook
        except TimeoutError:
            return "nobody answered"
    return f"{answer['by']} said {answer['answer']}"


def test_human_approval_with_a_deadline(system):
    token, late = system.fresh("approval"), system.fresh("late")
    approved = system.client.start(is_approved_in_time, token, 60)
    ignored = system.client.start(is_approved_in_time, late, 0.05)
    assert system.hook(token).metadata == {"what": "order"}
    system.client.resume_hook(token, {"by": "Ada", "answer": "yes"})
    assert approved.result(30) == "Ada said yes"
    assert ignored.result(30) == "nobody answered"


@step
async def looks(n: int) -> str:
    return "ready" if n >= 3 else "not yet"


@workflow
async def polls_until_ready() -> int:
    n = 0
    while await looks(n) != "ready":
        n += 1
        await sleep(0.005)
    return n


def test_a_polling_loop(system):
    assert system.client.start(polls_until_ready).result(30) == 3


@step(backoff="1h")
async def is_rate_limited() -> int:
    if get_step_metadata().attempt < 3:
        raise RetryableError("429", retry_after="20ms")
    return get_step_metadata().attempt


@workflow
async def obeys_a_rate_limit() -> int:
    return await is_rate_limited()


def test_a_step_waits_as_long_as_a_rate_limit_says(system):
    assert system.client.start(obeys_a_rate_limit).result(30) == 3


@step(backoff="5ms")
async def charge(order: str) -> str:
    key = get_step_metadata().step_id
    CHARGED[key] += 1  # as a payment service that knows idempotency keys would
    if get_step_metadata().attempt < 3:
        raise ConnectionError("the answer got lost")
    return key


@workflow
async def charges_once(order: str) -> list[str]:
    return [await charge(order), await charge(order)]


def test_the_step_id_is_an_idempotency_key(system):
    first, second = system.client.start(charges_once, "7").result(30)
    assert first != second
    assert CHARGED[first] >= 3
    assert len({key for key in CHARGED if key in {first, second}}) == 2


@workflow
async def is_exclusive(key: str, log_token: str) -> str:
    while True:
        async with create_hook(token=key) as mutex:
            holder = await mutex.get_conflict()
            if holder is None:
                await sleep(0.01)
                return "had it"
        await asyncio.wait({asyncio.create_task(_ended(holder))})


async def _ended(run: Any) -> None:
    try:
        await run.result()
    except DurablyError:
        return


def test_a_token_is_a_mutex(system):
    key = system.fresh("mutex")
    runs = [system.client.start(is_exclusive, key, key) for _ in range(5)]
    assert [run.result(60) for run in runs] == ["had it"] * 5
    critical = sorted(_held(run) for run in runs)
    assert all(earlier[1] <= later[0] for earlier, later in pairwise(critical))


def _held(run):
    events = run.events()
    granted = [e for e in events if e.type == "hook_granted"][-1]
    return granted.at, events[-1].at


@step
async def pairs(n: int) -> list[int]:
    return list(range(n))


@workflow
async def maps_and_reduces(n: int) -> int:
    items = await pairs(n)
    children = [await start(doubles, item) for item in items]
    return sum(await asyncio.gather(*(child.result() for child in children)))


def test_map_and_reduce_over_children(system):
    assert system.client.start(maps_and_reduces, 10).result(30) == 8 * 45


@workflow
async def continues_as_new(n: int, total: int) -> Any:
    total += await double(n)
    if n == 0:
        return total
    follower = await durably.options(run_id=f"{get_workflow_metadata().run_id}-{n}").start(
        continues_as_new, n - 1, total
    )
    return follower.id


def test_a_long_story_goes_on_in_another_run(system):
    run = system.client.options(run_id=system.fresh("chapter")).start(continues_as_new, 3, 0)
    found = run.result(30)
    while isinstance(found, str):
        found = system.client.get_run(found).result(30)
    assert found == 12


@workflow
async def ticks(token: str, times: int) -> int:
    async with create_hook(token=token) as hook:
        stopped = asyncio.create_task(_next(hook))
        n = 0
        while not stopped.done() and n < times:
            await asyncio.wait({stopped}, timeout=0.005)
            n += 1
        return n


async def _next(hook: Any) -> Any:
    return await hook


def test_a_periodic_loop_ends_when_it_is_told_to(system):
    token = system.fresh("ticks")
    run = system.client.start(ticks, token, 100_000)
    until(lambda: system.types(run.id).count("wait_completed") >= 3)
    system.hook(token)
    system.client.resume_hook(token, "stop")
    assert 3 <= run.result(30) < 100_000


@step
async def thinks(messages: list[Any]) -> list[Any]:
    """Stands for a language model: asks for two tools, then for a person, then answers."""
    turn = sum(isinstance(message, list) for message in messages)
    return [["double", 4, "double", 5], ["ask"], []][turn]


@workflow
async def is_an_agent(token: str) -> list[Any]:
    messages: list[Any] = []
    while calls := await thinks(messages):
        if calls == ["ask"]:
            messages.append([await create_hook(token=token)])
        else:
            messages.append(await asyncio.gather(*(double(n) for n in calls[1::2])))
    return messages


def test_an_agent_that_calls_tools_and_asks_a_person(system):
    token = system.fresh("agent")
    run = system.client.start(is_an_agent, token)
    system.hook(token)
    system.client.resume_hook(token, "go on")
    assert run.result(30) == [[8, 10], ["go on"]]


@workflow
async def starts_now_and_awaits_later(token: str) -> list[Any]:
    child = await start(is_approved_in_time, token, 60)
    meanwhile = await double(4)
    return [meanwhile, await child.result()]


def test_start_now_and_await_later(system):
    token = system.fresh("later")
    run = system.client.start(starts_now_and_awaits_later, token)
    system.hook(token)
    system.client.resume_hook(token, {"by": "Ada", "answer": "no"})
    assert run.result(30) == [8, "Ada said no"]
