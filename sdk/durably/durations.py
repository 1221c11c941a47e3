"""Durations and instants, as users write them."""

from __future__ import annotations

import math
import re
from datetime import datetime, timedelta

Duration = float | int | str | timedelta | datetime
"""Seconds, a text such as ``"500ms"``, ``"10s"``, ``"1h30m"``, ``"2 days"``, a timedelta, or an aware datetime."""

_UNITS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000, "w": 604_800_000}
_NAMES = {
    "millisecond": "ms", "msec": "ms", "sec": "s", "second": "s", "min": "m", "minute": "m", "hr": "h", "hour": "h",
    "day": "d", "week": "w",
}  # fmt: skip
_PART = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([a-z]+)\s*")
LONGEST = 1000 * 365 * 86_400_000
"""Milliseconds of the longest duration."""
_REMEDY = 'use seconds, a text such as "10s" or "1h30m", a timedelta, or an aware datetime'


def _unit(name: str) -> int | None:
    name = name if name in _UNITS else name.removesuffix("s") if len(name) > 1 else name
    return _UNITS.get(_NAMES.get(name, name))


def _parse(text: str) -> float:
    position, total = 0, 0.0
    lowered = text.lower()
    while position < len(lowered):
        part = _PART.match(lowered, position)
        factor = _unit(part[2]) if part else None
        if part is None or factor is None:
            raise ValueError(f"{text!r} is no duration: {_REMEDY}")
        total += float(part[1]) * factor
        position = part.end()
    if not text.strip():
        raise ValueError(f"{text!r} is no duration: {_REMEDY}")
    return total


def milliseconds(value: Duration, *, now: int | None = None) -> int:
    """The length of a duration in milliseconds, rounded up to a whole one.

    Args:
        value: see `Duration`. A datetime is measured from ``now``; one in the past gives 0.
        now: milliseconds since the epoch; without it a datetime is refused.

    Raises:
        ValueError: not a duration, negative, or longer than 1000 years.
        TypeError: of another type, or a naive datetime.
    """
    if isinstance(value, datetime):
        if value.tzinfo is None:
            raise TypeError(f"{value!r} has no time zone: use an aware datetime, such as datetime.now(UTC)")
        if now is None:
            raise TypeError(f"an instant ({value!r}) where a duration is needed")
        return max(0, math.ceil(round(value.timestamp() * 1000, 3)) - now)
    if isinstance(value, timedelta):
        length = value.total_seconds() * 1000
    elif isinstance(value, str):
        length = _parse(value)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        length = value * 1000
    else:
        raise TypeError(f"{value!r} is no duration: {_REMEDY}")
    if not 0 <= length <= LONGEST:  # which nan is not either
        raise ValueError(f"{value!r} is no duration: it must not be negative, nor longer than 1000 years")
    return math.ceil(round(length, 6))
