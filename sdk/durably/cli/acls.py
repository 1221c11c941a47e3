"""``durably acls``: what a role may do, shown, or granted."""

from typing import Annotated, Literal

import typer

from durably.broker.acl import Option, Role
from durably.builds import served
from durably.cli.shell import Build, Shell, checked_queues


def acls(
    shell: Shell,
    role: Annotated[Role, typer.Option(help="What the user is to be.", show_default=False)],
    principal: Annotated[
        str, typer.Option(metavar="User:NAME", help="The user, as the brokers know it.", show_default=False)
    ],
    *,
    queues: Annotated[
        list[str],
        typer.Option(
            "--queue",
            callback=checked_queues,
            help="A queue that the worker serves. Repeatable.",
            default_factory=lambda: ["default"],
        ),
    ],
    build: Build = None,
    starts_runs: Annotated[
        bool, typer.Option("--starts-runs", help="Worker: its steps start, resume and cancel runs, or ask about them.")
    ] = False,
    reads_streams: Annotated[bool, typer.Option("--reads-streams", help="Worker: its steps read streams.")] = False,
    answers_webhooks: Annotated[
        bool, typer.Option("--answers-webhooks", help="Worker: its steps respond to webhooks.")
    ] = False,
    feeds_streams: Annotated[
        bool, typer.Option("--feeds-streams", help="Client: it passes iterators as arguments.")
    ] = False,
    retention: Annotated[bool, typer.Option("--retention", help="Processor: it runs with --retention.")] = False,
    replays: Annotated[
        bool, typer.Option("--replays", help="Gateway: its dashboard sends dead letters again.")
    ] = False,
    apply: Annotated[bool, typer.Option("--apply", help="Add them; this needs Alter on the cluster.")] = False,
    format: Annotated[  # noqa: A002 - named as the option
        Literal["kafka-acls", "json"], typer.Option(help="Commands of Kafka's own, or one JSON object on each line.")
    ] = "kafka-acls",
) -> None:
    """Prints the ACLs that a role needs, and no more; with --apply, adds them."""
    import msgspec

    from durably.broker.acl import required_acls
    from durably.errors import ConfigurationError

    settings = shell.settings()
    bootstrap = settings.url.removeprefix("kafka://")
    if bootstrap == settings.url:
        raise ConfigurationError(f"{settings.url} has no ACLs: who reaches its folder may do everything; use kafka://…")
    wanted: dict[Option, bool] = {
        "starts-runs": starts_runs,
        "reads-streams": reads_streams,
        "answers-webhooks": answers_webhooks,
        "feeds-streams": feeds_streams,
        "retention": retention,
        "replays": replays,
    }
    options = [option for option, chosen in wanted.items() if chosen]
    needed = required_acls(role, settings.catalogue, principal, queues=served(queues, build), options=options)
    if apply:
        from durably.broker.kafka import KafkaBroker

        broker = KafkaBroker(bootstrap, settings.kafka)
        try:
            broker.grant(needed)
        finally:
            broker.close()
    for acl in needed:
        if shell.json or format == "json":
            shell.line(msgspec.to_builtins(acl))
        elif apply:
            pattern = "*" if acl.prefixed else ""
            typer.echo(f"granted {acl.principal} {acl.operation} on {acl.resource} {acl.name}{pattern}: {acl.why}")
        else:
            typer.echo(f"# {acl.why}\n{acl.command(bootstrap)}")
