"""``durably gateway``, and the gateway that runs beside ``durably dev``."""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from durably.cli.shell import LogFormat, Shell, log_as

if TYPE_CHECKING:
    from types import ModuleType

    from durably.settings import Settings

PORT = 8233


def gateway(
    shell: Shell,
    *,
    host: Annotated[
        str, typer.Option(help="The address to listen on. One that others reach needs a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0 takes any that is free.")] = PORT,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="DURABLY_GATEWAY_TOKEN", show_envvar=True, help="What callers of the API send as bearer token."
        ),
    ] = None,
    projection: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keeps the list of runs in a file: the next start is fast.")
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            envvar="DURABLY_METRICS",
            show_envvar=True,
            help="Serve /metrics, /livez and /readyz there; a port alone is of 127.0.0.1.",
        ),
    ] = None,
    log_format: LogFormat = None,
) -> None:
    """Serves REST, webhooks and server-sent events."""
    log_as(log_format)
    settings = shell.settings()

    def ready(url: str) -> None:
        shell.say(f"gateway ready: {url}, for {settings.url}, namespace {settings.namespace}")

    _http().serve(
        settings,
        host=host,
        port=port,
        token=token or None,
        projection=projection,
        ready=ready,
        metrics=metrics or None,
    )


def beside(shell: Shell, settings: "Settings", port: int | None) -> Any:
    """A gateway to start beside other processes, or None.

    Args:
        shell: who is told why there is none.
        settings: where the broker will be.
        port: None takes `PORT`, and does without a gateway where that cannot be had; 0 wants none.

    Raises:
        ConfigurationError: the port was asked for, and cannot be had.
    """
    from durably.errors import ConfigurationError

    if port == 0:
        return None
    try:
        return _http().local_gateway(settings, PORT if port is None else port)
    except ConfigurationError as e:
        if port is not None:
            raise
        shell.say(f"no gateway: {e}")
        return None


def _http() -> "ModuleType":
    """The gateway's server, found by name: the SDK stands below it and cannot import it."""
    from durably.errors import ConfigurationError

    try:
        return importlib.import_module("durably_connectors.http.server")
    except ModuleNotFoundError as e:
        raise ConfigurationError(f"the gateway needs {e.name}: pip install 'durably[http]'") from e
