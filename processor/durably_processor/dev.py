"""Everything in one process, on the embedded broker: what ``durably dev`` runs."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from durably.authoring import registry
from durably.broker import connect
from durably.builds import served
from durably.observability.endpoint import Watched, serving
from durably.worker import Worker

from durably_processor.process import make_processor, prepare

if TYPE_CHECKING:
    from durably.broker.port import Broker
    from durably.settings import Settings

log = logging.getLogger("durably.dev")


class Dev:
    """A processor and a worker on one broker, each on threads of its own.

    Args:
        settings: of both.
        broker: the embedded one.
        queues: what the worker serves, besides every queue that a registered step names.
        concurrency: how many steps run at once.
        counting: whether somebody reads the metrics.
    """

    def __init__(
        self, settings: Settings, broker: Broker, queues: Sequence[str], concurrency: int, *, counting: bool = False
    ) -> None:
        catalogue = settings.catalogue
        plain = sorted({*queues, *(step.queue for step in registry.steps.values())})
        names = tuple(served(plain, settings.build))
        broker.create(catalogue.topics(names))
        self._ready = threading.Event()
        self._failed: BaseException | None = None
        self._processor = make_processor(settings, broker, self._ready.set, counting=counting)
        self._worker = Worker(broker, catalogue, registry, queues=names, concurrency=concurrency, counting=counting)
        self._thread = threading.Thread(target=self._run, name="durably-advance")

    def start(self, timeout: float = 60) -> None:
        """Returns when runs can be started. Raises what kept the processor from it."""
        self._thread.start()
        if not self._ready.wait(timeout) and self._failed is None:
            raise TimeoutError(f"the processor is not ready after {timeout} s")
        if self._failed is not None:
            raise self._failed
        self._worker.start()

    def stop(self) -> None:
        """Drains the worker, then commits what the processor has under way."""
        self._worker.stop()
        self._worker.join()
        self._processor.stop()
        self._thread.join()

    @property
    def parts(self) -> Sequence[Watched]:
        """Who has something to tell of itself."""
        return self._processor, self._worker

    @property
    def alive(self) -> bool:
        """The processor runs."""
        return self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._processor.run()
        except BaseException as e:  # told to whoever waits in start, or by alive
            self._failed = e
            if self._ready.is_set():
                log.exception("the processor has ended")
            self._ready.set()


def run_dev(
    settings: Settings,
    modules: Sequence[str],
    *,
    queues: Sequence[str],
    concurrency: int,
    ready: Callable[[], None] | None = None,
    metrics: str | None = None,
) -> None:
    """Runs everything until SIGTERM or SIGINT; ``metrics``: where it tells of itself, as `Endpoint` takes it."""
    prepare(modules)
    broker = connect(settings.url, settings.kafka)
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    try:
        dev = Dev(settings, broker, queues, concurrency, counting=metrics is not None)
        with serving(metrics, dev.parts):
            dev.start()
            if ready is not None:
                ready()
            while not stopping.wait(0.5) and dev.alive:
                pass
            dev.stop()
    finally:
        broker.close()
