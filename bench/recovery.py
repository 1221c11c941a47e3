"""Measures what recovery and size cost: ``python bench/recovery.py --help``."""

from __future__ import annotations

import logging
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import histories
import typer
from durably import create_hook, sleep
from durably.authoring import Registry, WorkflowDefinition
from durably.broker import connect
from durably.broker.port import TP, End, Message
from durably.client import Client
from durably.payloads import dump_arguments
from durably.worker import Worker
from durably_processor.answers import Answers
from durably_processor.engine.execution import Environment
from durably_processor.partition import Partition
from durably_processor.processor import Processor
from durably_processor.rebuild import Stretch
from durably_processor.restore import Restore
from durably_processor.state.store import Store
from durably_processor.turn import Part, Turn
from durably_schemas import Catalogue, Codec
from durably_schemas import records as rec

if TYPE_CHECKING:
    from durably.broker.port import Broker

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
Url = Annotated[
    str | None, typer.Option(help="kafka://host:port; without it, an embedded broker in a temporary folder.")
]


@app.callback()
def main() -> None:
    """Measures what recovery and size cost."""


@contextmanager
def installation(url: str | None) -> Iterator[tuple[Broker, Catalogue, Path]]:
    """A broker with the topics of a namespace of its own, of one partition each, and a folder."""
    folder = Path(tempfile.mkdtemp(prefix="durably-bench-"))
    broker = connect(url or f"embedded:{folder}/broker")
    catalogue = Catalogue(f"bench-{uuid.uuid4().hex[:8]}", 1)
    broker.create(catalogue.topics())
    try:
        yield broker, catalogue, folder
    finally:
        broker.close()
        shutil.rmtree(folder)


class Took(NamedTuple):
    """Seconds: by the clock, and of this process's time on all cores, which a busy machine stretches less."""

    clock: float
    cpu: float

    def __sub__(self, began: Took) -> Took:
        return Took(self.clock - began.clock, self.cpu - began.cpu)

    @classmethod
    def now(cls) -> Took:
        return cls(time.perf_counter(), time.process_time())


def read(broker: Broker, tp: TP) -> Took:
    """What only polling a partition takes."""
    target = broker.end_offsets([tp])[tp]
    began, position = Took.now(), 0
    reader = broker.reader({tp: 0})
    while position < target:
        for message in reader.poll(1, 2_000):
            position = message.offset if isinstance(message, End) else message.offset + 1
    took = Took.now() - began
    reader.close()
    return took


def rebuild(broker: Broker, catalogue: Catalogue, store: Store) -> Took:
    """What bringing a store up to date takes."""
    began = Took.now()
    restore = Restore(0, store, broker, catalogue, Codec())
    while not restore.step(0.05):
        pass
    return Took.now() - began


@app.command()
def restore(url: Url = None, events: int = 1_000_000, steps: int = 6, rounds: int = 3) -> None:
    """A RocksDB made anew of ``events``, beside a reader that only polls the same records."""
    with installation(url) as (broker, catalogue, folder):
        count = histories.write(broker, catalogue, events // (3 * steps + 3), steps)
        print(f"{count:,} events on {broker.url}")
        for number in range(rounds):
            raw = read(broker, TP(catalogue.events, 0))
            store = Store(folder / f"store-{number}")
            took = rebuild(broker, catalogue, store)
            store.close()
            size = sum(file.stat().st_size for file in store.path.iterdir())
            again = Store(folder / f"store-{number}")
            warm = rebuild(broker, catalogue, again)
            again.close()
            print(
                f"read {raw.clock:.2f} s, {raw.cpu:.2f} s of CPU; rebuilt {took.clock:.2f} s ({count / took.clock:,.0f}/s), "
                f"{took.cpu:.2f} s of CPU: {took.clock / raw.clock:.2f} times by the clock, {took.cpu / raw.cpu:.2f} by CPU; "
                f"warm {warm.clock * 1000:.0f} ms; RocksDB {size / count:.0f} bytes an event"
            )


def written(broker: Broker, catalogue: Catalogue) -> dict[str, int]:
    """Bytes of the keys and values on each topic."""
    found = {}
    for topic in catalogue.topics():
        tp = TP(topic.name, 0)
        reader, end, position, size = broker.reader({tp: 0}), broker.end_offsets([tp])[tp], 0, 0
        while position < end:
            for message in reader.poll(1, 2_000):
                if isinstance(message, End):
                    position = message.offset
                else:
                    position = message.offset + 1
                    size += len(message.key or b"") + len(message.value or b"")
        reader.close()
        found[topic.name.removeprefix(f"{catalogue.namespace}.")] = size
    return found


def sizes(runs: int, steps: int) -> dict[str, int]:
    """Bytes that runs with so many steps leave on each topic, and in RocksDB."""
    registry = Registry()
    registry.workflows["steps"] = WorkflowDefinition("steps", histories.steps)
    registry.steps[histories.measured.name] = histories.measured
    with installation(None) as (broker, catalogue, folder):
        ready = threading.Event()
        processor = Processor(broker, catalogue, registry, folder / "data", ready=ready.set)
        thread = threading.Thread(target=processor.run)
        thread.start()
        worker = Worker(broker, catalogue, registry, concurrency=100)
        worker.start()
        ready.wait(60)
        with Client(broker, namespace=catalogue.namespace) as client:
            started = [client.start("steps", steps) for _ in range(runs)]
            for run in started:
                run.result(600)
        worker.stop()
        worker.join()
        processor.stop()
        thread.join()
        found = written(broker, catalogue)
        store = Store(folder / "data" / "partition-0")
        store.flush()
        store.close()
        found["RocksDB"] = sum(file.stat().st_size for file in store.path.glob("*.sst"))
        return found


@app.command()
def size(runs: int = 1_000, steps: int = 10) -> None:
    """What a run, and each step of it, leaves on the topics and in RocksDB: keys and values, uncompressed on topics."""
    without, many_steps = sizes(runs, 0), sizes(runs, steps)
    for name, total in many_steps.items():
        of_run = without[name] / runs
        print(f"{name:20} {of_run:8.0f} bytes a run, and {(total / runs - of_run) / steps:8.0f} bytes a step")


class Kafka:
    """Stands where the committer and Kafka do: a partition is driven by hand, so that it alone is measured."""

    def __init__(self, folder: Path) -> None:
        self.catalogue = Catalogue("bench", 1)
        self.codec = Codec()
        self.now = histories.T0
        self.store = Store(folder / "partition-0")
        self.number = 0
        self.events = 0
        self._positions = dict.fromkeys((self.catalogue.commands, self.catalogue.results, self.catalogue.signals), 0)
        self.take_over()

    def take_over(self) -> None:
        """Begins with nothing in memory."""
        registry = Registry()
        for fn in (histories.steps, parked):
            registry.workflows[fn.__name__] = WorkflowDefinition(fn.__name__, fn)
        self.partition = Partition(
            0,
            self.store,
            Environment(registry, 1_000_000, {"default"}, lambda _: nullcontext()),
            self.codec,
            self.catalogue,
            positions=dict(self._positions),
            ends=dict(self._positions),
            now=lambda: self.now,
        )

    def message(self, topic: str, record: rec.Record, run_id: str) -> Message:
        """A record, as it is read."""
        self._positions[topic] += 1
        value = self.codec.encode(record)
        return Message(topic, 0, self._positions[topic] - 1, self.now, run_id.encode(), value, ())

    def start(self, run_id: str, workflow: str, *args: object) -> Message:
        """A StartRun."""
        payload = dump_arguments(parked if workflow == "parked" else histories.steps, args, {}, workflow)
        record = rec.StartRun(run_id=run_id, workflow=workflow, input=payload, requested_at=0, nonce="n")
        return self.message(self.catalogue.commands, record, run_id)

    def answer(self, part: Part) -> Message:
        """A worker's answer to the request of a turn."""
        (request,) = [self.codec.decode_as(rec.StepRequest, output.value) for output in part.early]
        return self.message(self.catalogue.results, histories.answer(request), request.run_id)

    def turn(self, *messages: Message) -> Part:
        """One turn, committed."""
        turn = Turn(self.number + 1, self.number)
        for message in messages:
            self.partition.handle(message, turn)
        self.partition.end_turn(turn)
        part = turn.parts.get(0, Part(self.store))
        self.number += bool(turn.parts)
        self.events += len(part.events)
        self.store.write(part.changes)
        return part


async def parked(seconds: float) -> None:
    if seconds:
        await sleep(seconds)
    else:
        await create_hook(token=None)


def memory() -> float:
    """MB of this process that are in RAM, but for files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise LookupError("RssAnon")


@app.command("parked")
def many(runs: int = 1_000_000, live: int = 40_000, due: int = 10_000) -> None:
    """Runs that sleep for a day or wait for a hook, and timers that are due in the same second; one partition."""
    folder = Path(tempfile.mkdtemp(prefix="durably-bench-"))
    kafka = Kafka(folder)
    print(f"{memory():.0f} MB before the first run")
    began = Took.now()
    templates = [kafka.turn(kafka.start(f"bench-{n:07}", "parked", 86_400 if n else 0)).events for n in range(2)]
    stretch = Stretch(kafka.store, kafka.codec, cut=False)
    for n in range(2, runs):
        (key, _), *_ = template = templates[n % 2]
        run_id = f"bench-{n:07}".encode()
        stretch.logs[run_id] += [value.replace(key, run_id) for _, value in template]
        if n % 50_000 == 0 or n == runs - 1:
            for piece in stretch.pieces():
                kafka.store.write(piece, logged=False)
    kafka.store.flush()
    took = Took.now() - began
    print(f"{runs:,} runs parked by recovery in {took.clock:.0f} s, {took.cpu:.0f} s of CPU; {memory():.0f} MB")
    kafka.take_over()
    for start in range(0, live, 1_000):
        kafka.turn(
            *(kafka.start(f"live-{n:07}", "parked", 86_400 if n % 2 else 0) for n in range(start, start + 1_000))
        )
        if (start + 1_000) % (live // 4) == 0:
            print(f"{start + 1_000:,} more parked as they came; {memory():.0f} MB")
    kafka.turn(*(kafka.start(f"due-{n:07}", "parked", 30) for n in range(due)))
    kafka.now += 31_000
    began, fired, turns, slowest, others = Took.now(), 0, 0, 0.0, 0
    while fired < due:
        turned = time.process_time()
        part = kafka.turn(kafka.start(f"other-{turns}", "steps", 0))
        ended = sum(kafka.codec.decode_as(rec.Event, value).type == "run_completed" for _, value in part.events)
        others += 1
        fired += ended - 1
        turns += 1
        slowest = max(slowest, time.process_time() - turned)
    took = Took.now() - began
    print(
        f"{due:,} timers of one second fired in {took.clock:.2f} s, {took.cpu:.2f} s of CPU, in {turns} turns, the "
        f"longest of {slowest * 1000:.0f} ms of CPU; {others} other runs went through meanwhile"
    )
    kafka.partition.drop()
    kafka.store.flush()
    began = time.perf_counter()
    kafka.take_over()
    took = time.perf_counter() - began
    size = sum(file.stat().st_size for file in kafka.store.path.iterdir())
    print(
        f"taken over in {took * 1000:.0f} ms; {memory():.0f} MB; RocksDB {size / (runs + live + due):.0f} bytes a run"
    )
    kafka.store.close()
    shutil.rmtree(folder)


@app.command("long")
def long_run(events: int = 100_000) -> None:
    """One run with so many events: what a step costs along the way, and the run's replay."""
    folder = Path(tempfile.mkdtemp(prefix="durably-bench-"))
    kafka = Kafka(folder)
    steps = events // 3
    part = kafka.turn(kafka.start("bench-long", "steps", steps))
    began = Took.now()
    for n in range(1, steps):
        part = kafka.turn(kafka.answer(part))
        if n % (steps // 5) == 0:
            took = Took.now() - began
            print(f"{kafka.events:,} events: {took.cpu / (steps // 5) * 1e6:.0f} us of CPU a step")
            began = Took.now()
    kafka.partition.drop()
    kafka.take_over()
    began = Took.now()
    kafka.turn(kafka.answer(part))
    took = Took.now() - began
    print(f"replayed after a restart in {took.clock:.2f} s, {took.cpu:.2f} s of CPU")
    assert kafka.store.state("bench-long").terminal  # type: ignore[union-attr]
    began, seq, pages = time.perf_counter(), 1, 0
    answers = Answers(kafka.store, kafka.codec)
    while seq is not None:
        seq, pages = answers.page("q", "bench-long", seq).next_seq, pages + 1  # type: ignore[assignment]
    print(f"its events queried in {pages} pages in {time.perf_counter() - began:.2f} s")
    began = time.perf_counter()
    assert answers.result("q", "bench-long") is not None
    print(f"its result in {(time.perf_counter() - began) * 1000:.1f} ms")
    kafka.store.close()
    shutil.rmtree(folder)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    app()
