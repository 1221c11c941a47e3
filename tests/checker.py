"""Reads nothing but the topics, and says what is wrong with a history."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING

from durably.broker.port import TP, End, Message
from durably_schemas import Codec
from durably_schemas import events as ev
from durably_schemas.records import Event

if TYPE_CHECKING:
    from collections.abc import Iterable

    from durably.broker.port import Broker
    from durably_schemas import Catalogue
    from durably_schemas.records import Record

TERMINAL = (ev.RunCompleted, ev.RunFailed, ev.RunCancelled)


def read(broker: Broker, topic: str) -> list[tuple[Message, Record]]:
    """Everything committed on a topic now, decoded; in the order of each partition."""
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
            found.append((item, codec.decode(item.value)))
            if item.offset + 1 >= ends[tp]:
                left.discard(tp)
    reader.close()
    return found


def violations(broker: Broker, catalogue: Catalogue, started: Iterable[str]) -> list[str]:
    """What breaks the promise in the logs of these runs: gaps, doubles, several ends, several results, no end."""
    logs: dict[str, list[Event]] = defaultdict(list)
    for _, event in read(broker, catalogue.events):
        assert isinstance(event, Event)
        logs[event.run_id].append(event)
    wrong: list[str] = []
    for run_id in started:
        log = logs.pop(run_id, [])
        if [e.seq for e in log] != list(range(1, len(log) + 1)):
            wrong.append(f"{run_id}: seq {[e.seq for e in log]}")
        ends = [e.type for e in log if isinstance(e.data, TERMINAL)]
        if len(ends) != 1 or log[-1].type != ends[0]:
            wrong.append(f"{run_id}: ends {ends}, last {log[-1].type if log else None}")
        results = Counter(e.correlation_id for e in log if isinstance(e.data, ev.StepCompleted | ev.StepFailed))
        wrong += [f"{run_id}: {step} has {n} results" for step, n in results.items() if n > 1]
        created = {e.correlation_id for e in log if isinstance(e.data, ev.StepCreated)}
        wrong += [f"{run_id}: {step} has a result but was never created" for step in results.keys() - created]
    wrong += [f"{run_id}: a log that nobody started" for run_id in logs]
    return wrong
