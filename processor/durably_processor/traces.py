"""The spans of runs: made when a run has ended, with IDs that do not depend on who makes them.

A span of OpenTelemetry lives in one process; a run outlives many. So what its steps and children name as their parent
is derived from the run, and its span is made on the commit thread, when the end is committed. Whoever owns the run then
makes the span that all have named, and a replay makes none.
"""

from __future__ import annotations

from contextvars import ContextVar
from hashlib import blake2b
from typing import Any

from durably.observability.tracing import Trace, context_of, provider
from durably_schemas.records import StartRun

from durably_processor.engine.state import Header

NS_A_MS = 1_000_000


class RunTraces:
    """Makes the spans. Made when the processor is: the provider must be there by then.

    Attributes:
        on: whether this process makes traces; if not, what is found in records is handed on as it is.
    """

    def __init__(self) -> None:
        source = provider()
        self.on = source is not None
        if source is None:
            return
        self._tracer: Any = source.get_tracer("durably.processor")
        # Only the SDK's tracers let their IDs be chosen. With others a run's span has an ID that nobody has named.
        if hasattr(self._tracer, "id_generator"):
            self._tracer.id_generator = _Ids(self._tracer.id_generator)

    def began(self, command: StartRun, at: int, given: Trace | None) -> Trace | None:
        """What run_created is to say: where its start came from, or where no trace did, the root of one of its own."""
        if given is not None or not self.on:
            return given
        trace_id = _derived(f"{command.run_id}\0{command.nonce}\0{at}", 16)
        sampler = getattr(self._tracer, "sampler", None)
        sampled = (
            sampler is None or sampler.should_sample(None, trace_id, _name(command.workflow)).decision.is_sampled()
        )
        return Trace.at(trace_id, _derived(command.run_id, 8), sampled=sampled)

    def within(self, header: Header) -> Trace | None:
        """The place of what a run asks for: its steps and its children."""
        found = _recorded(header)
        if found is None or not self.on:
            return found
        return Trace.at(found.trace_id, _derived(header.run_id, 8), sampled=found.sampled, state=found.state)

    def ended(self, header: Header) -> None:
        """Makes the span of a run whose end is committed."""
        found = _recorded(header)
        if not self.on or found is None or not found.sampled:
            return
        from opentelemetry import trace as otel  # an extra
        from opentelemetry.context import Context

        own = _derived(header.run_id, 8)
        token = _chosen.set((found.trace_id, own))
        try:
            span = self._tracer.start_span(
                _name(header.workflow),
                context=Context() if found.span_id == own else context_of(found),
                start_time=header.created_at * NS_A_MS,
                attributes={
                    "durably.run_id": header.run_id,
                    "durably.workflow": header.workflow,
                    "durably.status": header.status,
                    "durably.events": header.seq,
                },
            )
        finally:
            _chosen.reset(token)
        if header.status == "failed":
            error = header.error
            said = None if error is None else f"{error.type.rpartition(':')[2]}: {error.message}"
            span.set_status(otel.Status(otel.StatusCode.ERROR, said))
        span.end((header.completed_at or header.at) * NS_A_MS)


class _Ids:
    """A generator of IDs that gives those that were chosen, and else what the usual one gives."""

    def __init__(self, usual: Any) -> None:
        self._usual = usual

    def generate_trace_id(self) -> int:
        chosen = _chosen.get()
        return self._usual.generate_trace_id() if chosen is None else chosen[0]

    def generate_span_id(self) -> int:
        chosen = _chosen.get()
        return self._usual.generate_span_id() if chosen is None else chosen[1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._usual, name)


_chosen: ContextVar[tuple[int, int] | None] = ContextVar("durably_span", default=None)


def _recorded(header: Header) -> Trace | None:
    return Trace.checked(header.traceparent, header.tracestate)


def _name(workflow: str) -> str:
    return f"run {workflow}"


def _derived(text: str, size: int) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=size).digest(), "big") or 1
