"""A partition without Kafka: records in, a turn out; and a store that recovery rebuilds to the byte."""

from __future__ import annotations

import pytest
from durably import sleep
from durably.authoring import WorkflowDefinition
from durably.broker import connect
from durably.broker.port import TP
from durably.payloads import dump_arguments
from durably_connectors.http.dashboard.letters import CUT
from durably_processor.admission import Admission
from durably_processor.partition import Poisoned
from durably_processor.restore import Restore
from durably_processor.state.store import Store
from durably_processor.turn import Part, Turn
from durably_schemas import Catalogue
from durably_schemas import records as rec
from partition_lab import CATALOGUE, CODEC, T0, Lab, content, doing, rebuilt, requests

pytestmark = pytest.mark.usefixtures("guarded")


def test_a_request_whose_cause_is_ordered_by_one_log_goes_out_before_its_commit(lab):
    part = lab.turn(lab.start("chain", 2))
    (first,) = requests(part, early=True)
    assert not requests(part, early=False)
    part = lab.turn(lab.answer(first))  # nothing is committed yet
    assert len(requests(part, early=True)) == 1


def test_a_request_that_a_timer_or_an_open_wait_may_have_caused_is_held_back(lab):
    (first,) = requests(lab.settle(lab.start("napping", 1)), early=True)
    lab.settle(lab.answer(first))
    lab.now += 60_000
    part = lab.turn()
    assert not requests(part, early=True)
    (second,) = requests(part, early=False)
    lab.commit(part)
    assert lab.turn(lab.answer(second)).events


def test_after_an_acknowledged_commit_early_dispatch_resumes(lab):
    async def waits_once() -> None:
        await sleep(1)
        await doing(1)
        await doing(2)

    lab.registry.workflows["waits_once"] = WorkflowDefinition("waits_once", waits_once)
    command = rec.StartRun(
        run_id="r1", workflow="waits_once", input=dump_arguments(waits_once, (), {}, ""), requested_at=0
    )
    lab.settle(lab.put(CATALOGUE.commands, command))
    lab.now += 1_000
    held = lab.turn()
    (first,) = requests(held, early=False)
    unacked = lab.turn(lab.answer(first))
    assert not requests(unacked, early=True), "the batch that the timer fired in is not acknowledged"
    (second,) = requests(unacked, early=False)
    held.merge(unacked)
    lab.commit(held)
    assert lab.turn(lab.answer(second)).events


def test_a_run_with_a_step_in_backoff_holds_its_requests_back(lab):
    async def two() -> None:
        import asyncio

        async def pair() -> None:
            await doing(2)
            await doing(3)

        await asyncio.gather(doing(1), pair())

    lab.registry.workflows["two"] = WorkflowDefinition("two", two)
    command = rec.StartRun(run_id="r1", workflow="two", input=dump_arguments(two, (), {}, ""), requested_at=0)
    one, other = requests(lab.settle(lab.put(CATALOGUE.commands, command)), early=True)
    lab.settle(lab.answer(one, error=ValueError("no")))
    part = lab.turn(lab.answer(other))
    assert not requests(part, early=True)
    assert len(requests(part, early=False)) == 1


def test_dispatch_committed_holds_every_request_back(tmp_path):
    lab = Lab(tmp_path, dispatch="committed")
    part = lab.turn(lab.start("chain", 1))
    assert not part.early
    assert len(requests(part, early=False)) == 1
    lab.partition.drop()
    lab.store.close()


def test_after_a_rewind_results_wait_for_the_commands_they_belong_to(lab):
    start = lab.start("chain", 1)
    (request,) = requests(lab.turn(start), early=True)
    result = lab.answer(request)
    lab.partition.drop()  # nothing of it was committed
    lab.take_over(lab.positions)
    part = lab.turn(result)
    assert not part.events
    assert part.offsets.get(TP(CATALOGUE.results, 0), 0) == 0, "its offset is held"
    part = lab.turn(start)
    assert part.offsets[TP(CATALOGUE.results, 0)] == 1
    assert [CODEC.decode_as(rec.Event, v).type for _, v in part.events][-1] == "run_completed"


def test_no_timer_fires_before_all_inputs_have_passed_their_ends(lab):
    (request,) = requests(lab.settle(lab.start("napping", 1)), early=True)
    lab.settle(lab.answer(request))
    lab.now += 3_600_000
    late = lab.put(
        CATALOGUE.results,
        rec.StepHeartbeat(run_id="r1", step_id="x", attempt=1, worker="w", started_at=0, lease_until=0, sent_at=0),
    )
    lab.take_over({CATALOGUE.commands: 1, CATALOGUE.results: 1, CATALOGUE.signals: 0})
    assert not lab.turn().events
    assert not lab.partition.caught_up
    assert lab.turn(late).events


def test_an_input_that_is_not_where_it_belongs_goes_to_dead_letters(lab):
    start = lab.start("chain", 1)
    wrong = [
        lab.put(CATALOGUE.commands, b"\xc3\x01nonsense", b"k"),
        lab.put(CATALOGUE.commands, b"", b"k"),
        start._replace(key=b"other", offset=3),
        lab.put(CATALOGUE.results, CODEC.decode(start.value)),
        lab.put(CATALOGUE.signals, CODEC.decode(start.value)),
    ]
    part = lab.turn(*wrong)
    assert not part.events
    letters = [CODEC.decode_as(rec.DeadLetter, o.value) for o in part.outputs]
    assert len(letters) == len(wrong)
    assert [(x.topic, x.offset, x.value or b"") for x in letters] == [(m.topic, m.offset, m.value) for m in wrong]


def test_a_start_on_the_wrong_partition_names_the_partitioner(tmp_path):
    wide = Catalogue("lab", 64)
    lab = Lab(tmp_path)
    lab.partition._admission = Admission(0, wide, 1_000_000)
    part = lab.turn(lab.start("chain", 1, run_id="certainly-elsewhere"))
    assert "murmur2_random" in CODEC.decode_as(rec.DeadLetter, part.outputs[0].value).reason
    lab.store.close()


def test_a_run_that_ended_its_processor_twice_is_blocked_instead_of_tried_again(lab):
    start = lab.start("chain", 1)
    for _ in range(2):
        lab.store.begin_activation("r1", 0)  # and the process ends
    lab.take_over(lab.positions)
    part = lab.turn(start)
    types = [CODEC.decode_as(rec.Event, v).type for _, v in part.events]
    assert types == ["run_created", "run_blocked"]


def test_a_run_is_deadly_also_where_its_start_was_not_committed_and_goes_well_each_time(lab):
    start = lab.start("chain", 1)
    (request,) = requests(lab.turn(start), early=True)
    result = lab.answer(request)
    for _ in range(2):  # the start is handled again; then the result ends the process
        lab.partition.drop()
        lab.take_over(lab.positions)
        lab.turn(start)
        assert lab.store.begin_activation("r1", 3) < 2
    lab.partition.drop()
    lab.take_over(lab.positions)
    for _ in range(2):  # a block that is not committed, since another run ends the process perhaps, comes again at once
        part = lab.turn(start, result)
        assert "run_blocked" in types(part)
        lab.partition.drop()
        lab.take_over(lab.positions)
    lab.commit(part)
    assert lab.store.begin_activation("r1", 3) == 0, "with other code it counts anew"


def test_a_run_is_deadly_also_where_questions_about_its_step_go_well_each_time(lab):
    start = lab.start("chain", 1)
    (request,) = requests(lab.turn(start), early=True)
    question = rec.StepClaim(
        run_id="r1", step_id=request.step_id, attempt=1, worker="w", reply_to=rec.ReplyTo(partition=0, request_id="q")
    )
    before = [start, *(lab.put(CATALOGUE.results, question) for _ in range(3))]
    result = lab.answer(request)
    for _ in range(
        2
    ):  # the questions are answered again, which takes the log no further; then the result ends the process
        lab.partition.drop()
        lab.take_over(lab.positions)
        part = lab.turn(*before)
        assert len(part.events) == 4
        assert lab.store.begin_activation("r1", 4) < 2
    lab.partition.drop()
    lab.take_over(lab.positions)
    assert "run_blocked" in types(lab.turn(*before, result))


def test_what_the_processor_cannot_handle_is_dead_lettered_and_blocks_its_run_alone(lab, monkeypatch):
    (request,) = requests(lab.settle(lab.start("chain", 1)), early=True)
    result = lab.answer(request)
    other = lab.start("chain", 1, run_id="r2")
    with monkeypatch.context() as broken:
        broken.setattr("durably_processor.engine.run.Run.result", lambda *_: 1 / 0)
        with pytest.raises(Poisoned) as raised:
            lab.turn(result)
    lab.partition.drop()
    lab.options["poisoned"] = frozenset({raised.value.what})
    lab.take_over({CATALOGUE.commands: 1, CATALOGUE.results: 0, CATALOGUE.signals: 0})
    part = lab.turn(result, other)
    types = [(e.run_id, e.type) for e in (CODEC.decode_as(rec.Event, v) for _, v in part.events)]
    assert ("r1", "run_blocked") in types
    assert ("r2", "run_started") in types
    assert any(o.topic == CATALOGUE.dead_letters for o in part.outputs)


def test_runs_leave_memory_when_they_end_and_when_there_are_too_many(tmp_path):
    lab = Lab(tmp_path, max_runs=5)
    lab.settle(*(lab.start("chain", 1, run_id=f"r{i}") for i in range(20)))
    lab.settle()
    assert len(lab.partition._runs) <= 5

    lab.store.close()


def test_a_step_that_opens_and_closes_between_commits_leaves_nothing_but_its_events(lab):
    first = lab.turn(lab.start("chain", 2))
    (request,) = requests(first, early=True)
    second = lab.turn(lab.answer(request))
    first.merge(second)
    items = [key for key in first.changes if key[:1] in (b"o", b"t")]
    assert len(items) == 2, "only the second step's item and timer"
    assert None not in first.changes.values()


def test_recovery_rebuilds_what_live_processing_derived(lab, tmp_path):
    turns = [
        lab.settle(*(lab.start(w, 3, run_id=f"{w}-{i}") for w in ("chain", "napping", "fanning") for i in range(3)))
    ]
    for step_number in range(12):
        todo = [r for part in turns[-1:] for r in requests(part, early=True) + requests(part, early=False)]
        answers = [
            lab.answer(r, error=ValueError("x") if (i + step_number) % 5 == 0 else None) for i, r in enumerate(todo)
        ]
        lab.now += 7_000
        turns.append(lab.settle(*answers))

    with rebuilt(lab, tmp_path) as (store, again):
        assert content(store, b"erotbc") == content(lab.store, b"erotbc")
        assert again.step(0.1), "nothing is left to read"


def types(part: Part) -> list[str]:
    return [CODEC.decode_as(rec.Event, v).type for _, v in part.events]


def test_a_lease_that_lapses_is_retried_at_once(lab):
    (request,) = requests(lab.settle(lab.start("chain", 1)), early=True)
    beat = rec.StepHeartbeat(
        run_id="r1", step_id=request.step_id, attempt=1, worker="w", started_at=T0, lease_until=T0 + 30_000, sent_at=T0
    )
    lab.settle(lab.put(CATALOGUE.results, beat))
    lab.now += 30_000
    lapsed = lab.settle()
    again = lab.settle()
    assert types(lapsed) + types(again) == ["step_retrying", "step_scheduled"]
    assert [r.attempt for r in requests(lapsed, early=False) + requests(again, early=False)] == [2]


def test_a_run_is_unblocked_only_when_its_log_is_all_committed(lab):
    (request,) = requests(lab.settle(lab.start("chain", 2)), early=True)
    entry = lab.partition._entry("r1")
    turn = Turn(99, 0)
    lab.partition._advance(entry, lambda: entry.run.block(RuntimeError("old code")), turn)
    lab.commit(turn.parts[0])
    lab.partition.drop()
    result = lab.answer(request)
    lab.take_over({CATALOGUE.commands: 1, CATALOGUE.results: 0, CATALOGUE.signals: 0})
    recorded = lab.turn(result)
    assert types(recorded) == ["step_started", "step_completed"]
    lab.commit(recorded)
    assert types(lab.settle()) == ["run_unblocked", "step_created"]


def test_what_was_dropped_while_blocked_may_also_have_fired(lab):
    async def hurried() -> str:
        import asyncio

        async with asyncio.timeout(60):
            await doing(1)
        return "in time"

    lab.registry.workflows["hurried"] = WorkflowDefinition("hurried", hurried)
    command = rec.StartRun(run_id="r1", workflow="hurried", input=dump_arguments(hurried, (), {}, ""), requested_at=0)
    (request,) = requests(lab.settle(lab.put(CATALOGUE.commands, command)), early=True)
    entry = lab.partition._entry("r1")
    turn = Turn(99, 0)
    lab.partition._advance(entry, lambda: entry.run.block(RuntimeError("old code")), turn)
    lab.commit(turn.parts[0])
    lab.settle(lab.answer(request))
    lab.now += 60_000
    lab.settle()
    lab.partition.drop()
    lab.take_over({CATALOGUE.commands: 1, CATALOGUE.results: 1, CATALOGUE.signals: 0})
    lab.settle()
    assert "run_completed" in types(lab.pending) + types(lab.settle())


def test_no_record_is_too_long_for_the_dead_letters(lab):
    giant = "x" * 70_000
    ask = rec.QueryRun(run_id=giant, what="SUMMARY", reply_to=rec.ReplyTo(partition=0, request_id="q"))
    part = lab.turn(lab.put(CATALOGUE.commands, ask), lab.put(CATALOGUE.commands, b"y" * 900_000, b"k" * 900_000))
    (refusal,) = [make() for _, make in part.answers]
    assert refusal.status == "REFUSED"
    assert len(refusal.message) < 300
    assert [len(o.value) < 1_000_000 and len(o.key) < 2_000 for o in part.outputs] == [True, True]
    reasons = [CODEC.decode_as(rec.DeadLetter, o.value).reason for o in part.outputs]
    assert all(CUT in reason for reason in reasons), "the dashboard sends no half of a record again"


def test_a_run_that_is_deadly_stays_blocked_until_other_code_comes(lab):
    start = lab.start("chain", 1)
    for _ in range(2):
        lab.store.begin_activation("r1", 0)  # and the process ends
    lab.take_over(lab.positions)
    lab.commit(lab.turn(start))
    lab.partition.drop()
    lab.take_over({CATALOGUE.commands: 1, CATALOGUE.results: 0, CATALOGUE.signals: 0})
    assert types(lab.settle()) + types(lab.settle()) == []
    lab.environment.code_version = "other"
    lab.partition.drop()
    lab.take_over({CATALOGUE.commands: 1, CATALOGUE.results: 0, CATALOGUE.signals: 0})
    assert (types(lab.settle()) + types(lab.settle()))[:2] == ["run_unblocked", "run_started"]


def test_a_timer_that_cannot_be_handled_blocks_its_run_alone(lab, monkeypatch):
    (request,) = requests(lab.settle(lab.start("napping", 1)), early=True)
    lab.settle(lab.answer(request))
    lab.now += 60_000
    with monkeypatch.context() as broken:
        broken.setattr("durably_processor.engine.run.Run.timer", lambda *_: 1 / 0)
        with pytest.raises(Poisoned) as raised:
            lab.turn()
    assert raised.value.what == "r1"
    lab.partition.drop()
    lab.options["poisoned"] = frozenset({"r1"})
    lab.take_over({CATALOGUE.commands: 1, CATALOGUE.results: 1, CATALOGUE.signals: 0})
    assert "run_blocked" in types(lab.settle()) + types(lab.settle())


def test_a_store_of_another_topic_is_rebuilt(lab, tmp_path):
    lab.settle(lab.start("chain", 1))
    brokers = []
    for name in ("one", "other"):
        broker = connect(f"embedded:{tmp_path}/{name}")
        broker.create(CATALOGUE.topics())
        producer = broker.producer()
        for key, value in lab.events * (1 if name == "one" else 0) + [lab.events[0]] * (3 if name == "other" else 0):
            producer.send(CATALOGUE.events, value, key=key, partition=0)
        assert producer.flush(10) == 0
        producer.close()
        brokers.append(broker)
    store = Store(tmp_path / "shared")
    for broker, events in zip(brokers, (3, 1), strict=True):
        restore = Restore(0, store, broker, CATALOGUE, CODEC)
        while not restore.step(1):
            pass
        state = store.state("r1")
        assert state is not None
        assert state.header.seq == events
        broker.close()
    store.close()


def test_who_asks_about_a_blocked_run_that_goes_on_is_not_told_that_it_has_ended(lab):
    lab.settle(lab.start("chain", 2))
    entry = lab.partition._entry("r1")
    turn = Turn(99, 0)
    lab.partition._advance(entry, lambda: entry.run.block(RuntimeError("old code")), turn)
    lab.commit(turn.parts[0])
    lab.partition.drop()
    ask = lab.put(
        CATALOGUE.commands,
        rec.QueryRun(run_id="r1", what="RESULT", reply_to=rec.ReplyTo(partition=0, request_id="q")),
    )
    lab.take_over({CATALOGUE.commands: 1, CATALOGUE.results: 0, CATALOGUE.signals: 0})
    part = lab.settle(ask)
    assert "run_unblocked" in types(part)
    assert [make() for _, make in part.answers] == [None]


def test_a_bad_record_behind_one_that_waits_is_one_dead_letter_though_it_is_read_twice(lab):
    (request,) = requests(lab.settle(lab.start("chain", 1)), early=True)
    early = lab.answer(request)  # read before its run is known
    bad = lab.put(CATALOGUE.results, b"no record", b"r1")
    start = lab.logs[CATALOGUE.commands][0]
    lab.store.clear()
    lab.events.clear()
    lab.take_over(dict.fromkeys(lab.logs, 0))
    part = lab.settle(early, bad)
    assert (part.outputs, part.offsets.get(TP(CATALOGUE.results, 0), 0)) == ([], 0)
    part = lab.settle(start)
    assert [o.topic for o in part.outputs] == [CATALOGUE.dead_letters]
    assert part.offsets[TP(CATALOGUE.results, 0)] == 2
