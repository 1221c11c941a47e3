"""Fulfilling an order: look things up in parallel, charge, pack for a while, ship."""

from __future__ import annotations

import asyncio
import csv
from functools import cache
from pathlib import Path
from typing import TypedDict

import ledger
from durably import RetryableError, get_step_metadata, get_writable, sleep, step, workflow

ORDERS = Path(__file__).parent / "orders.csv"
TAX_PER_MILLE = 80
REGULAR_FROM = 3  # the third order of a customer, and each later one, is a regular customer's
DISCOUNT_PER_MILLE = 50


class Price(TypedDict):
    """Amounts in cents."""

    net: int
    tax: int


class Receipt(TypedDict):
    """What the bank took, in cents, and at which attempt."""

    cents: int
    attempt: int


class Fulfilled(TypedDict):
    """What came of an order. Amounts in cents."""

    order_id: str
    net: int
    tax: int
    discount: int
    charged: int
    attempts: int
    parcel: str


class BankUnavailable(Exception):
    """The bank did not answer."""


def per_mille(cents: int, rate: int) -> int:
    """A share of an amount, rounded half up to a whole cent."""
    return (cents * rate + 500) // 1000


def refusals(cents: int) -> int:
    """How often the bank refuses this amount before it takes it: never, once or twice."""
    return (cents % 5 == 0) + (cents % 7 == 0)


@cache
def _days_of_customers() -> dict[str, list[str]]:
    days: dict[str, list[str]] = {}
    with ORDERS.open(newline="") as file:
        for row in csv.DictReader(file):
            days.setdefault(row["customer"], []).append(row["day"])
    return days


@step
async def check_stock(order_id: str, cds: int) -> str:
    """Reserves the discs."""
    with ledger.entry():
        await asyncio.sleep(0.01 * cds)
        return f"shelf-{order_id[-2:]}"


@step
async def price_with_tax(dollars: str) -> Price:
    """The price in cents, and the tax on it."""
    with ledger.entry():
        await asyncio.sleep(0.01)
        whole, _, cents = dollars.partition(".")
        net = int(whole) * 100 + int(cents.ljust(2, "0"))
        return {"net": net, "tax": per_mille(net, TAX_PER_MILLE)}


@step
def earlier_orders(customer: str, day: str) -> int:
    """How many orders the customer had placed before that day."""
    with ledger.entry():
        return sum(other < day for other in _days_of_customers()[customer])


@step(max_retries=3, backoff="200ms", timeout="10s")
async def charge(order_id: str, cents: int) -> Receipt:
    """Takes the money; the bank refuses some amounts at first."""
    with ledger.entry():
        await asyncio.sleep(0.02)
        attempt = get_step_metadata().attempt
        if attempt <= refusals(cents):
            if cents % 5 == 0 and attempt == 1:
                raise BankUnavailable(f"{order_id}: no answer")
            raise RetryableError(f"{order_id}: try again later", retry_after="300ms")
        return {"cents": cents, "attempt": attempt}


@step
async def ship(order_id: str, shelf: str, cds: int) -> str:
    """Packs disc after disc, and says so on the run's stream."""
    with ledger.entry():
        async with get_writable() as progress:
            for n in range(1, cds + 1):
                await asyncio.sleep(0.1)
                await progress.write(f"{order_id}: disc {n} of {cds} from {shelf}")
            await progress.write(f"{order_id}: shipped")
        return f"parcel-{order_id[-4:]}"


@workflow
async def fulfil(order_id: str, customer: str, day: str, cds: int, dollars: str) -> Fulfilled:
    """One order, from the shelf to the parcel."""
    shelf, price, earlier = await asyncio.gather(
        check_stock(order_id, cds), price_with_tax(dollars), earlier_orders(customer, day)
    )
    gross = price["net"] + price["tax"]
    discount = per_mille(gross, DISCOUNT_PER_MILLE) if earlier + 1 >= REGULAR_FROM else 0
    receipt = await charge(order_id, gross - discount)
    await sleep(1 + 0.25 * cds)
    parcel = await ship(order_id, shelf, cds)
    return {
        "order_id": order_id,
        "net": price["net"],
        "tax": price["tax"],
        "discount": discount,
        "charged": receipt["cents"],
        "attempts": receipt["attempt"],
        "parcel": parcel,
    }
