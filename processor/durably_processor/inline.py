"""A processor without threads and without a group, for tests: one partition, advanced when somebody says so.

It is the real thing but for `durably_processor.processor`: a `Partition` over RocksDB, restored from the topics,
whose turns a `Committer` commits at once. `durably.testing` finds it by name: the SDK stands below it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import count
from pathlib import Path

from durably.authoring import Registry
from durably.broker.port import TP, Broker, Reader
from durably.failures import to_exception
from durably_schemas import Catalogue, Codec
from durably_schemas.records import Event

from durably_processor.committer import Committer, dispatch
from durably_processor.engine import guards
from durably_processor.engine.execution import Blocked, Environment, replay
from durably_processor.engine.state import OpenChild, OpenHook, OpenStep, RunState
from durably_processor.partition import Partition
from durably_processor.restore import Restore
from durably_processor.state.store import Store
from durably_processor.turn import Turn

NUMBER = 0
"""The one partition."""
RECORDS_A_TURN = 1_000
FOREVER = 1 << 62


class InlineProcessor:
    """Owns the only partition of an installation. Belongs to one thread.

    Args:
        broker: where the topics are; all of them exist.
        catalogue: their names, with one partition each.
        registry: the workflows, and the steps they call.
        folder: for its RocksDBs.
        now: the clock, in milliseconds since the epoch.
        always_replay: see `Partition`.
        gateway_url: the base of webhooks' URLs.
    """

    def __init__(
        self,
        broker: Broker,
        catalogue: Catalogue,
        registry: Registry,
        folder: Path,
        *,
        now: Callable[[], int],
        always_replay: bool = False,
        gateway_url: str | None = None,
    ) -> None:
        self._broker = broker
        self._catalogue = catalogue
        self._folder = folder
        self._now = now
        self._always_replay = always_replay
        self._codec = Codec()
        self._guarding = guards.install()
        # Nobody watches over how long code takes: it may stand at a breakpoint.
        self._environment = Environment(registry, broker.max_record_bytes, (), _unwatched, gateway_url)
        self._inputs = (catalogue.commands, catalogue.results, catalogue.signals)
        self._positions = dict.fromkeys(self._inputs, 0)
        self._plain = broker.producer()
        self._stores = count()
        self._number = 0
        self._take_over()

    def serve(self, queues: Collection[str]) -> None:
        """From now on these are the queues whose topics exist."""
        self._environment.queues = queues

    def turn(self) -> bool:
        """Handles and commits what is there now, and the timers that are due; False where there was nothing."""
        turn = Turn(self._number + 1, self._committer.acked)
        messages = self._reader.poll(0, RECORDS_A_TURN)
        for message in messages:
            self._partition.handle(message, turn)
        self._partition.end_turn(turn)
        dispatch(turn, self._plain)
        if not turn.parts:
            return bool(messages)
        self._committer.commit(turn)
        self._positions |= {tp.topic: offset for tp, offset in turn.parts[NUMBER].offsets.items()}
        self._number = turn.number
        return True

    def crash(self) -> None:
        """Loses everything that is in memory and on disk; takes over from the topics, as another process would."""
        self._let_go()
        self._take_over()

    def next_due(self) -> int | None:
        """When the next timer fires that is not due yet, in milliseconds since the epoch."""
        timers = self._store.timers(self._now() + 1, FOREVER)
        return timers[0].due if timers else None

    def state(self, run_id: str) -> RunState | None:
        """A run's state, as committed."""
        return self._store.state(run_id)

    def wants(self, run_id: str, step_id: str, attempt: int) -> bool:
        """Whether a run still waits for the result of an attempt."""
        state = self._store.state(run_id)
        step = None if state is None or state.terminal else state.step(step_id)
        return step is not None and step.attempt == attempt and step.status != "backoff"

    def obstacles(self, run_id: str) -> list[str]:
        """What a run waits for, but for time, in words."""
        state = self._store.state(run_id)
        if state is None:
            return ["its start: there is no such run"]
        found = []
        for item in state.items.values():
            if isinstance(item, OpenHook):
                found.append(f"hook {item.token!r}")
            elif isinstance(item, OpenChild):
                found.append(f"run {item.run_id!r}")
            elif isinstance(item, OpenStep):
                found.append(f"step {item.step!r}")
        return found

    def close(self) -> None:
        """Lets go of its files, and of the guards where they are its own."""
        self._let_go()
        if self._guarding:
            guards.uninstall()

    def _take_over(self) -> None:
        broker, catalogue, codec = self._broker, self._catalogue, self._codec
        self._number = 0
        self._store: Store = Store(self._folder / f"store-{next(self._stores)}")
        restore = Restore(NUMBER, self._store, broker, catalogue, codec)
        while not restore.step(1):
            pass
        positions = {TP(topic, NUMBER): offset for topic, offset in self._positions.items()}
        ends = broker.end_offsets(positions)
        self._reader: Reader = broker.reader(positions)
        transactions = broker.transactions("inline")
        self._committer: Committer = Committer(broker, catalogue, codec, self._plain, transactions, "inline")
        self._partition: Partition = Partition(
            NUMBER,
            self._store,
            self._environment,
            codec,
            catalogue,
            positions=dict(self._positions),
            ends={tp.topic: end for tp, end in ends.items()},
            now=self._now,
            always_replay=self._always_replay,
        )

    def _let_go(self) -> None:
        self._partition.drop()
        self._reader.close()
        self._store.close()


def check_history(log: Sequence[Event], registry: Registry) -> None:
    """Replays a run's log with the workflows of a registry.

    Raises:
        NonDeterminismError: the code does something else than what the log says; with what was expected and found.
        DeterminismError: the code does what only a step may do.
        RegistrationError: the registry has no such workflow.
        DurablyError: whatever else would block the run.
    """
    environment = Environment(registry, FOREVER, _Everything(), _unwatched)
    guarding = guards.install()
    try:
        _replay(log, environment)
    except Blocked as e:
        raise (e.__cause__ or to_exception(e.data.error)) from None
    finally:
        if guarding:
            guards.uninstall()


def _replay(log: Iterable[Event], environment: Environment) -> None:
    execution, _, backlog = replay(log, environment)
    try:
        for delivery in backlog:  # what reached the run while it was blocked is given to it when it is not any more
            execution.deliver(delivery)
    finally:
        execution.close()


class _Everything:
    """All queues there may be: where no step is run, none is missing."""

    def __contains__(self, _: object) -> bool:
        return True


def _unwatched(_: str) -> contextlib.nullcontext[None]:
    return contextlib.nullcontext()
