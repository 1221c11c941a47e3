"""The processor: owns partitions, one thread that advances their runs, one that commits.

    poll ──> handle each record ──> fire timers ──> dispatch at once ──> hand over to the committer ──> poll ...

A partition is *restoring* from its assignment until its store holds all that was committed, then *active*. After any
failure of a commit nothing in memory is trusted: every partition is taken over anew, as if from another process.
"""

from __future__ import annotations

import fcntl
import logging
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO

from durably.authoring import Registry
from durably.broker.acl import Option, required_acls
from durably.broker.port import TP, Broker, Consumer, Producer
from durably.errors import AccessDenied, BrokerError, ConfigurationError
from durably.observability.metrics import Sample, of_broker
from durably_schemas import Catalogue, Codec

from durably_processor.committer import Committer, dispatch, owned, owner_of, released
from durably_processor.engine.execution import Environment
from durably_processor.engine.watchdog import Watchdog
from durably_processor.observer import Observer
from durably_processor.partition import Dispatch, Partition, Poison, Poisoned
from durably_processor.restore import Restore
from durably_processor.standby import Standby
from durably_processor.state.store import Store, StoreDamaged
from durably_processor.traces import RunTraces
from durably_processor.turn import Refused, Turn
from durably_processor.upkeep import Retention, Truncation

log = logging.getLogger("durably.processor")

POLL = 0.2
"""Seconds that a poll waits at most: failures of the commit thread are noticed after it."""
JOINING = 0.02
"""Seconds that it waits while it owns nothing."""
RESTORING = 0.02
"""Seconds of each pass that go to restoring partitions while others are active."""
RECORDS_A_TURN = 1_000
DRAIN = 5.0
"""Seconds that a revoke waits for what is under way."""
RETRY = 0.5
FAILING = 5.0
"""Seconds after a failed commit within which the next failure is not the first."""
SPARE = 20.0
"""Seconds without a first assignment after which there is none to come: rebalances are over in less."""
LIVE = 120.0
"""Seconds without a pass of the advance thread after which it counts as dead: more than a take-over waits for Kafka."""
STALL = 5.0
"""Half the default session timeout: a process that stood still for this long may no longer be the owner."""


class Processor:
    """Runs until it is stopped, from the thread that calls `run`.

    Args:
        broker, catalogue: where the topics are.
        registry: the workflows, and the steps they call.
        data_dir: its RocksDBs; no two processors may share it.
        group: the consumer group of all processors of an installation.
        dispatch: see docs/architecture.md, "What may go out early".
        instance_id: makes group membership static.
        always_replay: see `Partition`; for tests.
        gateway_url: where the gateway is, as new runs are told.
        retention: milliseconds that runs are kept for after their end; None: for ever.
        standby: whether copies are kept of the stores of partitions that others own.
        code_version: what runs record as the code that executed them; made of the workflows' source when not given.
        build: whose workers the pinned runs that begin here keep to.
        max_runs: how many live runs a partition keeps in memory.
        activation_limit: seconds after which workflow code that does not yield is interrupted.
        now: the clock, in milliseconds since the epoch.
        ready: called when it has restored all of its partitions for the first time.
        counting: whether somebody reads the metrics.

    Raises (from `run`):
        ConfigurationError: topics are missing or do not fit, or the data directory is in use.
        AccessDenied: the broker does not let it in, or its ACLs do not let it do its work.
        BrokerError: what does not heal by itself.
    """

    def __init__(
        self,
        broker: Broker,
        catalogue: Catalogue,
        registry: Registry,
        data_dir: Path,
        *,
        group: str | None = None,
        dispatch: Dispatch = "early",
        instance_id: str | None = None,
        always_replay: bool = False,
        gateway_url: str | None = None,
        retention: int | None = None,
        standby: bool = False,
        code_version: str | None = None,
        build: str | None = None,
        max_runs: int = 20_000,
        activation_limit: float = 2.0,
        now: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        ready: Callable[[], None] | None = None,
        counting: bool = False,
    ) -> None:
        self._broker = broker
        self._catalogue = catalogue
        self._registry = registry
        self._data_dir = data_dir
        self._group = group or f"{catalogue.namespace}.processor"
        self._dispatch: Dispatch = dispatch
        self._instance_id = instance_id
        self._always_replay = always_replay
        self._gateway_url = gateway_url
        self._retention = None if retention is None else Retention(retention, Truncation(broker, catalogue))
        self._code_version, self._build = code_version, build
        self._max_runs = max_runs
        self._activation_limit = activation_limit
        self._now = now
        self._ready = ready
        self._traces = RunTraces()
        watched = counting or self._traces.on
        self._observer = Observer(registry, counting=counting, traces=self._traces) if watched else None
        if self._observer is not None:
            self._observer.gauges = self._gauges
        self._assigned = False
        self._member_since: float | None = None
        self._taken_over_again = 0
        self._passed = time.monotonic()
        self._codec = Codec()
        self._inputs = (catalogue.commands, catalogue.results, catalogue.signals)
        self._partitions: dict[int, Partition] = {}
        self._stores: dict[int, Store] = {}
        self._restoring: dict[int, Restore | None] = {}  # None: not begun
        self._starts: dict[int, tuple[dict[str, int], dict[str, int]]] = {}
        self._standby = Standby(broker, catalogue, self._codec, data_dir) if standby else None
        self._poisoned: frozenset[Poison] = frozenset()
        self._refused: dict[str, BrokerError] = {}  # runs that send what Kafka never takes
        self._number = 0
        self._failed_at = -FAILING
        self._committer: Committer | None = None
        self._stop = threading.Event()
        self._pulse = _Pulse()

    def run(self) -> None:
        """Runs until `stop`; then commits what is under way and leaves the group."""
        self._data_dir.mkdir(parents=True, exist_ok=True)
        with _locked(self._data_dir / "lock"):
            self._check_topics()
            self._transactional_id = f"{self._catalogue.namespace}.processor.{_slot(self._data_dir / 'slot')}"
            self._watchdog = Watchdog(self._activation_limit)
            self._environment = Environment(
                self._registry,
                self._broker.max_record_bytes,
                self._queues(),
                self._watchdog.watch,
                self._gateway_url,
                code_version=self._code_version,
                build=self._build,
            )
            self._plain: Producer = self._broker.producer()
            self._consumer: Consumer = self._broker.consumer(
                self._group,
                self._catalogue.commands,
                self,
                companions=(self._catalogue.results, self._catalogue.signals),
                paused=True,
                instance_id=self._instance_id,
            )
            self._pulse.start()
            self._member_since = time.monotonic()
            if self._standby is not None:
                self._standby.start()
            try:
                while not self._stop.is_set():
                    self._pass()
            except BaseException:
                # What was read and never handed over must not be committed on the way out.
                self._drop_everything()
                raise
            finally:
                self._leave()

    def stop(self) -> None:
        """Asks `run` to end. May be called from any thread or signal handler."""
        self._stop.set()

    # -- what it tells of itself, to any thread --------------------------------------------------------------------

    @property
    def dead(self) -> str | None:
        """Why it should be started anew, or None: it lives."""
        stalled = time.monotonic() - self._passed
        return f"the advance thread has not passed for {stalled:.0f} s" if stalled > LIVE else None

    @property
    def unready(self) -> str | None:
        """Why it does not do all of its work yet, or None: it is a member of its group, and has restored what it owns.

        A group that has more members than partitions has spare ones, which are told of no assignment.
        """
        since = self._member_since
        if not self._assigned and (since is None or time.monotonic() - since < SPARE):
            return "nothing is assigned to it yet"
        restoring = sorted(self._restoring.copy())
        return f"partitions {', '.join(map(str, restoring))} are being restored" if restoring else None

    def samples(self) -> Iterable[Sample]:
        """Its metrics; none where it does not count."""
        return () if self._observer is None else self._observer.samples()

    def _gauges(self) -> Iterable[Sample]:
        restoring = self._restoring.copy()
        figures = {number: partition.figures for number, partition in self._partitions.copy().items()}
        yield "durably_partitions", ("active",), len(figures)
        yield "durably_partitions", ("restoring",), len(restoring)
        for number, restore in restoring.items():
            yield "durably_restore_ratio", (str(number),), 0.0 if restore is None else restore.ratio
        yield "durably_take_overs_total", (), self._taken_over_again
        yield "durably_runs_in_memory", (), sum(f.runs for f in figures.values())
        yield "durably_runs_blocked", (), sum(f.blocked for f in figures.values())
        yield "durably_timers_due", (), sum(f.timers for f in figures.values())
        yield "durably_records_parked", (), sum(f.parked for f in figures.values())
        yield "durably_stall_seconds", (), time.monotonic() - self._passed
        read = {TP(topic, n): at for n, f in figures.items() for topic, at in f.positions.items()}
        yield from of_broker(self._broker, read)

    # -- the advance thread ----------------------------------------------------------------------------------------

    def _pass(self) -> None:
        self._passed = time.monotonic()
        try:
            committer = self._healthy_committer()
            self._restore()
            turn = Turn(self._number + 1, committer.acked)
            messages = self._consumer.poll(self._patience(), RECORDS_A_TURN)
            began = time.perf_counter()
            if committer.outdated:
                committer.renew(self._consumer.group_metadata())
            for message in messages:
                partition = self._partitions.get(message.partition)
                if partition is not None:
                    partition.handle(message, turn)
            if not self._dispatched(turn):
                return
            for partition in self._partitions.values():
                partition.end_turn(turn)
            if self._dispatched(turn) and turn.parts:
                self._number = turn.number
                committer.add(turn, self._consumer.group_metadata())
            if messages and self._observer is not None:
                self._observer.turns.observe(time.perf_counter() - began)
        except Poisoned as e:
            self._poisoned |= {e.what}
            self._distrust(f"{e} could not be handled")
        except StoreDamaged as e:
            self._rebuild(e)
        except (ConfigurationError, AccessDenied):
            raise
        except BrokerError as e:
            self._blame(e)
            self._distrust(str(e))
            self._stop.wait(RETRY)

    def _dispatched(self, turn: Turn) -> bool:
        """Sends what may go out early; False, and nothing sent, where we may no longer be the owner."""
        if self._pulse.stood_still:
            self._distrust("the process stood still, and may no longer be the owner")
            return False
        dispatch(turn, self._plain)
        return True

    def _patience(self) -> float:
        if self._restoring:
            return 0
        if not self._partitions:
            return JOINING  # an assignment comes within a poll, and should not wait for its end
        dues = [due for p in self._partitions.values() if (due := p.next_due) is not None]
        return max(0.0, min(POLL, (min(dues) - self._now()) / 1000)) if dues else POLL

    def _healthy_committer(self) -> Committer:
        committer = self._committer
        if committer is not None and committer.error is not None:
            if isinstance(committer.error, AccessDenied):
                raise committer.error
            if time.monotonic() - self._failed_at < FAILING:
                self._stop.wait(RETRY)
            self._failed_at = time.monotonic()
            self._blame(committer.error)
            if isinstance(committer.error, StoreDamaged):
                self._rebuild(committer.error)
            else:
                self._distrust(f"a commit failed: {committer.error}")
        elif committer is not None and committer.overdue:
            self._distrust("a commit hangs")
        if self._committer is None:
            transactions = self._broker.transactions(self._transactional_id)
            try:
                transactions.init(30)
            except BaseException:
                transactions.close()
                raise
            self._committer = Committer(
                self._broker,
                self._catalogue,
                self._codec,
                self._plain,
                transactions,
                self._transactional_id,
                self._observer,
            )
            self._committer.start(self._number)
        return self._committer

    def _blame(self, error: BaseException) -> None:
        if isinstance(error, Refused):
            self._refused[error.run_id] = error.why

    def _distrust(self, why: str) -> None:
        """Drops everything that is in memory only, and takes every partition over anew."""
        log.warning("taking over again: %s", why)
        self._taken_over_again += 1
        self._pulse.reset()
        begun = self._committer is not None
        # First, so that what was dispatched early can still be committed: else it would be dispatched again.
        self._restoring.update(dict.fromkeys(self._drop_everything()))
        if begun:  # there was time for the producer to break, too
            threading.Thread(target=self._plain.close, name="durably-close", daemon=True).start()
            self._plain = self._broker.producer()

    def _rebuild(self, damaged: StoreDamaged) -> None:
        self._distrust(str(damaged))
        shutil.rmtree(damaged.path, ignore_errors=True)

    def _drop_everything(self) -> list[int]:
        """Ends the commit thread and forgets what is in memory; returns the partitions that are ours."""
        if self._committer is not None:
            self._committer.stop(2.0)
            self._committer = None
        owned = [*self._partitions, *self._restoring]
        for number in owned:
            self._close(number)
        return owned

    # -- taking over -----------------------------------------------------------------------------------------------

    def _restore(self) -> None:
        begun = [number for number, restore in self._restoring.items() if restore is None]
        if begun:
            self._begin(begun)
        # Active partitions wait meanwhile: all that are restored share one short time.
        share = (RESTORING if self._partitions else POLL) / max(1, len(self._restoring))
        for number, restore in list(self._restoring.items()):
            if restore is not None and restore.step(share):
                self._activate(number)

    def _tps(self, numbers: Sequence[int]) -> list[TP]:
        return [TP(topic, number) for topic in self._inputs for number in numbers]

    def _begin(self, numbers: list[int]) -> None:
        tps = self._tps(numbers)
        self._consumer.pause(tps)
        self._environment.queues = self._queues()
        self._resolve_predecessors(tps)
        committed = self._consumer.committed(tps, 30)
        missing = [tp for tp, c in committed.items() if c.offset < 0]
        offsets = {tp: c.offset for tp, c in committed.items()} | (
            self._broker.start_offsets(missing) if missing else {}
        )
        ends = self._broker.end_offsets(tps, committed=True)
        self._sign(offsets)
        self._consumer.rewind(offsets)
        for number in numbers:
            self._starts[number] = (
                {topic: offsets[TP(topic, number)] for topic in self._inputs},
                {topic: ends[TP(topic, number)] for topic in self._inputs},
            )
            store = Store(self._data_dir / f"partition-{number}")
            self._stores[number] = store
            self._restoring[number] = Restore(number, store, self._broker, self._catalogue, self._codec)

    def _resolve_predecessors(self, tps: list[TP]) -> None:
        # Otherwise whatever a killed owner left open would hold back readers until its transaction times out.
        texts = self._broker.group_metadata_of(self._group, tps).values()
        for owner in {owner_of(text) for text in texts} - {None, self._transactional_id}:
            assert owner is not None
            log.info("resolving what %s left open", owner)
            transactions = self._broker.transactions(owner)
            try:
                transactions.init(30)
            finally:
                transactions.close()

    def _sign(self, offsets: dict[TP, int]) -> None:
        """Leaves our name with the offsets before anything is begun: a first transaction that a kill leaves open is found.

        It takes the place of the predecessors'. Some of them may be alive, with other partitions, and are fenced by each
        resolution: two processors that resolved each other at every take-over would never commit anything.
        """
        try:
            self._consumer.commit(owned(offsets, self._transactional_id), wait=True)
        except BrokerError as e:  # a rebalance, perhaps; the first commit that succeeds will say it
            log.info("the owner of %s is not noted yet: %s", sorted(offsets), e)

    def _activate(self, number: int) -> None:
        positions, ends = self._starts.pop(number)
        self._partitions[number] = Partition(
            number,
            self._stores[number],
            self._environment,
            self._codec,
            self._catalogue,
            positions=positions,
            ends=ends,
            now=self._now,
            dispatch=self._dispatch,
            always_replay=self._always_replay,
            max_runs=self._max_runs,
            poisoned=self._poisoned,
            refused=self._refused,
            retention=self._retention,
            traces=self._traces,
            observer=self._observer,
        )
        del self._restoring[number]
        self._consumer.resume(self._tps([number]))
        log.info("partition %s is active", number)
        if not self._restoring and self._ready is not None:
            self._ready()
            self._ready = None

    # -- rebalances, on this thread, within poll -------------------------------------------------------------------

    def on_assigned(self, partitions: Sequence[int]) -> None:
        """Ours from now on."""
        self._assigned = True
        if self._standby is not None:
            self._standby.let_go(partitions)
        self._restoring.update(dict.fromkeys(partitions))

    def on_revoked(self, partitions: Sequence[int]) -> None:
        """Commits what is under way for a bounded time, marks the partitions released, and lets go."""
        committer = self._committer
        # What is only being restored bears our name, and nothing of ours is under way there.
        offsets = {TP(t, n): o for n in partitions if n in self._starts for t, o in self._starts[n][0].items()}
        if committer is not None and committer.drain(DRAIN, self._consumer.group_metadata()):
            for partition in (self._partitions[n] for n in partitions if n in self._partitions):
                offsets |= partition.offsets()
        elif committer is not None:
            committer.drop(list(partitions))
        try:
            if offsets:
                self._consumer.commit(released(offsets), wait=True)
        except BrokerError as e:
            log.warning("partitions %s could not be marked released: %s", list(partitions), e)
        self._let_go(partitions)

    def on_lost(self, partitions: Sequence[int]) -> None:
        """Somebody else's already: what is not committed is theirs to do."""
        if self._committer is not None:
            self._committer.drop(list(partitions))
        self._let_go(partitions)

    def _let_go(self, partitions: Sequence[int]) -> None:
        for number in partitions:
            self._close(number)
            if self._standby is not None:
                self._standby.keep(number)
            log.info("partition %s is released", number)
        self._pulse.reset()

    def _close(self, number: int) -> None:
        partition = self._partitions.pop(number, None)
        if partition is not None:
            partition.drop()
        restore = self._restoring.pop(number, None)
        if restore is not None:
            restore.close()
        self._starts.pop(number, None)
        store = self._stores.pop(number, None)
        if store is not None:
            store.close()

    # -- beginning and end -----------------------------------------------------------------------------------------

    def _queues(self) -> frozenset[str]:
        prefix = self._catalogue.requests("x")[:-1]
        return frozenset(name.removeprefix(prefix) for name in self._broker.topics() if name.startswith(prefix))

    def _check_topics(self) -> None:
        options: list[Option] = [] if self._retention is None else ["retention"]
        self._broker.require(required_acls("processor", self._catalogue, options=options))
        names = [*self._inputs, self._catalogue.events, self._catalogue.snapshots]
        found = {topic.name: self._broker.partitions(topic.name) for topic in self._catalogue.topics(())}
        missing = [name for name, count in found.items() if not count]
        if missing:
            raise ConfigurationError(
                f"topics are missing: {', '.join(missing)}: create them with `durably topics create`"
            )
        wrong = {name: found[name] for name in names if found[name] != self._catalogue.partitions}
        if wrong:
            listed = ", ".join(f"{name} has {n}" for name, n in wrong.items())
            raise ConfigurationError(
                f"{self._catalogue.partitions} partitions are configured, but {listed}: commands, results, signals, "
                "events and snapshots must be equal; set DURABLY_PARTITIONS to what they have, or create the topics anew"
            )

    def _leave(self) -> None:
        self._pulse.stop()
        if self._standby is not None:
            self._standby.stop()
        try:
            self._consumer.close()  # revokes, and so commits, what is assigned
        except BrokerError as e:
            log.warning("leaving the group: %s", e)
        if self._committer is not None:
            self._committer.stop(DRAIN)
        for number in list(self._stores):
            self._close(number)
        self._plain.close()
        self._watchdog.close()


class _Pulse:
    """Notices that the whole process was stopped, not merely busy: then this thread did not run either."""

    def __init__(self) -> None:
        self._beat = time.monotonic()
        self._missed = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="durably-pulse", daemon=True)

    def start(self) -> None:
        self.reset()
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()

    def reset(self) -> None:
        self._missed = False
        self._beat = time.monotonic()

    @property
    def stood_still(self) -> bool:
        return self._missed or time.monotonic() - self._beat > STALL

    def _run(self) -> None:
        while not self._ended.wait(0.25):
            now = time.monotonic()
            if now - self._beat > STALL:
                self._missed = True
            self._beat = now


class _locked:  # noqa: N801 - reads as a statement: with _locked(path)
    """The data directory is ours while this is open."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[str] | None = None

    def __enter__(self) -> None:
        self._file = self._path.open("w")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            self._file.close()
            raise ConfigurationError(
                f"{self._path.parent} is in use by another processor: give each a data directory of its own "
                "(DURABLY_DATA_DIR)"
            ) from e

    def __exit__(self, *_: object) -> None:
        assert self._file is not None
        self._file.close()


def _slot(path: Path) -> str:
    """A name for this data directory that outlives the process: it is the stable part of the transactional id."""
    if not path.exists():
        path.write_text(uuid.uuid4().hex)
    return path.read_text()
