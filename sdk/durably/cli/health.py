"""``durably health``: the broker, the topics, the owner of each partition, a worker of each queue, the gateway."""

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from durably.cli.shell import Shell, checked_queues

if TYPE_CHECKING:
    from rich.table import Table

    from durably.client.connection import Connection


def health(
    shell: Shell,
    *,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds until what has not answered counts as dead.")] = 10,
    queues: Annotated[
        list[str],
        typer.Option(
            "--queue",
            callback=checked_queues,
            help="A queue to ask. Repeatable.",
            default_factory=list,
            show_default="all",
        ),
    ],
    workers: Annotated[bool, typer.Option(help="Whether workers are asked.")] = True,
    gateway: Annotated[
        str | None,
        typer.Option(
            envvar="DURABLY_GATEWAY_URL", show_envvar=True, help="The base of the gateway's URL, to ask it, too."
        ),
    ] = None,
) -> None:
    """Asks every processor, a worker of every queue, and the gateway. Exits with 1 where somebody does not answer.

    A processor is asked for a run that does not exist; a worker, through a processor, for a step that is no run's. The
    answers prove that they are alive, and nothing is left behind.
    """
    from durably.client.liveness import since
    from durably.errors import ConfigurationError, DurablyError

    report: dict[str, Any] = {"healthy": False, "broker": None, "topics": [], "partitions": [], "queues": []}
    if gateway:
        report["gateway"] = _gateway(gateway, timeout)
    try:
        with shell.connection(timeout) as connection:
            report["broker"] = {"url": connection.broker.url}
            began = time.perf_counter()
            connection.broker.topics(timeout)
            report["broker"]["latency_ms"] = since(began)
            _installation(connection, report, timeout, (queues or None) if workers else [])
    except ConfigurationError:
        raise
    except DurablyError as e:
        report["error"] = str(e)
    alive = [p for p in report["partitions"] if p["latency_ms"] is not None]
    wrong = [q for q in (*report["queues"], report.get("gateway", {})) if q.get("problem")]
    report["healthy"] = bool(alive) and len(alive) == len(report["partitions"]) and not report["topics"] and not wrong
    shell.show(report, lambda: _table(report))
    if not report["healthy"]:
        raise typer.Exit(1)


def _installation(connection: "Connection", report: dict[str, Any], timeout: float, queues: list[str] | None) -> None:
    """Adds topics, partitions and queues to the report; None asks all queues that there are."""
    from msgspec.structs import replace

    from durably.cli.topics import differences
    from durably.client.liveness import queue_trips, queues_of, round_trips
    from durably.errors import ConfigurationError

    try:
        count = connection.partitions(connection.catalogue.commands)
    except ConfigurationError as e:
        report["topics"] = [str(e)]
        return
    found = differences(connection.broker, replace(connection.catalogue, partitions=count), ())
    report["topics"] = [f"{p['topic']}: {p['problem']}; {p['remedy']}" for p in found]
    report["partitions"] = [trip._asdict() for trip in round_trips(connection, timeout)]
    if any(p["latency_ms"] is not None for p in report["partitions"]):  # else nobody would pass the question on
        asked = queues_of(connection, timeout) if queues is None else queues
        report["queues"] = [trip._asdict() for trip in queue_trips(connection, asked, timeout)]


def _gateway(base: str, timeout: float) -> dict[str, Any]:
    """Whether the gateway is ready: it answers, its broker does, and its list of runs is complete."""
    import json
    from urllib.error import HTTPError
    from urllib.request import urlopen

    from durably.client.liveness import since
    from durably.errors import ConfigurationError

    if not base.startswith(("http://", "https://")):
        raise ConfigurationError(f"--gateway is {base!r}: use the base of a URL, such as https://hooks.example.com")
    url = f"{base.rstrip('/')}/ready"
    began = time.perf_counter()
    problem: str | None = None
    try:
        with urlopen(url, timeout=timeout) as answer:  # noqa: S310 - checked
            answer.read()
    except HTTPError as e:
        with e:
            said = e.read(10_000)
        try:
            problem = json.loads(said)["problem"]
        except (ValueError, KeyError, TypeError):
            problem = f"{url} answers {e.code}"
    except (OSError, ValueError) as e:
        problem = f"{url} does not answer: {e}; start `durably gateway`, or correct --gateway"
    return {"url": base, "latency_ms": None if problem else since(began), "problem": problem}


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
        for queue in report["queues"]:
            fine = f"{queue['worker']} answers in {queue['latency_ms']} ms, {queue['took_ms']} of them from log to log"
            add(f"queue {queue['queue']}", queue["problem"], fine)
    if "gateway" in report:
        gateway = report["gateway"]
        add("gateway", gateway["problem"], f"{gateway['url']} answers in {gateway['latency_ms']} ms")
    return table
