"""Connectors for tests that kill, share and starve them."""

import os

from durably import create_hook, workflow
from durably_connectors.faust import IGNORE, Message, trigger

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
