"""What a worker counts, where somebody looks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from durably_schemas.records import StepSucceeded

from durably.observability.metrics import Histogram

if TYPE_CHECKING:
    from collections.abc import Iterable

    from durably.observability.metrics import Sample
    from durably.worker.attempt import Attempt
    from durably.worker.execution import Outcome

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)


class Meter:
    """The latencies of steps. Thread-safe; its labels are names of steps that are registered."""

    def __init__(self) -> None:
        self._starts: dict[str, Histogram] = {}
        self._closes: dict[tuple[str, str], Histogram] = {}

    def began(self, attempt: Attempt) -> None:
        """An attempt begins."""
        request = attempt.request
        histogram = self._starts.get(request.step)
        if histogram is None:
            histogram = self._starts.setdefault(request.step, Histogram(SECONDS))
        # The clocks of brokers and workers may differ by more than an attempt waits.
        histogram.observe(max(0, attempt.started_at - request.scheduled_at) / 1000)

    def ended(self, attempt: Attempt, outcome: Outcome | None, now: float) -> None:
        """An attempt has ended, at an instant of the clock that does not jump; None: nobody wanted its outcome."""
        how = "dropped" if outcome is None else "succeeded" if isinstance(outcome, StepSucceeded) else "failed"
        key = attempt.request.step, how
        histogram = self._closes.get(key)
        if histogram is None:
            histogram = self._closes.setdefault(key, Histogram(SECONDS))
        histogram.observe(now - attempt.started)

    def samples(self) -> Iterable[Sample]:
        """All of them."""
        for step, histogram in self._starts.copy().items():
            yield "durably_step_schedule_to_start_seconds", (step,), histogram
        for labels, histogram in self._closes.copy().items():
            yield "durably_step_start_to_close_seconds", labels, histogram
