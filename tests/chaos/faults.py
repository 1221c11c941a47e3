"""What is done to a running installation. Each fault takes its choices from a random generator of its own."""

from __future__ import annotations

import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

from confluent_kafka import Producer
from durably import payloads
from durably_schemas import Codec
from durably_schemas.catalogue import partition_for
from durably_schemas.records import StartRun
from installation import SESSION

from chaos.fleet import Fleet, Role, now_ms
from chaos.shapes import POISONS

if TYPE_CHECKING:
    from fault_proxy import FaultProxy
    from kafka_cluster import KafkaCluster

    from chaos.load import Load

TOO_LARGE = 1_030_000
"""Bytes of a record that the broker takes, and that no record of ours can carry on."""
NO_LIMIT = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
DISK_FULL = 8_192
"""Bytes: no file of the process may grow beyond this (EFBIG) while its disk is full."""
AFTERMATH_MS = round((SESSION + 6) * 1000)
"""For so long after its end a fault may have consequences: groups rebalance, and claims are repeated."""


class Injected(NamedTuple):
    """A fault that was injected: when (ms), into which processes, and what else is to be known of it."""

    name: str
    target: str
    begin: int
    end: int
    pids: tuple[int, ...] = ()


class Planned(NamedTuple):
    """A fault to come: so many seconds after the one before it, with this seed."""

    gap: float
    name: str
    seed: int


class Arena:
    """What faults act on.

    Attributes:
        poisons: the poison runs that were started, by their workflow.
        letters: the places of the records that nobody can handle.
        failed: the faults that could not be injected, and why.
    """

    def __init__(self, fleet: Fleet, cluster: KafkaCluster, proxy: FaultProxy, load: Load) -> None:
        self.fleet, self.cluster, self.proxy, self.load = fleet, cluster, proxy, load
        self.installation = fleet.installation
        self.broker_lock = Lock()
        self.proxy_lock = Lock()
        self.injected: list[Injected] = []
        self.failed: list[str] = []
        self.poisons: dict[str, str] = {}
        self.letters: set[tuple[str, int, int]] = set()
        self._number = 0
        self._raw = Producer({
            "bootstrap.servers": cluster.bootstrap, "message.max.bytes": TOO_LARGE * 2, "enable.idempotence": "true",
            "partitioner": "murmur2_random", "log_level": 0,
        })  # fmt: skip

    def inject(self, planned: Planned) -> None:
        """One fault, from its beginning to its end."""
        begin = now_ms()
        try:
            target, pids = (FAULTS | OF_PROCESSORS)[planned.name](self, random.Random(planned.seed))
        except Exception as e:  # a harness that fails to hurt must not pass for an installation that held
            self.failed.append(f"{planned.name} (seed {planned.seed}): {type(e).__name__}: {e}")
            target, pids = "failed", ()
        self.injected.append(Injected(planned.name, target, begin, now_ms(), pids))

    def unique(self) -> int:
        self._number += 1
        return self._number

    def produce(self, topic: str, key: bytes, value: bytes) -> tuple[str, int, int]:
        """A record past all our code; returns its place."""
        placed: list[tuple[str, int, int]] = []

        def acked(error: object, record: object) -> None:
            assert error is None, error
            placed.append((record.topic(), record.partition(), record.offset()))  # type: ignore[attr-defined]

        self._raw.produce(topic, value, key, on_delivery=acked)
        assert self._raw.flush(60) == 0, "the broker does not take a record"
        return placed[0]


Hurt = tuple[str, tuple[int, ...]]
"""Whom a fault hit, in words, and the processes among them."""


def sigkill(arena: Arena, chance: random.Random, role: Role | None = None) -> Hurt:
    """Dead at once; its place is filled again later."""
    with arena.fleet.held(chance, role) as member:
        pid = member.process.pid
        member.kill()
        time.sleep(chance.choice([0, chance.uniform(0, SESSION + 2)]))
        member.spawn()
        return member.name, (pid,)


def sigstop(arena: Arena, chance: random.Random, role: Role | None = None) -> Hurt:
    """Frozen for longer than its membership lasts, then awake again: for a moment there are two owners."""
    with arena.fleet.held(chance, role) as member:
        member.process.send_signal(signal.SIGSTOP)
        time.sleep(SESSION + chance.uniform(1, 5))
        member.process.send_signal(signal.SIGCONT)
        return member.name, (member.process.pid,)


def sigterm(arena: Arena, chance: random.Random) -> Hurt:
    """Asked to leave."""
    with arena.fleet.held(chance) as member:
        pid = member.process.pid
        member.terminate()
        member.spawn()
        return member.name, (pid,)


def rebalance(arena: Arena, chance: random.Random) -> Hurt:
    """One comes, and goes again."""
    role = chance.choice(["processor", "worker"])
    member = arena.fleet.add(role, f"extra-{role}-{arena.unique()}")
    time.sleep(chance.uniform(2, 7))
    arena.fleet.remove(member)
    return member.name, tuple(pid for pid, _ in member.started)


def broker_kill(arena: Arena, chance: random.Random) -> Hurt:
    """SIGKILL of the broker, and its return."""
    with arena.broker_lock:
        arena.cluster.kill()
        time.sleep(chance.uniform(0, 2))
        arena.cluster.restart()
    return "broker", ()


def broker_pause(arena: Arena, chance: random.Random) -> Hurt:
    """The broker stands still."""
    with arena.broker_lock:
        arena.cluster.pause()
        try:
            time.sleep(chance.uniform(1, 9))
        finally:
            arena.cluster.unpause()
    return "broker", ()


def _dropped(api: str) -> Callable[[Arena, random.Random], Hurt]:
    def drop(arena: Arena, chance: random.Random) -> Hurt:
        with arena.proxy_lock:
            before, times = arena.proxy.struck[api], chance.randint(1, 2)
            arena.proxy.drop_answers(api, times)
            try:
                arena.proxy.wait_struck(api, before + times, timeout=20)
            except TimeoutError:
                pass
            finally:
                arena.proxy.heal()
            return f"{arena.proxy.struck[api] - before} answers", ()

    drop.__doc__ = f"The broker does what {api} asks for, and its answer is lost."
    return drop


def cut(arena: Arena, chance: random.Random) -> Hurt:
    """All connections through the proxy break, some times in a row."""
    times = chance.randint(1, 5)
    for _ in range(times):
        arena.proxy.cut()
        time.sleep(chance.uniform(0, 0.5))
    return f"{times} times", ()


def disk_full(arena: Arena, chance: random.Random) -> Hurt:
    """No file of a processor can grow any more: what RocksDB writes fails half-way."""
    with arena.fleet.held(chance, "processor") as member:
        pid = member.process.pid
        try:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (DISK_FULL, resource.RLIM_INFINITY))
            time.sleep(chance.uniform(2, 5))
            resource.prlimit(pid, resource.RLIMIT_FSIZE, NO_LIMIT)
        except ProcessLookupError:
            return f"{member.name}, which ended of it", (pid,)
        return member.name, (pid,)


def _flip(file: Path, chance: random.Random) -> None:
    size = file.stat().st_size
    with file.open("r+b") as opened:
        for _ in range(chance.randint(1, 8)):
            position = chance.randrange(size)
            opened.seek(position)
            byte = opened.read(1)[0]
            opened.seek(position)
            opened.write(bytes([byte ^ (1 << chance.randrange(8))]))


def corrupt_store(arena: Arena, chance: random.Random) -> Hurt:
    """Bits of a dead processor's RocksDB flip, in any of its files."""
    with arena.fleet.held(chance, "processor") as member:
        pid = member.process.pid
        # In peace or not: a clean end leaves SST files, a crash a write-ahead log.
        chance.choice([member.kill, member.terminate])()
        kinds = chance.choice([["*.sst"], ["MANIFEST-*", "CURRENT"], ["*.log"], ["*.sst", "MANIFEST-*", "*.log"]])
        files = [f for store in member.stores for kind in kinds for f in sorted(store.glob(kind)) if f.stat().st_size]
        for file in chance.sample(files, min(len(files), chance.randint(1, 4))):
            _flip(file, chance)
        member.spawn()
        return f"{member.name}, {len(files)} files like {'|'.join(kinds)}", (pid,)


def delete_store(arena: Arena, chance: random.Random) -> Hurt:
    """A processor comes back to an empty disk."""
    with arena.fleet.held(chance, "processor") as member:
        pid = member.process.pid
        member.kill()
        for store in member.stores:
            shutil.rmtree(store)
        member.spawn()
        return member.name, (pid,)


def clock(arena: Arena, chance: random.Random) -> Hurt:
    """One process's clock jumps, forwards or backwards, and back again later."""
    with arena.fleet.held(chance) as member:
        off = chance.uniform(2, 90) * chance.choice([1, -1])
        member.set_clock(off)
        time.sleep(chance.uniform(2, 6))
        member.set_clock(0)
        return f"{member.name} by {off:+.0f} s", (member.process.pid,)


def bad_records(arena: Arena, chance: random.Random) -> Hurt:
    """What cannot be decoded, or does not belong where it is, or is larger than anything that follows from it may be."""
    catalogue = arena.installation.catalogue
    topics = (catalogue.commands, catalogue.results)
    for topic in topics:
        for value in (b"", b"\xc3\x01" + chance.randbytes(30), chance.randbytes(chance.randrange(1, 2_000))):
            arena.letters.add(arena.produce(topic, chance.randbytes(8), value))
    arena.letters.add(arena.produce(catalogue.results, b"large", chance.randbytes(TOO_LARGE)))
    n = arena.unique()
    run_id = f"oversized-{n}"
    start = StartRun(
        run_id=run_id, workflow="chaos_sequence", input=payloads.dump([bytes(TOO_LARGE - 500)], "n"), requested_at=0
    )
    arena.letters.add(arena.produce(catalogue.commands, run_id.encode(), Codec().encode(start)))
    stray = next(x for x in (f"stray-{n}-{i}" for i in range(99)) if partition_for(x.encode(), catalogue.partitions))
    stray_start = StartRun(run_id=stray, workflow="chaos_sequence", input=payloads.dump([1], "n"), requested_at=0)
    arena.letters.add(arena.produce(catalogue.commands, b"another key", Codec().encode(stray_start)))
    return "commands and results", ()


def _poisoned(workflow: str) -> Callable[[Arena, random.Random], Hurt]:
    def poison(arena: Arena, chance: random.Random) -> Hurt:
        run_id = f"poison-{arena.unique()}"
        arena.poisons[run_id] = workflow
        start = StartRun(
            run_id=run_id, workflow=workflow, input=payloads.dump_arguments(_one, (1,), {}, "n"), requested_at=0
        )
        arena.produce(arena.installation.catalogue.commands, run_id.encode(), Codec().encode(start))
        # Until it does its harm, which is when it should; that it is blocked in the end is for the verdict to say.
        until = time.monotonic() + 30
        while arena.load.ends.statuses.get(run_id) != "blocked" and time.monotonic() < until:
            time.sleep(0.1)
        return run_id, ()

    poison.__doc__ = f"A run of {workflow} is started."
    return poison


def _one(n: int) -> None:
    """What poison workflows take."""


FAULTS: dict[str, Callable[[Arena, random.Random], Hurt]] = {
    "sigkill": sigkill,
    "sigstop": sigstop,
    "sigterm": sigterm,
    "rebalance": rebalance,
    "broker-kill": broker_kill,
    "broker-pause": broker_pause,
    "drop-end-txn": _dropped("EndTxn"),
    "drop-add-partitions": _dropped("AddPartitionsToTxn"),
    "drop-txn-offsets": _dropped("TxnOffsetCommit"),
    "drop-produce": _dropped("Produce"),
    "cut": cut,
    "disk-full": disk_full,
    "corrupt-store": corrupt_store,
    "delete-store": delete_store,
    "clock": clock,
    "bad-records": bad_records,
    **{f"poison-{workflow.removeprefix('chaos_').replace('_', '-')}": _poisoned(workflow) for workflow in POISONS},
}
OF_PROCESSORS = {
    "sigkill-processor": partial(sigkill, role="processor"),
    "sigstop-processor": partial(sigstop, role="processor"),
}
"""For measurements and proofs; not in the mix, which has them."""
OFTEN = {"sigkill": 6, "sigstop": 4, "sigterm": 3, "rebalance": 4, "broker-kill": 2, "clock": 2}
"""How often each is drawn, where it is not once."""
ABROAD = frozenset({"broker-kill", "broker-pause"})
"""Those that hurt every process."""


def plan(seed: int, names: list[str], count: int, gap: float = 0.5) -> list[Planned]:
    """A schedule: the same for the same arguments. Each fault comes once before any is drawn by its weight.

    ``gap``: the least number of seconds between two; up to 3.5 more are drawn.
    """
    chance = random.Random(seed)
    first = chance.sample(names, len(names))
    weights = [OFTEN.get(name, 1) for name in names]
    drawn = (first + chance.choices(names, weights, k=max(0, count - len(first))))[:count]
    return [Planned(gap + chance.uniform(0, 3.5), name, chance.getrandbits(32)) for name in drawn]


def _pause(seconds: float) -> Callable[[], bool]:
    until = time.monotonic() + seconds
    return lambda: time.monotonic() < until


class Injector:
    """Carries a schedule out; a fault may begin before the one before it is over, but no more than ``at_once``."""

    def __init__(self, arena: Arena, schedule: list[Planned], at_once: int = 2) -> None:
        self.arena = arena
        self._schedule = schedule
        self._pool = ThreadPoolExecutor(at_once, "chaos-fault")
        self._at_once = at_once
        self._running: list[Future[None]] = []

    def run(self, go_on: Callable[[], bool]) -> None:
        """Until the schedule is through, or nobody wants more of it."""
        for planned in self._schedule:
            if not (self._wait(go_on, self._busy) and self._wait(go_on, _pause(planned.gap))):
                break
            self._running.append(self._pool.submit(self.arena.inject, planned))
        self._pool.shutdown()

    def _busy(self) -> bool:
        self._running = [f for f in self._running if not f.done()]
        return len(self._running) >= self._at_once

    @staticmethod
    def _wait(go_on: Callable[[], bool], while_true: Callable[[], bool]) -> bool:
        while while_true():
            if not go_on():
                return False
            time.sleep(0.05)
        return go_on()
