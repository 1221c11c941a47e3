"""Logs of many runs, written straight to ``events`` as processors would have written them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING

from durably import step
from durably.authoring import Registry, WorkflowDefinition
from durably.payloads import dump, dump_arguments
from durably_processor.engine.execution import Environment
from durably_processor.engine.run import Run
from durably_schemas import Codec
from durably_schemas import records as rec

if TYPE_CHECKING:
    from durably.broker.port import Broker
    from durably_schemas import Catalogue

T0 = 1_700_000_000_000
AT_ONCE = 500
"""Runs that are under way at the same time."""
A_TRANSACTION = 1_000
"""Events."""
_ID = "bench-0000000"


@step
async def measured(n: int) -> int:
    return n


async def steps(n: int) -> int:
    for i in range(n):
        await measured(i)
    return n


def history(n: int) -> list[list[bytes]]:
    """The log of a run with n steps, 3 n + 3 events, encoded; in the pieces that one input each brings about."""
    registry, codec = Registry(), Codec()
    registry.workflows["steps"] = WorkflowDefinition("steps", steps)
    environment = Environment(registry, 1_000_000, {"default"}, lambda _: nullcontext())
    start = rec.StartRun(
        run_id=_ID, workflow="steps", input=dump_arguments(steps, (n,), {}, "steps"), requested_at=T0, nonce="nonce"
    )
    run, outcome = Run.start(start, T0, environment, lambda _: ())
    pieces = []
    while True:
        pieces.append([codec.encode(event) for event in outcome.events])
        if not outcome.requests:
            return pieces
        ((_, request),) = outcome.requests
        outcome = run.result(answer(request), T0 + len(pieces))


def answer(request: rec.StepRequest) -> rec.StepResult:
    """A worker's answer to a request."""
    return rec.StepResult(
        run_id=request.run_id,
        step_id=request.step_id,
        attempt=request.attempt,
        fingerprint=request.fingerprint,
        outcome=rec.StepSucceeded(result=dump(1, "result")),
        started_at=T0,
        finished_at=T0,
        worker="bench",
    )


def interleaved(runs: int, n: int) -> Iterator[tuple[bytes, bytes]]:
    """(key, value) of the events of runs with n steps each, `AT_ONCE` of them under way at a time."""
    pieces, template = history(n), _ID.encode()
    for first in range(0, runs, AT_ONCE):
        keys = [f"bench-{number:07}".encode() for number in range(first, min(first + AT_ONCE, runs))]
        for piece in pieces:
            for key in keys:
                for value in piece:
                    yield key, value.replace(template, key)


def write(broker: Broker, catalogue: Catalogue, runs: int, n: int) -> int:
    """Writes the logs of runs with n steps to partition 0 of ``events``, in transactions; returns how many events."""
    transactions = broker.transactions(f"{catalogue.namespace}.bench")
    transactions.init(30)
    count = 0
    transactions.begin()
    for key, value in interleaved(runs, n):
        transactions.send(catalogue.events, value, key=key, partition=0)
        count += 1
        if count % A_TRANSACTION == 0:
            transactions.commit({}, None, 30)
            transactions.begin()
    transactions.commit({}, None, 30)
    transactions.close()
    return count
