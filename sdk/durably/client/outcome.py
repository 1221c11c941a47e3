"""What a reply means to the caller: a summary, a value, or an error."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from durably import failures, payloads
from durably.authoring import registry
from durably.errors import DurablyError, RunBlockedError, RunCancelledError, RunFailedError, RunNotFoundError

if TYPE_CHECKING:
    from durably_schemas.records import Reply, RunSummary


def summary_of(reply: Reply, run_id: str) -> RunSummary:
    """The run as it is. Raises `RunNotFoundError`, or `DurablyError` where the processor refused."""
    if reply.status == "NOT_FOUND":
        raise RunNotFoundError(f"there is no run {run_id}", run_id)
    if reply.status == "REFUSED" or reply.summary is None:
        raise DurablyError(f"run {run_id}: {reply.message or 'the processor refused to answer'}")
    return reply.summary


def value_of(reply: Reply, run_id: str, returns: Any = None) -> Any:
    """What an ended run returned.

    Args:
        reply: the answer to a QueryRun for the RESULT.
        run_id: the run that was asked about.
        returns: the type to convert to; by default that of the workflow registered under the run's name, if any.

    Raises:
        RunFailedError: with the exception as ``cause``.
        RunCancelledError: the run was cancelled.
        RunBlockedError: the run waits for other code; says why.
        RunNotFoundError: there is no such run.
    """
    summary = summary_of(reply, run_id)
    of = f"run {run_id} of workflow {summary.workflow}"
    if summary.status == "completed":
        if reply.result is None:
            raise DurablyError(f"{of} completed, but its result did not come with the answer")
        if returns is None:
            definition = registry.workflows.get(summary.workflow)
            returns = payloads.result_type(definition.fn) if definition is not None else Any
        return payloads.load(reply.result, returns)
    if summary.status == "failed":
        cause = failures.to_exception(summary.error) if summary.error is not None else None
        said = f": {failures.summed_up(summary.error)}" if summary.error else ""
        raise RunFailedError(f"{of} failed{said}", run_id, cause) from cause
    if summary.status == "cancelled":
        reason = reply.message or (summary.error.message if summary.error is not None else None)
        raise RunCancelledError(f"{of} was cancelled" + (f": {reason}" if reason else ""), run_id)
    if summary.status == "blocked":
        reason = failures.revealed(summary.error).message if summary.error is not None else "no reason is recorded"
        raise RunBlockedError(f"{of} is blocked: {reason}", run_id)
    raise DurablyError(f"{of} is {summary.status}, but the processor answered as if it had ended")
