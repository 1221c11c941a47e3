"""Changing code under running runs: patches, fixed deployments, pinned builds, and going back to an event."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections import Counter
from typing import Any

import pytest
from durably import (
    DurablyError,
    RunBlockedError,
    RunCancelledError,
    create_hook,
    patched,
    sleep,
    step,
    workflow,
)
from durably.authoring import Registry, WorkflowDefinition, registry
from durably_schemas.records import Event, Origin
from harness import until

calls: Counter[str] = Counter()
gate = threading.Event()


@step
async def versions_packs(order: str) -> str:
    calls[f"packs {order}"] += 1
    return f"packed {order}"


@step
async def versions_ships(order: str, how: str = "plain") -> str:
    calls[f"ships {order}"] += 1
    return f"{how} {order}"


@step
def versions_waits(order: str) -> str:
    gate.wait(30)
    return f"waited {order}"


@step
async def versions_builds(order: str) -> str:
    raise NotImplementedError("each build has its own")


@workflow
async def versions_delivers(order: str) -> list[Any]:
    packed = await versions_packs(order)
    hook = create_hook()
    return [packed, await versions_ships(order), await hook]


def code(fn: Any, name: str = "delivers", **how: Any) -> Registry:
    """A deployment with one workflow."""
    made = Registry()
    made.steps = registry.steps
    made.workflows[name] = WorkflowDefinition(name, fn, **how)
    return made


def test_versions_a_patch_leaves_old_runs_their_way(lone_system):
    async def old(order: str) -> str:
        await create_hook(token=f"go {order}")
        return await versions_ships(order)

    async def new(order: str) -> list[str]:
        early = patched("early")
        await create_hook(token=f"go {order}")
        return [str(early), await versions_ships(order, "insured" if patched("late") else "plain")]

    system = lone_system
    system.start_worker()
    processor = system.start_processor(registry=code(old))
    before = system.client.start("delivers", "1")
    system.hook("go 1")
    system.stop_processor(processor)
    processor = system.start_processor(registry=code(new))
    after = system.client.start("delivers", "2")
    system.hook("go 2")
    system.stop_processor(processor)
    system.start_processor("anew", registry=code(new), always_replay=True)
    for order in "12":
        system.client.resume_hook(f"go {order}")
    assert before.result(30) == ["False", "insured 1"], (
        "the first place was passed with the old code, the second was not"
    )
    assert after.result(30) == ["True", "insured 2"]
    assert [system.types(run.id).count("patch_marked") for run in (before, after)] == [1, 2]


def test_versions_a_blocked_run_goes_on_after_a_fixed_deploy_and_has_lost_nothing(lone_system):
    async def right(order: str) -> list[Any]:
        hook, waited, slept = create_hook(token=f"all {order}"), versions_waits(order), sleep(0.5)
        first = asyncio.gather(hook.__anext__(), waited, slept)
        await create_hook(token=f"first {order}")
        return [await versions_packs(order), *(await first)[:2], await hook]

    async def wrong(order: str) -> str:
        hook, waited, slept = create_hook(token=f"all {order}"), versions_waits(order), sleep(0.5)
        both = asyncio.gather(hook.__anext__(), waited, slept)
        await create_hook(token=f"other {order}")
        return str(await both)

    system = lone_system
    system.start_worker()
    processor = system.start_processor(registry=code(right))
    gate.clear()
    run = system.client.start("delivers", "3")
    system.hook("first 3")
    system.hook("all 3")
    system.stop_processor(processor)
    processor = system.start_processor(registry=code(wrong), code_version="wrong")
    system.client.resume_hook("first 3")
    with pytest.raises(RunBlockedError):
        run.result(30)
    system.client.resume_hook("all 3", "a")
    gate.set()
    system.client.resume_hook("all 3", "b")
    until(lambda: {"step_completed", "wait_completed"} <= set(system.types(run.id)))
    system.stop_processor(processor)
    system.start_processor(registry=code(right), code_version="fixed")
    assert run.result(30) == ["packed 3", "a", "waited 3", "b"]
    assert run.describe().code_version.startswith("fixed-py")


def test_versions_a_reset_keeps_results_and_does_the_rest_again(system):
    order = system.fresh("order")
    old = system.client.start(versions_delivers, order)
    until(lambda: shipped(old))
    keys = {e.correlation_id for e in old.events() if e.type == "step_created"}
    first = next(e.seq for e in old.events() if e.type == "step_completed")
    with pytest.raises(DurablyError, match="no event 999"):
        old.reset(999)
    new = old.reset(first, reason="wrong address")
    assert new.describe().origin == Origin(run_id=old.id, events=first)
    with pytest.raises(RunCancelledError, match=f"reset to event {first} as run {new.id}: wrong address"):
        old.result(30)
    assert not keys & {e.correlation_id for e in new.events() if e.type == "step_created"}
    until(lambda: shipped(new))
    system.client.resume_hook(new.hooks()[0].token, "again")
    assert new.result(30) == [f"packed {order}", f"plain {order}", "again"]
    assert calls[f"packs {order}"] >= 1
    assert calls[f"ships {order}"] >= 2
    # One that has ended is reset, too; and what comes by a token that names a run which was reset is handed on.
    third = system.client.reset(new.id, first)
    token = until(third.hooks)[0].token
    fourth = third.reset(len(until(lambda: shipped(third))))
    assert fourth.hooks()[0].token == token
    assert system.client.resume_hook(token, "handed on").run_id == fourth.id
    assert fourth.result(30)[2] == "handed on"


def shipped(run: Any) -> list[Event] | None:
    """The events of a run that waits for its hook only."""
    events: list[Event] = run.events()
    return events if [e.type for e in events].count("step_completed") == 2 else None


def test_versions_steps_of_pinned_runs_go_to_the_workers_of_their_build(lone_system):
    async def pinned(order: str) -> list[str]:
        first = await versions_builds(order)
        await create_hook(token=f"go {order}")
        return [first, await versions_builds(order)]

    def build(name: str) -> Registry:
        async def built(order: str) -> str:
            return name

        made = code(pinned, pinned=True)
        made.steps = {versions_builds.name: dataclasses.replace(versions_builds, fn=built)}
        return made

    system = lone_system
    system.broker.create(system.catalogue.topics(("default.v1", "default.v2")))
    for name in ("v1", "v2"):
        system.start_worker([f"default.{name}"], registry=build(name))
    processor = system.start_processor(registry=build("v1"), build="v1")
    old = system.client.start("delivers", "4")
    system.hook("go 4")
    system.stop_processor(processor)
    system.start_processor(registry=build("v2"), build="v2")
    new = system.client.start("delivers", "5")
    system.hook("go 5")
    for order in "45":
        system.client.resume_hook(f"go {order}")
    assert old.result(30) == ["v1", "v1"]
    assert new.result(30) == ["v2", "v2"]
    assert [run.describe().build for run in (old, new)] == ["v1", "v2"]
