"""Going back: a new run that begins with another one's log. The engine without I/O, then partitions."""

from __future__ import annotations

import asyncio
import copy
import logging
import random
import uuid
from typing import Any

import pytest
from durably import HookConflictError, create_hook, get_workflow_metadata, patched, sleep
from durably.authoring import WorkflowDefinition
from durably.children import options, start
from durably.errors import UnknownTopic
from durably.payloads import dump, dump_arguments, load
from durably_processor.engine.execution import replay
from durably_processor.engine.reset import CannotReset, copied
from durably_processor.engine.run import Run
from durably_processor.engine.state import OpenChild, OpenHook, OpenStep, created
from durably_schemas import Codec
from durably_schemas import events as ev
from durably_schemas import records as rec
from engine_bench import Bench, once, work
from hypothesis import given, settings
from hypothesis import strategies as st
from partition_lab import CATALOGUE, CODEC, Lab, content, rebuilt, requests

pytestmark = pytest.mark.usefixtures("guarded")


def asked(n: int, new: str = "wrun_2", of: str = "wrun_1") -> rec.ResetRun:
    return rec.ResetRun(run_id=of, new_run_id=new, to_event=n, requested_at=0, reason="wrong address")


def back_to(bench: Bench, n: int, fn: Any = None, new: str = "wrun_2") -> Bench:
    """A bench for the run that goes on from event n, with other code where that is given; the old one is ended."""
    command = asked(n, new, bench.run.state.header.run_id)
    log = copied(list(bench.log), bench.run.state.header, command, bench.environment.queues)
    bench.take(bench.run.reset(n, new, command.reason, bench.now))
    made = copy.copy(bench)
    made.log, made.open, made.signals, made.commands, made.queues = [], [], [], [], []
    if fn is not None:
        made.registry.workflows["wf"] = WorkflowDefinition("wf", fn)
    seed = rec.RunCopied(run_id=new, reason=command.reason, events=())
    made.run, outcome = Run.copied(seed, log, bench.now, made.environment, lambda seq: iter(made.log[seq - 1 :]))
    made.take(outcome)
    return made


def seq_of(bench: Bench, kind: str, nth: int = 1) -> int:
    return [event.seq for event in bench.log if event.type == kind][nth - 1]


def finish(bench: Bench) -> Any:
    while not bench.run.state.terminal:
        assert not bench.run.state.header.blocked, bench.run.state.header.error
        bench.run.evict()
        if bench.open:
            bench.result(bench.open[0])
        else:
            bench.next_timer()
    return bench.value


async def three_steps():
    return [await work(1), await work(2), await work(3)]


def test_what_is_before_the_event_stays_and_what_follows_is_done_again():
    old = Bench(three_steps)
    for _ in range(3):
        old.result(old.open[0])
    new = back_to(old, seq_of(old, "step_completed", 2))
    assert [load(r.input)[0] for r in new.open] == [[3]]
    assert finish(new) == [1, 2, 3]
    steps = {event.correlation_id for event in old.log} & {event.correlation_id for event in new.log}
    assert steps == {None}, "an idempotency key of the new run is none of the old one's"
    assert old.status == "completed", "a run that has ended stays as it ended"
    assert new.run.state.summary().origin == rec.Origin(run_id="wrun_1", events=8)
    reset = new.log[8]
    assert (reset.seq, reset.data) == (9, ev.RunReset(reason="wrong address"))


def test_other_code_decides_anew_about_the_last_event_that_stays():
    async def other():
        return [await work(1), await once("other")]

    old = Bench(three_steps)
    old.result(old.open[0])
    new = back_to(old, seq_of(old, "step_completed"), other)
    assert finish(new) == [1, "other"]
    assert old.status == "cancelled"
    assert old.run.state.header.successor == "wrun_2"
    assert old.run.state.header.cancel_reason == "reset to event 5 as run wrun_2: wrong address"


def test_a_patch_is_new_to_what_follows_the_cut_and_not_to_what_precedes_it():
    async def mended():
        early = patched("early")
        await work(1)
        await work(2)
        return [early, patched("late")]

    old = Bench(three_steps)
    old.result(old.open[0])
    old.result(old.open[0])
    new = back_to(old, seq_of(old, "step_completed", 2), mended)
    assert finish(new) == [False, True]


def test_what_the_code_says_behind_the_cut_is_logged_and_what_it_says_before_is_not_said_again(caplog):
    async def wf():
        try:
            for n in range(3):
                logging.getLogger("app").warning("asks for %s", n)
                await work(n)
        finally:
            logging.getLogger("app").warning("is through")

    old = Bench(wf)
    old.result(old.open[0])
    caplog.clear()
    new = back_to(old, seq_of(old, "step_completed"))
    new.run.evict()
    new.result(new.open[0])
    assert caplog.messages == ["asks for 1", "asks for 2"]
    new.result(new.open[0])
    assert caplog.messages[2:] == ["is through"]


def test_a_run_goes_back_to_its_very_beginning_and_before_a_delay_is_over():
    old = Bench(three_steps)
    assert finish(back_to(old, 1)) == [1, 2, 3]
    assert finish(back_to(old, 2, new="wrun_3")) == [1, 2, 3]


def test_a_blocked_run_goes_on_from_before_it_was_blocked():
    async def wrong():
        return await once(1)

    old = Bench(three_steps)
    old.result(old.open[0])
    old.run.evict()
    old.registry.workflows["wf"] = WorkflowDefinition("wf", wrong)
    old.result(old.open[0])
    blocked = seq_of(old, "run_blocked")
    with pytest.raises(CannotReset, match=f"reset to event {blocked - 1} or an earlier"):
        back_to(old, len(old.log))
    assert finish(back_to(old, blocked - 1, three_steps)) == [1, 2, 3]


def test_code_that_does_not_fit_what_stays_blocks_the_new_run_until_it_does():
    async def wrong():
        return await once(1)

    old = Bench(three_steps)
    old.result(old.open[0])
    new = back_to(old, len(old.log), wrong)
    assert new.run.state.header.blocked
    assert len(new.open) == 1, "what is open runs all the same, and its result is kept"
    new.result(new.open[0])
    new.registry.workflows["wf"] = WorkflowDefinition("wf", three_steps)
    new.take(new.run.unblock())
    assert finish(new) == [1, 2, 3]


def test_where_a_log_cannot_be_cut_it_says_where_it_can():
    async def wf():
        await asyncio.gather(work(1), work(2), work(3))

    old = Bench(wf)
    with pytest.raises(
        CannotReset, match=r"event 4 is one of those that event 2 led to, up to 5: reset to event 2, .* 5"
    ):
        back_to(old, 4)
    for bad in (0, -1, 6):
        with pytest.raises(CannotReset, match="events 1 to 5"):
            back_to(old, bad)
    finish(old)
    with pytest.raises(CannotReset, match="the run's end"):
        back_to(old, len(old.log))


def test_a_step_that_is_open_and_has_no_queue_any_more_is_not_begun_anew():
    old = Bench(three_steps)
    old.result(old.open[0])
    old.environment.queues = {"other"}
    with pytest.raises(CannotReset, match=r"topics create --queue default`.* reset to event 5 or an earlier one"):
        back_to(old, 6)
    assert not old.run.state.terminal
    back_to(old, 5)


def test_the_runs_end_is_not_offered_as_a_place_to_cut_at():
    async def wf():
        await work(1)
        return patched("p")

    old = Bench(wf)
    old.result(old.open[0])
    assert old.types()[5:] == ["patch_marked", "run_completed"]
    with pytest.raises(CannotReset, match=r"led to, up to 7: reset to event 5, and the code decides anew$"):
        back_to(old, 6)


def test_what_the_code_has_seen_before_the_cut_it_sees_again_and_nothing_of_it_comes_twice():
    async def wf():
        first = [random.random(), str(uuid.uuid4()), get_workflow_metadata().run_id]
        await work(first)
        second = [random.random(), str(uuid.uuid4()), get_workflow_metadata().run_id]
        return [first, await work(second)]

    old = Bench(wf)
    old.result(old.open[0])
    new = back_to(old, seq_of(old, "step_completed"))
    assert load(new.open[0].input)[0][0] != load(old.open[0].input)[0][0]
    first, second = finish(new)
    assert first[2] == "wrun_1"
    assert second[2] == "wrun_2"
    newest = back_to(new, seq_of(new, "step_completed"), new="wrun_3")
    third = finish(newest)[1]
    assert third[2] == "wrun_3"
    assert third[0] != second[0]


# -- what is open at the cut -------------------------------------------------------------------------------------------


def test_a_hook_of_its_own_token_waits_on_and_what_it_received_later_is_received_again():
    async def wf():
        hook = create_hook()
        await work(1)
        return [await hook, await hook]

    old = Bench(wf)
    token = next(iter(old.run.state.hooks))
    old.result(old.open[0])
    old.resume(token, "yes", "r1")
    new = back_to(old, seq_of(old, "step_completed"))
    assert next(iter(new.run.state.hooks)) == token
    assert new.resume(token, "and", "r2") == "OK"
    assert new.value == ["yes", "and"]


def test_a_hook_whose_token_leads_to_a_run_that_has_ended_is_made_anew():
    async def wf():
        await work(1)
        hook = create_hook()
        await work(2)
        raise ValueError(hook.token)

    old = Bench(wf)
    old.result(old.open[0])
    old.result(old.open[0])
    assert old.status == "failed"
    with pytest.raises(CannotReset, match=f"reset to event {seq_of(old, 'hook_created') - 1} or an earlier"):
        back_to(old, seq_of(old, "step_completed", 2))
    new = back_to(old, seq_of(old, "step_completed"))
    token = next(iter(new.run.state.hooks))
    assert token.endswith(".wrun_2")


def test_a_custom_token_is_claimed_anew_and_what_is_open_waits_for_it():
    async def wf():
        hook = create_hook(token="order-7")
        await work(1)
        try:
            return await hook
        except HookConflictError as e:
            return e.run_id

    old = Bench(wf)
    old.grant("order-7")
    new = back_to(old, len(old.log))
    assert [(s.token, s.run_id) for s in old.signals if isinstance(s, rec.ReleaseToken)] == [("order-7", "wrun_1")]
    assert new.signals == [rec.ClaimToken(token="order-7", run_id="wrun_2", hook_id="hook_1")]
    assert not new.open, "nothing overtakes the hook"
    new.grant("order-7")
    new.result(new.open[0])
    new.resume("order-7", "yes", hook_id="hook_1")
    assert new.value == "yes"
    lost = back_to(old, seq_of(old, "hook_granted"), new="wrun_3")
    lost.refuse("order-7", holder="wrun_2")
    lost.result(lost.open[0])
    assert lost.value == "wrun_2"


def test_children_that_are_open_are_waited_for_and_those_that_come_after_are_others():
    async def wf():
        kept = await options(on_parent_end="cancel").start("other", 1)
        await work(1)
        after = await options(on_parent_end="cancel").start("other", 2)
        return [await kept.result(), await after.result()]

    old = Bench(wf)
    old.result(old.open[0])
    kept, after = (item.run_id for item in old.run.state.items.values() if isinstance(item, OpenChild))
    new = back_to(old, seq_of(old, "step_completed"))
    assert [c.run_id for c in old.commands if isinstance(c, rec.CancelRun)] == [after]
    watch, begun = new.commands
    assert watch == rec.WatchRun(run_id=kept, watcher_run_id="wrun_2", correlation_id="child_1")
    assert begun.run_id not in (kept, after)
    assert begun.parent.run_id == "wrun_2"
    new.child_ends("child_1", value="a")
    new.child_ends("child_2", value="b")
    assert new.value == ["a", "b"]


def test_a_timer_that_is_due_fires_and_whoever_watched_is_told_of_the_old_run_only():
    async def wf():
        await sleep("1h")
        return await work(1)

    old = Bench(wf)
    old.take(old.run.watch("watcher", "child_1", old.now))
    due = old.run.state.items["wait_1"].due
    old.next_timer()
    new = back_to(old, seq_of(old, "run_watched"))
    told = [s for s in old.signals if isinstance(s, rec.ChildFinished)]
    assert [(t.run_id, t.status) for t in told] == [("watcher", "cancelled")]
    assert new.run.state.items["wait_1"].due == due <= new.now
    assert finish(new) == 1
    assert not any(isinstance(s, rec.ChildFinished) for s in new.signals)


# -- anything, cut anywhere --------------------------------------------------------------------------------------------

pieces = st.recursive(
    st.one_of(
        st.tuples(st.just("step"), st.integers(0, 3)),
        st.tuples(st.sampled_from(["random", "hook", "child", "patch"]), st.integers(0, 1)),
        st.tuples(st.just("custom"), st.integers(0, 1)),
        st.tuples(st.just("sleep"), st.integers(1, 9)),
    ),
    lambda inner: st.one_of(
        st.tuples(st.just("seq"), st.lists(inner, min_size=1, max_size=4)),
        st.tuples(st.just("gather"), st.lists(inner, min_size=1, max_size=3)),
        st.tuples(st.just("timeout"), inner),
    ),
    max_leaves=7,
)


async def interpret(piece):
    kind, arg = piece
    if kind == "step":
        return await work(arg)
    if kind == "random":
        return await work([random.random(), str(uuid.uuid4())])
    if kind == "hook":
        async with create_hook() as hook:
            return [await work(hook.token), await hook]
    if kind == "custom":
        try:
            async with create_hook(token=f"t{arg}") as hook:
                return await hook
        except HookConflictError as e:
            return e.run_id
    if kind == "child":
        child = await start("other", arg)
        return [await work(child.id), await child.result()]
    if kind == "patch":
        return patched(f"p{arg}")
    if kind == "sleep":
        return await sleep(arg)
    if kind == "timeout":
        try:
            return await asyncio.wait_for(interpret(arg), 5)
        except TimeoutError:
            return "late"
    if kind == "seq":
        return [await interpret(each) for each in arg]
    return await asyncio.gather(*(interpret(each) for each in arg))


def drive(bench: Bench, choices: list[int], turns: int, *, evict: bool) -> None:
    for turn in range(turns):
        state = bench.run.state
        if state.terminal:
            return
        assert not state.header.blocked, state.header.error
        if evict:
            bench.run.evict()
        choice = choices[turn % len(choices)]
        awaited = [i for i, item in state.items.items() if isinstance(item, OpenHook | OpenChild)]
        timers = any(item.due is not None and not isinstance(item, OpenStep) for item in state.items.values())
        if bench.open and (choice % 3 or not (awaited or timers)):
            bench.result(bench.open[choice % len(bench.open)])
        elif awaited and (choice % 2 or not timers):
            outside(bench, awaited[choice % len(awaited)], choice)
        else:
            bench.next_timer()


def outside(bench: Bench, item_id: str, choice: int) -> None:
    item = bench.run.state.items[item_id]
    if isinstance(item, OpenChild):
        bench.child_ends(item_id, value=choice)
    elif item.claiming and choice % 5 == 0:
        bench.refuse(item.token, item_id)
    elif item.claiming:
        bench.grant(item.token, item_id)
    else:
        bench.resume(item.token, choice, f"r{len(bench.log)}", item_id)


@settings(max_examples=200, deadline=None)
@given(pieces, st.lists(st.integers(0, 100), min_size=1, max_size=20), st.integers(0, 12), st.integers(0, 100))
def test_a_run_that_is_reset_anywhere_goes_on_and_replays(piece, choices, turns, place):
    logs = []
    for evict in (False, True):
        old = Bench(interpret, piece)
        drive(old, choices, turns, evict=evict)
        before = list(old.log)
        n = 1 + place % len(before)
        try:
            new = back_to(old, n)
        except CannotReset:
            assert old.log == before
            return
        assert [(e.seq, e.type, e.at) for e in new.log[:n]] == [(e.seq, e.type, e.at) for e in before[:n]]
        assert old.run.state.terminal
        drive(new, choices, 200, evict=evict)
        assert not new.run.state.header.blocked, new.run.state.header.error
        assert [event.seq for event in new.log] == list(range(1, len(new.log) + 1))
        replay(iter(new.log), new.environment).execution.close()
        state = created(new.log[0])
        for event in new.log:
            state.apply(event)
        assert state.header == new.run.state.header
        assert state.items == new.run.state.items
        made = {e.correlation_id for e in new.log if e.type == "step_created"}
        assert not made & {e.correlation_id for e in before if e.type == "step_created"}
        logs.append([Codec().encode(event) for event in new.log])
    assert logs[0] == logs[1]


# -- partitions --------------------------------------------------------------------------------------------------------

TO = rec.ReplyTo(partition=0, request_id="q")


def ask(lab: Lab, n: int, new: str = "r2"):
    record = rec.ResetRun(run_id="r1", new_run_id=new, to_event=n, requested_at=0, reply_to=TO)
    return lab.put(CATALOGUE.commands, record)


def types(part) -> list[tuple[str, str]]:
    events = [CODEC.decode_as(rec.Event, value) for _, value in part.events]
    return [(event.run_id, event.type) for event in events]


def two_done(lab: Lab) -> None:
    part = lab.settle(lab.start("chain", 3))
    for _ in range(2):
        part = lab.settle(lab.answer(requests(part, early=True)[0]))


def test_a_reset_is_one_transaction_of_the_old_run_and_one_of_the_new(lab):
    two_done(lab)
    ended = lab.settle(ask(lab, 5))
    assert types(ended) == [("r1", "run_cancelled")]
    assert not ended.answers, "the new run's owner answers"
    seed = lab.signals(ended)
    begun = lab.settle(*seed)
    assert types(begun)[-2:] == [("r2", "run_reset"), ("r2", "step_created")]
    ((_, make),) = begun.answers
    summary = make().summary
    assert (summary.run_id, summary.origin, summary.status) == ("r2", rec.Origin(run_id="r1", events=5), "running")
    (request,) = requests(begun, early=False)
    assert load(request.input)[0] == [1]
    part = lab.settle(lab.answer(request))
    part = lab.settle(lab.answer(requests(part, early=True)[0]))
    assert types(part)[-1] == ("r2", "run_completed")


@pytest.mark.parametrize("n", [5, 9])
def test_a_copy_of_a_reset_and_of_its_log_changes_nothing(lab, n):
    two_done(lab)
    begun = lab.settle(*lab.signals(lab.settle(ask(lab, n))))
    again = lab.settle(ask(lab, n))
    assert not again.events
    copy_ = lab.settle(*lab.signals(again))
    assert not copy_.events
    ((_, make),) = copy_.answers
    assert (make().existing, make().summary.run_id) == (True, "r2")
    assert len(requests(begun, early=False)) == 1


def test_a_reset_waits_until_the_log_is_committed_and_is_read_again_after_a_crash(lab):
    part = lab.settle(lab.start("chain", 3))
    busy = lab.turn(lab.answer(requests(part, early=True)[0]), ask(lab, 3))
    assert ("r1", "run_cancelled") not in types(busy)
    held = {tp.topic: offset for tp, offset in busy.offsets.items()}
    assert held[CATALOGUE.commands] == 1, "it is to be read again"
    lab.commit(busy)
    ended = lab.settle()
    assert types(ended) == [("r1", "run_cancelled")]
    assert {tp.topic: offset for tp, offset in ended.offsets.items()}[CATALOGUE.commands] == 2


def test_a_run_that_is_never_at_rest_is_reset_all_the_same(lab):
    late = lab.turn(lab.start("chain", 50))
    for n in range(10):
        (request,) = requests(late, early=True)
        part = lab.turn(lab.answer(request), *([ask(lab, 5)] if n == 3 else []))
        lab.commit(late)
        lab.acked = lab.number - 1  # commits are always a turn behind
        late = part
        if ("r1", "run_cancelled") in types(part):
            break
    assert types(lab.commit(late))[-1] == ("r1", "run_cancelled")
    begun = lab.settle(*lab.signals(late))
    assert types(begun)[4:] == [("r2", "step_completed"), ("r2", "run_reset"), ("r2", "step_created")]


def test_a_run_that_was_cancelled_before_it_began_goes_back_to_its_beginning(lab):
    given = dump_arguments(lab.registry.workflows["chain"].fn, (1,), {}, "chain")
    later = lab.now + 60_000
    delayed = rec.StartRun(run_id="r1", workflow="chain", input=given, requested_at=0, start_at=later, nonce="n")
    lab.settle(lab.put(CATALOGUE.commands, delayed))
    lab.settle(lab.put(CATALOGUE.commands, rec.CancelRun(run_id="r1", requested_at=0)))
    begun = lab.settle(*lab.signals(lab.settle(ask(lab, 1))))
    assert types(begun) == [("r2", "run_created"), ("r2", "run_reset")]
    lab.now = later
    assert types(lab.settle()) == [("r2", "run_started"), ("r2", "step_created")]


def test_a_run_that_goes_on_with_what_kafka_refuses_is_blocked(lab):
    two_done(lab)
    copy_ = lab.signals(lab.settle(ask(lab, 9)))
    lab.options = {"refused": {"r2": UnknownTopic("lab.requests.default")}}
    lab.take_over(lab.partition._positions)
    begun = lab.settle(*copy_)
    assert types(begun)[-2:] == [("r2", "run_reset"), ("r2", "run_blocked")]
    assert not requests(begun, early=False)


def test_no_run_goes_on_as_itself_or_as_one_that_was_there_before(lab):
    two_done(lab)
    ((_, make),) = lab.settle(ask(lab, 5, new="r1")).answers
    assert (make().status, "cannot go on in its own place" in make().message) == ("REFUSED", True)
    lab.settle(lab.start("hooked", 0, run_id="r3"))
    part = lab.settle(*lab.signals(lab.settle(ask(lab, 5, new="r3"))))
    ((_, make),) = part.answers
    assert (make().status, "reset run r1, which has been ended, as another" in make().message) == ("REFUSED", True)
    assert not part.events


def test_a_refused_reset_says_why_and_ends_nothing(lab):
    two_done(lab)
    for n, why in ((99, "events 1 to 9"), (0, "no event 0")):
        part = lab.settle(ask(lab, n))
        ((_, make),) = part.answers
        assert make().status == "REFUSED"
        assert why in make().message
        assert not part.events
    unknown = rec.ResetRun(run_id="nobody", new_run_id="r9", to_event=1, requested_at=0, reply_to=TO)
    ((_, make),) = lab.settle(lab.put(CATALOGUE.commands, unknown)).answers
    assert make().status == "NOT_FOUND"
    clash = rec.ResetRun(run_id="r1", new_run_id="hook_1", to_event=1, requested_at=0, reply_to=TO)
    ((_, make),) = lab.settle(lab.put(CATALOGUE.commands, clash)).answers
    assert make().status == "REFUSED"


def test_a_log_that_no_record_holds_is_not_copied(lab):
    lab.environment.max_payload_bytes = 300
    two_done(lab)
    ((_, make),) = lab.settle(ask(lab, 5)).answers
    assert "300 can be copied at most" in make().message
    lab.environment.max_payload_bytes = 5_000
    told = rec.ResetRun(run_id="r1", new_run_id="r2", to_event=5, requested_at=0, reason="\u20ac" * 2_000, reply_to=TO)
    part = lab.settle(lab.put(CATALOGUE.commands, told))
    ((_, make),) = part.answers
    assert ("with the reason" in make().message, part.events) == (True, [])


def test_what_comes_by_the_old_runs_token_is_handed_on_and_counts_once(lab):
    lab.settle(lab.start("hooked", 0))
    token = next(iter(lab.partition._runs["r1"].run.state.hooks))
    lab.settle(*lab.signals(lab.settle(ask(lab, 3))))
    question = rec.QueryRun(run_id="r1", what="HOOK", token=token, reply_to=TO)
    forwarded = lab.settle(lab.put(CATALOGUE.commands, question))
    (output,) = [o for o in forwarded.outputs if o.topic == CATALOGUE.commands]
    ((_, make),) = lab.settle(lab.put(CATALOGUE.commands, output.value, output.key)).answers
    assert [hook.run_id for hook in make().hooks] == ["r2"]
    resume = rec.ResumeHook(token=token, resume_id="a", payload=dump("yes", "p"), requested_at=0, reply_to=TO)
    for existing in (False, True):
        routed = lab.settle(lab.put(CATALOGUE.commands, resume, b"r1"))
        assert not routed.answers
        part = lab.settle(*lab.signals(routed))
        assert bool(part.events) is not existing
        ((_, make),) = part.answers
        assert (make().status, make().summary.run_id) == ("OK", "r2")


def test_the_store_of_a_run_that_was_reset_is_rebuilt_from_the_log(lab, tmp_path):
    two_done(lab)
    lab.settle(*lab.signals(lab.settle(ask(lab, 5))))
    with rebuilt(lab, tmp_path) as (store, _):
        assert content(store, b"erotb") == content(lab.store, b"erotb")
