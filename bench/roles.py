"""The processes that are measured, each started through the command line, and the CPU time that each takes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Mapping

WORKFLOWS = Path(__file__).parent / "workflows.py"
DURABLY = Path(sys.executable).parent / "durably"
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


class Roles:
    """Processes of one installation; ends them all on exit.

    Args:
        names: subcommands of ``durably``.
        environment: the settings, ``DURABLY_*``.
        folder: for the processor's data and the processes' output.
    """

    def __init__(self, names: tuple[str, ...], environment: Mapping[str, str], folder: Path) -> None:
        self._names = names
        self._environment = os.environ | {"DURABLY_DATA_DIR": str(folder / "data")} | environment
        self._folder = folder
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        if not self._environment["DURABLY_URL"].startswith("embedded:"):
            subprocess.run([DURABLY, "topics", "create"], env=self._environment, check=True, stdout=subprocess.DEVNULL)
        for name in self._names:
            with self._log(name).open("wb") as log:
                self._processes[name] = subprocess.Popen(
                    [str(DURABLY), name, str(WORKFLOWS)], env=self._environment, stdout=log, stderr=log
                )
        try:
            self._wait_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _wait_ready(self) -> None:
        # A client that came first would open an embedded broker's folder itself.
        deadline = time.monotonic() + 60
        while not all("ready: " in self._log(name).read_text() for name in self._names):
            self.check()
            if time.monotonic() > deadline:
                raise TimeoutError(
                    "not ready after a minute:\n" + "\n".join(self._log(n).read_text() for n in self._names)
                )
            time.sleep(0.02)

    def _log(self, name: str) -> Path:
        return self._folder / f"{name}.log"

    def __exit__(self, *error: object) -> None:
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def pid(self, name: str) -> int:
        """The process id of a role."""
        return self._processes[name].pid

    def check(self) -> None:
        """Raises when a process has ended by itself."""
        for name, process in self._processes.items():
            if process.poll() is not None:
                raise RuntimeError(
                    f"durably {name} ended with {process.returncode}:\n{self._log(name).read_text()[-3000:]}"
                )

    def cpu_seconds(self) -> dict[str, float]:
        """User and system time of each process so far."""
        return {name: cpu_seconds(process.pid) for name, process in self._processes.items()}


def cpu_seconds(pid: int) -> float:
    """User and system time of a process: fields 14 and 15 of ``/proc/PID/stat`` (proc(5)), in seconds."""
    # The second field, the name, may hold spaces; what follows its closing bracket starts with the third.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_SECOND
