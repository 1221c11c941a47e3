"""``durably runs …`` and ``durably stream``: looking at runs, and cancelling them."""

from contextlib import nullcontext
from typing import Annotated, cast, get_args

import typer

from durably.cli.shell import Shell, checked_id

RunId = Annotated[str, typer.Argument(metavar="RUN", callback=checked_id, help="The run's id.", show_default=False)]


def list_(
    shell: Shell,
    workflow: Annotated[str | None, typer.Option(help="Only runs of this workflow.")] = None,
    status: Annotated[
        list[str] | None, typer.Option(help="Only runs that are pending, running, blocked, completed… Repeatable.")
    ] = None,
    attribute: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Only runs with this attribute. Repeatable.")
    ] = None,
    build: Annotated[str | None, typer.Option(help="Only runs that are pinned to this build.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 50,
) -> None:
    """Lists runs, newest first. In JSON, `events` is the log's length when the status, attributes or hooks last changed."""
    from durably_schemas.records import RunStatus

    from durably.cli import output
    from durably.cli.start import pairs
    from durably.client.listing import list_runs

    known = get_args(RunStatus)
    for name in status or ():
        if name not in known:
            raise typer.BadParameter(f"--status {name!r} is none of {', '.join(known)}")
    statuses = cast("list[RunStatus] | None", status or None)
    attributes = pairs(attribute)
    with shell.connection() as connection:
        runs = list_runs(
            connection, workflow=workflow, status=statuses, attributes=attributes, build=build, limit=limit
        )
    shell.show(runs, lambda: output.runs_table(runs))


def show(shell: Shell, run_id: RunId) -> None:
    """Shows one run."""
    from durably.cli import output
    from durably.client.run import Run

    with shell.connection() as connection:
        summary = Run[object](connection, run_id).describe()
    shell.show(summary, lambda: output.run_table(summary))


def events(shell: Shell, run_id: RunId) -> None:
    """Prints a run's log. In JSON, each event has its `record`, which `durably replay` reads."""
    from durably import history
    from durably.cli import output
    from durably.client.run import Run

    with shell.connection() as connection:
        log = Run[object](connection, run_id).events()
    shell.show(history.shown(log) if shell.json else log, lambda: output.events_table(log))


def cancel(
    shell: Shell,
    run_id: RunId,
    reason: Annotated[str | None, typer.Option(help="Recorded in the run's log.")] = None,
) -> None:
    """Cancels a run: its cleanup may still run steps."""
    from durably.client.run import Run

    with shell.connection() as connection:
        run = Run[object](connection, run_id)
        run.cancel(reason)
        status = run.status()
    shell.show({"run_id": run_id, "status": status}, lambda: f"{run_id} is {status}")


def rerun(
    shell: Shell,
    run_id: RunId,
    new: Annotated[
        str | None,
        typer.Option("--run-id", callback=checked_id, help="An id for the new run; an existing run is attached to."),
    ] = None,
) -> None:
    """Starts a new run with the workflow, input and attributes of another one. What that one did is done again."""
    from durably.client.run import Run

    with shell.connection() as connection:
        run = Run[object](connection, run_id).rerun(run_id=new)
    shell.show({"run_id": run.id, "rerun_of": run_id}, lambda: run.id)


def reset(
    shell: Shell,
    run_id: RunId,
    to_event: Annotated[
        int, typer.Option("--to-event", metavar="N", min=1, help="The last event that the new run keeps.")
    ],
    reason: Annotated[str | None, typer.Option(help="Recorded in both runs' logs.")] = None,
) -> None:
    """Starts a new run that goes on from an event of this one, which is cancelled if it has not ended."""
    from durably.client.run import Run

    with shell.connection() as connection:
        run = Run[object](connection, run_id).reset(to_event, reason=reason)
    shell.show({"run_id": run.id, "reset_of": run_id, "to_event": to_event}, lambda: run.id)


def watch(shell: Shell, run_id: RunId) -> None:
    """Follows a run until it ends: each event is pushed as it is committed."""
    from rich.live import Live

    from durably.cli.watch import RunView
    from durably.client.tail import follow_events

    with shell.connection() as connection:
        if shell.json:
            for batch in follow_events(connection, run_id):
                for event in batch:
                    shell.line(event)
            return
        view, console = RunView(run_id), shell.console()
        # What is no terminal cannot be redrawn: a log gets the last picture only.
        live = Live(view.render(), console=console, auto_refresh=False) if console.is_terminal else None
        with live or nullcontext():
            for batch in follow_events(connection, run_id):
                for event in batch:
                    view.take(event)
                if live is not None:
                    live.update(view.render(), refresh=True)
        if live is None:
            console.print(view.render())


def stream(
    shell: Shell,
    run_id: RunId,
    name: Annotated[
        str | None, typer.Argument(metavar="[NAMESPACE]", help="Which of its streams.", show_default="default")
    ] = None,
    start: Annotated[
        int, typer.Option("--from", metavar="N", help="The first chunk, from 0; negative: from the end.")
    ] = 0,
) -> None:
    """Prints the values of a stream as they come, until it ends."""
    from durably.client.run import Run
    from durably.client.stream import shown

    with shell.connection() as connection:
        Run[object](
            connection, run_id
        ).describe()  # a stream may be awaited before its run exists; who types an id has more likely mistyped it
        for value in shown(connection, run_id, name, start, Run):
            if isinstance(value, str) and not shell.json:
                typer.echo(value)
            else:
                shell.line(value)
