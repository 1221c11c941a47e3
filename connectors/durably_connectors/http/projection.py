"""The list of runs: a SQLite table that follows the compacted topic ``runs``."""

from __future__ import annotations

import base64
import logging
import sqlite3
import sys
import threading
from binascii import Error as NotBase64
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import msgspec
from durably.broker.port import TP, End, Message
from durably.errors import ConfigurationError
from durably_schemas import CodecError
from durably_schemas.records import RunStatus, RunSummary

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping
    from pathlib import Path

    from durably.broker.port import Reader
    from durably.client.connection import Connection

log = logging.getLogger("durably.gateway")

_Instant = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]  # that SQLite can hold

_POLL = 0.5  # seconds; how long stopping may take
_BATCH = 5_000
_FIRST_RETRY, _LONGEST_RETRY = 0.5, 10.0
_LAYOUT = 2  # of the tables: a file of another layout is read anew
_TABLES = ("runs", "attributes", "positions", "origin")
_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS runs (
    run_id TEXT PRIMARY KEY, workflow TEXT NOT NULL, status TEXT NOT NULL, created_at INTEGER NOT NULL,
    started_at INTEGER, completed_at INTEGER, hooks INTEGER NOT NULL, summary BLOB NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS newest ON runs (created_at, run_id);
CREATE INDEX IF NOT EXISTS newest_of_workflow ON runs (workflow, created_at, run_id);
CREATE INDEX IF NOT EXISTS newest_of_status ON runs (status, created_at, run_id);
CREATE INDEX IF NOT EXISTS spans ON runs (workflow, status, created_at, started_at, completed_at);
CREATE INDEX IF NOT EXISTS waiting ON runs (created_at, run_id) WHERE hooks > 0;
CREATE TABLE IF NOT EXISTS attributes (
    run_id TEXT NOT NULL, name TEXT NOT NULL, value TEXT NOT NULL, PRIMARY KEY (run_id, name)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_attribute ON attributes (name, value, run_id);
CREATE TABLE IF NOT EXISTS positions (partition INTEGER PRIMARY KEY, next INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS origin (identity TEXT NOT NULL);
PRAGMA user_version = {_LAYOUT};
"""


class RunQuery(msgspec.Struct, frozen=True, kw_only=True):
    """Which runs. ``created_from`` is included, ``created_to`` is not; in milliseconds since the epoch."""

    id_prefix: str = ""
    workflow: str | None = None
    statuses: Collection[RunStatus] = ()
    attributes: Mapping[str, str] = {}
    created_from: int | None = None
    created_to: int | None = None
    with_hooks: bool = False


class Count(NamedTuple):
    """How many runs of a workflow have a status; ``slot``: that were created in this part of the time asked about."""

    workflow: str
    status: RunStatus
    slot: int
    runs: int


def by_status(counts: Iterable[Count]) -> Counter[RunStatus]:
    """How many runs have each status, whatever their workflow."""
    totals = Counter[RunStatus]()
    for count in counts:
        totals[count.status] += count.runs
    return totals


class Took(NamedTuple):
    """A completed run: when it was created, and the milliseconds that it waited for its start, and ran from there."""

    created_at: int
    waited: int
    ran: int


class Page(msgspec.Struct, frozen=True, kw_only=True):
    """Runs, newest first; ``cursor`` asks for those that follow, None: there are none."""

    runs: list[RunSummary]
    cursor: str | None


class Projection:
    """A table of all runs, kept up to date by a thread of its own. Queries may come from any thread.

    It is a moment behind the log: a run shows when its first summary is committed and read here.

    Args:
        connection: whose broker is read.
        path: the database's file, which makes the next start fast; by default it lies in memory.

    Raises:
        ConfigurationError: the file cannot be opened.
    """

    def __init__(self, connection: Connection, path: Path | None = None) -> None:
        self._connection = connection
        self._path = path
        self._lock = threading.Lock()
        self._db = _opened(path)
        self._positions: dict[TP, int] = {}
        self._missing: dict[TP, int] = {}
        self._stopping = threading.Event()
        self._caught_up = threading.Event()
        self._thread = threading.Thread(target=self._run, name="durably-projection", daemon=True)
        self.changes = 0
        """Counts up whenever something has changed."""
        self.problem: str | None = None
        """Why it does not get on, where it does not."""

    def start(self) -> None:
        """Begins to follow the topic."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread, and closes the database."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()
        with self._lock:
            self._db.close()

    @property
    def is_ready(self) -> bool:
        """Whether everything that was in the topic at the start has been read."""
        return self._caught_up.is_set()

    def wait_ready(self, timeout: float) -> bool:
        """As `is_ready`; waits for it up to so many seconds."""
        return self._caught_up.wait(timeout)

    def runs(self, query: RunQuery, limit: int, cursor: str | None = None) -> Page:
        """A page of the runs that match, newest first.

        Raises:
            ValueError: the cursor is none of ours.
            sqlite3.Error: the file is damaged, gone or full.
        """
        where, values = _conditions(query)
        if cursor is not None:
            where.append("(created_at, run_id) < (?, ?)")
            values += _position(cursor)
        condition = f"WHERE {' AND '.join(where)}" if where else ""
        statement = f"SELECT summary FROM runs {condition} ORDER BY created_at DESC, run_id DESC LIMIT ?"  # noqa: S608 - made of constants
        with self._lock:
            rows = self._db.execute(statement, [*values, limit + 1]).fetchall()
        found = [self._connection.codec.decode_as(RunSummary, summary) for (summary,) in rows[:limit]]
        return Page(runs=found, cursor=_cursor(found[-1]) if len(rows) > limit else None)

    def counts(self, since: int = 0, slot: int = 2**62) -> list[Count]:
        """How many runs there are of each workflow and status.

        Args:
            since: only those created at this instant or later, in milliseconds since the epoch.
            slot: milliseconds of each part of the time since then that is counted by itself, by default all of it.

        Raises:
            sqlite3.Error: as `runs`.
        """
        statement = (
            "SELECT workflow, status, (created_at - ?) / ? AS slot, COUNT(*) FROM runs WHERE created_at >= ? "
            "GROUP BY workflow, status, slot"
        )
        with self._lock:
            rows = self._db.execute(statement, [since, slot, since]).fetchall()
        return [Count(*row) for row in rows]

    def took(self, workflow: str, since: int, limit: int) -> list[Took]:
        """How long the completed runs of a workflow took that were created since then: the newest, up to ``limit``.

        Raises:
            sqlite3.Error: as `runs`.
        """
        statement = (
            "SELECT created_at, started_at - created_at, completed_at - started_at FROM runs WHERE workflow = ? AND "
            "status = 'completed' AND created_at >= ? AND started_at NOT NULL AND completed_at NOT NULL "
            "ORDER BY created_at DESC LIMIT ?"
        )
        with self._lock:
            rows = self._db.execute(statement, [workflow, since, limit]).fetchall()
        return [Took(*row) for row in rows]

    def _run(self) -> None:
        delay = _FIRST_RETRY
        while not self._stopping.is_set():
            try:
                reader = self._reader()
                try:
                    delay = _FIRST_RETRY
                    self._follow(reader)
                finally:
                    reader.close()
            except Exception as e:  # the broker may come back, and the topics may yet be made
                self.problem = f"{type(e).__name__}: {e}"
                log.warning("the list of runs is not kept up to date: %s; trying again in %s s", self.problem, delay)
                self._stopping.wait(delay)
                delay = min(2 * delay, _LONGEST_RETRY)

    def _reader(self) -> Reader:
        broker, topic = self._connection.broker, self._connection.catalogue.runs
        tps = [TP(topic, p) for p in range(self._connection.partitions(topic))]
        starts, ends = broker.start_offsets(tps), broker.end_offsets(tps, committed=True)
        if self._path is not None:
            self._belongs_to(broker.identity(topic))
        with self._lock:
            known = dict(self._db.execute("SELECT partition, next FROM positions"))
        self._positions = {tp: max(starts[tp], known.get(tp.partition, 0)) for tp in tps}
        self._missing = {tp: end for tp, end in ends.items() if self._positions[tp] < end}
        self.problem = None
        self._note_caught_up()
        return broker.reader(self._positions)

    def _belongs_to(self, identity: str) -> None:
        """Empties the table where it was made from a topic of another cluster, or one that was made anew."""
        with self._lock, self._db:
            row = self._db.execute("SELECT identity FROM origin").fetchone()
            if row is None or row[0] != identity:
                for table in _TABLES:
                    self._db.execute(f"DELETE FROM {table}")  # noqa: S608 - made of constants
                self._db.execute("INSERT INTO origin VALUES (?)", (identity,))

    def _follow(self, reader: Reader) -> None:
        while not self._stopping.is_set():
            batch = reader.poll(_POLL, _BATCH)
            if batch:
                self._apply(batch)
                self._note_caught_up()

    def _apply(self, batch: list[Message | End]) -> None:
        latest: dict[bytes, bytes | None] = {}
        moved: dict[TP, int] = {}
        for item in batch:
            moved[TP(item.topic, item.partition)] = item.offset + isinstance(item, Message)
            if isinstance(item, Message) and item.key is not None:
                latest[item.key] = item.value
        with self._lock, self._db:
            for key, value in latest.items():
                self._put(key, value)
            self._db.executemany(
                "INSERT OR REPLACE INTO positions VALUES (?, ?)", [(tp.partition, at) for tp, at in moved.items()]
            )
        self._positions |= moved
        self.changes += bool(latest)

    def _put(self, key: bytes, value: bytes | None) -> None:
        run_id = key.decode("utf-8", "replace")
        try:
            summary = None if value is None else self._connection.codec.decode_as(RunSummary, value)
        except CodecError:
            return  # one that this version cannot read does not hide the others
        self._db.execute("DELETE FROM attributes WHERE run_id = ?", (run_id,))
        if summary is None:
            self._db.execute("DELETE FROM runs WHERE run_id = ?", (run_id,))
            return
        instants = (summary.created_at, summary.started_at, summary.completed_at)
        row = (run_id, summary.workflow, summary.status, *instants, len(summary.hooks), value)
        self._db.execute("INSERT OR REPLACE INTO runs VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
        self._db.executemany(
            "INSERT INTO attributes VALUES (?, ?, ?)",
            [(run_id, name, text) for name, text in summary.attributes.items()],
        )

    def _note_caught_up(self) -> None:
        self._missing = {tp: end for tp, end in self._missing.items() if self._positions[tp] < end}
        if not self._missing:
            self._caught_up.set()


def checked_file(path: Path) -> None:
    """Raises `ConfigurationError` where the list of runs cannot be kept in a file."""
    _opened(path).close()


def _opened(path: Path | None) -> sqlite3.Connection:
    if path is None:
        db = sqlite3.connect(":memory:", check_same_thread=False)
        db.executescript(_SCHEMA)
        return db
    try:
        db = sqlite3.connect(path, check_same_thread=False)
        try:
            tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if tables == set(_TABLES) and db.execute("PRAGMA user_version").fetchone() != (_LAYOUT,):
                db.executescript("".join(f"DROP TABLE IF EXISTS {table};" for table in _TABLES))
            db.executescript(_SCHEMA)
            db.executescript("BEGIN IMMEDIATE; ROLLBACK;")  # a file that has the tables may yet be read-only
        except BaseException:
            db.close()
            raise
    except sqlite3.Error as e:
        raise ConfigurationError(
            f"the list of runs cannot be kept in {path}: {e}; name a file that can be written in a folder that exists, "
            f"with --projection, or delete one that is damaged"
        ) from e
    return db


def _conditions(query: RunQuery) -> tuple[list[str], list[Any]]:
    where: list[str] = []
    values: list[Any] = []

    def add(condition: str, *given: Any) -> None:
        where.append(condition)
        values.extend(given)

    if query.id_prefix:
        add("run_id >= ? AND run_id < ?", query.id_prefix, query.id_prefix + chr(sys.maxunicode))
    if query.workflow is not None:
        add("workflow = ?", query.workflow)
    if query.statuses:
        add(f"status IN ({', '.join('?' * len(query.statuses))})", *query.statuses)
    for name, value in query.attributes.items():
        add("run_id IN (SELECT run_id FROM attributes WHERE name = ? AND value = ?)", name, value)
    if query.created_from is not None:
        add("created_at >= ?", query.created_from)
    if query.created_to is not None:
        add("created_at < ?", query.created_to)
    if query.with_hooks:
        add("hooks > 0")
    return where, values


def _cursor(run: RunSummary) -> str:
    return base64.urlsafe_b64encode(msgspec.json.encode([run.created_at, run.run_id])).decode()


def _position(cursor: str) -> tuple[int, str]:
    try:
        return msgspec.json.decode(base64.urlsafe_b64decode(cursor), type=tuple[_Instant, str])
    except (NotBase64, ValueError, msgspec.MsgspecError):
        raise ValueError(f"cursor {cursor!r:.100} is none: give the next_cursor of the page before") from None
