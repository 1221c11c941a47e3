"""``durably health``: is the broker there, are the topics right, does a processor own each partition."""

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from durably.cli.shell import Shell

if TYPE_CHECKING:
    from concurrent.futures import Future

    from durably_schemas.records import Reply
    from rich.table import Table

    from durably.client.connection import Connection


def health(
    shell: Shell,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds until what has not answered counts as dead.")] = 10,
) -> None:
    """Asks every processor for a run that does not exist: the answer proves a live owner. Exits with 1 without."""
    from durably.cli.topics import differences
    from durably.errors import ConfigurationError, DurablyError

    report: dict[str, Any] = {"healthy": False, "broker": None, "topics": [], "partitions": []}
    try:
        with shell.connection(timeout) as connection:
            report["broker"] = {"url": connection.broker.url}
            began = time.perf_counter()
            connection.broker.topics(timeout)
            report["broker"]["latency_ms"] = _since(began)
            try:
                count = connection.partitions(connection.catalogue.commands)
            except ConfigurationError as e:
                report["topics"] = [str(e)]
            else:
                from msgspec.structs import replace

                catalogue = replace(connection.catalogue, partitions=count)
                found = differences(connection.broker, catalogue, ())
                report["topics"] = [f"{p['topic']}: {p['problem']}; {p['remedy']}" for p in found]
                report["partitions"] = _round_trips(connection, count, timeout)
    except ConfigurationError:
        raise
    except DurablyError as e:
        report["error"] = str(e)
    alive = [p for p in report["partitions"] if p["latency_ms"] is not None]
    report["healthy"] = bool(alive) and len(alive) == len(report["partitions"]) and not report["topics"]
    shell.show(report, lambda: _table(report))
    if not report["healthy"]:
        raise typer.Exit(1)


def _since(began: float) -> float:
    return round((time.perf_counter() - began) * 1000, 2)


def _round_trips(connection: "Connection", count: int, timeout: float) -> list[dict[str, Any]]:
    """The latency of each partition's owner; None where nobody answers.

    Asked twice, because the first answer comes through connections that are only just being made.
    """
    run_ids = dict(enumerate(_run_ids(count)))
    first = _ask(connection, run_ids, timeout)
    took = first | _ask(connection, {partition: run_ids[partition] for partition in first}, timeout)
    return [{"partition": partition, "latency_ms": took.get(partition)} for partition in run_ids]


def _ask(connection: "Connection", run_ids: dict[int, str], timeout: float) -> dict[int, float]:
    """How long the answer of each partition took, in milliseconds; all are asked at once."""
    from concurrent.futures import wait

    from durably.client.exchange import query

    connection.listen()
    took: dict[int, float] = {}
    futures: list[Future[Reply]] = []
    for partition, run_id in run_ids.items():
        began = time.perf_counter()
        future = connection.ask(run_id, query(run_id, "SUMMARY"))

        def note(answered: "Future[Reply]", partition: int = partition, began: float = began) -> None:
            if not answered.cancelled() and answered.exception() is None:
                took[partition] = _since(began)

        future.add_done_callback(note)
        futures.append(future)
    wait(futures, timeout)
    for future in futures:
        future.cancel()
    return took


def _run_ids(count: int) -> list[str]:
    """For each partition the id of a run that does not exist, and whose key maps to it."""
    from durably_schemas.catalogue import partition_for

    from durably.client.identifiers import new_run_id

    found: dict[int, str] = {}
    while len(found) < count:
        run_id = new_run_id()
        found.setdefault(partition_for(run_id.encode(), count), run_id)
    return [found[partition] for partition in range(count)]


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
