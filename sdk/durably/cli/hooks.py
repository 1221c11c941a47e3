"""``durably hooks …``: looking at what runs wait for, and giving it to them."""

from typing import Annotated

import typer

from durably.cli.shell import Shell, checked_id

Token = Annotated[str, typer.Argument(help="The hook's token.", show_default=False)]


def list_(
    shell: Shell,
    run_id: Annotated[
        str | None, typer.Option("--run", metavar="RUN", callback=checked_id, help="Only hooks of this run.")
    ] = None,
    workflow: Annotated[str | None, typer.Option(help="Only hooks of runs of this workflow.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 50,
) -> None:
    """Lists open hooks, those of newer runs first."""
    from durably.cli import output
    from durably.client.hooks import run_hooks
    from durably.client.listing import list_runs
    from durably.errors import RunNotFoundError

    with shell.connection() as connection:
        if run_id is not None:
            found = run_hooks(connection, run_id)
        else:
            found = []
            for run in list_runs(connection, workflow=workflow, limit=None):
                if run.hooks and len(found) < limit:
                    try:
                        found += run_hooks(connection, run.run_id)
                    except RunNotFoundError:  # the topic of the summaries outlives a store that was emptied by hand
                        continue
    hooks = [hook.record for hook in found[:limit]]
    shell.show(hooks, lambda: output.hooks_table(hooks))


def show(shell: Shell, token: Token) -> None:
    """Shows one hook, with what its workflow left for whoever resumes it."""
    from durably.cli import output
    from durably.client.hooks import get_hook

    with shell.connection() as connection:
        hook = get_hook(connection, token).record
    shell.show(hook, lambda: output.hook_table(hook))


def resume(
    shell: Shell,
    token: Token,
    payload: Annotated[
        str | None, typer.Argument(metavar="[JSON]", help="What the workflow receives; null by default.")
    ] = None,
    *,
    resume_id: Annotated[
        str | None, typer.Option(metavar="ID", help="Names this delivery: a second one of the same name is dropped.")
    ] = None,
) -> None:
    """Hands a payload to a hook; returns when the run's log has it."""
    import msgspec
    from durably_schemas.records import Payload

    from durably import payload_codec
    from durably.cli.start import parsed
    from durably.client.hooks import resume_hook
    from durably.payloads import JSON, encode

    value = None if payload is None else parsed(payload, "the payload")
    payload_codec.installed()  # a wrong setting should be told before anything is sent
    with shell.connection() as connection:
        sent = encode(Payload(content_type=JSON, data=msgspec.json.encode(value)))
        run = resume_hook(connection, token, sent, resume_id)
    shell.show({"token": token, "run_id": run.run_id}, lambda: f"run {run.run_id} has it")
