"""The processes of the demo: started through the command line, killed with SIGKILL, started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

WORKFLOWS = Path(__file__).parent / "workflows.py"
DURABLY = Path(sys.executable).parent / "durably"


class Installation:
    """Everything that runs the orders: one process on the embedded broker, a processor and a worker on Kafka.

    Args:
        url: where the broker is.
        namespace: the prefix of the topics.
        folder: for the processor's data and the processes' output.
        ledger: the ledger's file.
    """

    def __init__(self, url: str, namespace: str, folder: Path, ledger: Path) -> None:
        self._folder = folder
        self._environment = os.environ | {
            "DURABLY_URL": url,
            "DURABLY_NAMESPACE": namespace,
            "DURABLY_DATA_DIR": str(folder / "data"),
            "ORDERS_LEDGER": str(ledger),
        }
        self._embedded = url.startswith("embedded:")
        self._roles = ("dev",) if self._embedded else ("processor", "worker")
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def victim(self) -> str:
        """The process that is going to be killed."""
        return self._roles[0]

    def start(self) -> None:
        """Starts what is not running, and waits until it says that it is ready; on Kafka, creates the topics first."""
        if not self._embedded:
            subprocess.run(  # noqa: S603 - our own command
                [DURABLY, "topics", "create"], env=self._environment, check=True, stdout=subprocess.DEVNULL
            )
        missing = [role for role in self._roles if role not in self._running]
        for role in missing:
            with self.log_of(role).open("wb") as log:
                self._running[role] = subprocess.Popen(  # noqa: S603 - our own command
                    [DURABLY, role, str(WORKFLOWS)], env=self._environment, stdout=log, stderr=log
                )
        # A client that came first would open an embedded broker's folder itself.
        deadline = time.monotonic() + 60
        while not all("ready: " in self.log_of(role).read_text() for role in missing):
            self.check()
            if time.monotonic() > deadline:
                raise TimeoutError("not ready after a minute:" + "".join(map(self._tail, missing)))
            time.sleep(0.02)

    def log_of(self, role: str) -> Path:
        """Where a process writes."""
        return self._folder / f"{role}.log"

    def check(self) -> None:
        """Raises when a process has ended by itself."""
        for role, process in self._running.items():
            if process.poll() is not None:
                raise RuntimeError(f"ended with {process.returncode}:{self._tail(role)}")

    def _tail(self, role: str) -> str:
        return "\n".join([f"\ndurably {role}", *self.log_of(role).read_text().splitlines()[-30:]])

    def kill(self) -> int:
        """Kills the victim, which has no chance to clean up. Returns its process id."""
        process = self._running.pop(self.victim)
        process.send_signal(signal.SIGKILL)
        process.wait()
        return process.pid

    def stop(self) -> None:
        """Asks every process to end, and waits."""
        for process in self._running.values():
            process.terminate()
        for process in self._running.values():
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._running.clear()
