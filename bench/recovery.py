"""Measures what recovery and size cost: ``python bench/recovery.py --help``."""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import histories
import typer
from durably.broker import connect
from durably.broker.port import TP, End
from durably_processor.restore import Restore
from durably_processor.state.store import Store
from durably_schemas import Catalogue, Codec

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


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    app()
