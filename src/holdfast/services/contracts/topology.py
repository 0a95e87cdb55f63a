"""Every exchange, queue and key. Names of the course notes are kept, so that Java services of the same mall fit in."""

from __future__ import annotations

from holdfast.messaging.topology import Binding, Exchange, Queue, Topology

ORDER_EVENTS = "order-event-exchange"
STOCK_EVENTS = "stock-event-exchange"
PAY = "pay.direct"

KEY_ORDER_CREATE = "order.create.order"
KEY_ORDER_DUE = "order.release.order"
KEY_ORDER_CLOSED = "order.release.other"
KEY_ORDER_PAID = "order.paid"
KEY_STOCK_LOCKED = "stock.locked"
KEY_PAY_SUCCESS = "pay.success"
KEY_PAY_REFUND = "pay.refund"
KEY_REFUND_OPENED = "pay.refund.opened"
KEY_REFUNDED = "pay.refunded"

ORDER_DUE_QUEUE = "order.release.order.queue"
STOCK_RELEASE_QUEUE = "stock.release.stock.queue"
STOCK_DEDUCT_QUEUE = "stock.deduct.stock.queue"
PAY_SUCCESS_QUEUE = "trade.pay.success.queue"
PAY_REFUND_QUEUE = "pay.refund.queue"

TOPOLOGY = Topology(
    exchanges=(
        Exchange(name=ORDER_EVENTS, kind="topic"),
        Exchange(name=STOCK_EVENTS, kind="topic"),
        Exchange(name=PAY, kind="direct"),
    ),
    queues=(
        Queue(name=ORDER_DUE_QUEUE),
        Queue(name=STOCK_RELEASE_QUEUE),
        Queue(name=STOCK_DEDUCT_QUEUE),
        Queue(name=PAY_SUCCESS_QUEUE),
        Queue(name=PAY_REFUND_QUEUE),
    ),
    bindings=(
        Binding(exchange=ORDER_EVENTS, queue=ORDER_DUE_QUEUE, routing_key=KEY_ORDER_DUE),
        Binding(exchange=ORDER_EVENTS, queue=STOCK_RELEASE_QUEUE, routing_key="order.release.other.#"),
        Binding(exchange=ORDER_EVENTS, queue=STOCK_DEDUCT_QUEUE, routing_key=KEY_ORDER_PAID),
        Binding(exchange=PAY, queue=PAY_SUCCESS_QUEUE, routing_key=KEY_PAY_SUCCESS),
        Binding(exchange=PAY, queue=PAY_REFUND_QUEUE, routing_key=KEY_PAY_REFUND),
    ),
)
