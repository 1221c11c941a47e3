"""Logs of durably's processes: of text for people, or of JSON, with the run and step that each line is about."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any, Literal, TextIO, get_args

import structlog

from durably.runtime import step_context, workflow_context

if TYPE_CHECKING:
    from structlog.typing import EventDict

Format = Literal["text", "json"]
FORMATS: tuple[Format, ...] = get_args(Format)
_ABOUT = "durably_about"  # the record's attribute; its own names would forbid them to ``extra``


def about() -> dict[str, str | int]:
    """What the calling code works on: ``run_id`` and ``workflow``, in steps also ``step``, ``step_id`` and ``attempt``."""
    run = workflow_context()
    if run is not None:
        return {"run_id": run.run_id, "workflow": run.workflow_name}
    step = step_context.get()
    if step is None:
        return {}
    return {
        "run_id": step.run_id,
        "workflow": step.workflow_name,
        "step": step.step_name,
        "step_id": step.step_id,
        "attempt": step.attempt,
    }


def configure(form: Format, stream: TextIO | None = None) -> None:
    """Sends all logs of this process, from INFO on, to a stream, one a line; also those that are made with structlog.

    Args:
        form: ``json`` gives objects with ``timestamp``, ``level``, ``logger``, ``event``, what `about` says, and what
            ``extra`` has.
        stream: stderr by default.
    """
    out = stream or sys.stderr
    renderer: Any = structlog.processors.JSONRenderer()
    if form == "text":
        # Not the one that shows local variables: they may be what nobody is to read.
        plain = structlog.dev.plain_traceback
        renderer = structlog.dev.ConsoleRenderer(colors=out.isatty(), exception_formatter=plain)
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[
                structlog.stdlib.add_logger_name,
                structlog.stdlib.add_log_level,
                structlog.stdlib.ExtraAdder(),
            ],
            processors=[
                _told,
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *([structlog.processors.format_exc_info] if form == "json" else []),
                renderer,
            ],
        )
    )
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)
    _note_what_records_are_about()
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.contextvars.merge_contextvars,
            structlog.stdlib.add_logger_name,
            structlog.stdlib.add_log_level,
            structlog.stdlib.PositionalArgumentsFormatter(),
            structlog.processors.StackInfoRenderer(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )


def _note_what_records_are_about() -> None:
    """When a record is made: handlers run outside of workflow code, or on threads of their own."""
    usual: Any = logging.getLogRecordFactory()
    if getattr(usual, "notes", False):
        return

    def make(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record: logging.LogRecord = usual(*args, **kwargs)
        setattr(record, _ABOUT, about())
        return record

    make.notes = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(make)


def _told(_: Any, __: str, event: EventDict) -> EventDict:
    event.pop(_ABOUT, None)
    return {**getattr(event["_record"], _ABOUT, {}), **event}
