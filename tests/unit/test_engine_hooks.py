"""Hooks, children and attributes in the engine, without I/O."""

from __future__ import annotations

import asyncio

import pytest
from durably import (
    ConfigurationError,
    DurablyError,
    HookConflictError,
    HookDisposedError,
    RecordTooLarge,
    RunFailedError,
    RunNotFoundError,
    create_hook,
    create_webhook,
    set_attributes,
)
from durably.children import get_run, options, start
from durably.payloads import load
from durably.tokens import run_of
from durably.web import Response
from durably_schemas import events as ev
from durably_schemas import records as rec
from engine_bench import Bench, work

pytestmark = pytest.mark.usefixtures("guarded")


def token_of(bench: Bench, hook_id: str = "hook_1") -> str:
    return next(e.data.token for e in bench.log if e.type == "hook_created" and e.correlation_id == hook_id)


def test_payloads_that_come_before_anybody_asks_are_kept_in_order():
    async def wf():
        hook = create_hook()
        await work(0)
        return [await hook, await hook, await hook]

    bench = Bench(wf)
    for i in range(3):
        assert bench.resume(token_of(bench), i, f"r{i}") == "OK"
    bench.result(bench.open[0])
    assert bench.value == [0, 1, 2]


def test_a_default_token_names_its_run_and_depends_on_the_nonce():
    async def wf():
        return await create_hook()

    bench, again, other = Bench(wf), Bench(wf), Bench(wf, run_id="a.b.c")
    assert token_of(bench) == token_of(again)
    assert run_of(token_of(other)) == "a.b.c"
    from durably.tokens import default_token

    assert default_token("wrun_1", "m", 1) != token_of(bench)
    assert not bench.signals, "no claim is needed"


def test_a_waiter_that_lost_its_race_swallows_nothing():
    async def wf():
        hook = create_hook()
        loser = asyncio.ensure_future(hook.__anext__())
        await asyncio.wait([loser, asyncio.ensure_future(work(0))], return_when=asyncio.FIRST_COMPLETED)
        loser.cancel()
        await asyncio.sleep(0)
        return await hook

    bench = Bench(wf)
    bench.result(bench.open[0])
    bench.resume(token_of(bench), "kept")
    assert bench.value == "kept"


def test_a_waiter_cancelled_after_it_was_woken_passes_the_payload_on():
    async def wf():
        hook = create_hook()
        first = asyncio.ensure_future(hook.__anext__())
        second = asyncio.ensure_future(hook.__anext__())
        await work(0)
        hook.received = _cancelling(hook.received, first)  # the cancellation meets the payload in one activation
        return await second

    def _cancelling(received, task):
        def both(payload):
            received(payload)
            task.cancel()

        return both

    bench = Bench(wf)
    bench.result(bench.open[0])
    bench.resume(token_of(bench), "kept")
    assert bench.value == "kept"


def test_iteration_ends_when_the_hook_is_disposed_of_and_awaiting_says_so():
    async def wf():
        hook = create_hook()
        got = []
        async for value in hook:
            got.append(value)
            if value == "last":
                hook.dispose()
                hook.dispose()
        with pytest.raises(HookDisposedError, match="disposed"):
            await hook
        return got

    bench = Bench(wf)
    bench.resume(token_of(bench), "first", "r1")
    bench.resume(token_of(bench), "last", "r2")
    assert bench.value == ["first", "last"]
    assert bench.types()[-2:] == ["hook_disposed", "run_completed"]


def test_a_resume_is_refused_with_its_reason():
    async def wf():
        async with create_hook() as hook:
            await hook
        await work(0)

    bench = Bench(wf)
    token = token_of(bench)
    assert bench.resume("hook_1_wrong.wrun_1", 1) == "UNKNOWN"
    assert bench.resume("hook_x.wrun_1", 1) == "UNKNOWN"
    bench.resume(token, 1)
    assert bench.resume(token, 2) == "UNKNOWN"
    bench.result(bench.open[0])
    assert bench.resume(token, 3) == "ENDED"


def test_steps_wait_until_the_tokens_asked_for_before_them_are_granted():
    async def wf():
        before = asyncio.ensure_future(work("before"))
        await asyncio.sleep(0)
        hook = create_hook(token="order-7")
        after = asyncio.ensure_future(work("after"))
        return [await before, await hook, await after]

    bench = Bench(wf)
    assert bench.signals == [rec.ClaimToken(token="order-7", run_id="wrun_1", hook_id="hook_1")]
    assert [load(r.input)[0] for r in bench.open] == [["before"]]
    bench.run.evict()
    bench.grant("order-7")
    assert [load(r.input)[0] for r in bench.open] == [["before"], ["after"]]
    bench.grant("order-7")
    assert bench.types().count("hook_granted") == 1
    for request in list(bench.open):
        bench.result(request)
    assert bench.resume("order-7", "yes", hook_id="hook_1") == "OK"
    assert bench.value == ["before", "yes", "after"]
    assert bench.signals[1:] == [
        rec.ReleaseToken(token="order-7", run_id="wrun_1", hook_id="hook_1", resume_ids=("r",))
    ]


def test_a_conflict_names_the_holder_and_lets_the_steps_go():
    async def wf():
        hook = create_hook(token="order-7")
        task = asyncio.ensure_future(work("held"))
        holder = await hook.get_conflict()
        try:
            await hook
        except HookConflictError as e:
            return [holder.id, e.run_id, e.token, await task]

    bench = Bench(wf)
    assert not bench.open
    bench.refuse("order-7")
    bench.result(bench.open[0])
    assert bench.value == ["wrun_other", "wrun_other", "order-7", "held"]
    assert len(bench.signals) == 1, "a token that was never held is not released"


def test_a_grant_for_a_hook_that_is_gone_is_given_back():
    async def wf():
        create_hook(token="order-7").dispose()
        await work(0)

    bench = Bench(wf)
    release = rec.ReleaseToken(token="order-7", run_id="wrun_1", hook_id="hook_1")
    assert [type(s) for s in bench.signals] == [rec.ClaimToken, rec.ReleaseToken]
    assert len(bench.open) == 1, "nothing is claimed any more, so nothing is held"
    bench.grant("order-7")
    assert bench.signals[2:] == [release]
    bench.result(bench.open[0])
    bench.grant("order-7")
    assert bench.signals[3:] == [release]


def test_a_delivery_to_a_hook_whose_grant_is_still_on_its_way_grants_it():
    async def wf():
        return await create_hook(token="order-7")

    bench = Bench(wf)
    assert bench.resume("order-7", 5, hook_id="hook_1") == "OK"
    assert bench.types()[-3:] == ["hook_granted", "hook_received", "run_completed"]


@pytest.mark.parametrize("token", ["", "hook_mine", "a\nb", "x" * 1025, "\ud800", 7])
def test_a_token_that_no_hook_may_have_is_refused_with_the_remedy(token):
    async def wf():
        create_hook(token=token)

    bench = Bench(lambda: None)

    async def caught():
        try:
            await wf()
        except ConfigurationError as e:
            return str(e)

    bench = Bench(caught)
    assert "1 to 1024 bytes" in bench.value


def test_a_run_that_ends_releases_its_tokens_cancels_its_children_and_tells_who_waits():
    async def wf():
        create_hook(token="t")
        await options(on_parent_end="cancel").start("minor", 1)
        await start("other", 2)
        return await work("x")

    parent = rec.Parent(run_id="wrun_p", correlation_id="child_9", root_run_id="wrun_root")
    bench = Bench(wf, parent=parent)
    assert not bench.commands, "the children wait for the token that they may tell of"
    bench.grant("t")
    started = [c for c in bench.commands if isinstance(c, rec.StartRun)]
    assert [s.workflow for s in started] == ["minor", "other"]
    assert {s.parent for s in started} == {
        rec.Parent(run_id="wrun_1", correlation_id=f"child_{n}", root_run_id="wrun_root") for n in (1, 2)
    }
    assert len({s.nonce for s in started}) == len({s.run_id for s in started}) == 2
    bench.take(bench.run.watch("wrun_w", "child_3", bench.now))
    bench.take(bench.run.watch("wrun_w", "child_3", bench.now))
    bench.take(bench.run.watch("wrun_p", "child_9", bench.now))
    assert bench.types().count("run_watched") == 1
    bench.signals.clear()
    bench.commands.clear()
    bench.result(bench.open[0])
    assert bench.status == "completed"
    assert [c.run_id for c in bench.commands] == [started[0].run_id]
    assert [(type(s), s.run_id) for s in bench.signals] == [
        (rec.ReleaseToken, "wrun_1"), (rec.ChildFinished, "wrun_w"), (rec.ChildFinished, "wrun_p"),
    ]  # fmt: skip
    assert [load(s.result) for s in bench.signals[1:]] == ["x", "x"]
    bench.take(bench.run.watch("wrun_late", "child_1", bench.now))
    assert bench.signals[-1].run_id == "wrun_late"
    assert load(bench.signals[-1].result) == "x"


def test_a_childs_end_is_recorded_once_and_only_for_the_child_that_was_started():
    async def wf():
        run = await options(run_id="mine", attributes={"a": "b"}, delay=5).start("other", 1)
        return [await run.result(), await run.result()]

    bench = Bench(wf)
    (started,) = bench.commands
    assert (started.run_id, started.attributes, started.start_at) == ("mine", {"a": "b"}, bench.now + 5000)
    stranger = rec.ChildFinished(
        run_id="wrun_1", correlation_id="child_1", child_run_id="yours", status="completed", result=started.input
    )
    bench.take(bench.run.child_finished(stranger, bench.now))
    assert bench.status == "running"
    bench.child_ends(value=7)
    assert bench.value == [7, 7]


def test_a_childs_failure_arrives_with_its_cause_and_anybodys_run_can_be_waited_for():
    async def wf():
        try:
            await get_run("theirs").result()
        except RunFailedError as e:
            return [e.run_id, type(e.cause).__name__, str(e.cause)]

    bench = Bench(wf)
    assert bench.commands == [rec.WatchRun(run_id="theirs", watcher_run_id="wrun_1", correlation_id="child_1")]
    assert not bench.signals
    bench.child_ends(error=ZeroDivisionError("no"))
    assert bench.value == ["theirs", "ZeroDivisionError", "no"]


def test_a_child_is_cancelled_on_demand_and_a_run_cannot_wait_for_itself():
    async def wf():
        run = await start("other")
        await run.cancel("enough")
        try:
            await get_run("wrun_1").result()
        except DurablyError as e:
            return str(e)

    bench = Bench(wf)
    assert [(type(c), getattr(c, "reason", None)) for c in bench.commands] == [
        (rec.StartRun, None), (rec.CancelRun, "enough"),
    ]  # fmt: skip
    assert "its own end" in bench.value


def test_attributes_of_one_activation_are_one_event_and_none_removes():
    async def wf():
        set_attributes(a="1", b="2")
        set_attributes({"b": None, "c d": "3"})
        await work(0)
        with pytest.raises(RecordTooLarge, match="16,384"):
            set_attributes(a="x" * 20_000)
        with pytest.raises(TypeError, match="texts"):
            set_attributes(a=1)

    bench = Bench(wf)
    assert bench.types().count("attributes_set") == 1
    assert bench.run.state.header.attributes == {"a": "1", "c d": "3"}
    bench.result(bench.open[0])
    assert bench.status == "completed"


def test_a_cancelled_wait_for_a_step_cancels_the_step_and_its_retries():
    async def wf():
        try:
            async with asyncio.timeout(1):
                await work(1)
        except TimeoutError:
            pass
        await asyncio.sleep(60)

    bench = Bench(wf)
    request = bench.open[0]
    bench.result(request, error=ValueError("try again"))
    bench.next_timer()
    assert "step_cancelled" in bench.types()
    assert not [i for i in bench.run.state.items if i.startswith("step")]
    before = list(bench.log)
    bench.result(request, value="late")
    assert bench.log == before


def test_a_shielded_step_and_one_that_was_never_recorded_leave_no_cancellation():
    async def wf():
        kept = asyncio.ensure_future(work("kept"))
        dropped = asyncio.ensure_future(work("dropped"))
        await asyncio.sleep(0)
        dropped.cancel()
        try:
            await asyncio.wait_for(asyncio.shield(kept), 1)
        except TimeoutError:
            return await kept

    bench = Bench(wf)
    assert [load(r.input)[0] for r in bench.open] == [["kept"]]
    bench.next_timer()
    assert "step_cancelled" not in bench.types()
    bench.result(bench.open[0])
    assert bench.value == "kept"


@pytest.mark.parametrize("kind", ["token", "child", "attributes"])
def test_replay_finds_other_hooks_children_and_attributes(kind):
    changed = False

    async def wf():
        if kind == "token":
            create_hook(token="b" if changed else "a")
        elif kind == "child":
            await start("b" if changed else "a")
        else:
            set_attributes(x="b" if changed else "a")
        await work(0)

    bench = Bench(wf)
    if kind == "token":
        bench.grant("a")
    changed = True
    bench.run.evict()
    bench.result(bench.open[0])
    blocked = next(e.data for e in bench.log if isinstance(e.data, ev.RunBlocked))
    assert blocked.error.type.endswith("NonDeterminismError")
    assert "a" in blocked.expected
    assert "b" in blocked.found


def test_what_was_started_behind_a_claim_is_handed_out_when_the_run_ends_first():
    async def wf():
        create_hook(token="t")
        task = asyncio.ensure_future(work("after"))
        await start("other")
        await asyncio.sleep(0)
        assert not task.done()

    bench = Bench(wf)
    assert bench.status == "completed"
    assert [load(r.input)[0] for r in bench.open] == [["after"]]
    assert [type(c) for c in bench.commands] == [rec.StartRun]


def test_a_conflict_asked_about_after_the_disposal_is_an_error_and_no_wait_for_ever():
    async def wf():
        hook = create_hook(token="t")
        asking = asyncio.ensure_future(hook.get_conflict())
        await asyncio.sleep(0)
        hook.dispose()
        try:
            await asking
        except HookDisposedError as e:
            return str(e)

    assert "before its token was granted" in Bench(wf).value


def test_a_run_that_is_awaited_again_and_again_is_watched_once():
    async def wf():
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await get_run("theirs").result(timeout=1)

    bench = Bench(wf)
    for _ in range(3):
        bench.next_timer()
    assert bench.status == "completed"
    assert len(bench.commands) == 1


def test_a_child_that_failed_for_want_of_another_run_is_a_failed_child():
    async def wf():
        try:
            await (await start("other")).result()
        except RunFailedError as e:
            return type(e.cause).__name__

    bench = Bench(wf)
    bench.child_ends(error=RunNotFoundError("there is no run grandchild", "grandchild"))
    assert bench.value == "RunNotFoundError"


def test_what_a_workflow_must_not_ask_of_a_run_is_named_with_the_remedy():
    async def wf():
        child = await start("other")
        assert not hasattr(child, "no_such_thing")
        try:
            await child.status()
        except DurablyError as e:
            return str(e)

    assert "ask there" in Bench(wf).value


def test_attributes_that_were_removed_do_not_count():
    async def wf():
        for n in range(30):
            set_attributes({f"{n}" * 500: "x" * 500})
            set_attributes({f"{n}" * 500: None})

    assert Bench(wf).status == "completed"


def test_a_grant_that_comes_with_the_payload_and_ends_the_run_leaves_nothing_behind_the_end():
    async def wf():
        await create_hook(token="t").get_conflict()

    bench = Bench(wf)
    assert bench.resume("t", 1, hook_id="hook_1") == "UNKNOWN"
    assert bench.types()[-1] == "run_completed"


@pytest.mark.parametrize(
    "call",
    [
        lambda: create_hook(metadata="x" * 1_000_000),
        lambda: create_webhook(metadata="x" * 600_000, respond_with=Response("y" * 400_000)),
        lambda: set_attributes(a="\udcff"),
        lambda: start("x" * 2_000_000),
        lambda: start("other", "x" * 2_000_000),
        lambda: options(attributes={"a": "\udcff"}).start("other"),
        lambda: options(delay=1e300).start("other"),
        lambda: get_run("other").cancel("x" * 20_000),
        lambda: get_run("other").cancel("\udcff"),
        lambda: get_run("other").cancel(7),
    ],
)
def test_what_cannot_be_recorded_raises_at_the_call_and_can_be_caught(call):
    async def wf():
        try:
            made = call()
            if asyncio.iscoroutine(made):
                await made
        except (DurablyError, ValueError) as e:
            await work("after")
            return str(e)

    bench = Bench(wf)
    bench.result(bench.open[0])
    assert bench.value
