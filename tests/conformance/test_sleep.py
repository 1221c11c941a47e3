"""Sleeping: durable waits, to the millisecond."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from durably import DurablyError, RunFailedError, sleep, step, workflow
from harness import until


@step
async def tick(n: int) -> int:
    return n


@step(max_retries=0)
async def sleeps_in_a_step() -> None:
    await sleep(1)


@workflow
async def naps(seconds: float) -> float:
    before = time.time()
    await sleep(seconds)
    return round(time.time() - before, 3)


@workflow
async def naps_in_every_unit() -> list[float]:
    naps_taken = []
    in_half_a_second = datetime.now(UTC) + timedelta(milliseconds=500)
    for value in (0.02, "20ms", timedelta(milliseconds=20), in_half_a_second):
        before = time.time()
        await sleep(value)
        naps_taken.append(round(time.time() - before, 3))
    return naps_taken


def test_a_sleep_takes_seconds_texts_timedeltas_and_instants(system):
    assert system.client.start(naps_in_every_unit).result(30) == [0.02, 0.02, 0.02, 0.44]


@pytest.mark.parametrize("seconds", [0, 0.001, 0.03, 0.25])
def test_a_sleep_is_as_long_as_asked_for_to_the_millisecond(system, seconds):
    run = system.client.start(naps, seconds)
    assert run.result(30) == seconds
    waits = [e for e in run.events() if e.type.startswith("wait_")]
    if waits:
        created, completed = waits
        assert created.data.due_at - created.at == round(seconds * 1000)
        assert completed.at == created.data.due_at, "whenever the processor came to it"


@workflow
async def sleeps_until_the_past() -> str:
    await sleep(datetime.now(UTC) - timedelta(days=1))
    return "at once"


def test_an_instant_in_the_past_is_no_wait(system):
    assert system.client.start(sleeps_until_the_past).result(30) == "at once"


@workflow
async def naps_in_parallel(n: int) -> float:
    before = time.time()
    await asyncio.gather(*(sleep(0.1) for _ in range(n)))
    return round(time.time() - before, 3)


def test_parallel_sleeps_take_as_long_as_one(system):
    run = system.client.start(naps_in_parallel, 20)
    assert run.result(30) == 0.1
    assert system.types(run.id).count("wait_completed") == 20


@workflow
async def naps_wrongly(value: Any) -> None:
    await sleep(value)


@pytest.mark.parametrize("value", [-1, "soon", float("nan"), "", "-5s", None, [1]])
def test_what_is_no_duration_raises_in_the_workflow(system, value):
    run = system.client.start(naps_wrongly, value)
    with pytest.raises(RunFailedError) as raised:
        run.result(30)
    assert isinstance(raised.value.cause, ValueError | TypeError)


@workflow
async def naps_until_a_naive_instant() -> None:
    await sleep(datetime(2099, 1, 1))


def test_an_instant_without_a_time_zone_is_refused(system):
    with pytest.raises(RunFailedError) as raised:
        system.client.start(naps_until_a_naive_instant).result(30)
    assert isinstance(raised.value.cause, ValueError | TypeError)


@workflow
async def polls(times: int) -> list[int]:
    seen = []
    for n in range(times):
        seen.append(await tick(n))
        await asyncio.sleep(0.01)
    return seen


def test_a_polling_loop_sleeps_between_its_steps(system):
    runs = [system.client.start(polls, 8) for _ in range(10)]
    assert [run.result(60) for run in runs] == [list(range(8))] * 10


@workflow
async def gives_up_waiting() -> str:
    try:
        async with asyncio.timeout(0.02):
            await sleep("30d")
    except TimeoutError:
        pass
    task = asyncio.create_task(asyncio.sleep(3600))
    await tick(1)
    task.cancel()
    return "done"


def test_a_sleep_that_nobody_waits_for_any_more_is_closed_at_once(system):
    run = system.client.start(gives_up_waiting)
    assert run.result(30) == "done"
    closed = [e.data.cancelled for e in run.events() if e.type == "wait_completed"]
    assert sorted(closed) == [False, True, True]


@workflow
async def sleeps_for_ages() -> None:
    await asyncio.gather(sleep("400d"), sleep(1e10))


def test_a_sleep_may_be_longer_than_any_timer_of_the_machine(system):
    run = system.client.start(sleeps_for_ages)
    until(lambda: system.types(run.id).count("wait_created") == 2)
    due = [e.data.due_at - e.at for e in run.events() if e.type == "wait_created"]
    assert min(due) == 400 * 24 * 3600 * 1000
    run.cancel()
    until(lambda: run.status() == "cancelled")


def test_many_runs_sleep_at_once(system):
    n = 200 if system.mode == "live" else 100
    runs = [system.client.start(naps, 0.05) for _ in range(n)]
    assert all(run.result(60) >= 0.05 for run in runs)


def test_sleeping_outside_of_workflow_code_says_what_to_use_instead(system):
    with pytest.raises(DurablyError, match="workflow only"):
        asyncio.run(sleep(1))
    with pytest.raises(RunFailedError, match=r"asyncio\.sleep or time\.sleep"):
        system.client.start(naps_in_a_step).result(30)


@workflow
async def naps_in_a_step() -> None:
    await sleeps_in_a_step()
