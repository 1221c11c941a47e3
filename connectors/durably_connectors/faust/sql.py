"""A table as a sink's destination: a row for each run ID and seq, however often it is delivered."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import msgspec
from durably.errors import ConfigurationError
from durably.jsonable import to_json
from sqlalchemy import JSON, BigInteger, Column, Integer, MetaData, String, Table, create_engine, exc
from sqlalchemy.dialects import postgresql, sqlite

from durably_connectors.faust.intake import Later

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine
    from sqlalchemy.sql.base import Executable

    from durably_connectors.faust.delivery import Delivery
    from durably_connectors.faust.sinks import Row

_INSERTS: dict[str, Any] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}
_AT_ONCE = 500  # rows in one transaction
_AWAY = (exc.OperationalError, exc.InterfaceError, exc.TimeoutError)


class SqlTable:
    """A table of SQLite or PostgreSQL, which is created where it is missing.

    Its columns are ``run_id`` and ``seq``, the primary key; ``at``, in milliseconds since the epoch; ``kind``;
    ``workflow``; and ``value``, as JSON. What waits is written in one transaction.

    Args:
        url: SQLAlchemy's, such as ``sqlite:///outcomes.db`` or ``postgresql+psycopg://user@host/shop``.
        table: its name.

    Raises:
        ConfigurationError: another database, or one whose driver is missing.
    """

    def __init__(self, url: str, table: str) -> None:
        try:
            self._engine: Engine = create_engine(url, pool_pre_ping=True)
        except (exc.ArgumentError, ModuleNotFoundError) as e:
            raise ConfigurationError(f"{table!r} cannot be reached by its URL: {e}") from e
        if self._engine.dialect.name not in _INSERTS:
            raise ConfigurationError(f"{self._engine.dialect.name} is not supported: use sqlite or postgresql")
        self._table = Table(
            table,
            MetaData(),
            Column("run_id", String(200), primary_key=True),
            Column("seq", Integer, primary_key=True, autoincrement=False),
            Column("at", BigInteger, nullable=False),
            Column("kind", String(40), nullable=False),
            Column("workflow", String(400)),
            Column("value", JSON),
        )
        self._upsert = upsert(self._table, self._engine.dialect.name)
        self._made = False
        self._waiting: list[tuple[dict[str, Any], asyncio.Future[None]]] = []
        self._writer: asyncio.Task[None] | None = None

    def topics(self) -> list[str]:
        """See `Destination`."""
        return []

    async def put(self, row: Row, delivery: Delivery) -> None:  # noqa: ARG002 - as `Destination` says
        """See `Destination`."""
        plain = msgspec.structs.asdict(row) | {"value": msgspec.json.decode(to_json(row.value))}
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((plain, done))
        if self._writer is None:
            self._writer = asyncio.create_task(self._write())
        await done

    async def _write(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[:_AT_ONCE], self._waiting[_AT_ONCE:]
            error = await self._stored([row for row, _ in batch])
            if error is None or isinstance(error, Later) or len(batch) == 1:
                for _, done in batch:
                    _settle(done, error)
            else:  # one of them is at fault, and the others are not to suffer
                for row, done in batch:
                    _settle(done, await self._stored([row]))
        self._writer = None

    async def _stored(self, rows: list[dict[str, Any]]) -> Exception | None:
        try:
            await asyncio.to_thread(self._store, rows)
        except _AWAY as e:
            return Later(f"the database does not take it: {e}")
        except exc.DBAPIError as e:
            return Later(f"the database is away: {e}") if e.connection_invalidated else e
        except Exception as e:  # told to whoever waits for the rows
            return e
        return None

    def _store(self, rows: list[dict[str, Any]]) -> None:
        # PostgreSQL refuses to touch one row twice in a statement.
        distinct = {(row["run_id"], row["seq"]): row for row in rows}
        with self._engine.begin() as connection:
            if not self._made:
                self._table.metadata.create_all(connection)
            connection.execute(self._upsert, list(distinct.values()))
        self._made = True


def upsert(table: Table, dialect: str) -> Executable:
    """Inserts a row, or gives the one with its primary key all other values."""
    statement = _INSERTS[dialect](table)
    others = {column.name: statement.excluded[column.name] for column in table.columns if not column.primary_key}
    made: Executable = statement.on_conflict_do_update(index_elements=list(table.primary_key.columns), set_=others)
    return made


def _settle(done: asyncio.Future[None], error: Exception | None) -> None:
    if done.done():  # given up by whoever waited
        return
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)
