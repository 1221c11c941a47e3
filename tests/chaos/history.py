"""What is left of a chaos run: the topics, the stores, the ledger, and what clients were told. Read, and not judged."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import checker
import msgspec
from durably.broker.port import TP, End
from durably_processor.state.store import Store, StoreDamaged, event_key
from durably_schemas import Codec
from durably_schemas import events as ev
from durably_schemas.codec import MARKER
from durably_schemas.records import DeadLetter, Event, StreamChunk

if TYPE_CHECKING:
    from durably.broker.port import Broker
    from durably_schemas import Catalogue

    from chaos.faults import Injected
    from chaos.fleet import Exit


class Written(NamedTuple):
    """An event as it lies on its topic. ``written_at``: the broker's time, ms."""

    event: Event
    partition: int
    written_at: int


class Execution(NamedTuple):
    """A step began, in this process, at this time (ms)."""

    run: str
    step: str
    attempt: int
    pid: int
    at: int


@dataclass
class History:
    """All that the verdict is about.

    Attributes:
        logs: of each run, in the order of the topic.
        chunks: of each run, in the order of the topic.
        letters: the place that each dead letter names, with the key that was found there.
        ledger: the executions of steps.
        started: the workflow of each run whose start was acknowledged.
        poisons: the runs that must be blocked.
        unreadable: the places of the records that must become dead letters.
        told, read: what clients were told of runs, and read of their streams ``log``.
        injected, exits: the faults, and the processes that ended by themselves.
        strangers: of each processor, the events in its stores that differ from the topic's.
        aborted: how many events were written in transactions that were aborted.
    """

    logs: dict[str, list[Written]] = field(default_factory=lambda: defaultdict(list))
    chunks: dict[str, list[StreamChunk]] = field(default_factory=lambda: defaultdict(list))
    letters: list[tuple[str, int, int, str]] = field(default_factory=list)
    ledger: list[Execution] = field(default_factory=list)
    started: dict[str, str] = field(default_factory=dict)
    poisons: dict[str, str] = field(default_factory=dict)
    unreadable: set[tuple[str, int, int]] = field(default_factory=set)
    told: dict[str, tuple[str, Any]] = field(default_factory=dict)
    read: dict[str, list[Any]] = field(default_factory=dict)
    injected: list[Injected] = field(default_factory=list)
    exits: list[Exit] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)
    aborted: int = 0


def read_topics(broker: Broker, catalogue: Catalogue) -> History:
    """What the topics say."""
    history = History()
    for message, record in checker.read(broker, catalogue.events):
        assert isinstance(record, Event)
        if not isinstance(record.data, ev.TokenClaimed | ev.TokenReleased):
            history.logs[record.run_id].append(Written(record, message.partition, message.timestamp))
    for _, record in checker.read(broker, catalogue.streams):
        assert isinstance(record, StreamChunk)
        history.chunks[record.run_id].append(record)
    for _, record in checker.read(broker, catalogue.dead_letters):
        assert isinstance(record, DeadLetter)
        history.letters.append((record.topic, record.partition, record.offset, (record.key or b"").decode("latin-1")))
    history.aborted = _written(broker, catalogue.events, committed=False) - _written(broker, catalogue.events)
    return history


def _written(broker: Broker, topic: str, *, committed: bool = True) -> int:
    """How many records a topic holds, with or without those of aborted transactions."""
    tps = [TP(topic, p) for p in range(broker.partitions(topic))]
    ends = broker.end_offsets(tps, committed=committed)
    left = {tp for tp in tps if ends[tp] > 0}
    reader = broker.reader(dict.fromkeys(tps, 0), committed=committed)
    count = 0
    while left:
        for item in reader.poll(1.0):
            if not isinstance(item, End):
                count += 1
            if item.offset + (not isinstance(item, End)) >= ends[TP(item.topic, item.partition)]:
                left.discard(TP(item.topic, item.partition))
    reader.close()
    return count


def read_ledger(file: Path) -> list[Execution]:
    """What steps have noted, each at its beginning."""
    if not file.exists():
        return []
    return [Execution(**json.loads(line)) for line in file.read_bytes().splitlines()]


def strangers(history: History, stores: list[Path]) -> list[str]:
    """Events in the stores of processors that are not the topic's: nothing of an aborted transaction may stay there."""
    known = {event_key(run_id, w.event.seq): w.event for run_id, log in history.logs.items() for w in log}
    codec, found = Codec(), []
    for path in stores:
        if not (path / "CURRENT").exists():
            continue
        store = Store(path)
        try:
            for _, value in store._scan(b"e"):
                # One event, or what a rebuild has put together: a list, under the key of the last.
                for data in [value] if value[:2] == MARKER else msgspec.msgpack.decode(value, type=list[bytes]):
                    event = codec.decode_as(Event, data)
                    if known.get(event_key(event.run_id, event.seq)) != event:
                        found.append(f"{path.parts[-3]}/{path.name} holds an event that the topic does not: {event}")
        except StoreDamaged:
            continue  # nobody has opened it since a fault damaged it
        finally:
            store.close()
    return found
