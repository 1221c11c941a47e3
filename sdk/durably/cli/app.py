"""All commands, and under which names they stand."""

from __future__ import annotations

import typer

from durably.cli import health, processes, runs, start, topics
from durably.cli.shell import command

app = typer.Typer(
    help="Durable workflows whose database is the Kafka you already run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_runs = typer.Typer(help="Looks at runs, and cancels them.", no_args_is_help=True)
_topics = typer.Typer(help="Creates topics, and checks them.", no_args_is_help=True)
_schemas = typer.Typer(help="The wire contract.", no_args_is_help=True)

command(app, "dev")(processes.dev)
command(app, "processor")(processes.processor)
command(app, "worker")(processes.worker)
command(app, "start")(start.start)
command(app, "stream")(runs.stream)
command(app, "health")(health.health)
command(_runs, "list")(runs.list_)
command(_runs, "show")(runs.show)
command(_runs, "events")(runs.events)
command(_runs, "cancel")(runs.cancel)
command(_runs, "watch")(runs.watch)
command(_topics, "create")(topics.create)
command(_topics, "check")(topics.check)
command(_schemas, "export")(topics.export)
app.add_typer(_runs, name="runs")
app.add_typer(_topics, name="topics")
app.add_typer(_schemas, name="schemas")
