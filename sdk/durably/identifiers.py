"""Names for runs and requests: ULIDs (https://github.com/ulid/spec), and what an own run id may be."""

from __future__ import annotations

import secrets
import threading
import time
from typing import TYPE_CHECKING

from durably.errors import ConfigurationError
from durably.tokens import PREFIX

if TYPE_CHECKING:
    from collections.abc import Callable

_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_RANDOM_BITS = 80
_LENGTH = 26
LONGEST_ID = 1_024
"""Bytes of the ids that others make: of resumes, requests, and runs that are somewhere else."""
LONGEST_RUN_ID = 200
"""Bytes of a run's id."""


class Ulids:
    """Makes ULIDs that rise strictly, also within a millisecond and when the clock steps back. Thread-safe.

    Args:
        clock: milliseconds since the epoch.
    """

    def __init__(self, clock: Callable[[], int] = lambda: time.time_ns() // 1_000_000) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._last = 0

    def __call__(self) -> str:
        """The next one: 26 characters of Crockford's base 32."""
        with self._lock:
            now = self._clock()
            if now > self._last >> _RANDOM_BITS:
                self._last = now << _RANDOM_BITS | secrets.randbits(_RANDOM_BITS)
            else:
                self._last += 1  # an overflow of the random part moves into the time, which keeps the order
            value = self._last
        return _text(value)


def ulid_of(ms: int, randomness: int) -> str:
    """The ULID of an instant, in milliseconds since the epoch, and 80 bits."""
    return _text(ms << _RANDOM_BITS | randomness)


def _text(value: int) -> str:
    return "".join(_ALPHABET[value >> shift & 31] for shift in range(5 * (_LENGTH - 1), -1, -5))


ulid = Ulids()


def new_run_id() -> str:
    """An id for a run that was given none."""
    return f"wrun_{ulid()}"


def checked_run_id(run_id: str) -> str:
    """The same id. Raises `ConfigurationError` when no run may have it, saying why."""
    remedy = f"use 1 to {LONGEST_RUN_ID} bytes of printable text without '|'"
    if not isinstance(run_id, str):
        raise ConfigurationError(f"run_id {run_id!r} is no text: {remedy}")
    if not run_id:
        raise ConfigurationError(f"run_id is empty: {remedy}")
    if (size := len(run_id.encode("utf-8", "surrogatepass"))) > LONGEST_RUN_ID:
        raise ConfigurationError(f"run_id {run_id[:40]!r}… has {size} bytes: {remedy}")
    if not run_id.isprintable() or run_id != run_id.strip():
        raise ConfigurationError(f"run_id {run_id!r} has unprintable characters, or space around it: {remedy}")
    if "|" in run_id:
        raise ConfigurationError(f"run_id {run_id!r} has a '|': {remedy}")
    if run_id.startswith(PREFIX):
        raise ConfigurationError(f"run_id {run_id!r} begins with {PREFIX!r}, which is reserved for hooks: {remedy}")
    return run_id
