"""Connectors for tests that kill, share and starve them."""

import os

from durably import create_hook, step, workflow
from durably_connectors.faust import IGNORE, KafkaTopic, Message, Outcome, SqlTable, monitor, sink, trigger

NAMESPACE = os.environ["DURABLY_NAMESPACE"]


@workflow
async def faust_order(number: int) -> int:
    return number


@workflow
async def faust_sale(number: int) -> dict:
    async with create_hook(token=f"faust-payment-{number}") as payment:
        return await payment


@trigger(topic=f"{NAMESPACE}-orders", workflow=faust_order)
def ordered(message: Message):
    return IGNORE if message.value["number"] < 0 else {"number": message.value["number"]}


@trigger(topic=f"{NAMESPACE}-sales", workflow=faust_sale, key="sale-{number}")
def sold(message: Message):
    return (message.value["number"],)


@trigger(topic=f"{NAMESPACE}-payments", token="faust-payment-{number}", key="paid-{number}", patience="3s")
def paid(message: Message):
    return message.value


@step(max_retries=0)
async def faust_pack(number: int) -> str:
    if number % 10 == 3:
        raise ValueError(f"{number} does not fit")
    return f"parcel {number}"


@workflow
async def faust_parcel(number: int) -> str:
    return await faust_pack(number)


@trigger(topic=f"{NAMESPACE}-parcels", workflow=faust_parcel, key="parcel-{number}")
def parcel(message: Message):
    return (message.value["number"],)


@sink(KafkaTopic(f"{NAMESPACE}-packed"), outcomes=faust_parcel)
def packed(outcome: Outcome):
    return {"run": outcome.run_id, "parcel": outcome.result, "why": outcome.error and outcome.error.message}


@sink(KafkaTopic(f"{NAMESPACE}-trouble"), events={"step_failed"})
def trouble(event):
    return event.data.error.message


if "TABLE" in os.environ:

    @sink(SqlTable(os.environ["TABLE"], "outcomes"), outcomes="all")
    def stored(outcome: Outcome):
        return outcome.result

    monitor()
