"""Processes of the command line, real ones, on a namespace of their own: what tests kill, stop and starve."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from durably.broker import connect
from durably.client import Client
from durably_schemas import Catalogue

if TYPE_CHECKING:
    from collections.abc import Mapping

DURABLY = Path(sys.executable).parent / "durably"
SESSION = 6.0
"""Seconds after which a silent process is no longer a member of its group: the least that brokers allow by default."""


class Installation:
    """A namespace, a client, and processors and workers that run one module.

    Args:
        kafka: ``host:port``.
        namespace: of the topics, which are created.
        folder: of the logs and the data directories, each named as its process.
        module: the file with workflows and steps.
        partitions: of each topic.
        environment: of every process, besides what names the installation.
    """

    def __init__(
        self,
        kafka: str,
        namespace: str,
        folder: Path,
        module: Path,
        *,
        partitions: int = 4,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.module = module
        self.url = f"kafka://{kafka}"
        self.namespace = namespace
        self.catalogue = Catalogue(namespace, partitions)
        self.broker = connect(self.url)
        self.broker.create(self.catalogue.topics())
        self.client = Client(self.url, namespace=namespace)
        self.processes: list[subprocess.Popen[bytes]] = []
        self._environment = dict(environment or {})

    def log(self, name: str) -> Path:
        """What the processes of this name have said."""
        return self.folder / f"{name}.log"

    def store(self, name: str) -> Path:
        """The RocksDBs of the processor of this name, one folder for each partition."""
        return self.folder / name / self.namespace

    def spawn(
        self, role: str, name: str, *, url: str | None = None, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """A process, which is not ready yet. ``url``: where it believes the broker to be."""
        variables = {
            "DURABLY_URL": url or self.url,
            "DURABLY_NAMESPACE": self.namespace,
            "DURABLY_PARTITIONS": str(self.catalogue.partitions),
            "DURABLY_DATA_DIR": str(self.folder / name),
            "DURABLY_KAFKA_SESSION_TIMEOUT_MS": str(int(SESSION * 1000)),
        }
        every = os.environ | variables | self._environment | dict(environment or {})
        with self.log(name).open("ab") as log:
            process = subprocess.Popen([DURABLY, role, str(self.module)], env=every, stdout=log, stderr=log)
        self.processes.append(process)
        return process

    def start(
        self, role: str, name: str, *, url: str | None = None, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """A process that is ready: a processor owns its partitions. ``url``: as in `spawn`."""
        before = self.log(name).stat().st_size if self.log(name).exists() else 0
        process = self.spawn(role, name, url=url, environment=environment)
        deadline = time.monotonic() + 60
        while b"ready" not in self.log(name).read_bytes()[before:]:
            assert process.poll() is None, self.log(name).read_text()
            assert time.monotonic() < deadline, f"{name} is not ready"
            time.sleep(0.05)
        return process

    def end(self) -> None:
        """Ends all processes in peace, and those that do not heed it."""
        for process in self.processes:
            process.send_signal(signal.SIGCONT)
            process.terminate()
        for process in self.processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def close(self) -> None:
        """Ends everything, and says what was logged, to be shown where a test fails."""
        self.client.close()
        self.end()
        self.broker.close()
        for log in sorted(self.folder.glob("*.log")):
            print(log.name, log.read_text()[-4000:], sep="\n")
