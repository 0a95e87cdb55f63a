"""Every message that travels between services; JSON in camelCase, ids as 64-bit integers, times in microseconds UTC."""

from __future__ import annotations

import msgspec

from holdfast.services.contracts.values import Line


class Event(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A fact or a wish, as it stands on the wire. Unknown fields are ignored, so that newer senders are understood."""


class OrderCreated(Event, frozen=True, kw_only=True):
    """An order was placed and its stock is held."""

    order_id: int
    buyer: str
    amount_minor: int
    currency: str
    lines: tuple[Line, ...]
    pay_by_us: int


class OrderDue(Event, frozen=True, kw_only=True):
    """An order's time to pay is over; the wake-up for closing it. The deadline on its row decides, not this message."""

    order_id: int


class OrderPaid(Event, frozen=True, kw_only=True):
    """An order is paid: what is held for it becomes sold."""

    order_id: int
    payment_id: int


class OrderShipped(Event, frozen=True, kw_only=True):
    """An order has left the house."""

    order_id: int
    tracking: str


class OrderArriving(Event, frozen=True, kw_only=True):
    """A shipped order's time to be completed by itself; the wake-up. The deadline on its row decides."""

    order_id: int


class OrderCompleted(Event, frozen=True, kw_only=True):
    """An order has arrived."""

    order_id: int


class OrderRefunded(Event, frozen=True, kw_only=True):
    """All that was captured for an order was given back."""

    order_id: int


class CartOrdered(Event, frozen=True, kw_only=True):
    """What was in a buyer's cart is ordered; the header `user-info` says whose cart."""

    order_id: int
    skus: tuple[str, ...]


class OrderClosed(Event, frozen=True, kw_only=True):
    """An order ended unpaid, cancelled or timed out: each service gives back what it held for it."""

    order_id: int
    status: str


class StockLocked(Event, frozen=True, kw_only=True):
    """A detail of a work order: so many units of a SKU in a warehouse are held for an order."""

    task_id: int
    detail_id: int
    order_id: int
    sku: str
    warehouse: str
    quantity: int


class PaymentSucceeded(Event, frozen=True, kw_only=True):
    """The provider captured money; whether the order still wants it is for orders to say."""

    payment_id: int
    order_id: int
    amount_minor: int
    currency: str
    captured_us: int


class RefundRequested(Event, frozen=True, kw_only=True):
    """Money was captured that no order owes: give it back once."""

    payment_id: int
    order_id: int
    reason: str


class RefundDue(Event, frozen=True, kw_only=True):
    """A refund is on the books and has to be asked of the provider."""

    refund_id: int


class RefundOpened(Event, frozen=True, kw_only=True):
    """A refund that staff asked for is on the books; `full` when nothing is left of the captured money after it."""

    refund_id: int
    payment_id: int
    order_id: int
    amount_minor: int
    full: bool


class RefundSucceeded(Event, frozen=True, kw_only=True):
    """The provider gave money back; `refunded_minor` is all of the payment that was given back, this refund included.

    `key_reason` is `late` for money that no order owed, `staff` for what staff asked for.
    """

    refund_id: int
    payment_id: int
    order_id: int
    amount_minor: int
    currency: str
    refunded_minor: int
    captured_minor: int
    key_reason: str


class WebhookDue(Event, frozen=True, kw_only=True):
    """Something is to be sent to an endpoint; the wake-up. The due column of its deliveries decides."""

    endpoint_id: int


TYPES: dict[str, type[msgspec.Struct]] = {
    "order.created": OrderCreated,
    "order.due": OrderDue,
    "order.paid": OrderPaid,
    "order.closed": OrderClosed,
    "order.shipped": OrderShipped,
    "order.arriving": OrderArriving,
    "order.completed": OrderCompleted,
    "order.refunded": OrderRefunded,
    "cart.ordered": CartOrdered,
    "stock.locked": StockLocked,
    "payment.succeeded": PaymentSucceeded,
    "refund.requested": RefundRequested,
    "refund.due": RefundDue,
    "refund.opened": RefundOpened,
    "refund.succeeded": RefundSucceeded,
    "webhook.due": WebhookDue,
}
"""Type id on the wire -> struct; nothing else is ever built from a message."""
