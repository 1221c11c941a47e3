"""The list of runs: what it shows is what a compaction of the topic would leave."""

from __future__ import annotations

import sqlite3
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from durably.broker.port import Message
from durably.client.connection import Connection
from durably.errors import BrokerUnreachable, ConfigurationError
from durably_connectors.http import create_gateway
from durably_connectors.http import projection as module
from durably_connectors.http.projection import Projection, RunQuery
from durably_schemas import Catalogue
from durably_schemas.records import RunSummary
from hypothesis import given
from hypothesis import strategies as st
from unit.gateway_under_test import gateway_under_test
from unit.scripted_broker import ScriptedBroker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CATALOGUE = Catalogue(partitions=3)
Open = "Callable[..., Projection]"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_POLL", 0.01)
    monkeypatch.setattr(module, "_FIRST_RETRY", 0.01)


@pytest.fixture
def broker(monkeypatch: pytest.MonkeyPatch) -> ScriptedBroker:
    made = ScriptedBroker(CATALOGUE)
    monkeypatch.setattr(made, "identity", lambda topic: "cluster/topic-1", raising=False)
    return made


@pytest.fixture
def opened(broker: ScriptedBroker) -> Iterator[Callable[..., Projection]]:
    """Opens a list; it is closed at the test's end."""
    made: list[Projection] = []

    def open_(path: Path | None = None) -> Projection:
        made.append(Projection(Connection(broker, CATALOGUE), path))
        made[-1].start()
        return made[-1]

    yield open_
    for one in made:
        one.stop()


def put(broker: ScriptedBroker, run_id: str, **fields: Any) -> None:
    summary = RunSummary(
        **{"run_id": run_id, "workflow": "w", "status": "running", "created_at": 1, "events": 1, **fields}
    )
    broker.put(CATALOGUE.runs, summary, key=run_id)


def listed(projection: Projection, limit: int = 100, **query: Any) -> list[str]:
    assert projection.wait_ready(5)
    return [run.run_id for run in projection.runs(RunQuery(**query), limit).runs]


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_latest_summary_counts(broker: ScriptedBroker, opened: Any) -> None:
    put(broker, "r1", attributes={"a": "1", "b": "1"})
    put(broker, "r1", status="completed", attributes={"a": "2"})
    projection = opened()
    assert listed(projection, attributes={"a": "2"}) == ["r1"]
    assert listed(projection, attributes={"b": "1"}) == listed(projection, statuses=["running"]) == []
    put(broker, "r1", status="failed")
    until(lambda: listed(projection, statuses=["failed"]) == ["r1"])


def test_a_deleted_run_is_gone_and_an_unreadable_one_hides_nothing(broker: ScriptedBroker, opened: Any) -> None:
    put(broker, "r1", attributes={"a": "1"})
    put(broker, "r2")
    tps = {m.key: tp for tp, log in broker.logs.items() for m in log}
    for key, value in ((b"r1", None), (b"r3", b"\xc3\x01 nonsense")):
        log = broker.logs[tps.get(key, tps[b"r1"])]
        log.append(Message(CATALOGUE.runs, tps[b"r1"].partition, len(log), 0, key, value, ()))
    projection = opened()
    assert listed(projection) == ["r2"]
    assert listed(projection, attributes={"a": "1"}) == []


def test_it_goes_on_when_the_broker_comes_back(
    broker: ScriptedBroker, opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    projection = opened()
    assert listed(projection) == []
    with broker.changed:
        broker.breaks = BrokerUnreachable("nobody answers")
        broker.changed.notify_all()
    until(lambda: projection.problem is not None)
    assert "nobody answers" in projection.problem
    put(broker, "r1")
    broker.breaks = None
    until(lambda: listed(projection) == ["r1"])
    assert projection.problem is None


def test_a_file_makes_the_next_start_begin_where_the_last_one_ended(
    broker: ScriptedBroker, opened: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "runs.sqlite"
    put(broker, "r1")
    first = Projection(Connection(broker, CATALOGUE), path)
    first.start()
    assert listed(first) == ["r1"]
    first.stop()
    read: list[dict[Any, int]] = []
    reader = broker.reader
    monkeypatch.setattr(broker, "reader", lambda positions: read.append(dict(positions)) or reader(positions))
    put(broker, "r2")
    assert sorted(listed(opened(path))) == ["r1", "r2"]
    assert sum(read[0].values()) == 1


def test_a_file_made_from_another_topic_is_made_anew(
    broker: ScriptedBroker, opened: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "runs.sqlite"
    put(broker, "r1", attributes={"a": "1"})
    first = Projection(Connection(broker, CATALOGUE), path)
    first.start()
    assert listed(first) == ["r1"]
    first.stop()
    broker.logs.clear()
    put(broker, "r2")
    monkeypatch.setattr(broker, "identity", lambda topic: "cluster/topic-2")
    again = opened(path)
    assert listed(again) == ["r2"]
    assert listed(again, attributes={"a": "1"}) == []


def test_queries_come_from_any_thread_while_it_follows(broker: ScriptedBroker, opened: Any) -> None:
    projection = opened()
    found: list[int] = []
    readers = [threading.Thread(target=lambda: found.append(len(listed(projection)))) for _ in range(8)]
    for n, reader in enumerate(readers):
        put(broker, f"r{n}")
        reader.start()
    for reader in readers:
        reader.join()
    until(lambda: len(listed(projection)) == 8)
    assert len(found) == 8


@pytest.mark.parametrize("spoil", ["no folder", "a folder", "no database", "read-only"])
def test_a_file_that_cannot_be_opened_is_named_at_the_start(spoil: str, tmp_path: Path) -> None:
    path = tmp_path / "runs.sqlite"
    match spoil:
        case "no folder":
            path = tmp_path / "none" / "runs.sqlite"
        case "a folder":
            path.mkdir()
        case "no database":
            path.write_bytes(b"x" * 10_000)
        case "read-only":
            path = Path("/proc/runs.sqlite")
    with pytest.raises(ConfigurationError, match=rf"cannot be kept in {path}: .*--projection"):
        create_gateway("embedded:x", projection=path)


def test_a_file_that_fails_later_is_a_503_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ScriptedBroker, "identity", lambda _, topic: topic, raising=False)
    path = tmp_path / "runs.sqlite"
    with gateway_under_test(projection=path) as gateway:
        assert gateway.api("GET", "/runs").status_code == 200
        with gateway.app.state.gateway.projection._lock, sqlite3.connect(path) as other:
            other.executescript("DROP TABLE runs")
        failed = gateway.api("GET", "/runs")
        assert (failed.status_code, failed.json()["type"]) == (503, "urn:durably:problem:unavailable")
        assert "no such table" in failed.json()["detail"]


runs = st.builds(
    dict,
    run_id=st.sampled_from([f"r{n}" for n in range(6)]),
    workflow=st.sampled_from("ab"),
    status=st.sampled_from(["running", "completed"]),
    created_at=st.integers(0, 3),
    attributes=st.dictionaries(st.sampled_from("xy"), st.sampled_from("12")),
    hooks=st.sampled_from([(), ("t",)]),
)
queries = st.builds(
    dict,
    workflow=st.none() | st.sampled_from("ab"),
    statuses=st.lists(st.sampled_from(["running", "completed"]), max_size=2),
    attributes=st.dictionaries(st.sampled_from("xy"), st.sampled_from("12"), max_size=2),
    created_from=st.none() | st.integers(0, 3),
    created_to=st.none() | st.integers(0, 4),
    with_hooks=st.booleans(),
)


@given(log=st.lists(runs, max_size=12), query=queries, limit=st.integers(1, 4))
def test_pages_give_each_matching_run_once_and_in_order(log: list[Any], query: Any, limit: int) -> None:
    broker = ScriptedBroker(CATALOGUE)
    for run in log:
        put(broker, **run)
    latest = {run["run_id"]: run for run in log}
    expected = [
        run["run_id"]
        for run in sorted(latest.values(), key=lambda r: (r["created_at"], r["run_id"]), reverse=True)
        if query["workflow"] in (None, run["workflow"])
        and (not query["statuses"] or run["status"] in query["statuses"])
        and query["attributes"].items() <= run["attributes"].items()
        and (query["created_from"] is None or run["created_at"] >= query["created_from"])
        and (query["created_to"] is None or run["created_at"] < query["created_to"])
        and (run["hooks"] or not query["with_hooks"])
    ]
    projection = Projection(Connection(broker, CATALOGUE))
    projection.start()
    try:
        assert projection.wait_ready(5)
        found, cursor = [], None
        while True:
            page = projection.runs(RunQuery(**query), limit, cursor)
            assert len(page.runs) <= limit
            found += [run.run_id for run in page.runs]
            cursor = page.cursor
            if cursor is None:
                break
        assert found == expected
    finally:
        projection.stop()


def test_runs_are_counted_by_workflow_status_and_time(broker: ScriptedBroker, opened: Any) -> None:
    for n, status in enumerate(["completed", "completed", "failed"]):
        put(broker, f"r{n}", status=status, created_at=100 + 10 * n)
    put(broker, "other", workflow="v", created_at=5)
    projection = opened()
    assert projection.wait_ready(5)
    assert sorted(projection.counts()) == [("v", "running", 0, 1), ("w", "completed", 0, 2), ("w", "failed", 0, 1)]
    assert sorted(projection.counts(100, 10)) == [
        ("w", "completed", 0, 1), ("w", "completed", 1, 1), ("w", "failed", 2, 1),
    ]  # fmt: skip
    put(broker, "r0", status="failed", created_at=100)
    until(lambda: ("w", "failed", 0, 2) in projection.counts())


def test_completed_runs_say_how_long_they_waited_and_ran(broker: ScriptedBroker, opened: Any) -> None:
    done = {"status": "completed", "started_at": 130, "completed_at": 150}
    put(broker, "older", created_at=90, **done)
    put(broker, "newer", created_at=120, **done)
    put(broker, "failed", created_at=121, **{**done, "status": "failed"})
    put(broker, "never-started", created_at=121, status="completed", completed_at=150)
    projection = opened()
    assert projection.wait_ready(5)
    assert projection.took("w", 0, 10) == [(120, 10, 20), (90, 40, 20)]
    assert projection.took("w", 0, 1) == [(120, 10, 20)]
    assert projection.took("w", 91, 10) == [(120, 10, 20)]
    assert projection.took("v", 0, 10) == []


def test_an_id_is_found_by_how_it_begins(broker: ScriptedBroker, opened: Any) -> None:
    for run_id in ("order-1", "order-10", "order-2", "orders", "ordeal", "order-\U0001f600"):
        put(broker, run_id)
    projection = opened()
    assert sorted(listed(projection, id_prefix="order-1")) == ["order-1", "order-10"]
    assert len(listed(projection, id_prefix="order-")) == 4
    assert listed(projection, id_prefix="order-%") == listed(projection, id_prefix="Order") == []


def test_a_file_of_another_layout_is_made_anew(broker: ScriptedBroker, opened: Any, tmp_path: Path) -> None:
    path = tmp_path / "runs.sqlite"
    older = sqlite3.connect(path)
    for table in ("runs", "attributes", "positions", "origin"):
        older.execute(f"CREATE TABLE {table} (run_id TEXT)")
    older.execute("INSERT INTO runs VALUES ('gone')")
    older.commit()
    older.close()
    put(broker, "r1", status="completed", started_at=1, completed_at=2)
    projection = opened(path)
    assert listed(projection) == ["r1"]
    assert projection.took("w", 0, 1) == [(1, 0, 1)]


def test_a_file_of_another_program_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "runs.sqlite"
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE runs (distance)")
    other.execute("INSERT INTO runs VALUES (42)")
    other.commit()
    with pytest.raises(ConfigurationError, match="cannot be kept in"):
        create_gateway("embedded:x", projection=path)
    assert other.execute("SELECT distance FROM runs").fetchall() == [(42,)]
    other.close()
