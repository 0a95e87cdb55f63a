"""Payments' listeners: message -> one action."""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.db.database import Tx
from holdfast.messaging.injection import Incoming
from holdfast.messaging.listen import Listen
from holdfast.messaging.retry import Retry
from holdfast.services.contracts import topology
from holdfast.services.contracts.events import RefundDue, RefundRequested
from holdfast.services.payments.actions import Payments
from holdfast.services.payments.service import PaymentService

ASK_AGAIN_MS = 5_000


def listeners(payments: Payments, service: PaymentService) -> list[Listen]:
    """A wish for a refund goes on the books; a refund on the books is asked of the provider until it answers."""

    async def on_requested(tx: Tx, events: Sequence[RefundRequested]) -> None:
        await payments.request_refunds(tx, events)

    async def on_due(incoming: Incoming) -> None:
        if not await service.refund(incoming.body.refund_id):
            raise Retry(ASK_AGAIN_MS, "the provider's answer to the refund is unknown")

    return [
        Listen(
            name="payments.refund",
            queue=topology.PAY_REFUND_QUEUE,
            effects={RefundRequested: on_requested},
            plain={RefundDue: on_due},
        )
    ]
