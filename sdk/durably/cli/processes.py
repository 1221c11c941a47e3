"""``durably dev``, ``processor`` and ``worker``: the long-running processes."""

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from durably.cli.gateway import PORT, beside
from durably.cli.shell import Build, LogFormat, Shell, checked_queues, log_as
from durably.installation import processor_module

Modules = Annotated[
    list[str],
    typer.Argument(metavar="MODULE...", help="Where workflows and steps are: package.module or path/to/file.py."),
]
Queues = Annotated[
    list[str],
    typer.Option(
        "--queue",
        callback=checked_queues,
        help="A queue of step-requests to serve. Repeatable.",
        default_factory=lambda: ["default"],
    ),
]
Retention = Annotated[
    str | None,
    typer.Option(
        help='How long runs are kept after their end, such as "30d".',
        show_default="DURABLY_RETENTION, else for ever",
    ),
]
Metrics = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        envvar="DURABLY_METRICS",
        show_envvar=True,
        help="Serve /metrics, /livez and /readyz there; a port alone is of 127.0.0.1.",
    ),
]
Concurrency = Annotated[int, typer.Option(min=1, help="How many steps run at once.")]
Drain = Annotated[
    str,
    typer.Option(
        envvar="DURABLY_DRAIN",
        show_envvar=True,
        help='How long steps may still run when the worker is told to end, such as "10m"; others get what is left.',
    ),
]


def dev(
    shell: Shell,
    modules: Modules,
    *,
    queues: Queues,
    path: Annotated[
        Path | None, typer.Option(help="The embedded broker's folder.", show_default=".durably/dev")
    ] = None,
    concurrency: Concurrency = 100,
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65_535, help="The gateway's, on 127.0.0.1; 0: no gateway.", show_default=str(PORT)),
    ] = None,
    retention: Retention = None,
    metrics: Metrics = None,
    log_format: LogFormat = None,
) -> None:
    """Runs a processor, a worker and the gateway on an embedded broker, in one process."""
    log_as(log_format)
    from msgspec.structs import replace

    from durably.errors import ConfigurationError
    from durably.settings import EMBEDDED

    url = f"{EMBEDDED}{path}" if path is not None else shell.url or f"{EMBEDDED}.durably/dev"
    if not url.startswith(EMBEDDED):
        raise ConfigurationError(
            f"durably dev has a broker of its own, and the URL is {url}: give --path, or use `durably processor` and "
            f"`durably worker` there"
        )
    settings = shell.settings(url=url, retention=retention)
    gateway = beside(shell, settings, port)
    if gateway is not None and settings.gateway_url is None:
        settings = replace(settings, gateway_url=gateway.url)

    def ready() -> None:
        if gateway is not None:
            gateway.start()
        served = "" if gateway is None else f"; gateway at {gateway.url}"
        shell.say(f"ready: {url}, namespace {settings.namespace}; start runs with --url {url}{served}")

    try:
        processor_module("dev").run_dev(
            settings, modules, queues=tuple(queues), concurrency=concurrency, ready=ready, metrics=metrics or None
        )
    finally:
        if gateway is not None:
            gateway.stop()


def processor(
    shell: Shell,
    modules: Modules,
    *,
    retention: Retention = None,
    standby: Annotated[
        bool | None,
        typer.Option(
            help="Keep copies of the stores of partitions that others own: a take-over is quick, and takes their disk.",
            show_default="DURABLY_STANDBY, else no",
        ),
    ] = None,
    build: Build = None,
    metrics: Metrics = None,
    log_format: LogFormat = None,
) -> None:
    """Runs workflows."""
    log_as(log_format)
    settings = shell.settings(retention=retention, standby=standby, build=build)

    def ready() -> None:
        shell.say(f"processor ready: {settings.url}, namespace {settings.namespace}")

    processor_module("process").run_processor(settings, modules, ready=ready, metrics=metrics or None)


def worker(
    shell: Shell,
    modules: Modules,
    *,
    queues: Queues,
    concurrency: Concurrency = 100,
    drain: Drain = "30s",
    build: Build = None,
    metrics: Metrics = None,
    log_format: LogFormat = None,
) -> None:
    """Runs steps."""
    log_as(log_format)
    from durably import payload_codec
    from durably.authoring import load_module, registry
    from durably.broker.acl import required_acls
    from durably.builds import served
    from durably.durations import milliseconds
    from durably.errors import ConfigurationError
    from durably.observability.endpoint import serving
    from durably.worker import Worker

    try:
        drain_timeout = milliseconds(drain) / 1000
    except ValueError as e:
        raise ConfigurationError(f"--drain (DURABLY_DRAIN): {e}") from e
    # A thread that wakes for a request must not wait 5 ms, Python's default, for one that is encoding.
    sys.setswitchinterval(0.0005)
    for module in modules:
        load_module(module)
    payload_codec.installed()  # a wrong setting should end the process, and not every step
    with shell.broker() as (broker, settings):
        catalogue = settings.catalogue
        asked, queues = queues, served(queues, build)
        needed = [catalogue.results, catalogue.replies, catalogue.streams, *map(catalogue.requests, queues)]
        broker.require(required_acls("worker", catalogue, queues=queues))
        missing = [topic for topic in needed if not broker.partitions(topic)]
        if missing:
            options = "".join(f" --queue {queue}" for queue in asked) + (f" --build {build}" if build else "")
            raise ConfigurationError(
                f"{settings.url} lacks {', '.join(missing)}: create them with `durably topics create{options}`"
            )
        running = Worker(broker, catalogue, registry, queues=queues, concurrency=concurrency, counting=bool(metrics))
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: running.stop(drain_timeout))
        with serving(metrics or None, [running]):
            running.start()
            shell.say(f"worker ready: {settings.url}, namespace {settings.namespace}, queues {', '.join(queues)}")
            running.join()
        if running.error is not None:
            raise running.error
