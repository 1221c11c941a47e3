"""Very many runs that wait, and very long ones: what they cost in memory does not grow with them."""

from __future__ import annotations

from collections.abc import Sized

import pytest
from durably_processor.partition import WAITER_MS, Partition
from durably_schemas import events as ev
from durably_schemas import records as rec
from durably_schemas.records import Event
from partition_lab import CATALOGUE, CODEC, Lab, requests

IN_MEMORY = 30


@pytest.fixture
def small(tmp_path, guarded):
    """A partition that keeps few runs in memory."""
    lab = Lab(tmp_path, max_runs=IN_MEMORY)
    yield lab
    lab.partition.drop()
    lab.store.close()


def held(partition: Partition) -> int:
    """How many entries a partition holds in memory, in all its collections together."""
    mine = [partition, partition._tokens, partition._upkeep]
    return sum(len(value) for owner in mine for value in vars(owner).values() if isinstance(value, Sized))


def park(lab: Lab, first: int, count: int) -> None:
    """Starts runs that sleep for an hour, and runs that wait for a hook."""
    for n in range(first, first + count):
        if n % 2:
            part = lab.settle(lab.start("napping", n, f"r{n}"))
            lab.settle(*map(lab.answer, requests(part, early=True)))
        else:
            lab.settle(lab.start("hooked", 0, f"r{n}"))
    lab.settle()


def wait_for(lab: Lab, run_id: str) -> None:
    reply_to = rec.ReplyTo(partition=0, request_id=f"q-{run_id}")
    lab.settle(lab.put(CATALOGUE.commands, rec.QueryRun(run_id=run_id, what="RESULT", reply_to=reply_to)))


def test_memory_does_not_grow_with_runs_that_are_parked(small, monkeypatch):
    # Their timers are due beyond the window that is held in memory.
    monkeypatch.setattr("durably_processor.partition.WINDOW_MS", 1_000)
    small.take_over(dict.fromkeys(small.logs, 0))
    park(small, 0, 100)
    after_100 = held(small.partition)
    park(small, 100, 300)
    assert len(small.store.lives(None, 1_000)) == 400
    assert held(small.partition) <= after_100 + 1
    assert len(small.partition._runs) <= IN_MEMORY


def test_whoever_no_longer_waits_is_forgotten_whatever_becomes_of_the_run(small):
    park(small, 0, 100)
    before = held(small.partition)
    for n in range(0, 100, 2):
        wait_for(small, f"r{n}")
    assert held(small.partition) == before + 50
    small.now += WAITER_MS + 1
    wait_for(small, "r0")
    assert len(small.partition._waiting) == 1


def test_many_timers_of_one_instant_fire_once_each_and_let_others_through(small, monkeypatch):
    monkeypatch.setattr("durably_processor.partition.TIMERS_A_TURN", 20)
    for n in range(200):
        part = small.settle(small.start("napping", n, f"r{n}"))
        small.settle(*map(small.answer, requests(part, early=True)))
    small.now += 60_000
    turns = 0
    fired: list[str] = []
    others = 0
    while len(fired) < 200:
        turns += 1
        part = small.settle(small.start("chain", 0, f"other-{turns}"))
        found = [CODEC.decode_as(Event, value) for _, value in part.events]
        fired += [e.run_id for e in found if isinstance(e.data, ev.WaitCompleted)]
        others += sum(isinstance(e.data, ev.RunCompleted) for e in found)
    assert len(set(fired)) == 200
    assert (turns, others) == (10, 10), "what arrives in between is handled in each turn"


def test_a_log_costs_the_same_at_its_end_as_at_its_beginning(small, monkeypatch):
    """Counted in events that are read again, not in seconds: none, however long the log is."""
    read = 0
    events = type(small.store).events

    def counted(self, run_id, from_seq=1):
        nonlocal read
        for value in events(self, run_id, from_seq):
            read += 1
            yield value

    monkeypatch.setattr(type(small.store), "events", counted)
    part = small.settle(small.start("chain", 400))
    while todo := requests(part, early=True):
        part = small.settle(*map(small.answer, todo))
    assert small.store.state("r1").header.seq == 3 + 3 * 400
    assert read == 0
    sizes = [len(value) for _, value in small.events if CODEC.decode_as(Event, value).type == "step_completed"]
    assert max(sizes) <= min(sizes) + 10, "but for longer numbers"


def test_a_long_run_goes_on_after_a_restart(small):
    part = small.settle(small.start("chain", 150))
    for _ in range(149):
        part = small.settle(*map(small.answer, requests(part, early=True)))
    (last,) = requests(part, early=True)
    small.partition.drop()
    small.take_over({topic: len(log) for topic, log in small.logs.items()})
    small.settle(small.answer(last))
    assert small.store.state("r1").header.status == "completed"
    assert small.store.state("r1").header.seq == 3 + 3 * 150
