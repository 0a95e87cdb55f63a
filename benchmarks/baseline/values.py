"""What the baseline's HTTP side and both of its services speak of: carts, orders, notices, refusals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

OVERDUE_BATCH = 200
PENDING = "pending_payment"
PROVIDER = "sandbox"


class Refused(Exception):
    """A request that breaks a rule of the shop."""

    def __init__(self, status: int, code: str, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Cart:
    """What a buyer wants: units by SKU, under a key that makes a repeat harmless."""

    buyer: str
    key: str
    request_hash: str
    quantities: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Line:
    """One SKU of an order, at the price of the moment of ordering."""

    sku: str
    quantity: int
    unit_price_minor: int


@dataclass(frozen=True, slots=True)
class Order:
    """A stored order with its lines and its payment."""

    id: int
    status: str
    amount_minor: int
    currency: str
    pay_by: datetime
    lines: list[Line]
    payment_id: int
    payment_status: str


@dataclass(frozen=True, slots=True)
class PaidNotice:
    """What a verified notice says about a payment."""

    payment_id: int
    event_id: str
    trade_no: str
    amount_minor: int
    currency: str
    paid_at: datetime


class OrderService(Protocol):
    """One order service, in either style."""

    async def place(self, cart: Cart) -> Order:
        """Hold the stock and store the order, or return the order this key has already made."""
        ...

    async def get(self, buyer: str, order_id: int) -> Order:
        """Return the buyer's own order."""
        ...

    async def pay(self, notice: PaidNotice) -> None:
        """Mark the order paid and take its held units out of stock; a repeated notice changes nothing."""
        ...

    async def close_overdue(self) -> int:
        """Close orders whose time to pay has passed, each in its own transaction; return how many."""
        ...
