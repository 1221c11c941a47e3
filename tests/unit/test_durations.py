"""Durations, as users write them, in whole milliseconds; what is none is refused and named."""

import math
from datetime import UTC, datetime, timedelta

import pytest
from durably.durations import milliseconds
from durably.errors import RetryableError
from durably.worker.clock import SystemClock
from durably.worker.execution import failed

YEAR = 365 * 86_400


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (1, 1000),
        (0.0001, 1),
        ("1h30m", 5_400_000),
        ("2 days", 172_800_000),
        (timedelta(microseconds=1), 1),
        (1000 * YEAR, 1000 * YEAR * 1000),
        (datetime(1970, 1, 1, 0, 0, 3, tzinfo=UTC), 2000),
        (datetime(1970, 1, 1, tzinfo=UTC), 0),
    ],
)
def test_durations_are_rounded_up_to_milliseconds(value, found):
    assert milliseconds(value, now=1000) == found


@pytest.mark.parametrize(
    "value",
    [
        -1,
        math.nan,
        math.inf,
        1e300,
        1e17,
        10**400,
        1000 * YEAR + 1,
        "9" * 400 + "s",
        "1001 y",
        timedelta.max,
        "",
        "soon",
    ],
)
def test_what_is_no_duration_is_a_value_error(value):
    with pytest.raises(ValueError, match="is no duration"):
        milliseconds(value)


@pytest.mark.parametrize("retry_after", [1e17, 9.223372e15, math.nan])
def test_a_retry_after_that_cannot_be_is_told_in_a_note(retry_after):
    exc = RetryableError("later", retry_after=retry_after)
    report = failed(exc, SystemClock())
    assert report.retry_after is None
    assert "its retry_after was ignored" in exc.__notes__[0]
