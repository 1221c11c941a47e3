"""Rules of correctness that a partition keeps by itself: what fences its timers, what belongs on it, what is held back."""

from __future__ import annotations

import msgspec
import pytest
from durably.broker.port import TP
from durably.errors import ConfigurationError
from durably.identifiers import checked_run_id
from durably.tokens import PREFIX, checked_token
from durably_processor.admission import Admission
from durably_processor.committer import owned, owner_of, released
from durably_processor.engine.state import REDISPATCH_MS
from durably_processor.state.store import Store, Timer, blocked_key, event_key, resume_key, timer_key, token_key
from durably_schemas import Catalogue
from durably_schemas import events as ev
from durably_schemas import records as rec
from durably_schemas.catalogue import partition_for
from durably_schemas.codec import MARKER
from engine_bench import Bench, once, work
from partition_lab import CATALOGUE, CODEC, requests

pytestmark = pytest.mark.usefixtures("guarded")

INPUTS = (CATALOGUE.commands, CATALOGUE.results, CATALOGUE.signals)


def test_what_only_a_timer_wrote_carries_the_offsets_of_all_inputs(lab):
    (request,) = requests(lab.settle(lab.start("napping", 1)), early=True)
    lab.settle(lab.answer(request))
    lab.now += 60_000
    part = lab.turn()
    assert next(CODEC.decode_as(rec.Event, value).type for _, value in part.events) == "wait_completed"
    assert part.offsets == {TP(CATALOGUE.commands, 0): 1, TP(CATALOGUE.results, 0): 1, TP(CATALOGUE.signals, 0): 0}


def test_an_owner_is_named_until_it_releases():
    tp = TP("commands", 0)
    assert owner_of(released({tp: 5})[tp].metadata) is None
    assert owner_of(owned({tp: 5}, "durably.processor.1")[tp].metadata) == "durably.processor.1"
    assert owner_of("") is None


def misplaced(record: rec.Record) -> bool:
    """Whether partition 0 of 64 says that the record's key belongs elsewhere."""
    key = record.token if isinstance(record, rec.ResumeHook) else record.run_id
    return partition_for(key.encode(), 64) != 0


ELSEWHERE = [
    (CATALOGUE.commands, rec.CancelRun(run_id="elsewhere", requested_at=0)),
    (CATALOGUE.commands, rec.QueryRun(run_id="elsewhere", what="SUMMARY", reply_to=rec.ReplyTo(partition=0, request_id="q"))),
    (
        CATALOGUE.results,
        rec.StepResult(
            run_id="elsewhere",
            step_id="s",
            attempt=1,
            fingerprint="f",
            outcome=rec.StepSucceeded(result=rec.Payload(content_type="application/json", data=b"1")),
            started_at=0,
            finished_at=0,
            worker="w",
        ),
    ),
    (CATALOGUE.results, rec.StepClaim(run_id="elsewhere", step_id="s", attempt=1, worker="w", reply_to=rec.ReplyTo(partition=0, request_id="c"))),
    (CATALOGUE.signals, rec.TokenGranted(token="t", run_id="elsewhere", hook_id="hook_1")),
    (
        CATALOGUE.signals,
        rec.ChildFinished(run_id="elsewhere", correlation_id="child_1", child_run_id="c", status="completed"),
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("topic", "record"), ELSEWHERE, ids=lambda x: type(x).__name__ if not isinstance(x, str) else x
)
def test_whatever_is_on_a_partition_that_its_key_does_not_belong_to_is_a_dead_letter(lab, topic, record):
    assert misplaced(record)
    lab.partition._admission = Admission(0, Catalogue("lab", 64), 1_000_000)
    part = lab.turn(lab.put(topic, record))
    (letter,) = [CODEC.decode_as(rec.DeadLetter, o.value) for o in part.outputs]
    assert "murmur2_random" in letter.reason
    assert not part.events


def test_a_key_that_is_not_the_bodys_is_a_dead_letter_on_every_input(lab):
    for topic, record in ELSEWHERE:
        part = lab.turn(lab.put(topic, record, b"another"))
        assert len([o for o in part.outputs if o.topic == CATALOGUE.dead_letters]) == 1, record


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", [checked_token, checked_run_id])
def test_what_custom_tokens_and_run_ids_may_not_begin_with_is_said_at_once(check):
    with pytest.raises(ConfigurationError, match="reserved"):
        check(f"{PREFIX}1_x.r")


def test_a_foreign_start_with_the_reserved_prefix_is_a_dead_letter(lab):
    part = lab.turn(lab.start("chain", 1, run_id=f"{PREFIX}1"))
    (letter,) = [CODEC.decode_as(rec.DeadLetter, o.value) for o in part.outputs]
    assert "reserved" in letter.reason


NAMES = ["a", "ab", "a\x01b", "a\x00\x00\x00\x00\x00\x00\x00\x01", "é", "e" * 200]
"""Some begin as others do, or would end as another one's keys do."""


def test_keys_of_one_run_are_never_those_of_another(tmp_path):
    keys = [
        make
        for a in NAMES
        for b in NAMES
        for make in (
            event_key(a, 1), event_key(a, 256), blocked_key(a), token_key(a),
            timer_key(1, event_key(a, 0)[1:-8], b), resume_key(a, b, "r"),
        )
    ]  # fmt: skip
    distinct = len(NAMES) * 4 + len(NAMES) ** 2 * 2
    assert len(set(keys)) == distinct
    store = Store(tmp_path / "s")
    value = {(name, seq): MARKER + f"{name}{seq}".encode() for name in NAMES for seq in (1, 2, 256)}
    store.write({event_key(*place): event for place, event in value.items()})
    for name in NAMES:
        assert list(store.events(name)) == [value[name, seq] for seq in (1, 2, 256)]
        assert list(store.events(name, 2)) == [value[name, seq] for seq in (2, 256)]
    store.close()


def test_runs_tokens_and_timers_are_apart_in_the_store(tmp_path):
    store = Store(tmp_path / "s")
    timers = [Timer(due, run, item) for due in (1, 2) for run in sorted(NAMES, key=lambda n: (len(n.encode()), n)) for item in ("i", "j")]  # fmt: skip
    store.write({timer_key(t.due, event_key(t.run_id, 0)[1:-8], t.correlation_id): b"" for t in timers})
    store.write({blocked_key(name): b"" for name in NAMES})
    assert store.timers(0, 10) == timers
    assert sorted(store.blocked()) == sorted(NAMES)
    assert store.token("a").holder is None
    assert store.state("a") is None
    store.close()


# -- steps -------------------------------------------------------------------------------------------------------------


def test_an_open_step_is_handed_out_again_before_its_request_is_gone():
    retention = int(
        next(t for t in CATALOGUE.topics() if t.name == CATALOGUE.requests("default")).config["retention.ms"]
    )
    assert retention > REDISPATCH_MS

    async def one() -> object:
        return await work(1)

    bench = Bench(one)
    (step,) = bench.run.state.items.values()
    assert step.due == bench.now + REDISPATCH_MS
    bench.next_timer()
    assert [request.step_id for request in bench.open] == [bench.open[0].step_id] * 2
    assert isinstance(bench.log[-1].data, ev.StepScheduled)


def test_an_orphan_and_its_successor_at_the_same_ordinal_share_no_step_id():
    async def charges() -> object:
        return await work("order-7")

    async def charges_another() -> object:
        return await work("order-8")

    async def refunds() -> object:
        return await once("order-7")

    ids = {Bench(fn).open[0].step_id for fn in (charges, charges_another, refunds)}
    assert len(ids) == 3
    assert Bench(charges).open[0].step_id in ids, "and the same one makes the same"


def test_a_request_that_a_timeout_or_lease_may_have_caused_is_held_back(lab):
    part = lab.settle(lab.start("fanning", 3))
    first, second, _ = requests(part, early=True)
    beat = rec.StepHeartbeat(
        run_id="r1", step_id=first.step_id, attempt=1, worker="w", started_at=lab.now, lease_until=lab.now + 5_000,
        sent_at=lab.now,
    )  # fmt: skip
    lab.settle(lab.put(CATALOGUE.results, beat))
    part = lab.turn(lab.answer(second, error=ValueError("no")))
    assert lab.partition._runs["r1"].tainted == lab.number
    lab.commit(part)
    lab.now += 3_600_000
    part = lab.turn()
    assert len(requests(part, early=False)) == 2, "the lease that lapsed, and the retry"
    assert not requests(part, early=True)


def test_results_that_wait_for_their_run_keep_their_place_in_line(lab):
    start = lab.start("fanning", 2)
    one, two = requests(lab.turn(start), early=True)
    results = [lab.answer(two), lab.answer(one)]
    lab.partition.drop()
    lab.take_over(lab.positions)
    lab.turn(*results)
    part = lab.turn(start)
    done = [CODEC.decode_as(rec.Event, v) for _, v in part.events]
    assert [e.correlation_id for e in done if e.type == "step_completed"] == [two.step_id, one.step_id]


# -- streams -----------------------------------------------------------------------------------------------------------


def test_the_end_of_a_runs_streams_is_in_the_transaction_of_its_terminal_event(lab):
    (request,) = requests(lab.settle(lab.start("chain", 1)), early=True)
    written = rec.StreamWritten(namespace="default", writer="w", partition=0, first_offset=3, chunks=2)
    result = CODEC.decode_as(rec.StepResult, lab.answer(request).value)
    lab.logs[CATALOGUE.results].pop()
    part = lab.turn(lab.put(CATALOGUE.results, msgspec.structs.replace(result, streams=(written,))))
    assert [CODEC.decode_as(rec.Event, v).type for _, v in part.events][-1] == "run_completed"
    (end,) = [CODEC.decode_as(rec.StreamChunk, o.value) for o in part.outputs if o.topic == CATALOGUE.streams]
    assert (end.kind, end.namespace) == ("END", ""), "which closes all streams of the run"
    assert part.urgent
