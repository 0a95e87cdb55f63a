"""Every exchange, queue and key. Names of the course notes are kept, so that Java services of the same mall fit in."""

from __future__ import annotations

from holdfast.messaging.topology import Binding, Exchange, Queue, Topology

ORDER_EVENTS = "order-event-exchange"
STOCK_EVENTS = "stock-event-exchange"
PAY = "pay.direct"
TRADE = "trade.topic"
WEBHOOKS = "webhook.direct"

KEY_ORDER_CREATE = "order.create.order"
KEY_ORDER_DUE = "order.release.order"
KEY_ORDER_CLOSED = "order.release.other"
KEY_ORDER_PAID = "order.paid"
KEY_ORDER_SHIPPED = "order.shipped"
KEY_ORDER_ARRIVING = "order.complete.order"
KEY_ORDER_COMPLETED = "order.completed"
KEY_ORDER_REFUNDED = "order.refunded"
KEY_CART_ORDERED = "order.create"
KEY_STOCK_LOCKED = "stock.locked"
KEY_STOCK_RELEASE = "stock.release"
KEY_PAY_SUCCESS = "pay.success"
KEY_PAY_REFUND = "pay.refund"
KEY_REFUND_OPENED = "pay.refund.opened"
KEY_REFUNDED = "pay.refunded"
KEY_WEBHOOK_DUE = "webhook.due"

USER_HEADER = "user-info"  # whose cart it is, on what carts are told

ORDER_ARRIVING_QUEUE = "order.complete.order.queue"
CART_CLEAR_QUEUE = "cart.clear.queue"
ORDER_DUE_QUEUE = "order.release.order.queue"
STOCK_RELEASE_QUEUE = "stock.release.stock.queue"
STOCK_DELAY_QUEUE = "stock.delay.queue"
STOCK_DEDUCT_QUEUE = "stock.deduct.stock.queue"
PAY_SUCCESS_QUEUE = "trade.pay.success.queue"
ORDER_REFUND_QUEUE = "trade.refund.queue"
PAY_REFUND_QUEUE = "pay.refund.queue"
FEED_QUEUE = "feed.events.queue"
WEBHOOK_QUEUE = "webhook.send.queue"

TOPOLOGY = Topology(
    exchanges=(
        Exchange(name=ORDER_EVENTS, kind="topic"),
        Exchange(name=STOCK_EVENTS, kind="topic"),
        Exchange(name=PAY, kind="direct"),
        Exchange(name=TRADE, kind="topic"),
        Exchange(name=WEBHOOKS, kind="direct"),
    ),
    queues=(
        Queue(name=ORDER_DUE_QUEUE),
        Queue(name=ORDER_ARRIVING_QUEUE),
        Queue(name=CART_CLEAR_QUEUE),
        Queue(name=STOCK_RELEASE_QUEUE),
        Queue(name=STOCK_DEDUCT_QUEUE),
        Queue(name=PAY_SUCCESS_QUEUE),
        Queue(name=PAY_REFUND_QUEUE),
        Queue(name=ORDER_REFUND_QUEUE),
        Queue(name=FEED_QUEUE),
        Queue(name=WEBHOOK_QUEUE),
    ),
    bindings=(
        Binding(exchange=ORDER_EVENTS, queue=ORDER_DUE_QUEUE, routing_key=KEY_ORDER_DUE),
        Binding(exchange=ORDER_EVENTS, queue=ORDER_ARRIVING_QUEUE, routing_key=KEY_ORDER_ARRIVING),
        Binding(exchange=TRADE, queue=CART_CLEAR_QUEUE, routing_key=KEY_CART_ORDERED),
        Binding(exchange=ORDER_EVENTS, queue=STOCK_RELEASE_QUEUE, routing_key="order.release.other.#"),
        Binding(exchange=ORDER_EVENTS, queue=STOCK_DEDUCT_QUEUE, routing_key=KEY_ORDER_PAID),
        Binding(exchange=PAY, queue=PAY_SUCCESS_QUEUE, routing_key=KEY_PAY_SUCCESS),
        Binding(exchange=PAY, queue=PAY_REFUND_QUEUE, routing_key=KEY_PAY_REFUND),
        Binding(exchange=PAY, queue=ORDER_REFUND_QUEUE, routing_key=KEY_REFUND_OPENED),
        Binding(exchange=PAY, queue=ORDER_REFUND_QUEUE, routing_key=KEY_REFUNDED),
        # The facts of contracts/feed.py, key by key: `order.#` would bring the time-outs too.
        Binding(exchange=ORDER_EVENTS, queue=FEED_QUEUE, routing_key=KEY_ORDER_CREATE),
        Binding(exchange=ORDER_EVENTS, queue=FEED_QUEUE, routing_key=KEY_ORDER_PAID),
        Binding(exchange=ORDER_EVENTS, queue=FEED_QUEUE, routing_key=KEY_ORDER_SHIPPED),
        Binding(exchange=ORDER_EVENTS, queue=FEED_QUEUE, routing_key=KEY_ORDER_COMPLETED),
        Binding(exchange=ORDER_EVENTS, queue=FEED_QUEUE, routing_key=KEY_ORDER_REFUNDED),
        Binding(exchange=ORDER_EVENTS, queue=FEED_QUEUE, routing_key=KEY_ORDER_CLOSED),
        Binding(exchange=PAY, queue=FEED_QUEUE, routing_key=KEY_PAY_SUCCESS),
        Binding(exchange=WEBHOOKS, queue=WEBHOOK_QUEUE, routing_key=KEY_WEBHOOK_DUE),
    ),
)


def topology(guard_ms: int) -> Topology:
    """All of it, with what depends on settings: how long a hold stands before somebody looks after it.

    Every `stock.locked` waits in a queue that nobody consumes; when its time is over it goes to the release queue.
    """
    guard = Queue(
        name=STOCK_DELAY_QUEUE,
        message_ttl_ms=guard_ms,
        dead_letter_exchange=STOCK_EVENTS,
        dead_letter_routing_key=KEY_STOCK_RELEASE,
    )
    return TOPOLOGY + Topology(
        exchanges=(Exchange(name=STOCK_EVENTS, kind="topic"),),
        queues=(guard, Queue(name=STOCK_RELEASE_QUEUE)),
        bindings=(
            Binding(exchange=STOCK_EVENTS, queue=STOCK_DELAY_QUEUE, routing_key=KEY_STOCK_LOCKED),
            Binding(exchange=STOCK_EVENTS, queue=STOCK_RELEASE_QUEUE, routing_key="stock.release.#"),
        ),
    )
