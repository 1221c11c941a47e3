"""What is kept, for how long: in virtual time, with a topic that loses its beginning as soon as it may."""

from __future__ import annotations

import pytest
from durably.broker import connect
from durably.broker.port import TP
from durably.payloads import dump
from durably_processor import upkeep
from durably_processor.restore import Restore
from durably_processor.state.store import Holder, Store, header_key, token_key
from durably_processor.upkeep import Retention
from durably_schemas import records as rec
from durably_schemas.records import Event, Snapshot
from partition_lab import CATALOGUE, CODEC, Lab, content, finish, publish, rebuilt, requests

HOUR = 3_600_000
KEPT = 10 * HOUR
DERIVED = b"erotbckmzy"


class Aging(Lab):
    """A partition whose runs are kept for ten hours. ``start_offset``: where its events begin by now."""

    def __init__(self, folder) -> None:
        self.start_offset = 0
        self.appended: list[int] = []
        super().__init__(folder, retention=Retention(KEPT, self.truncate))

    def truncate(self, partition: int, before: int, offset: int) -> None:
        older = sum(at < before for at in self.appended)
        self.start_offset = max(self.start_offset, min(offset, older))

    def commit(self, part):
        super().commit(part)
        self.appended += [self.now] * len(part.events)
        return part

    def pass_time(self, hours: float) -> None:
        """Whatever is to be done meanwhile is done."""
        until = self.now + int(hours * HOUR)
        while self.now < until:
            self.now = min(until, self.now + HOUR // 4)
            for _ in range(6):
                self.settle()

    def finish(self, part) -> None:
        while todo := requests(part, early=True) + requests(part, early=False):
            part = self.settle(*map(self.answer, todo))

    def check_rebuilt(self, tmp_path) -> None:
        with rebuilt(self, tmp_path, self.start_offset) as (store, _):
            assert kept(store, self.now) == kept(self.store, self.now)

    def succeed(self, tmp_path) -> None:
        """Another owner goes on, with a store made of what the topics still have."""
        self.partition.drop()
        with rebuilt(self, tmp_path, self.start_offset) as (store, _):
            found = dict(store._db.items())
        self.store.close()
        self.folder = tmp_path / f"successor-{self.number}"
        self.store = Store(self.folder / "store")
        self.store.write(found)
        self.take_over({topic: len(log) for topic, log in self.logs.items()})


def kept(store: Store, now: int) -> dict[bytes, bytes]:
    """What a store holds but for what the next sweep purges: events that are still there may bring that back."""
    found = content(store, DERIVED)
    for life in store.lives(None, 10_000):
        if life.ended_at is not None and life.ended_at + KEPT <= now:
            run = header_key(life.run_id)[1:]
            found = {key: value for key, value in found.items() if key[1 : 1 + len(run)] != run}
    for name, token in store.tokens(None, 10_000):
        if token.holder is None and token.at + KEPT <= now:
            del found[token_key(name)]
    return found


@pytest.fixture
def aging(tmp_path, guarded, monkeypatch):
    """A partition whose runs are kept for ten hours."""
    monkeypatch.setattr(upkeep, "BETWEEN", 0)
    lab = Aging(tmp_path)
    yield lab
    lab.partition.drop()
    lab.store.close()


def hook(lab: Lab, token: str = "order-7", resume_id: str = "x") -> rec.ResumeHook:
    return rec.ResumeHook(token=token, resume_id=resume_id, payload=dump(1, ""), requested_at=0)


def ask(lab: Lab, run_id: str, what: rec.Query = "SUMMARY") -> rec.Reply:
    record = rec.QueryRun(run_id=run_id, what=what, reply_to=rec.ReplyTo(partition=0, request_id="q"))
    part = lab.settle(lab.put(CATALOGUE.commands, record))
    ((_, make),) = part.answers
    return make()


def test_a_run_is_kept_for_its_retention_and_then_leaves_no_trace(aging, tmp_path):
    aging.finish(aging.settle(aging.start("chain", 2)))
    aging.pass_time(9.5)
    assert aging.start_offset == 0
    assert ask(aging, "r1").summary.status == "completed"
    aging.pass_time(1.5)
    assert ask(aging, "r1").status == "NOT_FOUND"
    assert content(aging.store, b"erotbmz") == {}
    assert aging.copies == [], "it has not lived for long: it was never copied"
    aging.pass_time(4)
    assert aging.start_offset == len(aging.events)
    aging.check_rebuilt(tmp_path)


def test_a_purge_takes_the_summary_back(aging):
    part = aging.settle(aging.start("chain", 0))
    assert part.summaries[b"r1"] is not None
    aging.now += KEPT
    parts = [aging.settle() for _ in range(3)]
    assert [part.summaries for part in parts if part.summaries] == [{b"r1": None}]


def test_a_run_that_goes_on_survives_the_truncation_of_its_log_and_ends_in_another_process(aging, tmp_path):
    (request,) = requests(aging.settle(aging.start("chain", 3)), early=True)
    aging.pass_time(20)
    assert aging.start_offset == len(aging.events), "all of it is copied"
    (copy,) = [CODEC.decode_as(Snapshot, value) for _, value in aging.copies]
    assert [CODEC.decode_as(Event, e).seq for e in copy.events] == [1, 2, 3]
    aging.check_rebuilt(tmp_path)
    aging.succeed(tmp_path)
    aging.finish(aging.settle(aging.answer(request)))
    assert aging.store.state("r1").header.status == "completed"
    assert [CODEC.decode_as(Event, e).seq for e in aging.store.events("r1")] == list(range(1, 13))
    aging.check_rebuilt(tmp_path)
    aging.pass_time(30)
    assert aging.store.state("r1") is None
    assert aging.copies[-1] == (b"r1|1", None)
    aging.check_rebuilt(tmp_path)


def test_what_a_long_run_adds_is_copied_in_turn_and_all_copies_are_taken_back(aging, tmp_path):
    part = aging.settle(aging.start("chain", 6))
    for _ in range(6):
        aging.pass_time(14)
        aging.check_rebuilt(tmp_path)
        part = aging.settle(*map(aging.answer, requests(part, early=True)))
    assert aging.store.state("r1").header.status == "completed"
    begins = aging.store.copied("r1").begins
    assert len(begins) > 3
    aging.pass_time(30)
    assert {key for key, value in aging.copies if value is None} == {f"r1|{seq}".encode() for seq in begins}
    assert aging.start_offset == len(aging.events)
    aging.check_rebuilt(tmp_path)


def test_a_long_log_is_copied_in_records_that_fit(aging, tmp_path, monkeypatch):
    monkeypatch.setattr(upkeep, "SNAPSHOT_BYTES", 1_000)
    monkeypatch.setattr(upkeep, "COPIED_AT_ONCE", 2)
    part = aging.settle(aging.start("chain", 100))
    for _ in range(60):
        part = aging.settle(*map(aging.answer, requests(part, early=True)))
    aging.pass_time(30)
    assert all(len(value) < 1_400 for _, value in aging.copies)
    assert len(aging.copies) > 10
    assert aging.start_offset == len(aging.events)
    aging.check_rebuilt(tmp_path)


def test_a_token_that_is_held_for_long_is_held_by_its_run_alone_after_the_truncation_too(aging, tmp_path):
    aging.settle(*aging.signals(aging.settle(*aging.signals(aging.settle(aging.start("hooked", 2))))))
    aging.pass_time(20)
    assert aging.start_offset == len(aging.events)
    aging.check_rebuilt(tmp_path)
    aging.succeed(tmp_path)
    assert aging.store.token("order-7").holder == Holder("r1", "hook_1")
    aging.settle(*aging.signals(aging.settle(*aging.signals(aging.settle(aging.start("hooked", 1, "r2"))))))
    assert aging.store.token("order-7").holder == Holder("r1", "hook_1")
    for n in range(2):
        aging.settle(*aging.signals(aging.settle(aging.put(CATALOGUE.commands, hook(aging, resume_id=f"x{n}")))))
    aging.settle(*aging.signals(aging.settle()))
    assert aging.store.state("r1").header.status == "completed"


def test_a_token_that_was_given_back_is_forgotten_after_a_while_and_free_again(aging, tmp_path):
    aging.settle(*aging.signals(aging.settle(*aging.signals(aging.settle(aging.start("hooked", 1))))))
    aging.pass_time(14)
    part = aging.settle(*aging.signals(aging.settle(aging.put(CATALOGUE.commands, hook(aging)))))
    aging.settle(*aging.signals(part))
    assert aging.store.token("order-7").last == Holder("r1", "hook_1")
    assert aging.store.token("order-7").holder is None
    aging.pass_time(1)
    assert aging.store.copied_claim("order-7") is None
    aging.check_rebuilt(tmp_path)
    aging.pass_time(16)
    assert content(aging.store, b"kyerz") == {}
    aging.check_rebuilt(tmp_path)
    aging.settle(*aging.signals(aging.settle(aging.start("hooked", 1, "r2"))))
    assert aging.store.token("order-7").holder == Holder("r2", "hook_1")
    aging.check_rebuilt(tmp_path)


def test_late_records_for_a_purged_run_are_answered_as_if_it_had_never_been(aging):
    (request,) = requests(aging.settle(aging.start("chain", 1)), early=True)
    aging.finish(aging.settle(aging.answer(request)))
    aging.pass_time(12)
    events = len(aging.events)
    assert ask(aging, "r1", "EVENTS").status == "NOT_FOUND"
    assert ask(aging, "r1", "RESULT").status == "NOT_FOUND"
    late = [
        aging.answer(request),
        aging.put(CATALOGUE.commands, rec.CancelRun(run_id="r1", requested_at=0)),
        aging.put(CATALOGUE.commands, hook(aging, "hook_1_x.r1"), b"r1"),
    ]
    aging.settle(*late)
    assert len(aging.events) == events


@pytest.mark.parametrize("truncated", [True, False])
def test_the_id_of_a_purged_run_can_be_used_again(aging, tmp_path, truncated):
    if not truncated:
        aging.settle(aging.start("napping", 1, "older"))
    aging.finish(aging.settle(aging.start("chain", 5)))
    aging.pass_time(11)
    assert (aging.start_offset > 0) == truncated
    first = len(aging.events)
    part = aging.settle(aging.start("chain", 1))
    aging.check_rebuilt(tmp_path)
    aging.finish(part)
    assert [CODEC.decode_as(Event, e).seq for e in aging.store.events("r1")] == list(range(1, 7))
    aging.check_rebuilt(tmp_path)
    aging.pass_time(3)
    aging.check_rebuilt(tmp_path)
    assert len(aging.events) == first + 6


def test_a_start_that_comes_while_its_ids_last_run_is_being_purged_begins_a_new_one(aging):
    aging.finish(aging.settle(aging.start("chain", 5)))
    aging.now += KEPT
    purging = aging.turn()
    assert purging.summaries == {b"r1": None}
    starting = aging.turn(aging.start("chain", 1))
    purging.merge(starting)
    aging.finish(aging.commit(purging))
    assert [CODEC.decode_as(Event, e).seq for e in aging.store.events("r1")][:3] == [1, 2, 3]
    assert aging.store.state("r1").header.created_at == aging.now


def test_the_id_of_a_copied_and_purged_run_can_be_used_for_another_long_one(aging, tmp_path):
    part = aging.settle(aging.start("chain", 2))
    aging.pass_time(14)
    aging.finish(aging.settle(*map(aging.answer, requests(part, early=True))))
    aging.pass_time(12)
    assert aging.store.state("r1") is None
    part = aging.settle(aging.start("chain", 3))
    aging.check_rebuilt(tmp_path)
    aging.pass_time(14)
    aging.check_rebuilt(tmp_path)
    aging.finish(aging.settle(*map(aging.answer, requests(part, early=True))))
    aging.check_rebuilt(tmp_path)


def test_a_store_from_before_the_truncation_is_rebuilt(aging, tmp_path):
    aging.finish(aging.settle(aging.start("chain", 1, "gone")))
    (request,) = requests(aging.settle(aging.start("chain", 1, "stays")), early=True)
    broker = connect(f"embedded:{tmp_path}/stale-broker")
    broker.create(CATALOGUE.topics())
    store = Store(tmp_path / "stale")
    publish(aging, broker)
    finish(Restore(0, store, broker, CATALOGUE, CODEC))
    known = len(aging.events)
    aging.finish(aging.settle(aging.start("chain", 1, "gone-too")))
    aging.pass_time(20)
    aging.finish(aging.settle(aging.answer(request)))
    publish(aging, broker, since=known, below=aging.start_offset)
    assert store.checkpoint < broker.start_offsets([TP(CATALOGUE.events, 0)])[TP(CATALOGUE.events, 0)]
    finish(Restore(0, store, broker, CATALOGUE, CODEC))
    assert content(store, DERIVED) == content(aging.store, DERIVED)
    assert store.state("gone") is None
    assert store.state("stays").header.status == "completed"
    store.close()
    broker.close()


def test_nothing_is_lost_whenever_the_owner_dies(aging, tmp_path):
    """Successors begin between any two commits, with the predecessor's last commit in its store or only on the topics."""
    part = aging.settle(aging.start("chain", 40))
    aging.settle(*aging.signals(aging.settle(*aging.signals(aging.settle(aging.start("hooked", 1, "holder"))))))
    answered = 0
    for n in range(24):
        aging.finish(aging.settle(aging.start("chain", 1, f"short-{n}")))
        aging.pass_time(1.5)
        if n % 3 == 0:
            part = aging.settle(*map(aging.answer, requests(part, early=True) + requests(part, early=False)))
            answered += 1
            aging.check_rebuilt(tmp_path)
        if n % 5 == 4:
            aging.succeed(tmp_path)
    assert answered == 8
    assert aging.store.state("r1").header.seq == 2 + 3 * 8 + 1
    assert aging.store.token("order-7").holder == Holder("holder", "hook_1")
    assert aging.start_offset > 3 * 15
    alive = {key.decode() for key, _ in aging.events if aging.store.state(key.decode()) is not None}
    assert {"r1", "holder", "short-23", "short-18"} <= alive
    assert not {f"short-{n}" for n in range(15)} & alive


def test_without_a_retention_nothing_is_touched(lab):
    lab.settle(lab.start("chain", 0))
    lab.now += 10_000 * HOUR
    part = lab.settle()
    assert not part.summaries
    assert not part.copies
    assert lab.store.state("r1") is not None
