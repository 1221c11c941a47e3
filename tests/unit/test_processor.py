"""The processor's own promises, on the embedded broker."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter

import harness
import pytest
from durably import DurablyError, get_step_metadata, step, workflow
from durably.broker.port import TP
from durably.errors import Fenced
from durably.testing.broker import MemoryTransactions
from durably_processor import committer
from durably_processor.answers import Answers
from durably_processor.committer import Committer
from durably_processor.partition import Partition
from durably_processor.processor import Processor
from durably_processor.turn import Turn
from durably_schemas.records import ReplyTo
from fake_broker import FakeBroker
from partition_lab import CATALOGUE, CODEC


@step
async def nothing() -> int:
    return 1


@workflow
async def one_step() -> int:
    return await nothing()


ran: list[tuple[str, str]] = []


@step
async def counted() -> int:
    ran.append((get_step_metadata().run_id, get_step_metadata().step_id))
    return 1


@workflow
async def counted_steps() -> int:
    return await counted() + await counted() + await counted()


def test_what_was_read_and_not_handed_over_is_not_committed_on_the_way_out(tmp_path, namespace, monkeypatch):
    system = harness.System(f"embedded:{tmp_path}/b", namespace, tmp_path)
    handled = threading.Event()
    end_turn = Partition.end_turn

    def breaks(self, turn):
        if turn.parts:
            handled.set()
            raise MemoryError
        end_turn(self, turn)

    with monkeypatch.context() as broken:
        broken.setattr(Partition, "end_turn", breaks)
        dying = system.start_processor()
        run = system.client.start(one_step)
        assert handled.wait(10)
        dying._thread.join(20)
        assert isinstance(dying.error, MemoryError)
        system.processors.remove(dying)
    system.start_processor()
    system.start_worker()
    assert run.result(20) == 1
    system.close()


def test_a_commit_that_hangs_is_made_good_by_taking_over_anew(tmp_path, namespace, monkeypatch):
    from durably.broker.embedded_broker import EmbeddedTransactions

    system = harness.System(f"embedded:{tmp_path}/b", namespace, tmp_path)
    monkeypatch.setattr(committer, "OVERDUE", 0.3)
    commit, hanging, let_go = EmbeddedTransactions.commit, threading.Event(), threading.Event()

    def hangs(self, *args, **kwargs):
        if not hanging.is_set():
            hanging.set()
            let_go.wait(30)
            raise Fenced("by its successor")
        return commit(self, *args, **kwargs)

    monkeypatch.setattr(EmbeddedTransactions, "commit", hangs)
    system.start_processor()
    system.start_worker()
    runs = [system.client.start(one_step) for _ in range(10)]
    assert [run.result(30) for run in runs] == [1] * 10
    let_go.set()
    assert [e.seq for e in runs[0].events()] == list(range(1, 7))
    system.close()


@pytest.mark.parametrize("times", [1, 3])
def test_a_commit_that_fails_is_made_good_by_taking_over_anew(tmp_path, namespace, monkeypatch, times):
    from durably.broker.embedded_broker import EmbeddedTransactions
    from durably.errors import BrokerError

    system = harness.System(f"embedded:{tmp_path}/b", namespace, tmp_path)
    commit, left = EmbeddedTransactions.commit, [times]

    def fails(self, *args, **kwargs):
        if left[0] > 0:
            left[0] -= 1
            raise BrokerError("as if")
        return commit(self, *args, **kwargs)

    monkeypatch.setattr(EmbeddedTransactions, "commit", fails)
    system.start_processor()
    system.start_worker()
    runs = [system.client.start(one_step) for _ in range(10)]
    assert [run.result(30) for run in runs] == [1] * 10
    assert left == [0]
    assert [e.seq for e in runs[0].events()] == list(range(1, 7))
    system.close()


def test_a_commit_with_outdated_group_metadata_is_made_again_and_no_step_runs_twice(tmp_path, namespace, monkeypatch):
    from durably.broker.embedded_broker import EmbeddedTransactions

    system = harness.System(f"embedded:{tmp_path}/b", namespace, tmp_path)
    commit, left, asked = EmbeddedTransactions.commit, [6], []
    ran.clear()

    def refuses(self, offsets, group, timeout):
        asked.append(group)
        if left[0] and len(asked) % 2:
            left[0] -= 1
            refusal = Fenced("the group has moved on")
            refusal.stale = True
            raise refusal
        return commit(self, offsets, group, timeout)

    monkeypatch.setattr(EmbeddedTransactions, "commit", refuses)
    taken = []
    monkeypatch.setattr(Processor, "_distrust", lambda self, why: taken.append(why))
    system.start_processor()
    system.start_worker()
    runs = [system.client.start(counted_steps) for _ in range(10)]
    assert [run.result(30) for run in runs] == [3] * 10
    assert (left, taken) == ([0], [])
    assert set(Counter(ran).values()) == {1}
    assert [e.seq for e in runs[0].events()] == list(range(1, 13))
    system.close()


def test_a_commit_that_is_refused_while_a_revoke_waits_for_it_takes_the_metadata_of_the_revoke(lab, monkeypatch):
    """No poll comes before the revoke has ended: whoever waited for one would not be done in time."""
    committed: list[object] = []
    under_way, revoking = threading.Event(), threading.Event()

    def refuses(self, offsets, group, timeout):
        under_way.set()
        if group == "before the revoke":
            revoking.wait(10)
            refusal = Fenced("the group has moved on")
            refusal.stale = True
            raise refusal
        committed.append(group)

    monkeypatch.setattr(MemoryTransactions, "commit", refuses)
    broker = FakeBroker()
    broker.create(CATALOGUE.topics())
    thread = Committer(broker, CATALOGUE, CODEC, broker.producer(), broker.transactions("t"), "t")
    thread.start(0)
    turn = Turn(1, 0)
    turn.part(0, lab.store).offsets = {TP(CATALOGUE.commands, 0): 1}
    thread.add(turn, "before the revoke")
    assert under_way.wait(10)
    renew = thread.renew

    def renewed(group):
        renew(group)
        revoking.set()

    monkeypatch.setattr(thread, "renew", renewed)
    assert thread.drain(8, "in the revoke")
    assert committed == ["in the revoke"]
    thread.stop(5)


def test_a_partition_that_goes_while_its_askers_are_answered_does_not_take_the_others_with_it(lab):
    broker = FakeBroker()
    broker.create(CATALOGUE.topics())
    thread = Committer(broker, CATALOGUE, CODEC, broker.producer(), broker.transactions("t"), "t")
    thread.start(0)
    turn = Turn(1, 0)
    part = turn.part(0, lab.store)
    to = ReplyTo(partition=0, request_id="q")

    def answer():
        lab.store.close()  # as its owner does, on another thread
        return Answers(lab.store, CODEC).summary("q", "r")

    part.answers = [(to, answer), (to, lambda: Answers(lab.store, CODEC).page("q", "r", 1))]
    thread.add(turn, None)
    assert thread.drain(10, None)
    assert (thread.acked, thread.error) == (1, None)
    thread.stop(5)


def test_a_predecessor_is_resolved_once_also_where_its_successor_takes_over_again(tmp_path, namespace, monkeypatch):
    """Two that are alive, and resolved each other at every take-over, would fence each other for ever."""
    from durably.broker.embedded_broker import EmbeddedTransactions
    from durably.errors import BrokerError

    system = harness.System(f"embedded:{tmp_path}/b", namespace, tmp_path)
    first = system.start_processor("first")
    system.start_worker()
    runs = [system.client.start(one_step) for _ in range(10)]
    assert [run.result(30) for run in runs] == [1] * 10
    system.processors.remove(first)
    first.crash(committed=False)

    init, commit, resolved, left = EmbeddedTransactions.init, EmbeddedTransactions.commit, [], [3]

    def notes(self, timeout):
        resolved.append(self._id)
        return init(self, timeout)

    def fails(self, *args):
        if left[0]:
            left[0] -= 1
            raise BrokerError("as if")
        return commit(self, *args)

    monkeypatch.setattr(EmbeddedTransactions, "init", notes)
    monkeypatch.setattr(EmbeddedTransactions, "commit", fails)
    second = system.start_processor("second")
    assert system.client.start(one_step).result(30) == 1
    assert left == [0]
    assert resolved.count(first._processor._transactional_id) == 1
    assert resolved.count(second._processor._transactional_id) == 4
    system.close()


def test_what_was_only_being_restored_is_released_too_and_its_owner_not_fenced(tmp_path, namespace, monkeypatch):
    from durably.broker.embedded_broker import EmbeddedTransactions
    from durably_processor.restore import Restore

    init, step_, resolved, held = EmbeddedTransactions.init, Restore.step, [], [True]

    def notes(self, timeout):
        resolved.append(self._id)
        return init(self, timeout)

    monkeypatch.setattr(EmbeddedTransactions, "init", notes)
    monkeypatch.setattr(Restore, "step", lambda self, seconds: not held[0] and step_(self, seconds))
    system = harness.System(f"embedded:{tmp_path}/b", namespace, tmp_path)
    first = system.start_processor("first", wait=False)
    harness.until(lambda: first._processor._starts)
    second = system.start_processor("second", wait=False)
    harness.until(lambda: second._processor._starts)
    held[0] = False
    system.start_worker()
    assert [system.client.start(one_step).result(30) for _ in range(10)] == [1] * 10
    assert len(resolved) == len(set(resolved)) == 2, "each resolves itself, at its beginning"
    system.close()


def test_a_record_that_cannot_be_handled_makes_no_other_step_run_twice(tmp_path, namespace, monkeypatch):
    """What was dispatched early is still committed, before everything is taken over again."""
    from durably.broker.embedded_broker import EmbeddedProducer

    system = harness.System(f"embedded:{tmp_path}/b", namespace, tmp_path)
    handle, poisoned = Partition._dispatch_record, []
    close, done = EmbeddedProducer.close, []

    def breaks(self, message, record, turn):
        if getattr(record, "run_id", "") == "poison-run":
            poisoned.append(message.offset)
            raise RuntimeError("as if")
        handle(self, message, record, turn)

    write = committer.Committer._commit

    def slowly(self, batch, group):
        time.sleep(0.3)  # so that a commit is under way, and another gathered, when the poison comes
        write(self, batch, group)
        done.append(self)

    def closes(self):
        done.append("closed")
        close(self)

    monkeypatch.setattr(EmbeddedProducer, "close", closes)
    monkeypatch.setattr(Partition, "_dispatch_record", breaks)
    monkeypatch.setattr(committer.Committer, "_commit", slowly)
    system.start_processor()
    system.start_worker()
    ran.clear()
    runs = [system.client.start(counted_steps) for _ in range(5)]
    with contextlib.suppress(DurablyError):
        system.client.options(run_id="poison-run").start(one_step)
    assert [run.result(60) for run in runs] == [3] * 5
    assert len(poisoned) == 1
    assert set(Counter(ran).values()) == {1}
    before, after = done[: done.index("closed")], done[done.index("closed") :]
    assert before, "a commit was under way"
    assert not {*before} & {*after}, "its producer was not closed before it was through"
    system.close()
