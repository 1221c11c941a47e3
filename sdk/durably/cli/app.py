"""All commands, and under which names they stand."""

from __future__ import annotations

from typing import Annotated

import typer

from durably.cli import acls, connectors, gateway, health, hooks, processes, replay, runs, start, topics
from durably.cli.shell import command

app = typer.Typer(
    help="Durable workflows whose database is the Kafka you already run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_runs = typer.Typer(help="Looks at runs, cancels them, and does them again.", no_args_is_help=True)
_hooks = typer.Typer(help="Looks at what runs wait for, and gives it to them.", no_args_is_help=True)
_topics = typer.Typer(help="Creates topics, and checks them.", no_args_is_help=True)
_schemas = typer.Typer(help="The wire contract.", no_args_is_help=True)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(version("durably"))
        raise typer.Exit


@app.callback()
def _before_commands(
    *,
    json: Annotated[bool, typer.Option("--json", help="Print JSON; as behind the command.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version, and end.")
    ] = False,
) -> None:
    """What stands before a command. `durably.cli.shell.command` looks at it."""


command(app, "dev")(processes.dev)
command(app, "processor")(processes.processor)
command(app, "worker")(processes.worker)
command(app, "gateway")(gateway.gateway)
command(app, "connectors")(connectors.connectors)
command(app, "start")(start.start)
command(app, "stream")(runs.stream)
command(app, "replay")(replay.replay)
command(app, "health")(health.health)
command(app, "acls")(acls.acls)
command(_runs, "list")(runs.list_)
command(_runs, "show")(runs.show)
command(_runs, "events")(runs.events)
command(_runs, "cancel")(runs.cancel)
command(_runs, "rerun")(runs.rerun)
command(_runs, "reset")(runs.reset)
command(_runs, "watch")(runs.watch)
command(_hooks, "list")(hooks.list_)
command(_hooks, "show")(hooks.show)
command(_hooks, "resume")(hooks.resume)
command(_topics, "create")(topics.create)
command(_topics, "check")(topics.check)
command(_schemas, "export")(topics.export)
app.add_typer(_runs, name="runs")
app.add_typer(_hooks, name="hooks")
app.add_typer(_topics, name="topics")
app.add_typer(_schemas, name="schemas")
