"""``durably connectors``: triggers, sinks and monitors, by Faust."""

import importlib
from typing import TYPE_CHECKING, Annotated, Any

import typer

from durably.cli.shell import Shell

if TYPE_CHECKING:
    from types import ModuleType


def connectors(
    shell: Shell,
    module: Annotated[
        str, typer.Argument(metavar="MODULE", help="Where connectors are: package.module or path/to/file.py.")
    ],
    *,
    name: Annotated[
        str | None,
        typer.Option(help="Processes of one name share the work.", show_default="the module's"),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            envvar="DURABLY_CONNECTORS_PORT",
            min=0,
            max=65_535,
            help="The web server's, on 127.0.0.1; 0: none.",
            show_default="8234",
        ),
    ] = None,
) -> None:
    """Runs triggers, sinks and monitors."""
    settings = shell.settings()

    def ready(app: Any) -> None:
        shell.say(f"connectors ready: {settings.url}, namespace {settings.namespace}, group {app.conf.id}")

    _faust().run_connectors(settings, module, name=name, port=port, ready=ready)


def _faust() -> "ModuleType":
    """The runner, found by name: the SDK stands below it and cannot import it."""
    from durably.errors import ConfigurationError

    try:
        return importlib.import_module("durably_connectors.faust.server")
    except ModuleNotFoundError as e:
        raise ConfigurationError(f"connectors need {e.name}: pip install 'durably[faust]'") from e
