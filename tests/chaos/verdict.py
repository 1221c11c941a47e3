"""Whether a history keeps the promise; one function for each rule. See docs/faults.md, "What is checked"."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any

from durably import payloads
from durably_schemas import events as ev
from installation import SESSION

from chaos.faults import ABROAD, AFTERMATH_MS
from chaos.shapes import PLAIN, SHAPES, STREAM

if TYPE_CHECKING:
    from durably_schemas.records import StreamChunk

    from chaos.history import Execution, History

TAKE_OVER_MS = round(SESSION * 1000) + 3_000
"""After so long a killed owner's partitions must have advanced."""


def violations(history: History) -> list[str]:
    """What breaks a rule, beyond what `checker.violations` finds in the logs themselves."""
    return [found for rule in RULES for found in rule(history)]


def nothing_is_lost(history: History) -> Iterator[str]:
    """Every start that was acknowledged has its run, which has ended."""
    for run_id in history.started.keys() | history.poisons.keys():
        log = history.logs.get(run_id)
        if not log:
            yield f"{run_id}: its start was acknowledged, and there is no log"
        elif run_id in history.started and not _ended(log):
            yield f"{run_id}: it has not ended; its last event is {log[-1].event.type}"


def results_are_right(history: History) -> Iterator[str]:
    """Every run, children too, ends as its workflow does, with what that returns for its argument."""
    for run_id, log in history.logs.items():
        created = log[0].event.data
        if not isinstance(created, ev.RunCreated) or (shape := SHAPES.get(created.workflow)) is None:
            continue
        end = log[-1].event.data
        status = _ENDS.get(type(end))
        if status is None:
            continue
        if status != shape.status:
            yield f"{run_id}: {created.workflow} has {status}, which it never does: {end}"
        elif isinstance(end, ev.RunCompleted) and (allowed := shape.results(_argument(created))):
            result = payloads.load(end.result)
            if result not in allowed:
                yield f"{run_id}: {created.workflow} returned {result!r} instead of {allowed}"


def clients_are_told_the_truth(history: History) -> Iterator[str]:
    """What a client was told of a run is what its log says."""
    for run_id, (status, result) in history.told.items():
        end = history.logs[run_id][-1].event.data if history.logs.get(run_id) else None
        said = _ENDS.get(type(end)) if end is not None else None
        if status != said:
            yield f"{run_id}: a client was told that it has {status}, and its log says {said}"
        elif isinstance(end, ev.RunCompleted) and payloads.load(end.result) != result:
            yield f"{run_id}: a client was told the result {result!r}, and its log says {payloads.load(end.result)!r}"


def attempts_are_accepted_once(history: History) -> Iterator[str]:
    """Of each attempt of a step one outcome counts at most, and attempts and executions only go up."""
    for run_id, log in history.logs.items():
        outcomes: Counter[tuple[str, int]] = Counter()
        last: dict[str, tuple[int, int]] = {}
        for written in log:
            data, step = written.event.data, written.event.correlation_id or ""
            if isinstance(data, ev.StepStarted):
                this = (data.attempt, data.execution)
                if this <= last.get(step, (0, 0)) and data.lease_until is None:
                    yield f"{run_id}: {step} started attempt and execution {this} after {last[step]}"
                last[step] = max(this, last.get(step, (0, 0)))
            elif isinstance(data, ev.StepCompleted | ev.StepFailed):
                outcomes[step, data.attempt] += 1
            elif isinstance(data, ev.StepRetrying):
                outcomes[step, data.attempt - 1] += 1
        for (step, attempt), times in outcomes.items():
            if times > 1:
                yield f"{run_id}: attempt {attempt} of {step} has {times} outcomes"


def resumes_count_once(history: History) -> Iterator[str]:
    """A run that was resumed has each payload once, in the order in which they were acknowledged."""
    for run_id, workflow in history.started.items():
        if not SHAPES[workflow].resumed or not _ended(history.logs.get(run_id, [])):
            continue
        received = [w.event.data.resume_id for w in history.logs[run_id] if isinstance(w.event.data, ev.HookReceived)]
        if received != [f"{run_id}/0", f"{run_id}/1"]:
            yield f"{run_id}: it received {received}"


def streams_are_complete(history: History) -> Iterator[str]:
    """By the reader's rule: copies are dropped, each execution's chunks are whole or a beginning, in order, before the END."""
    for run_id, log in history.logs.items():
        reported = [s for w in log if isinstance(w.event.data, ev.StepCompleted) for s in w.event.data.streams]
        if not reported:
            continue
        chunks = history.chunks.get(run_id, [])
        for stream in reported:
            values = counted(chunks, stream.namespace).get(stream.writer, [])
            if len(values) != stream.chunks:
                yield f"{run_id}: {stream.writer} wrote {stream.chunks} chunks to {stream.namespace}, a reader counts {len(values)}"
            elif tuple(values) not in _EXPECTED:
                yield f"{run_id}: {stream.writer} wrote {values} to {stream.namespace}"
        ends = [c for c in chunks if c.kind == "END" and not c.namespace]
        if _ended(log) and len(ends) != 1:
            yield f"{run_id}: it has ended, and so have its streams {len(ends)} times"


def readers_see_the_same(history: History) -> Iterator[str]:
    """What a client read of a stream while everything broke is what the topic has."""
    for run_id, read in history.read.items():
        there = [value for _, value in _accepted(history.chunks.get(run_id, []), "log")]
        if read != there:
            yield f"{run_id}: a client read {read} of its stream, and the topic has {there}"


def letters_are_written_once(history: History) -> Iterator[str]:
    """Every record that nobody can handle becomes one dead letter, and no other does but what is about a poison run."""
    letters = Counter(letter[:3] for letter in history.letters)
    poisoned = {letter[:3] for letter in history.letters if letter[3] in history.poisons}
    for place, times in letters.items():
        if place not in history.unreadable | poisoned:
            yield f"{place} became a dead letter"
        elif times > 1:
            yield f"{place} became {times} dead letters"
    for place in history.unreadable - letters.keys():
        yield f"{place} cannot be handled, and is no dead letter"


def poison_hurts_itself_alone(history: History) -> Iterator[str]:
    """A poison run is blocked, and its partition goes on behind it."""
    for run_id, workflow in history.poisons.items():
        log = history.logs.get(run_id, [])
        blocked = [w for w in log if isinstance(w.event.data, ev.RunBlocked)]
        if not blocked or log[-1].event.type not in {"run_blocked", "step_started", "step_completed"}:
            yield f"{run_id} of {workflow} is not blocked: {[w.event.type for w in log]}"
            continue
        partition, since = blocked[-1].partition, blocked[-1].written_at
        others = (w for other, found in history.logs.items() if other not in history.poisons for w in found)
        last = max((w.written_at for w in others if w.partition == partition), default=0)
        if last <= since and any(end > since for end in _starts(history)):
            yield f"{run_id} of {workflow} is blocked since {since}, and partition {partition} has not advanced since"


def steps_that_ran_are_known(history: History) -> Iterator[str]:
    """No worker was ever given a step that its run's log does not know: requests that go out early come true.

    Those of a poison run that is blocked before it began come true when it goes on: what ended its owners has undone the
    transactions that knew them.
    """
    unbegun = {
        run_id
        for run_id in history.poisons
        if [w.event.type for w in history.logs.get(run_id, ())] == ["run_created", "run_blocked"]
    }
    created = {
        (run_id, w.event.correlation_id)
        for run_id, log in history.logs.items()
        for w in log
        if isinstance(w.event.data, ev.StepCreated)
    }
    for step, run in sorted({(e.step, e.run) for e in history.ledger}):
        if (run, step) not in created and run not in unbegun:
            yield f"{run}: {step} was run, and its log does not know it"


def only_faults_repeat_steps(history: History) -> Iterator[str]:
    """An attempt runs a second time only where a fault came into the time between."""
    for executions in repeated(history.ledger):
        if cause(executions, history) is None:
            e = executions[0]
            times = [x.at - e.at for x in executions]
            yield f"{e.run}: attempt {e.attempt} of {e.step} ran {len(executions)} times, at {times} ms, with no fault about"


def steps_that_ran_are_run(history: History) -> Iterator[str]:
    """A result that counts was made by an execution that the ledger has."""
    ran = {(e.step, e.attempt, e.run) for e in history.ledger}
    for run_id, log in history.logs.items():
        for w in log:
            data = w.event.data
            if isinstance(data, ev.StepCompleted) and (w.event.correlation_id, data.attempt, run_id) not in ran:
                yield f"{run_id}: {w.event.correlation_id} has a result of attempt {data.attempt}, which never ran"


def stores_hold_what_was_committed(history: History) -> Iterator[str]:
    """Nothing of an aborted transaction is in the store of any processor."""
    yield from history.strangers


RULES: tuple[Callable[[History], Iterator[str]], ...] = (
    nothing_is_lost,
    results_are_right,
    clients_are_told_the_truth,
    attempts_are_accepted_once,
    resumes_count_once,
    streams_are_complete,
    readers_see_the_same,
    letters_are_written_once,
    poison_hurts_itself_alone,
    steps_that_ran_are_known,
    steps_that_ran_are_run,
    only_faults_repeat_steps,
    stores_hold_what_was_committed,
)

_ENDS = {ev.RunCompleted: "completed", ev.RunFailed: "failed", ev.RunCancelled: "cancelled"}
_EXPECTED = {STREAM, PLAIN, tuple(range(10, 20))}


# -- what is counted -----------------------------------------------------------------------------------------------


def repeated(ledger: list[Execution]) -> list[list[Execution]]:
    """The attempts that ran more than once, each with its executions in the order of time."""
    by_attempt: dict[tuple[str, str, int], list[Execution]] = defaultdict(list)
    for execution in ledger:
        by_attempt[execution.run, execution.step, execution.attempt].append(execution)
    return [sorted(found, key=lambda e: e.at) for found in by_attempt.values() if len(found) > 1]


def cause(executions: list[Execution], history: History) -> str | None:
    """The fault that an attempt was repeated for: one that hit its worker, else everybody, else anybody at the time."""
    first, last = executions[0], executions[-1]
    about = [f for f in history.injected if f.begin <= last.at and f.end + AFTERMATH_MS >= first.at]
    mine = {e.pid for e in executions[:-1]}
    for fault in about:
        if mine & set(fault.pids):
            return f"{fault.name} of its worker"
    for fault in about:
        if fault.name in ABROAD:
            return fault.name
    if about:
        return f"{about[-1].name} of another process"
    if any(first.at - AFTERMATH_MS <= e.at <= last.at for e in history.exits):
        return "a process that ended by itself"
    return None


def repeated_after_result(history: History) -> list[Execution]:
    """The executions that began when the log had the step's result already."""
    results = {
        (run_id, w.event.correlation_id): w.written_at
        for run_id, log in history.logs.items()
        for w in log
        if isinstance(w.event.data, ev.StepCompleted)
    }
    return [
        e
        for executions in repeated(history.ledger)
        for e in executions[1:]
        if (at := results.get((e.run, e.step))) is not None and e.at > at
    ]


def take_overs(history: History) -> list[int]:
    """Of each SIGKILL of a processor that no other fault overlaps: ms until every partition has advanced again."""
    partitions: dict[int, list[int]] = defaultdict(list)
    for log in history.logs.values():
        for written in log:
            partitions[written.partition].append(written.written_at)
    for times in partitions.values():
        times.sort()
    took = []
    for fault in history.injected:
        others = [f for f in history.injected if f is not fault]
        lonely = all(f.end + AFTERMATH_MS < fault.begin or f.begin > fault.begin + AFTERMATH_MS for f in others)
        if not fault.name.startswith("sigkill") or "processor" not in fault.target or not lonely:
            continue
        after = [next((t for t in times if t > fault.begin), None) for times in partitions.values()]
        if all(t is not None for t in after):
            took.append(max(t - fault.begin for t in after if t is not None))
    return took


# -- reading -------------------------------------------------------------------------------------------------------


def _accepted(chunks: list[StreamChunk], namespace: str) -> list[tuple[str, Any]]:
    """The chunks of a stream that count, by the rule that docs/streams.md gives to consumers: (writer, value)."""
    last: dict[str, int] = {}
    found = []
    for chunk in chunks:
        if chunk.kind == "END" and chunk.namespace in {"", namespace}:
            break
        if chunk.namespace == namespace and chunk.n > last.get(chunk.writer, 0):
            assert chunk.payload is not None
            last[chunk.writer] = chunk.n
            found.append((chunk.writer, payloads.load(chunk.payload)))
    return found


def counted(chunks: list[StreamChunk], namespace: str) -> dict[str, list[Any]]:
    """Of each writer of a stream, the values that count."""
    by_writer = sorted(_accepted(chunks, namespace), key=lambda pair: pair[0])  # stable: each writer's order stays
    return {writer: [value for _, value in pairs] for writer, pairs in groupby(by_writer, key=lambda pair: pair[0])}


def _argument(created: ev.RunCreated) -> Any:
    args, kwargs = payloads.load_arguments(created.input, _one)
    return args[0] if args else kwargs["n"]


def _one(n: Any) -> None:
    """What every workflow of the harness takes."""


def _ended(log: list[Any]) -> bool:
    return bool(log) and type(log[-1].event.data) in _ENDS


def _starts(history: History) -> list[int]:
    return [log[0].written_at for run_id, log in history.logs.items() if run_id not in history.poisons and log]
