"""Payments' listeners: message -> one action."""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.db.database import Tx
from holdfast.messaging.injection import Incoming
from holdfast.messaging.listen import Listen
from holdfast.services.contracts import topology
from holdfast.services.contracts.events import RefundDue, RefundRequested
from holdfast.services.payments.refund_service import RefundService
from holdfast.services.payments.refunds import Refunds


def listeners(refunds: Refunds, service: RefundService) -> list[Listen]:
    """A wish for a refund goes on the books; a refund on the books is asked of the provider until it answers."""

    async def on_requested(tx: Tx, events: Sequence[RefundRequested]) -> None:
        await refunds.request_late(tx, events)

    async def on_due(incoming: Incoming) -> None:
        await service.ask(incoming.body.refund_id)  # an unknown answer leaves a delayed message behind

    return [
        Listen(
            name="payments.refund",
            queue=topology.PAY_REFUND_QUEUE,
            effects={RefundRequested: on_requested},
            plain={RefundDue: on_due},
        )
    ]
