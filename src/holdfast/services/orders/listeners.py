"""Orders' listeners: message -> one action."""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.db.database import Tx
from holdfast.messaging.injection import Incoming
from holdfast.messaging.listen import Listen
from holdfast.messaging.retry import Retry
from holdfast.services.contracts import topology
from holdfast.services.contracts.events import OrderArriving, OrderDue, PaymentSucceeded, RefundOpened, RefundSucceeded
from holdfast.services.orders.service import Expiry, OrderService

ASK_AGAIN_MS = 5_000
EARLY_MS = 100  # the message came before the deadline column says so, by a clock of another process


def listeners(service: OrderService) -> list[Listen]:
    """A deadline closes the order unless it is paid; money pays the order or is refunded."""

    async def on_due(incoming: Incoming) -> None:
        match await service.expire(incoming.body.order_id):
            case Expiry.EARLY:
                raise Retry(EARLY_MS, "the deadline is not reached yet")
            case Expiry.UNKNOWN:
                raise Retry(ASK_AGAIN_MS, "the payment side does not know yet")

    async def on_arriving(incoming: Incoming) -> None:
        if not await service.arrive(incoming.body.order_id):
            raise Retry(EARLY_MS, "the delivery time is not over yet")

    async def on_money(tx: Tx, events: Sequence[PaymentSucceeded]) -> None:
        await service.transitions.pay(tx, events)

    async def on_refund_opened(tx: Tx, events: Sequence[RefundOpened]) -> None:
        await service.fulfilment.refunding(tx, events)

    async def on_refunded(tx: Tx, events: Sequence[RefundSucceeded]) -> None:
        await service.fulfilment.refunded(tx, events)

    return [
        Listen(name="orders.due", queue=topology.ORDER_DUE_QUEUE, plain={OrderDue: on_due}),
        Listen(name="orders.arriving", queue=topology.ORDER_ARRIVING_QUEUE, plain={OrderArriving: on_arriving}),
        Listen(
            name="orders.refunds",
            queue=topology.ORDER_REFUND_QUEUE,
            effects={RefundOpened: on_refund_opened, RefundSucceeded: on_refunded},
        ),
        Listen(name="orders.pay", queue=topology.PAY_SUCCESS_QUEUE, effects={PaymentSucceeded: on_money}),
    ]
