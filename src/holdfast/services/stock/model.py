"""Rules of stock: how an order's lines are spread over warehouses. Pure: no await, no clock, no I/O."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from holdfast.services.contracts.values import Code, Currency, Line, Quantity, Shortage

# States of a work order's detail, with the numbers of the course notes.
HELD = 1
RELEASED = 2
DEDUCTED = 3


Title = Annotated[str, Meta(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f-\x9f]+\Z")]
UnitPrice = Annotated[int, Meta(ge=0, le=1_000_000_000_000)]
TimeOut = Annotated[int, Meta(ge=100, le=366 * 86_400_000)]


class Sku(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """What can be sold, and its price."""

    sku: Code
    title: Title
    price_minor: UnitPrice
    currency: Currency
    order_max: Quantity | None = None  # units in one order
    buyer_max: Quantity | None = None  # units of one buyer, over all his orders that are open or paid
    time_out_ms: TimeOut | None = None  # time to pay, where it is not the usual one


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """Units that came in; `key` makes it count once."""

    key: str
    sku: Code
    warehouse: Code
    quantity: Quantity
    actor: str


class Level(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One SKU in one warehouse; available + held + sold = total at every commit."""

    sku: str
    warehouse: str
    available: int
    held: int
    sold: int
    total: int


class Detail(msgspec.Struct, frozen=True, kw_only=True):
    """Units of a SKU in one warehouse held for an order."""

    sku: str
    warehouse: str
    quantity: int


Shelf = dict[tuple[str, str], int]
"""(SKU, warehouse) -> units available; in the order in which warehouses are drawn upon."""


def allocate(
    shelf: Shelf, by_sku: Mapping[str, Sequence[tuple[str, str]]], lines: Iterable[Line]
) -> list[Detail] | Shortage:
    """Take an order's lines from the shelf, all or nothing, splitting a line over warehouses where one is not enough.

    `shelf` is lowered only when every line fits. The last unit can be sold: so many are enough as are wanted.
    """
    details: list[Detail] = []
    for line in lines:
        missing = line.quantity
        for place in by_sku.get(line.sku, ()):
            taken = min(missing, shelf[place])
            if taken > 0:
                details.append(Detail(sku=line.sku, warehouse=place[1], quantity=taken))
                missing -= taken
            if missing == 0:
                break
        if missing:
            return Shortage(sku=line.sku, wanted=line.quantity, available=line.quantity - missing)
    for detail in details:
        shelf[detail.sku, detail.warehouse] -= detail.quantity
    return details
