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
from holdfast.services.contracts.values import AMOUNT_MINOR_MAX, Code, Line, MinorUnits, PaymentRef, Price


class OrderStatus(StrEnum):
    """Where an order is. Part of its money given back leaves it where it is; all of it makes it `refunded`."""

    PENDING_PAYMENT = "pending_payment"
    PAID = "paid"
    SHIPPED = "shipped"
    COMPLETED = "completed"  # by the buyer, by staff, or by itself some days after it was shipped
    CANCELLED = "cancelled"  # by the buyer or staff
    CLOSED = "closed"  # by the deadline
    REFUNDING = "refunding"  # all that was captured is on its way back
    REFUNDED = "refunded"


EDGES: dict[OrderStatus, frozenset[OrderStatus]] = {
    OrderStatus.PENDING_PAYMENT: frozenset({OrderStatus.PAID, OrderStatus.CANCELLED, OrderStatus.CLOSED}),
    OrderStatus.PAID: frozenset({OrderStatus.SHIPPED, OrderStatus.REFUNDING}),
    OrderStatus.SHIPPED: frozenset({OrderStatus.COMPLETED, OrderStatus.REFUNDING}),
    OrderStatus.COMPLETED: frozenset({OrderStatus.REFUNDING}),
    OrderStatus.CANCELLED: frozenset(),
    OrderStatus.CLOSED: frozenset(),
    OrderStatus.REFUNDING: frozenset({OrderStatus.REFUNDED}),
    OrderStatus.REFUNDED: frozenset(),
}
"""The graph: every transition an order may make, each at most once. It starts as `pending_payment`."""

ENDED_UNPAID = frozenset({OrderStatus.CANCELLED, OrderStatus.CLOSED})
PAID_FOR = frozenset(OrderStatus) - ENDED_UNPAID - {OrderStatus.PENDING_PAYMENT}
"""States of an order whose money was accepted: what tells of that money again is no news."""

IdempotencyKey = Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[\x21-\x7e]+\Z")]
Buyer = Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[\x21-\x7e]+\Z")]


class OrderLine(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """A line as the buyer sends it; the price is ours to say, he may say which one he saw."""

    sku: Code
    quantity: Annotated[int, Meta(ge=1, le=1_000_000)]
    price_minor: MinorUnits | None = None  # what the buyer was shown for one unit; another price is refused


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
    refunded_minor: int = 0
    tracking: str | None = None
    complete_by: str | None = None  # when a shipped order completes by itself


class Entry(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One transition of an order, as it stands in its log."""

    at: str
    from_status: OrderStatus | None
    to_status: OrderStatus
    actor: str
    note: str


AUTOMATIC = frozenset({"payment", "late payment", "deadline", "delivery time", "refund", "nothing to pay"})
"""Actors in the log that are nobody; `buyer` and the buyer's own name stand there too, any other is an employee."""


def as_buyer_sees(entry: Entry, buyer: str) -> Entry:
    """The entry without the name of the employee who did it."""
    known = entry.actor in AUTOMATIC or entry.actor in ("buyer", buyer)
    return entry if known else msgspec.structs.replace(entry, actor="staff")


class PlaceRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A buyer's wish to order; the same key and lines again are the same wish."""

    buyer: Buyer
    idempotency_key: IdempotencyKey
    lines: tuple[OrderLine, ...]
    from_cart: bool = False  # what is in his cart when this is decided; `lines` is empty then

    @property
    def fingerprint(self) -> bytes:
        """What the key stands for: a digest of the lines in their order; the cart is one wish, whatever is in it."""
        return hashlib.sha256(b"cart" if self.from_cart else msgspec.json.encode(self.lines)).digest()


class Placed(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to a placed order: the very bytes that are stored under the idempotency key."""

    order_id: int
    body: bytes
    replayed: bool


class CancelRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A wish to cancel an unpaid order: the buyer's own, or anybody's by staff (`buyer` is None then)."""

    order_id: int
    buyer: str | None
    actor: str = "buyer"


class ShipRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The word of staff that a paid order has left the house."""

    order_id: int
    tracking: str
    actor: str


class CompleteRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The word that a shipped order has arrived: the buyer's about his own, or staff's (`buyer` is None then)."""

    order_id: int
    buyer: str | None
    actor: str


class ExtendRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A later deadline for an unpaid order."""

    order_id: int
    pay_by_us: int
    actor: str


class SoldOut(Refused):
    """There are not enough units left."""

    code = "sold_out"


class UnknownSku(Refused):
    """A line names a SKU that is not sold here."""

    code = "unknown_sku"


class MixedCurrencies(Refused):
    """The lines are priced in different currencies; place one order for each."""

    code = "mixed_currencies"


class PriceChanged(Refused):
    """A line says another price than the one that holds now; show the buyer the new one and ask again."""

    code = "price_changed"


class LimitReached(Refused):
    """The buyer would have more units of a SKU than one buyer may have, or one order than an order may."""

    code = "limit_reached"


class CartEmpty(Refused):
    """There is nothing in the cart to order."""

    code = "cart_empty"


class NotShippable(Refused):
    """Only a paid order can be shipped, and once."""

    code = "order_not_shippable"


class NotCompletable(Refused):
    """Only a shipped order can be completed."""

    code = "order_not_completable"


class NotExtendable(Refused):
    """The order does not wait for payment any more, or its deadline cannot be so late."""

    code = "order_not_extendable"


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
        offer = prices[line.sku]
        if line.price_minor not in (None, offer.amount_minor):
            return PriceChanged(f"a unit of {line.sku!r} costs {offer.amount_minor} now, not {line.price_minor}")
        if offer.order_max is not None and line.quantity > offer.order_max:
            return LimitReached(f"an order has at most {offer.order_max} of {line.sku!r}, this one has {line.quantity}")
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
    refunded_minor: int = 0,
    tracking: str | None = None,
    complete_by_us: int | None = None,
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
        refunded_minor=refunded_minor,
        tracking=tracking,
        complete_by=None if complete_by_us is None else rfc3339(complete_by_us),
    )


def unpriced(lines: Sequence[PricedLine]) -> tuple[Line, ...]:
    """The lines as stock wants them."""
    return tuple(Line(sku=line.sku, quantity=line.quantity) for line in lines)
