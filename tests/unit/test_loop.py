"""The deterministic loop: asyncio as it is, in the same order everywhere, and gone without a trace when closed."""

# ruff: noqa: PT012, PTH123, RUF006, SIM115 - workflows as careless as their authors

from __future__ import annotations

import asyncio
import gc
import inspect
import os
import random
import subprocess
import sys
import threading
import time
import weakref
from contextvars import ContextVar
from pathlib import Path

import pytest
from durably.errors import DeterminismError
from durably_processor.engine import guards
from durably_processor.engine.loop import DeadContext, DeterministicLoop
from hypothesis import given, settings
from hypothesis import strategies as st

NOW = 1_700_000_000_123


@pytest.fixture(autouse=True)
def _guarded():
    guards.install()
    yield
    guards.uninstall()


class World:
    """An engine that completes what it is told to."""

    def __init__(self, main=None, seed="run-1"):
        self.log = []
        self.due = {}
        self.futures = {}
        self.trace = []
        self.loop = DeterministicLoop(seed, self)
        self.loop.now_ms = NOW
        self.task = self.loop.create_task(main(self)) if main else None
        self.loop.run_ready()

    def timer_set(self, timer, due_ms):
        self.log.append(("set", timer, due_ms - NOW))
        self.due[timer] = due_ms

    def timer_dropped(self, timer):
        self.log.append(("dropped", timer))
        del self.due[timer]

    def fire(self, timer):
        self.loop.now_ms = max(self.loop.now_ms, self.due.pop(timer))
        self.loop.fire(timer)
        self.loop.run_ready()

    async def step(self, name):
        self.futures[name] = future = self.loop.create_future()
        self.trace.append(f"{name} asked")
        return await future

    def complete(self, name, value=None):
        future = self.futures.pop(name)
        if not future.done():
            future.set_result(value)
        self.loop.run_ready()

    def result(self):
        assert self.task.done(), "still waiting"
        return self.task.result()


# -- asyncio, as it is -------------------------------------------------------------------------------------------------


def test_gather_and_shield():
    async def main(w):
        shielded = asyncio.shield(w.step("c"))
        return await asyncio.gather(w.step("a"), w.step("b"), shielded)

    w = World(main)
    for name in "bca":
        w.complete(name, name)
    assert w.result() == ["a", "b", "c"]


def test_wait_returns_sets_in_the_order_of_creation():
    async def main(w):
        tasks = [asyncio.create_task(w.step(str(i)), name=str(i)) for i in range(40)]
        done, _ = await asyncio.wait(tasks)
        return [t.get_name() for t in done]

    w = World(main)
    for name in reversed([str(i) for i in range(40)]):
        w.complete(name)
    assert w.result() == [str(i) for i in range(40)]


def test_wait_first_completed_and_exception():
    async def main(w):
        tasks = [asyncio.create_task(w.step(n)) for n in "ab"]
        done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return [t.result() for t in done], len(pending)

    w = World(main)
    w.complete("b", 1)
    assert w.result() == ([1], 1)
    w.loop.close()


def test_as_completed_starts_coroutines_in_order_and_yields_them_as_they_end():
    async def main(w):
        return [await one for one in asyncio.as_completed([w.step(str(i)) for i in range(20)])]

    w = World(main)
    assert w.trace == [f"{i} asked" for i in range(20)]
    order = random.Random(1).sample(range(20), 20)
    for i in order:
        w.complete(str(i), i)
    assert w.result() == order


def test_task_group_cancels_its_siblings():
    async def fail():
        await asyncio.sleep(0)
        raise ValueError("x")

    async def main(w):
        with pytest.raises(ExceptionGroup) as caught:
            async with asyncio.TaskGroup() as group:
                group.create_task(w.step("a"))
                group.create_task(fail())
        return caught.value.exceptions

    (error,) = World(main).result()
    assert isinstance(error, ValueError)


def test_a_timeout_is_a_durable_timer():
    async def main(w):
        async with asyncio.timeout(5):
            await w.step("quick")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.5):
                await w.step("slow")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(w.step("slower"), 2)
        return asyncio.current_task().cancelling()

    w = World(main)
    w.complete("quick")
    w.fire(2)
    w.fire(3)
    assert w.result() == 0
    assert w.log == [("set", 1, 5000), ("dropped", 1), ("set", 2, 1500), ("set", 3, 3500)]


def test_synchronisation():
    async def main(w):
        queue, event, lock, semaphore = asyncio.Queue(1), asyncio.Event(), asyncio.Lock(), asyncio.Semaphore(2)
        condition, barrier, seen = asyncio.Condition(), asyncio.Barrier(2), []

        async def producer():
            for i in range(3):
                await queue.put(i)
            event.set()
            await barrier.wait()

        async def consumer():
            seen.extend([await queue.get() for _ in range(3)])
            await event.wait()
            async with lock, semaphore, condition:
                condition.notify_all()
            await barrier.wait()

        async def waiter():
            async with condition:
                await condition.wait()
            seen.append("notified")

        await asyncio.gather(waiter(), producer(), consumer())
        return seen

    assert World(main).result() == [0, 1, 2, "notified"]


def test_sleep_zero_takes_turns_without_a_timer():
    async def main(w):
        async def count(name):
            for i in range(2):
                w.trace.append(f"{name}{i}")
                await asyncio.sleep(0)

        await asyncio.gather(count("a"), count("b"))

    w = World(main)
    assert w.trace == ["a0", "b0", "a1", "b1"]
    assert w.log == []


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with Python 3.12")
def test_eager_tasks():
    async def main(w):
        w.loop.set_task_factory(asyncio.eager_task_factory)

        async def child():
            w.trace.append("child")
            return 1

        task = asyncio.create_task(child())
        assert task.done()
        w.trace.append("parent")
        parked = asyncio.create_task(w.step("a"))
        return await task, await parked

    w = World(main)
    assert w.trace == ["child", "parent", "a asked"]
    w.complete("a", 2)
    assert w.result() == (1, 2)


def test_a_task_is_named_by_its_ordinal_and_runs_in_the_context_given():
    var = ContextVar("var", default=0)

    async def main(w):
        async def get():
            return asyncio.current_task().get_name(), var.get()

        var.set(1)
        return await asyncio.create_task(get())

    assert World(main).result() == World(main).result() == ("Task-2", 1)


def test_all_tasks_are_those_of_the_run():
    other = World(lambda w: w.step("x"))

    async def main(w):
        children = [asyncio.create_task(w.step(str(i))) for i in range(9)]
        await asyncio.sleep(0)
        return [t.get_name() for t in asyncio.all_tasks() - {asyncio.current_task()}], [t.get_name() for t in children]

    w = World(main)
    got, expected = w.result()
    assert got == expected
    other.loop.close()
    w.loop.close()


def test_an_abandoned_async_generator_is_closed_at_once():
    async def main(w):
        async def numbers():
            try:
                yield 1
                yield 2
            finally:
                await asyncio.sleep(0)
                w.trace.append("closed")

        async for _ in numbers():
            break
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        w.trace.append("end")

    assert World(main).trace == ["closed", "end"]


# -- time --------------------------------------------------------------------------------------------------------------


@given(now=st.integers(0, 4_000_000_000_000), delay_us=st.integers(0, 10**13))
def test_an_instant_is_exact_to_the_millisecond(now, delay_us):
    w = World()
    w.loop.now_ms = now
    w.loop.call_at(w.loop.time() + delay_us / 1e6, print)
    w.loop.call_later(delay_us / 1e6, print)
    expected = now - (-delay_us // 1000)
    assert w.due == {1: expected, 2: expected}


def test_a_timer_runs_only_when_fired_and_is_dropped_once():
    w = World()
    kept = w.loop.call_later(1, w.trace.append, "kept")
    dropped = w.loop.call_later(2, w.trace.append, "dropped")
    late = w.loop.call_later(3, w.trace.append, "late")
    dropped.cancel()
    dropped.cancel()
    w.loop.now_ms += 10_000
    w.loop.run_ready()
    assert w.trace == []
    w.fire(1)
    kept.cancel()
    w.loop.fire(3)
    late.cancel()
    w.loop.run_ready()
    assert w.trace == ["kept"]
    assert w.log[3:] == [("dropped", 2)]
    with pytest.raises(KeyError):
        w.loop.fire(2)


@pytest.mark.parametrize("delay", [float("inf"), 1e300])
def test_a_sleep_may_be_endless(delay):
    w = World(lambda _: asyncio.sleep(delay))
    assert w.due[1] > NOW + 10**14
    w.loop.close()


# -- refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("run_in_executor", lambda loop: loop.run_in_executor(None, print)),
        ("create_connection", lambda loop: loop.create_connection(print, "localhost", 1)),
        ("add_reader", lambda loop: loop.add_reader(0, print)),
        ("subprocess_exec", lambda loop: loop.subprocess_exec(print, "ls")),
        ("add_signal_handler", lambda loop: loop.add_signal_handler(1, print)),
        ("getaddrinfo", lambda loop: loop.getaddrinfo("localhost", 1)),
        ("run_until_complete", lambda loop: loop.run_until_complete(None)),
        ("set_task_factory", lambda loop: loop.set_task_factory(print)),
    ],
)
def test_what_reaches_outside_is_refused_by_name(name, call):
    with pytest.raises(DeterminismError, match=rf"loop\.{name}\(\).*do this in a step"):
        call(World().loop)


def test_other_threads_cannot_call_in():
    w, caught = World(), []

    def call():
        try:
            w.loop.call_soon_threadsafe(print)
        except DeterminismError as error:
            caught.append(str(error))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert "call_soon_threadsafe() from another thread" in caught[0]


def test_to_thread_is_refused():
    with pytest.raises(DeterminismError, match="run_in_executor"):
        World(lambda _: asyncio.to_thread(print)).result()


def test_a_loop_does_not_run_within_another():
    async def main(w):
        World().loop.run_ready()

    with pytest.raises(RuntimeError, match="running in this thread already"):
        World(main).result()


def test_sys_exit_ends_the_workflow_only():
    async def main(w):
        sys.exit(3)

    w = World(main)
    assert isinstance(w.task.exception(), SystemExit)
    assert asyncio._get_running_loop() is None


def test_an_interrupt_comes_out_and_leaves_nothing_running():
    async def main(w):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        World(main)
    assert asyncio._get_running_loop() is None
    assert gc.isenabled()


def test_what_nobody_handles_is_collected():
    async def main(w):
        asyncio.get_running_loop().call_soon(int, "x")
        task = asyncio.create_task(asyncio.sleep(-1, int("1")))
        await task

        async def fail():
            raise ValueError("never retrieved")

        await asyncio.wait([asyncio.create_task(fail())])

    w = World(main)
    gc.collect()
    assert sorted(type(c["exception"]).__name__ for c in w.loop.unhandled) == ["ValueError", "ValueError"]


# -- close -------------------------------------------------------------------------------------------------------------


async def _parked_everywhere(w):
    async def numbers():
        try:
            yield 1
        finally:
            w.trace.append("generator")
            await w.step("in a generator's finally")

    async def child():
        try:
            await w.step("child")
        finally:
            w.trace.append("child")
            time.time()

    held = numbers()
    await anext(held)
    never_awaited = w.step("never")
    try:
        async with asyncio.timeout(5), asyncio.TaskGroup() as group:
            group.create_task(child())
            await w.step("main")
    finally:
        w.trace.append("main")
        await asyncio.sleep(5)
        w.trace.append("behind an await")
    del held, never_awaited


def test_close_unwinds_everything_in_silence(capfd):
    w = World(_parked_everywhere)
    w.trace.clear()
    log = list(w.log)
    w.loop.close()
    w.loop.close()
    assert sorted(w.trace) == ["child", "generator", "main"]
    assert w.log == log
    assert w.loop.unhandled == []
    del w
    gc.collect()
    assert capfd.readouterr() == ("", "")


def test_everything_is_freed_after_close():
    w = World(_parked_everywhere)
    w.loop.unhandled.append({})
    loop, task = weakref.ref(w.loop), weakref.ref(w.task)
    w.loop.close()
    del w
    gc.collect()
    assert loop() is None
    assert task() is None


@pytest.mark.parametrize("where", ["sleep", "step", "task", "sleep zero"])
def test_close_ends_code_that_swallows_everything(where, capfd):
    async def main(w):
        while True:
            try:
                if where == "sleep":
                    await asyncio.sleep(1)
                elif where == "step":
                    await w.step("a")
                elif where == "task":
                    await asyncio.create_task(w.step("b"))
                else:
                    await w.step("c")
            except BaseException:
                if where == "sleep zero":
                    await asyncio.sleep(0)

    w = World(main)
    coro = weakref.ref(w.task.get_coro())
    w.loop.close()
    assert coro() is None or inspect.getcoroutinestate(coro()) == inspect.CORO_CLOSED
    del w
    gc.collect()
    assert capfd.readouterr() == ("", "")


def test_every_call_in_a_dead_context_raises():
    outcomes = {}

    async def main(w):
        loop = w.loop

        async def other():
            pass

        try:
            await w.step("a")
        finally:
            for name, call in {
                "call_soon": lambda: loop.call_soon(print),
                "call_later": lambda: loop.call_later(1, print),
                "call_at": lambda: loop.call_at(1, print),
                "create_future": loop.create_future,
                "create_task": lambda: loop.create_task(other()),
                "time": loop.time,
                "run_in_executor": lambda: loop.run_in_executor(None, print),
                "time.time": time.time,
                "random": random.random,
                "open": lambda: open("/etc/passwd"),
                "sleep": lambda: time.sleep(1),
            }.items():
                try:
                    call()
                except BaseException as error:
                    outcomes[name] = type(error)

    World(main).loop.close()
    assert len(outcomes) == 11
    assert set(outcomes.values()) == {DeadContext}


def test_context_variables_can_be_reset_while_unwinding():
    var, errors = ContextVar("var"), []

    async def main(w):
        token = var.set(1)
        try:
            await w.step("a")
        finally:
            try:
                var.reset(token)
            except ValueError as error:
                errors.append(error)

    World(main).loop.close()
    assert errors == []


def test_a_generator_collected_between_activations_has_no_effect():
    async def main(w):
        async def numbers():
            try:
                yield 1
            finally:
                w.trace.append("unwound")
                await w.step("from the collector")

        cycle = [numbers()]
        cycle.append(cycle)
        await anext(cycle[0])
        del cycle
        await w.step("a")

    w = World(main)
    gc.collect()
    w.loop.run_ready()
    assert w.trace == ["a asked"]
    w.loop.close()
    assert w.trace == ["a asked", "unwound"]


def test_a_task_that_nothing_refers_to_is_kept():
    async def main(w):
        async def orphan():
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                w.trace.append("dropped")

        asyncio.create_task(orphan())
        await asyncio.sleep(0)

    w = World(main)
    gc.collect()
    assert w.trace == []
    w.loop.close()
    assert w.trace == ["dropped"]


# -- the same in every process -----------------------------------------------------------------------------------------

_LEAVES = st.one_of(st.just(("step",)), st.tuples(st.just("sleep"), st.integers(0, 5)))
_TREES = st.recursive(
    _LEAVES,
    lambda node: st.one_of(
        st.tuples(
            st.sampled_from(["gather", "first", "as_completed", "group", "queue", "all"]),
            st.lists(node, min_size=1, max_size=5),
        ),
        st.tuples(st.sampled_from(["timeout", "wait_for"]), st.integers(0, 5), node),
    ),
    max_leaves=16,
)


async def _grow(w, node, path="r"):
    kind, *rest = node
    try:
        if kind == "step":
            await w.step(path)
        elif kind == "sleep":
            await asyncio.sleep(rest[0])
        elif kind == "timeout":
            async with asyncio.timeout(rest[0]):
                await _grow(w, rest[1], f"{path}t")
        elif kind == "wait_for":
            await asyncio.wait_for(_grow(w, rest[1], f"{path}w"), rest[0])
        else:
            await _branch(w, kind, [_grow(w, child, f"{path}{i}") for i, child in enumerate(rest[0])])
    except TimeoutError:
        w.trace.append(f"{path} timed out")
    except asyncio.CancelledError:
        w.trace.append(f"{path} cancelled")
        raise
    w.trace.append(f"{path} over {random.random():.3f} {asyncio.current_task().get_name()}")
    return path


async def _branch(w, kind, children):
    if kind == "gather":
        await asyncio.gather(*children)
    elif kind == "as_completed":
        w.trace += [await one for one in asyncio.as_completed(children)]
    elif kind == "group":
        async with asyncio.TaskGroup() as group:
            for child in children:
                group.create_task(child)
    elif kind == "queue":
        queue = asyncio.Queue(maxsize=1)

        async def put(child):
            await queue.put(await child)

        putting = [asyncio.create_task(put(child)) for child in children]
        for _ in putting:
            w.trace.append(await queue.get())
    elif kind == "all":
        together = {asyncio.gather(child) for child in children}
        done, _ = await asyncio.wait(together)
        w.trace.extend(str(gathered.result()) for gathered in done)
    else:
        done, pending = await asyncio.wait(
            [asyncio.create_task(child) for child in children], return_when=asyncio.FIRST_COMPLETED
        )
        for task in pending:
            task.cancel()
        w.trace.extend(task.result() for task in done)


def _trace(tree, choices):
    w = World(lambda w: _grow(w, tree))
    for choice in choices:
        open_ = [*w.futures, *w.due]
        if not open_:
            break
        chosen = open_[choice % len(open_)]
        (w.fire if chosen in w.due else w.complete)(chosen)
    w.loop.close()
    return [*w.trace, *map(str, w.log)]


@settings(max_examples=150, deadline=None)
@given(tree=_TREES, choices=st.lists(st.integers(0, 20), max_size=25))
def test_the_same_completions_in_the_same_order_give_the_same_trace(tree, choices):
    first = _trace(tree, choices)
    ballast = [object() for _ in range(len(first) % 7 * 101)]  # other addresses
    assert _trace(tree, choices) == first
    del ballast


_SCRIPT = """
import random, sys, hashlib
sys.path.insert(0, {here!r})
ballast = [bytes(i) for i in range(int(sys.argv[1]))]
from durably_processor.engine import guards
guards.install()
import test_loop as t
source = random.Random(5)
def tree(depth):
    kind = source.choice(["gather", "first", "as_completed", "group", "queue", "all", "timeout", "wait_for", "step"])
    if depth == 0 or kind == "step":
        return ("step",) if source.random() < 0.7 else ("sleep", source.randrange(5))
    if kind in ("timeout", "wait_for"):
        return (kind, source.randrange(5), tree(depth - 1))
    return (kind, [tree(depth - 1) for _ in range(source.randrange(1, 9))])
for _ in range(30):
    for line in t._trace(tree(3), [source.randrange(50) for _ in range(80)]):
        print(line)
print([*{{"a", "b", "c", "order", "x-1"}}])
"""


def test_two_processes_give_the_same_trace():
    # Different amounts of memory in use, so that nothing has the same address.
    script = _SCRIPT.format(here=str(Path(__file__).parent))
    traces = [
        subprocess.run(
            [sys.executable, "-c", script, str(ballast)],
            env={**os.environ, "PYTHONHASHSEED": "0"},
            capture_output=True,
            check=True,
            timeout=60,
        ).stdout
        for ballast in (0, 7000)
    ]
    assert traces[0] == traces[1]
    assert len(traces[0].splitlines()) > 500
