"""The engine without I/O: inputs in, events and requests out."""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from contextlib import nullcontext
from datetime import datetime

import pytest
from durably import HookConflictError, RetryableError, RunFailedError, create_hook, set_attributes, sleep
from durably.authoring import Registry, WorkflowDefinition
from durably.children import start
from durably.payloads import dump_arguments
from durably_processor.engine.execution import Blocked, Environment, replay
from durably_processor.engine.run import Run
from durably_processor.engine.state import Header, OpenChild, OpenHook, RunState
from durably_schemas import events as ev
from durably_schemas import records as rec
from engine_bench import T0, Bench, once, work
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("guarded")


def test_a_sequential_run_logs_each_step_once_and_in_order():
    async def wf(n):
        return [await work(i) for i in range(n)]

    bench = Bench(wf, 2)
    bench.result(bench.open[0])
    bench.result(bench.open[0])
    assert bench.value == [0, 1]
    assert bench.types() == [
        "run_created", "run_started", "step_created",
        "step_started", "step_completed", "step_created",
        "step_started", "step_completed", "run_completed",
    ]  # fmt: skip
    assert [event.seq for event in bench.log] == list(range(1, 10))


def test_a_result_counts_once_and_only_for_the_recorded_work():
    async def wf():
        return await work(1)

    bench = Bench(wf)
    request = bench.open[0]
    import msgspec

    bench.result(msgspec.structs.replace(request, fingerprint="other"))
    bench.result(msgspec.structs.replace(request, attempt=2))
    assert bench.status == "running"
    bench.result(request)
    before = list(bench.log)
    bench.result(request, value="again")
    assert bench.log == before


def test_steps_of_a_gather_go_out_together_and_complete_in_any_order():
    async def wf():
        return await asyncio.gather(*(work(i) for i in range(4)))

    bench = Bench(wf)
    assert len(bench.open) == 4
    for request in reversed(list(bench.open)):
        bench.result(request)
    assert bench.value == [0, 1, 2, 3]


def test_a_failed_attempt_is_retried_with_backoff_and_then_fails_for_good():
    async def wf():
        try:
            await work(1)
        except ZeroDivisionError as e:
            return [type(e).__name__, e.__notes__[-1]]

    bench = Bench(wf)
    for attempt in (1, 2):
        request = bench.open[0]
        assert request.attempt == attempt
        bench.result(request, error=ZeroDivisionError("x"))
        assert not bench.open
        retrying = bench.log[-1].data
        assert isinstance(retrying, ev.StepRetrying)
        assert retrying.retry_at == bench.now + 1000
        bench.next_timer()
    bench.result(bench.open[0], error=ZeroDivisionError("x"))
    assert bench.value == ["ZeroDivisionError", "failed after 2 retries"]


def test_retry_after_replaces_the_backoff_and_fatal_forbids_a_retry():
    async def wf():
        await work(1)

    bench = Bench(wf)
    bench.result(bench.open[0], error=RetryableError("busy"), retry_after=60_000)
    assert bench.log[-1].data.retry_at == bench.now + 60_000
    bench.next_timer()
    bench.result(bench.open[0], error=ValueError("no"), fatal=True)
    assert bench.status == "failed"
    assert bench.log[-1].data.error.type == "builtins:ValueError"


def test_sleep_is_a_durable_wait_of_exactly_that_length():
    async def wf():
        before = time.time()
        await sleep("1h30m")
        return round((time.time() - before) * 1000)

    bench = Bench(wf)
    assert bench.log[-1].data == ev.WaitCreated(due_at=T0 + 5_400_000)
    bench.next_timer()
    assert bench.value == 5_400_000


def test_a_wait_that_lost_its_race_is_closed_at_once():
    async def wf():
        async with asyncio.timeout(3600):
            await work(1)
        return "done"

    bench = Bench(wf)
    bench.result(bench.open[0])
    assert bench.types()[-2:] == ["wait_completed", "run_completed"]
    assert not bench.run.state.items


def test_a_timeout_that_fires_wins_over_its_step():
    async def wf():
        try:
            async with asyncio.timeout(1):
                await work(1)
        except TimeoutError:
            return "late"

    bench = Bench(wf)
    bench.next_timer()
    assert bench.value == "late"


def test_time_is_the_delivered_events_own_and_never_a_later_one():
    # SEED X7: after a race the clock must not depend on what else is in the log.
    async def wf():
        seen = [time.time()]
        for i in range(3):
            await work(i)
            seen.append(time.time())
            assert datetime.now().timestamp() == seen[-1]
        return [round(s * 1000) - T0 for s in seen]

    bench = Bench(wf)
    for _ in range(3):
        bench.now += 2000
        bench.result(bench.open[0])
    assert bench.value == [0, 2010, 4020, 6030]


def test_an_inputs_time_never_runs_backwards():
    async def wf():
        return await work(1)

    bench = Bench(wf)
    bench.now = T0 - 50_000
    bench.result(bench.open[0])
    assert [e.at for e in bench.log] == sorted(e.at for e in bench.log)


def test_random_and_uuid_depend_on_the_run_id_alone():
    async def wf():
        return [random.random(), str(uuid.uuid4()), random.randint(0, 10**9)]

    first, again, other = Bench(wf), Bench(wf), Bench(wf, run_id="wrun_2")
    assert first.value == again.value
    assert first.value != other.value


def test_cancelling_is_delivered_and_cleanup_may_run_steps():
    async def wf():
        try:
            await sleep("1d")
        finally:
            await work("undo")

    bench = Bench(wf)
    bench.take(bench.run.cancel("enough", bench.now))
    assert bench.types()[-3:] == ["run_cancelling", "wait_completed", "step_created"]
    bench.take(bench.run.cancel("twice", bench.now))
    bench.result(bench.open[0])
    assert bench.status == "cancelled"
    assert bench.log[-1].data == ev.RunCancelled(reason="enough")
    bench.take(bench.run.cancel("late", bench.now))
    assert bench.status == "cancelled"


def test_a_delayed_start_runs_no_code_before_its_time():
    async def wf():
        return time.time()

    registry = Registry()
    bench = Bench(wf, registry=registry)
    start = rec.StartRun(
        run_id="wrun_d", workflow="wf", input=dump_arguments(wf, (), {}, "wf"), requested_at=T0, start_at=T0 + 5000
    )
    bench.log.clear()
    bench.run, outcome = Run.start(start, T0, bench.environment, lambda seq: iter(bench.log[seq - 1 :]))
    bench.take(outcome)
    assert bench.types() == ["run_created"]
    bench.next_timer()
    assert round(bench.value * 1000) == T0 + 5000


def test_arguments_that_do_not_fit_fail_the_run_with_a_clear_error():
    async def wf(a: int):
        return a

    bench = Bench(lambda *_: None)
    bench.registry.workflows["wf"] = WorkflowDefinition("wf", wf)
    start = rec.StartRun(
        run_id="r", workflow="wf", input=rec.Payload(content_type="application/json", data=b'["x", 2]'), requested_at=T0
    )
    run, outcome = Run.start(start, T0, bench.environment, lambda _: iter(()))
    assert run.state.header.status == "failed"
    assert "wf" in outcome.events[-1].data.error.message


def test_what_cannot_be_serialized_fails_the_call_and_can_be_caught():
    async def wf():
        try:
            await work(object())
        except TypeError as e:
            return str(e)

    assert "object" in Bench(wf).value


def test_a_result_that_cannot_be_serialized_fails_the_run():
    async def wf():
        return object()

    bench = Bench(wf)
    assert bench.status == "failed"
    assert "result" in bench.log[-1].data.error.message


def test_forbidden_calls_block_the_run_and_name_the_call():
    async def wf():
        open("/etc/hostname")  # noqa: ASYNC230, PTH123, SIM115

    bench = Bench(wf)
    assert bench.run.state.header.blocked
    assert "open" in bench.log[-1].data.error.message
    assert "step" in bench.log[-1].data.error.message


def test_an_unknown_workflow_blocks_the_run_until_it_is_known():
    bench = Bench(lambda *_: None)

    async def wf():
        return 7

    registry = Registry()
    environment = Environment(registry, 10**6, {"default"}, lambda _: nullcontext())
    log: list[rec.Event] = []
    start = rec.StartRun(run_id="r", workflow="later", input=bench.log[0].data.input, requested_at=T0)
    run, outcome = Run.start(start, T0, environment, lambda seq: iter(log[seq - 1 :]))
    log += outcome.events
    assert [e.type for e in log] == ["run_created", "run_blocked"]
    assert "later" in log[-1].data.error.message
    assert run.unblock().events == []
    registry.workflows["later"] = WorkflowDefinition("later", wf)
    log += run.unblock().events
    assert [e.type for e in log][2:] == ["run_unblocked", "run_started", "run_completed"]


def test_a_missing_queue_blocks_the_run():
    async def wf():
        await work.options(queue="none")(1)

    bench = Bench(wf)
    assert bench.run.state.header.blocked
    assert "topics create" in bench.log[-1].data.error.message


def test_changed_code_is_found_on_replay_with_expected_and_found():
    async def wf():
        await work(1)
        await work(2)

    bench = Bench(wf)

    async def changed():
        await once(1)
        await work(2)

    bench.registry.workflows["wf"] = WorkflowDefinition("wf", changed)
    bench.run.evict()
    bench.result(bench.open[0])
    blocked = next(e.data for e in bench.log if e.type == "run_blocked")
    assert "work" in blocked.expected
    assert "once" in blocked.found
    assert bench.types()[-1] == "step_completed", "the result is recorded, although the code cannot take it"

    bench.registry.workflows["wf"] = WorkflowDefinition("wf", wf)
    bench.take(bench.run.unblock())
    assert bench.types()[-2:] == ["run_unblocked", "step_created"]
    bench.run.evict()
    bench.result(bench.open[-1])
    assert bench.status == "completed"
    assert_replays(bench)


def test_a_step_that_runs_long_becomes_a_lease_that_lapses_into_a_retry():
    async def wf():
        return await work(1)

    bench = Bench(wf)
    request = bench.open.pop()

    def beat(until: int) -> None:
        bench.take(
            bench.run.heartbeat(
                rec.StepHeartbeat(
                    run_id="wrun_1",
                    step_id=request.step_id,
                    attempt=1,
                    worker="w",
                    started_at=T0,
                    lease_until=until,
                    sent_at=T0,
                ),
                bench.now,
            )
        )

    beat(T0 + 20_000)
    assert bench.types()[-1] == "step_started"
    beat(T0 + 40_000)
    assert bench.types()[-1] == "step_started"
    assert bench.run.timer(request.step_id, T0 + 20_000).events == []
    claim = rec.StepClaim(
        run_id="wrun_1",
        step_id=request.step_id,
        attempt=1,
        worker="v",
        reply_to=rec.ReplyTo(partition=0, request_id="q"),
    )
    assert bench.run.claim(claim, bench.now)[1] == "LEASED"
    bench.next_timer()
    assert bench.types()[-1] == "step_retrying"
    assert "silent" in bench.log[-1].data.error.message
    bench.next_timer()
    assert bench.open[0].attempt == 2
    bench.result(request)
    assert bench.status == "running", "the first attempt comes too late"
    bench.result(bench.open[0])
    assert bench.status == "completed"


def test_a_claim_is_answered_open_once_for_each_asker_and_done_afterwards():
    async def wf():
        return await once(1)

    bench = Bench(wf)
    request = bench.open[0]

    def ask(who: str):
        claim = rec.StepClaim(
            run_id="wrun_1",
            step_id=request.step_id,
            attempt=1,
            worker=who,
            reply_to=rec.ReplyTo(partition=0, request_id=who),
        )
        outcome, answer, execution = bench.run.claim(claim, bench.now)
        bench.take(outcome)
        return answer, execution

    assert ask("a") == ("OPEN", 2)
    assert ask("a") == ("OPEN", 2)
    assert ask("b") == ("OPEN", 3)
    assert ask("c") == ("OPEN", 4)
    assert ask("d") == ("DONE", 0), "a step that kills every worker ends"
    assert bench.status == "failed"
    assert "died" in bench.log[-1].data.error.message


def assert_replays(bench: Bench) -> None:
    """From every prefix that ends where an input's consequences end, replay gives the log's own commands."""
    replayed = replay(iter(bench.log), bench.environment)
    replayed.execution.close()
    state = RunState(Header(run_id="wrun_1", workflow="wf", created_at=bench.log[0].at))
    for event in bench.log:
        state.apply(event)
    state.touched.clear()
    bench.run.state.touched.clear()
    state.inputs = bench.run.state.inputs
    assert state.header == bench.run.state.header
    assert state.items == bench.run.state.items


# A little language of workflows, so that hypothesis can make them up.
leaf = st.one_of(
    st.tuples(st.just("step"), st.integers(0, 5)),
    st.tuples(st.just("sleep"), st.integers(1, 50)),
    st.tuples(st.just("random"), st.none()),
    st.tuples(st.just("hook"), st.none()),
    st.tuples(st.just("custom"), st.integers(0, 2)),
    st.tuples(st.just("child"), st.integers(0, 5)),
    st.tuples(st.just("attribute"), st.integers(0, 2)),
)
shapes = st.recursive(
    leaf,
    lambda inner: st.one_of(
        st.tuples(st.just("seq"), st.lists(inner, min_size=1, max_size=3)),
        st.tuples(st.just("gather"), st.lists(inner, min_size=1, max_size=3)),
        st.tuples(st.just("group"), st.lists(inner, min_size=1, max_size=3)),
        st.tuples(st.just("first"), st.lists(inner, min_size=1, max_size=3)),
        st.tuples(st.just("each"), st.lists(inner, min_size=1, max_size=3)),
        st.tuples(st.just("timeout"), inner),
        st.tuples(st.just("catch"), inner),
        st.tuples(st.just("queue"), st.lists(inner, min_size=1, max_size=3)),
    ),
    max_leaves=8,
)


async def interpret(shape):
    kind, arg = shape
    if kind == "hook":
        async with create_hook() as hook:
            return await hook
    if kind == "custom":
        hook = create_hook(token=f"t{arg}")
        try:
            return await hook
        except HookConflictError as e:
            return e.run_id
    if kind == "child":
        return await (await start("other", arg)).result()
    if kind == "attribute":
        set_attributes(a=str(arg))
        return None
    if kind == "step":
        return await work(arg)
    if kind == "sleep":
        await sleep(arg)
        return time.time()
    if kind == "random":
        return [random.random(), str(uuid.uuid4())]
    if kind == "seq":
        return [await interpret(s) for s in arg]
    if kind == "gather":
        return await asyncio.gather(*(interpret(s) for s in arg))
    if kind == "group":
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(interpret(s)) for s in arg]
        return [t.result() for t in tasks]
    if kind == "first":
        tasks = [asyncio.ensure_future(interpret(s)) for s in arg]
        done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        names = [[task.exception() is None, random.random()] for task in done]
        await work(len(done))
        return names
    if kind == "each":
        return [await each for each in asyncio.as_completed([interpret(s) for s in arg])]
    if kind == "timeout":
        try:
            return await asyncio.wait_for(interpret(arg), 20)
        except TimeoutError:
            return "timeout"
    if kind == "catch":
        try:
            return await interpret(arg)
        except (ZeroDivisionError, RunFailedError) as e:
            return str(e)
    if kind == "queue":
        queue: asyncio.Queue = asyncio.Queue()

        async def put(s):
            await queue.put(await interpret(s))

        tasks = [asyncio.create_task(put(s)) for s in arg]
        got = [await queue.get() for _ in arg]
        for task in tasks:
            await task
        return got
    raise AssertionError(kind)


async def interpreted(shape):
    return await interpret(shape)


def others(bench: Bench) -> list[str]:
    """Open hooks and children."""
    return [i for i, item in bench.run.state.items.items() if isinstance(item, OpenHook | OpenChild)]


def settle(bench: Bench, item_id: str, choice: int) -> None:
    """What the outside may do to one of them."""
    item = bench.run.state.items[item_id]
    if isinstance(item, OpenChild):
        bench.child_ends(item_id, error=ZeroDivisionError("child") if choice % 5 == 0 else None, value=choice)
    elif item.claiming and choice % 2:
        bench.refuse(item.token, item_id)
    elif item.claiming:
        bench.grant(item.token, item_id)
    else:
        assert bench.resume(item.token, choice, f"r{len(bench.log)}", item_id) == "OK"


def drive(shape, choices: list[int], *, evict: bool, cancel_after: int | None) -> Bench:
    bench = Bench(interpreted, shape)
    turn = 0
    while not bench.run.state.terminal and turn < 200:
        assert not bench.run.state.header.blocked, bench.log[-1].data
        choice = choices[turn % len(choices)] if choices else 0
        if evict:
            bench.run.evict()
        if cancel_after == turn:
            bench.take(bench.run.cancel("test", bench.now))
        elif choice % 3 == 0 and others(bench):
            settle(bench, others(bench)[choice % len(others(bench))], choice)
        elif bench.open and (choice % 4 or not any(i.due is not None for i in bench.run.state.items.values())):
            request = bench.open[choice % len(bench.open)]
            bench.result(
                request, error=ZeroDivisionError("no") if choice % 7 == 0 else None, fatal=choice % 2 == 0
            ) if (choice % 7 == 0) else bench.result(request)
        elif any(item.due is not None for item in bench.run.state.items.values()):
            bench.next_timer()
        elif others(bench):
            settle(bench, others(bench)[0], choice)
        else:
            break
        turn += 1
    return bench


_INPUTS = (
    ev.StepStarted, ev.RunCancelling, ev.StepScheduled, ev.HookGranted, ev.HookConflict, ev.HookReceived,
    ev.ChildCompleted,
)  # fmt: skip


@settings(max_examples=250, deadline=None)
@given(shapes, st.lists(st.integers(0, 100), max_size=30), st.one_of(st.none(), st.integers(0, 6)))
def test_live_evicted_and_replayed_executions_give_identical_logs(shape, choices, cancel_after):
    live = drive(shape, choices, evict=False, cancel_after=cancel_after)
    evicted = drive(shape, choices, evict=True, cancel_after=cancel_after)
    from durably_schemas import Codec

    codec = Codec()
    assert [codec.encode(e) for e in live.log] == [codec.encode(e) for e in evicted.log]
    assert_replays(live)
    # From every prefix that ends with an input's consequences, replay asks for nothing that the log does not have.
    for end in range(2, len(live.log)):
        following = live.log[end].data
        boundary = isinstance(following, _INPUTS) or following == ev.WaitCompleted()
        if boundary:
            replay(iter(live.log[:end]), live.environment).execution.close()
        elif isinstance(following, ev.StepCreated | ev.WaitCreated | ev.HookCreated | ev.RunCompleted):
            with pytest.raises(Blocked):
                replay(iter(live.log[:end]), live.environment)
    live.run.evict()
    evicted.run.evict()


def test_workflow_code_cannot_interrupt_its_processor():
    async def interrupts():
        raise KeyboardInterrupt

    async def leaves():
        raise SystemExit

    assert Bench(interrupts).run.state.header.blocked
    assert Bench(leaves).status == "failed"
