"""A processor as a process: its interpreter, its modules, its signals."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from durably import payload_codec
from durably.authoring import load_module, registry
from durably.broker import connect
from durably.errors import ConfigurationError
from durably.observability.endpoint import serving

from durably_processor.engine import guards
from durably_processor.processor import Processor

if TYPE_CHECKING:
    from durably.broker.port import Broker
    from durably.settings import Settings

SWITCH_INTERVAL = 0.0005
"""Seconds. A thread that wakes for a record must not wait 5 ms, Python's default, for one that is encoding."""


def prepare(modules: Sequence[str]) -> None:
    """Makes this interpreter fit to run workflows, and imports them.

    Sets of str are ordered by the hash seed, and local time is the process's: every processor must have the same of
    both, so the interpreter is started again with PYTHONHASHSEED=0 and TZ=UTC where they are not. Guards are installed before user modules bind the functions they replace.

    Raises:
        ConfigurationError: a module cannot be imported, or none has a workflow, or the payload codec cannot be had.
    """
    wanted = {"PYTHONHASHSEED": "0", "TZ": "UTC"}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.environ.update(wanted)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 - this very program again
    sys.setswitchinterval(SWITCH_INTERVAL)
    guards.install()
    for module in modules:
        load_module(module)
    payload_codec.installed()  # a wrong setting should end the process, and not every run
    if not registry.workflows:
        raise ConfigurationError(
            f"{', '.join(modules)}: no function is marked @workflow; name the modules that have some"
        )


def make_processor(
    settings: Settings, broker: Broker, ready: Callable[[], None] | None = None, *, counting: bool = False
) -> Processor:
    """A processor of the registered workflows; ``counting``: for somebody who reads its metrics."""
    return Processor(
        broker,
        settings.catalogue,
        registry,
        settings.data_dir / settings.namespace,
        dispatch=settings.dispatch,
        instance_id=settings.group_instance_id,
        gateway_url=settings.gateway_url,
        retention=settings.retention,
        standby=settings.standby,
        code_version=settings.code_version,
        build=settings.build,
        ready=ready,
        counting=counting,
    )


def run_processor(
    settings: Settings, modules: Sequence[str], ready: Callable[[], None] | None = None, *, metrics: str | None = None
) -> None:
    """Runs a processor until SIGTERM or SIGINT; ``metrics``: where it tells of itself, as `Endpoint` takes it."""
    prepare(modules)
    logging.getLogger("durably").setLevel(logging.INFO)
    broker = connect(settings.url, settings.kafka)
    try:
        processor = make_processor(settings, broker, ready, counting=metrics is not None)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: processor.stop())
        with serving(metrics, [processor]):
            processor.run()
    finally:
        broker.close()
