"""Values that several services speak of."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import msgspec
from msgspec import Meta

# Printable ASCII without blanks: safe in URLs, logs, file names and every database.
Code = Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]*\Z")]
Currency = Annotated[str, Meta(pattern=r"^[A-Z]{3}\Z")]
AMOUNT_MINOR_MAX = 1_000_000_000_000
MinorUnits = Annotated[int, Meta(ge=0, le=AMOUNT_MINOR_MAX)]
Quantity = Annotated[int, Meta(ge=1, le=1_000_000)]


class Line(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """So many units of a SKU."""

    sku: str
    quantity: int


class Price(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What one unit costs, in minor units (cents, fen) of an ISO 4217 currency, and what holds for selling it."""

    amount_minor: int
    currency: str
    order_max: int | None = None  # units in one order
    buyer_max: int | None = None  # units of one buyer, over all his orders that are open or paid
    time_out_ms: int | None = None  # time to pay an order with this SKU, where it is not the usual one


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """The stock an order wants, all or nothing."""

    order_id: int
    lines: tuple[Line, ...]


class Shortage(msgspec.Struct, frozen=True, kw_only=True):
    """Why an order's stock could not be held: the first SKU that lacks units."""

    sku: str
    wanted: int
    available: int


class Bill(msgspec.Struct, frozen=True, kw_only=True):
    """What a payment order is opened for."""

    order_id: int
    buyer: str
    amount_minor: int
    currency: str
    pay_by_us: int


class PaymentRef(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Where the buyer pays."""

    id: str
    provider: str
    pay_url: str | None = None


class Fate(StrEnum):
    """What an order means to those who hold something for it."""

    OPEN = "open"  # keep holding
    PAID = "paid"  # what is held is sold
    ENDED = "ended"  # give it back


class TradeEnd(StrEnum):
    """The provider's answer when asked about a trade, or to close it."""

    OPEN = "open"  # nobody paid yet, and somebody still can; never the answer to closing
    CLOSED = "closed"  # or never opened: nobody can pay it any more
    PAID = "paid"  # money was captured; closing is refused
    UNKNOWN = "unknown"  # no answer; never taken for either
