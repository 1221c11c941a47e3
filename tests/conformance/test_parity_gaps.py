"""Behaviours that no other test holds to by itself: what may follow the end of a run, and what its log must not have."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from durably import (
    ConfigurationError,
    HookNotFoundError,
    RunCancelledError,
    create_hook,
    create_webhook,
    get_writable,
    step,
    workflow,
)
from durably.web import Request, Response
from durably_schemas import Codec
from harness import System, until

TERMINAL = {"run_completed", "run_failed", "run_cancelled"}
RACES = 60


# -- the end of a run --------------------------------------------------------------------------------------------------


@step(name="parity.echo")
async def echo(n: int) -> int:
    return n


@workflow
async def ends_with_a_step(n: int) -> int:
    return await echo(n)


def test_a_cancellation_that_races_with_the_end_leaves_one_end(system: System) -> None:
    def race(n: int) -> str:
        run = system.client.start(ends_with_a_step, n)
        time.sleep(n % 15 * 0.003)
        run.cancel(reason=f"race {n}")
        try:
            ended = "completed" if run.result(60) == n else "with another result"
        except RunCancelledError:
            ended = "cancelled"
        run.cancel()
        types = system.types(run.id)
        assert [name for name in types if name in TERMINAL] == [types[-1]] == [f"run_{ended}"]
        assert run.status() == ended
        return ended

    with ThreadPoolExecutor(6) as pool:
        assert set(pool.map(race, range(RACES))) <= {"completed", "cancelled"}


@step
async def outlives_its_run(seconds: float) -> str:
    await asyncio.sleep(seconds)
    return "late"


@workflow
async def ends_early(token: str) -> str:
    create_hook(token=token)
    late = asyncio.create_task(outlives_its_run(0.5))
    await asyncio.sleep(0.05)
    assert not late.done()
    return "early"


def test_nothing_follows_the_end_of_a_run(system: System) -> None:
    token = system.fresh("late")
    run = system.client.start(ends_early, token)
    assert run.result(60) == "early"
    log = system.types(run.id)
    assert log[-1] == "run_completed"
    with pytest.raises(HookNotFoundError):
        system.client.resume_hook(token, "late")
    run.cancel(reason="late")
    again = system.client.options(run_id=run.id).start(ends_early, token)
    assert again.result(60) == "early"
    time.sleep(1)  # longer than the step takes, whose result nobody awaits
    assert system.types(run.id) == log


# -- streams -----------------------------------------------------------------------------------------------------------


@step
async def writes(text: str) -> int:
    out = get_writable("values")
    for n in range(3):
        await out.write({"text": text[::-1], "n": n})
    await out.close()
    return 3


@workflow
async def writes_values(text: str) -> int:
    return await writes(text)


def test_what_streams_hold_is_not_in_the_log(system: System) -> None:
    run = system.client.start(writes_values, "never recorded")
    assert run.result(60) == 3
    assert [value["text"] for value in run.stream("values")] == ["dedrocer reven"] * 3
    events = run.events()
    encoded = b"".join(Codec().encode(event) for event in events)
    assert b"never recorded" in encoded  # as the argument that it was
    assert b"dedrocer reven" not in encoded
    (done,) = (event.data for event in events if event.type == "step_completed")
    assert [(written.namespace, written.chunks) for written in done.streams] == [("values", 3)]


# -- webhooks ----------------------------------------------------------------------------------------------------------


@workflow
async def makes_webhooks(token: str) -> list[Any]:
    refused = []
    for wrong in ("at once", "", 202, b"thanks", {"status": 200}, Response, Request("GET", "http://localhost/")):
        try:
            create_webhook(token=token, respond_with=wrong)  # type: ignore[arg-type]
        except ConfigurationError as e:
            refused.append("give a Response" in str(e))
    async with create_webhook(token=token, respond_with=Response(status=204)) as webhook:
        return [*refused, await (await webhook).text()]


def test_a_webhook_that_is_refused_holds_nothing_and_a_right_one_may_follow(system: System) -> None:
    token = system.fresh("webhook")
    run = system.client.start(makes_webhooks, token)
    until(lambda: "hook_created" in system.types(run.id))
    assert system.hook(token).response.status == 204
    answer = system.client.resume_webhook(token, Request("POST", "http://localhost/", body="x"))
    assert answer.status == 204
    assert run.result(60) == [True] * 7 + ["x"]
    assert system.types(run.id).count("hook_created") == 1
