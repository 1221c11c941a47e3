"""The processes of a measured system: started, watched, ended, and asked for their CPU time.

Besides the standard library it needs psutil only: the peers' environments import it too.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Self

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

START = 60.0  # seconds
STOP = 30.0


class Processes:
    """Processes by role, of which there may be several in one; ends those that it started on exit.

    Args:
        folder: for their output.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started: list[tuple[str, subprocess.Popen[bytes], Path]] = []
        self._watched: list[tuple[str, int]] = []

    def start(
        self,
        role: str,
        command: Sequence[str | Path],
        environment: Mapping[str, str] | None = None,
        user: str | None = None,
    ) -> None:
        """Starts a process; what it prints is kept to say why it ended."""
        path = self._folder / f"{role}-{len(self._started)}.log"
        with path.open("wb") as output:
            process = subprocess.Popen(
                command,
                env=environment,
                user=user,
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self._started.append((role, process, path))
        self.watch(role, process.pid)

    def watch(self, role: str, pid: int) -> None:
        """Counts the CPU time of a process that was started elsewhere, together with its descendants'."""
        self._watched.append((role, pid))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        # In reverse: a server goes after those that would complain of its absence.
        for _, process, _ in reversed(self._started):
            process.terminate()
            try:
                process.wait(STOP)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Polls until all is ready.

        Raises:
            RuntimeError: a process ended.
            TimeoutError: not within a minute.
        """
        deadline = time.monotonic() + START
        while not ready():
            self.check()
            if time.monotonic() > deadline:
                raise TimeoutError("\n".join(["not ready after a minute:", *(_tail(log) for *_, log in self._started)]))
            time.sleep(0.02)

    def outputs(self, role: str) -> list[str]:
        """What each process of a role has printed so far."""
        return [log.read_text(errors="replace") for name, _, log in self._started if name == role]

    def pid(self, role: str) -> int:
        """The first process of a role."""
        return next(pid for name, pid in self._watched if name == role)

    def check(self) -> None:
        """Raises RuntimeError when a process has ended by itself, with what it said."""
        for role, process, log in self._started:
            if process.poll() is not None:
                raise RuntimeError(f"{role} ended with {process.returncode}:\n{_tail(log)}")

    def cpu_seconds(self) -> dict[str, float]:
        """User and system time so far of each role."""
        total: Counter[str] = Counter()
        for role, pid in self._watched:
            total[role] += cpu_seconds(pid)
        return dict(total)


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and its descendants, in seconds; those that have ended are counted."""
    process = psutil.Process(pid)
    if pid == os.getpid():
        return sum(process.cpu_times()[:2])  # its children are roles of their own
    total = 0.0
    for one in (process, *process.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += sum(one.cpu_times()[:4])  # user, system, and both of children that were waited for
    return total


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-3000:]
