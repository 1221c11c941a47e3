"""Runs in a `durably.testing.WorkflowEnvironment`: what tests of users rely on."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import durably
import pytest
from durably import (
    ConfigurationError,
    DurablyError,
    HookNotFoundError,
    Readable,
    RunBlockedError,
    RunCancelledError,
    RunFailedError,
    StepTimeoutError,
    get_step_metadata,
    get_writable,
    sleep,
    step,
    workflow,
)
from durably.durations import milliseconds
from durably.testing import RunStuckError, WorkflowEnvironment
from durably.web import Request, Response

RETRIED = ["step_started", "step_retrying", "step_scheduled"]


@step
async def kit_charge(cents: int) -> str:
    return f"receipt-{cents}"


@step
def kit_pack(what: str) -> str:
    assert threading.current_thread() is not threading.main_thread(), "it would block the test's loop"
    return f"packed {what}"


@workflow
async def kit_order(cents: int) -> list[str]:
    return [await kit_charge(cents), await kit_pack("books")]


@workflow
async def kit_reminder(days: int) -> list[str]:
    for _ in range(days):
        await sleep("1d")
    return [await kit_charge(days)]


@workflow
async def kit_approval(token: str) -> str:
    await kit_charge(1)
    try:
        async with asyncio.timeout(3600), durably.create_hook(token=token) as approval:
            return str(await approval)
    except TimeoutError:
        return "nobody"


@workflow
async def kit_patient(token: str) -> Any:
    return await durably.create_hook(token=token)


# -- steps ---------------------------------------------------------------------------------------------------------


async def test_steps_run_for_real(durably_env: WorkflowEnvironment) -> None:
    run = await durably_env.start(kit_order, 1250)
    assert await run.result() == ["receipt-1250", "packed books"]
    assert run.status == "completed"
    assert [call.args for call in durably_env.calls(kit_charge)] == [(1250,)]


@pytest.mark.parametrize("name", [kit_charge, "kit_charge"])
async def test_a_step_is_replaced_by_a_function(durably_env: WorkflowEnvironment, name: Any) -> None:
    durably_env.replace(name, lambda cents: f"fake-{cents}")
    assert (await (await durably_env.start(kit_order, 5)).result())[0] == "fake-5"
    durably_env.restore(name)
    assert (await (await durably_env.start(kit_order, 5)).result())[0] == "receipt-5"


async def test_a_plain_step_is_replaced_by_an_async_function(durably_env: WorkflowEnvironment) -> None:
    async def fake(what: str) -> str:
        await asyncio.sleep(0)
        return f"no {what}"

    durably_env.replace(kit_pack, fake)
    assert (await (await durably_env.start(kit_order, 5)).result())[1] == "no books"


async def test_a_step_is_replaced_by_outcomes_one_after_the_other(durably_env: WorkflowEnvironment) -> None:
    durably_env.replace(kit_charge, [OSError("busy"), ValueError, "third"])
    run = await durably_env.start(kit_order, 5)
    assert (await run.result())[0] == "third"
    assert [call.attempt for call in durably_env.calls(kit_charge)] == [1, 2, 3]
    assert (await (await durably_env.start(kit_order, 5)).result())[0] == "third", "the last outcome stays"


async def test_what_replaces_a_step_must_return_what_the_step_says(durably_env: WorkflowEnvironment) -> None:
    durably_env.replace(kit_charge, lambda _: 42)
    with pytest.raises(RunFailedError, match="kit_charge"):
        await (await durably_env.start(kit_order, 5)).result()


async def test_a_step_that_is_not_there_cannot_be_replaced(durably_env: WorkflowEnvironment) -> None:
    with pytest.raises(ConfigurationError, match="no step 'kit_nobody'"):
        durably_env.replace("kit_nobody", [1])
    with pytest.raises(ConfigurationError, match="one at least"):
        durably_env.replace(kit_charge, [])
    with pytest.raises(TypeError, match=r"a list of outcomes, \['receipt'\]"):
        durably_env.replace(kit_charge, "receipt")


async def test_faults_are_retried_with_the_steps_backoff(durably_env: WorkflowEnvironment) -> None:
    durably_env.fail(kit_charge, times=2, error=OSError("no route"))
    begin = durably_env.now
    run = await durably_env.start(kit_order, 5)
    assert await run.result() == ["receipt-5", "packed books"]
    assert [e.type for e in run.events][3:9] == RETRIED * 2
    assert durably_env.now - begin >= timedelta(seconds=3), "1 s and 2 s of backoff"


async def test_a_fault_that_stays_fails_the_run(durably_env: WorkflowEnvironment) -> None:
    durably_env.fail(kit_charge, times=100, error=OSError("no route"))
    with pytest.raises(RunFailedError) as failed:
        await (await durably_env.start(kit_order, 5)).result()
    assert isinstance(failed.value.cause, OSError)
    assert len(durably_env.calls(kit_charge)) == 4


@step(timeout="50ms", max_retries=0)
async def kit_hanging() -> None:
    await asyncio.Event().wait()


released = threading.Event()


@step(timeout="50ms", max_retries=0)
def kit_blocking() -> None:
    released.wait(60)


@workflow
async def kit_hangs(plain: bool) -> None:
    await (kit_blocking() if plain else kit_hanging())


@pytest.mark.parametrize("plain", [False, True])
async def test_a_steps_timeout_is_real_time(durably_env: WorkflowEnvironment, plain: bool) -> None:
    released.clear()
    with pytest.raises(RunFailedError) as failed:
        await (await durably_env.start(kit_hangs, plain)).result()
    released.set()
    assert isinstance(failed.value.cause, StepTimeoutError)


# -- crashes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crashing", [kit_charge, kit_pack])
async def test_a_step_whose_worker_dies_runs_again_and_counts_once(
    durably_env: WorkflowEnvironment, crashing: Any
) -> None:
    durably_env.crash_after(crashing, times=2)
    run = await durably_env.start(kit_order, 5)
    assert await run.result() == ["receipt-5", "packed books"]
    assert [(c.attempt, c.execution) for c in durably_env.calls(crashing)] == [(1, 1), (1, 2), (1, 3)]
    assert [e.type for e in run.events].count("step_completed") == 2


async def test_runs_survive_their_processor(durably_env: WorkflowEnvironment) -> None:
    run = await durably_env.start(kit_approval, "kit-crash")
    sleeping = await durably_env.start(kit_reminder, 3)
    await durably_env.hook("kit-crash")
    durably_env.crash_processor()
    await durably_env.resume_hook("kit-crash", "Ada")
    durably_env.crash_processor()
    assert await run.result() == "Ada"
    durably_env.crash_processor()
    assert await sleeping.result() == ["receipt-3"]
    assert len(durably_env.calls(kit_charge)) == 2


async def test_a_processor_may_die_while_a_step_runs_and_a_result_is_awaited(durably_env: WorkflowEnvironment) -> None:
    def crash(cents: int) -> str:
        durably_env.crash_processor()
        return f"crashed-{cents}"

    durably_env.replace(kit_charge, crash)
    run = await durably_env.start(kit_order, 7)
    assert (await run.result())[0] == "crashed-7"
    assert len(durably_env.calls(kit_charge)) == 1


chosen: list[int] = []


@workflow
async def kit_undetermined() -> None:
    chosen.append(len(chosen))
    for _ in range(2 + len(chosen)):
        await kit_charge(chosen[-1])


async def test_code_that_is_not_deterministic_is_blocked_where_it_is_replayed(durably_env: WorkflowEnvironment) -> None:
    await (await durably_env.start(kit_undetermined)).result()
    with WorkflowEnvironment(always_replay=True) as strict:
        run = await strict.start(kit_undetermined)
        with pytest.raises(RunBlockedError, match="does not do what its log says"):
            await run.result()
        assert run.status == "blocked"


@pytest.mark.durably(always_replay=True)
async def test_code_that_is_deterministic_is_replayed_without_a_word(durably_env: WorkflowEnvironment) -> None:
    run = await durably_env.start(kit_approval, "kit-replayed")
    await durably_env.resume_hook("kit-replayed", "Ada")
    assert await run.result() == "Ada"


# -- time ----------------------------------------------------------------------------------------------------------


async def test_a_month_of_sleep_takes_no_time(durably_env: WorkflowEnvironment) -> None:
    begin = durably_env.now
    run = await durably_env.start(kit_reminder, 30)
    assert await run.result() == ["receipt-30"]
    assert timedelta(days=30) <= durably_env.now - begin < timedelta(days=30, seconds=1)
    assert run.events[-1].at == round(durably_env.now.timestamp() * 1000)


async def test_time_stands_still_while_nobody_waits(durably_env: WorkflowEnvironment) -> None:
    begin = durably_env.now
    run = await durably_env.start(kit_reminder, 1)
    await durably_env.settle()
    assert (durably_env.now, run.status) == (begin, "running")


async def test_advancing_lets_everything_happen_in_its_order(durably_env: WorkflowEnvironment) -> None:
    durably_env.skip_time = False
    late, early = await durably_env.start(kit_reminder, 2), await durably_env.start(kit_reminder, 1)
    begin = durably_env.now
    await durably_env.advance("1d")
    assert (late.status, early.status) == ("running", "completed")
    await durably_env.advance(begin + timedelta(days=3))
    assert [call.args for call in durably_env.calls(kit_charge)] == [(1,), (2,)]
    assert late.events[-1].at - early.events[-1].at == milliseconds("1d")
    assert durably_env.now == begin + timedelta(days=3)


async def test_time_that_does_not_skip_leaves_a_result_waiting(durably_env: WorkflowEnvironment) -> None:
    durably_env.skip_time = False
    run = await durably_env.start(kit_reminder, 1)
    with pytest.raises(TimeoutError, match="it is running"):
        await run.result(timeout=0.05)
    waiting = asyncio.create_task(run.result())
    await durably_env.advance("1d")
    assert await waiting == ["receipt-1"]
    waiting = asyncio.create_task((await durably_env.start(kit_reminder, 2)).result())
    await asyncio.sleep(0)
    durably_env.skip_time = True
    assert await waiting == ["receipt-2"]


@pytest.mark.durably(now=datetime(2030, 1, 1, tzinfo=UTC))
async def test_a_delay_is_of_the_environments_time(durably_env: WorkflowEnvironment) -> None:
    await durably_env.advance("2h")
    relative = await durably_env.options(run_id="kit-delayed", delay="1h").start(kit_order, 5)
    absolute = await durably_env.options(delay=datetime(2030, 1, 1, 4, tzinfo=UTC)).start(kit_order, 5)
    assert (relative.id, relative.status) == ("kit-delayed", "pending")
    await absolute.result()
    ends = [datetime.fromtimestamp(run.events[-1].at / 1000, UTC).hour for run in (relative, absolute)]
    assert ends == [3, 4]


# -- hooks ---------------------------------------------------------------------------------------------------------


async def test_a_hook_is_resumed_as_soon_as_it_is_there(durably_env: WorkflowEnvironment) -> None:
    run = await durably_env.start(kit_approval, "kit-1")
    summary = await durably_env.resume_hook("kit-1", "Grace", resume_id="x")
    await durably_env.resume_hook("kit-1", "Eve", resume_id="x")
    assert summary.run_id == run.id
    assert await run.result() == "Grace"


async def test_a_timeout_passes_where_nobody_resumes(durably_env: WorkflowEnvironment) -> None:
    assert await (await durably_env.start(kit_approval, "kit-2")).result() == "nobody"


async def test_a_run_that_will_never_end_says_what_it_waits_for(durably_env: WorkflowEnvironment) -> None:
    run = await durably_env.start(kit_patient, "kit-3")
    with pytest.raises(RunStuckError, match=r"it waits for hook 'kit-3', nothing is under way") as stuck:
        await run.result()
    assert stuck.value.run_id == run.id
    assert [hook.token for hook in await run.hooks()] == ["kit-3"]
    await durably_env.resume_hook("kit-3", 1)
    assert await run.result() == 1


async def test_a_hook_that_nobody_opens_is_not_waited_for(durably_env: WorkflowEnvironment) -> None:
    await durably_env.start(kit_order, 1)
    with pytest.raises(HookNotFoundError, match="kit-none"):
        await durably_env.resume_hook("kit-none")


async def test_another_task_may_resume_while_a_result_is_awaited(durably_env: WorkflowEnvironment) -> None:
    async def approve() -> None:
        await durably_env.resume_hook("kit-4", "Ada")

    run = await durably_env.start(kit_approval, "kit-4")
    answer, _ = await asyncio.gather(run.result(), approve())
    assert answer == "Ada"


@step
async def kit_respond(request: Request) -> None:
    await request.respond_with(Response(status=201, body=await request.text()))


@workflow
async def kit_called(manual: bool) -> str:
    respond_with: Any = "manual" if manual else Response(status=204)
    async with durably.create_webhook(token="kit-web", respond_with=respond_with) as webhook:
        request = await webhook
        if manual:
            await kit_respond(request)
        return webhook.url


@pytest.mark.parametrize(("manual", "status", "body"), [(True, 201, "hello"), (False, 204, "")])
async def test_a_webhook_answers(durably_env: WorkflowEnvironment, manual: bool, status: int, body: str) -> None:
    run = await durably_env.start(kit_called, manual)
    response = await durably_env.resume_webhook("kit-web", Request("POST", "http://x.test/", body="hello"))
    assert (response.status, await response.text()) == (status, body)
    assert (await run.result()).startswith("http://gateway.test/")


async def test_a_webhook_to_which_no_step_responds_is_not_waited_for(durably_env: WorkflowEnvironment) -> None:
    durably_env.replace(kit_respond, lambda _: None)
    await durably_env.start(kit_called, True)
    with pytest.raises(RunStuckError, match="no step will ever give it"):
        await durably_env.resume_webhook("kit-web", Request("POST", "http://x.test/", body="hello"))


# -- streams, children, cancellation ---------------------------------------------------------------------------------


@step
async def kit_tell(word: str) -> None:
    await get_writable().write(word)


@workflow
async def kit_talks() -> None:
    for word in ("one", "two", "three"):
        await kit_tell(word)
        await sleep("1h")


@step
async def kit_counting(n: int) -> AsyncIterator[int]:
    for i in range(n):
        yield i


@step
async def kit_sum(values: Readable) -> int:
    return sum([value async for value in values])


@step
def kit_sum_plainly(values: Readable) -> int:
    return sum(values)


@workflow
async def kit_summing(n: int) -> int:
    total = await kit_sum(await kit_counting(n))
    assert await kit_sum_plainly(await kit_counting(n)) == total
    return total


@workflow
async def kit_summing_arguments(values: Readable) -> int:
    return await kit_sum(values)


async def test_a_stream_is_read_while_time_skips(durably_env: WorkflowEnvironment) -> None:
    run = await durably_env.start(kit_talks)
    seen = [(word, durably_env.now) async for word in run.stream()]
    assert [word for word, _ in seen] == ["one", "two", "three"]
    assert seen[2][1] - seen[0][1] >= timedelta(hours=2)
    assert [word async for word in run.stream(start_index=1)] == ["two", "three"]
    assert [word async for word in run.stream(start_index=-1)] == ["three"]
    assert [word async for word in run.stream("other")] == []


@workflow
async def kit_tells_on(token: str) -> None:
    await kit_tell(await durably.create_hook(token=token))


async def test_another_task_may_resume_while_a_stream_is_read(durably_env: WorkflowEnvironment) -> None:
    run = await durably_env.start(kit_tells_on, "kit-told")
    resuming = asyncio.create_task(durably_env.resume_hook("kit-told", "four"))
    assert [word async for word in run.stream()] == ["four"]
    await resuming


async def test_a_stream_that_nobody_writes_is_not_waited_for(durably_env: WorkflowEnvironment) -> None:
    run = await durably_env.start(kit_patient, "kit-silent")
    with pytest.raises(RunStuckError, match="kit-silent"):
        await anext(aiter(run.stream()))


@pytest.mark.parametrize(
    "by",
    [None, [[0, 1, 2, 3]], lambda n: iter(range(n)), lambda n: list(range(n))],
    ids=["own", "outcome", "it", "list"],
)
async def test_steps_that_yield_feed_others(durably_env: WorkflowEnvironment, by: Any) -> None:
    if by is not None:
        durably_env.replace(kit_counting, by)
    assert await (await durably_env.start(kit_summing, 4)).result() == 6


async def test_an_iterator_among_the_arguments_is_a_stream(durably_env: WorkflowEnvironment) -> None:
    async def values() -> AsyncIterator[int]:
        for i in range(4):
            yield i
            await asyncio.sleep(0)

    def plain() -> Iterator[int]:
        yield from range(5)

    assert await (await durably_env.start(kit_summing_arguments, values())).result() == 6
    assert await (await durably_env.start("kit_summing_arguments", plain())).result() == 10


@workflow
async def kit_parent(cents: int) -> list[str]:
    child = await durably.start(kit_order, cents)
    return await child.result()


async def test_children_are_runs_of_the_same_environment(durably_env: WorkflowEnvironment) -> None:
    run = await durably_env.options(attributes={"of": "Ada"}).start(kit_parent, 5)
    assert (await run.result())[0] == "receipt-5"
    parent, child = durably_env.runs
    assert (parent.id, parent.summary.attributes) == (run.id, {"of": "Ada"})
    assert (await child.result())[0] == "receipt-5"
    assert child.summary.parent is not None
    assert child.summary.parent.run_id == run.id


@step
async def kit_undo() -> None: ...


@workflow
async def kit_undone() -> None:
    try:
        await sleep("1h")
    finally:
        await kit_undo()


async def test_a_cancelled_run_cleans_up(durably_env: WorkflowEnvironment) -> None:
    run = await durably_env.start(kit_undone)
    await run.cancel("enough")
    with pytest.raises(RunCancelledError, match="enough"):
        await run.result()
    assert len(durably_env.calls(kit_undo)) == 1


@workflow
async def kit_impatient() -> str:
    try:
        async with asyncio.timeout(5):
            await kit_charge(1)
    except TimeoutError:
        return "gave up"
    return "charged"


async def test_a_step_that_is_no_longer_wanted_is_cancelled(durably_env: WorkflowEnvironment) -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def hangs(_: int) -> str:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        return ""

    durably_env.replace(kit_charge, hangs)
    durably_env.skip_time = False
    run = await durably_env.start(kit_impatient)
    await begun.wait()
    await run.cancel()
    await ended.wait()
    with pytest.raises(RunCancelledError):
        await run.result()


# -- clients -------------------------------------------------------------------------------------------------------


@step
async def kit_starts(cents: int) -> list[str]:
    assert get_step_metadata().attempt == 1
    run = await durably.start(kit_order, cents)
    return await run.result()


@step
def kit_starts_plainly(token: str) -> str:
    asyncio.run(durably.resume_hook(token, "from a thread"))
    return token


@workflow
async def kit_uses_clients() -> list[Any]:
    hook = durably.create_hook(token="kit-inner")
    return [await kit_starts(3), await kit_starts_plainly("kit-inner"), await hook]


async def test_steps_have_clients(durably_env: WorkflowEnvironment) -> None:
    run = await durably_env.start(kit_uses_clients)
    assert await run.result() == [["receipt-3", "packed books"], "kit-inner", "from a thread"]


async def test_the_application_has_a_client(durably_env: WorkflowEnvironment) -> None:
    client = durably_env.client
    run = await client.options(run_id="kit-app").start(kit_reminder, 2)
    assert await run.result() == ["receipt-2"]
    assert [summary.run_id for summary in await client.runs()] == ["kit-app"]
    assert [e.type for e in await run.events()] == [e.type for e in durably_env.run("kit-app").events]
    talking = await client.start(kit_talks)
    await talking.result()
    assert [word async for word in talking.stream()] == ["one", "two", "three"]


def test_an_environment_belongs_to_one_loop() -> None:
    with WorkflowEnvironment() as environment:
        asyncio.run(environment.settle())
        with pytest.raises(DurablyError, match="another event loop"):
            asyncio.run(environment.settle())


def test_the_guards_are_gone_with_the_environment_that_brought_them() -> None:
    before = random.random
    with WorkflowEnvironment():
        assert random.random is not before
        with WorkflowEnvironment():
            pass
        assert random.random is not before
    assert random.random is before


async def test_what_breaks_the_processor_is_told_to_who_waits(
    durably_env: WorkflowEnvironment, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = await durably_env.start(kit_patient, "kit-broken")

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("durably_processor.committer.Committer.commit", broken)
    with pytest.raises(ZeroDivisionError):
        await run.result()
