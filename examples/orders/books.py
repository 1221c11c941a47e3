"""What the orders must come to, worked out from the CSV alone, with nothing of the workflow's code."""

from __future__ import annotations

import csv
from decimal import ROUND_HALF_UP, Decimal
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path

CENT = Decimal("0.01")


class Order(NamedTuple):
    """A row of the CSV."""

    order_id: str
    customer: str
    day: str
    cds: int
    dollars: str


class Totals(NamedTuple):
    """Sums over all orders: amounts in cents, and how often money was asked for."""

    net: int
    tax: int
    discount: int
    charged: int
    charges: int


def orders(path: Path) -> list[Order]:
    """The rows of the CSV."""
    with path.open(newline="") as file:
        return [
            Order(r["order_id"], r["customer"], r["day"], int(r["cds"]), r["dollars"]) for r in csv.DictReader(file)
        ]


def _cents(amount: Decimal) -> int:
    return int(amount * 100)


def expected(rows: list[Order]) -> Totals:
    """8 % tax; 5 % off from a customer's third order on; refused amounts are asked for again."""
    net = tax = discount = charged = charges = 0
    for row in rows:
        price = Decimal(row.dollars)
        row_tax = (price * Decimal("0.08")).quantize(CENT, ROUND_HALF_UP)
        earlier = len([other for other in rows if other.customer == row.customer and other.day < row.day])
        off = ((price + row_tax) * Decimal("0.05")).quantize(CENT, ROUND_HALF_UP) if earlier >= 2 else Decimal(0)
        to_pay = _cents(price + row_tax - off)
        net += _cents(price)
        tax += _cents(row_tax)
        discount += _cents(off)
        charged += to_pay
        charges += 1 + int(to_pay % 5 == 0) + int(to_pay % 7 == 0)
    return Totals(net, tax, discount, charged, charges)
