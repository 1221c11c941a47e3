"""A file that says which attempt of which step was begun and ended, when, and in which process.

It is outside of everything that durably keeps, so that it can bear witness: a step that ran twice stands there twice.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from durably import get_step_metadata

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PATH = "ORDERS_LEDGER"


class Attempt(NamedTuple):
    """One attempt of one step of one run; executed once, unless a crash came between."""

    run_id: str
    step_id: str
    attempt: int


class Line(NamedTuple):
    """One line of the ledger. ``mark`` is begin, end or raised; ``at`` in milliseconds since the epoch."""

    mark: str
    attempt: Attempt
    step: str
    pid: int
    at: int


def _append(mark: str) -> None:
    path = os.environ.get(PATH)
    if path is None:
        return
    me = get_step_metadata()
    line = f"{mark} {me.run_id} {me.step_id} {me.attempt} {me.step_name} {os.getpid()} {time.time_ns() // 1_000_000}\n"
    # One write to a file opened for appending: lines of several processes do not mix, and a kill leaves none half
    # written.
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)


@contextmanager
def entry() -> Iterator[None]:
    """Notes the execution of the step that it is used in."""
    _append("begin")
    try:
        yield
    except BaseException:
        _append("raised")
        raise
    _append("end")


def read(path: Path) -> list[Line]:
    """All lines so far."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        mark, run_id, step_id, attempt, step, pid, at = line.split(" ")
        lines.append(Line(mark, Attempt(run_id, step_id, int(attempt)), step, int(pid), int(at)))
    return lines


def executions(lines: list[Line]) -> Counter[Attempt]:
    """How often each attempt was begun."""
    return Counter(line.attempt for line in lines if line.mark == "begin")


def unfinished(lines: list[Line]) -> set[Attempt]:
    """The attempts that were begun more often than they ended."""
    begun = executions(lines)
    begun.subtract(line.attempt for line in lines if line.mark != "begin")
    return {attempt for attempt, count in begun.items() if count > 0}
