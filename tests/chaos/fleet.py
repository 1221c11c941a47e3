"""The processes of a chaos run: each has a place that is filled again when its process has died."""

from __future__ import annotations

import random
import signal
import struct
import subprocess
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from installation import Installation

Role = Literal["processor", "worker"]
CLOCK = Path(__file__).with_name("clock")


def now_ms() -> int:
    """The machine's clock, which is also the broker's; never the one of `clock/sitecustomize.py`."""
    return time.time_ns() // 1_000_000


class Exit(NamedTuple):
    """A process that ended by itself."""

    name: str
    code: int
    at: int
    last_words: str


PATIENCE = 150.0
"""Seconds after SIGTERM within which a process must have ended, also where the broker is dead, or frozen, meanwhile."""


class Member:
    """One place. Whoever holds `lock` may kill, stop and starve its process."""

    def __init__(self, installation: Installation, role: Role, name: str, url: str | None = None) -> None:
        self.role, self.name = role, name
        self.lock = threading.Lock()
        self.started: list[tuple[int, int]] = []  # (pid, since when)
        self._installation, self._url = installation, url
        self._clock = installation.folder / f"{name}.clock"
        self.set_clock(0)
        self.process: subprocess.Popen[bytes]

    def set_clock(self, seconds: float) -> None:
        """By how much its clock is wrong from now on."""
        data = struct.pack("q", round(seconds * 1e9))
        if self._clock.exists():
            with self._clock.open("r+b") as file:  # in place: the process has it mapped
                file.write(data)
        else:
            self._clock.write_bytes(data)

    def spawn(self) -> None:
        """Fills the place."""
        environment = {"CHAOS_CLOCK": str(self._clock), "PYTHONFAULTHANDLER": "1"}
        self.process = self._installation.spawn(self.role, self.name, url=self._url, environment=environment)
        self.started.append((self.process.pid, now_ms()))

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()

    def terminate(self) -> None:
        """SIGTERM; SIGABRT for one that does not heed it, so that its log says where each of its threads stands."""
        self.process.terminate()
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)
            self.process.wait()
            raise RuntimeError(f"{self.name} did not end within {PATIENCE:g} s of SIGTERM: see its log") from None

    @property
    def stores(self) -> list[Path]:
        """Its RocksDBs."""
        return sorted(self._installation.store(self.name).glob("partition-*"))

    def last_words(self) -> str:
        lines = self._installation.log(self.name).read_text(errors="replace").splitlines()
        return lines[-1][-300:] if lines else ""


class Fleet:
    """All members, and a thread that fills places whose process ended by itself."""

    def __init__(self, installation: Installation, say: Callable[[str], None]) -> None:
        self.installation = installation
        self._say = say
        self.members: list[Member] = []
        self.exits: list[Exit] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._supervise, name="chaos-fleet", daemon=True)

    def begin(self) -> None:
        self._thread.start()

    def add(self, role: Role, name: str, url: str | None = None) -> Member:
        """A new place, filled."""
        member = Member(self.installation, role, name, url)
        member.spawn()
        self.members.append(member)
        return member

    def remove(self, member: Member) -> None:
        """Ends its process in peace, and its place with it."""
        self.members.remove(member)
        with member.lock:
            member.terminate()

    @contextmanager
    def held(self, chance: random.Random, role: Role | None = None) -> Iterator[Member]:
        """A member that nobody else is just about to hurt."""
        while True:
            candidates = [m for m in self.members if role in {None, m.role}]
            member = chance.choice(candidates)
            if member.lock.acquire(timeout=0.2):
                try:
                    if member in self.members:
                        yield member
                        return
                finally:
                    member.lock.release()

    def close(self) -> None:
        """Ends all processes in peace."""
        self._stopping.set()
        self._thread.join()
        for member in self.members:
            with suppress(ProcessLookupError):
                member.process.send_signal(signal.SIGCONT)
            member.process.terminate()
        for member in self.members:
            member.terminate()

    def _supervise(self) -> None:
        while not self._stopping.wait(0.25):
            for member in list(self.members):
                if not member.lock.acquire(blocking=False):
                    continue
                try:
                    code = member.process.poll()
                    if code is not None and member in self.members:
                        self.exits.append(Exit(member.name, code, now_ms(), member.last_words()))
                        self._say(f"{member.name} ended by itself with {code}: {member.last_words()}")
                        member.spawn()
                finally:
                    member.lock.release()
