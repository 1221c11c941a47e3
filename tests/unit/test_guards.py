"""The guards: seeded or refused in workflow code, untouched everywhere else."""

# ruff: noqa: ICN001, PLW0108, PTH107, PTH123, PTH208, SIM115, T100 - users write it in all these ways; lambdas look names up when called

from __future__ import annotations

import asyncio
import datetime
import importlib
import linecache
import logging
import os
import queue
import random
import secrets
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import traceback
import uuid
from datetime import date
from datetime import datetime as dt
from random import choice, gauss
from random import random as draw
from time import time as clock
from zoneinfo import ZoneInfo

import msgspec
import pytest
from durably.errors import DeterminismError
from durably_processor.engine import guards
from durably_processor.engine.loop import DeterministicLoop

NOW = 1_700_000_000_123
INSTANT = dt(2023, 11, 14, 22, 13, 20, 123_000, tzinfo=datetime.UTC)


@pytest.fixture(autouse=True)
def _guarded():
    guards.install()
    yield
    guards.uninstall()


class Host:
    def timer_set(self, timer, due_ms):
        pass

    def timer_dropped(self, timer):
        pass


def inside(fn, seed="run-1", now=NOW):
    """What fn returns in workflow code."""

    async def main():
        return fn()

    loop = DeterministicLoop(seed, Host())
    loop.now_ms = now
    task = loop.create_task(main())
    loop.run_ready()
    return task.result()


# -- time --------------------------------------------------------------------------------------------------------------


class Stamp(dt):
    """A subclass, as users have."""


@pytest.mark.parametrize(
    ("ask", "expected"),
    [
        (lambda: time.time(), 1_700_000_000.123),
        (lambda: clock(), 1_700_000_000.123),
        (lambda: time.time_ns(), 1_700_000_000_123_000_000),
        (lambda: time.monotonic(), 1_700_000_000.123),
        (lambda: time.perf_counter_ns(), 1_700_000_000_123_000_000),
        (lambda: time.gmtime()[:6], (2023, 11, 14, 22, 13, 20)),
        (lambda: time.gmtime(0)[:3], (1970, 1, 1)),
        (lambda: time.localtime(), time.localtime(NOW / 1000)),
        (lambda: time.ctime(), time.ctime(NOW / 1000)),
        (lambda: time.asctime(), time.ctime(NOW / 1000)),
        (lambda: time.strftime("%Y %s"), time.strftime("%Y %s", time.localtime(NOW / 1000))),
        (lambda: dt.now(datetime.UTC), INSTANT),
        (lambda: dt.now(tz=datetime.UTC), INSTANT),
        (lambda: dt.now(), dt.fromtimestamp(NOW / 1000)),
        (lambda: datetime.datetime.utcnow(), INSTANT.replace(tzinfo=None)),
        (lambda: dt.today(), dt.fromtimestamp(NOW / 1000)),
        (lambda: date.today(), date.fromtimestamp(NOW / 1000)),
        (lambda: type(Stamp.now()), Stamp),
        (lambda: dt.now(ZoneInfo("Asia/Tokyo")).hour, 7),
    ],
)
def test_time_is_that_of_the_event(ask, expected):
    assert inside(ask) == expected


def test_time_is_real_elsewhere():
    assert abs(time.time() - dt.now().timestamp()) < 1
    assert time.time() > NOW / 1000 + 1
    assert dt.now(datetime.UTC).tzinfo is datetime.UTC
    before = time.monotonic()
    assert time.monotonic() >= before
    assert type(Stamp.now()) is Stamp


def test_the_datetime_types_stay_what_they_are():
    class Order(msgspec.Struct):
        at: dt

    assert inside(lambda: isinstance(dt.now(), datetime.datetime))
    assert inside(lambda: type(dt.now()) is datetime.datetime)
    order = Order(inside(lambda: dt.now(datetime.UTC)))
    assert msgspec.json.decode(msgspec.json.encode(order), type=Order) == order


def test_clocks_differ_between_runs_of_different_times():
    assert inside(lambda: time.time(), now=5_000) == 5.0


# -- randomness --------------------------------------------------------------------------------------------------------

_DRAWS = [
    lambda: random.random(),
    lambda: draw(),
    lambda: random.randint(0, 10**9),
    lambda: choice(range(10**9)),
    lambda: [gauss(0, 1) for _ in range(3)],
    lambda: random.sample(range(100), 10),
    lambda: random.getrandbits(70),
    lambda: random.randbytes(9),
    lambda: random.Random().random(),
    lambda: random.SystemRandom().random(),
    lambda: random.SystemRandom().choice(range(10**9)),
    lambda: secrets.token_hex(8),
    lambda: secrets.randbelow(10**9),
    lambda: os.urandom(12),
    lambda: uuid.uuid4(),
    lambda: uuid.uuid1(),
]


@pytest.mark.parametrize("ask", _DRAWS)
def test_randomness_is_the_runs_own(ask):
    first = inside(ask)
    random.seed(99)
    ask()
    assert inside(ask) == first
    assert inside(ask, seed="run-2") != first
    assert ask() != first


def test_draws_of_a_run_leave_the_processes_alone():
    random.seed(7)
    expected = [random.random(), gauss(0, 1), gauss(0, 1), random.random()]
    random.seed(7)
    got = [random.random()]
    inside(lambda: (random.seed(1), gauss(0, 1), random.random()))
    got.append(gauss(0, 1))
    inside(lambda: gauss(0, 1))
    got += [gauss(0, 1), random.random()]
    assert got == expected


def test_a_seed_set_in_workflow_code_counts():
    assert inside(lambda: (random.seed(1), random.random())[1]) == random.Random(1).random()


def test_uuids_are_well_formed():
    four, one = inside(lambda: (uuid.uuid4(), uuid.uuid1()))
    assert four.version == 4
    assert one.version == 1
    assert one.variant == uuid.RFC_4122
    assert (one.time - 0x01B21DD213814000) // 10_000 == NOW


# -- the outside -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: open("/etc/passwd"), r"open\('/etc/passwd'\)"),
        (lambda: os.listdir("/"), r"os\.listdir\('/'\)"),
        (lambda: os.remove("/nowhere"), r"os\.remove\('/nowhere'"),
        (lambda: os.system("true"), r"os\.system"),
        (lambda: socket.socket(), r"socket\.socket\(\)"),
        (lambda: socket.create_connection(("127.0.0.1", 9)), r"socket\.getaddrinfo\('127\.0\.0\.1'"),
        (lambda: subprocess.run(["true"], check=True), r"subprocess\.Popen\('true'"),
        (lambda: threading.Thread(target=print).start(), r"threading\.Thread\.start"),
        (lambda: time.sleep(0.01), r"time\.sleep"),
        (lambda: queue.Queue().get(), r"threading\.Condition"),
        (lambda: threading.Event().wait(), r"threading\.Condition"),
        (lambda: sqlite3.connect(":memory:"), r"sqlite3\.connect"),
        (lambda: input("?"), r"input\(\)"),
        (lambda: breakpoint(), r"breakpoint\(\)"),
        (lambda: importlib.import_module("ctypes").CDLL("libc.so.6"), r"ctypes\.CDLL"),
        (lambda: importlib.import_module("urllib.request").urlopen("http://127.0.0.1:9"), r"urllib\.Request\('http"),
        (lambda: importlib.import_module("shutil").copy("/etc/passwd", "/tmp/x"), r"open|shutil"),
    ],
)
def test_the_outside_is_refused_by_name(call, name):
    with pytest.raises(DeterminismError, match=rf"{name}.*do this in a step"):
        inside(call)


def test_the_outside_is_there_elsewhere():
    with open("/etc/passwd") as file:
        assert file.read()
    thread = threading.Thread(target=time.sleep, args=(0,))
    thread.start()
    thread.join()
    assert queue.Queue().empty()


def test_other_threads_go_on_while_workflow_code_runs():
    asked, answered, seen = threading.Lock(), threading.Lock(), []
    asked.acquire()
    answered.acquire()

    def other():
        asked.acquire()
        with open("/etc/passwd") as file:
            seen.append((time.time() > NOW / 1000 + 1, bool(file.read())))
        answered.release()

    def main():
        asked.release()
        answered.acquire(timeout=5)

    thread = threading.Thread(target=other)
    thread.start()
    inside(main)
    thread.join()
    assert seen == [(True, True)]


def test_imports_work_and_take_nothing_from_the_run(tmp_path, monkeypatch):
    module = tmp_path / "drawn_at_import.py"
    module.write_text("import random, time, os\nX = random.random()\nT = time.time()\nL = os.listdir('/')\n")
    monkeypatch.syspath_prepend(tmp_path)

    def main():
        import drawn_at_import

        return random.random(), drawn_at_import.T

    first, then = inside(main)
    second, _ = inside(main)
    assert first == second
    assert then > NOW / 1000 + 1
    del sys.modules["drawn_at_import"]


def test_an_import_error_shows_no_frame_of_ours():
    with pytest.raises(ImportError) as caught:
        import no_such_module_at_all  # noqa: F401
    assert len(traceback.extract_tb(caught.value.__traceback__)) == 1


def test_tracebacks_and_log_records_can_be_made(tmp_path, caplog):
    handler = logging.FileHandler(tmp_path / "log", delay=True)
    logger = logging.getLogger("test_guards")
    logger.addHandler(handler)

    def main():
        linecache.clearcache()
        try:
            raise ValueError("x")
        except ValueError:
            logger.exception("said")
            return traceback.format_exc()

    assert 'raise ValueError("x")' in inside(main)
    logger.removeHandler(handler)
    handler.close()
    assert 'raise ValueError("x")' in (tmp_path / "log").read_text()


# -- install -----------------------------------------------------------------------------------------------------------


def test_installing_twice_and_taking_away_leaves_python_as_it_was():
    guards.uninstall()
    before = [time.time, clock, os.urandom, random.random, dt.__dict__["now"], asyncio.as_completed, type(random._inst)]
    guards.install()
    guards.install()
    during = [time.time, clock, os.urandom, random.random, dt.__dict__["now"], asyncio.as_completed, type(random._inst)]
    assert all(a is not b for a, b in zip(before, during, strict=True))
    guards.uninstall()
    after = [time.time, clock, os.urandom, random.random, dt.__dict__["now"], asyncio.as_completed, type(random._inst)]
    assert [a is b for a, b in zip(before, after, strict=True)] == [True] * 7
    assert inside(lambda: time.time()) > NOW / 1000 + 1
