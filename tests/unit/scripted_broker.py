"""A broker in memory, and a processor that answers commands by a script: the network of the client's tests."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field

from durably import health, payloads
from durably.broker.port import TP, End, Headers, Message, TopicState
from durably.errors import BrokerError
from durably_schemas import Catalogue, Codec, events
from durably_schemas.catalogue import partition_for
from durably_schemas.records import (
    CancelRun,
    Error,
    Event,
    Payload,
    QueryRun,
    Record,
    Reply,
    ReplyTo,
    ResetRun,
    RunSummary,
    StartRun,
    StreamChunk,
)  # fmt: skip

CODEC = Codec()


class ScriptedBroker:
    """The broker port, as far as a client uses it. A record sent is readable at once, and acknowledged by a poll."""

    url = "memory:"
    max_record_bytes = 100_000

    def __init__(self, catalogue: Catalogue, *, topics: bool = True) -> None:
        self.catalogue = catalogue
        self.changed = threading.Condition(threading.RLock())
        self.states: dict[str, TopicState] = {}
        self.logs: dict[TP, list[Message]] = defaultdict(list)
        self.sent: list[Record] = []
        self.headers: list[Headers] = []  # of what was sent
        self.heads: dict[TP, int] = {}
        self.on_command = lambda command: None
        self.acknowledges = True
        self.breaks: Exception | None = None
        self.closed = False
        if topics:
            self.create(catalogue.topics())

    def put(self, topic: str, record: Record, *, key: str | None = None, partition: int = 0) -> None:
        with self.changed:
            encoded = None if key is None else key.encode()
            tp = TP(topic, partition if encoded is None else partition_for(encoded, self.partitions(topic)))
            log, now = self.logs[tp], time.time_ns() // 1_000_000
            log.append(Message(*tp, len(log), now, encoded, CODEC.encode(record), ()))
            self.changed.notify_all()

    # the port

    def producer(self) -> Producer:
        return Producer(self)

    def reader(self, positions, *, committed=True) -> Reader:
        return Reader(self, dict(positions))

    def end_offsets(self, tps, *, committed=False, timeout=30.0):
        return {tp: len(self.logs[tp]) for tp in tps}

    def start_offsets(self, tps, *, timeout=30.0):
        return {tp: self.heads.get(tp, 0) for tp in tps}

    def offsets_at(self, tps, timestamp, *, timeout=30.0):
        def first(tp: TP) -> int:
            found = (m.offset for m in self.logs[tp] if m.timestamp >= timestamp)
            return max(self.heads.get(tp, 0), next(found, len(self.logs[tp])))

        return {tp: first(tp) for tp in tps}

    def partitions(self, topic, timeout=10.0):
        return self.states[topic].partitions if topic in self.states else 0

    def describe(self, names, timeout=30.0):
        return {name: self.states[name] for name in names if name in self.states}

    def topics(self, timeout=30.0):
        return list(self.states)

    def require(self, acls, timeout=10.0):
        pass

    def create(self, topics, timeout=30.0):
        for topic in topics:
            self.states.setdefault(topic.name, TopicState(topic.partitions, topic.config))

    def close(self) -> None:
        self.closed = True


class Producer:
    def __init__(self, broker: ScriptedBroker) -> None:
        self.broker = broker
        self.acks: list = []

    def send(self, topic, value, *, key=None, partition=None, headers=(), on_ack=None):
        catalogue = self.broker.catalogue
        assert topic in (catalogue.commands, catalogue.streams, catalogue.requests("default"))
        record = CODEC.decode(value)
        with self.broker.changed:
            self.broker.put(topic, record, key=key.decode())
            self.broker.sent.append(record)
            self.broker.headers.append(headers)
            self.acks.append(on_ack)
            self.broker.changed.notify_all()
        if topic == self.broker.catalogue.commands:
            self.broker.on_command(record)

    def poll(self, timeout=0.0):
        with self.broker.changed:
            self.broker.changed.wait_for(lambda: self.acks and self.broker.acknowledges, timeout)
            due = self.acks if self.broker.acknowledges else []
            self.acks = [] if self.broker.acknowledges else self.acks
        for on_ack in due:
            on_ack(None, 0)

    def flush(self, timeout):
        self.poll(timeout)
        return len(self.acks)

    def close(self):
        self.flush(0)


class Reader:
    def __init__(self, broker: ScriptedBroker, positions: dict[TP, int]) -> None:
        self.broker = broker
        self.positions = positions
        self.exhausted: dict[TP, int] = {}

    def poll(self, timeout, limit=500):
        with self.broker.changed:
            found: list[Message | End] = []
            self.broker.changed.wait_for(lambda: self.broker.breaks or self._take(found), timeout)
            if self.broker.breaks is not None:
                raise self.broker.breaks
            return found

    def _take(self, found: list[Message | End]) -> bool:
        for tp in self.positions:
            new = self.broker.logs[tp][self.positions[tp] :]
            found += new
            self.positions[tp] += len(new)
            if self.exhausted.get(tp) != self.positions[tp]:
                self.exhausted[tp] = self.positions[tp]
                found.append(End(*tp, self.positions[tp]))
        return bool(found)

    def close(self) -> None:
        pass


@dataclass
class ScriptedRun:
    summary: RunSummary
    log: list[Event] = field(default_factory=list)
    result: Payload | None = None
    waiting: list[ReplyTo] = field(default_factory=list)


class ScriptedProcessor:
    """Answers what it is sent. ``deaf`` commands are lost; ``page`` events go into one reply; workers serve ``queues``."""

    def __init__(self, broker: ScriptedBroker) -> None:
        self.broker = broker
        self.catalogue = broker.catalogue
        self.runs: dict[str, ScriptedRun] = {}
        self.deaf = 0
        self.page = 500
        self.queues = {"default"}
        broker.on_command = self.take

    def take(self, command: Record) -> None:
        if self.deaf:
            self.deaf -= 1
            return
        match command:
            case StartRun(workflow=health.WORKFLOW):
                self.served(command)
            case StartRun():
                self.start(command.run_id, command.workflow, command)
            case CancelRun() | QueryRun() | ResetRun() if command.run_id not in self.runs:
                self.reply(command.reply_to, Reply(request_id="", run_id=command.run_id, status="NOT_FOUND"))
            case CancelRun():
                self.end(command.run_id, "cancelled", events.RunCancelled(reason=command.reason))
                self.reply(command.reply_to, Reply(request_id="", summary=self.runs[command.run_id].summary))
            case ResetRun() if command.to_event > len(self.runs[command.run_id].log):
                refusal = Reply(request_id="", status="REFUSED", message=f"there is no event {command.to_event}")
                self.reply(command.reply_to, refusal)
            case ResetRun():
                new = self.start(command.new_run_id, self.runs[command.run_id].summary.workflow)
                self.reply(command.reply_to, Reply(request_id="", summary=new.summary))
            case QueryRun():
                self.query(self.runs[command.run_id], command)

    def served(self, command: StartRun) -> None:
        """Answers as the processor does when a worker of the queue has, where one serves it."""
        if command.attributes[health.QUEUE] in self.queues:
            told = Payload(content_type=payloads.JSON, data=b'{"worker":"w1","took_ms":3}')
            self.reply(command.reply_to, Reply(request_id="", run_id=command.run_id, result=told))

    def query(self, run: ScriptedRun, command: QueryRun) -> None:
        summary = run.summary
        match command.what:
            case "SUMMARY":
                self.reply(command.reply_to, Reply(request_id="", summary=summary))
            case "EVENTS":
                page = run.log[command.from_seq - 1 :][: self.page]
                after = page[-1].seq + 1 if page and page[-1].seq < len(run.log) else None
                encoded = tuple(CODEC.encode(e) for e in page)
                self.reply(command.reply_to, Reply(request_id="", summary=summary, events=encoded, next_seq=after))
            case "RESULT":
                run.waiting.append(command.reply_to)
                self.wake(run)

    def start(self, run_id: str, workflow: str = "greet", command: StartRun | None = None) -> ScriptedRun:
        if run_id not in self.runs:
            now = time.time_ns() // 1_000_000
            attributes = command.attributes if command is not None else {}
            summary = RunSummary(
                run_id=run_id, workflow=workflow, status="running", created_at=now, events=0, attributes=attributes
            )
            self.runs[run_id] = ScriptedRun(summary)
            made = command.input if command is not None else payloads.dump([[], {}], "input")
            self.event(run_id, events.RunCreated(workflow=workflow, input=made, attributes=attributes))
            self.change(run_id, status="running")
        return self.runs[run_id]

    def event(self, run_id: str, data: events.EventData, of: str | None = None) -> None:
        run = self.runs[run_id]
        event = events.event(run_id, len(run.log) + 1, time.time_ns() // 1_000_000, data, of)
        run.log.append(event)
        self.broker.put(self.catalogue.events, event, key=run_id)

    def change(self, run_id: str, **fields: object) -> None:
        run = self.runs[run_id]
        old = {name: getattr(run.summary, name) for name in RunSummary.__struct_fields__}
        run.summary = RunSummary(**{**old, "events": len(run.log), **fields})
        self.broker.put(self.catalogue.runs, run.summary, key=run_id)
        self.wake(run)

    def end(self, run_id: str, status: str, data: events.EventData, error: Error | None = None) -> None:
        self.event(run_id, data)
        self.change(run_id, status=status, error=error, completed_at=time.time_ns() // 1_000_000)

    def complete(self, run_id: str, value: object) -> None:
        payload = payloads.dump(value, "result")
        self.runs[run_id].result = payload
        self.end(run_id, "completed", events.RunCompleted(result=payload))

    def chunk(self, run_id: str, namespace: str, n: int, value: object = None, *, writer: str = "w", end: bool = False):
        payload = None if end else payloads.dump(value, "chunk")
        record = StreamChunk(
            run_id=run_id, namespace=namespace, writer=writer, n=n, kind="END" if end else "DATA", at=0, payload=payload
        )
        self.broker.put(self.catalogue.streams, record, key=run_id)

    def wake(self, run: ScriptedRun) -> None:
        if run.summary.status in ("completed", "failed", "cancelled", "blocked"):
            waiting, run.waiting = run.waiting, []
            for to in waiting:
                self.reply(to, Reply(request_id="", summary=run.summary, result=run.result))

    def reply(self, to: ReplyTo, reply: Reply) -> None:
        fields = {name: getattr(reply, name) for name in Reply.__struct_fields__}
        record = Reply(**{**fields, "request_id": to.request_id})
        self.broker.put(self.catalogue.replies, record, partition=to.partition)


UNREADABLE = BrokerError("the reader is broken")
