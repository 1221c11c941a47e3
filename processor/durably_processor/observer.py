"""What is counted of a processor's work. Counts are of what is committed: what a crash or an abort undoes is not in them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterable, Sequence
from typing import TYPE_CHECKING

from durably.authoring import Registry
from durably.observability.metrics import OTHER, Histogram, Sample
from durably_schemas import events as ev
from durably_schemas.records import Event

from durably_processor.engine.state import OpenStep, RunState
from durably_processor.traces import RunTraces

if TYPE_CHECKING:
    from durably_processor.turn import Counter, Part

log = logging.getLogger("durably.processor")

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
RECORDS = (1, 3, 10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000, 100_000)

_STEP_ENDS: dict[type, str] = {
    ev.StepCompleted: "durably_steps_completed_total",
    ev.StepFailed: "durably_steps_failed_total",
    ev.StepCancelled: "durably_steps_cancelled_total",
}
_RUN_ENDS: dict[type, str] = {ev.RunCompleted: "completed", ev.RunFailed: "failed", ev.RunCancelled: "cancelled"}
_UNCOUNTED = frozenset({ev.StepStarted, ev.WaitCreated, ev.WaitCompleted})
_DEAD_LETTER: Counter = ("durably_dead_letters_total", ("processor",))


def _own(events: Sequence[Event], steps: Container[str]) -> Sequence[Event]:
    """What of these has happened now. Of what a run was copied with: that it goes on, and the steps that begin anew."""
    first = events[0].data if events else None
    if type(first) is not ev.RunCreated or not first.origins:
        return events
    kept = first.origins[-1].events
    return [
        event
        for event in events
        if event.seq > kept
        or type(event.data) is ev.RunStarted
        or (type(event.data) is ev.StepCreated and event.correlation_id in steps)
    ]


class Observer:
    """Is told what happens, and tells it to whoever asks.

    Args:
        registry: the names that labels may have: those of clients, who may start anything, are told as one.
        counting: whether there is somebody who reads the counts.
        traces: makes the spans of runs that have ended.
    """

    def __init__(self, registry: Registry, *, counting: bool, traces: RunTraces) -> None:
        self._workflows = registry.workflows
        self._step = registry.step
        self._counting = counting
        self._traces = traces
        self._totals: dict[Counter, int] = {_DEAD_LETTER: 0}
        self.turns = Histogram(SECONDS)
        self.commits = Histogram(SECONDS)
        self.records = Histogram(RECORDS)
        self.gauges: Callable[[], Iterable[Sample]] = tuple

    # -- on the advance thread -------------------------------------------------------------------------------------

    def steps_of(self, state: RunState) -> dict[str, str]:
        """The names of a run's open steps by id: the events that close them do not name them."""
        if not self._counting:
            return {}
        return {i: item.step for i, item in state.items.items() if type(item) is OpenStep}

    def recorded(
        self, counts: dict[Counter, int], workflow: str, events: Sequence[Event], steps: dict[str, str]
    ) -> None:
        """Counts what one input has made of a run.

        Args:
            counts: of the part that it belongs to.
            workflow: the run's.
            events: what was recorded.
            steps: see `steps_of`; kept up to date.
        """
        if not self._counting:
            return
        for event in _own(events, steps):
            data = event.data
            kind = type(data)
            if kind in _UNCOUNTED:
                continue
            counter: Counter
            if kind in _STEP_ENDS:
                step = steps.pop(event.correlation_id or "", OTHER)
                counter = (_STEP_ENDS[kind], (step,))
            elif isinstance(data, ev.StepCreated):
                step = data.step if self._step(data.step) is not None else OTHER
                steps[event.correlation_id or ""] = step
                counter = ("durably_steps_requested_total", (step, data.queue))
            elif kind is ev.StepRetrying:
                counter = ("durably_steps_retried_total", (steps.get(event.correlation_id or "", OTHER),))
            elif kind is ev.RunStarted:
                counter = ("durably_runs_started_total", (self._workflow(workflow),))
            elif kind in _RUN_ENDS:
                counter = ("durably_runs_finished_total", (self._workflow(workflow), _RUN_ENDS[kind]))
            elif kind is ev.RunBlocked:
                counter = ("durably_runs_blocked_total", (self._workflow(workflow),))
            else:
                continue
            counts[counter] = counts.get(counter, 0) + 1

    def dead_letter(self, counts: dict[Counter, int]) -> None:
        """Counts one."""
        counts[_DEAD_LETTER] = counts.get(_DEAD_LETTER, 0) + 1

    def _workflow(self, name: str) -> str:
        return name if name in self._workflows else OTHER

    # -- on the commit thread --------------------------------------------------------------------------------------

    def committed(self, parts: Iterable[Part], seconds: float) -> None:
        """Takes in what a transaction has made final. Never raises: the log does not depend on who reads of it."""
        records = 0
        for part in parts:
            records += len(part.events) + len(part.outputs) + len(part.copies) + len(part.summaries)
            for counter, number in part.counts.items():
                self._totals[counter] = self._totals.get(counter, 0) + number
            for header in part.ended:
                try:
                    self._traces.ended(header)
                except Exception:
                    log.exception("the span of run %s", header.run_id)
        self.commits.observe(seconds)
        self.records.observe(records)

    # -- on the thread of whoever asks -----------------------------------------------------------------------------

    def samples(self) -> Iterable[Sample]:
        """All that there is to tell."""
        yield from [(name, labels, number) for (name, labels), number in self._totals.copy().items()]
        yield "durably_turn_seconds", (), self.turns
        yield "durably_commit_seconds", (), self.commits
        yield "durably_commit_records", (), self.records
        yield from self.gauges()
