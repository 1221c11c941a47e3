"""``durably topics …`` and ``durably schemas export``: the wire contract, on a cluster and on disk."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from durably.builds import served
from durably.cli.shell import Build, Shell, checked_queues

if TYPE_CHECKING:
    from durably_schemas import Catalogue
    from durably_schemas.catalogue import Topic

    from durably.broker.port import Broker, TopicState

_NEEDED = frozenset({"cleanup.policy", "message.timestamp.type"})  # by every topic
Queues = Annotated[
    list[str],
    typer.Option(
        "--queue",
        callback=checked_queues,
        help="A queue of step-requests. Repeatable.",
        default_factory=lambda: ["default"],
    ),
]
Partitions = Annotated[
    int | None, typer.Option(min=1, envvar="DURABLY_PARTITIONS", help="Of every topic.", show_default=False)
]


def create(shell: Shell, *, queues: Queues, partitions: Partitions = None, build: Build = None) -> None:
    """Creates the topics that are missing; what exists stays as it is."""
    from durably.errors import ConfigurationError

    with shell.broker() as (broker, settings):
        catalogue = _catalogue(broker, settings.catalogue, partitions)
        wanted = catalogue.topics(tuple(served(queues, build)))
        found = broker.describe([topic.name for topic in wanted])
        differing = [t for t in wanted if t.name in found and found[t.name].partitions != t.partitions]
        if differing:
            first = differing[0]
            has = found[first.name].partitions
            raise ConfigurationError(
                f"{', '.join(t.name for t in differing)}: {has} partitions, but {first.partitions} are asked for, and "
                f"the count cannot change without moving keys: use --partitions {has}, or another --namespace"
            )
        missing = [topic for topic in wanted if topic.name not in found]
        broker.create(missing)
    created, kept = [topic.name for topic in missing], sorted(found)
    shell.show(
        {"created": created, "existing": kept, "partitions": catalogue.partitions},
        lambda: "\n".join([*(f"created {name}" for name in created), *(f"exists  {name}" for name in kept)]),
    )


def check(shell: Shell, *, queues: Queues, partitions: Partitions = None, build: Build = None) -> None:
    """Compares the topics with what they are to be. Exits with 1 where one differs."""
    with shell.broker() as (broker, settings):
        problems = differences(broker, _catalogue(broker, settings.catalogue, partitions), tuple(served(queues, build)))
    shell.show(
        {"ok": not problems, "problems": problems},
        lambda: (
            "\n".join(f"{p['topic']}: {p['problem']}; {p['remedy']}" for p in problems)
            or "all topics are as they must be"
        ),
    )
    if problems:
        raise typer.Exit(1)


def export(
    shell: Shell,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Made where it does not exist.", show_default=False)],
    *,
    queues: Queues,
) -> None:
    """Writes the Avro schema of every record, and the catalogue of topics, as files."""
    import json

    import msgspec
    from durably_schemas import Catalogue
    from durably_schemas.codec import RECORDS, schema_of

    from durably.errors import ConfigurationError
    from durably.settings import Settings

    namespace = Settings.from_environment({}, url="embedded:", namespace=shell.namespace).namespace
    documents: dict[str, Any] = {f"{record.__name__}.avsc": schema_of(record.__name__) for record in RECORDS}
    documents["topics.json"] = [msgspec.to_builtins(topic) for topic in Catalogue(namespace).topics(tuple(queues))]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, document in documents.items():
            (folder / name).write_text(json.dumps(document, indent=2) + "\n")
    except OSError as e:
        raise ConfigurationError(f"cannot write to {folder}: {e}; name a folder that can be made or written to") from e
    files = list(documents)
    shell.show({"folder": str(folder), "files": files}, lambda: "\n".join(str(folder / name) for name in files))


def differences(broker: "Broker", catalogue: "Catalogue", queues: tuple[str, ...]) -> list[dict[str, Any]]:
    """What is not as the catalogue says: each with the topic, the problem, and the remedy."""
    wanted = catalogue.topics(queues)
    found = broker.describe([topic.name for topic in wanted])
    return [
        {"topic": topic.name, "problem": problem, "remedy": remedy}
        for topic in wanted
        for problem, remedy in _problems(topic, found.get(topic.name), keeps=topic.name == catalogue.events)
    ]


def _problems(topic: "Topic", state: "TopicState | None", *, keeps: bool) -> list[tuple[str, str]]:
    if state is None:
        return [("missing", "create it with `durably topics create`")]
    problems = []
    if state.partitions != topic.partitions:
        problems.append((
            f"{state.partitions} partitions where {topic.partitions} are needed",
            "all topics of a namespace need the same count: use another namespace and `durably topics create`",
        ))  # fmt: skip
    # How long inputs and streams are retained is the operator's choice; that the database is kept is not.
    for name, value in topic.config.items():
        if (name in _NEEDED or keeps) and state.config.get(name) != value:
            problems.append((
                f"{name} is {state.config.get(name)!r} and must be {value!r}",
                f"kafka-configs.sh --alter --entity-type topics --entity-name {topic.name} --add-config {name}={value}",
            ))  # fmt: skip
    return problems


def _catalogue(broker: "Broker", catalogue: "Catalogue", partitions: int | None) -> "Catalogue":
    """With the count that is asked for; else the one that the installation has; else the default."""
    from msgspec.structs import replace

    count = partitions or broker.describe([catalogue.commands]).get(catalogue.commands)
    if count is None:
        return catalogue
    return replace(catalogue, partitions=count if isinstance(count, int) else count.partitions)
