"""The embedded broker: the broker port in one process, over RocksDB.

Where it is simpler than Kafka:

* A record is durable once RocksDB's write-ahead log has it, without fsync: it survives ``kill -9`` of the process at
  any moment, not the loss of power.
* A transaction lies in memory until it commits, as one RocksDB batch with its offsets. So an open or aborted one leaves
  no trace in the log, readers of uncommitted records see the same as others, and no commit has an unknown outcome.
* Retention and compaction happen when the path is opened.
* The processor's process opens a path and owns it. Others reach it through a Unix socket in its folder, as clients: the
  members of groups, and transactions, live in the owner.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from durably.broker.embedded_broker import EmbeddedBroker
from durably.broker.embedded_group import Coordinator
from durably.broker.embedded_log import Log, PathLocked
from durably.broker.embedded_remote import RemoteBroker
from durably.broker.embedded_socket import Server
from durably.errors import BrokerUnreachable

if TYPE_CHECKING:
    from durably.broker.port import Broker

__all__ = ["EmbeddedBroker", "PathLocked", "open_embedded"]

OPEN_SECONDS = 5.0  # how long an owner that starts or stops just now is waited for
_lock = threading.Lock()
_owned: dict[tuple[int, Path], _Owned] = {}


def open_embedded(path: str | Path, *, own: bool = True) -> Broker:
    """A broker over this path, which is created when it is missing.

    In one process all brokers of a path share one log; it is closed when they, and all that was made from them, are.

    Args:
        path: the folder.
        own: whether to become the owner where there is none; else one that starts just now is waited for.

    Raises:
        PathLocked: another process has the path open and does not answer.
        BrokerUnreachable: nobody has it open, and we are not to.
        ConfigurationError: the path cannot be opened.
    """
    folder = Path(path).expanduser().resolve()
    deadline = time.monotonic() + OPEN_SECONDS
    while True:
        try:
            return _own(folder) if own or (os.getpid(), folder) in _owned else RemoteBroker(folder)
        except BrokerUnreachable:
            if time.monotonic() >= deadline:
                raise BrokerUnreachable(
                    f"nothing runs on embedded:{path}: start it with `durably dev MODULE --path {path}`"
                ) from None
        except PathLocked as locked:
            try:
                return RemoteBroker(folder)
            except BrokerUnreachable:
                if time.monotonic() >= deadline:
                    raise locked from None
        time.sleep(0.01)


def _own(folder: Path) -> EmbeddedBroker:
    # A forked child has its parent's memory but not its lock: the process id tells them apart.
    name = (os.getpid(), folder)
    with _lock:
        if not (owned := _owned.get(name)):
            owned = _owned[name] = _Owned(folder)
        return EmbeddedBroker(owned.log, owned.coordinator)


class _Owned:
    """A path that this process owns."""

    def __init__(self, folder: Path) -> None:
        self.log = Log(folder)
        self.coordinator = Coordinator()
        try:
            self.server = Server(self.log, self.coordinator)
        except BaseException:
            self.log.close()
            raise
        self.log.on_idle = self._close

    def _close(self) -> None:
        with _lock:
            # Somebody may have opened the path again since the last holder let go.
            if self.log.holders or self.log.closed:
                return
            self.server.close()
            self.log.close()
            del _owned[os.getpid(), self.log.path]
