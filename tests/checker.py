"""Reads nothing but the topics, and says what is wrong with a history."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from itertools import pairwise
from typing import TYPE_CHECKING

from durably import health
from durably.broker.port import TP, End, Message
from durably_schemas import Codec, CodecError
from durably_schemas import events as ev
from durably_schemas.records import Event, RunCopied, RunSummary, StartRun

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from durably.broker.port import Broker
    from durably_schemas import Catalogue
    from durably_schemas.records import Record

TERMINAL = {ev.RunCompleted: "completed", ev.RunFailed: "failed", ev.RunCancelled: "cancelled"}
STEP_ENDS = (ev.StepCompleted, ev.StepFailed, ev.StepCancelled)

Log = list[Event]


def read(broker: Broker, topic: str, *, lenient: bool = False) -> list[tuple[Message, Record]]:
    """Everything committed on a topic now, decoded; in the order of each partition.

    ``lenient``: what cannot be decoded is left out, as it must be where anybody may write.
    """
    tps = [TP(topic, p) for p in range(broker.partitions(topic))]
    reader = broker.reader(dict.fromkeys(tps, 0))
    ends = broker.end_offsets(tps, committed=True)
    left = {tp for tp in tps if ends[tp] > 0}
    codec, found = Codec(), []
    while left:
        for item in reader.poll(1.0):
            tp = TP(item.topic, item.partition)
            if isinstance(item, End):
                if item.offset >= ends[tp]:
                    left.discard(tp)
                continue
            try:
                if item.value is not None:  # else its run has been purged
                    found.append((item, codec.decode(item.value)))
            except CodecError:
                if not lenient:
                    raise
            if item.offset + 1 >= ends[tp]:
                left.discard(tp)
    reader.close()
    return found


def started(broker: Broker, catalogue: Catalogue) -> set[str]:
    """The runs that anybody asked for, workflows among them, and those that go on where others were; no round trips."""
    letters = {(x.topic, x.partition, x.offset) for _, x in read(broker, catalogue.dead_letters)}
    return {
        record.run_id
        for message, record in read(broker, catalogue.commands, lenient=True)
        if isinstance(record, StartRun)
        and record.workflow != health.WORKFLOW
        and (message.topic, message.partition, message.offset) not in letters
    } | {record.run_id for _, record in read(broker, catalogue.signals) if isinstance(record, RunCopied)}


def violations(
    broker: Broker, catalogue: Catalogue, started: Iterable[str], unfinished: Collection[str] = ()
) -> list[str]:
    """What breaks the promise in the logs of these runs, each of which must have ended unless it is ``unfinished``.

    Gaps, doubles, several ends, no end, time that goes back; several results of a step, a wait or a child; a resume that
    counted twice; a token with two holders, or one that outlives its run; a summary that says otherwise than its log.
    """
    logs: dict[str, Log] = defaultdict(list)
    held: dict[str, tuple[str, str]] = {}
    wrong: list[str] = []
    for _, event in read(broker, catalogue.events):
        assert isinstance(event, Event)
        if isinstance(event.data, ev.TokenClaimed | ev.TokenReleased):
            wrong += _about_token(event, held)
        else:
            logs[event.run_id].append(event)
    for run_id in started:
        wrong += _about_run(run_id, logs.get(run_id, []), ended=run_id not in unfinished)
    wrong += [f"{run_id}: a log that nobody started" for run_id in logs.keys() - set(started)]
    wrong += _between_runs(logs)
    for token, (run_id, _) in held.items():
        if _end_of(logs.get(run_id, [])):
            wrong.append(f"token {token}: held by {run_id}, which has ended")
    summaries = {r.run_id: r for _, r in read(broker, catalogue.runs) if isinstance(r, RunSummary)}
    for run_id, log in logs.items():
        wrong += _about_summary(run_id, log, summaries.get(run_id))
    return wrong


def settled(
    broker: Broker, catalogue: Catalogue, started: Iterable[str], unfinished: Collection[str] = (), timeout: float = 20
) -> list[str]:
    """The violations that are left when what follows the ends of runs, such as the release of tokens, has been done."""
    deadline = time.monotonic() + timeout
    started = list(started)
    while (wrong := violations(broker, catalogue, started, unfinished)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return wrong


def _about_token(event: Event, held: dict[str, tuple[str, str]]) -> Iterator[str]:
    """Of one claim or release, given who holds which token before it; notes who does after it."""
    data = event.data
    assert isinstance(data, ev.TokenClaimed | ev.TokenReleased)
    who, holder = (data.run_id, data.hook_id), held.get(data.token)
    claims = isinstance(data, ev.TokenClaimed)
    if event.run_id != f"token|{data.token}|{data.run_id}|{data.hook_id}" or event.seq != (1 if claims else 2):
        yield f"token {data.token}: {event.type} is #{event.seq} of log {event.run_id}"
    if claims:
        if holder is not None:
            yield f"token {data.token}: claimed by {who} while {holder} holds it"
        held[data.token] = who
    elif holder != who:
        yield f"token {data.token}: released by {who}, and {holder} holds it"
    else:
        del held[data.token]


def _about_run(run_id: str, log: Log, *, ended: bool) -> Iterator[str]:
    """Of one run, by its own log."""
    if [e.seq for e in log] != list(range(1, len(log) + 1)):
        yield f"{run_id}: seq {[e.seq for e in log]}"
    ends = [e.type for e in log if type(e.data) in TERMINAL]
    if (ended and len(ends) != 1) or (ends and (len(ends) > 1 or log[-1].type != ends[0])):
        yield f"{run_id}: ends {ends}, last {log[-1].type if log else None}"
    if any(later.at < earlier.at for earlier, later in pairwise(log)):
        yield f"{run_id}: time goes back in {[e.at for e in log]}"
    yield from _pairs(run_id, log, ev.StepCreated, STEP_ENDS)
    yield from _pairs(run_id, log, ev.WaitCreated, (ev.WaitCompleted,))
    yield from _pairs(run_id, log, ev.ChildCreated, (ev.ChildCompleted,))
    reset = next((place for place, e in enumerate(log) if isinstance(e.data, ev.RunReset)), 0)  # then claimed anew
    claimed = [e for e in log[:reset] if not isinstance(e.data, ev.HookGranted)] + log[reset:]
    yield from _pairs(run_id, claimed, ev.HookCreated, (ev.HookGranted, ev.HookConflict))
    yield from _attempts(run_id, log)
    yield from _hooks(run_id, log)


def _pairs(run_id: str, log: Log, opening: type[Record], closing: tuple[type[Record], ...]) -> Iterator[str]:
    """What is opened once, and has one result at most, which comes behind."""
    opened = Counter(e.correlation_id for e in log if isinstance(e.data, opening))
    results = Counter(e.correlation_id for e in log if isinstance(e.data, closing))
    for item, times in opened.items():
        if times > 1:
            yield f"{run_id}: {item} was created {times} times"
    for item, times in results.items():
        if times > 1:
            yield f"{run_id}: {item} has {times} results"
        if item not in opened:
            yield f"{run_id}: {item} has a result but was never created"


def _attempts(run_id: str, log: Log) -> Iterator[str]:
    limits = {e.correlation_id: e.data.max_retries + 1 for e in log if isinstance(e.data, ev.StepCreated)}
    for event in log:
        if isinstance(event.data, ev.StepStarted) and event.data.attempt > limits.get(event.correlation_id, 0):
            yield f"{run_id}: {event.correlation_id} is in its attempt {event.data.attempt}, which is one too many"


def _hooks(run_id: str, log: Log) -> Iterator[str]:
    resumes = Counter(e.data.resume_id for e in log if isinstance(e.data, ev.HookReceived))
    for resume_id, times in resumes.items():
        if times > 1:
            yield f"{run_id}: resume {resume_id} was received {times} times"
    opened: set[str | None] = set()
    for event in log:
        if isinstance(event.data, ev.HookCreated):
            opened.add(event.correlation_id)
        elif isinstance(event.data, ev.HookDisposed | ev.HookConflict):
            opened.discard(event.correlation_id)
        elif isinstance(event.data, ev.HookReceived) and event.correlation_id not in opened:
            yield f"{run_id}: {event.correlation_id} received data and is not open"


def _between_runs(logs: dict[str, Log]) -> Iterator[str]:
    """Of parents and their children."""
    for run_id, log in logs.items():
        told = {e.correlation_id: e.data for e in log if isinstance(e.data, ev.ChildCompleted)}
        for event in log:
            child = event.data
            if not isinstance(child, ev.ChildCreated):
                continue
            if child.workflow and child.child_run_id not in logs:
                yield f"{run_id}: its child {child.child_run_id} was never started"
            end, heard = _end_of(logs.get(child.child_run_id, [])), told.get(event.correlation_id)
            if heard is None:
                if end and not _end_of(log):
                    yield f"{run_id}: it does not know that its child {child.child_run_id} has ended"
            elif heard.status != end and child.child_run_id in logs:
                yield f"{run_id}: its child {child.child_run_id} is {end}, and it was told {heard.status}"
        created = log[0].data
        parent = created.parent if isinstance(created, ev.RunCreated) else None
        if parent is not None and not any(
            isinstance(e.data, ev.ChildCreated) and e.data.child_run_id == run_id
            for e in logs.get(parent.run_id, [])
            if e.correlation_id == parent.correlation_id
        ):
            yield f"{run_id}: its parent {parent.run_id} knows nothing of it"


def _about_summary(run_id: str, log: Log, summary: RunSummary | None) -> Iterator[str]:
    end = _end_of(log)
    if end and (summary is None or (summary.status, summary.events) != (end, len(log))):
        said = f"{summary.status} with {summary.events} events" if summary else "nothing"
        yield f"{run_id}: its log says {end} with {len(log)} events, its summary {said}"


def _end_of(log: Log) -> str | None:
    return TERMINAL.get(type(log[-1].data)) if log else None
