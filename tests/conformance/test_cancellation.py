"""Cancelling runs, steps and waits: what workflow code sees of it, and what is recorded."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest
from durably import (
    RunCancelledError,
    RunFailedError,
    RunNotFoundError,
    StepTimeoutError,
    create_hook,
    get_step_metadata,
    sleep,
    step,
    workflow,
)
from harness import until

CANCELLED: set[str] = set()
"""Steps that were cancelled while they ran."""


@step
async def note(text: str) -> str:
    return text


@step
async def works_long(seconds: float) -> str:
    try:
        await asyncio.sleep(seconds)
    except asyncio.CancelledError:
        CANCELLED.add(get_step_metadata().step_id)
        raise
    return "worked"


@step(backoff="10ms", max_retries=1000)
async def never_succeeds() -> None:
    raise RuntimeError("again")


# -- cancelling a run --------------------------------------------------------------------------------------------------


@workflow
async def cleans_up_in_finally() -> str:
    try:
        await sleep("1h")
    finally:
        await note("cleaned up")
    return "not reached"


@workflow
async def cleans_up_in_except() -> str:
    try:
        await create_hook()
    except asyncio.CancelledError as e:
        await note(f"compensating: {e.args[0]}")
        await sleep(0.01)
        await note("compensated")
        raise
    return "not reached"


def _sleeping(system, workflow, *args):
    """A run that has come as far as its first wait or hook."""
    run = system.client.start(workflow, *args)
    until(lambda: {"wait_created", "hook_created"} & set(system.types(run.id)))
    return run


def test_cleanup_may_run_steps_and_then_the_run_is_cancelled(system):
    runs = [_sleeping(system, cleans_up_in_finally), _sleeping(system, cleans_up_in_except)]
    for run in runs:
        run.cancel(reason="enough")
    for run in runs:
        with pytest.raises(RunCancelledError, match="enough"):
            run.result(30)
        assert run.status() == "cancelled"
    assert system.types(runs[0].id).count("step_completed") == 1
    inputs = [e.data.input for e in runs[1].events() if e.type == "step_created"]
    assert len(inputs) == 2
    assert b"compensating: enough" in inputs[0].data


@workflow
async def swallows_it() -> str:
    try:
        await sleep("1h")
    except asyncio.CancelledError:
        return "stayed"
    return "not reached"


def test_a_workflow_that_swallows_its_cancellation_completes(system):
    run = _sleeping(system, swallows_it)
    run.cancel()
    assert run.result(30) == "stayed"
    assert run.status() == "completed"
    assert "run_cancelling" in system.types(run.id)


@workflow
async def fails_in_its_cleanup() -> None:
    try:
        await sleep("1h")
    finally:
        raise ValueError("worse")


def test_a_workflow_whose_cleanup_fails_has_failed(system):
    run = _sleeping(system, fails_in_its_cleanup)
    run.cancel()
    with pytest.raises(RunFailedError, match="worse"):
        run.result(30)


@workflow
async def waits_in_many_ways(token: str) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(asyncio.sleep(3600))
        group.create_task(works_long(20))
        group.create_task(_await(token))


async def _await(token: str) -> None:
    async with create_hook(token=token) as hook:
        await hook


def test_cancelling_reaches_all_tasks_of_the_run(system):
    token = system.fresh("cancelled")
    run = system.client.start(waits_in_many_ways, token)
    system.hook(token)
    run.cancel()
    with pytest.raises(RunCancelledError):
        run.result(30)
    types = system.types(run.id)
    assert {"step_cancelled", "hook_disposed", "wait_completed"} <= set(types)


@workflow
async def ends_by_itself(n: int) -> int:
    return n


def test_cancelling_what_has_ended_changes_nothing(system):
    run = system.client.start(ends_by_itself, 3)
    assert run.result(30) == 3
    before = system.types(run.id)
    run.cancel()
    assert run.status() == "completed"
    assert system.types(run.id) == before


def test_cancelling_twice_is_cancelling_once(system):
    run = _sleeping(system, cleans_up_in_finally)
    for _ in range(3):
        run.cancel(reason="first")
    with pytest.raises(RunCancelledError):
        run.result(30)
    run.cancel(reason="again")
    types = system.types(run.id)
    assert types.count("run_cancelling") == types.count("run_cancelled") == 1


def test_cancelling_before_the_start_needs_no_workflow_code(system):
    run = system.client.options(delay="1h").start(cleans_up_in_finally)
    run.cancel(reason="not needed")
    with pytest.raises(RunCancelledError, match="not needed"):
        run.result(30)
    assert "run_started" not in system.types(run.id)


def test_cancelling_what_is_unknown_says_so(system):
    with pytest.raises(RunNotFoundError):
        system.client.get_run("nobody").cancel()


@workflow
async def retries_for_ever() -> None:
    await never_succeeds()


def test_cancelling_a_run_ends_the_retries_of_its_steps(system):
    run = system.client.start(retries_for_ever)
    until(lambda: "step_retrying" in system.types(run.id))
    run.cancel()
    with pytest.raises(RunCancelledError):
        run.result(30)
    types = system.types(run.id)
    assert types[-2:] == ["step_cancelled", "run_cancelled"]


@workflow
async def cancels_itself() -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await sleep("1h")


def test_a_workflow_that_cancels_itself_has_failed_and_not_been_cancelled(system):
    with pytest.raises(RunFailedError, match="cancelled itself"):
        system.client.start(cancels_itself).result(30)


@workflow
async def is_cancelled_before_a_step() -> Any:
    with contextlib.suppress(asyncio.CancelledError):
        await sleep("1h")
    task = asyncio.current_task()
    assert task is not None
    return [task.uncancel(), await note("goes on")]


def test_after_a_swallowed_cancellation_steps_work_as_before(system):
    run = _sleeping(system, is_cancelled_before_a_step)
    run.cancel()
    assert run.result(30) == [0, "goes on"]


# -- cancelling tasks within a run -------------------------------------------------------------------------------------


@workflow
async def cancels_a_step(how: str) -> str:
    task = asyncio.create_task(never_succeeds() if how == "retrying" else works_long(5))
    await note("while it runs")
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    await note("afterwards")
    await sleep(0.05)
    return "went on"


@pytest.mark.parametrize("how", ["running", "retrying"])
def test_cancelling_the_task_of_a_step_is_recorded_and_ends_its_retries(system, how):
    run = system.client.start(cancels_a_step, how)
    assert run.result(30) == "went on"
    events = run.events()
    (cancelled,) = [e for e in events if e.type == "step_cancelled"]
    after = [e for e in events if e.correlation_id == cancelled.correlation_id and e.seq > cancelled.seq]
    assert after == []


def test_a_cancelled_step_is_ended_in_its_worker_and_its_result_ignored(system):
    run = system.client.start(cancels_a_step, "running")
    assert run.result(30) == "went on"
    step_id = next(e.correlation_id for e in run.events() if e.type == "step_cancelled")
    until(lambda: step_id in CANCELLED, timeout=4)


@workflow
async def is_late(seconds: float) -> str:
    try:
        async with asyncio.timeout(0.02):
            return await works_long(seconds)
    except TimeoutError:
        await sleep(0.25)  # until the result has come, too
        return "too late"


def test_a_late_result_of_a_cancelled_step_is_ignored(system):
    runs = [system.client.start(is_late, seconds) for seconds in (0.03, 0.05, 0.1, 0.2)]
    for run in runs:
        result = run.result(30)
        ends = {"step_completed", "step_failed", "step_cancelled"} & set(system.types(run.id))
        # A processor that comes late finds the result before it looks at the time; but one of the two counts, not both.
        assert (result, ends) in [("too late", {"step_cancelled"}), ("worked", {"step_completed"})]
    assert result == "too late" or system.mode == "restart"


@workflow
async def cancels_before_anything_is_recorded() -> str:
    task = asyncio.create_task(works_long(5))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return "done"


def test_a_step_that_is_cancelled_at_once_leaves_no_trace(system):
    run = system.client.start(cancels_before_anything_is_recorded)
    assert run.result(30) == "done"
    assert system.types(run.id) == ["run_created", "run_started", "run_completed"]


@workflow
async def shields() -> list[str]:
    task = asyncio.create_task(works_long(0.1))
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(asyncio.shield(task), 0.02)
    return [await note("meanwhile"), await task]


def test_a_shielded_step_outlives_its_timeout(system):
    run = system.client.start(shields)
    assert run.result(30) == ["meanwhile", "worked"]
    assert "step_cancelled" not in system.types(run.id)


@workflow
async def times_out_in_every_way(token: str) -> list[str]:
    said = []
    for attempt in (_by_timeout, _by_wait_for, _by_wait, _by_a_hook):
        try:
            await attempt(token)
        except TimeoutError as e:
            said.append(f"{attempt.__name__} {isinstance(e, StepTimeoutError)}")
    return said


async def _by_timeout(token: str) -> None:
    async with asyncio.timeout(0.01):
        await sleep("1h")


async def _by_wait_for(token: str) -> None:
    await asyncio.wait_for(works_long(5), 0.01)


async def _by_wait(token: str) -> None:
    _, pending = await asyncio.wait({asyncio.create_task(asyncio.sleep(3600))}, timeout=0.01)
    for task in pending:
        task.cancel()
    raise TimeoutError


async def _by_a_hook(token: str) -> None:
    async with create_hook(token=token) as hook, asyncio.timeout(0.01):
        await hook


def test_timeouts_of_asyncio_bound_sleeps_steps_and_hooks(system):
    run = system.client.start(times_out_in_every_way, system.fresh("timeout"))
    names = ["_by_timeout", "_by_wait_for", "_by_wait", "_by_a_hook"]
    assert run.result(30) == [f"{name} False" for name in names]


@workflow
async def one_fails() -> list[str]:
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(works_long(20))
            group.create_task(_fails_soon())
    except ExceptionGroup as e:
        return [str(each) for each in e.exceptions]
    return []


async def _fails_soon() -> None:
    await note("before the failure")
    raise ValueError("soon")


def test_a_task_group_cancels_the_steps_beside_the_one_that_fails(system):
    run = system.client.start(one_fails)
    assert run.result(30) == ["soon"]
    assert system.types(run.id).count("step_cancelled") == 1
