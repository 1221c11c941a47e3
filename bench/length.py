"""Whether an event costs the same wherever in a run's log it stands."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from figures import Curve, Figure

if TYPE_CHECKING:
    from measure import Size
    from roles import Installation

STRETCHES = 20
FIRST, LAST = "per event, first tenth", "per event, last tenth"


async def measure_length(group: str, installation: Installation, size: Size) -> tuple[list[Figure], list[Curve]]:
    """The time between two events over their place in the log of one long run.

    Steps are taken in waves: in sequence a hundred thousand events would take minutes, most of them on the way.
    """
    at = [event.at for event in await installation.events_of_waves(size.long_steps, size.wave)]
    # The log's instants are whole milliseconds: only long stretches tell something.
    bounds = [len(at) * i // STRETCHES for i in range(STRETCHES)] + [len(at) - 1]
    what = f"run of {len(at):,} events, in waves of {size.wave} steps"
    costs = [(at[end] - at[start]) * 1000 / (end - start) for start, end in pairwise(bounds)]
    curve = Curve(group, what, [float(end) for end in bounds[1:]], costs, "events", "µs per event")
    tenth = STRETCHES // 10
    return [
        Figure(group, f"{name} of a {what}", sum(part) / len(part), "µs")
        for name, part in ((FIRST, costs[:tenth]), (LAST, costs[-tenth:]))
    ], [curve]
