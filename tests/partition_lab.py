"""A partition driven by hand: the tests are Kafka."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import msgspec
from durably import create_hook, sleep, step
from durably.authoring import Registry, WorkflowDefinition
from durably.broker import connect
from durably.broker.port import TP, Broker, End, Message
from durably.failures import to_error
from durably.payloads import dump, dump_arguments, load
from durably_processor.engine.execution import Environment
from durably_processor.partition import Partition
from durably_processor.restore import Restore
from durably_processor.state.store import CHECKPOINT, SNAPSHOTS, Store, event_key
from durably_processor.turn import Part, Turn
from durably_schemas import Catalogue, Codec
from durably_schemas import records as rec
from durably_schemas.codec import MARKER
from engine_bench import step_result

T0 = 1_700_000_000_000
CATALOGUE = Catalogue("lab", 1)
CODEC = Codec()


@step(max_retries=1, backoff="10s")
async def doing(x: int) -> int:
    return x


async def chain(n: int) -> int:
    for i in range(n):
        await doing(i)
    return n


async def napping(n: int) -> int:
    await doing(0)
    await sleep(60)
    await doing(1)
    return n


async def fanning(n: int) -> list[int]:
    import asyncio

    return await asyncio.gather(*(doing(i) for i in range(n)))


async def hooked(n: int) -> list[object]:
    hook = create_hook(token="order-7" if n else None, metadata={"n": n})
    return [await hook for _ in range(max(1, n))]


class Lab:
    """Partition 0 of a namespace with one partition; the test is Kafka."""

    def __init__(self, folder: Path, **options) -> None:
        self.folder = folder
        self.options = options
        self.registry = Registry()
        for fn in (chain, napping, fanning, hooked):
            self.registry.workflows[fn.__name__] = WorkflowDefinition(fn.__name__, fn)
        self.environment = Environment(self.registry, 1_000_000, {"default"}, lambda _: nullcontext())
        self.logs: dict[str, list[Message]] = {CATALOGUE.commands: [], CATALOGUE.results: [], CATALOGUE.signals: []}
        self.events: list[tuple[bytes, bytes]] = []
        self.copies: list[tuple[bytes, bytes | None]] = []
        self.number = self.acked = 0
        self.now = T0
        self.store = Store(folder / "store")
        self.take_over(dict.fromkeys(self.logs, 0))

    def take_over(self, positions: dict[str, int]) -> None:
        self.positions = dict(positions)
        self.partition = Partition(
            0,
            self.store,
            self.environment,
            CODEC,
            CATALOGUE,
            positions=dict(positions),
            ends={topic: len(log) for topic, log in self.logs.items()},
            now=lambda: self.now,
            **self.options,
        )

    def put(self, topic: str, record: rec.Record | bytes, key: bytes | None = None) -> Message:
        value = record if isinstance(record, bytes) else CODEC.encode(record)
        if key is None:
            key = (record.token if isinstance(record, rec.ResumeHook) else record.run_id).encode()
        message = Message(topic, 0, len(self.logs[topic]), self.now, key, value, ())
        self.logs[topic].append(message)
        return message

    def start(self, name: str, n: int, run_id: str = "r1") -> Message:
        payload = dump_arguments(self.registry.workflows[name].fn, (n,), {}, name)
        return self.put(
            CATALOGUE.commands, rec.StartRun(run_id=run_id, workflow=name, input=payload, requested_at=0, nonce="n")
        )

    def answer(self, request: rec.StepRequest, error: Exception | None = None) -> Message:
        outcome: rec.StepSucceeded | rec.StepFailed = rec.StepSucceeded(
            result=dump(load(request.input)[0][0], "result")
        )
        if error is not None:
            outcome = rec.StepFailed(error=to_error(error))
        return self.put(
            CATALOGUE.results,
            step_result(request, outcome, self.now),
        )

    def signals(self, part: Part) -> list[Message]:
        """What a turn has signalled, delivered."""
        found = [o for o in part.outputs if o.topic == CATALOGUE.signals]
        return [self.put(CATALOGUE.signals, o.value, o.key) for o in found]

    def turn(self, *messages: Message | End) -> Part:
        turn = Turn(self.number + 1, self.acked)
        for message in messages:
            self.partition.handle(message, turn)
        self.partition.end_turn(turn)
        self.number += bool(turn.parts)  # as in a processor: a turn without consequences is never committed
        part = turn.parts.get(0, Part(self.store))
        self.pending = part
        return part

    def commit(self, part: Part) -> Part:
        self.events += part.events
        self.copies += part.copies
        checkpoints = {CHECKPOINT: len(self.events), SNAPSHOTS: len(self.copies)}
        self.store.write(part.changes | {key: offset.to_bytes(8, "big") for key, offset in checkpoints.items()})
        self.acked = self.number
        return part

    def settle(self, *messages: Message | End) -> Part:
        return self.commit(self.turn(*messages))


def publish(lab: Lab, broker: Broker, since: int = 0, below: int = 0) -> None:
    """Writes what was committed to a broker: the events from one on, and of these none below another is kept."""
    producer = broker.producer()
    for topic, records in ((CATALOGUE.snapshots, lab.copies), (CATALOGUE.events, lab.events[since:])):
        for key, value in records:
            producer.send(topic, value, key=key, partition=0)
            producer.flush(10)  # a batch each: the broker drops nothing less
    producer.close()
    broker.truncate({TP(CATALOGUE.events, 0): below})


def finish(restore: Restore) -> None:
    """Restores everything."""
    while not restore.step(1):
        pass


@contextmanager
def rebuilt(lab: Lab, folder: Path, below: int = 0) -> Iterator[tuple[Store, Restore]]:
    """A store that is made anew of what was committed, but for the events ``below``; and what it was made by."""
    broker = connect(f"embedded:{folder}/broker")
    broker.create(CATALOGUE.topics())
    publish(lab, broker, below=below)
    store = Store(folder / "rebuilt")
    finish(Restore(0, store, broker, CATALOGUE, CODEC))
    yield store, Restore(0, store, broker, CATALOGUE, CODEC)
    store.close()
    broker.close()
    shutil.rmtree(folder / "broker")
    shutil.rmtree(folder / "rebuilt")


def content(store: Store, kinds: bytes) -> dict[bytes, bytes]:
    """What a store holds under keys that begin with one of these letters; what recovery left packed, unpacked."""
    found = {}
    for key, value in store._db.items():
        if key[:1] not in kinds:
            continue
        if key[:1] == b"e":
            run_id, last = key[3:-8].decode(), int.from_bytes(key[-8:], "big")
            values = [value] if value[:2] == MARKER else msgspec.msgpack.decode(value)
            found |= {event_key(run_id, n): v for n, v in enumerate(values, last + 1 - len(values))}
        elif key[:1] == b"r" and not value:
            found[key] = msgspec.msgpack.encode(store.state(key[3:].decode()).header)
        else:
            found[key] = value
    return found


def requests(part: Part, early: bool) -> list[rec.StepRequest]:
    outputs = part.early if early else [o for o in part.outputs if o.topic == CATALOGUE.requests("default")]
    return [CODEC.decode_as(rec.StepRequest, o.value) for o in outputs]
