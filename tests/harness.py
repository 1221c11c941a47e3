"""A whole installation on threads of the test: processors, workers and a client on one broker and namespace."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

from durably.authoring import Registry, registry
from durably.broker import connect
from durably.client import Client
from durably.worker import Worker
from durably_processor.engine import guards
from durably_processor.processor import Processor
from durably_schemas import Catalogue

if TYPE_CHECKING:
    from collections.abc import Sequence

PARTITIONS = 2


class RunningProcessor:
    """A processor on a thread."""

    def __init__(self, processor: Processor, ready: threading.Event) -> None:
        self._processor = processor
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        if not ready.wait(60):
            self.stop()
            raise TimeoutError("the processor is not ready") from self.error

    def _run(self) -> None:
        try:
            self._processor.run()
        except BaseException as e:
            self.error = e

    def stop(self) -> None:
        self._processor.stop()
        self._thread.join(30)
        assert not self._thread.is_alive()


class System:
    """What a test needs to start runs and see what becomes of them."""

    def __init__(self, url: str, namespace: str, folder: Path, *, kafka: dict[str, str] | None = None) -> None:
        guards.install()
        self.url, self.namespace, self.folder = url, namespace, folder
        self.catalogue = Catalogue(namespace, PARTITIONS)
        self.broker = connect(url, kafka or {})
        self.broker.create(self.catalogue.topics(("default", "other")))
        self.client = Client(url, namespace=namespace)
        self.processors: list[RunningProcessor] = []
        self.workers: list[Worker] = []

    def start_processor(
        self, name: str = "p", *, wait: bool = True, registry: Registry = registry, **options
    ) -> RunningProcessor:
        ready = threading.Event()
        if not wait:
            ready.set()
        processor = Processor(self.broker, self.catalogue, registry, self.folder / name, ready=ready.set, **options)
        running = RunningProcessor(processor, ready)
        self.processors.append(running)
        return running

    def start_worker(
        self, queues: Sequence[str] = ("default", "other"), *, registry: Registry = registry, **options
    ) -> Worker:
        worker = Worker(self.broker, self.catalogue, registry, queues=queues, **options)
        worker.start()
        self.workers.append(worker)
        return worker

    def stop_processor(self, running: RunningProcessor) -> None:
        self.processors.remove(running)
        running.stop()

    def close(self) -> None:
        self.client.close()
        for worker in self.workers:
            worker.stop(5)
        for worker in self.workers:
            worker.join()
            assert worker.error is None, worker.error
        for running in self.processors:
            running.stop()
        self.broker.close()
        guards.uninstall()
