"""Traces: one for each run, from its start by a client to its steps in workers.

    start NAME          the client's
      run NAME          the processor's, told when the run has ended
        step NAME       a worker's, one for each time that an attempt is executed
          ...           what the step's own code makes

The context travels in the headers ``traceparent`` and ``tracestate`` (W3C Trace Context) of StartRun, StepRequest and
StepResult, and the run's is in its log, in run_created. Nothing is done, and nothing imported, in a process that has no
provider of OpenTelemetry's tracers; the headers pass through it as they are.
"""

from __future__ import annotations

import re
import sys
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from contextlib import AbstractContextManager

    from durably_schemas.records import StartRun, StepRequest
    from opentelemetry import trace as otel
    from opentelemetry.context import Context

    from durably.broker.port import Headers

TRACEPARENT, TRACESTATE = "traceparent", "tracestate"
HEADERS = frozenset({TRACEPARENT, TRACESTATE})
LONGEST_STATE = 512
"""Characters of a ``tracestate`` that must travel, by the specification; a longer one is dropped, as it allows."""
_PARENT = re.compile(r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})", re.ASCII)
_SAMPLED = 1


class Trace(NamedTuple):
    """A place in a trace: the values of the two headers."""

    parent: str
    state: str | None = None

    @classmethod
    def of(cls, headers: Iterable[tuple[str, bytes]]) -> Trace | None:
        """What these headers say; None where there is none of them, or none that the specification allows."""
        found = {name: value.decode("ascii", "replace") for name, value in headers if name in HEADERS}
        return cls.checked(found.get(TRACEPARENT), found.get(TRACESTATE))

    @classmethod
    def checked(cls, parent: str | None, state: str | None) -> Trace | None:
        """The place, without what the specification does not allow; None where nothing is left."""
        if parent is None or not _PARENT.fullmatch(parent):
            return None
        fine = state is not None and 0 < len(state) <= LONGEST_STATE and state.isascii() and state.isprintable()
        return cls(parent, state if fine else None)

    @classmethod
    def at(cls, trace_id: int, span_id: int, *, sampled: bool, state: str | None = None) -> Trace:
        """The place of a span."""
        return cls(f"00-{trace_id:032x}-{span_id:016x}-{_SAMPLED if sampled else 0:02x}", state)

    @property
    def trace_id(self) -> int:
        """Of all of its spans."""
        return int(self.parent[3:35], 16)

    @property
    def span_id(self) -> int:
        """Of the span that is this place."""
        return int(self.parent[36:52], 16)

    @property
    def sampled(self) -> bool:
        """Whether its spans are to be kept."""
        return bool(int(self.parent[53:], 16) & _SAMPLED)

    @property
    def headers(self) -> Headers:
        """For the records that carry it on."""
        parent = (TRACEPARENT, self.parent.encode())
        return (parent,) if self.state is None else (parent, (TRACESTATE, self.state.encode()))


def provider() -> otel.TracerProvider | None:
    """Where this process has its tracers from; None: it makes no traces."""
    trace: Any = sys.modules.get("opentelemetry.trace")  # whoever has set one has imported it
    if trace is None:
        return None
    found: otel.TracerProvider = trace.get_tracer_provider()
    return None if isinstance(found, trace.ProxyTracerProvider | trace.NoOpTracerProvider) else found


def context_of(trace: Trace) -> Context:
    """OpenTelemetry's context in which the place is the current span."""
    from opentelemetry import trace as otel  # an extra

    state = otel.TraceState.from_header([trace.state]) if trace.state else None
    flags = otel.TraceFlags(_SAMPLED if trace.sampled else 0)
    span = otel.SpanContext(trace.trace_id, trace.span_id, is_remote=True, trace_flags=flags, trace_state=state)
    return otel.set_span_in_context(otel.NonRecordingSpan(span))


def _here(span: otel.Span) -> Headers:
    context = span.get_span_context()
    if not context.is_valid:
        return ()
    state = context.trace_state.to_header() or None
    return Trace.at(context.trace_id, context.span_id, sampled=context.trace_flags.sampled, state=state).headers


@contextmanager
def start_span(command: StartRun, received: Iterable[tuple[str, bytes]] = ()) -> Iterator[Headers]:
    """The span of a client that starts a run; gives the headers of its record.

    Args:
        command: the start.
        received: headers of a request that asks for it, for where no span is current.
    """
    source = provider()
    caller = Trace.of(received)
    if source is None:
        yield () if caller is None else caller.headers
        return
    from opentelemetry import trace as otel  # an extra

    current = otel.get_current_span().get_span_context().is_valid
    with source.get_tracer("durably.client").start_as_current_span(
        f"start {command.workflow}",
        context=None if current or caller is None else context_of(caller),
        kind=otel.SpanKind.PRODUCER,
        attributes={"durably.run_id": command.run_id, "durably.workflow": command.workflow},
    ) as span:
        yield _here(span)


class StepSpans:
    """The spans of a worker. Made when the worker is: the provider must be there by then."""

    def __init__(self, worker: str) -> None:
        source = provider()
        self._tracer = None if source is None else source.get_tracer("durably.worker")
        self._worker = worker

    def of(self, request: StepRequest, headers: Iterable[tuple[str, bytes]]) -> AbstractContextManager[Any]:
        """The span of one execution of an attempt, current within; what is raised through it is its error."""
        if self._tracer is None:
            return _NOTHING
        from opentelemetry import trace as otel  # an extra

        at = Trace.of(headers)
        attributes: Mapping[str, str | int] = {
            "durably.run_id": request.run_id,
            "durably.workflow": request.workflow,
            "durably.step": request.step,
            "durably.step_id": request.step_id,
            "durably.attempt": request.attempt,
            "durably.worker": self._worker,
        }
        return self._tracer.start_as_current_span(
            f"step {request.step}",
            context=None if at is None else context_of(at),
            kind=otel.SpanKind.CONSUMER,
            attributes=attributes,
        )


_NOTHING = nullcontext()
