"""``durably health``: is the broker there, are the topics right, does a processor own each partition."""

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from durably.cli.shell import Shell

if TYPE_CHECKING:
    from rich.table import Table


def health(
    shell: Shell,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds until what has not answered counts as dead.")] = 10,
) -> None:
    """Asks every processor for a run that does not exist: the answer proves a live owner. Exits with 1 without."""
    from durably.cli.topics import differences
    from durably.client.liveness import round_trips, since
    from durably.errors import ConfigurationError, DurablyError

    report: dict[str, Any] = {"healthy": False, "broker": None, "topics": [], "partitions": []}
    try:
        with shell.connection(timeout) as connection:
            report["broker"] = {"url": connection.broker.url}
            began = time.perf_counter()
            connection.broker.topics(timeout)
            report["broker"]["latency_ms"] = since(began)
            try:
                count = connection.partitions(connection.catalogue.commands)
            except ConfigurationError as e:
                report["topics"] = [str(e)]
            else:
                from msgspec.structs import replace

                catalogue = replace(connection.catalogue, partitions=count)
                found = differences(connection.broker, catalogue, ())
                report["topics"] = [f"{p['topic']}: {p['problem']}; {p['remedy']}" for p in found]
                report["partitions"] = [trip._asdict() for trip in round_trips(connection, timeout)]
    except ConfigurationError:
        raise
    except DurablyError as e:
        report["error"] = str(e)
    alive = [p for p in report["partitions"] if p["latency_ms"] is not None]
    report["healthy"] = bool(alive) and len(alive) == len(report["partitions"]) and not report["topics"]
    shell.show(report, lambda: _table(report))
    if not report["healthy"]:
        raise typer.Exit(1)


def _table(report: dict[str, Any]) -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, pad_edge=False)

    def add(what: str, problem: str | None, fine: str) -> None:
        table.add_row(what, Text(fine, style="green") if problem is None else Text(problem, style="red"))

    broker = report["broker"] or {}
    add("broker", report.get("error"), f"{broker.get('url')} answers in {broker.get('latency_ms')} ms")
    if "error" not in report:
        add("topics", "\n".join(report["topics"]) or None, "as they must be")
        dead = [str(p["partition"]) for p in report["partitions"] if p["latency_ms"] is None]
        slowest = max((p["latency_ms"] or 0 for p in report["partitions"]), default=0)
        if report["partitions"]:
            add(
                "processors",
                f"nobody answers for partition {', '.join(dead)}: start `durably processor`" if dead else None,
                f"{len(report['partitions'])} partitions answer in {slowest} ms at most",
            )
    return table
