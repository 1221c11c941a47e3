"""Warm copies of the stores of partitions that others own, so that a take-over reads only what came last.

    not owned       ``Standby`` has the store open, and reads the partition's topics into it, on a thread of its own
    assigned        it lets go of that store, which is then the owner's; it is where `Restore` begins
    released        the store is closed by the owner, and kept up to date here again

At any time one of the two has a store open: the processor calls `let_go` before it opens one, and `keep` after it has
closed it. A copy is nothing but a store that is restored again and again, so there is nothing else to trust or repair.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from pathlib import Path

from durably.broker.port import TP, Broker
from durably.errors import BrokerError, ConfigurationError
from durably_schemas import Catalogue, Codec

from durably_processor.restore import Restore
from durably_processor.state.store import Store

log = logging.getLogger("durably.processor")

PAUSE = 5.0
"""Seconds between two looks at what is new: about so much is left to read at a take-over."""
A_STEP = 0.05
"""Seconds of reading after which an assignment gets its turn."""


class Standby:
    """Keeps copies of all partitions but those that are let go.

    Args:
        broker, catalogue, codec: of the topics.
        data_dir: where the stores are: the processor's own.
    """

    def __init__(self, broker: Broker, catalogue: Catalogue, codec: Codec, data_dir: Path) -> None:
        self._broker = broker
        self._catalogue = catalogue
        self._codec = codec
        self._data_dir = data_dir
        self._lock = threading.Lock()  # guards the stores
        self._stores: dict[int, Store] = {}
        self._kept = set(range(catalogue.partitions))
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="durably-standby", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends it; the copies stay on disk."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()

    def let_go(self, partitions: Iterable[int]) -> None:
        """When this returns, none of these stores is open here, nor will be until `keep`."""
        partitions = set(partitions)
        self._kept -= partitions  # seen between two steps, so that the lock is soon free
        with self._lock:
            for number in partitions & self._stores.keys():
                self._stores.pop(number).close()

    def keep(self, partition: int) -> None:
        """The owner has closed this partition's store."""
        self._kept.add(partition)

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._bring_up()
                self._stopping.wait(PAUSE)
        finally:
            self.let_go(set(self._stores))

    def _bring_up(self) -> None:
        topics = (self._catalogue.snapshots, self._catalogue.events)
        try:
            ends = self._broker.end_offsets([TP(topic, number) for topic in topics for number in sorted(self._kept)])
        except BrokerError as e:  # it may come back
            log.warning("copies are not brought up to date: %s", e)
            return
        for number in sorted(self._kept):
            try:
                with self._lock:
                    if number in self._kept:
                        self._restore(number, [ends.get(TP(topic, number), 0) for topic in topics])
            except (BrokerError, ConfigurationError, LookupError) as e:  # the next round tries again
                log.warning("the copy of partition %s is not brought up to date: %s", number, e)

    def _restore(self, number: int, ends: list[int]) -> None:
        store = self._stores.get(number)
        if store is None:
            store = self._stores[number] = Store(self._data_dir / f"partition-{number}")
        if [store.snapshots, store.checkpoint] == ends:
            return
        restore = Restore(number, store, self._broker, self._catalogue, self._codec, "the copy of partition")
        try:
            while number in self._kept and not self._stopping.is_set() and not restore.step(A_STEP):
                pass
        finally:
            restore.close()
