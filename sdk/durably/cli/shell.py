"""What all commands share: the options that every one has, the connection, the output, and how errors end them."""

from __future__ import annotations

import inspect
import os
import sys
import traceback
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any

import typer

from durably.errors import DurablyError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import Console, RenderableType

    from durably.broker.port import Broker
    from durably.client.connection import Connection
    from durably.settings import Settings

_COMMON = {
    "url": Annotated[
        str | None, typer.Option(help="kafka://host:port or embedded:PATH.", envvar="DURABLY_URL", show_default=False)
    ],
    "namespace": Annotated[
        str | None, typer.Option(help="Prefix of the topics.", envvar="DURABLY_NAMESPACE", show_default="durably")
    ],
    "json": Annotated[bool, typer.Option("--json", help="Print JSON.")],
    "verbose": Annotated[bool, typer.Option("--verbose", help="Print the traceback of an error.")],
}
LogFormat = Annotated[
    str | None,
    typer.Option(
        metavar="json|text",
        envvar="DURABLY_LOG_FORMAT",
        show_envvar=True,
        help="Send the log of this process to stderr in this form; else it is set up by the modules, or by nobody.",
    ),
]
_CONTEXT = "context"
_PIPE_WIDTH = 240
_NOT_GIVEN = {"url": None, "namespace": None, "json": False, "verbose": False}


class Shell:
    """One invocation of a command.

    Attributes:
        url: as given, or None.
        namespace: as given, or None.
        json: whether output is JSON, one document or one line for each entry; errors go to stderr in either form.
    """

    def __init__(self, *, url: str | None, namespace: str | None, json: bool, verbose: bool) -> None:
        self.json = json
        self.url, self.namespace, self._verbose = url, namespace, verbose

    def settings(
        self,
        *,
        url: str | None = None,
        retention: str | None = None,
        standby: bool | None = None,
        build: str | None = None,
    ) -> Settings:
        """From the options and the environment. Raises `ConfigurationError`."""
        from durably.settings import Settings

        return Settings.from_environment(
            url=url or self.url, namespace=self.namespace, retention=retention, standby=standby, build=build
        )

    @contextmanager
    def broker(self) -> Iterator[tuple[Broker, Settings]]:
        """The broker, closed afterwards."""
        from durably import broker

        settings = self.settings()
        connected = broker.connect(settings.url, settings.kafka, own=False)
        try:
            yield connected, settings
        finally:
            connected.close()

    @contextmanager
    def connection(self, timeout: float = 30) -> Iterator[Connection]:
        """A client's connection, closed afterwards."""
        from durably.client.connection import Connection

        with self.broker() as (broker, settings):
            connection = Connection(broker, settings.catalogue, timeout=timeout)
            try:
                yield connection
            finally:
                connection.close()

    def show(self, value: Any, human: Callable[[], RenderableType]) -> None:
        """Prints a result: the value as JSON, or what ``human`` makes of it."""
        if self.json:
            self.line(value)
        else:
            self.console().print(human())

    def line(self, value: Any) -> None:
        """Prints one value on one line, as JSON, at once: the reader may be a pipe that waits for it."""
        from durably.cli.output import to_json

        typer.echo(to_json(value))
        sys.stdout.flush()

    def say(self, message: str) -> None:
        """A word on what the process is doing: to stderr, so that stdout holds results alone."""
        from durably.cli.output import to_json

        if self.json:
            typer.echo(to_json({"message": message}), err=True)
        else:
            typer.echo(message, err=True)

    def console(self) -> Console:
        """Where tables and live views go. A pipe has no width: what reads it shall find each entry on one line."""
        from rich.console import Console

        as_terminal = sys.stdout.isatty() or "COLUMNS" in os.environ
        return Console(highlight=False, width=None if as_terminal else _PIPE_WIDTH)

    def fail(self, error: BaseException) -> None:
        """Prints an error, in red on a terminal."""
        from durably.cli.output import to_json

        if self._verbose:
            traceback.print_exception(error)
        kind, message = type(error).__name__, " ".join(str(error).split())
        if self.json:
            typer.echo(to_json({"error": message or kind, "type": kind}), err=True)
        elif isinstance(error, DurablyError | TimeoutError):
            typer.secho(f"error: {message}", fg="red", err=True)
        else:
            hint = "" if self._verbose else "; --verbose shows where"
            typer.secho(f"unexpected error: {kind}: {message}{hint}", fg="red", err=True)


def log_as(form: str | None) -> None:
    """Sets logging up as an option says. Raises `ConfigurationError` for a form that there is not."""
    if not form:
        return
    from durably.errors import ConfigurationError
    from durably.observability import logs

    found = next((known for known in logs.FORMATS if known == form), None)
    if found is None:
        raise ConfigurationError(f"--log-format (DURABLY_LOG_FORMAT) is {form!r}: use {' or '.join(logs.FORMATS)}")
    logs.configure(found)


def checked_id(run_id: str | None) -> str | None:
    """The callback of options and arguments that are a run's id. Raises `typer.BadParameter` where none may be this."""
    from durably.errors import ConfigurationError
    from durably.identifiers import checked_run_id

    try:
        return None if run_id is None else checked_run_id(run_id)
    except ConfigurationError as e:
        raise typer.BadParameter(str(e)) from None


def checked_queues(queues: list[str]) -> list[str]:
    """The callback of options that are queues. Raises `typer.BadParameter` where no queue may have such a name."""
    from durably_schemas import Catalogue

    try:
        for queue in queues:
            Catalogue().requests(queue)
    except ValueError as e:
        raise typer.BadParameter(str(e)) from None
    return queues


def checked_build(build: str | None) -> str | None:
    """The callback of options that are builds. Raises `typer.BadParameter` where none may have such a name."""
    from durably import builds

    try:
        return None if not build else builds.checked_build(build)
    except ValueError as e:
        raise typer.BadParameter(str(e)) from None


Build = Annotated[
    str | None,
    typer.Option(
        envvar="DURABLY_BUILD",
        callback=checked_build,
        help="The deployment that this belongs to: pinned runs keep to the workers of theirs.",
        show_default=False,
    ),
]


def command(app: typer.Typer, name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a function as a command that has the common options beside its own.

    The function takes a `Shell` first. An exception ends the command with status 1 and one line; Ctrl-C with 130.
    """

    def register(fn: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(fn, eval_str=True)

        @wraps(fn)
        def run(**given: Any) -> None:
            common = {option: given.pop(option) for option in _COMMON}
            common["json"] |= given.pop(_CONTEXT).find_root().params["json"]
            shell = Shell(**common)
            try:
                fn(shell, **given)
            except (typer.Exit, typer.Abort, typer.BadParameter):
                raise
            except KeyboardInterrupt:
                raise typer.Exit(130) from None
            except BrokenPipeError:
                # Whoever read the output has gone. Python would report the pipe again when it flushes at exit.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                raise typer.Exit(1) from None
            except Exception as e:
                shell.fail(e)
                raise typer.Exit(1) from None

        shared = [
            inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, default=_NOT_GIVEN[option], annotation=annotation)
            for option, annotation in _COMMON.items()
        ]
        shared.append(inspect.Parameter(_CONTEXT, inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context))
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in list(own.parameters.values())[1:]]
        run.__signature__ = own.replace(parameters=[*parameters, *shared])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in (*parameters, *shared)}
        app.command(name)(run)
        return fn

    return register
