"""Determinism: what workflow code may ask, that it hears the same at every replay, and what it may not do."""

from __future__ import annotations

import asyncio
import os
import random
import secrets
import socket
import subprocess
import threading
import time
import uuid
from collections import defaultdict
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest
from durably import (
    DeterminismError,
    RunBlockedError,
    RunFailedError,
    create_hook,
    get_workflow_metadata,
    get_writable,
    set_attributes,
    sleep,
    start,
    step,
    workflow,
)
from durably.authoring import Registry, WorkflowDefinition
from harness import until

SEEN: dict[str, list[Any]] = defaultdict(list)
"""What workflow code has seen, replays included, by run."""


@step
async def keep(value: Any) -> Any:
    return value


def _draws() -> list[Any]:
    return [
        random.random(),
        random.randint(0, 10**9),
        random.sample(range(1000), 3),
        str(uuid.uuid4()),
        str(uuid.uuid1()),
        secrets.token_hex(8),
        os.urandom(4).hex(),
        random.Random().random(),
    ]


@workflow
async def draws(n: int) -> list[list[Any]]:
    drawn = []
    for _ in range(n):
        drawn.append(_draws())
        await keep(drawn[-1])
    return drawn


def test_randomness_is_the_runs_own_and_the_same_at_every_replay(system):
    runs = [system.client.start(draws, 4) for _ in range(5)]
    results = [run.result(30) for run in runs]
    for run, drawn in zip(runs, results, strict=True):
        recorded = [e.data.result.data for e in run.events() if e.type == "step_completed"]
        assert all(str(uuids[3]).encode() in data for uuids, data in zip(drawn, recorded, strict=True))
    everything = [str(value) for drawn in results for draws_ in drawn for value in draws_]
    assert len(set(everything)) == len(everything), "nothing is drawn twice, in one run or in two"
    assert all(uuid.UUID(d[3]).version == 4 for drawn in results for d in drawn)


def _clocks() -> list[float]:
    return [
        time.time(),
        time.time_ns() / 1e9,
        datetime.now(UTC).timestamp(),
        datetime.now().timestamp(),
        time.time() - time.monotonic() + time.perf_counter(),
    ]


@workflow
async def reads_clocks() -> list[list[float]]:
    readings = [_clocks()]
    for i in range(3):
        await keep(i)
        readings.append(_clocks())
    await sleep(0.02)
    readings.append(_clocks())
    task = asyncio.create_task(keep("late"))
    with_timeout = asyncio.create_task(asyncio.sleep(0.01))
    await asyncio.wait({task, with_timeout}, return_when=asyncio.ALL_COMPLETED)
    assert date.today() == datetime.fromtimestamp(time.time()).date()
    return readings


def test_the_time_is_that_of_the_event_which_is_delivered_and_never_a_later_one(system):
    runs = [system.client.start(reads_clocks) for _ in range(5)]
    for run in runs:
        readings = run.result(30)
        deliveries = ("run_started", "step_completed", "wait_completed")
        instants = [e.at / 1000 for e in run.events() if e.type in deliveries]
        assert [[round(x, 3) for x in reading] for reading in readings] == [[t] * 5 for t in instants[:5]]


@workflow
async def races_the_clock() -> list[float]:
    first = asyncio.create_task(asyncio.sleep(0.02))
    second = asyncio.create_task(keep("x"))
    await asyncio.wait({first, second}, return_when=asyncio.FIRST_COMPLETED)
    seen = [time.time()]
    await asyncio.wait({first, second}, return_when=asyncio.ALL_COMPLETED)
    return [*seen, time.time()]


def test_after_a_race_the_time_is_the_winners_whatever_came_later(system):
    runs = [system.client.start(races_the_clock) for _ in range(10)]
    for run in runs:
        seen = run.result(30)
        instants = [e.at / 1000 for e in run.events() if e.type in {"step_completed", "wait_completed"}]
        assert [round(x, 3) for x in seen] == instants


@workflow
async def is_watched(n: int) -> int:
    for i in range(n):
        SEEN[get_workflow_metadata().run_id].append(i)
        await keep(i)
    return n


def test_a_live_run_is_executed_once_and_only_eviction_or_failover_replays_it(system):
    run = system.client.start(is_watched, 6)
    assert run.result(30) == 6
    if system.mode == "live":
        assert SEEN[run.id] == list(range(6))
    elif system.mode == "replay":
        assert len(SEEN[run.id]) > 20
    assert sorted(set(SEEN[run.id])) == list(range(6))


@workflow
async def iterates_sets() -> list[Any]:
    tasks = {asyncio.create_task(keep(i)) for i in range(8)}
    done, _ = await asyncio.wait(tasks)
    names = {f"name-{i}" for i in range(8)}
    kept = [await keep(name) for name in names]
    return [[task.result() for task in done], kept]


def test_sets_of_tasks_and_of_texts_are_iterated_alike_at_every_replay(system):
    runs = [system.client.start(iterates_sets) for _ in range(3)]
    for run in runs:
        results, names = run.result(30)
        assert sorted(results) == list(range(8))
        assert sorted(names) == [f"name-{i}" for i in range(8)]


OUTSIDE: dict[str, Any] = {
    "open": lambda: Path("/etc/hostname").read_text(),
    "socket": lambda: socket.create_connection(("127.0.0.1", 1)),
    "subprocess": lambda: subprocess.run(["true"], check=True),
    "thread": lambda: threading.Thread(target=print).start(),
    "time.sleep": lambda: time.sleep(0.01),
    "to_thread": lambda: asyncio.get_running_loop().run_in_executor(None, print),
    "lock": lambda: threading.Condition().wait(0.1),
}


@workflow
async def reaches_outside(kind: str, careful: bool) -> str:
    if not careful:
        OUTSIDE[kind]()
    try:
        OUTSIDE[kind]()
    except DeterminismError as e:
        return str(e)
    return "not reached"


@pytest.mark.parametrize("kind", OUTSIDE)
def test_what_reaches_outside_is_refused_and_says_where_it_belongs(system, kind):
    assert "do this in a step" in system.client.start(reaches_outside, kind, True).result(30)


def test_a_determinism_error_that_nobody_catches_blocks_the_run(system):
    run = system.client.start(reaches_outside, "open", False)
    with pytest.raises(RunBlockedError, match="do this in a step"):
        run.result(30)
    run.cancel()
    assert run.status() == "cancelled"


@workflow
async def writes_to_a_stream() -> None:
    await get_writable().write("x")


def test_streams_are_only_passed_on_by_workflow_code(system):
    run = system.client.start(writes_to_a_stream)
    with pytest.raises((RunFailedError, RunBlockedError), match="step"):
        run.result(30)
    run.cancel()


@workflow
async def uses_timers_of_the_loop() -> list[str]:
    loop, seen = asyncio.get_running_loop(), []
    done = asyncio.Event()
    loop.call_soon(seen.append, "soon")
    loop.call_later(0.01, seen.append, "later")
    loop.call_later(0.02, done.set)
    loop.call_later(3600, seen.append, "never").cancel()
    await done.wait()
    return seen


@workflow
async def synchronises() -> list[Any]:
    queue: asyncio.Queue[Any] = asyncio.Queue(maxsize=1)
    lock, seen = asyncio.Lock(), []

    async def produce() -> None:
        for i in range(4):
            async with lock:
                await queue.put(await keep(i))
        await queue.put(None)

    async def consume() -> None:
        while (item := await queue.get()) is not None:
            seen.append(item)

    await asyncio.gather(produce(), consume())
    return seen


def test_timers_and_synchronisation_of_asyncio_work(system):
    assert system.client.start(uses_timers_of_the_loop).result(30) == ["soon", "later"]
    assert system.client.start(synchronises).result(30) == [0, 1, 2, 3]


@workflow
async def reads_its_environment() -> str | None:
    return os.environ.get("PATH")


def test_the_environment_can_be_read(system):
    assert system.client.start(reads_its_environment).result(30) == os.environ["PATH"]


FINALLY: dict[str, int] = defaultdict(int)


@workflow
async def has_a_finally(token: str) -> str:
    try:
        return await create_hook(token=token)
    finally:
        FINALLY[token] += 1
        with_effect = asyncio.create_task(keep("cleaned up"))
        await with_effect


def test_a_finally_has_its_durable_effects_once_however_often_the_run_is_evicted(system):
    token = system.fresh("finally")
    run = system.client.start(has_a_finally, token)
    system.hook(token)
    system.client.resume_hook(token, "done")
    assert run.result(30) == "done"
    assert system.types(run.id).count("step_created") == 1
    if system.mode == "live":
        assert FINALLY[token] == 1


# -- other code --------------------------------------------------------------------------------------------------------


async def _original(token: str) -> int:
    await keep("before")
    await create_hook(token=token)
    return 1


async def _other_step(token: str) -> int:
    await keep("something else")
    await create_hook(token=token)
    return 2


async def _other_kind(token: str) -> int:
    await sleep(0.01)
    return 2


async def _other_hook(token: str) -> int:
    await keep("before")
    await create_hook(token=f"{token}-other")
    return 2


async def _too_short(token: str) -> int:
    return 2


async def _starts_a_child(token: str) -> int:
    await keep("before")
    await start("anything", token)
    return 2


async def _sets_attributes(token: str) -> int:
    set_attributes(stage="x")
    await keep("before")
    return 2


OTHERS = {
    fn.__name__: fn for fn in (_other_step, _other_kind, _other_hook, _too_short, _starts_a_child, _sets_attributes)
}


def _registry(workflows: dict[str, Any]) -> Registry:
    made = Registry()
    made.steps[keep.name] = keep
    made.workflows.update({name: WorkflowDefinition(name, fn) for name, fn in workflows.items()})
    return made


def test_code_that_does_something_else_than_the_log_blocks_the_run_until_it_fits_again(lone_system):
    before = _registry(dict.fromkeys(OTHERS, _original))
    lone_system.start_worker(registry=before)
    processor = lone_system.start_processor(registry=before)
    runs = {name: lone_system.client.start(name, name) for name in OTHERS}
    for token in runs:
        lone_system.hook(token)
    lone_system.stop_processor(processor)
    processor = lone_system.start_processor(registry=_registry(OTHERS))
    for token, run in runs.items():
        lone_system.client.resume_hook(token, "wakes it up")
        with pytest.raises(RunBlockedError, match=r"expected .* found"):
            run.result(30)
        blocked = next(e.data for e in run.events() if e.type == "run_blocked")
        assert blocked.expected
        assert blocked.found
    lone_system.stop_processor(processor)
    lone_system.start_processor(registry=before)
    for run in runs.values():
        assert run.result(30) == 1
        types = lone_system.types(run.id)
        assert types.count("run_blocked") == types.count("run_unblocked") == 1


def test_a_blocked_run_can_be_cancelled(lone_system):
    lone_system.start_processor(registry=Registry())
    run = lone_system.client.start("known to nobody", "t")
    until(lambda: run.status() == "blocked")
    run.cancel()
    assert run.status() == "cancelled"
