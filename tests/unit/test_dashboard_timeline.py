"""What a log becomes on the dashboard: rows and bars on an axis of time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from durably import payloads
from durably_connectors.http.dashboard import charts
from durably_connectors.http.dashboard.render import ago, arguments, instant, length, pretty
from durably_connectors.http.dashboard.timeline import Axis, Timeline
from durably_connectors.http.projection import Count, Took
from durably_schemas import events as ev
from durably_schemas.events import event
from durably_schemas.records import Error, Payload, StreamWritten
from hypothesis import given
from hypothesis import strategies as st

if TYPE_CHECKING:
    from durably_schemas.records import Event

NOTHING = Payload(content_type="application/json", data=b"null")
ERROR = Error(type="builtins:OSError", message="down")
BACKOFF = ev.Backoff(initial_ms=1, factor=1, max_ms=1)


def log(*entries: tuple[int, Any] | tuple[int, Any, str]) -> list[Event]:
    return [event("r", seq, at, data, *about) for seq, (at, data, *about) in enumerate(entries, 1)]


def step(at: int, id_: str, queue: str = "default") -> tuple[int, Any, str]:
    created = ev.StepCreated(
        step="pay", queue=queue, input=NOTHING, fingerprint="f", max_retries=3, backoff=BACKOFF
    )  # fmt: skip
    return at, created, id_


CREATED = (0, ev.RunCreated(workflow="w", input=NOTHING))


def bars(timeline: Timeline, row: int = 0) -> list[tuple[str, int, int | None]]:
    return [(bar.kind, bar.since, bar.until) for bar in timeline.rows[row].bars]


def test_a_step_is_a_row_of_its_attempts_and_of_the_pauses_between_them() -> None:
    written = StreamWritten(namespace="default", writer="w", partition=0, first_offset=0, chunks=4)
    timeline = Timeline(
        log(
            CREATED,
            step(10, "s"),
            (40, ev.StepStarted(attempt=1, worker="a", started_at=20), "s"),
            (40, ev.StepRetrying(attempt=2, error=ERROR, retry_at=60), "s"),
            (60, ev.StepScheduled(attempt=2), "s"),
            (90, ev.StepStarted(attempt=2, worker="b", started_at=70), "s"),
            (90, ev.StepCompleted(attempt=2, result=NOTHING, streams=(written, written)), "s"),
            (100, ev.RunCompleted(result=NOTHING)),
        )
    )
    assert bars(timeline) == [
        ("queued", 10, 20), ("failed", 20, 40), ("backoff", 40, 60), ("queued", 60, 70), ("completed", 70, 90),
    ]  # fmt: skip
    row = timeline.rows[0]
    assert (row.state, row.attempts, row.since, row.until, row.error) == ("completed", 2, 10, 90, None)
    assert timeline.streams == {"default": 8}
    assert timeline.end == 100


@pytest.mark.parametrize("started", [0, 5_000])
def test_a_worker_whose_clock_is_wrong_does_not_turn_time_back(started: int) -> None:
    timeline = Timeline(
        log(CREATED, step(10, "s"), (40, ev.StepStarted(attempt=1, worker="a", started_at=started), "s"))
    )
    (_, begun, queued_until), (_, since, until) = bars(timeline)
    assert (begun, until) == (10, None)
    assert 10 <= queued_until == since <= 40


def test_waits_hooks_and_children_are_rows_too() -> None:
    timeline = Timeline(
        log(
            CREATED,
            (1, ev.WaitCreated(due_at=50), "t"),
            (2, ev.HookCreated(token="ok", metadata=NOTHING), "h"),
            (3, ev.ChildCreated(child_run_id="c", workflow="sub", input=NOTHING), "c"),
            (4, ev.HookCreated(token="taken"), "x"),
            (5, ev.HookConflict(token="taken", holder_run_id="other"), "x"),
            (6, ev.HookReceived(resume_id="1", payload=NOTHING), "h"),
            (7, ev.HookReceived(resume_id="2", payload=NOTHING), "h"),
            (8, ev.HookDisposed(), "h"),
            (9, ev.ChildCompleted(status="failed", error=ERROR), "c"),
            (50, ev.WaitCompleted(), "t"),
        )
    )
    assert [(row.kind, row.state, row.until) for row in timeline.rows] == [
        ("wait", "completed", 50), ("hook", "closed", 8), ("child", "failed", 9), ("hook", "refused", 5),
    ]  # fmt: skip
    wait, hook, child, refused = timeline.rows
    assert (wait.due, hook.marks, child.child, child.error) == (50, [6, 7], "c", ERROR)
    assert [title for title, _ in hook.values] == ["Metadata", "Payload 1", "Payload 2"]
    assert "other" in refused.note


def test_what_a_run_leaves_open_ends_with_it_and_what_goes_on_does_not() -> None:
    going = [CREATED, step(10, "s"), (20, ev.WaitCreated(due_at=99), "t")]
    assert [row.until for row in Timeline(log(*going)).rows] == [None, None]
    ended = Timeline(log(*going, (30, ev.RunFailed(error=ERROR))))
    assert [(row.state, row.until) for row in ended.rows] == [("dropped", 30), ("dropped", 30)]
    assert all(bar.until is not None for row in ended.rows for bar in row.bars)


def test_a_log_without_its_middle_is_shown_as_far_as_it_goes() -> None:
    timeline = Timeline(log(CREATED, (5, ev.StepCompleted(attempt=1, result=NOTHING), "gone")))
    assert timeline.rows == []


@given(st.integers(0, 10**15), st.integers(0, 10**12), st.integers(-(10**15), 10**16), st.integers(-(10**15), 10**16))
def test_a_bar_lies_on_the_axis_and_can_be_seen(begin: int, span: int, since: int, until: int) -> None:
    axis = Axis(begin, begin + max(1, span))
    left, width = axis.span(since, max(since, until))
    assert left >= 0
    assert width > 0.3
    assert left + width <= 100.001


def test_columns_are_stacked_and_as_high_as_they_are_many() -> None:
    counts = [Count("w", "completed", 0, 3), Count("w", "failed", 0, 1), Count("w", "completed", charts.SLOTS, 2)]
    columns, top = charts.columns(counts, 1_000, 10)
    assert top == 4
    assert [(piece.status, piece.y, piece.height) for piece in columns[0].pieces] == [
        ("completed", 25, 75), ("failed", 0, 25),
    ]  # fmt: skip
    assert columns[-1].since == 1_000 + 10 * (charts.SLOTS - 1)
    assert charts.columns([], 0, 1) == ([], 0)


def test_latency_is_drawn_by_percentiles() -> None:
    took = [Took(5, 0, ran) for ran in range(1, 101)] + [Took(15, 0, 200)]
    found = charts.latency(took, 0, 10, (50, 95))
    assert found.top == 200
    ys = [[float(point.split(",")[1]) for point in line.points.split()] for line in found.lines]
    assert ys == [[75.0, 0.0], [52.5, 0.0]]
    assert charts.latency([], 0, 10, (50,)).lines[0].points == ""


@given(st.lists(st.integers(0, 50), min_size=1), st.sampled_from([50, 90, 95, 99, 100]))
def test_a_percentile_is_the_least_value_that_so_many_do_not_exceed(values: list[int], percent: int) -> None:
    found = charts.percentile(sorted(values), percent)
    assert found in values
    assert 100 * sum(value <= found for value in values) >= percent * len(values)
    assert 100 * sum(value < found for value in values) < percent * len(values)


def test_times_are_told_shortly() -> None:
    assert [length(n) for n in (None, 0, 999, 1500, 61_000, 3_600_000, 90_000_000, 3_605_000)] == [
        "\u2013", "0 ms", "999 ms", "1.5 s", "1 min 1 s", "1 h", "1 d 1 h", "1 h",
    ]  # fmt: skip
    assert (ago(0, 500), ago(0, 90_000), ago(7_200_000, 0)) == ("just now", "1 min ago", "in 2 h")
    assert instant(1_700_000_000_123) == "2023-11-14 22:13:20.123Z"
    assert instant(2**62) == f"{2**62} ms"


def test_arguments_are_shown_as_they_were_given() -> None:
    assert arguments(payloads.dump([["3", 2], {}], "x")) == ["3", 2]
    assert arguments(payloads.dump([[], {"n": 1}], "x")) == {"n": 1}
    assert arguments(payloads.dump([[1], {"n": 1}], "x")) == {"args": [1], "kwargs": {"n": 1}}
    assert arguments(Payload(content_type="application/json", data=b"[[1], {}]")) == [[1], {}]


def test_a_long_value_is_cut_and_says_so() -> None:
    assert pretty("x" * 30_000).endswith("characters more: the API has all of it")
