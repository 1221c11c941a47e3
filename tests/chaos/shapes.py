"""The workflows of the harness, how often each is started, and what may become of a run of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

STREAM = tuple(range(20))
"""What `chaos_produce` yields, and what both executions of `chaos_write` write together."""
PLAIN = tuple(range(10))
"""What `chaos_produce_plainly` yields."""


def payloads_for(n: int) -> tuple[int, int]:
    """What the load generator resumes the hook of run n with."""
    return 10 + n % 7, 100 + n % 11


class Shape(NamedTuple):
    """A workflow.

    Attributes:
        results: what it may return for its argument; empty where it returns nothing that can be compared.
        weight: of how many starts, relative to others.
        status: what every run of it ends with.
        resumed: its runs wait for the two payloads of `payloads_for`.
    """

    results: Callable[[int], tuple[Any, ...]]
    weight: int = 0
    status: str = "completed"
    resumed: bool = False


SHAPES = {
    "chaos_sequence": Shape(lambda n: (n + 10,), 25),
    "chaos_fan": Shape(lambda n: (6 * n + 15 + 8 * n,), 10),
    "chaos_race": Shape(lambda n: ("step", "timer"), 15),
    "chaos_naps": Shape(lambda n: (8 * n,), 10),
    "chaos_hook": Shape(lambda n: (n + sum(payloads_for(n)),), 8, resumed=True),
    "chaos_token": Shape(lambda n: (n + sum(payloads_for(n)) + 1,), 8, resumed=True),
    "chaos_mutex": Shape(lambda n: ("held", "conflict"), 5),
    "chaos_family": Shape(lambda n: (2 * n + 10,), 5),
    "chaos_stubborn": Shape(lambda n: (n,), 5),
    "chaos_streams": Shape(lambda n: (), 4),
    "chaos_failing": Shape(lambda n: (), 3, status="failed"),
    "chaos_cancelled": Shape(lambda n: (), 4, status="cancelled"),
    "chaos_lease": Shape(lambda n: ("step",), 1),
}
POISONS = ("chaos_loops_for_ever", "chaos_ends_the_process", "chaos_breaks_the_engine")
"""Workflows whose runs end up blocked, and hurt no other."""
