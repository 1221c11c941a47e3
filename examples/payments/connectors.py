"""The shop's connectors: orders start runs, payments are joined with the runs that wait, outcomes go out, all is counted.

Nothing orders payments and orders, so a payment may come before its run: payments are joined with the runs themselves, by
two tables, and whichever comes first waits for the other. What is paid twice, or for a run that is over, goes back.

    durably connectors examples/payments/connectors.py
"""

from __future__ import annotations

import json
import os
from typing import Any

from durably.errors import HookNotFoundError
from durably_connectors.faust import App, KafkaTopic, Later, Message, Outcome, monitor, sink, trigger
from durably_schemas.records import TERMINAL, RunSummary

SHOP = os.environ.get("SHOP", "shop")  # what the names of its topics begin with

app = App("payments")
payments = app.raw(f"{SHOP}.payments")  # keyed by run ID, with as many partitions as durably's topics
known = app.table_of("known")  # run IDs
early = app.table_of("early")  # run ID: a payment that came before its run

monitor()


@trigger(topic=f"{SHOP}.orders", workflow="purchase", key="purchase-{order}")
def ordered(message: Message) -> dict[str, Any]:
    return {"order": message.value["order"], "cents": message.value["cents"]}


@sink(KafkaTopic(f"{SHOP}.purchases"), outcomes="purchase")
def finished(outcome: Outcome) -> Any:
    return outcome.result


@app.each(app.runs)
async def run_changed(event: Any) -> None:
    """Notes that there is a purchase; one that was paid before it began is resumed now."""
    run: RunSummary | None = event.value
    if run is None or run.workflow != "purchase":
        return
    key = run.run_id.encode()
    if key not in known:
        known[key] = b"yes"
    if key in early and (run.hooks or run.status in TERMINAL):
        await settle(key, early[key])
        del early[key]


@app.each(payments)
async def paid(event: Any) -> None:
    """Gives a payment to the run that waits for it, keeps it until there is one, or sends it back."""
    key, payment = event.message.key, event.message.value
    first = json.loads(early[key])["id"] if key in early else None
    if json.loads(payment)["id"] == first:  # it is delivered again
        return
    if key in known:
        await settle(key, payment)
    elif first is None:
        early[key] = payment
    else:
        await app.delivery.send(f"{SHOP}.refunds", payment, key)


async def settle(key: bytes, payment: bytes) -> None:
    """Resumes the run; a payment counts once, by its own ID, however often this is tried."""
    run_id, value = key.decode(), json.loads(payment)
    try:
        await app.client.resume_hook(f"payment-{run_id.removeprefix('purchase-')}", value, resume_id=value["id"])
    except HookNotFoundError:
        if await app.client.get_run(run_id).status() not in TERMINAL:
            raise Later(f"run {run_id} does not wait for its payment yet") from None
        await app.delivery.send(f"{SHOP}.refunds", payment, key)
