"""Running connectors: one app in one process, until it is told to end."""

from __future__ import annotations

import asyncio
import logging
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

logger = logging.getLogger("durably.connectors")

_LOOK = 0.2  # seconds until a crash of the app is noticed
_LEAVE = 20.0  # seconds that Kafka has to let the app go


def run_connectors(
    settings: Settings, module: str, *, name: str | None, port: int | None, ready: Callable[[App], None]
) -> None:
    """Runs what a module declares until SIGTERM or SIGINT.

    Args:
        settings: where the installation is.
        module: ``package.module`` or ``path/to/file.py``. An `App` in it is the one that is run.
        name: of the app, where the module makes none; by default the module's.
        port: of the web server, on loopback; 0: none; None: as the app says.
        ready: called when partitions are assigned and read.

    Raises:
        ConfigurationError: the module declares nothing, or something that cannot be; its App has a name already.
        DurablyError: the app crashed; what was in the works is delivered again to the next one.
    """
    payload_codec.installed()  # a wrong setting should end the process, and not every message
    # What the module makes by itself, an App or a client, is to be on the same installation.
    os.environ |= {"DURABLY_URL": settings.url, "DURABLY_NAMESPACE": settings.namespace}
    loaded = load_module(module)
    connectors = declared.all()
    apps = {id(value): value for value in vars(loaded).values() if isinstance(value, App)}
    if not connectors and not apps:
        raise ConfigurationError(
            f"{module} declares no connector: mark functions with @trigger or @sink, or make an App"
        )
    if len(apps) > 1:
        raise ConfigurationError(f"{module} has {len(apps)} Apps: a process runs one")
    if apps and name is not None:
        raise ConfigurationError(f"{module} makes its App by itself: name it there, and not {name!r}")
    (app,) = apps.values() or [App(name or loaded.__name__.rpartition(".")[2], settings)]
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
    crash: BaseException | None
    try:
        await app.start()
        ending = asyncio.create_task(ended.wait())
        while not ending.done() and not app.crashed:
            await asyncio.wait([ending], timeout=_LOOK)
        ending.cancel()
        crash = app.crash_reason if app.crashed else None
    except Exception as e:  # such as a port that is taken
        crash = e
    finally:
        await _left(app)
    if crash is not None:
        logger.error("the app crashed", exc_info=crash)  # Faust tells nobody where
        raise DurablyError(f"Faust gave up: {type(crash).__name__}: {crash}") from crash


async def _left(app: App) -> None:
    """Ends an app; or the process, where Kafka does not answer: Faust's threads wait for it, and Python for them."""
    leaving = asyncio.create_task(app.stop())
    await asyncio.wait([leaving], timeout=_LEAVE)
    if not leaving.done():
        logger.error(
            "Kafka does not answer: this process ends without its leave, and what was in the works comes again"
        )
        os._exit(1)
    leaving.result()
