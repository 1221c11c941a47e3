"""A whole installation on threads of the test: processors, workers and a client on one broker and namespace."""

from __future__ import annotations

import itertools
import os
import random
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import checker
from durably.authoring import Registry, registry
from durably.broker import connect
from durably.client import Client, connection
from durably.errors import HookNotFoundError
from durably.worker import Worker
from durably_processor.engine import guards
from durably_processor.processor import Processor
from durably_schemas import Catalogue
from mortal import Dead, MortalBroker

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from durably.broker.port import Broker
    from durably.client.hooks import HookInfo

T = TypeVar("T")

PARTITIONS = 3
Mode = Literal["live", "replay", "restart"]
MODES: tuple[Mode, ...] = ("live", "replay", "restart")
_numbers = itertools.count(1)
PACE = {"embedded": (0.05, 0.4), "kafka": (1.5, 4.0)}
"""Seconds that a processor lives in the mode ``restart``, by the broker's scheme."""


def until(ready: Callable[[], T], timeout: float = 30) -> T:
    """What ``ready`` returns, as soon as that is true."""
    deadline = time.monotonic() + timeout
    while not (found := ready()):
        assert time.monotonic() < deadline, f"it did not become true within {timeout} s: {ready}"
        time.sleep(0.01)
    return found


class RunningProcessor:
    """A processor on a thread."""

    def __init__(self, processor: Processor, ready: threading.Event, broker: MortalBroker) -> None:
        self._processor = processor
        self._broker = broker
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        deadline = time.monotonic() + 60
        while not ready.wait(0.1):
            if self.error is not None or time.monotonic() > deadline:
                self.stop()
                raise TimeoutError("the processor is not ready") from self.error

    def _run(self) -> None:
        try:
            self._processor.run()
        except BaseException as e:
            self.error = e

    def stop(self) -> None:
        """A clean end: what is under way is committed."""
        self._processor.stop()
        self._thread.join(30)
        assert not self._thread.is_alive()

    def crash(self, *, committed: bool) -> None:
        """From now on nothing that it does has any effect; ``committed``: but for the next commit's, on the broker."""
        before = self.error
        self._broker.die(after_commit=committed)
        self.stop()
        if isinstance(self.error, Dead):
            self.error = before


class System:
    """What a test needs to start runs and see what becomes of them.

    Attributes:
        client: a client for the test.
        mode: how processors run: ``live``, ``replay`` (each run is evicted after each of its inputs), or ``restart``
            (processors end at random moments, and others succeed them).
        restarts: how many processors have succeeded another one.
    """

    def __init__(self, url: str, namespace: str, folder: Path, *, kafka: dict[str, str] | None = None) -> None:
        guards.install()
        self.url, self.namespace, self.folder = url, namespace, folder
        self.mode: Mode = "live"
        self.catalogue = Catalogue(namespace, PARTITIONS)
        self.broker: Broker = connect(url, kafka or {})
        self.broker.create(self.catalogue.topics(("default", "other")))
        self.client = Client(url, namespace=namespace)
        self.processors: list[RunningProcessor] = []
        self.workers: list[Worker] = []
        self.restarts = 0
        self._unfinished: set[str] = set()
        self._restarter: _Restarter | None = None

    def __repr__(self) -> str:
        how = f", seed {self._restarter.seed} (DURABLY_TEST_SEED)" if self._restarter else ""
        return f"<{self.url} namespace {self.namespace}: {self.mode}{how}>"

    # -- its parts -------------------------------------------------------------------------------------------------

    def begin(self, mode: Mode) -> None:
        """Starts a worker, and processors as the mode says."""
        self.mode = mode
        self.start_worker(lease_after=0.3, heartbeat_every=0.2)
        self.start_processor("p", always_replay=mode == "replay")
        if mode == "restart":
            self._restarter = _Restarter(self)
            self._restarter.start()

    def start_processor(
        self,
        name: str = "p",
        *,
        wait: bool = True,
        registry: Registry = registry,
        broker: Broker | None = None,
        **options: Any,
    ) -> RunningProcessor:
        """A processor with a data directory of this name; returns when it owns its partitions.

        ``broker``: its own way to the broker, where the system's is not to be its.
        """
        ready = threading.Event()
        if not wait:
            ready.set()
        mortal = MortalBroker(broker or self.broker)
        processor = Processor(mortal, self.catalogue, registry, self.folder / name, ready=ready.set, **options)
        running = RunningProcessor(processor, ready, mortal)
        self.processors.append(running)
        return running

    def start_worker(
        self, queues: Sequence[str] = ("default", "other"), *, registry: Registry = registry, **options: Any
    ) -> Worker:
        """A worker for these queues."""
        worker = Worker(self.broker, self.catalogue, registry, queues=queues, **options)
        worker.start()
        self.workers.append(worker)
        return worker

    def stop_processor(self, running: RunningProcessor) -> None:
        """Ends a processor cleanly."""
        self.processors.remove(running)
        running.stop()

    # -- what tests ask for ----------------------------------------------------------------------------------------

    def fresh(self, name: str) -> str:
        """A run ID or token that no other test uses, in this system or another."""
        return f"{name}-{next(_numbers)}"

    def leaves(self, *run_ids: str) -> None:
        """Declares runs that will not have ended when the system does."""
        self._unfinished |= {*run_ids}

    def hook(self, token: str) -> HookInfo:
        """The open hook with this token, as soon as there is one."""

        def found() -> HookInfo | None:
            try:
                return self.client.get_hook(token)
            except HookNotFoundError:
                return None

        return until(found)

    def types(self, run_id: str) -> list[str]:
        """The types of a run's events."""
        return [e.type for e in self.client.get_run(run_id).events()]

    # -- its end ---------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raises what ended a part of it that should still be there."""
        for running in list(self.processors):
            if running.error is not None:
                raise running.error
        for worker in self.workers:
            assert worker.error is None, worker.error
        if self._restarter is not None and self._restarter.error is not None:
            raise self._restarter.error

    def calm_down(self) -> None:
        """No more restarts; one processor is left."""
        if self._restarter is not None:
            self._restarter.stop()

    def violations(self) -> list[str]:
        """What is wrong with the history of all runs, and what became a dead letter."""
        asked_for = checker.started(self.broker, self.catalogue)
        wrong = checker.settled(self.broker, self.catalogue, asked_for, self._unfinished)
        return wrong + [f"dead letter: {x}" for _, x in checker.read(self.broker, self.catalogue.dead_letters)]

    def close(self) -> None:
        """Ends all parts."""
        self.calm_down()
        self.client.close()
        for worker in self.workers:
            worker.stop(5)
        for worker in self.workers:
            worker.join()
            assert worker.error is None, worker.error
        for running in self.processors:
            running.stop()
        self.broker.close()
        guards.uninstall()


class _Restarter:
    """Ends the system's processor at random moments, cleanly or by a crash, and starts its successor.

    A successor finds the store of its predecessor, an older one that has fallen behind, or none at all. Now and then it
    comes before its predecessor goes.
    """

    def __init__(self, system: System) -> None:
        self.seed = int(os.environ.get("DURABLY_TEST_SEED") or random.randrange(1 << 32))
        self.error: BaseException | None = None
        self._random = random.Random(self.seed)
        self._system = system
        self._pace = PACE[system.url.partition(":")[0]]
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="restarter")
        # A reply that a crash swallowed is asked for again: sooner here than a patient client would.
        self._patience, connection.FIRST_RESEND = connection.FIRST_RESEND, 0.1

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()
        connection.FIRST_RESEND = self._patience

    def _run(self) -> None:
        try:
            # Once at least, however soon the tests are through.
            while not self._stopping.wait(self._random.uniform(*self._pace)) or not self._system.restarts:
                self._restart()
        except BaseException as e:  # told to the next test that asks
            self.error = e

    def _restart(self) -> None:
        system, chance = self._system, self._random
        running = system.processors[0]
        system.restarts += 1
        fresh = f"new-{system.restarts}"
        rolling = chance.random() < 0.25
        if rolling:  # as in a deployment: both are there for a moment, and share the partitions
            system.start_processor(fresh)
        system.processors.remove(running)
        if chance.random() < 0.4:
            running.stop()
        else:
            running.crash(committed=chance.random() < 0.5)
        if running.error is not None:
            raise running.error
        if not rolling:
            system.start_processor(chance.choice(["p", "q", fresh]), wait=chance.random() < 0.9)
