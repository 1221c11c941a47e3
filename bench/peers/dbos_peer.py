# /// script
# dependencies = ["dbos==3.4.0", "psutil==7.2.2"]
#
# [tool.bench]
# variants = ["dbos-sqlite", "dbos-postgres"]
# ///
"""DBOS: a library that checkpoints each step in SQLite, or in PostgreSQL where its programs are here."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
from dbos import DBOS
from figures import System
from peer import CLIENT, Unavailable, Variant, free_port, main, versions
from processes import Processes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@DBOS.step()
async def nothing() -> None:
    """Does nothing."""


@DBOS.workflow()
async def sequence(steps: int) -> int:
    """Calls a step that does nothing, again and again, each after the one before."""
    for _ in range(steps):
        await nothing()
    return steps


class Application:
    """The process that is client, workflows and steps at once."""

    def __init__(self, processes: Processes) -> None:
        self.check = processes.check
        self.cpu_seconds = processes.cpu_seconds

    async def run(self, steps: int) -> None:
        """Starts a run and waits for its result."""
        handle = await DBOS.start_workflow_async(sequence, steps)
        await handle.get_result()


@asynccontextmanager
async def _launched(url: str, processes: Processes) -> AsyncIterator[Application]:
    processes.watch(CLIENT, os.getpid())
    DBOS(config={"name": "bench", "system_database_url": url, "run_admin_server": False, "log_level": "WARNING"})
    DBOS.launch()
    try:
        yield Application(processes)
    finally:
        DBOS.destroy()


@asynccontextmanager
async def sqlite(folder: Path) -> AsyncIterator[Application]:
    """On a file."""
    with Processes(folder) as processes:
        async with _launched(f"sqlite:///{folder}/bench.sqlite", processes) as application:
            yield application


@asynccontextmanager
async def postgres(folder: Path) -> AsyncIterator[Application]:
    """On a server of its own."""
    with Processes(folder) as processes:
        async with _launched(_start_postgres(folder, processes), processes) as application:
            yield application


def _start_postgres(folder: Path, processes: Processes) -> str:
    """Starts a server with the settings that initdb writes; the address of a database that DBOS will create."""
    programs = next((path for path in _postgres_folders() if (path / "initdb").exists()), None)
    if programs is None:
        raise Unavailable("no PostgreSQL server here: install it, or put its programs into PATH")
    user = _unprivileged()
    data, port = folder / "postgres", free_port()
    data.mkdir()
    if user is not None:
        shutil.chown(data, user)
    initdb = [programs / "initdb", "--pgdata", data, "--username", "bench", "--auth", "trust"]
    subprocess.run(initdb, check=True, user=user, cwd=data, stdout=subprocess.DEVNULL)
    server = [programs / "postgres", "-D", data, "-h", "127.0.0.1", "-p", str(port), "-k", data]
    processes.start("postgres", server, user=user)
    url = f"postgresql://bench@127.0.0.1:{port}"
    processes.wait_until(lambda: _answers(url))
    return f"{url}/bench"


def _postgres_folders() -> list[Path]:
    named = shutil.which("postgres")
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return [*([Path(named).resolve().parent] if named else []), *debian]


def _answers(url: str) -> bool:
    try:
        psycopg.connect(f"{url}/postgres", connect_timeout=1).close()
    except psycopg.OperationalError:
        return False
    return True


def _unprivileged() -> str | None:
    """Who runs PostgreSQL, which refuses root; None for whoever runs this."""
    if os.geteuid() != 0:
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in known else "nobody"


AT_ONCE = 20
NOTES = (
    "Steps are awaited calls in the client's own process, so its CPU is all of it; runs by `start_workflow_async`, "
    f"without a queue, {AT_ONCE} at once, as many as its pool has connections by default: with hundreds it is slower."
)
VARIANTS = {
    "dbos-sqlite": Variant(
        System(
            "DBOS on SQLite",
            versions("dbos", "SQLAlchemy"),
            "as it opens the file: rollback journal, `synchronous=FULL`, so each step's transaction is fsynced",
            NOTES + " Its makers recommend PostgreSQL for production.",
        ),
        sqlite,
        AT_ONCE,
    ),
    "dbos-postgres": Variant(
        System(
            "DBOS on PostgreSQL",
            versions("dbos", "psycopg"),
            "`fsync=on`, `synchronous_commit=on`: each step's transaction is fsynced",
            NOTES,
        ),
        postgres,
        AT_ONCE,
    ),
}

if __name__ == "__main__":
    main(VARIANTS)
