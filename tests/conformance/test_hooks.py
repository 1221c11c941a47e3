"""Hooks: points where a run waits for outside data, addressed by tokens."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import durably
import msgspec
import pydantic
import pytest
from durably import (
    AsyncClient,
    ConfigurationError,
    DurablyError,
    HookConflictError,
    HookDisposedError,
    HookNotFoundError,
    RunCancelledError,
    RunFailedError,
    SerializationError,
    create_hook,
    define_hook,
    sleep,
    step,
    workflow,
)
from durably.client.exchange import answer
from durably_schemas.records import Payload, ResumeHook
from harness import until


@step
async def echo(value: Any) -> Any:
    return value


# -- awaiting ----------------------------------------------------------------------------------------------------------


@workflow
async def awaits_once(token: str | None) -> Any:
    return await create_hook(token=token)


@workflow
async def tells_its_token() -> Any:
    hook = create_hook(metadata="for whoever looks")
    return [hook.token, await hook]


def test_a_payload_reaches_the_workflow_that_awaits_it(system):
    token = system.fresh("order")
    run = system.client.start(awaits_once, token)
    system.hook(token)
    system.client.resume_hook(token, {"by": "Ada"})
    assert run.result(30) == {"by": "Ada"}


def test_a_default_token_belongs_to_its_run_and_cannot_be_guessed(system):
    runs = [system.client.start(tells_its_token) for _ in range(5)]
    tokens = []
    for run in runs:
        (hook,) = _open_hooks(system, run, 1)
        tokens.append(hook.token)
        system.client.resume_hook(hook.token, 1)
        assert run.result(30) == [hook.token, 1], "and is the same at every replay"
    assert all(
        token.startswith("hook_") and token.endswith(f".{run.id}") for token, run in zip(tokens, runs, strict=True)
    )
    assert len({token.partition(".")[0] for token in tokens}) == 5


def _open_hooks(system, run, count):
    return until(lambda: found if len(found := run.hooks()) == count else None)


@workflow
async def awaits_in_turn(token: str, n: int) -> list[Any]:
    hook = create_hook(token=token)
    return [await hook for _ in range(n)]


def test_a_hook_may_be_awaited_any_number_of_times(system):
    token = system.fresh("turns")
    run = system.client.start(awaits_in_turn, token, 5)
    system.hook(token)
    for n in range(5):
        system.client.resume_hook(token, n)
    assert run.result(30) == [0, 1, 2, 3, 4]


@workflow
async def looks_late(token: str, gate: str, n: int) -> list[Any]:
    hook = create_hook(token=token)
    await create_hook(token=gate)
    return [await hook for _ in range(n)]


def test_payloads_that_arrive_before_anybody_awaits_are_kept_in_order(system):
    token, gate = system.fresh("early"), system.fresh("gate")
    run = system.client.start(looks_late, token, gate, 4)
    system.hook(token)
    for n in range(6):
        system.client.resume_hook(token, n)
    system.hook(gate)
    system.client.resume_hook(gate)
    assert run.result(30) == [0, 1, 2, 3], "more payloads than awaits do no harm"


@workflow
async def awaits_from_two_tasks(token: str) -> list[Any]:
    hook = create_hook(token=token)

    async def one() -> Any:
        return await hook

    return await asyncio.gather(one(), one(), one())


def test_tasks_that_await_one_hook_are_served_in_their_order(system):
    token = system.fresh("queue")
    run = system.client.start(awaits_from_two_tasks, token)
    system.hook(token)
    for n in range(3):
        system.client.resume_hook(token, n)
    assert run.result(30) == [0, 1, 2]


@workflow
async def loses_races(token: str, how: str) -> list[Any]:
    hook = create_hook(token=token)

    async def one() -> Any:
        return await hook

    if how == "wait_for":
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(one(), 0.02)
    elif how == "timeout":
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.02):
                await hook
    elif how == "wait":
        waiter = asyncio.create_task(one())
        await asyncio.wait({waiter, asyncio.create_task(asyncio.sleep(0.02))}, return_when=asyncio.FIRST_COMPLETED)
        waiter.cancel()
    elif how == "cancel":
        waiter = asyncio.create_task(one())
        await asyncio.sleep(0.02)
        waiter.cancel()
        await asyncio.gather(waiter, return_exceptions=True)
    await echo("the race is over")
    return [await hook, await hook]


@pytest.mark.parametrize("how", ["wait_for", "timeout", "wait", "cancel"])
def test_a_waiter_whose_race_was_lost_swallows_nothing(system, how):
    token = system.fresh("race")
    run = system.client.start(loses_races, token, how)
    until(lambda: "step_completed" in system.types(run.id))
    system.client.resume_hook(token, 1)
    system.client.resume_hook(token, 2)
    assert run.result(30) == [1, 2]


@workflow
async def is_in_time(token: str) -> Any:
    return await asyncio.wait_for(create_hook(token=token), 60)


def test_a_hook_that_wins_its_race_closes_the_timeout(system):
    token = system.fresh("in-time")
    run = system.client.start(is_in_time, token)
    system.hook(token)
    system.client.resume_hook(token, "yes")
    assert run.result(30) == "yes"
    assert [e.data.cancelled for e in run.events() if e.type == "wait_completed"] == [True]


@workflow
async def counts_many(token: str, n: int) -> int:
    hook, total = create_hook(token=token), 0
    for _ in range(n):
        total += await hook
    return total


def test_a_thousand_payloads_reach_one_hook(system):
    token, n = system.fresh("thousand"), 1_000 if system.mode == "live" else 150
    run = system.client.start(counts_many, token, n)
    system.hook(token)

    async def send() -> None:
        async with AsyncClient(system.broker, namespace=system.namespace) as client:
            await asyncio.gather(*(client.resume_hook(token, i) for i in range(n)))

    asyncio.run(send())
    assert run.result(60) == sum(range(n))


# -- iterating and disposing -------------------------------------------------------------------------------------------


@workflow
async def iterates(token: str) -> list[Any]:
    seen = []
    async with create_hook(token=token) as hook:
        async for value in hook:
            seen.append(value)
            if value == "stop":
                hook.dispose()
    return seen


@workflow
async def breaks_off(token: str) -> list[Any]:
    seen = []
    async for value in create_hook(token=token):
        seen.append(value)
        if len(seen) == 2:
            break
    return seen


def test_iterating_gives_one_payload_after_the_other_until_the_hook_is_disposed_of(system):
    token = system.fresh("iteration")
    run = system.client.start(iterates, token)
    system.hook(token)
    for value in ("a", "b", "stop"):
        system.client.resume_hook(token, value)
    assert run.result(30) == ["a", "b", "stop"]
    broken = system.client.start(breaks_off, token)
    system.hook(token)
    for value in ("c", "d"):
        system.client.resume_hook(token, value)
    assert broken.result(30) == ["c", "d"]


@workflow
async def disposes_and_goes_on(token: str, gate: str) -> str:
    async with create_hook(token=token) as hook:
        await hook
    hook.dispose()  # twice does no harm
    await create_hook(token=gate)
    try:
        await hook
    except HookDisposedError as e:
        return e.token
    return "not reached"


def test_a_disposed_hook_is_closed_to_senders_and_its_token_is_free(system):
    token, gate = system.fresh("disposed"), system.fresh("gate")
    run = system.client.start(disposes_and_goes_on, token, gate)
    system.hook(token)
    system.client.resume_hook(token)
    system.hook(gate)
    with pytest.raises(HookNotFoundError) as raised:
        system.client.resume_hook(token, "too late")
    assert raised.value.token == token
    with pytest.raises(HookNotFoundError):
        system.client.get_hook(token)
    other = system.client.start(awaits_once, token)
    assert system.hook(token).run_id == other.id
    for each in (token, gate):
        system.client.resume_hook(each, "now")
    assert run.result(30) == token
    assert other.result(30) == "now"


@workflow
async def takes_what_came_before(token: str, gate: str) -> list[Any]:
    hook = create_hook(token=token)
    await create_hook(token=gate)
    hook.dispose()
    return [value async for value in hook]


def test_what_came_before_the_disposal_can_still_be_taken(system):
    token, gate = system.fresh("before"), system.fresh("gate")
    run = system.client.start(takes_what_came_before, token, gate)
    system.hook(token)
    for n in range(3):
        system.client.resume_hook(token, n)
    system.hook(gate)
    system.client.resume_hook(gate)
    assert run.result(30) == [0, 1, 2]


@workflow
async def disposes_at_once(token: str) -> str:
    create_hook(token=token).dispose()
    await echo(1)
    async with create_hook(token=token) as hook:
        assert await hook.get_conflict() is None
    return "free again"


def test_a_hook_may_be_given_back_before_it_was_granted(system):
    runs = [system.client.start(disposes_at_once, system.fresh("fleeting")) for _ in range(5)]
    assert [run.result(30) for run in runs] == ["free again"] * 5


# -- conflicts ---------------------------------------------------------------------------------------------------------


@workflow
async def holds(token: str) -> Any:
    return await create_hook(token=token)


@workflow
async def wants(token: str) -> list[str]:
    hook = create_hook(token=token)
    try:
        await hook
    except HookConflictError as e:
        conflict = await hook.get_conflict()
        assert conflict is not None
        return [e.token, e.run_id, conflict.id]
    return []


@workflow
async def wants_without_care(token: str) -> Any:
    return [value async for value in create_hook(token=token)]


def test_a_conflict_names_the_run_that_holds_the_token(system):
    token = system.fresh("taken")
    holder = system.client.start(holds, token)
    system.hook(token)
    assert system.client.start(wants, token).result(30) == [token, holder.id, holder.id]
    careless = system.client.start(wants_without_care, token)
    with pytest.raises(RunFailedError, match=holder.id) as raised:
        careless.result(30)
    assert isinstance(raised.value.cause, HookConflictError)
    assert (raised.value.cause.token, raised.value.cause.run_id) == (token, holder.id)
    assert system.types(careless.id).count("hook_conflict") == 1
    system.client.resume_hook(token, "mine")
    assert holder.result(30) == "mine"


@workflow
async def steps_aside(token: str) -> Any:
    hook = create_hook(token=token)
    holder = await hook.get_conflict()
    return await hook if holder is None else [holder.id, await holder.result()]


def test_a_run_may_wait_for_the_holder_of_its_token(system):
    token = system.fresh("mutex")
    holder = system.client.start(holds, token)
    system.hook(token)
    other = system.client.start(steps_aside, token)
    until(lambda: "child_created" in system.types(other.id))
    system.client.resume_hook(token, "done")
    assert other.result(30) == [holder.id, "done"]


@workflow
async def claims_twice(token: str) -> list[Any]:
    first = create_hook(token=token)
    second = create_hook(token=token)
    try:
        await second
    except HookConflictError as e:
        return [e.run_id, await first]
    return []


def test_one_run_cannot_hold_a_token_twice(system):
    token = system.fresh("twice")
    run = system.client.start(claims_twice, token)
    system.hook(token)
    system.client.resume_hook(token, 1)
    assert run.result(30) == [run.id, 1]


@workflow
async def competes(token: str) -> Any:
    hook = create_hook(token=token)
    holder = await hook.get_conflict()
    return ["won", await hook] if holder is None else ["lost", holder.id]


def test_of_many_that_claim_one_token_exactly_one_wins_and_the_others_see_it(system):
    token = system.fresh("contested")
    runs = [system.client.start(competes, token) for _ in range(100)]
    holder = system.hook(token).run_id
    losers = [run for run in runs if run.id != holder]
    assert len(losers) == 99
    assert [run.result(60) for run in losers] == [["lost", holder]] * 99
    system.client.resume_hook(token, "prize")
    assert system.client.get_run(holder).result(30) == ["won", "prize"]


@workflow
async def ends_with_a_hook(token: str, how: str) -> None:
    create_hook(token=token)
    await echo(1)  # until the token is granted
    if how == "failed":
        raise ValueError(how)
    if how == "cancelled":
        await sleep("1h")


@pytest.mark.parametrize("how", ["completed", "failed", "cancelled"])
def test_the_end_of_a_run_frees_its_tokens(system, how):
    token = system.fresh("freed")
    run = system.client.start(ends_with_a_hook, token, how)
    if how == "cancelled":
        system.hook(token)
        run.cancel()
    with contextlib.suppress(RunFailedError, RunCancelledError):
        run.result(30)
    assert run.status() == how
    with pytest.raises(HookNotFoundError):
        system.client.resume_hook(token, "nobody is there")
    successor = _holder_of(system, token)
    system.client.resume_hook(token, "next")
    assert successor.result(30) == "next"


def _holder_of(system, token):
    """A run that holds the token, as soon as its last holder has given it back."""

    def start():
        run = system.client.start(holds, token)
        until(lambda: {"hook_granted", "hook_conflict"} & set(system.types(run.id)))
        if "hook_granted" in system.types(run.id):
            return run
        with pytest.raises(RunFailedError):
            run.result(30)
        return None

    return until(start)


# -- senders -----------------------------------------------------------------------------------------------------------


def test_a_resume_id_counts_once_however_often_it_is_sent(system):
    token = system.fresh("once")
    run = system.client.start(awaits_in_turn, token, 3)
    system.hook(token)
    for payload, resume_id in [("a", "1"), ("again", "1"), ("b", "2"), ("again", "1"), ("c", "3")]:
        assert system.client.resume_hook(token, payload, resume_id=resume_id).run_id == run.id
    assert run.result(30) == ["a", "b", "c"]


def test_a_repeated_resume_hears_the_recorded_outcome_also_when_the_hook_is_gone(system):
    run = system.client.start(tells_its_token)
    (hook,) = _open_hooks(system, run, 1)
    system.client.resume_hook(hook.token, 1, resume_id="first")
    assert run.result(30) == [hook.token, 1]
    assert system.client.resume_hook(hook.token, 2, resume_id="first").run_id == run.id
    with pytest.raises(HookNotFoundError):
        system.client.resume_hook(hook.token, 2, resume_id="second")
    assert system.types(run.id).count("hook_received") == 1


def test_a_repeated_resume_of_a_custom_token_hears_the_recorded_outcome_when_the_token_is_free_again(system):
    token = system.fresh("gone")
    run = system.client.start(awaits_once, token)
    system.hook(token)
    system.client.resume_hook(token, 1, resume_id="first")
    assert run.result(30) == 1
    until(lambda: not _is_held(system, token))
    assert system.client.resume_hook(token, 2, resume_id="first").run_id == run.id


def _is_held(system, token):
    try:
        return system.client.get_hook(token)
    except HookNotFoundError:
        return False


def test_what_was_received_and_held_outlives_the_loss_of_the_store(lone_system):
    lone_system.start_worker()
    processor = lone_system.start_processor("a")
    token, contested = lone_system.fresh("kept"), lone_system.fresh("held")
    run = lone_system.client.start(awaits_in_turn, token, 2)
    holder = lone_system.client.start(awaits_once, contested)
    lone_system.hook(token)
    lone_system.hook(contested)
    lone_system.client.resume_hook(token, "first", resume_id="1")
    lone_system.stop_processor(processor)
    lone_system.start_processor("b")
    lone_system.client.resume_hook(token, "again", resume_id="1")
    assert lone_system.client.start(wants, contested).result(30) == [contested, holder.id, holder.id]
    assert lone_system.client.get_hook(token).received == 1
    lone_system.client.resume_hook(token, "second", resume_id="2")
    assert run.result(30) == ["first", "second"]


def test_a_token_that_nobody_has_is_not_found(system):
    client = system.client
    run = client.start(tells_its_token)
    (hook,) = _open_hooks(system, run, 1)
    wrong = f"hook_{'x' * 22}.{run.id}"
    nobody = f"hook_{'x' * 22}.wrun_nobody"
    for token in (system.fresh("never"), wrong, nobody, "hook_cut-off"):
        with pytest.raises(HookNotFoundError) as raised:
            client.resume_hook(token, 1)
        assert raised.value.token == token
        with pytest.raises(HookNotFoundError):
            client.get_hook(token)
    client.resume_hook(hook.token, 1)
    run.result(30)
    for ask in (client.resume_hook, client.get_hook):
        with pytest.raises(HookNotFoundError):
            ask(hook.token)


@pytest.mark.parametrize("token", ["", "x" * 1025, "hook_mine", "two\nlines"])
def test_a_token_that_no_hook_may_have_is_refused(system, token):
    with pytest.raises(RunFailedError) as raised:
        system.client.start(awaits_once, token).result(30)
    assert isinstance(raised.value.cause, ConfigurationError)


def test_a_token_may_be_any_printable_text(system):
    tokens = [system.fresh(t) for t in ("ünï", "with space", "a/b?c#d%20", "|", "'\"", "x" * 900)]
    runs = [system.client.start(awaits_once, token) for token in tokens]
    for token in tokens:
        system.hook(token)
        system.client.resume_hook(token, token)
    assert [run.result(30) for run in runs] == tokens


@workflow
async def offers_metadata(token: str) -> Any:
    return await create_hook(token=token, metadata={"question": "ship?", "amounts": (1, 2)})


def test_a_sender_may_read_what_the_workflow_left_for_it(system):
    token = system.fresh("metadata")
    run = system.client.start(offers_metadata, token)
    hook = system.hook(token)
    assert hook.metadata == {"question": "ship?", "amounts": (1, 2)}
    assert (hook.token, hook.run_id, hook.webhook, hook.received) == (token, run.id, False, 0)
    assert [h.token for h in run.hooks()] == [token]
    assert run.describe().hooks == (token,)
    system.client.resume_hook(token)
    assert run.result(30) is None
    assert run.hooks() == []
    assert run.describe().hooks == ()


def test_a_resume_that_races_the_creation_arrives_or_is_refused(system):
    """A sender that hears HookNotFoundError tries again; a payload is never taken and lost."""
    tokens = [system.fresh("racing") for _ in range(20)]
    runs = [system.client.start(awaits_once, token) for token in tokens]

    def send(token: str) -> None:
        def sent() -> bool:
            try:
                system.client.resume_hook(token, token)
            except HookNotFoundError:
                return False
            return True

        until(sent)

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(send, tokens))
    assert [run.result(30) for run in runs] == tokens


@step
async def resumes(token: str, value: Any) -> str:
    return (await durably.resume_hook(token, value)).run_id


@workflow
async def is_called_back_at_once(token: str) -> list[Any]:
    hook = create_hook(token=token)
    return [await resumes(token, "by a step"), await hook]


def test_a_step_called_after_the_creation_can_resume_the_hook_at_once(system):
    tokens = [system.fresh("callback") for _ in range(10)]
    runs = [system.client.start(is_called_back_at_once, token) for token in tokens]
    assert [run.result(30) for run in runs] == [[run.id, "by a step"] for run in runs]


@workflow
async def is_called_back_by_default_token() -> list[Any]:
    hook = create_hook()
    return [await resumes(hook.token, 1), await hook]


def test_a_step_can_resume_a_hook_with_a_default_token_at_once(system):
    runs = [system.client.start(is_called_back_by_default_token) for _ in range(10)]
    assert [run.result(30) for run in runs] == [[run.id, 1] for run in runs]


@workflow
async def is_approved(tokens: list[str]) -> dict[str, Any]:
    hooks = {token: create_hook(token=token) for token in tokens}
    answers = await asyncio.gather(*(_answer(hook) for hook in hooks.values()))
    return dict(zip(hooks, answers, strict=True))


async def _answer(hook: Any) -> Any:
    return await hook


def test_many_hooks_of_one_run_are_told_apart(system):
    tokens = [system.fresh("many") for _ in range(20)]
    run = system.client.start(is_approved, tokens)
    assert {hook.token for hook in _open_hooks(system, run, 20)} == set(tokens)
    for token in reversed(tokens):
        system.client.resume_hook(token, token.upper())
    assert run.result(30) == {token: token.upper() for token in tokens}


# -- kinds of hooks ----------------------------------------------------------------------------------------------------


class ApprovalStruct(msgspec.Struct):
    by: str
    amount: int = 0


@dataclasses.dataclass
class ApprovalData:
    by: str
    amount: int = 0


class ApprovalModel(pydantic.BaseModel):
    by: str
    amount: int = 0


KINDS = {
    "struct": define_hook(ApprovalStruct),
    "dataclass": define_hook(ApprovalData),
    "pydantic": define_hook(ApprovalModel),
}


@workflow
async def awaits_kind(kind: str, token: str) -> list[Any]:
    approval = await KINDS[kind].create(token=token)
    return [type(approval).__name__, approval.by, approval.amount]


@step(max_retries=0)
async def approves(kind: str, token: str, value: Any) -> None:
    await KINDS[kind].resume(token, value)


@workflow
async def approves_in_a_step(kind: str, token: str, value: Any) -> None:
    await approves(kind, token, value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_hook_checks_in_the_sender_and_gives_the_model_to_the_workflow(system, kind):
    token = system.fresh(kind)
    run = system.client.start(awaits_kind, kind, token)
    system.hook(token)
    with pytest.raises(RunFailedError, match="amount") as raised:
        system.client.start(approves_in_a_step, kind, token, {"by": "Ada", "amount": "much"}).result(30)
    assert isinstance(raised.value.cause, SerializationError)
    assert "hook_received" not in system.types(run.id)
    system.client.start(approves_in_a_step, kind, token, {"by": "Ada", "amount": 7}).result(30)
    assert run.result(30) == [KINDS[kind].model.__name__, "Ada", 7]


@workflow
async def survives_a_misfit(token: str) -> list[str]:
    hook = KINDS["struct"].create(token=token)
    try:
        await hook
    except SerializationError as e:
        return [str(e), (await hook).by]
    return []


def _resume_in_json(system, token: str, value: Any) -> None:
    payload = Payload(content_type="application/json", data=json.dumps(value).encode())
    answer(
        system.client._connection,
        token,
        lambda to: ResumeHook(token=token, resume_id=system.fresh("r"), payload=payload, requested_at=0, reply_to=to),
    )


def test_a_foreign_payload_that_does_not_fit_reaches_the_awaiter_as_an_error(system):
    token = system.fresh("foreign")
    run = system.client.start(survives_a_misfit, token)
    system.hook(token)
    _resume_in_json(system, token, {"by": 5})
    _resume_in_json(system, token, {"by": "Ada"})
    message, by = run.result(30)
    assert "by" in message
    assert by == "Ada"


# -- misuse, and the end of runs ---------------------------------------------------------------------------------------


@step(max_retries=0)
async def creates_a_hook() -> None:
    create_hook()


@workflow
async def resumes_in_workflow_code() -> str:
    try:
        await durably.resume_hook("x", 1)
    except DurablyError as e:
        return str(e)
    return ""


@workflow
async def creates_a_hook_in_a_step() -> None:
    await creates_a_hook()


def test_hooks_are_created_in_workflows_and_resumed_elsewhere(system):
    with pytest.raises(DurablyError, match="workflow only"):
        create_hook()
    with pytest.raises(DurablyError, match="workflow only"):
        KINDS["struct"].create()
    with pytest.raises(RunFailedError, match="workflow only"):
        system.client.start(creates_a_hook_in_a_step).result(30)
    assert "in a step" in system.client.start(resumes_in_workflow_code).result(30)


@workflow
async def never_awaits(token: str, gate: str) -> str:
    create_hook(token=token)
    await create_hook(token=gate)
    return "done"


def test_a_hook_that_is_never_awaited_is_open_all_the_same(system):
    token, gate = system.fresh("unawaited"), system.fresh("gate")
    run = system.client.start(never_awaits, token, gate)
    system.hook(token)
    assert system.client.resume_hook(token, "kept").run_id == run.id
    system.hook(gate)
    system.client.resume_hook(gate)
    assert run.result(30) == "done"


@workflow
async def cleans_up_by_a_hook(token: str, last: str) -> str:
    try:
        await create_hook(token=token)
    finally:
        await create_hook(token=last)
    return "not reached"


def test_a_cancelled_run_keeps_its_hooks_until_its_cleanup_has_ended(system):
    token, last = system.fresh("cancelled"), system.fresh("last")
    run = system.client.start(cleans_up_by_a_hook, token, last)
    system.hook(token)
    run.cancel()
    system.hook(last)
    assert system.client.resume_hook(token, "unheard").run_id == run.id
    system.client.resume_hook(last)
    with pytest.raises(RunCancelledError):
        run.result(30)
    for each in (token, last):
        with pytest.raises(HookNotFoundError):
            system.client.resume_hook(each)
