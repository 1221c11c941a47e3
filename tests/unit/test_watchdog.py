"""The watchdog: interrupts endless code, and nothing else."""

# ruff: noqa: ASYNC110, PT012, SIM117 - what is watched stands in a block of its own

from __future__ import annotations

import asyncio
import contextlib
import gc
import subprocess
import sys
import textwrap
import time

import pytest
from durably_processor.engine.loop import DeterministicLoop
from durably_processor.engine.watchdog import ActivationTimeout, Watchdog


@pytest.fixture
def watchdog():
    dog = Watchdog(limit=0.05)
    yield dog
    dog.close()


def spin(seconds=10.0):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass


class Host:
    def timer_set(self, timer, due_ms):
        pass

    def timer_dropped(self, timer):
        pass


def test_an_endless_loop_is_interrupted_and_its_place_named(watchdog):
    started = time.monotonic()
    with pytest.raises(ActivationTimeout, match=r"run-7: .* at .*test_watchdog\.py:\d+ in spin"):
        with watchdog.watch("run-7"):
            spin()
    assert time.monotonic() - started < 1


def test_what_ends_in_time_is_left_alone():
    dog = Watchdog(limit=0.4)
    for _ in range(50):
        with dog.watch("quick"):
            time.sleep(0.01)
    dog.close()


def test_time_that_the_process_was_stopped_does_not_count():
    dog = Watchdog(limit=60)
    watch = dog.watch("stopped")
    with watch:
        assert 59 < watch.check(late=0) <= 60
        assert 3659 < watch.check(late=3600) <= 3660
    dog.close()


def test_code_that_swallows_the_interrupt_is_interrupted_again(watchdog):
    caught = 0
    with pytest.raises(ActivationTimeout):
        with watchdog.watch("stubborn"):
            while caught < 2:
                try:
                    spin()
                except BaseException:
                    caught += 1
    assert caught == 2


def test_an_overrun_counts_even_where_the_interrupt_was_swallowed(watchdog):
    with pytest.raises(ActivationTimeout):
        with watchdog.watch("sly"):
            with contextlib.suppress(BaseException):
                spin()


def test_an_error_of_the_block_is_the_cause(watchdog):
    with pytest.raises(ActivationTimeout) as caught:
        with watchdog.watch("x"):
            try:
                spin()
            except BaseException:
                raise KeyError("mine") from None
    assert isinstance(caught.value.__cause__, KeyError)


def test_no_interrupt_comes_when_the_block_is_over():
    # Blocks that end just when they are due, over and over, with threads that switch as often as they can.
    switching = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    dog = Watchdog(limit=0.003)
    interrupted = 0
    for i in range(300):
        try:
            with dog.watch("race"):
                spin(0.0028 + i % 100 * 0.00001)
        except ActivationTimeout:
            interrupted += 1
        for _ in range(200):
            pass
    dog.close()
    sys.setswitchinterval(switching)
    assert interrupted > 0


def test_a_workflow_that_never_awaits_is_interrupted(watchdog):
    async def main():
        while True:
            await asyncio.sleep(0)

    loop = DeterministicLoop("run", Host())
    loop.create_task(main())
    with pytest.raises(ActivationTimeout, match="run:"):
        with watchdog.watch("run"):
            loop.run_ready()
    assert asyncio._get_running_loop() is None
    assert gc.isenabled()
    loop.close()


def test_a_workflow_that_never_yields_ends_with_the_interrupt(watchdog):
    async def main():
        while True:
            pass

    loop = DeterministicLoop("run", Host())
    task = loop.create_task(main())
    with pytest.raises(ActivationTimeout):
        with watchdog.watch("run"):
            loop.run_ready()
    assert isinstance(task.exception(), ActivationTimeout)


def test_a_closed_watchdog_is_gone():
    dog = Watchdog()
    dog.close()
    assert not dog._thread.is_alive()


def test_a_process_that_was_interrupted_can_be_traced():
    """In another process: one that looks for an interrupt for ever does not even answer a signal."""
    script = """
        import sys
        from durably_processor.engine.watchdog import ActivationTimeout, Watchdog

        def spin():
            while True:
                pass

        dog = Watchdog(0.01)
        try:
            with dog.watch("run"):
                spin()
        except ActivationTimeout:
            pass
        dog.close()
        called = []
        sys.settrace(lambda *_: None)
        (lambda: called.append(True))()
        assert called
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=30)
