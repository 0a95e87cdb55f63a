"""States and rules of an order. Pure: no await, no clock, no I/O."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Annotated

import msgspec
from msgspec import Meta

from holdfast.clock import rfc3339
from holdfast.errors import HoldfastError, InvalidInput, Refused
from holdfast.services.contracts.values import AMOUNT_MINOR_MAX, Code, Line, PaymentRef, Price


class OrderStatus(StrEnum):
    """Where an order is; the last three are terminal in this version of the graph."""

    PENDING_PAYMENT = "pending_payment"
    PAID = "paid"
    CANCELLED = "cancelled"  # by the buyer or staff
    CLOSED = "closed"  # by the deadline


EDGES: dict[OrderStatus, frozenset[OrderStatus]] = {
    OrderStatus.PENDING_PAYMENT: frozenset({OrderStatus.PAID, OrderStatus.CANCELLED, OrderStatus.CLOSED}),
    OrderStatus.PAID: frozenset(),
    OrderStatus.CANCELLED: frozenset(),
    OrderStatus.CLOSED: frozenset(),
}
"""The graph: every transition an order may make. It starts as `pending_payment`."""

IdempotencyKey = Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[\x21-\x7e]+\Z")]
Buyer = Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[\x21-\x7e]+\Z")]


class OrderLine(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """A line as the buyer sends it; the price is ours to say."""

    sku: Code
    quantity: Annotated[int, Meta(ge=1, le=1_000_000)]


class PricedLine(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A line as it was placed."""

    sku: str
    quantity: int
    price_minor: int


class OrderView(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """An order as its buyer sees it."""

    id: str
    status: OrderStatus
    amount_minor: int
    currency: str
    lines: tuple[PricedLine, ...]
    created_at: str
    pay_by: str
    payment: PaymentRef


class PlaceRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A buyer's wish to order; the same key and lines again are the same wish."""

    buyer: Buyer
    idempotency_key: IdempotencyKey
    lines: tuple[OrderLine, ...]

    @property
    def fingerprint(self) -> bytes:
        """What the key stands for: a digest of the lines in their order."""
        return hashlib.sha256(msgspec.json.encode(self.lines)).digest()


class Placed(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to a placed order: the very bytes that are stored under the idempotency key."""

    order_id: int
    body: bytes
    replayed: bool


class CancelRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A buyer's wish to cancel an order."""

    order_id: int
    buyer: str


class SoldOut(Refused):
    """There are not enough units left."""

    code = "sold_out"


class UnknownSku(Refused):
    """A line names a SKU that is not sold here."""

    code = "unknown_sku"


class MixedCurrencies(Refused):
    """The lines are priced in different currencies; place one order for each."""

    code = "mixed_currencies"


class OrderNotFound(Refused):
    """There is no such order of this buyer."""

    code = "order_not_found"


class NotCancellable(Refused):
    """The order is paid or already ended; it cannot be cancelled."""

    code = "order_not_cancellable"


def check_lines(lines: Sequence[OrderLine], lines_max: int, quantity_max: int) -> None:
    """Refuse an order without lines, with too many, with a SKU twice or with too large a quantity: `InvalidInput`."""
    if not lines:
        raise InvalidInput("lines is empty; an order needs at least one line")
    if len(lines) > lines_max:
        raise InvalidInput(f"an order has at most {lines_max} lines, this one has {len(lines)}")
    seen = set()
    for line in lines:
        if line.sku in seen:
            raise InvalidInput(f"SKU {line.sku!r} stands on two lines; put the sum of their quantities on one")
        seen.add(line.sku)
        if line.quantity < 1:
            raise InvalidInput(f"a line has a quantity of at least 1, {line.sku!r} asks for {line.quantity}")
        if line.quantity > quantity_max:
            raise InvalidInput(
                f"a line has a quantity of at most {quantity_max}, {line.sku!r} asks for {line.quantity}"
            )


def price_lines(
    lines: Sequence[OrderLine], prices: Mapping[str, Price]
) -> tuple[tuple[PricedLine, ...], int, str] | HoldfastError:
    """Price the lines: (lines, amount in minor units, currency), or why that cannot be done."""
    for line in lines:
        if line.sku not in prices:
            return UnknownSku(f"there is no SKU {line.sku!r}")
    currencies = {prices[line.sku].currency for line in lines}
    if len(currencies) > 1:
        return MixedCurrencies(f"the lines are priced in {', '.join(sorted(currencies))}; place one order for each")
    priced = tuple(
        PricedLine(sku=line.sku, quantity=line.quantity, price_minor=prices[line.sku].amount_minor) for line in lines
    )
    amount_minor = sum(line.quantity * line.price_minor for line in priced)
    if amount_minor > AMOUNT_MINOR_MAX:
        return InvalidInput(f"the order amounts to {amount_minor}; at most {AMOUNT_MINOR_MAX} can be paid at once")
    return priced, amount_minor, currencies.pop()


def view(
    order_id: int,
    status: OrderStatus,
    lines: tuple[PricedLine, ...],
    amount_minor: int,
    currency: str,
    created_us: int,
    pay_by_us: int,
    payment: PaymentRef,
) -> OrderView:
    """An order as its buyer sees it; the pay link is shown only while paying is possible."""
    open_to_pay = status is OrderStatus.PENDING_PAYMENT
    return OrderView(
        id=str(order_id),
        status=status,
        amount_minor=amount_minor,
        currency=currency,
        lines=lines,
        created_at=rfc3339(created_us),
        pay_by=rfc3339(pay_by_us),
        payment=payment if open_to_pay else msgspec.structs.replace(payment, pay_url=None),
    )


def unpriced(lines: Sequence[OrderLine]) -> tuple[Line, ...]:
    """The lines as stock wants them."""
    return tuple(Line(sku=line.sku, quantity=line.quantity) for line in lines)
