"""Each rule of the verdict finds the history that breaks it, and none finds fault with a good one."""

from __future__ import annotations

import pytest
from durably import payloads
from durably_schemas import events as ev
from durably_schemas.records import StreamChunk, StreamWritten

from chaos import verdict
from chaos.faults import AFTERMATH_MS, Injected
from chaos.fleet import Exit
from chaos.history import Execution, History, Written
from chaos.shapes import PLAIN, SHAPES, payloads_for

N = 4
ADD = "step_1_aaaa"
TELL = "step_1_bbbb"
WRITE = "step_1_cccc"
WRITER = f"{WRITE}/1/1"
WORKER, LATE = 100, 60_000
LETTER = ("ns.commands", 0, 7)
ERROR = {"type": "builtins:ValueError", "message": "no"}
BACKOFF = ev.Backoff(initial_ms=1, factor=1, max_ms=1)


def one(n: int) -> None:
    """The signature of the workflows."""


def value(of):
    return payloads.dump(of, "value")


def created(workflow):
    return ev.RunCreated(workflow=workflow, input=payloads.dump_arguments(one, (N,), {}, "input")), None


def step_created(step):
    data = ev.StepCreated(
        step="s", queue="default", input=value([]), fingerprint="f", max_retries=9, backoff=BACKOFF
    )  # fmt: skip
    return data, step


def step_started(step, attempt=1, execution=1):
    return ev.StepStarted(attempt=attempt, worker="w", started_at=1, execution=execution), step


def step_completed(step, attempt=1, streams=()):
    return ev.StepCompleted(attempt=attempt, result=value(1), streams=streams), step


def received(run_id, i):
    return ev.HookReceived(resume_id=f"{run_id}/{i}", payload=value(payloads_for(N)[i])), "hook_1"


def completed(result):
    return ev.RunCompleted(result=value(result)), None


def put(history, run_id, *entries, partition=0, at=1_000):
    """Appends to a run's log; each event is written 10 ms after the one before it."""
    for data, about in entries:
        seq = len(history.logs[run_id]) + 1
        history.logs[run_id].append(Written(ev.event(run_id, seq, at, data, about), partition, at + 10 * seq))


def chunks(run_id, values, writer=WRITER, kind="DATA"):
    return [
        StreamChunk(run_id=run_id, namespace="log", writer=writer, n=n, kind=kind, at=1, payload=value(v))
        for n, v in enumerate(values, 1)
    ]


def end(run_id):
    return StreamChunk(run_id=run_id, namespace="", writer="", n=1, kind="END", at=1)


def good() -> History:
    """A sequence, a resumed run, one with a stream, a poison with others behind it, and a repeated step with its cause."""
    history = History()
    history.started = {"sequence-4": "chaos_sequence", "hook-4": "chaos_hook", "streams-4": "chaos_streams"}
    put(
        history, "sequence-4", created("chaos_sequence"), step_created(ADD), step_started(ADD), step_completed(ADD),
        completed(N + 10), at=LATE,
    )  # fmt: skip
    put(
        history, "hook-4", created("chaos_hook"), step_created(TELL), step_started(TELL), step_completed(TELL),
        received("hook-4", 0), received("hook-4", 1), completed(N + sum(payloads_for(N))),
    )  # fmt: skip
    streams = (StreamWritten(namespace="log", writer=WRITER, partition=0, first_offset=0, chunks=len(PLAIN)),)
    put(
        history, "streams-4", created("chaos_streams"), step_created(WRITE), step_started(WRITE),
        step_completed(WRITE, streams=streams), completed(None),
    )  # fmt: skip
    copy = chunks("streams-4", PLAIN)[3]
    history.chunks["streams-4"] = [*chunks("streams-4", PLAIN), copy, end("streams-4")]
    history.read["streams-4"] = list(PLAIN)
    history.told["sequence-4"] = ("completed", N + 10)
    history.poisons["poison-1"] = "chaos_loops_for_ever"
    put(history, "poison-1", created("chaos_loops_for_ever"), (ev.RunBlocked(error=ev.Error(**ERROR)), None))
    history.unreadable, history.letters = {LETTER}, [(*LETTER, "anything"), ("ns.results", 0, 3, "poison-1")]
    history.ledger = [
        Execution("sequence-4", ADD, 1, WORKER, LATE),
        Execution("sequence-4", ADD, 1, WORKER + 1, LATE + 15),
        Execution("hook-4", TELL, 1, WORKER, 1_000),
        Execution("streams-4", WRITE, 1, WORKER, 1_000),
        Execution("poison-1", ADD, 1, WORKER, 1_000),
    ]
    history.injected = [Injected("sigkill", "worker-0", LATE + 1, LATE + 5, (WORKER,))]
    return history


def test_a_good_history_breaks_no_rule():
    assert verdict.violations(good()) == []


def lose_a_run(history):
    history.started["fan-9"] = "chaos_fan"


def leave_a_run_open(history):
    history.logs["sequence-4"].pop()


def return_something_else(history):
    history.logs["sequence-4"].pop()
    put(history, "sequence-4", completed(N + 11), at=LATE)
    history.told.clear()


def end_otherwise(history):
    history.logs["sequence-4"].pop()
    put(history, "sequence-4", (ev.RunCancelled(), None), at=LATE)
    history.told.clear()


def tell_another_result(history):
    history.told["sequence-4"] = ("completed", N)


def tell_another_end(history):
    history.told["sequence-4"] = ("failed", None)


def accept_an_attempt_twice(history):
    log = history.logs["sequence-4"]
    log[3:3] = [log[3]._replace(event=ev.event("sequence-4", 4, 1, *retried(2)))]


def retried(attempt):
    return ev.StepRetrying(attempt=attempt, error=ev.Error(**ERROR), retry_at=1), ADD


def start_an_execution_again(history):
    log = history.logs["sequence-4"]
    log[3:3] = [log[2]]


def count_a_resume_twice(history):
    log = history.logs["hook-4"]
    log[5:5] = [log[5]]


def swap_the_resumes(history):
    log = history.logs["hook-4"]
    log[4], log[5] = log[5], log[4]


def lose_a_chunk(history):
    del history.chunks["streams-4"][5]
    history.read["streams-4"].remove(5)


def swap_two_chunks(history):
    values = [1, 0, *PLAIN[2:]]
    history.chunks["streams-4"] = [*chunks("streams-4", values), end("streams-4")]
    history.read["streams-4"] = values


def end_before_the_last_chunk(history):
    stream = history.chunks["streams-4"]
    stream.insert(8, stream.pop())
    history.read["streams-4"] = list(PLAIN[:8])


def end_twice(history):
    history.chunks["streams-4"].append(end("streams-4"))


def read_something_twice(history):
    history.read["streams-4"].append(9)


def lose_a_letter(history):
    history.letters.pop(0)


def write_a_letter_twice(history):
    history.letters *= 2


def bury_a_good_record(history):
    history.letters.append(("ns.commands", 0, 8, "sequence-4"))


def let_poison_through(history):
    history.logs["poison-1"].pop()


def stop_the_partition(history):
    log = history.logs["sequence-4"]
    history.logs["sequence-4"] = [w._replace(partition=1) for w in log]
    history.logs["poison-1"] = [w._replace(written_at=LATE // 2) for w in history.logs["poison-1"]]


def run_an_unknown_step(history):
    history.ledger.append(Execution("hook-4", "step_9_ffff", 1, WORKER, 1_000))


def invent_a_result(history):
    history.ledger.pop(2)


def repeat_without_a_fault(history):
    history.injected.clear()


def repeat_long_after_the_fault(history):
    begin = LATE - AFTERMATH_MS - 2_000
    history.injected = [Injected("sigkill", "worker-0", begin, begin + 1_000, (WORKER,))]


def keep_what_was_aborted(history):
    history.strangers.append("processor-0/partition-1 holds an event that the topic does not")


@pytest.mark.parametrize(
    ("spoil", "rules"),
    [
        (lose_a_run, {"nothing_is_lost"}),
        (leave_a_run_open, {"nothing_is_lost", "clients_are_told_the_truth"}),
        (return_something_else, {"results_are_right"}),
        (end_otherwise, {"results_are_right"}),
        (tell_another_result, {"clients_are_told_the_truth"}),
        (tell_another_end, {"clients_are_told_the_truth"}),
        (accept_an_attempt_twice, {"attempts_are_accepted_once"}),
        (start_an_execution_again, {"attempts_are_accepted_once"}),
        (count_a_resume_twice, {"resumes_count_once"}),
        (swap_the_resumes, {"resumes_count_once"}),
        (lose_a_chunk, {"streams_are_complete"}),
        (swap_two_chunks, {"streams_are_complete"}),
        (end_before_the_last_chunk, {"streams_are_complete"}),
        (end_twice, {"streams_are_complete"}),
        (read_something_twice, {"readers_see_the_same"}),
        (lose_a_letter, {"letters_are_written_once"}),
        (write_a_letter_twice, {"letters_are_written_once"}),
        (bury_a_good_record, {"letters_are_written_once"}),
        (let_poison_through, {"poison_hurts_itself_alone", "steps_that_ran_are_known"}),
        (stop_the_partition, {"poison_hurts_itself_alone"}),
        (run_an_unknown_step, {"steps_that_ran_are_known"}),
        (invent_a_result, {"steps_that_ran_are_run"}),
        (repeat_without_a_fault, {"only_faults_repeat_steps"}),
        (repeat_long_after_the_fault, {"only_faults_repeat_steps"}),
        (keep_what_was_aborted, {"stores_hold_what_was_committed"}),
    ],
)
def test_what_is_wrong_is_found_by_its_rule_and_by_no_other(spoil, rules):
    history = good()
    spoil(history)
    assert {rule.__name__ for rule in verdict.RULES if list(rule(history))} == rules


def test_every_rule_is_proved():
    proved = {
        name
        for mark in test_what_is_wrong_is_found_by_its_rule_and_by_no_other.pytestmark
        for _, names in mark.args[1]
        for name in names
    }
    assert proved == {rule.__name__ for rule in verdict.RULES}


def test_repetitions_are_counted_and_explained():
    history = good()
    (again,) = verdict.repeated(history.ledger)
    assert verdict.cause(again, history) == "sigkill of its worker"
    assert verdict.repeated_after_result(history) == []
    history.ledger[1] = history.ledger[1]._replace(at=LATE + 41)
    assert verdict.repeated_after_result(history) == [history.ledger[1]]
    history.injected = [Injected("broker-kill", "broker", LATE, LATE + 1)]
    assert verdict.cause(again, history) == "broker-kill"
    history.injected = [Injected("sigterm", "processor-0", LATE, LATE + 1, (7,))]
    assert verdict.cause(again, history) == "sigterm of another process"
    history.injected, history.exits = [], [Exit("worker-0", 1, LATE + 2, "")]
    assert verdict.cause(again, history) == "a process that ended by itself"


def test_a_take_over_lasts_until_the_last_partition_has_advanced():
    history = good()
    history.injected = [Injected("sigkill", "processor-1", 1_500, 1_600, (1,))]
    put(history, "naps-1", created("chaos_naps"), partition=1, at=4_000)
    assert verdict.take_overs(history) == [LATE + 10 - 1_500]
    history.injected.append(Injected("cut", "once", 2_000, 2_001))
    assert verdict.take_overs(history) == [], "what was not alone measures nothing"


def test_every_shape_has_a_workflow_and_an_outcome():
    assert all(shape.weight > 0 and isinstance(shape.results(N), tuple) for shape in SHAPES.values())
