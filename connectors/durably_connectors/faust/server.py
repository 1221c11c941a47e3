"""Running connectors: one app in one process, until it is told to end."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING

from durably import payload_codec
from durably.authoring import load_module
from durably.errors import ConfigurationError, DurablyError

from durably_connectors.faust.app import PORT, App
from durably_connectors.faust.declared import declared

if TYPE_CHECKING:
    from collections.abc import Callable

    from durably.settings import Settings

_LOOK = 0.2  # seconds until a crash of the app is noticed


def run_connectors(
    settings: Settings, module: str, *, name: str | None, port: int | None, ready: Callable[[App], None]
) -> None:
    """Runs what a module declares until SIGTERM or SIGINT.

    Args:
        settings: where the installation is.
        module: ``package.module`` or ``path/to/file.py``. An `App` in it is the one that is run.
        name: of the app, where the module makes none; the module's own by default.
        port: of the web server, on loopback; 0: none; None: as the app says.
        ready: called when partitions are assigned and read.

    Raises:
        ConfigurationError: the module declares nothing, or something that cannot be.
        DurablyError: the app crashed; what was in the works is delivered again to the next one.
    """
    payload_codec.installed()  # a wrong setting should end the process, and not every message
    # What the module makes by itself, an App or a client, is to be on the same installation.
    os.environ |= {"DURABLY_URL": settings.url, "DURABLY_NAMESPACE": settings.namespace}
    loaded = load_module(module)
    connectors = declared.all()
    own = next((value for value in vars(loaded).values() if isinstance(value, App)), None)
    if not connectors and own is None:
        raise ConfigurationError(
            f"{module} declares no connector: mark functions with @trigger or @sink, or make an App"
        )
    app = own or App(name or loaded.__name__.rpartition(".")[2], settings)
    if port is not None:
        app.conf.web_enabled, app.conf.web_port = port != 0, port or PORT
    app.attach(connectors)
    asyncio.run(_run(app, ready))


async def _run(app: App, ready: Callable[[App], None]) -> None:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    told = False

    async def assigned(*_: object, **__: object) -> None:
        nonlocal told
        if not told:
            told = True
            ready(app)

    app.on_rebalance_complete.connect(assigned)
    try:
        await app.start()
        ending = asyncio.create_task(ended.wait())
        while not ending.done() and not app.crashed:
            await asyncio.wait([ending], timeout=_LOOK)
        ending.cancel()
        crash = app.crash_reason if app.crashed else None
    finally:
        await app.stop()
    if crash is not None:
        raise DurablyError(f"Faust gave up: {type(crash).__name__}: {crash}") from crash
