"""The processor's part in the round trips of ``durably health``: see `durably.health`. No run is made for them."""

from __future__ import annotations

from collections.abc import Container

import msgspec
from durably import payloads
from durably.health import QUEUE, STEP, WORKFLOW, Asker
from durably_schemas import records as rec

TIMEOUT_MS = 10_000


def requested(
    record: rec.StartRun, reply_to: rec.ReplyTo, at: int, queues: Container[str]
) -> tuple[str, rec.StepRequest] | str:
    """The queue that is asked, and its request; or why there is none."""
    queue = record.attributes.get(QUEUE, "default")
    if queue not in queues:
        return (
            f"queue {queue!r:.100} has no topic that this processor knows: create it with `durably topics create "
            f"--queue {queue:.100}`, then restart the processors"
        )
    return queue, rec.StepRequest(
        run_id=record.run_id,
        step_id=Asker(at, reply_to.partition, reply_to.request_id).step_id,
        step=STEP,
        attempt=1,
        fingerprint="",
        input=payloads.dump([[], {}], "no arguments"),
        workflow=WORKFLOW,
        workflow_started_at=at,
        scheduled_at=at,
        timeout=TIMEOUT_MS,
    )


def answered(record: rec.StepResult, asker: Asker, at: int) -> rec.Reply:
    """The answer to the asker: which worker it was, and how long it took from log to log, in milliseconds."""
    failed = record.outcome.error.message if isinstance(record.outcome, rec.StepFailed) else None
    told = {"worker": record.worker, "took_ms": max(0, at - asker.at)}
    result = rec.Payload(content_type=payloads.JSON, data=msgspec.json.encode(told))
    return rec.Reply(request_id=asker.request_id, run_id=record.run_id, result=result, message=failed)
