"""``history.jsonl``: one line of JSON for each time that everything was measured, never changed afterwards."""

from __future__ import annotations

from pathlib import Path

import msgspec
from figures import Curve, Figure, System

PATH = Path(__file__).parent / "history.jsonl"


class Session(msgspec.Struct, omit_defaults=True):
    """What was measured on one machine in one go. Fields that earlier lines lack have defaults.

    Attributes:
        conditions: what else a reader must know to compare the figures with others.
        note: what has changed since the last time, in a sentence.
        systems: by group, those that were measured.
        missing: by group, why a system was not measured.
    """

    conditions: dict[str, str]
    figures: list[Figure]
    note: str = ""
    systems: dict[str, System] = {}
    missing: dict[str, str] = {}
    curves: list[Curve] = []

    def value(self, group: str, beginning: str) -> float | None:
        """The first figure of a group that begins so."""
        found = (figure.value for figure in self.figures if figure.group == group and figure.what.startswith(beginning))
        return next(found, None)

    def total(self, group: str, beginning: str) -> float | None:
        """The sum of those figures of a group that begin so; None where there is none."""
        found = [figure.value for figure in self.figures if figure.group == group and figure.what.startswith(beginning)]
        return sum(found) if found else None


def append(session: Session) -> None:
    """Adds a line."""
    with PATH.open("ab") as history:
        history.write(msgspec.json.encode(session) + b"\n")


def read() -> list[Session]:
    """All lines, the oldest first."""
    return [msgspec.json.decode(line, type=Session) for line in PATH.read_bytes().splitlines()]
