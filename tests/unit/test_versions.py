"""Changing code under running runs, without I/O: patches, versions of a workflow, builds of workers."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from durably import ConfigurationError, DurablyError, deprecate_patch, patched, sleep, workflow
from durably.authoring import Registry, WorkflowDefinition
from durably.authoring import registry as registered
from durably.builds import checked_build, served
from durably.errors import RegistrationError
from durably_processor.engine.execution import Blocked, replay
from durably_processor.partition import Poisoned
from durably_schemas import Codec
from durably_schemas import events as ev
from durably_schemas import records as rec
from engine_bench import Bench, once, work
from hypothesis import given, settings
from hypothesis import strategies as st
from partition_lab import CATALOGUE, CODEC, requests

pytestmark = pytest.mark.usefixtures("guarded")


def deploy(bench: Bench, fn: Any, **how: Any) -> None:
    """Other code from now on: what a processor that starts anew brings."""
    bench.run.evict()
    bench.registry.workflows["wf"] = WorkflowDefinition("wf", fn, **how)
    bench.environment.code_version = f"{fn.__qualname__}"


def patches(bench: Bench) -> list[str]:
    return [event.data.patch_id for event in bench.log if isinstance(event.data, ev.PatchMarked)]


def finish(bench: Bench) -> Any:
    while not bench.run.state.terminal:
        assert not bench.run.state.header.blocked, bench.run.state.header.error
        bench.run.evict()
        if bench.open:
            bench.result(bench.open[0])
        else:
            bench.next_timer()
    return bench.value


# -- patches -----------------------------------------------------------------------------------------------------------


async def before_the_patch():
    first = await work(1)
    return [first, await work("old")]


async def with_the_patch():
    first = await work(1)
    return [first, await (once("new") if patched("ship") else work("old"))]


async def after_deprecation():
    first = await work(1)
    deprecate_patch("ship")
    return [first, await once("new")]


async def after_the_patch():
    return [await work(1), await once("new")]


def test_a_run_that_has_not_been_there_takes_the_new_way_and_its_log_says_so():
    bench = Bench(before_the_patch)
    deploy(bench, with_the_patch)
    assert finish(bench) == [1, "new"]
    assert bench.types()[-5:] == ["patch_marked", "step_created", "step_started", "step_completed", "run_completed"]
    assert patches(bench) == ["ship"]


def test_a_run_that_came_by_before_keeps_to_the_old_way():
    bench = Bench(before_the_patch)
    bench.result(bench.open[0])
    deploy(bench, with_the_patch)
    assert finish(bench) == [1, "old"]
    assert patches(bench) == []


def test_the_first_answer_of_a_run_is_its_answer_for_good():
    async def old(n):
        return [await work(i) for i in range(n)]

    async def new(n):
        return [[await work(i), patched("loop")][-1] for i in range(n)]

    async def earlier(n):
        return [[patched("loop"), await work(i)][0] for i in range(n)]

    bench = Bench(earlier, 3)
    assert finish(bench) == [True] * 3
    assert patches(bench) == ["loop"], "recorded where it was asked first"

    bench = Bench(old, 3)
    bench.result(bench.open[0])
    deploy(bench, new)
    assert finish(bench) == [False] * 3, "it came by once with the old code"
    assert patches(bench) == []


def test_a_patch_is_deprecated_and_then_forgotten_while_its_runs_go_on():
    patient = Bench(with_the_patch)
    patient.result(patient.open[0])
    deploy(patient, after_deprecation)
    assert finish(patient) == [1, "new"]

    late = Bench(after_deprecation)
    late.result(late.open[0])
    assert late.log[-2].data == ev.PatchMarked(patch_id="ship", deprecated=True)
    deploy(late, after_the_patch)
    assert finish(late) == [1, "new"]


def test_code_that_forgets_a_patch_too_early_blocks_the_run():
    bench = Bench(with_the_patch)
    bench.result(bench.open[0])
    deploy(bench, after_the_patch)
    bench.result(bench.open[0])
    blocked = next(event.data for event in bench.log if isinstance(event.data, ev.RunBlocked))
    assert "patch_marked ship" in blocked.expected
    assert "step_created once" in blocked.found
    deploy(bench, with_the_patch)
    bench.take(bench.run.unblock())
    assert finish(bench) == [1, "new"]


def test_a_run_that_wrong_code_has_blocked_is_mended_by_a_patch_and_loses_nothing():
    async def old():
        return [await work(1), await work(2), await work(3)]

    async def wrong():
        return [await once(1), await work(2), await work(3)]

    async def mended():
        first = await work(1)
        return [first, await work(2), await (once("mended") if patched("mend") else work(3))]

    bench = Bench(old)
    deploy(bench, wrong)
    bench.result(bench.open[0])
    assert bench.run.state.header.blocked
    assert bench.types()[-1] == "step_completed", "recorded although nobody could take it"
    deploy(bench, mended)
    bench.take(bench.run.unblock())
    assert finish(bench) == [1, 2, "mended"]


def test_what_blocked_a_run_is_new_to_the_code_that_takes_it_further():
    async def fails():
        await work(1)
        raise_in_the_dark()

    async def mended():
        await work(1)
        return patched("mend")

    def raise_in_the_dark():
        from durably.errors import DeterminismError

        raise DeterminismError("the code is at fault")

    bench = Bench(fails)
    bench.result(bench.open[0])
    assert bench.run.state.header.blocked
    deploy(bench, mended)
    bench.take(bench.run.unblock())
    assert bench.value is True
    assert patches(bench) == ["mend"]
    replay(iter(bench.log), bench.environment).execution.close()


def test_a_run_that_was_poisoned_goes_on_with_other_code_and_has_lost_nothing(lab, monkeypatch):
    (request,) = requests(lab.settle(lab.start("napping", 1)), early=True)
    lab.settle(lab.answer(request))
    lab.now += 60_000
    with monkeypatch.context() as broken:
        broken.setattr("durably_processor.engine.run.Run.timer", lambda *_: 1 / 0)
        with pytest.raises(Poisoned):
            lab.turn()
    read = {CATALOGUE.commands: 1, CATALOGUE.results: 1, CATALOGUE.signals: 0}
    lab.partition.drop()
    lab.options["poisoned"] = frozenset({"r1"})
    lab.take_over(read)
    lab.settle()
    lab.settle()
    assert lab.store.state("r1").header.blocked
    del lab.options["poisoned"]
    lab.environment.code_version = "fixed"
    lab.partition.drop()
    lab.take_over(read)
    part = lab.settle()
    types = [CODEC.decode_as(rec.Event, value).type for _, value in part.events]
    assert types == ["run_unblocked", "step_created"], "the timer fired while it was blocked"
    done = lab.settle(lab.answer(requests(part, early=False)[0]))
    assert CODEC.decode_as(rec.Event, done.events[-1][1]).type == "run_completed"


def test_a_patch_is_asked_for_in_a_workflow_and_has_a_name():
    with pytest.raises(DurablyError, match="in a workflow only"):
        patched("x")
    with pytest.raises(DurablyError, match="in a workflow only"):
        deprecate_patch("x")

    async def nameless():
        patched("")

    assert "1 to 200" in Bench(nameless).run.state.header.error.message
    assert ConfigurationError.__name__ in Bench(nameless).run.state.header.error.type


pieces = st.recursive(
    st.one_of(
        st.tuples(st.just("step"), st.integers(0, 3)),
        st.tuples(st.just("patch"), st.sampled_from("ab")),
        st.tuples(st.just("sleep"), st.integers(1, 9)),
    ),
    lambda inner: st.one_of(
        st.tuples(st.just("seq"), st.lists(inner, min_size=1, max_size=4)),
        st.tuples(st.just("gather"), st.lists(inner, min_size=1, max_size=3)),
    ),
    max_leaves=8,
)


async def interpret(piece, known):
    kind, arg = piece
    if kind == "step":
        return await work(arg)
    if kind == "sleep":
        return await sleep(arg)
    if kind == "patch":
        return [arg, await once(arg)] if arg in known and patched(arg) else await work(arg)
    if kind == "seq":
        return [await interpret(each, known) for each in arg]
    return await asyncio.gather(*(interpret(each, known) for each in arg))


async def knows_nothing(piece):
    return await interpret(piece, "")


async def knows_a(piece):
    return await interpret(piece, "a")


async def knows_both(piece):
    return await interpret(piece, "ab")


def drive(piece: Any, choices: list[int], deploys: dict[int, Any], *, evict: bool) -> Bench:
    bench = Bench(knows_nothing, piece)
    turn = 0
    while not bench.run.state.terminal:
        assert not bench.run.state.header.blocked, bench.run.state.header.error
        if turn in deploys:
            deploy(bench, deploys[turn])
        if evict:
            bench.run.evict()
        choice = choices[turn % len(choices)] if choices else 0
        if bench.open and (choice % 2 or not any(i.due < bench.now + 10**7 for i in bench.run.state.items.values())):
            bench.result(bench.open[choice % len(bench.open)])
        else:
            bench.next_timer()
        turn += 1
        assert turn < 300
    return bench


@settings(max_examples=150, deadline=None)
@given(pieces, st.lists(st.integers(0, 100), max_size=20), st.integers(0, 8), st.integers(0, 8))
def test_patches_that_come_at_any_time_replay_from_every_prefix(piece, choices, first, second):
    deploys = {first: knows_a, first + second: knows_both}
    live = drive(piece, choices, deploys, evict=False)
    evicted = drive(piece, choices, deploys, evict=True)
    codec = Codec()
    assert [codec.encode(event) for event in live.log] == [codec.encode(event) for event in evicted.log]
    assert len(patches(live)) == len(set(patches(live)))
    if live.registry.workflows["wf"].fn is knows_both:
        for end in range(2, len(live.log)):
            if isinstance(live.log[end].data, ev.StepStarted) or live.log[end].data == ev.WaitCompleted():
                replay(iter(live.log[:end]), live.environment).execution.close()


# -- versions of a workflow --------------------------------------------------------------------------------------------


async def first_way():
    return [1, await work("first")]


async def second_way():
    return [2, await once("second")]


def versioned(*definitions: WorkflowDefinition) -> Registry:
    registry = Registry()
    for definition in definitions:
        registry.add_workflow(definition)
    return registry


FIRST = WorkflowDefinition("wf", first_way, 1)
SECOND = WorkflowDefinition("wf", second_way, 2)


def begin(registry: Registry) -> Bench:
    return Bench(registry.workflows["wf"].fn, registry=registry, version=registry.workflows["wf"].version)


def test_new_runs_take_the_newest_version_and_old_ones_go_on_with_theirs():
    bench = begin(versioned(FIRST))
    assert bench.run.state.summary().version == 1
    bench.environment.registry = versioned(SECOND, FIRST)
    assert finish(bench) == [1, "first"]
    assert finish(begin(versioned(FIRST, SECOND))) == [2, "second"]


def test_a_run_whose_version_is_gone_waits_until_it_is_back():
    bench = begin(versioned(FIRST))
    bench.environment.registry = versioned(SECOND)
    bench.run.evict()
    bench.result(bench.open[0])
    assert "version 1 of workflow 'wf': this processor has 2" in bench.run.state.header.error.message
    bench.environment.registry = versioned(FIRST, SECOND)
    bench.take(bench.run.unblock())
    assert bench.value == [1, "first"]


def test_runs_from_before_the_versions_go_on_with_the_oldest():
    bench = Bench(first_way)
    bench.environment.registry = versioned(SECOND, FIRST)
    assert finish(bench) == [1, "first"]


def test_versions_share_a_name_and_everything_else_must_not():
    assert versioned(FIRST, SECOND).code_version() != versioned(SECOND).code_version()
    assert versioned(FIRST, SECOND).code_version() == versioned(SECOND, FIRST).code_version()
    with pytest.raises(RegistrationError, match="version="):
        versioned(WorkflowDefinition("wf", first_way), WorkflowDefinition("wf", second_way))
    with pytest.raises(RegistrationError, match="'wf 1'"):
        versioned(FIRST, WorkflowDefinition("wf", second_way, 1))
    with pytest.raises(RegistrationError, match="1 or more"):
        workflow(name="versions_never", version=0)(first_way)
    assert "versions_never" not in registered.workflows


# -- builds of workers -------------------------------------------------------------------------------------------------


def test_the_steps_of_a_pinned_run_go_to_the_build_that_it_began_with():
    registry = versioned(WorkflowDefinition("wf", first_way, pinned=True))
    bench = Bench(first_way, registry=registry, pinned=True, build="v1")
    assert bench.run.state.summary().build == "v1"
    assert bench.queues == ["default.v1"]
    bench.environment.build = "v2"
    bench.run.evict()
    assert finish(bench) == [1, "first"]
    unpinned = Bench(first_way, build="v1")
    assert (unpinned.run.state.summary().build, unpinned.queues) == (None, ["default"])


def test_a_pinned_run_whose_build_has_no_queue_waits_and_says_what_to_do():
    registry = versioned(WorkflowDefinition("wf", first_way, pinned=True))
    bench = Bench(first_way, registry=registry, pinned=True, build="v7")
    assert "durably topics create --queue default --build v7" in bench.run.state.header.error.message
    bench.environment.queues = {"default", "default.v7"}
    bench.take(bench.run.unblock())
    assert bench.queues == ["default.v7"]


def test_a_worker_serves_its_queues_and_those_of_its_build():
    assert served(["default", "gpu"], None) == ["default", "gpu"]
    assert served(["default", "gpu"], "v1") == ["default", "gpu", "default.v1", "gpu.v1"]
    assert checked_build("2026-11-23.a") == "2026-11-23.a"
    for bad in ("", "a/b", "x" * 65):
        with pytest.raises(ValueError, match="letters"):
            checked_build(bad)


def test_replay_refuses_a_log_whose_version_it_does_not_have():
    bench = begin(versioned(FIRST))
    bench.run.evict()
    bench.environment.registry = Registry()
    with pytest.raises(Blocked, match="unknown workflow"):
        replay(iter(bench.log), bench.environment)
