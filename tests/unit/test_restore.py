"""Recovery: whatever the log holds, and however it is cut into pieces, the store becomes what it was."""

from __future__ import annotations

import logging
import random
from pathlib import Path

import msgspec
import pytest
from durably.broker import connect
from durably.broker.port import Broker
from durably.payloads import dump
from durably_processor import rebuild, restore
from durably_processor.restore import Restore
from durably_processor.state.store import CHECKPOINT, Store, event_key
from durably_schemas import events as ev
from durably_schemas import records as rec
from partition_lab import CATALOGUE, CODEC, T0, Lab, content, finish, publish, rebuilt, requests

pytestmark = pytest.mark.usefixtures("guarded")

DERIVED = b"erotbckm"


def on_topic(lab: Lab, folder: Path) -> Broker:
    """A broker that has the lab's events."""
    broker = connect(f"embedded:{folder}/broker")
    broker.create(CATALOGUE.topics())
    publish(lab, broker)
    return broker


def wander(lab: Lab, seed: int, inputs: int) -> None:
    """Random inputs: runs of all kinds start, their steps succeed, fail and write, hooks are resumed, time passes."""
    chance = random.Random(seed)
    todo: list[rec.StepRequest] = []
    started = 0
    for _ in range(inputs):
        lab.now += chance.choice([1, 50, 3_000, 70_000])
        kind = chance.random()
        messages = []
        if kind < 0.2:
            started += 1
            name = chance.choice(["chain", "napping", "fanning", "hooked"])
            messages.append(lab.start(name, chance.choice([0, 1, 3, 30]), f"run-{started}"))
        elif kind < 0.8 and todo:
            for request in [
                todo.pop(chance.randrange(len(todo))) for _ in range(min(len(todo), chance.choice([1, 9])))
            ]:
                message = lab.answer(request, error=ValueError("no") if chance.random() < 0.1 else None)
                if chance.random() < 0.2:
                    result = CODEC.decode_as(rec.StepResult, message.value)
                    wrote = rec.StreamWritten(namespace=f"s{chance.randrange(3)}", writer="w", partition=0, first_offset=0, chunks=1)  # fmt: skip
                    lab.logs[CATALOGUE.results].pop()
                    message = lab.put(CATALOGUE.results, msgspec.structs.replace(result, streams=(wrote,)))
                messages.append(message)
        elif kind < 0.9:
            resume = rec.ResumeHook(token="order-7", resume_id=f"x{chance.randrange(50)}", payload=dump(1, ""), requested_at=0)  # fmt: skip
            messages.append(lab.put(CATALOGUE.commands, resume))
        elif started:
            run_id = f"run-{chance.randrange(started) + 1}"
            messages.append(lab.put(CATALOGUE.commands, rec.CancelRun(run_id=run_id, requested_at=0)))
        part = lab.settle(*messages)
        while part.outputs or part.early:
            todo += requests(part, early=True) + requests(part, early=False)
            part = lab.settle(*lab.signals(part))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("at_once", [1, 7, 60, 100_000])
def test_a_rebuilt_store_holds_what_the_live_one_does_however_the_log_is_cut(lab, tmp_path, monkeypatch, seed, at_once):
    monkeypatch.setattr(restore, "AT_ONCE", at_once)
    monkeypatch.setattr(restore, "POLLED", max(1, at_once // 2))
    monkeypatch.setattr(restore, "UNLOGGED", 100)
    monkeypatch.setattr(rebuild, "A_PIECE", 50)
    wander(lab, seed, 150)
    with rebuilt(lab, tmp_path) as (store, again):
        assert content(store, DERIVED) == content(lab.store, DERIVED)
        for run_id in {key.decode() for key, _ in lab.events} - {"order-7"}:
            assert store.state(run_id).header == lab.store.state(run_id).header
            assert store.state(run_id).items == lab.store.state(run_id).items
            for first in range(1, 9):
                assert list(store.events(run_id, first)) == list(lab.store.events(run_id, first))
                assert store.event(run_id, first) == lab.store.event(run_id, first)
        assert again.step(0.1), "nothing is left to read"
        assert again.count == 0


def test_most_of_a_log_is_never_decoded(lab, tmp_path, monkeypatch):
    for n in range(20):
        part = lab.settle(lab.start("chain", 30, f"r{n}"))
        while todo := requests(part, early=True):
            part = lab.settle(*map(lab.answer, todo))
    decoded = []
    one = rebuild.Stretch._decoded
    monkeypatch.setattr(rebuild.Stretch, "_decoded", lambda self, value: decoded.append(value) or one(self, value))
    with rebuilt(lab, tmp_path) as (store, _):
        assert len(lab.events) == 20 * 93
        assert not decoded, "runs that have ended are stored whole"
        assert store.state("r3").header == lab.store.state("r3").header


def test_a_recovery_that_is_interrupted_goes_on_from_any_point(lab, tmp_path, monkeypatch):
    monkeypatch.setattr(restore, "AT_ONCE", 40)
    monkeypatch.setattr(restore, "POLLED", 10)
    monkeypatch.setattr(rebuild, "A_PIECE", 5)
    wander(lab, 3, 120)
    broker = on_topic(lab, tmp_path)
    store = Store(tmp_path / "again")
    rounds = 0
    while True:
        recovery = Restore(0, store, broker, CATALOGUE, CODEC)
        writes, allowed = 0, 1 + rounds % 20  # fewer than a piece of the log needs, and more
        write = store.write

        def stops(changes, *, logged=True, write=write, allowed=allowed):
            nonlocal writes
            writes += 1
            if writes > allowed:
                raise InterruptedError
            write(changes, logged=logged)

        monkeypatch.setattr(store, "write", stops)
        try:
            assert recovery.step(10)
            break
        except InterruptedError:
            rounds += 1
        finally:
            recovery.close()
            monkeypatch.setattr(store, "write", write)
    assert rounds > 10
    assert content(store, DERIVED) == content(lab.store, DERIVED)
    store.close()
    broker.close()


def test_a_warm_start_reads_the_tail_alone(lab, tmp_path):
    wander(lab, 5, 60)
    before = len(lab.events)
    broker = on_topic(lab, tmp_path)
    store = Store(tmp_path / "warm")
    finish(Restore(0, store, broker, CATALOGUE, CODEC))
    store.close()
    lab.settle(lab.start("chain", 1, "later"))
    publish(lab, broker, since=before)
    store = Store(tmp_path / "warm")
    warm = Restore(0, store, broker, CATALOGUE, CODEC)
    finish(warm)
    assert warm.count == len(lab.events) - before == 3
    assert content(store, DERIVED) == content(lab.store, DERIVED)
    store.close()
    broker.close()


def test_an_event_that_is_missing_is_told_and_not_passed_over(lab, tmp_path):
    lab.settle(lab.start("chain", 2, "r1"))
    broker = on_topic(lab, tmp_path)
    lab.events.append((b"r1", CODEC.encode(ev.event("r1", 9, T0, ev.StepCancelled(), "step_1"))))
    publish(lab, broker, since=len(lab.events) - 1)
    store = Store(tmp_path / "gap")
    recovery = Restore(0, store, broker, CATALOGUE, CODEC)
    with pytest.raises(LookupError, match="run r1: seq 3 is followed by 9"):
        finish(recovery)
    recovery.close()
    store.close()
    broker.close()


def test_a_token_with_the_name_of_a_run_is_told_from_it(lab, tmp_path):
    lab.settle(lab.start("chain", 1, "order-7"))
    part = lab.settle(lab.start("hooked", 1, "holder"))
    lab.settle(*lab.signals(part))
    with rebuilt(lab, tmp_path) as (store, _):
        assert content(store, DERIVED) == content(lab.store, DERIVED)
        assert store.token("order-7").holder is not None
        assert store.state("order-7") is not None


def test_recovery_tells_how_far_it_is(lab, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(restore, "TOLD_EVERY", 0)
    monkeypatch.setattr(restore, "AT_ONCE", 20)
    monkeypatch.setattr(restore, "POLLED", 20)
    wander(lab, 2, 60)
    caplog.set_level(logging.INFO, "durably.processor")
    with rebuilt(lab, tmp_path):
        total = f"{len(lab.events):,}"
    told = [r.getMessage() for r in caplog.records if "restoring" in r.getMessage()]
    assert told[0].startswith(f"partition 0: restoring 20 of {total} events")
    assert told[0].endswith("s left")
    assert f"{total} events restored" in caplog.records[-1].getMessage()


def test_an_unlogged_recovery_is_on_disk_before_it_ends(lab, tmp_path, monkeypatch):
    monkeypatch.setattr(restore, "UNLOGGED", 1)
    wander(lab, 1, 40)
    broker = on_topic(lab, tmp_path)
    store = Store(tmp_path / "flushed")
    steps = []
    for name in ("write", "flush"):
        method = getattr(store, name)

        def noted(*args, name=name, method=method, **options):
            steps.append((name, options.get("logged")))
            return method(*args, **options)

        monkeypatch.setattr(store, name, noted)
    finish(Restore(0, store, broker, CATALOGUE, CODEC))
    assert steps[-1] == ("flush", None)
    assert set(steps[:-1]) == {("write", False)}
    store.close()
    broker.close()


def test_a_page_of_a_log_begins_anywhere_in_a_group(tmp_path):
    store = Store(tmp_path / "groups")
    values = [CODEC.encode(ev.event("r", n, 1, ev.StepCancelled(), f"step_{n}")) for n in range(1, 11)]
    store.write(
        {
            event_key("r", 4): rebuild.several(values[:4]),
            event_key("r", 5): values[4],
            event_key("r", 10): rebuild.several(values[5:]),
            CHECKPOINT: b"",
        }
    )
    for first in range(1, 13):
        assert list(store.events("r", first)) == values[first - 1 :]
    assert store.event("r", 11) is None
    store.close()
