"""Starts runs of every shape without a pause, resumes and cancels those that wait, and watches them end."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import threading
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from durably import HookNotFoundError
from durably.broker.port import TP, Message
from durably.client import AsyncClient
from durably.errors import BrokerError, DurablyError, RunCancelledError, RunFailedError
from durably_schemas import Codec
from durably_schemas.records import TERMINAL, RunStatus, RunSummary

from chaos.shapes import SHAPES, payloads_for

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from durably.broker.port import Broker
    from durably_schemas import Catalogue
    from installation import Installation

STREAMS_READ = 0.25
"""Of the runs with streams, how many are read back by a client while faults are injected."""
ASKED = 0.1
"""Of all runs, for how many a client waits for the result."""


class Ends:
    """Follows the topic of summaries: how far each run is. On a thread of its own."""

    def __init__(self, broker: Broker, catalogue: Catalogue) -> None:
        self._broker = broker
        self._positions = {TP(catalogue.runs, p): 0 for p in range(catalogue.partitions)}
        self._codec = Codec()
        self._stopping = threading.Event()
        self.statuses: dict[str, RunStatus] = {}
        self.open: set[str] = set()
        self.ended = 0
        self.ended_roots = 0  # those that are nobody's children
        self._thread = threading.Thread(target=self._run, name="chaos-ends", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(10)

    def _run(self) -> None:
        while not self._stopping.is_set():
            with suppress(BrokerError):  # a broker that was killed: on with a new reader from where this one was
                reader = self._broker.reader(self._positions)
                try:
                    while not self._stopping.is_set():
                        for item in reader.poll(0.2):
                            if isinstance(item, Message):
                                self._positions[TP(item.topic, item.partition)] = item.offset + 1
                                self._take(self._codec.decode_as(RunSummary, item.value))
                finally:
                    reader.close()
            self._stopping.wait(0.2)

    def _take(self, summary: RunSummary) -> None:
        before = self.statuses.get(summary.run_id)
        self.statuses[summary.run_id] = summary.status
        if summary.status in TERMINAL:
            self.open.discard(summary.run_id)
            if before not in TERMINAL:
                self.ended += 1
                self.ended_roots += summary.parent is None
        else:
            self.open.add(summary.run_id)


class Load:
    """The load generator.

    Attributes:
        started: the runs whose start was acknowledged: nothing may be lost of them.
        told: what a client was told of a run, ``("completed", result)`` and the like.
        read: what a client has read of a run's stream.
        duplicates: how many resumes were sent a second time under the same resume_id.
        errors: what a client raised that is no consequence of a fault.
    """

    def __init__(self, installation: Installation, mail: Path, *, seed: int, in_flight: int) -> None:
        self._installation = installation
        self._mail = mail
        self._random = random.Random(seed)
        self._in_flight = in_flight
        self.ends = Ends(installation.broker, installation.catalogue)
        self.started: dict[str, str] = {}
        self.told: dict[str, tuple[str, Any]] = {}
        self.read: dict[str, list[Any]] = {}
        self.duplicates = 0
        self.errors: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = threading.Event()
        self._quiet = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), name="chaos-load", daemon=True)

    def begin(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Starts nothing more; what waits for it is still resumed and cancelled until `close`."""
        self._stopping.set()

    def close(self) -> None:
        """Ends it, when everything has ended."""
        self._stopping.set()
        self._quiet.set()
        self._thread.join(60)
        self.ends.stop()

    async def _main(self) -> None:
        async with AsyncClient(self._installation.url, namespace=self._installation.namespace, timeout=10) as client:
            self._client = client
            mail = asyncio.create_task(self._read_mail())
            names, weights = list(SHAPES), [shape.weight for shape in SHAPES.values()]
            for n in itertools.count():
                while len(self.started) - self.ends.ended_roots + len(self._tasks) // 4 > self._in_flight:
                    if self._stopping.is_set():
                        break
                    await asyncio.sleep(0.02)
                if self._stopping.is_set():
                    break
                name = self._random.choices(names, weights)[0]
                self._go(self._start(f"{name.removeprefix('chaos_')}-{n}", name, n))
                await asyncio.sleep(0)
            await asyncio.to_thread(self._quiet.wait)
            mail.cancel()
            _, late = await asyncio.wait(self._tasks, timeout=20) if self._tasks else ((), ())
            for task in late:
                task.cancel()
                self.errors["a client's call never ended"] += 1

    def _go(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(self._noted(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _noted(self, work: Awaitable[None]) -> None:
        try:
            await work
        except Exception as e:  # it must come out, and not end the load
            self.errors[f"{type(e).__name__}: {e}"[:300]] += 1

    async def _start(self, run_id: str, name: str, n: int) -> None:
        run = await self._until(lambda: self._client.options(run_id=run_id).start(name, n))
        self.started[run_id] = name
        if name == "chaos_streams" and self._random.random() < STREAMS_READ:
            self._go(self._read_stream(run_id))
        elif self._random.random() < ASKED:
            self._go(self._ask(run.id))

    async def _until(self, call: Callable[[], Awaitable[Any]]) -> Any:
        """The answer, however often one has to ask: what a client does whose broker or processor is away."""
        while True:
            try:
                return await call()
            except (BrokerError, TimeoutError):
                await asyncio.sleep(0.5)

    async def _ask(self, run_id: str) -> None:
        run = self._client.get_run(run_id)
        while True:
            try:
                self.told[run_id] = ("completed", await run.result(timeout=30))
            except RunFailedError:
                self.told[run_id] = ("failed", None)
            except RunCancelledError:
                self.told[run_id] = ("cancelled", None)
            except (BrokerError, TimeoutError, DurablyError):
                await asyncio.sleep(0.5)
                continue
            return

    async def _read_stream(self, run_id: str) -> None:
        read: list[Any] = []
        while True:
            try:
                chunks = self._client.get_run(run_id).stream("log", start_index=len(read))
                async for chunk in chunks:
                    read.append(chunk)  # noqa: PERF401 - what was read before an error is kept
            except (BrokerError, TimeoutError):
                await asyncio.sleep(0.5)
                continue
            self.read[run_id] = read
            return

    # -- what runs ask for -----------------------------------------------------------------------------------------

    async def _read_mail(self) -> None:
        position, answered = 0, set()
        while True:
            if self._mail.exists():
                with self._mail.open("rb") as file:
                    file.seek(position)
                    lines = file.read().splitlines(keepends=True)
                for line in lines:
                    if not line.endswith(b"\n"):
                        break
                    position += len(line)
                    entry = json.loads(line)
                    if entry["token"] not in answered:  # the step may have run twice
                        answered.add(entry["token"])
                        self._go(self._answer(entry["run"], entry["token"]))
            await asyncio.sleep(0.05)

    async def _answer(self, run_id: str, token: str) -> None:
        name, _, number = run_id.rpartition("-")
        if not SHAPES[f"chaos_{name}"].resumed:
            await self._until(lambda: self._client.get_run(run_id).cancel("enough"))
            return
        for i, payload in enumerate(payloads_for(int(number))):
            await self._resume(token, payload, f"{run_id}/{i}")

    async def _resume(self, token: str, payload: int, resume_id: str) -> None:
        times = 1 + (self._random.random() < 0.2)
        self.duplicates += times - 1
        calls = [
            self._until(lambda: self._client.resume_hook(token, payload, resume_id=resume_id)) for _ in range(times)
        ]
        for outcome in await asyncio.gather(*calls, return_exceptions=True):
            # A copy may come when the hook is gone, and is then known all the same; the first one must be taken.
            if isinstance(outcome, HookNotFoundError):
                self.errors[f"the resume {resume_id} was refused: {outcome}"] += 1
            elif isinstance(outcome, BaseException):
                raise outcome
