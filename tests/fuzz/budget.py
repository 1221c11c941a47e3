"""How much is tried: in ``make test`` little, and the same each time; with ``DURABLY_FUZZ=50`` that many times as much, at random."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import HealthCheck, settings

_FACTOR = int(os.environ.get("DURABLY_FUZZ", "1"))


def budget(examples: int, **options: Any) -> settings:
    """The settings of a test that tries this many examples in ``make test``."""
    return settings(
        max_examples=examples * _FACTOR,
        derandomize=_FACTOR == 1,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
        **options,
    )
